"""Kernels that the steps of an engine run, as torch's profiler saw them; not while metered.

What a model of a step leaves out shows here: kernels that it does not count, and the time between
kernels, which is the step's own (unprofiled) time less that of all its kernels.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_NAME_LENGTH = 160
"""Characters of a kernel's name that are kept: templates can fill a page."""
_FEWEST_CALLS = 0.01
"""Calls a step below which the difference of two traces is no kernel of every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Kernels of one piece of work, by name and launch grid."""

    calls: Mapping[str, int]
    seconds: Mapping[str, float]
    """Sum of the kernel's durations [s]."""


def traced(work: Callable[[], Any]) -> Traced:
    """Kernels that run on the GPU while `work` does; replayed CUDA graphs are seen as well."""
    import torch  # noqa: PLC0415
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return kernels_of(events)


def kernels_of(events: Iterable[Mapping[str, Any]]) -> Traced:
    """Kernels among the events of a Chrome trace, whose durations are microseconds."""
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for event in events:
        if event.get("cat") not in _GPU_WORK:
            continue
        grid = "x".join(map(str, event.get("args", {}).get("grid", ())))
        key = f"{event['name'][:_NAME_LENGTH]} [{grid}]"
        calls[key] = calls.get(key, 0) + 1
        seconds[key] = seconds.get(key, 0.0) + 1e-6 * float(event["dur"])
    return Traced(calls=calls, seconds=seconds)


def per_step(long: Traced, short: Traced | None = None, steps: int = 1) -> list[dict[str, Any]]:
    """Calls and seconds a step of each kernel that `long` ran beyond `short`, longest first.

    `steps` : steps that `long` did beyond those of `short`.
    """
    before = short or Traced(calls={}, seconds={})
    found = []
    for key, count in long.calls.items():
        calls = (count - before.calls.get(key, 0)) / steps
        if calls >= _FEWEST_CALLS:
            spent = (long.seconds[key] - before.seconds.get(key, 0.0)) / steps
            found.append({"name": key, "calls": calls, "seconds": spent})
    return sorted(found, key=lambda kernel: -kernel["seconds"])
