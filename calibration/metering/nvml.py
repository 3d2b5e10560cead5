"""GPUs as NVML shows them: who they are, what they draw, and who uses them.

A value that a GPU, driver or binding lacks is None; an energy counter that stops being read, and
a GPU whose energy is not its own, are errors.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

from calibration.metering.samples import REASONS
from calibration.metering.windows import GpuState, MeterError

_MEMORY_SCOPE = 2  # NVML_POWER_SCOPE_MEMORY


class NvmlGpus:
    """Some GPUs of this machine, opened.

    Parameters
    ----------
    indices
        NVML indices (PCI order, `CUDA_VISIBLE_DEVICES` plays no part).
    nvml
        The `pynvml` module, or a fake of it.

    Raises
    ------
    MeterError
        No library, driver or permission, unknown index, MIG or a virtual GPU.
    """

    def __init__(self, indices: Sequence[int], nvml: Any = None) -> None:
        if not indices:
            raise MeterError("no GPU index given; pass at least one, e.g. --gpu 0")
        self._nvml = load_nvml() if nvml is None else nvml
        self.indices = tuple(indices)
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            for index in self.indices:
                if not 0 <= index < count:
                    raise MeterError(f"there is no GPU {index}; NVML sees {count} GPU(s)")
            self.handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in self.indices]
        except self._nvml.NVMLError as error:
            raise MeterError(f"cannot open the GPU: {error}; {remedy(error)}") from error
        self._refuse_shared_gpus()

    def identity(self) -> dict[str, Any]:
        """Driver, CUDA, and of each GPU its name, hashed UUID, limits and settings."""
        nvml = self._nvml
        return {
            "driver_version": _text(self._ask("nvmlSystemGetDriverVersion")),
            "cuda_driver_version": self._ask("nvmlSystemGetCudaDriverVersion_v2"),
            "nvml_version": _text(self._ask("nvmlSystemGetNVMLVersion")),
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
                for index, handle in zip(self.indices, self.handles, strict=True)
            ],
        }

    def uuids(self) -> tuple[str, ...]:
        """UUIDs as NVML prints them, to find the same GPUs in CUDA; never stored."""
        return tuple(str(_text(self._ask("nvmlDeviceGetUUID", h))) for h in self.handles)

    def _ask(self, function: str, *arguments: Any) -> Any:
        """Value of an NVML call, None where the GPU, driver or binding lacks it."""
        call = getattr(self._nvml, function, None)
        if call is None:
            return None
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None

    def has_counter(self, handle: Any) -> bool:
        """Whether the GPU has an energy counter."""
        return self._ask("nvmlDeviceGetTotalEnergyConsumption", handle) is not None

    def counter_joules(self, handle: Any) -> float:
        """Energy counter [J]; the zero is arbitrary. MeterError if it cannot be read."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1e-3
        except self._nvml.NVMLError as error:
            raise MeterError(
                f"the energy counter cannot be read any more: {error}; {remedy(error)}"
            ) from error

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

    def watts(self, handle: Any) -> float | None:
        """Instant power [W], or what the driver takes for it; None where there is neither."""
        milliwatts = self._field(handle, "NVML_FI_DEV_POWER_INSTANT")
        if milliwatts is None:
            milliwatts = self._ask("nvmlDeviceGetPowerUsage", handle)
        return _scaled(milliwatts, 1e-3)

    def sm_clock_hz(self, handle: Any) -> float | None:
        """SM clock now [Hz]."""
        clock = self._ask("nvmlDeviceGetClockInfo", handle, self._nvml.NVML_CLOCK_SM)
        return _scaled(clock, 1e6)

    def reasons(self, handle: Any) -> int:
        """Bits of `samples.REASONS` for which the clocks are held down now."""
        reasons = self._ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
        if reasons is None:
            reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
        return int(reasons or 0)

    def states(self) -> tuple[GpuState, ...]:
        """State of each GPU now."""
        nvml = self._nvml
        states = []
        for handle in self.handles:
            reasons = self.reasons(handle)
            states.append(
                GpuState(
                    sm_clock_hz=self.sm_clock_hz(handle),
                    memory_clock_hz=_scaled(
                        self._ask("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_MEM), 1e6
                    ),
                    power_limit_watts=_scaled(
                        self._ask("nvmlDeviceGetEnforcedPowerLimit", handle), 1e-3
                    ),
                    instant_power_watts=self.watts(handle),
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

    def process_ids(self) -> frozenset[int]:
        """Processes that compute on any of the GPUs."""
        found: set[int] = set()
        for handle in self.handles:
            running = self._ask("nvmlDeviceGetComputeRunningProcesses", handle)
            found |= {process.pid for process in running or ()}
        return frozenset(found)

    def _refuse_shared_gpus(self) -> None:
        virtual = getattr(self._nvml, "NVML_GPU_VIRTUALIZATION_MODE_VGPU", 2)
        for index, handle in zip(self.indices, self.handles, strict=True):
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


def load_nvml() -> Any:
    """The `pynvml` module; MeterError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise MeterError(
            "the NVML binding is missing; install it with: pip install 'energymodel[calibrate]'"
        ) from error


def remedy(error: Exception) -> str:
    """What to do about an NVML error."""
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
