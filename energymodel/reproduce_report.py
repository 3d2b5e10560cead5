"""The paper's findings as a table for the terminal, a Markdown page, and JSON."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from energymodel.paper_findings import Estimate, Finding, Row
from energymodel.reproduce import Reproduction, Speculation

_WIDTH = 140  # columns where there is no terminal


def render(
    result: Reproduction, form: str, figure: str | None = None, *, color: bool = False
) -> str:
    """The result as `table`, `json` or `markdown`; `figure` is its address for the page."""
    if form == "json":
        return as_json(result)
    return as_markdown(result, figure) if form == "markdown" else as_table(result, color=color)


def figure_address(figure: Path, page: Path | None) -> str:
    """Path of the figure relative to the folder of the page, with forward slashes."""
    folder = Path() if page is None else page.parent
    return Path(os.path.relpath(figure.absolute(), folder.absolute())).as_posix()


def to_dict(result: Reproduction) -> dict[str, Any]:
    """Plain dicts, lists and numbers; what is not a finite number is null."""
    plain: dict[str, Any] = _finite(
        {
            "schema_version": 1,
            "source": result.source,
            "findings": [row.to_dict() for row in result.rows],
            "table4_readings": [asdict(reading) for reading in result.readings],
            "table4_sensitivity": [asdict(gap) for gap in result.sensitivity],
            "speculation": [_speculation_dict(pair) for pair in result.speculation],
        }
    )
    return plain


def as_json(result: Reproduction) -> str:
    """Everything the page shows, values as fractions of 1."""
    return json.dumps(to_dict(result), indent=2, allow_nan=False, ensure_ascii=False)


def _speculation_dict(pair: Speculation) -> dict[str, Any]:
    always = {a: last == math.inf for a, last in pair.last_paying_batch.items()}
    return asdict(pair) | {"pays_at_every_batch": always}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- cells ----------------------------------------------------------------------------


def _number(finding: Finding, value: float) -> str:
    if finding.unit == "plain":
        return f"{value:.2f}"
    if finding.quantity.startswith("share"):
        return f"{100.0 * value:.0f} %"
    return f"{100.0 * value:+.1f} %"


def _stated(finding: Finding) -> str:
    if finding.stated is None:
        return finding.stated_text or "-"
    return f"{100.0 * finding.stated:+.2f} %"


def _range(finding: Finding, low: float | None, high: float | None) -> str:
    if low is None or high is None or low == high:
        return ""
    if finding.unit == "plain":
        return f"{low:.2f} to {high:.2f}"
    sign = "" if finding.quantity.startswith("share") else "+"
    return f"{100.0 * low:{sign}.0f} to {100.0 * high:{sign}.0f} %"


def _predicted(row: Row) -> str:
    p = row.predicted
    if p is None:
        return "not predicted"
    interval = _range(row.finding, p.low, p.high)
    return _number(row.finding, p.value) + (f" [{interval}]" if interval else "")


def _open(row: Row) -> str:
    p = row.predicted
    return "" if p is None else _range(row.finding, p.spread_low, p.spread_high)


def _measured(row: Row) -> str:
    m = row.measured
    if m is None:
        return ""
    span = _range(row.finding, m.low, m.high)
    return _number(row.finding, m.value) + (f" ({span})" if span else "")


def _way(row: Row) -> str:
    words = {True: "yes", False: "no", None: "-"}
    ours, metered = words[row.same_direction], words[row.measured_same_direction]
    return ours if metered == "-" else f"{ours}, measured {metered}"


def _counts(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.same_direction is not None]
    inside = [row.stated_in_interval for row in rows if row.stated_in_interval is not None]
    return (
        f"{sum(bool(row.same_direction) for row in judged)} of {len(judged)} predictions go the "
        f"paper's way; of the {len(inside)} with an interval and a stated number, {sum(inside)} "
        "hold that number"
    )


# -- terminal -------------------------------------------------------------------------


def as_table(result: Reproduction, *, color: bool) -> str:
    """Stated, predicted and measured, one line a finding."""
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, 100)
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    table = Table(title="The paper's findings", title_justify="left", box=None, pad_edge=False)
    for heading, side in (
        ("finding", "left"),
        ("stated", "right"),
        ("predicted [interval]", "right"),
        ("where not stated", "right"),
        ("measured, H100", "right"),
        ("same way", "left"),
    ):
        table.add_column(heading, justify="right" if side == "right" else "left")
    for row in result.rows:
        cells = (
            row.finding.title,
            _stated(row.finding),
            _predicted(row),
            _open(row),
            _measured(row),
            _way(row),
        )
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
    console.print()
    console.print(
        f"{_counts(result.rows)}. Table 4 under both readings of the peak, its sensitivity, "
        "speculation by acceptance, and why each number differs: --format markdown or json.",
        markup=False,
    )
    out = console.file
    assert isinstance(out, io.StringIO)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


# -- Markdown -------------------------------------------------------------------------


def as_markdown(result: Reproduction, figure: str | None = None) -> str:
    """The whole page; `figure` is the address of the figure in it."""
    parts = [
        "# The paper's findings",
        f"Every quantitative finding of {result.source}: as stated, as predicted for the paper's "
        "GPU, and as measured on an H100 where that was done. Nothing was fitted to the paper. "
        "`make findings` writes this page, `energymodel reproduce` prints it.",
        _READING,
        f"**{_counts(result.rows)}.**",
        findings_table(result.rows),
    ]
    if figure is not None:
        parts.append(f"![Findings as stated, predicted and measured]({figure})")
    parts += ["## Why they differ", *_reasons(result.rows)]
    parts += ["## Table 4 under both readings of the peak", *_readings(result)]
    parts += ["## What moves the gap", *_sensitivity(result)]
    parts += ["## Speculative decoding by acceptance", *_speculation(result)]
    return "\n\n".join(parts)


def findings_table(rows: Sequence[Row]) -> str:
    """The findings alone, as a Markdown table."""
    return _table(
        (
            "where",
            "finding",
            "quantity",
            "stated",
            "predicted [interval]",
            "over what is not stated",
            "measured, H100",
            "same way",
        ),
        [
            (
                row.finding.where,
                row.finding.statement,
                row.finding.quantity,
                _stated(row.finding),
                _predicted(row),
                _open(row),
                _measured(row),
                _way(row),
            )
            for row in rows
        ],
    )


_READING = (
    "Changes are negative where energy or time is saved. The interval is that of the calibration; "
    "for a ratio of two predictions it is as if their errors were independent, which is wider than "
    "errors that both share deserve. It is wide because none of the paper's GPUs was measured "
    "here: their calibrations are carried over by datasheet. Where the paper leaves a condition "
    "open, the next column gives the predictions over a range of it. Measurements are of another "
    "GPU, and of cases of their own, named below."
)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(cell or "-" for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """One paragraph for each reason, with the settings of the findings that share it."""
    by_reason: dict[str, list[Row]] = {}
    for row in rows:
        by_reason.setdefault(row.finding.why, []).append(row)
    for why, group in by_reason.items():
        names = "; ".join(dict.fromkeys(row.finding.statement for row in group))
        lines = [f"**{names}.** {why}"]
        if open_points := group[0].finding.not_stated:
            lines.append(f"- Not stated: {open_points}.")
        settings = dict.fromkeys(
            f"- Computed on {row.predicted.gpu}: {row.predicted.setting}."
            for row in group
            if row.predicted is not None
        )
        lines += settings
        lines += dict.fromkeys(
            f"- Measured on {row.measured.gpu}, {row.measured.cases} "
            f"{'case' if row.measured.cases == 1 else 'cases'}: {row.measured.setting}."
            for row in group
            if row.measured is not None
        )
        yield lines[0] + ("\n\n" + "\n".join(lines[1:]) if lines[1:] else "")


def _readings(result: Reproduction) -> Iterator[str]:
    yield (
        f"The paper's ideal is FLOPs x TDP / peak, {result.peak_source}. BF16 kernels without "
        "sparse weights cannot pass the dense peak, so the paper's ideal is half of what such "
        "kernels would take at the dense peak and the board's full power. Over that dense ideal, "
        "the paper's energies for vLLM have a negative gap: more FLOPs per joule than the dense "
        "peak gives, in a workload that also decodes. So its FLOPs, its batches or its energies "
        "mean something else than the plain reading, and the paper does not say what. Its numbers "
        "are shown here, and not aimed at."
    )

    def cell(estimate: Estimate) -> str:
        assert estimate.low is not None
        assert estimate.high is not None
        low, high = (f"{100.0 * end:+.0f}" for end in (estimate.low, estimate.high))
        return f"{100.0 * estimate.value:+.0f} % [{low} to {high} %]"

    yield _table(
        (
            "dataset",
            "stack",
            "stated, 309.7 TFLOP/s",
            "predicted, 309.7",
            "stated over the dense ideal",
            "predicted over the dense ideal",
        ),
        [
            (
                reading.dataset,
                reading.stack,
                f"{100.0 * reading.stated:+.2f} %",
                cell(reading.predicted),
                f"{100.0 * reading.stated_dense:+.1f} %",
                cell(reading.predicted_dense),
            )
            for reading in result.readings
        ],
    )


def _sensitivity(result: Reproduction) -> Iterator[str]:
    yield (
        "Predicted energy over the ideal, with one thing changed at a time. The first line is the "
        "paper's reading: ceiling bins, N/B batches of each, B as large as fits up to 256."
    )
    columns = list(dict.fromkeys((gap.dataset, gap.stack) for gap in result.sensitivity))
    values = {(g.reading, g.dataset, g.stack): g.value for g in result.sensitivity}
    readings = dict.fromkeys(gap.reading for gap in result.sensitivity)
    yield _table(
        ("reading", *(f"{dataset}, {stack}" for dataset, stack in columns)),
        [
            (reading, *(f"{100.0 * values[reading, d, s]:+.0f} %" for d, s in columns))
            for reading in readings
        ],
    )
    yield (
        "The gap depends on the batch more than on anything else, then on the peak and on whether "
        "a multiply-add counts as one FLOP or two. Static batches of mixed lengths (PyTorch, "
        "lengths not rounded) are padded to their longest request; the paper's bins hide that, "
        "since all requests of a bin have one length."
    )


def _speculation(result: Reproduction) -> Iterator[str]:
    yield (
        "The paper does not state how many drafted tokens were accepted, and that decides. Change "
        "of joules per output token, by batch; prompts left out. A round is the drafts and one "
        "check of all of them, and gives (1 - a^(g+1)) / (1 - a) tokens (Leviathan et al. 2023)."
    )
    for pair in result.speculation:
        rows = [
            (
                acceptance,
                *(f"{100.0 * value:+.0f} %" for value in values),
                _last(pair.last_paying_batch[acceptance]),
            )
            for acceptance, values in pair.change.items()
        ]
        needed = [
            "never" if math.isnan(value) else f"{value:.2f}" for value in pair.break_even_acceptance
        ]
        rows.append(("break-even acceptance", *needed, ""))
        yield f"{pair.target} with {pair.draft} on {pair.gpu}:"
        yield _table(
            ("acceptance", *(f"batch {batch}" for batch in pair.batch), "pays up to batch"), rows
        )


def _last(batch: float | None) -> str:
    if batch is None:
        return "none"
    return "all here" if batch == math.inf else f"{batch:.0f}"
