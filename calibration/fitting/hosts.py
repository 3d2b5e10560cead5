"""How fast the hosts of a GPU's machines are, over those of another kind.

No run of the H200 is open to its fit (`data/split.json`), so its host times come from the H100's
machines. Every engine that was measured timed the same Python loop on its host
(`metering.host_speed`); over machines of a kind the ratio of these times is that of the hosts. For
one machine it foretells little (docs/residuals.md), so nothing is scaled by a single one.

A host has two speeds: a step of the loop takes 58 to 80 ns or 110 to 150, on one machine within
minutes. What a run takes on average follows the mean of them, not the one that is met more often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.metering.windows import read_jsonl
from energymodel.calibrations import Calibration

FEWEST_MACHINES = 3
"""Machines below which their mean says little about others of their kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """The hosts of the machines that were measured."""

    machines: int
    loop_step_seconds: float
    """Time of a step of the loop: geometric mean over machines of each one's mean [s]."""


def read_hosts(files: Sequence[Path]) -> Hosts | None:
    """Hosts of the engines in serving records; None where none timed the loop."""
    by_board: dict[str, list[float]] = {}
    for path in files:
        for record in read_jsonl(path):
            step = (record.get("host") or {}).get("python_step_seconds")
            if step:
                board = record["identity"]["gpus"][0]["uuid_sha256"]
                by_board.setdefault(board, []).append(float(step))
    if not by_board:
        return None
    means = [np.mean(steps) for steps in by_board.values()]
    return Hosts(machines=len(means), loop_step_seconds=float(np.exp(np.mean(np.log(means)))))


def ratio_of_hosts(own: Hosts | None, start: Calibration) -> float:
    """How long these hosts take over those behind the start's host times [-]; 1 = not known."""
    other = start.provenance.get("hosts")
    if own is None or not other:
        return 1.0
    if min(own.machines, other["machines"]) < FEWEST_MACHINES:
        return 1.0
    return float(own.loop_step_seconds / other["loop_step_seconds"])
