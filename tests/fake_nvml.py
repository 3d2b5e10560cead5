"""A stand-in for pynvml: one or more GPUs with a ticking energy counter, and faults on demand.

The counter integrates `watts` over real (monotonic) time in ticks of `tick_seconds`, so the
meter runs against it as against hardware, only faster.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NoPermission(NVMLError):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class FakeNvml:
    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_FI_DEV_POWER_AVERAGE = 185
    NVML_FI_DEV_MEMORY_TEMP = 82
    NVML_GPU_VIRTUALIZATION_MODE_VGPU = 2

    def __init__(
        self,
        *,
        watts: tuple[float, ...] = (500.0,),
        tick_seconds: float = 0.01,
        counter: bool = True,
        instant: bool = True,
        mig: bool = False,
        virtualization: int = 0,
        reasons: int = 0,
        pids: tuple[int, ...] = (),
        init_error: NVMLError | None = None,
    ) -> None:
        self.watts = watts
        self.tick_seconds = tick_seconds
        self.counter = counter
        self.instant = instant
        self.mig = mig
        self.virtualization = virtualization
        self.reasons = reasons
        self.pids = pids
        self.init_error = init_error
        self.counter_error: NVMLError | None = None
        self.counter_offset_joules = 0.0
        self.stuck = False
        self._start = time.monotonic()
        self._stuck_at = 0.0

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error

    def nvmlDeviceGetCount(self) -> int:
        return len(self.watts)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.0"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13000

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA Fake 1"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-0000-{handle}"

    def nvmlDeviceGetEccMode(self, handle: int) -> list[int]:
        return [1, 1]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        return [int(self.mig), int(self.mig)]

    def nvmlDeviceGetVirtualizationMode(self, handle: int) -> int:
        return self.virtualization

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 45

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if not self.instant:
            raise NVMLError_NotSupported("Not Supported")
        return round(self.watts[handle] * 1e3)

    def nvmlDeviceGetFieldValues(self, handle: int, fields: list[Any]) -> list[Any]:
        known = self.instant and fields[0] in (186, (185, 2))
        share = 1.0 if fields[0] == 186 else 0.2
        value = SimpleNamespace(uiVal=round(self.watts[handle] * share * 1e3))
        return [SimpleNamespace(nvmlReturn=0 if known else 3, value=value)]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if not self.counter:
            raise NVMLError_NotSupported("Not Supported")
        if self.counter_error is not None:
            raise self.counter_error
        now = self._stuck_at if self.stuck else time.monotonic() - self._start
        self._stuck_at = now
        ticks = int(now / self.tick_seconds)
        joules = ticks * self.tick_seconds * self.watts[handle] + self.counter_offset_joules
        return round((1e6 + joules) * 1e3)
