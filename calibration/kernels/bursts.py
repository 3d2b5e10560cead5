"""Follows a GPU into its power limit: the time of every product of a burst after lighter load.

    python -m calibration.kernels.bursts --out bursts.jsonl

A board does not slow down the moment it passes its power limit. Each pattern alternates heavy load
(a large product, past the limit at the full clock) with light load (reading device memory) or
none; the end of every single kernel is kept, beside the clock and the power that NVML gives. The
kernels' times tell the clock as finely as the kernels are short. One JSON object a pattern.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.metering.nvml import NvmlGpus
from calibration.metering.poller import Poller
from calibration.metering.recording import append_record

_SIZE = 8192
_MIDDLE_ROWS = 1024
_READ_BYTES = 2**30
_COPY_BYTES = 2**22
_IN_FLIGHT = 6
_SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What runs, one after another."""

    name: str
    steps: tuple[tuple[str, float], ...]
    """Load and its length [s]: `heavy` and `middle` are products, `light` reads device memory,
    `cool` copies within the L2, `none` waits."""


def _wave(rest: str, heavy_seconds: float, rest_seconds: float) -> Pattern:
    """Heavy load and rest by turns for 2.4 s, after 0.6 s of rest."""
    turns = (("heavy", heavy_seconds), (rest, rest_seconds))
    rounds = round(2.4 / (heavy_seconds + rest_seconds))
    name = f"heavy {heavy_seconds:g} s, {rest} {rest_seconds:g} s"
    return Pattern(name=name, steps=((rest, 0.6), *(turns * rounds)))


def patterns() -> tuple[Pattern, ...]:
    """Bursts after different rests, and square waves of different lengths and shares."""
    return (
        *(_after(rest, 1.5, "heavy") for rest in ("none", "light")),
        *(_wave("light", s, s) for s in (0.02, 0.05, 0.1, 0.2, 0.4)),
        *(_wave("light", 0.02, 0.08), _wave("light", 0.05, 0.2), _wave("light", 0.1, 0.4)),
        *(_wave("light", 0.2, 0.05), _wave("light", 0.2, 0.8)),
        *(_wave("cool", 0.02, 0.08), _wave("cool", 0.05, 0.2)),
        *(_wave("cool", 0.2, 0.2), _wave("cool", 0.1, 0.4)),
        *(_after(rest, 1.0, "middle") for rest in ("none", "light")),
        *(
            Pattern(
                name=f"heavy 0.2 s, none {rest:g} s", steps=(("heavy", 0.2), ("none", rest)) * 4
            )
            for rest in (0.05, 0.2, 0.6)
        ),
    )


def _after(rest: str, rest_seconds: float, load: str) -> Pattern:
    return Pattern(name=f"{rest} then {load}", steps=((rest, rest_seconds), (load, 1.2)))


def run_pattern(pattern: Pattern, calls: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run a pattern; kernels' ends by CUDA events, in seconds from its start."""
    import torch  # noqa: PLC0415

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    torch.cuda.synchronize()
    first, began = mark(), time.monotonic()
    ends: list[tuple[int, Any]] = []
    flying: deque[Any] = deque()
    for index, (kind, seconds) in enumerate(pattern.steps):
        until = time.monotonic() + seconds
        if kind == "none":
            torch.cuda.synchronize()
            flying.clear()
            time.sleep(seconds)
            continue
        while time.monotonic() < until:
            calls[kind]()
            event = mark()
            ends.append((index, event))
            flying.append(event)
            if len(flying) > _IN_FLIGHT:
                flying.popleft().synchronize()
    torch.cuda.synchronize()
    return {
        "pattern": asdict(pattern),
        "start_seconds": began,
        "step_of_kernel": [i for i, _ in ends],
        "end_seconds": [round(first.elapsed_time(e) / 1e3, 7) for _, e in ends],
    }


def sampler(gpus: NvmlGpus) -> Poller:
    """Polls power [W], SM clock [MHz] and the energy counter [J] of a GPU."""
    (handle,) = gpus.handles

    def read() -> tuple[float | None, ...]:
        clock_hz = gpus.sm_clock_hz(handle)
        clock_mhz = None if clock_hz is None else clock_hz / 1e6
        return gpus.watts(handle), clock_mhz, gpus.counter_joules(handle)

    return Poller(read, _SAMPLE_SECONDS)


def kernels() -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Return the loads by name, and what one call of each does."""
    import torch  # noqa: PLC0415

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    a, b, out = normal(_SIZE, _SIZE), normal(_SIZE, _SIZE), normal(_SIZE, _SIZE)
    x, y = normal(_MIDDLE_ROWS, _SIZE), normal(_MIDDLE_ROWS, _SIZE)
    data = [normal(_READ_BYTES // 2) for _ in range(2)]
    turn = itertools.cycle(data)
    small = normal(_COPY_BYTES // 2)
    copy = torch.empty_like(small)
    work = {
        "heavy": {"flops": 2.0 * _SIZE**3},
        "middle": {"flops": 2.0 * _MIDDLE_ROWS * _SIZE**2},
        "light": {"hbm_bytes": float(_READ_BYTES)},
        "cool": {"onchip_bytes": 2.0 * _COPY_BYTES},
    }
    calls = {
        "heavy": lambda: torch.mm(a, b, out=out),
        "middle": lambda: torch.mm(x, b, out=y),
        "light": lambda: torch.amax(next(turn)),
        "cool": lambda: copy.copy_(small),
    }
    return calls, work


def measure(out: Path, gpu: int) -> None:
    """Run all patterns and append each to `out`."""
    import torch  # noqa: PLC0415

    torch.set_grad_enabled(False)
    torch.cuda.set_device(gpu)
    calls, work = kernels()
    for call in calls.values():
        for _ in range(20):
            call()
    torch.cuda.synchronize()
    gpus = NvmlGpus((gpu,))
    append_record(out, {"kind": "header", "identity": gpus.identity(), "work": work})
    for pattern in patterns():
        with sampler(gpus) as polled:
            record = run_pattern(pattern, calls)
        append_record(out, {"kind": "burst", **record, "samples": polled.rows})


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.kernels.bursts",
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
