"""What a meter measures: readings, windows, their JSON form, and playing them back."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from energymodel.errors import EnergyModelError, unknown_name

_GZIP = b"\x1f\x8b"

KeepBusy = Callable[[], None]
"""Called again and again while a tick is awaited; keeps the GPU's queue filled."""


class MeterError(EnergyModelError):
    """The GPU cannot be metered (no driver, no permission, MIG, counter stuck)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Counter values at one instant."""

    time_seconds: float
    """`time.monotonic()` [s]."""
    energy_joules: tuple[float, ...]
    """Counter value of each GPU [J]; the zero is arbitrary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """State of one GPU at one instant; None where NVML does not say."""

    sm_clock_hz: float | None
    memory_clock_hz: float | None
    power_limit_watts: float | None
    instant_power_watts: float | None
    memory_power_watts: float | None
    """1-second average of the memory's share of the power (Hopper and later)."""
    temperature_celsius: float | None
    memory_temperature_celsius: float | None
    throttle_reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Energy of one stretch of time, and everything needed to judge it."""

    name: str
    start_seconds: float
    """`time.monotonic()` at the first edge [s]."""
    end_seconds: float
    started_unix_seconds: float
    """Wall clock at the first edge [s since 1970], for provenance only."""
    duration_seconds: float
    energy_joules: tuple[float, ...]
    """Energy of each GPU [J]; NaN where it could not be told (then `valid` is False)."""
    energy_method: Literal["counter", "polled"]
    edge_uncertainty_seconds: float | None
    """How far the edges may be off the true ticks, both together [s]; None if unaligned."""
    instant_mean_watts: float | None
    """Mean of the sampled instant power, all GPUs together [W]."""
    instant_std_watts: float | None
    instant_drift_watts: float | None
    """Mean of the second half's samples less that of the first half [W]."""
    sample_count: int
    sm_clock_hz: float | None
    """Mean SM clock of the first GPU during the window [Hz]."""
    throttle_shares: Mapping[str, float]
    """Share of samples with each clock-limiting reason, any GPU [1]."""
    power_capped: bool
    """The power limit held the clock down: a regime of its own, not a fault."""
    states_before: tuple[GpuState, ...]
    states_after: tuple[GpuState, ...]
    other_processes: int
    """Processes on these GPUs that are not ours."""
    notes: tuple[str, ...]
    valid: bool
    invalid_reason: str
    """Empty when valid."""

    @property
    def total_joules(self) -> float:
        """Energy of all GPUs [J]."""
        return math.fsum(self.energy_joules)

    @property
    def mean_watts(self) -> float:
        """Mean power of all GPUs [W]."""
        return self.total_joules / self.duration_seconds if self.duration_seconds > 0 else math.nan


class Meter(Protocol):
    """What the runner and the serving driver need of a meter."""

    def identity(self) -> dict[str, Any]:
        """Machine, driver and settings, ready for JSON."""

    def begin(self, name: str, *, align: bool = True, keep_busy: KeepBusy | None = None) -> None:
        """Open a window; synchronise the device first unless `keep_busy` feeds it."""

    def end(self, *, align: bool = True, keep_busy: KeepBusy | None = None) -> Window:
        """Close the window; synchronise the device first unless `keep_busy` feeds it."""

    def abandon(self) -> None:
        """Drop the open window, if any (after a failed kernel)."""


def window_to_json(window: Window) -> dict[str, Any]:
    """Plain JSON types; NaN becomes None."""
    data = asdict(window)
    data["energy_joules"] = [None if math.isnan(e) else e for e in window.energy_joules]
    return data


def window_from_json(data: Mapping[str, Any]) -> Window:
    """Inverse of `window_to_json`.

    Raises
    ------
    MeterError
        If a field is missing or unknown.
    """
    known = {f.name for f in fields(Window)}
    if set(data) != known:
        odd = sorted(set(data) ^ known)
        raise MeterError(f"recorded window has missing or unknown fields: {', '.join(odd)}")
    values = dict(data)
    values["energy_joules"] = tuple(math.nan if e is None else e for e in data["energy_joules"])
    values["notes"] = tuple(data["notes"])
    for key in ("states_before", "states_after"):
        states = []
        for state in data[key]:
            reasons = tuple(state["throttle_reasons"])
            states.append(GpuState(**{**state, "throttle_reasons": reasons}))
        values[key] = tuple(states)
    return Window(**values)


class ReplayMeter:
    """Plays recorded windows through the meter's interface, by name and in order.

    Parameters
    ----------
    path
        JSON lines; lines with a `window` object are played, a line with an `identity`
        object is the identity, others are passed over. A torn last line is ignored.

    Raises
    ------
    MeterError
        If the file cannot be read or holds no window.
    """

    def __init__(self, path: str | Path) -> None:
        self._identity: dict[str, Any] = {}
        self._windows: dict[str, list[Window]] = {}
        for record in read_jsonl(path):
            if "identity" in record:
                self._identity = record["identity"]
            if record.get("window") is not None:
                window = window_from_json(record["window"])
                self._windows.setdefault(window.name, []).append(window)
        if not self._windows:
            raise MeterError(f"{path} holds no recorded window")
        self._next: Window | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the recorded windows."""
        return tuple(self._windows)

    def identity(self) -> dict[str, Any]:
        """Identity of the machine that was recorded."""
        return self._identity

    def begin(self, name: str, *, align: bool = True, keep_busy: KeepBusy | None = None) -> None:
        """Choose the next recorded window of that name; raises MeterError if none is left."""
        if name not in self._windows:
            raise MeterError(unknown_name("recorded window", name, self._windows))
        if not self._windows[name]:
            raise MeterError(f"no more recorded windows of '{name}'")
        if keep_busy is not None:
            keep_busy()
        self._next = self._windows[name].pop(0)

    def end(self, *, align: bool = True, keep_busy: KeepBusy | None = None) -> Window:
        """Return the window chosen by `begin`."""
        if self._next is None:
            raise MeterError("no window is open; call begin() first")
        if keep_busy is not None:
            keep_busy()
        window, self._next = self._next, None
        return window

    def abandon(self) -> None:
        """Drop the open window."""
        self._next = None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a `.jsonl` or `.jsonl.gz`; a torn last line (killed run) is left out.

    Raises
    ------
    MeterError
        If the file cannot be read, or a line other than the last is broken.
    """
    try:
        raw = Path(path).read_bytes()
        lines = (gzip.decompress(raw) if raw.startswith(_GZIP) else raw).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise MeterError(f"cannot read {path}: {reason}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut off
                continue
            raise MeterError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise MeterError(f"{path}, line {number}: not a JSON object")
        records.append(record)
    return records
