"""Points of a sweep as text for people, and as CSV, JSON or Parquet for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from energymodel.pareto import (
    Comparison,
    Targets,
    criteria,
    differing_axes,
    pareto_front,
    ranking,
)
from energymodel.report import range_text, seconds_text, three_digits
from energymodel.settings import AXES, SHORT_NAMES
from energymodel.sweep import Point

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCHEMA_VERSION = 1
"""Of the JSON; rises when a key changes its meaning or goes."""

_WIDTH = 140  # columns where there is no terminal


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Flat rows with `on_front`, whether no other point beats it in everything."""
    front = pareto_front(criteria(points))
    return [
        {"number": number, **point.row(), "on_front": bool(on)}
        for number, (point, on) in enumerate(zip(points, front, strict=True), start=1)
    ]


def as_csv(points: Sequence[Point]) -> str:
    """One line a point."""
    text = io.StringIO()
    table = rows(points)
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().rstrip("\n")


def as_parquet(points: Sequence[Point]) -> bytes:
    """The same as a Parquet file."""
    import polars as pl  # noqa: PLC0415

    data = io.BytesIO()
    pl.DataFrame(rows(points), infer_schema_length=None).write_parquet(data)
    return data.getvalue()


def as_json(
    points: Sequence[Point], objective: str, targets: Targets, comparison: Comparison | None
) -> str:
    """Everything: points in order of the grid, numbers of the best and of the front."""
    front = pareto_front(criteria(points))
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "objective": objective,
        "points": [point.to_dict() for point in points],
        "best": [i + 1 for i in ranking(points, objective, targets)],
        "front": [int(i) + 1 for i in front.nonzero()[0]],
    }
    if comparison is not None:
        document["comparison"] = {
            "sentence": comparison.sentence,
            "joules_per_request": {
                name: {"first": first, "second": second}
                for name, (first, second) in comparison.by_component.items()
            },
        }
    return json.dumps(document, indent=2, allow_nan=False)


def as_tables(
    points: Sequence[Point],
    objective: str,
    targets: Targets,
    comparison: Comparison | None,
    *,
    top: int,
    color: bool,
) -> str:
    """The best points, the front, what was refused and why, and the comparison."""
    from rich.console import Console  # noqa: PLC0415 (slow to import)

    width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, 80)
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    order = ranking(points, objective, targets)
    front = pareto_front(criteria(points))
    axes = [name for name in differing_axes(points) if name != "replicas"]
    fixed = ", ".join(
        f"{name} {getattr(points[0].setting, name)}"
        for name in AXES
        if name not in axes and name != "replicas" and getattr(points[0].setting, name) is not None
    )
    console.print(f"{len(points)} settings; the same in all: {fixed}")
    if order:
        title = f"The {min(top, len(order))} best of {len(order)} by {objective}"
        print_whole(console, _table(title, points, order[:top], axes, front))
        console.print(
            "* no other setting is as good in everything and better in something. ~ estimated in "
            "steady states, not simulated."
        )
    else:
        console.print(f"[bold]No setting of {len(points)} serves the trace within the targets.[/]")
    missed = [i for i, point in enumerate(points) if point.served and i not in set(order)]
    if missed:
        by_reason: dict[str, list[int]] = {}
        for i in missed:
            late = targets.missed(points[i].ttft_seconds, points[i].tpot_seconds)
            unknown = f"have no known {objective}; give --price or --grid"
            by_reason.setdefault("miss the targets" if late else unknown, []).append(i)
        for reason, numbers in by_reason.items():
            nearest = points[numbers[0]]
            late = targets.missed(nearest.ttft_seconds, nearest.tpot_seconds)
            example = "; ".join(late) or f"{nearest.setting.gpu}"
            console.print(f"{len(numbers)} settings {reason}, e.g. {example}.", markup=False)
    for reason, count in refused(points)[:5]:
        console.print(f"{count} refused: {reason}", markup=False)
    if comparison is not None:
        console.print()
        print_whole(console, _comparison(comparison))
        console.print(comparison.sentence, markup=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def refused(points: Iterable[Point]) -> list[tuple[str, int]]:
    """Why settings cannot be served and how many, the most frequent reason first."""
    return Counter(point.reason for point in points if not point.served).most_common()


def print_whole(console: Console, table: Table) -> None:
    """Print a table with no cell cut; wider than the terminal if it has to be."""
    from rich.console import Console  # noqa: PLC0415
    from rich.measure import Measurement  # noqa: PLC0415

    endless = console.options.update(width=10_000)
    width = max(console.width, Measurement.get(console, endless, table).maximum)
    color = console.is_terminal
    wide = Console(
        file=console.file, force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    wide.print(table)


def _table(
    title: str, points: Sequence[Point], numbers: Sequence[int], axes: Sequence[str], front: Any
) -> Table:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("no.", justify="right", no_wrap=True)
    for name in axes:
        table.add_column(SHORT_NAMES.get(name, name), justify="right", overflow="fold")
    shown = [points[i] for i in numbers]
    costs = any(point.usd is not None for point in shown)
    carbon = any(point.carbon_grams is not None for point in shown)
    headings = ["replicas", "GPUs", "J/request", "interval", "TTFT p99", "TPOT p99"]
    headings += ["USD"] * costs + ["CO2e"] * carbon
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True)
    for i in numbers:
        point = points[i]
        assert point.energy_joules is not None
        assert point.energy_joules_low is not None
        assert point.energy_joules_high is not None
        requests = point.energy_joules / (point.joules_per_request or 1.0)
        cells = [
            ("*" if front[i] else " ") + ("~" if point.mode == "binned" else " "),
            str(i + 1),
            *(str(getattr(point.setting, name)) for name in axes),
            f"{point.replicas:,}",
            f"{point.gpus:,}",
            three_digits(point.joules_per_request or 0.0),
            range_text(point.energy_joules_low / requests, point.energy_joules_high / requests),
            seconds_text(point.ttft_seconds.get("p99")),
            seconds_text(point.tpot_seconds.get("p99")),
        ]
        if costs:
            cells.append("-" if point.usd is None else f"{point.usd:,.2f}")
        if carbon:
            grams = point.carbon_grams
            cells.append("-" if grams is None else f"{three_digits(grams)} g")
        table.add_row(*cells)
    return table


def _comparison(comparison: Comparison) -> Table:
    from rich.table import Table  # noqa: PLC0415

    differ = differing_axes([comparison.first, comparison.second])
    names = [
        ", ".join(f"{axis} {getattr(point.setting, axis)}" for axis in differ) or "the same"
        for point in (comparison.first, comparison.second)
    ]
    table = Table(title="Joules a request", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in (f"first: {names[0]}", f"second: {names[1]}", "difference"):
        table.add_column(name, justify="right")
    parts = comparison.by_component
    total = tuple(sum(pair[side] for pair in parts.values()) for side in (0, 1))
    for name, (first, second) in [*parts.items(), ("total", total)]:
        if first or second:
            table.add_row(name, three_digits(first), three_digits(second), f"{second - first:+.3g}")
    return table
