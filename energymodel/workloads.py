"""Built-in workloads: seeded traces drawn from shipped statistics of public data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.datafiles import data_path
from energymodel.errors import TraceError, unknown_name
from energymodel.traces import Requests, read_trace


def list_workloads() -> tuple[str, ...]:
    """Names of the built-in workloads."""
    return tuple(sorted(file.stem for file in data_path("workloads").glob("*.json")))


def load_requests(
    trace: str,
    *,
    trace_format: str | None = None,
    strict: bool = False,
    seed: int = 0,
    num_requests: int | None = None,
) -> Requests:
    """Requests of a trace file, of stdin (`-`), or of a built-in workload by name.

    A built-in workload is drawn: lengths from its joint histogram, stratified, so that totals stay
    close to the original's for any seed; arrivals uniform within each of its seconds, whose counts
    are kept; order of lengths at random. A file of the same name comes first.

    Parameters
    ----------
    trace : str
        Path, `-`, or one of `list_workloads()`.
    trace_format, strict
        As in `read_trace`; a built-in workload ignores them.
    seed : int
        Of the draw; the same seed gives the same requests.
    num_requests : int, optional
        Of a built-in workload; its own number if not given. Fewer are the first of its arrivals,
        more repeat them, at the same rate.

    Raises
    ------
    TraceError
        If the name is unknown, the file cannot be read, or the number makes no sense.
    """
    try:
        is_file, exists = Path(trace).is_file(), Path(trace).exists()
    except (OSError, ValueError):  # too long, or holds a null character
        is_file = exists = False
    if not is_file and trace in list_workloads():
        return _draw(trace, seed, num_requests)
    looks_like_a_path = trace == "-" or Path(trace).suffix != "" or "/" in trace or "\\" in trace
    if not (exists or looks_like_a_path):
        raise TraceError(
            f"{unknown_name('workload', trace, list_workloads())} No file has that name either."
        )
    if num_requests is not None:
        raise TraceError(f"{trace}: a number of requests can be chosen for built-in workloads only")
    return read_trace(trace, trace_format=trace_format, strict=strict)


def _draw(name: str, seed: int, num_requests: int | None) -> Requests:
    data = json.loads(data_path("workloads", f"{name}.json").read_text(encoding="utf-8"))
    count = data["requests"] if num_requests is None else num_requests
    if count < 1:
        raise TraceError(f"{name}: {count} requests make no sense; draw at least 1")
    if seed < 0:
        raise TraceError(f"{name}: seed {seed} makes no sense; it is 0 or more")
    rng = np.random.default_rng(seed)
    inputs, outputs = _draw_lengths(data["lengths"], count, rng)
    return Requests(
        name=name,
        arrival_seconds=_draw_arrivals(data["arrivals"], count, rng),
        input_tokens=inputs,
        output_tokens=outputs,
        trace_format="built-in",
        source=f"drawn with seed {seed} after: {data['source']}; {data['license']}",
        rows_read=count,
    )


def _draw_arrivals(
    arrivals: dict[str, Any], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Arrivals [s], shape (count,): the profile repeated as often as it takes, uniform inside."""
    start = np.repeat(
        np.asarray(arrivals["second"], dtype=np.float64), np.asarray(arrivals["requests"])
    )
    width = float(arrivals["bin_seconds"])
    period = start[-1] - start[0] + width
    cycle, index = np.divmod(np.arange(count), start.size)
    seconds: NDArray[np.float64] = start[index] + cycle * period + rng.random(count) * width
    seconds.sort()
    seconds -= seconds[0]
    return seconds


def _draw_lengths(
    lengths: dict[str, Any], count: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Input and output tokens, shape (count,): systematic over cells, then inside each cell."""
    weights = np.asarray(lengths["requests"], dtype=np.float64)
    cumulative = np.cumsum(weights)
    points = (np.arange(count) + rng.random()) * (cumulative[-1] / count)
    cell = np.minimum(np.searchsorted(cumulative, points, side="right"), weights.size - 1)
    cell = rng.permutation(cell)
    drawn = []
    for side in ("input", "output"):
        high = np.asarray(lengths[f"{side}_edges"])
        low = np.concatenate([[1], high[:-1] + 1])
        index = np.asarray(lengths[f"{side}_bin"])[cell]
        drawn.append(
            _inside(low[index], high[index], np.asarray(lengths[f"mean_{side}"])[cell], rng)
        )
    return drawn[0], drawn[1]


def _inside(
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    mean: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Whole numbers in [low, high] with a given mean: low + (high - low) u^k, k from the mean."""
    above = mean - low
    power = (high - mean) / np.where(above > 0, above, 1.0)
    spread = (high - low) * rng.random(mean.size) ** power
    value = np.where(above > 0, low + spread, low)
    return np.floor(value + rng.random(mean.size)).astype(np.int64)
