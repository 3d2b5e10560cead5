"""The energy meter: windows over NVML's energy counter, aligned to the counter's ticks.

NVML's counter (Volta and later) moves in ticks of about 100 ms, so a window that starts
and ends anywhere is wrong by up to two ticks. Here a window starts and ends at the
instant the counter is seen to move, with the GPU kept busy while waiting: the energy is
then that of exactly the time between the two instants. A background thread samples the
instant power (a cross-check, and the fallback where there is no counter), the clocks and
the reasons for which the clocks are held down. Scope: the GPU board (on modules such as
GH200 the whole module), never the host.

A window is valid or says why it is not. Hardware faults raise `MeterError`.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calibration.metering.nvml import NvmlGpus
from calibration.metering.samples import (
    DISTURBING,
    Sample,
    faults,
    integral,
    mean,
    reason_shares,
    std,
)
from calibration.metering.windows import (
    GpuState,
    KeepBusy,
    Meter,
    MeterError,
    Reading,
    ReplayMeter,
    Window,
    window_from_json,
    window_to_json,
)

__all__ = [
    "GpuState",
    "KeepBusy",
    "Meter",
    "MeterError",
    "NvmlMeter",
    "Reading",
    "ReplayMeter",
    "Window",
    "window_from_json",
    "window_to_json",
]

_SAMPLE_SECONDS = 0.02
_TICK_TIMEOUT_SECONDS = 2.0
_LARGEST_CLOCK_STEP_SECONDS = 0.5
_POWER_CAP_SHARE = 0.2


@dataclass(slots=True)
class _Open:
    """The window being measured."""

    name: str
    start: Reading
    edge_seconds: float | None
    unix_seconds: float
    states: tuple[GpuState, ...]
    samples: list[Sample]
    stop: threading.Event
    thread: threading.Thread


@dataclass(slots=True)
class _Processes:
    """Tells our processes from others, also where NVML shows another PID namespace."""

    baseline: frozenset[int]
    allowed_new: int
    ours: set[int] = field(default_factory=lambda: {os.getpid()})

    def others(self, now: frozenset[int]) -> int:
        new = sorted(now - self.baseline - self.ours)
        while new and len(self.ours & now) < self.allowed_new:
            self.ours.add(new.pop(0))
        return len(now - self.ours)


class NvmlMeter:
    """Meter over NVIDIA's management library.

    Parameters
    ----------
    gpu_indices
        NVML indices (PCI order, `CUDA_VISIBLE_DEVICES` plays no part). Edges are aligned
        to the first GPU's counter; the others' ticks are as long, so their lag cancels
        between the two edges as long as the power is steady.
    nvml
        The `pynvml` module, or a fake of it.
    own_processes
        How many processes of ours will use the GPUs. In containers NVML shows process
        ids of the host: that many new ones are taken to be ours.
    measure_running
        The processes that run on the GPUs now are those to be measured (a server).

    Raises
    ------
    MeterError
        No library, driver or permission, unknown index, MIG or a virtual GPU.
    """

    def __init__(
        self,
        gpu_indices: Sequence[int] = (0,),
        nvml: Any = None,
        *,
        own_processes: int = 1,
        measure_running: bool = False,
    ) -> None:
        self._gpus = NvmlGpus(gpu_indices, nvml)
        self.gpu_indices = self._gpus.indices
        self.energy_method: Literal["counter", "polled"] = (
            "counter" if all(map(self._gpus.has_counter, self._gpus.handles)) else "polled"
        )
        if self.energy_method == "polled" and any(
            self._gpus.watts(h) is None for h in self._gpus.handles
        ):
            raise MeterError(
                "this GPU reports neither an energy counter nor its power; it cannot be metered"
            )
        self._processes = _Processes(self._gpus.process_ids(), own_processes)
        if measure_running:
            self._processes.ours |= self._gpus.process_ids()
        self._tick_seconds: float | None = None
        self._last_edge_seconds = 0.0
        self._open: _Open | None = None

    # -- identity ------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Driver, CUDA, and of each GPU its name, hashed UUID, limits and settings."""
        found = self._gpus.identity()
        gpus = found.pop("gpus")
        return {
            **found,
            "energy_method": self.energy_method,
            "tick_seconds": self.tick_seconds,
            "other_processes": self.other_processes(),
            "gpus": gpus,
        }

    def other_processes(self) -> int:
        """Processes on these GPUs that are not ours."""
        return self._processes.others(self._gpus.process_ids())

    def uuids(self) -> tuple[str, ...]:
        """UUIDs as NVML prints them, to find the same GPUs in CUDA; never stored."""
        return self._gpus.uuids()

    @property
    def tick_seconds(self) -> float | None:
        """Measured period of the counter [s]; None without a counter."""
        if self._tick_seconds is None and self.energy_method == "counter":
            times = [self.wait_tick().time_seconds for _ in range(6)]
            gaps = sorted(b - a for a, b in itertools.pairwise(times))
            self._tick_seconds = gaps[len(gaps) // 2]
        return self._tick_seconds

    # -- windows -------------------------------------------------------------------

    def wait_tick(self, keep_busy: KeepBusy | None = None) -> Reading:
        """Spin until the first GPU's counter moves; without a counter return at once.

        Raises
        ------
        MeterError
            If the counter stands still for 2 s, or the GPU is lost.
        """
        if self.energy_method == "polled":
            return self._read()
        seen_seconds, seen = time.monotonic(), self._gpus.counter_joules(self._gpus.handles[0])
        deadline = seen_seconds + _TICK_TIMEOUT_SECONDS
        while True:
            if keep_busy is None:
                time.sleep(1e-4)
            else:
                keep_busy()
            value = self._gpus.counter_joules(self._gpus.handles[0])
            now = time.monotonic()
            if value != seen:
                self._last_edge_seconds = now - seen_seconds
                others = [self._gpus.counter_joules(h) for h in self._gpus.handles[1:]]
                return Reading(time_seconds=now, energy_joules=(value, *others))
            seen_seconds = now
            if now > deadline:
                raise MeterError(
                    f"the energy counter of GPU {self.gpu_indices[0]} has not moved for "
                    f"{_TICK_TIMEOUT_SECONDS:g} s; reload the driver or use another GPU"
                )

    def begin(self, name: str, *, align: bool = True, keep_busy: KeepBusy | None = None) -> None:
        """Open a window called `name`, at a tick when `align`.

        Raises
        ------
        MeterError
            If a window is open already, or the counter stands still.
        """
        if self._open is not None:
            raise MeterError(f"window '{self._open.name}' is still open; end it first")
        states = self._gpus.states()
        samples: list[Sample] = []
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(samples, stop), daemon=True)
        thread.start()
        try:
            start = self.wait_tick(keep_busy) if align else self._read()
        except BaseException:
            stop.set()
            thread.join()
            raise
        self._open = _Open(
            name=name,
            start=start,
            edge_seconds=self._last_edge_seconds if align else None,
            unix_seconds=time.time(),
            states=states,
            samples=samples,
            stop=stop,
            thread=thread,
        )

    def end(self, *, align: bool = True, keep_busy: KeepBusy | None = None) -> Window:
        """Close the open window, at a tick when `align`, and judge it.

        Raises
        ------
        MeterError
            If no window is open, or the counter stands still.
        """
        opened = self._open
        if opened is None:
            raise MeterError("no window is open; call begin() first")
        self._open = None
        try:
            stop = self.wait_tick(keep_busy) if align else self._read()
            unix_seconds = time.time()
        finally:
            opened.stop.set()
            opened.thread.join()
        edge = (
            (opened.edge_seconds + self._last_edge_seconds) / 2
            if align and opened.edge_seconds is not None and self.energy_method == "counter"
            else None
        )
        return self._judge(opened, stop, edge, unix_seconds)

    def abandon(self) -> None:
        """Drop the open window, if any (after a failed kernel)."""
        if self._open is not None:
            self._open.stop.set()
            self._open.thread.join()
            self._open = None

    def _judge(
        self, opened: _Open, stop: Reading, edge: float | None, unix_seconds: float
    ) -> Window:
        start = opened.start
        duration = stop.time_seconds - start.time_seconds
        samples = [
            s for s in opened.samples if start.time_seconds <= s.time_seconds <= stop.time_seconds
        ]
        watts = [math.fsum(w for w in s.watts if w is not None) for s in samples]
        instant = math.fsum(watts) / len(watts) if watts else None
        energy: tuple[float, ...]
        if self.energy_method == "counter":
            energy = tuple(
                b - a for a, b in zip(start.energy_joules, stop.energy_joules, strict=True)
            )
        else:
            energy = tuple(
                integral([(s.time_seconds, s.watts[g]) for s in samples], duration)
                for g in range(len(self._gpus.handles))
            )
        shares = reason_shares(samples)
        others = self.other_processes()
        limit = math.fsum(s.power_limit_watts or 0.0 for s in opened.states)
        reasons = faults(energy, duration, limit, self._tick_seconds)
        reasons += [f"clocks held down: {name}" for name in DISTURBING if shares.get(name)]
        if others:
            reasons.append(f"{others} other process(es) on the GPU")
        notes = []
        drifted = abs((unix_seconds - opened.unix_seconds) - duration)
        if drifted > _LARGEST_CLOCK_STEP_SECONDS:
            notes.append(f"the wall clock stepped by about {drifted:.1f} s (times are monotonic)")
        energy = tuple(e if e >= 0 else math.nan for e in energy)
        half = len(watts) // 2
        return Window(
            name=opened.name,
            start_seconds=start.time_seconds,
            end_seconds=stop.time_seconds,
            started_unix_seconds=opened.unix_seconds,
            duration_seconds=duration,
            energy_joules=energy,
            energy_method=self.energy_method,
            edge_uncertainty_seconds=edge,
            instant_mean_watts=instant,
            instant_std_watts=std(watts),
            instant_drift_watts=(
                math.fsum(watts[-half:]) / half - math.fsum(watts[:half]) / half if half else None
            ),
            sample_count=len(samples),
            sm_clock_hz=mean([s.sm_clock_hz for s in samples if s.sm_clock_hz is not None]),
            throttle_shares=shares,
            power_capped=shares.get("sw_power_cap", 0.0) > _POWER_CAP_SHARE,
            states_before=opened.states,
            states_after=self._gpus.states(),
            other_processes=others,
            notes=tuple(notes),
            valid=not reasons,
            invalid_reason="; ".join(reasons),
        )

    def _sample(self, samples: list[Sample], stop: threading.Event) -> None:
        while not stop.is_set():
            clock_hz = self._gpus.sm_clock_hz(self._gpus.handles[0])
            reasons = 0
            for handle in self._gpus.handles:
                reasons |= self._gpus.reasons(handle)
            watts = [self._gpus.watts(h) for h in self._gpus.handles]
            samples.append(Sample(time.monotonic(), watts, clock_hz, reasons))
            stop.wait(_SAMPLE_SECONDS)

    def _read(self) -> Reading:
        if self.energy_method == "polled":
            return Reading(time_seconds=time.monotonic(), energy_joules=())
        values = tuple(self._gpus.counter_joules(h) for h in self._gpus.handles)
        return Reading(time_seconds=time.monotonic(), energy_joules=values)
