"""Samples of a window's background thread, and what they and the counter say about it. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_LEAST_TICKS = 4.5
_MOST_POWER_OVER_LIMIT = 1.5

REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}
DISTURBING = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake")


@dataclass(slots=True)
class Sample:
    """One reading of the background thread."""

    time_seconds: float
    watts: list[float | None]
    """Instant power of each GPU [W]."""
    sm_clock_hz: float | None
    reasons: int
    """Bits of `REASONS`, all GPUs together."""


def faults(
    energy: Sequence[float], duration: float, limit_watts: float, tick_seconds: float | None
) -> list[str]:
    """Reasons in the numbers themselves for which a window is not valid."""
    reasons = []
    if duration <= 0:
        return ["the window has no duration"]
    if any(math.isnan(e) for e in energy):
        reasons.append("too few power samples")
    elif any(e < 0 for e in energy):
        reasons.append("the energy counter went backwards (driver reloaded?)")
    elif any(e == 0 for e in energy):
        reasons.append("the energy counter did not move")
    elif limit_watts and math.fsum(energy) / duration > _MOST_POWER_OVER_LIMIT * limit_watts:
        reasons.append(
            f"implausible: {math.fsum(energy) / duration:.0f} W over a {limit_watts:.0f} W limit"
        )
    if tick_seconds is not None and duration < _LEAST_TICKS * tick_seconds:
        reasons.append(f"shorter than {_LEAST_TICKS:g} counter ticks")
    return reasons


def reason_shares(samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the samples in which each clock-event reason was set [-]; none that is 0."""
    shares = {
        name: sum(1 for s in samples if s.reasons & bit) / len(samples)
        for bit, name in REASONS.items()
        if samples
    }
    return {name: share for name, share in shares.items() if share}


def integral(points: Sequence[tuple[float, float | None]], duration: float) -> float:
    """Trapezoidal mean power of the samples times the window's duration [J]."""
    known = [(t, w) for t, w in points if w is not None]
    if len(known) < 2 or known[-1][0] <= known[0][0]:
        return math.nan
    area = math.fsum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in itertools.pairwise(known))
    return area / (known[-1][0] - known[0][0]) * duration


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Population standard deviation; None of nothing."""
    centre = mean(values)
    if centre is None:
        return None
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / len(values))
