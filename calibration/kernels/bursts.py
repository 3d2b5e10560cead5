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
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.metering.meter import NvmlMeter
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


def _wave(rest: str, heavy: float, light: float) -> tuple[tuple[str, float], ...]:
    """Heavy load and rest by turns for 2.4 s, after 0.6 s of rest."""
    return ((rest, 0.6), *((("heavy", heavy), (rest, light)) * round(2.4 / (heavy + light))))


def patterns() -> tuple[Pattern, ...]:
    """Bursts after different rests, and square waves of different lengths and shares."""
    after = [
        Pattern(name=f"{kind} then heavy", steps=((kind, 1.5), ("heavy", 1.2)))
        for kind in ("none", "light")
    ]
    waves = [
        Pattern(
            name=f"heavy {heavy:g} s, light {light:g} s",
            steps=_wave("light", heavy, light),
        )
        for heavy, light in (
            *((0.02, 0.02), (0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (0.4, 0.4)),
            *((0.02, 0.08), (0.05, 0.2), (0.1, 0.4), (0.2, 0.05), (0.2, 0.8)),
        )
    ]  # fmt: skip
    middles = [
        Pattern(name=f"{kind} then middle", steps=((kind, 1.0), ("middle", 1.2)))
        for kind in ("none", "light")
    ]
    cool = [
        Pattern(
            name=f"heavy {heavy:g} s, cool {cool:g} s",
            steps=_wave("cool", heavy, cool),
        )
        for heavy, cool in ((0.02, 0.08), (0.05, 0.2), (0.2, 0.2), (0.1, 0.4))
    ]
    idle = [
        Pattern(name=f"heavy 0.2 s, none {rest:g} s", steps=(("heavy", 0.2), ("none", rest)) * 4)
        for rest in (0.05, 0.2, 0.6)
    ]
    return (*after, *waves, *cool, *middles, *idle)


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


class Sampler:
    """Polls clock, power and the energy counter of a GPU in a thread of its own."""

    def __init__(self, index: int) -> None:
        import pynvml  # noqa: PLC0415

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        self._stop = threading.Event()
        self.rows: list[tuple[float, float, float, int]] = []

    def _poll(self) -> None:
        nvml, handle = self._nvml, self._handle
        field = nvml.NVML_FI_DEV_POWER_INSTANT
        while not self._stop.is_set():
            watts = nvml.nvmlDeviceGetFieldValues(handle, [field])[0].value.uiVal / 1e3
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            self.rows.append((round(time.monotonic(), 5), watts, float(clock), joules))
            time.sleep(_SAMPLE_SECONDS)

    def __enter__(self) -> Sampler:
        """Start polling."""
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop polling."""
        self._stop.set()
        self._thread.join()


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
    append_record(out, {"kind": "header", "identity": NvmlMeter((gpu,)).identity(), "work": work})
    for pattern in patterns():
        with Sampler(gpu) as sampler:
            record = run_pattern(pattern, calls)
        append_record(out, {"kind": "burst", **record, "samples": sampler.rows})


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
