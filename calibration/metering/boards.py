"""Which GPUs NVML sees, for `energymodel doctor`: read, never measured or changed."""

from __future__ import annotations

from typing import Any

from calibration.metering.nvml import load_nvml, remedy
from calibration.metering.windows import MeterError
from energymodel.doctor import Board, Boards


def find_boards(nvml: Any = None) -> Boards:
    """Driver and GPUs of this machine; without a driver or the NVML binding, what is missing.

    Parameters
    ----------
    nvml
        The `pynvml` module, or a fake of it.
    """
    try:
        nvml = load_nvml() if nvml is None else nvml
    except MeterError as error:
        return Boards(driver=None, boards=(), problem=str(error))
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        return Boards(driver=None, boards=(), problem=f"no GPU: {error}; {remedy(error)}")

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError, AttributeError):  # not supported by the board or the binding
            return None

    def text(value: Any) -> str | None:
        return value.decode() if isinstance(value, bytes) else value

    def board(index: int, handle: Any) -> Board:
        limit_milliwatts = ask("nvmlDeviceGetEnforcedPowerLimit", handle)
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
        mig = ask("nvmlDeviceGetMigMode", handle)
        return Board(
            index=index,
            name=text(ask("nvmlDeviceGetName", handle)) or "unknown",
            memory_bytes=None if memory is None else int(memory.total),
            power_limit_watts=None if limit_milliwatts is None else limit_milliwatts / 1e3,
            energy_counter=ask("nvmlDeviceGetTotalEnergyConsumption", handle) is not None,
            split=bool(mig and mig[0]),
        )

    return Boards(
        driver=text(ask("nvmlSystemGetDriverVersion")),
        boards=tuple(board(index, handle) for index, handle in enumerate(handles)),
        problem=None,
    )
