"""A validation as text for the terminal, a Markdown page, JSON, and a plot."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from calibration.fitting.measured_runs import UNSTEADY_SPREAD
from calibration.validation.aims import aims_as_data, standings
from calibration.validation.page import validation_page
from calibration.validation.physics_check import physics_section
from calibration.validation.public_runs import SOURCES
from calibration.validation.rows import OWN, Comparison, MeasuredRow, load_split, measured_watts
from calibration.validation.saturated_check import saturated_sections
from calibration.validation.validate import (
    NAIVE_RULES,
    OWN_RUNS,
    ErrorStats,
    Group,
    Validation,
    by_model,
    by_phase,
    by_source,
    check_levels,
    error_stats,
    group_by,
    load_levels,
    record_levels,
    to_dict,
    validate,
)
from energymodel.errors import EnergyModelError
from energymodel.html_report import check_report_file
from energymodel.plots import MeasuredPoint, predicted_against_measured
from energymodel.terminal import write_text

PAGE, PLOT = "validation.md", "validation.png"

_SPLITS = ((False, "held out"), (True, "open to fits"))


def terminal_text(validation: Validation, *, color: bool) -> str:
    """Compact tables for a terminal."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    width = max(shutil.get_terminal_size((126, 24)).columns, 100) if color else 126
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    for fitted, title in _SPLITS:
        groups = group_by(validation.comparisons, by_source, fitted=fitted)
        if not groups:
            continue
        table = Table(title=f"Rows {title}: |error| in %", title_justify="left", box=None)
        table.add_column("source, GPU, stack", no_wrap=True)
        for heading in (
            "rows",
            "J med",
            "p90",
            "max",
            "sign",
            "in range",
            "W med",
            "s med",
            "p90",
            "FLOPs J",
            "best rule",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for group in groups:
            table.add_row(group.name, *_terminal_cells(group))
        console.print(table)
        console.print()
    console.print(
        "[dim]sign: median with its sign, - = predicted too low; in range: measured energy lies in "
        "the interval;\nFLOPs J: median |error| of FLOPs x TDP / peak; best rule: that of the best "
        "naive rule.[/dim]"
    )
    out = console.file
    assert isinstance(out, io.StringIO)
    lines = [line.rstrip() for line in out.getvalue().rstrip().splitlines()]
    lines += [f"skipped: {reason}" for reason in validation.skipped]
    if count := sum(entry.rows for entry in validation.left_out):
        lines.append(f"left out: {count} rows, reasons in the report (--report FOLDER)")
    return "\n".join(lines)


def _terminal_cells(group: Group) -> list[str]:
    joules, seconds, watts = group.joules, group.seconds, group.watts
    flops = group.naive["flops_tdp"]
    best = _best_rule(group)
    return [
        str(group.rows),
        *(_percent(joules, name) for name in ("median_abs", "p90_abs", "max_abs", "median")),
        "-" if group.coverage is None else f"{group.coverage:.0%}",
        _percent(watts, "median_abs"),
        _percent(seconds, "median_abs"),
        _percent(seconds, "p90_abs"),
        _percent(flops, "median_abs"),
        "-" if best is None else f"{_percent(best[1], 'median_abs')} {best[0]}",
    ]


def _percent(stats: ErrorStats | None, name: str) -> str:
    if stats is None:
        return "-"
    value = 100.0 * getattr(stats, name)
    return f"{value:+.1f}" if name == "median" else f"{value:.1f}"


def _best_rule(group: Group) -> tuple[str, ErrorStats] | None:
    known = [(rule, stats) for rule, stats in group.naive.items() if stats is not None]
    return min(known, key=lambda item: item[1].median_abs) if known else None


# -- Markdown -------------------------------------------------------------------------


def write_report(validation: Validation, folder: Path, more: Sequence[str] = ()) -> None:
    """Write `validation.md` and `validation.png` into a folder.

    `more` are further parts of the page, in Markdown, put before the list of all rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot(validation, folder / PLOT)
    (folder / PAGE).write_text(markdown(validation, more), encoding="utf-8")


def markdown(validation: Validation, more: Sequence[str] = ()) -> str:
    """Return the whole page."""
    parts = [
        _INTRODUCTION,
        f"![Predicted against measured joules per output token]({PLOT})",
        _aims(validation),
    ]
    for fitted, title in _SPLITS:
        tables = [
            _group_table(heading, group_by(validation.comparisons, key, fitted=fitted))
            for heading, key in (
                ("By source, GPU and stack", by_source),
                ("By model", by_model),
                ("By phase and batch", by_phase),
            )
        ]
        naive = _naive_table(group_by(validation.comparisons, by_source, fitted=fitted))
        count = sum(c.fitted == fitted for c in validation.comparisons)
        parts.append(f"## Rows {title}")
        parts += [*tables, naive] if count else ["None yet."]
    parts += [
        _repeats(validation),
        _sources(),
        *more,
        _split_text(),
        _left_out(validation),
        _all_rows(validation),
    ]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Validation

Generated by `energymodel validate --public FOLDER --report docs`; do not edit by hand.

Every measured row is served by the simulator with its own requests and engine settings, on the
calibration that ships for its GPU. An error is predicted / measured - 1. Joules are those of all
GPU boards of the row, seconds are time per output token (1 / throughput), watts the average power.
"n" counts rows; |e| is the size of an error, "sign" the median with its sign, negative where the
prediction is too low. "In range" is the share of measured energies inside the printed interval,
which is meant to be 90 %.

A saturated server is simulated as two offline workloads: both fill the batch and drain it with the
same requests, one has more in between; the difference of their joules, seconds and tokens is the
steady state, newcomers' prefill included (`steady_state` in `calibration/validation/rows.py`).

Naive rules get what a user would give them: tokens, parameters, and where they need a time, the
time that this model predicts. [residuals.md](residuals.md) says what the errors point to."""


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join([_line(head), _line(rule), *(_line(row) for row in rows)])


def _group_table(heading: str, groups: Sequence[Group]) -> str:
    head = (
        "group",
        "n",
        "J: median \\|e\\|",
        "p90",
        "max",
        "sign",
        "in range",
        "W: median \\|e\\|",
        "sign",
        "s: median \\|e\\|",
        "p90",
        "sign",
        "TTFT",
        "TPOT",
    )
    rows = []
    for g in groups:
        joules, watts, seconds = (
            [_percent(stats, name) for name in names]
            for stats, names in (
                (g.joules, ("median_abs", "p90_abs", "max_abs", "median")),
                (g.watts, ("median_abs", "median")),
                (g.seconds, ("median_abs", "p90_abs", "median")),
            )
        )
        covered = "-" if g.coverage is None else f"{100 * g.coverage:.0f}"
        latency = [_percent(stats, "median") for stats in (g.ttft, g.tpot)]
        rows.append([g.name, str(g.rows), *joules, covered, *watts, *seconds, *latency])
    return f"### {heading}\n\nErrors in %. TTFT and TPOT: median with sign.\n\n" + markdown_table(
        head, rows
    )


def _naive_table(groups: Sequence[Group]) -> str:
    rows = [
        [g.name, _both(g.joules), *(_both(g.naive[rule]) for rule in NAIVE_RULES)] for g in groups
    ]
    return (
        "### Energy by naive rules\n\nMedian |error| in % (median with sign).\n\n"
        + markdown_table(("group", "this model", *NAIVE_RULES), rows)
    )


def _both(stats: ErrorStats | None) -> str:
    if stats is None:
        return "-"
    return f"{_percent(stats, 'median_abs')} ({_percent(stats, 'median')})"


def _aims(validation: Validation) -> str:
    rows = []
    for s in standings(validation):
        span = f"{100 * s.aim.low:.0f} to " if s.aim.low else "at most "
        verdict = {True: "met", False: "missed", None: "not measured yet"}[s.met]
        value = "-" if s.value is None else f"{100 * s.value:.1f}"
        aim = f"{span}{100 * s.aim.high:.0f}"
        rows.append(
            [s.aim.rows, s.aim.statistic.replace("|", "\\|"), str(s.rows), aim, value, verdict]
        )
    head = ("held-out rows", "statistic", "n", "aim %", "today %", "")
    return "## Aims\n\n" + markdown_table(head, rows)


def _repeats(validation: Validation) -> str:
    """How far apart two measurements of the same case are: no model can do better."""
    cases: dict[tuple[str, ...], list[MeasuredRow]] = {}
    for c in validation.comparisons:
        cases.setdefault(c.row.case, []).append(c.row)
    several = [rows for rows in cases.values() if len(rows) > 1 and rows[0].source == OWN]
    text = "## Repeated and unsteady measurements\n\n"
    unsteady = [c.row.name + f" ({c.row.stack})" for c in validation.comparisons if c.row.unsteady]
    if unsteady:
        text += (
            f"In {len(unsteady)} own rows the slowest tenth of the decode steps took more than "
            f"{UNSTEADY_SPREAD:g} times as long as the fastest: the host was disturbed. They are "
            f"kept in the tables above: {'; '.join(unsteady)}.\n\n"
        )
    if not several:
        return text + "No case was measured twice yet."
    lines = []
    for what, quantity in (
        ("joules", lambda r: r.joules_per_output_token),
        ("seconds", lambda r: r.seconds_per_output_token),
    ):
        spread = error_stats(
            max(map(quantity, rows)) / min(map(quantity, rows)) - 1.0 for rows in several
        )
        assert spread is not None
        lines.append(
            f"- {what}: median {100 * spread.median_abs:.1f} %, p90 {100 * spread.p90_abs:.1f} %, "
            f"max {100 * spread.max_abs:.1f} %"
        )
    return (
        f"{text}{len(several)} cases were measured more than once (other card or sitting). Highest "
        "over lowest:\n\n" + "\n".join(lines)
    )


def _sources() -> str:
    lines = [
        f"- **{name}**: {s.title}. {s.citation}. {s.assumption}" for name, s in SOURCES.items()
    ]
    own = (
        f"- **{OWN}**: this project's records under `calibration/data/serving`, made by "
        "`python -m calibration.serving.run_plan`: one batch offline, or a trace replayed; "
        "random weights (vLLM's own `dummy` ones lie within 0.001 of zero), greedy decoding."
    )
    return "## Sources and what is assumed about them\n\n" + "\n".join([*lines, own])


def _split_text() -> str:
    split = load_split()

    def named(part: str) -> str:
        return "; ".join(f"{key}: {', '.join(map(str, v))}" for key, v in split[part].items())

    return (
        f"## The split\n\n{split['comment']}\n\nOpen to fits (`calibration/data/split.json`): "
        f"{named('fit')}. Open for their power alone: {named('public_power')}."
    )


def _left_out(validation: Validation) -> str:
    rows = [[e.source, str(e.rows), e.reason] for e in validation.left_out]
    lines = [f"- {e[0]}: {e[1]} rows: {e[2]}" for e in rows]
    lines += [f"- skipped: {reason}" for reason in validation.skipped]
    return "## Rows left out\n\n" + ("\n".join(lines) if lines else "None.")


def _all_rows(validation: Validation) -> str:
    head = (
        "row",
        "GPU",
        "stack",
        "phase",
        "J/token measured",
        "predicted",
        "e %",
        "W measured",
        "e %",
        "ms/token measured",
        "predicted",
        "e %",
    )
    parts = ["## All rows"]
    sources: dict[str, list[Comparison]] = {}
    for c in validation.comparisons:
        sources.setdefault(c.row.source, []).append(c)
    for source, members in sources.items():
        parts.append(f"### {source}")
        parts.append(markdown_table(head, [_row_cells(c) for c in members]))
    return "\n\n".join(parts)


def _row_cells(c: Comparison) -> list[str]:
    row = c.row
    return [
        row.name + (" (fit)" if c.fitted else "") + (" (unsteady)" if row.unsteady else ""),
        row.gpu,
        row.stack,
        row.phase,
        _number(row.joules_per_output_token),
        _number(c.joules_per_output_token),
        _signed(c.joules_error),
        _number(measured_watts(row)),
        _signed(c.watts_error),
        _number(row.seconds_per_output_token * 1e3),
        _number(c.seconds_per_output_token * 1e3),
        _signed(c.seconds_error),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


# -- JSON -----------------------------------------------------------------------------


def json_text(validation: Validation) -> str:
    """Every row, the errors of groups of rows, and where the aims stand."""
    document = {**to_dict(validation), "aims": aims_as_data(validation)}
    return json.dumps(document, indent=2, allow_nan=False)


# -- plot -----------------------------------------------------------------------------


def plot(validation: Validation, path: Path) -> None:
    """Predicted against measured joules per output token, and the ratio of the two, as PNG.

    Raises
    ------
    EnergyModelError
        If matplotlib is not installed.
    """
    figure = predicted_against_measured(measured_points(validation))
    figure.savefig(path, metadata={"Software": None})


def measured_points(validation: Validation) -> list[MeasuredPoint]:
    """Rows with a measured energy, as figures take them."""
    return [
        MeasuredPoint(
            source=c.row.source,
            kind=c.row.phase,
            name=f"{c.row.name}, {c.row.gpu}, {c.row.stack}",
            fitted=c.fitted,
            batch=c.row.batch,
            measured_joules=c.row.joules_per_output_token,
            predicted_joules=c.joules_per_output_token,
        )
        for c in validation.comparisons
        if c.row.joules_per_output_token is not None and c.joules_per_output_token is not None
    ]


# -- the command ----------------------------------------------------------------------


def run(
    *,
    public: Path | None,
    own: Path | None,
    report: Path | None,
    check: bool,
    record: bool,
    as_json: bool,
    color: bool,
) -> tuple[str, list[str]]:
    """Validate, write what was asked for, and return the text to print and failed checks.

    `report` names a page if it ends in `.html`, and otherwise a folder, see `write_report`.

    Raises
    ------
    EnergyModelError
        If measurements cannot be read, nothing at all was found to compare, or the page that
        `report` names cannot be written.
    """
    page = report if report is not None and report.suffix.lower() == ".html" else None
    if page is not None:
        check_report_file(page)
    validation = validate(public=public, own=own or OWN_RUNS)
    if not validation.comparisons:
        raise EnergyModelError("nothing to validate with: " + "; ".join(validation.skipped))
    if page is not None:
        points = measured_points(validation)
        write_text(validation_page(validation, json_text(validation), points), page)
    elif report is not None:
        more = [physics_section(validation, public), *saturated_sections(validation)]
        write_report(validation, report, more)
    failures: list[str] = []
    notices: list[str] = []
    if check:
        failures, notices = check_levels(validation, load_levels())
    if record:
        record_levels(validation)
    if as_json:
        return json_text(validation), failures
    text = terminal_text(validation, color=color)
    return "\n".join([text, *notices]), failures
