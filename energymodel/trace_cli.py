"""What `energymodel trace describe` shows: statistics, bins and histograms of a trace."""

from __future__ import annotations

import csv
import io
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from energymodel.bins import EXACT_GRID, Binned, bin_requests, ceil_to_paper
from energymodel.traces import Requests, explain_dropped

if TYPE_CHECKING:
    from rich.console import Console

_BAR_WIDTH = 40
_BINS_SHOWN = 20
_NARROWEST, _WIDEST = 80, 120  # columns


def describe(requests: Requests) -> dict[str, object]:
    """Statistics of a trace, ready for JSON.

    Times in seconds, rates in requests per second, lengths in tokens. `gap_cv` is the standard
    deviation of the gaps between arrivals over their mean (1 for a Poisson process); it and
    `requests_per_second` are None where all requests arrive at once. `paper_excluded` counts the
    requests that the paper's binning would leave out.
    """
    arrival = requests.arrival_seconds
    duration = float(arrival[-1])
    gaps = np.diff(arrival)
    binned = bin_requests(requests.input_tokens, requests.output_tokens, EXACT_GRID)
    _, _, _, excluded = ceil_to_paper(requests.input_tokens, requests.output_tokens)
    return {
        "name": requests.name,
        "trace_format": requests.trace_format,
        "source": requests.source,
        "rows_read": requests.rows_read,
        "dropped": [
            {"kind": rows.kind, "count": rows.count, "first_lines": list(rows.first_lines)}
            for rows in requests.dropped
        ],
        "requests": int(arrival.size),
        "duration_seconds": duration,
        "requests_per_second": arrival.size / duration if duration > 0 else None,
        "gap_cv": float(gaps.std() / gaps.mean()) if duration > 0 else None,
        "longest_gap_seconds": float(gaps.max()) if gaps.size else 0.0,
        "input_tokens": _lengths(requests.input_tokens),
        "output_tokens": _lengths(requests.output_tokens),
        "paper_excluded": excluded,
        "bins": [
            {
                "input_low": int(binned.input_low[index]),
                "input_high": int(binned.input_high[index]),
                "output_low": int(binned.output_low[index]),
                "output_high": int(binned.output_high[index]),
                "requests": int(binned.requests[index]),
                "mean_input": float(binned.mean_input[index]),
                "mean_output": float(binned.mean_output[index]),
            }
            for index in range(binned.requests.size)
        ],
    }


def render_description(requests: Requests, form: str, *, color: bool = False) -> str:
    """The same as text in `form`: table (with histograms), json, or csv (the bins)."""
    if form == "json":
        return json.dumps(describe(requests), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(requests)
    from rich.console import Console  # noqa: PLC0415 (slow to import)

    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    print_description(requests, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def _csv(requests: Requests) -> str:
    text = io.StringIO()
    bins: Any = describe(requests)["bins"]
    writer = csv.DictWriter(text, list(bins[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(bins)
    return text.getvalue().rstrip("\n")


def print_description(requests: Requests, console: Console) -> None:
    """Print statistics and bins as tables, and the lengths as histograms."""
    from rich.markup import escape  # noqa: PLC0415

    binned = bin_requests(requests.input_tokens, requests.output_tokens, EXACT_GRID)
    console.print(
        f"[bold]{escape(requests.name)}[/bold] ({requests.trace_format}): {escape(requests.source)}"
    )
    for rows in requests.dropped:
        console.print(f"[yellow]{explain_dropped(rows)}[/yellow]")
    _print_statistics(requests, console)
    console.print()
    _print_bins(binned, console)
    for side, index, edges in (
        ("input", binned.input_bin, EXACT_GRID.input_edges),
        ("output", binned.output_bin, EXACT_GRID.output_edges),
    ):
        _print_histogram(f"Requests by {side} tokens", index, edges, console)


def _lengths(tokens: NDArray[np.int64]) -> dict[str, float | int]:
    median, p90, p99 = np.percentile(tokens, [50, 90, 99])
    return {
        "total": int(tokens.sum()),
        "mean": float(tokens.mean()),
        "std": float(tokens.std()),
        "median": float(median),
        "p90": float(p90),
        "p99": float(p99),
        "max": int(tokens.max()),
    }


def _print_statistics(requests: Requests, console: Console) -> None:
    from rich.table import Table  # noqa: PLC0415

    count = requests.arrival_seconds.size
    duration = float(requests.arrival_seconds[-1])
    line = f"{count:,} requests"
    if duration > 0:
        gaps = np.diff(requests.arrival_seconds)
        line += (
            f" in {duration:,.1f} s, {count / duration:.4g} a second; gaps: coefficient of "
            f"variation {gaps.std() / gaps.mean():.2f} (Poisson: 1), longest {gaps.max():,.1f} s"
        )
    else:
        line += ", all at once"
    console.print(line)
    table = Table(title="Tokens", title_justify="left", box=None, pad_edge=False)
    sides = {
        "input": _lengths(requests.input_tokens),
        "output": _lengths(requests.output_tokens),
    }
    table.add_column("")
    for name in sides["input"]:
        table.add_column(name, justify="right")
    for side, numbers in sides.items():
        table.add_row(
            side, *(f"{v:,}" if isinstance(v, int) else f"{v:,.1f}" for v in numbers.values())
        )
    console.print(table)


def _print_bins(binned: Binned, console: Console) -> None:
    from rich.table import Table  # noqa: PLC0415

    shown = np.sort(np.argsort(-binned.requests, kind="stable")[:_BINS_SHOWN])
    title = "Bins"
    if shown.size < binned.requests.size:
        title += f" (the {shown.size} fullest of {binned.requests.size}; csv and json have all)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("input", "output", "requests", "share", "mean input", "mean output"):
        table.add_column(name, justify="right")
    for index in shown:
        table.add_row(
            f"{binned.input_low[index]:,}-{binned.input_high[index]:,}",
            f"{binned.output_low[index]:,}-{binned.output_high[index]:,}",
            f"{binned.requests[index]:,}",
            f"{binned.requests[index] / binned.bin_index.size:.1%}",
            f"{binned.mean_input[index]:,.1f}",
            f"{binned.mean_output[index]:,.1f}",
        )
    console.print(table)


def _print_histogram(
    title: str, index: NDArray[np.int64], edges: NDArray[np.int64], console: Console
) -> None:
    """One bar for each bin from the first to the last that holds a request."""
    counts = np.bincount(index[index >= 0], minlength=edges.size)
    held = np.flatnonzero(counts)
    console.print(f"\n[italic]{title}[/italic]")
    if held.size == 0:
        console.print("none within the bins")
        return
    low = np.concatenate([[1], edges[:-1] + 1])
    for row in range(held[0], held[-1] + 1):
        bar = "█" * round(_BAR_WIDTH * counts[row] / counts.max()) or "▏" * bool(counts[row])
        label = f"{low[row]:,}-{edges[row]:,}"
        console.print(f"{label:>21} {counts[row]:>10,} {bar}")
