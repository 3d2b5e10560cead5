"""How fast a machine's host is, so that host-bound runs of different machines can be compared.

Eager decoding is bound by the host: the same GPU in a faster host takes less time and energy.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

_LOOP_STEPS = 300_000
_SHORT_LOOP_STEPS = 30_000  # a few milliseconds: between two cases
_LAUNCHES = 400  # below the depth of the GPU's queue, so that no launch waits
_REPEATS = 5


def host_speed() -> dict[str, Any]:
    """Time of a fixed Python loop and of a kernel launch, and what the host is.

    Returns
    -------
    dict
        `python_step_seconds`: a step of the loop; `launch_seconds`: host time to launch a
        kernel through torch, None without torch or a GPU (the least of five repeats, both);
        `cpu`, `cpu_count`, `python`.
    """
    return {
        "python_step_seconds": python_step_seconds(),
        "launch_seconds": _launch_seconds(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }


def python_step_seconds() -> float:
    """Time of a step of a fixed Python loop, the least of five runs [s]."""
    return min(_python_loop(_LOOP_STEPS) for _ in range(_REPEATS)) / _LOOP_STEPS


def python_step_seconds_now() -> float:
    """The same now, from one short run [s]."""
    return _python_loop(_SHORT_LOOP_STEPS) / _SHORT_LOOP_STEPS


def _python_loop(steps: int) -> float:
    started, total, table = time.perf_counter(), 0, {}
    for i in range(steps):
        table[i & 255] = total
        total += i % 7
    return time.perf_counter() - started


def _launch_seconds() -> float | None:
    try:
        import torch  # noqa: PLC0415
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.randn(32, device="cuda")
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_REPEATS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(_LAUNCHES):
                x.neg_()
            best = min(best, (time.perf_counter() - started) / _LAUNCHES)
    torch.cuda.synchronize()
    return best


def _cpu_name() -> str | None:
    """Name of the processor, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), None)
