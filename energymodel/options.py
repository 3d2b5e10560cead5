"""Options that several commands take, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# what is served, and for how long
Trace = Annotated[
    str, typer.Option(help="Trace file, `-` for stdin, or a built-in workload's name.")
]
TraceFormat = Annotated[
    str | None, typer.Option(help="Force the trace's format.", show_default="from its columns")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse traces with bad rows.")]
DrawnSeed = Annotated[int, typer.Option(help="Seed of drawn workloads.")]

# how it is served
GpuMemoryUtilization = Annotated[
    float | None,
    typer.Option(
        help="Share of a GPU's memory for weights and KV cache (vLLM 0.22: 0.92).",
        show_default="0.9",
    ),
]

# what is asked of a fleet
Objective = Annotated[str, typer.Option(help="energy, cost or carbon.")]
TtftTarget = Annotated[float | None, typer.Option(help="Most time to first token \\[s].")]
TpotTarget = Annotated[float | None, typer.Option(help="Most time per output token \\[s].")]
TargetPercentile = Annotated[str, typer.Option(help="Of both targets: p50, p90 or p99.")]
Prices = Annotated[
    str | None, typer.Option(help="Prices, GPU=USD per hour.", show_default="list prices")
]
Pue = Annotated[float, typer.Option(help="Power usage effectiveness of the site.")]

# what many settings have in common
LongestContext = Annotated[int | None, typer.Option(help="Longest context served.")]
GpusCalibration = Annotated[
    str | None, typer.Option(help="Calibration file in place of the GPUs' own.")
]

# where the work is done
Backend = Annotated[str, typer.Option(help="loky (processes), threading, sequential or dask.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")]
Jobs = Annotated[int, typer.Option(help="Workers.", show_default="one per core")]

# where the result goes
Output = Annotated[Path | None, typer.Option(help="Write there instead of to the terminal.")]
WebPage = Annotated[
    Path | None, typer.Option(help="Also write a web page with charts to this .html file.")
]
