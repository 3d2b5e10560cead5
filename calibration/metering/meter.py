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

import hashlib
import importlib
import itertools
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from calibration.metering.samples import (
    DISTURBING,
    REASONS,
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
_MEMORY_SCOPE = 2  # NVML_POWER_SCOPE_MEMORY


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
        if not gpu_indices:
            raise MeterError("no GPU index given; pass at least one, e.g. --gpu 0")
        self._nvml = _load_nvml() if nvml is None else nvml
        self.gpu_indices = tuple(gpu_indices)
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            for index in self.gpu_indices:
                if not 0 <= index < count:
                    raise MeterError(f"there is no GPU {index}; NVML sees {count} GPU(s)")
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in self.gpu_indices]
        except self._nvml.NVMLError as error:
            raise MeterError(f"cannot open the GPU: {error}; {_remedy(error)}") from error
        self._refuse_shared_gpus()
        self.energy_method: Literal["counter", "polled"] = (
            "counter" if all(self._counter(h) is not None for h in self._handles) else "polled"
        )
        if self.energy_method == "polled" and any(self._watts(h) is None for h in self._handles):
            raise MeterError(
                "this GPU reports neither an energy counter nor its power; it cannot be metered"
            )
        self._processes = _Processes(self._process_ids(), own_processes)
        if measure_running:
            self._processes.ours |= self._process_ids()
        self._tick_seconds: float | None = None
        self._last_edge_seconds = 0.0
        self._open: _Open | None = None

    # -- identity ------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Driver, CUDA, and of each GPU its name, hashed UUID, limits and settings."""
        nvml = self._nvml
        return {
            "driver_version": _text(self._ask("nvmlSystemGetDriverVersion")),
            "cuda_driver_version": self._ask("nvmlSystemGetCudaDriverVersion_v2"),
            "nvml_version": _text(self._ask("nvmlSystemGetNVMLVersion")),
            "energy_method": self.energy_method,
            "tick_seconds": self.tick_seconds,
            "other_processes": self.other_processes(),
            "gpus": [
                {
                    "index": index,
                    "name": _text(self._ask("nvmlDeviceGetName", handle)),
                    "uuid_sha256": _hashed(self._ask("nvmlDeviceGetUUID", handle)),
                    "vbios": _text(self._ask("nvmlDeviceGetVbiosVersion", handle)),
                    "board_part_number": _text(self._ask("nvmlDeviceGetBoardPartNumber", handle)),
                    "ecc": _first(self._ask("nvmlDeviceGetEccMode", handle)),
                    "mig": _first(self._ask("nvmlDeviceGetMigMode", handle)),
                    "persistence": self._ask("nvmlDeviceGetPersistenceMode", handle),
                    "power_limit_watts": _scaled(
                        self._ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3
                    ),
                    "default_power_limit_watts": _scaled(
                        self._ask("nvmlDeviceGetPowerManagementDefaultLimit", handle), 1e-3
                    ),
                    "max_sm_clock_hz": _scaled(
                        self._ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_SM), 1e6
                    ),
                    "max_memory_clock_hz": _scaled(
                        self._ask("nvmlDeviceGetMaxClockInfo", handle, nvml.NVML_CLOCK_MEM), 1e6
                    ),
                }
                for index, handle in zip(self.gpu_indices, self._handles, strict=True)
            ],
        }

    def other_processes(self) -> int:
        """Processes on these GPUs that are not ours."""
        return self._processes.others(self._process_ids())

    def uuids(self) -> tuple[str, ...]:
        """UUIDs as NVML prints them, to find the same GPUs in CUDA; never stored."""
        return tuple(str(_text(self._ask("nvmlDeviceGetUUID", h))) for h in self._handles)

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
        seen_seconds, seen = time.monotonic(), self._counter_strict(self._handles[0])
        deadline = seen_seconds + _TICK_TIMEOUT_SECONDS
        while True:
            if keep_busy is None:
                time.sleep(1e-4)
            else:
                keep_busy()
            value = self._counter_strict(self._handles[0])
            now = time.monotonic()
            if value != seen:
                self._last_edge_seconds = now - seen_seconds
                others = [self._counter_strict(h) for h in self._handles[1:]]
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
        states = self._states()
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
                for g in range(len(self._handles))
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
            states_after=self._states(),
            other_processes=others,
            notes=tuple(notes),
            valid=not reasons,
            invalid_reason="; ".join(reasons),
        )

    # -- NVML ----------------------------------------------------------------------

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Value of an NVML call, None where the GPU, driver or binding lacks it."""
        call = getattr(self._nvml, function, None)
        if call is None:
            return None
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None

    def _counter(self, handle: Any) -> float | None:
        return _scaled(self._ask("nvmlDeviceGetTotalEnergyConsumption", handle), 1e-3)

    def _counter_strict(self, handle: Any) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise MeterError(
                f"the energy counter cannot be read any more: {error}; {_remedy(error)}"
            ) from error

    def _read(self) -> Reading:
        if self.energy_method == "polled":
            return Reading(time_seconds=time.monotonic(), energy_joules=())
        values = tuple(self._counter_strict(h) for h in self._handles)
        return Reading(time_seconds=time.monotonic(), energy_joules=values)

    def _field(self, handle: Any, name: str, scope: int | None = None) -> float | None:
        """Unsigned value of an NVML field, None where this GPU lacks it."""
        number = getattr(self._nvml, name, None)
        if number is None:
            return None
        wanted = number if scope is None else (number, scope)
        values = self._ask("nvmlDeviceGetFieldValues", handle, [wanted])
        if values is None or values[0].nvmlReturn != 0:
            return None
        return float(values[0].value.uiVal)

    def _watts(self, handle: Any) -> float | None:
        milliwatts = self._field(handle, "NVML_FI_DEV_POWER_INSTANT")
        if milliwatts is None:
            milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        return _scaled(milliwatts, 1e-3)

    def _reasons(self, handle: Any) -> int:
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return int(reasons or 0)

    def _states(self) -> tuple[GpuState, ...]:
        nvml = self._nvml
        states = []
        for handle in self._handles:
            reasons = self._reasons(handle)
            states.append(
                GpuState(
                    sm_clock_hz=_scaled(
                        self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM), 1e6
                    ),
                    memory_clock_hz=_scaled(
                        self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM), 1e6
                    ),
                    power_limit_watts=_scaled(
                        self._ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3
                    ),
                    instant_power_watts=self._watts(handle),
                    memory_power_watts=_scaled(
                        self._field(handle, "NVML_FI_DEV_POWER_AVERAGE", _MEMORY_SCOPE), 1e-3
                    ),
                    temperature_celsius=_scaled(
                        self._ask("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
                        1.0,
                    ),
                    memory_temperature_celsius=self._field(handle, "NVML_FI_DEV_MEMORY_TEMP"),
                    throttle_reasons=tuple(name for bit, name in REASONS.items() if reasons & bit),
                )
            )
        return tuple(states)

    def _sample(self, samples: list[Sample], stop: threading.Event) -> None:
        while not stop.is_set():
            clock = self._ask("nvmlDeviceGetClockInfo", self._handles[0], self._nvml.NVML_CLOCK_SM)
            reasons = 0
            for handle in self._handles:
                reasons |= self._reasons(handle)
            watts = [self._watts(h) for h in self._handles]
            samples.append(Sample(time.monotonic(), watts, _scaled(clock, 1e6), reasons))
            stop.wait(_SAMPLE_SECONDS)

    def _process_ids(self) -> frozenset[int]:
        found: set[int] = set()
        for handle in self._handles:
            running = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
            found |= {process.pid for process in running or ()}
        return frozenset(found)

    def _refuse_shared_gpus(self) -> None:
        virtual = getattr(self._nvml, "NVML_GPU_VIRTUALIZATION_MODE_VGPU", 2)
        for index, handle in zip(self.gpu_indices, self._handles, strict=True):
            if _first(self._ask("nvmlDeviceGetMigMode", handle)):
                raise MeterError(
                    f"GPU {index} is split by MIG: its counter covers all slices; "
                    "measure on a GPU without MIG"
                )
            if self._ask("nvmlDeviceGetVirtualizationMode", handle) == virtual:
                raise MeterError(
                    f"GPU {index} is a virtual GPU: its power is not its own; "
                    "measure on a whole GPU (bare metal or passthrough)"
                )


def _load_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise MeterError(
            "the NVML binding is missing; install it with: pip install 'energymodel[calibrate]'"
        ) from error


def _remedy(error: Exception) -> str:
    kind = type(error).__name__
    return {
        "NVMLError_LibraryNotFound": "no NVIDIA driver is installed; use a machine with a GPU",
        "NVMLError_DriverNotLoaded": "load the NVIDIA driver (see nvidia-smi)",
        "NVMLError_NoPermission": "this user may not use the GPU; ask for access to /dev/nvidia*",
        "NVMLError_LibRmVersionMismatch": "driver and library differ; reboot or reload the driver",
        "NVMLError_GpuIsLost": "the GPU fell off the bus; reset it or reboot",
    }.get(kind, "check that nvidia-smi works")


def _scaled(value: Any, factor: float) -> float | None:
    return None if value is None else float(value) * factor


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value.decode() if isinstance(value, bytes) else str(value)


def _first(value: Any) -> Any:
    return None if value is None else value[0]


def _hashed(value: Any) -> str | None:
    text = _text(value)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
