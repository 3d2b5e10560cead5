"""Other programs that meter the same run, to compare with: CodeCarbon (an extra)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_JOULES_PER_KWH = 3.6e6
_POLL_SECONDS = 1.0


@dataclass(slots=True)
class Tracker:
    """What another program says of a stretch of time."""

    name: str = ""
    gpu_joules: float | None = None
    """Energy of the GPUs [J]; None = no tracker, or it saw no GPU (which it calls 0)."""
    seconds: float = 0.0

    def compared(self, window: Mapping[str, Any]) -> dict[str, Any]:
        """Its mean power beside the counter's, under its name; empty without a tracker.

        Powers, not energies: the tracker starts before the window's first tick and stops after
        its last.
        """
        if not self.name:
            return {}
        counter = sum(window["energy_joules"]) / window["duration_seconds"]
        watts = None if self.gpu_joules is None else self.gpu_joules / self.seconds
        return {
            self.name: {
                "gpu_joules": self.gpu_joules,
                "seconds": self.seconds,
                "watts": watts,
                "counter_watts": counter,
                "difference": None if watts is None else watts / counter - 1.0,
            }
        }


@contextmanager
def tracked(name: str, gpu_indices: Sequence[int]) -> Iterator[Tracker]:
    """Let a tracker meter these GPUs while the block runs; an empty name tracks nothing."""
    tracker = Tracker(name=name)
    if not name:
        yield tracker
        return
    from codecarbon import OfflineEmissionsTracker  # noqa: PLC0415 - an extra

    other = OfflineEmissionsTracker(
        country_iso_code="USA",  # of no effect on energy, but asked for; nothing is looked up
        gpu_ids=list(gpu_indices),
        measure_power_secs=_POLL_SECONDS,
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="error",
    )
    began = time.monotonic()
    other.start()
    try:
        yield tracker
    finally:
        other.stop()
        tracker.seconds = time.monotonic() - began
        energy = other.final_emissions_data.gpu_energy * _JOULES_PER_KWH
        tracker.gpu_joules = energy if energy > 0 else None
