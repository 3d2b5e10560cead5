"""Follows a board's power under equal load while it warms and cools.

    python -m calibration.kernels.warmth --out warmth.jsonl

Silicon leaks more when it is warm, so equal kernels draw more on a warm board. Each phase keeps one
load: a product past the power limit heats the board, then lighter loads run while it cools; before,
they warm a cool one. Power, the energy counter and both temperatures are kept ten times a second.
One JSON object a phase; three minutes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calibration.metering.nvml import NvmlGpus
from calibration.metering.poller import Poller
from calibration.metering.recording import append_record

PHASES = (
    *(("idle", 6.0), ("tiny", 10.0), ("onchip", 15.0), ("read", 25.0)),
    *(("heat", 25.0), ("idle", 25.0)),
    *(("heat", 15.0), ("tiny", 25.0)),
    *(("heat", 15.0), ("onchip", 25.0)),
)
"""Load and length [s] of each phase. `heat`: products at the power limit; `read`: reads of device
memory; `onchip`: copies within the L2; `tiny`: kernels far shorter than their launch."""
_SIZE = 8192
_READ_BYTES = 2**30
_COPY_BYTES = 2**22
_TINY_ELEMENTS = 2**12
_SAMPLE_SECONDS = 0.1
_BATCHES = {"heat": 8, "read": 30, "onchip": 2000, "tiny": 2000}
"""Calls between two looks at the clock, some 10 ms of work each."""


def sampler(gpus: NvmlGpus) -> Poller:
    """Polls a GPU's energy [J], power and its memory's [W], both temperatures [C], clock [MHz]."""
    (handle,) = gpus.handles

    def read() -> tuple[float | None, ...]:
        joules = round(gpus.counter_joules(handle), 3)
        (state,) = gpus.states()
        return (
            joules,
            state.instant_power_watts,
            state.memory_power_watts,
            state.temperature_celsius,
            state.memory_temperature_celsius,
            None if state.sm_clock_hz is None else state.sm_clock_hz / 1e6,
        )

    return Poller(read, _SAMPLE_SECONDS)


def loads() -> dict[str, Callable[[], Any]]:
    """Return one call of each load by name."""
    import torch  # noqa: PLC0415

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    a, b, out = normal(_SIZE, _SIZE), normal(_SIZE, _SIZE), normal(_SIZE, _SIZE)
    turn = itertools.cycle([normal(_READ_BYTES // 2) for _ in range(2)])
    small, tiny = normal(_COPY_BYTES // 2), normal(_TINY_ELEMENTS)
    copy, little = torch.empty_like(small), torch.empty_like(tiny)
    return {
        "heat": lambda: torch.mm(a, b, out=out),
        "read": lambda: torch.amax(next(turn)),
        "onchip": lambda: copy.copy_(small),
        "tiny": lambda: little.copy_(tiny),
    }


def run_phase(load: str, seconds: float, call: Callable[[], Any] | None) -> int:
    """Keep a load for some seconds; calls made."""
    import torch  # noqa: PLC0415

    if call is None:
        time.sleep(seconds)
        return 0
    until, calls = time.monotonic() + seconds, 0
    ahead: Any = None
    while time.monotonic() < until:
        for _ in range(_BATCHES[load]):
            call()
        calls += _BATCHES[load]
        done = torch.cuda.Event()
        done.record()
        if ahead is not None:
            ahead.synchronize()
        ahead = done
    torch.cuda.synchronize()
    return calls


def measure(out: Path, gpu: int) -> None:
    """Run all phases and append each to `out`."""
    import torch  # noqa: PLC0415

    torch.set_grad_enabled(False)
    torch.cuda.set_device(gpu)
    calls = loads()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    gpus = NvmlGpus((gpu,))
    append_record(out, {"kind": "header", "identity": gpus.identity()})
    for load, seconds in PHASES:
        with sampler(gpus) as polled:
            made = run_phase(load, seconds, calls.get(load))
        phase = {"load": load, "seconds": seconds, "calls": made, "samples": polled.rows}
        append_record(out, {"kind": "warmth", **phase})


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.kernels.warmth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--gpu", type=int, default=0)
    options = parser.parse_args(arguments)
    measure(options.out, options.gpu)
    return 0


if __name__ == "__main__":
    sys.exit(main())
