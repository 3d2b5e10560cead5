"""The rig: what turns a case into launches on a device. Fakes of it run the runner in CI."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from calibration.kernels.cases import Case, preheat_case
from calibration.kernels.pump import Launchable, Pump, Work, eager, graphed, new_event, synchronize

_SPIN_SECONDS = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A device ready to run cases."""

    device: str
    build: Callable[[Case], tuple[Work, Launchable]]
    """Makes buffers, compiles, captures."""
    release: Callable[[], None]
    """Waits for the device and frees what the last case left; raises if the device is lost."""
    idler: Callable[[Case], Callable[[], None]]
    """What the host does, again and again, during an idle state."""
    software: Mapping[str, str]

    def preheat(self, seconds: float) -> None:
        """Load the device heavily for a while."""
        pump = Pump(self.build(preheat_case())[1], self.device)
        pump.run(seconds)
        pump.drain()
        del pump
        self.release()


def cuda_rig(uuids: tuple[str, ...], *, use_vllm: bool = True) -> Rig:
    """Create the rig of the metered GPUs: contexts, vLLM's kernels.

    Raises
    ------
    EnergyModelError
        If torch is missing or cannot use the GPUs.
    """
    from calibration.kernels.launchers import cuda_bed, prepare  # noqa: PLC0415 - imports torch

    bed = cuda_bed(uuids, use_vllm=use_vllm)
    gc.collect()
    gc.freeze()  # what the imports made stays; collections after each case are then quick

    def build(case: Case) -> tuple[Work, Launchable]:
        work = prepare(case, bed)
        return work, graphed(work) if case.graph else eager(work, bed.device)

    def release() -> None:
        import torch  # noqa: PLC0415

        synchronize(bed.device)
        gc.collect()
        torch.cuda.empty_cache()

    return Rig(
        device=bed.device,
        build=build,
        release=release,
        idler=lambda case: idler(case, bed.device),
        software=dict(bed.software),
    )


def idler(case: Case, device: str) -> Callable[[], None]:
    """Host activity of an idle state: `idle_polling` spins on an event, `idle_sparse` launches.

    A sparse launch is one tiny kernel each `interval_seconds` of the case.
    """
    import torch  # noqa: PLC0415

    event: Any = new_event(device)
    event.record()
    if case.launcher == "idle_polling":

        def poll() -> None:
            until = time.monotonic() + _SPIN_SECONDS
            while time.monotonic() < until:
                event.query()

        return poll
    x = torch.randn(32, device=device)
    interval = case.shape["interval_seconds"]
    due = time.monotonic()

    def launch_when_due() -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            x.neg_()
            due = max(due + interval, now)
        time.sleep(min(interval / 4, _SPIN_SECONDS))

    return launch_when_due
