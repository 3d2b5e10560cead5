"""Checks before anything is measured: the GPU, its other users, and the software."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from calibration.metering.meter import NvmlMeter
from calibration.metering.windows import MeterError
from energymodel.errors import EnergyModelError


def free_gpus(gpus: Sequence[int]) -> NvmlMeter:
    """Meter of GPUs that nobody else uses.

    Raises
    ------
    MeterError
        If a GPU cannot be metered, or other processes run on it.
    """
    meter = NvmlMeter(gpus)
    if others := meter.other_processes():
        raise MeterError(
            f"{others} process(es) of others use GPU {', '.join(map(str, gpus))} (nvidia-smi shows "
            "them): the energy would be theirs too; stop them or choose another GPU with --gpu"
        )
    return meter


def require(package: str, extra: str) -> None:
    """Refuse to start without a package; does not import it.

    Raises
    ------
    EnergyModelError
        If it is not installed; says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise EnergyModelError(
            f"{package} is missing; install it with: pip install 'energymodel[{extra}]'"
        )


def check_metered(uuids: Sequence[str]) -> None:
    """Refuse to measure where CUDA's first GPUs are not the metered ones.

    Raises
    ------
    MeterError
        If they differ; passes where torch does not tell.
    """
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return
    seen = []
    for index in range(min(len(uuids), torch.cuda.device_count())):
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is None:
            return
        seen.append(str(uuid).removeprefix("GPU-").lower())
    if sorted(seen) != sorted(u.removeprefix("GPU-").lower() for u in uuids):
        raise MeterError(
            "the engine runs on other GPUs than are metered; check CUDA_VISIBLE_DEVICES, which "
            "must not be changed while measuring"
        )
