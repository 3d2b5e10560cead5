"""Joules per byte of the A100 from published power of its serving runs.

    python -m calibration.fitting.public_power FOLDER

FOLDER holds the public data that `energymodel validate --public` reads. Splitwise (Patel et al.,
ISCA 2024) gives the average power of Llama-2-70B on 2, 4 and 8 A100s. On two, the GPUs hardly wait
for the host: decode is bound by memory, so that its power tells the joules of a byte. Its steps are
predicted 3 to 8 % too short at batch 1 and up to 21 % at larger ones, which makes the predicted
power too high and the factor too low by as much. Rows on four and eight are held out
(`data/split.json`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from calibration.fitting.serving_runs import Run, runs_of, simulated
from calibration.validation.public_runs import read_public
from calibration.validation.rows import SPLIT_FILE, is_power_fitted, load_split
from energymodel.calibrations import Calibration, load_calibration
from energymodel.errors import EnergyModelError

_LOWEST, _HIGHEST, _STEPS = 0.2, 5.0, 40


def bytes_factor(runs: Sequence[Run], calibration: Calibration) -> float:
    """Factor of the joules per byte, of device memory and on chip, that gets the runs' power right.

    The median of predicted over measured watts becomes 1; power grows with the factor, so that
    bisection finds it.

    Raises
    ------
    EnergyModelError
        If no factor from 0.2 to 5 does.
    """

    def excess(factor: float) -> float:
        candidate = replace(
            calibration,
            joules_per_hbm_byte=calibration.joules_per_hbm_byte * factor,
            joules_per_onchip_byte=calibration.joules_per_onchip_byte * factor,
        )
        joules, seconds, _ = simulated(runs, candidate)
        measured = np.array([run.joules / run.seconds for run in runs])
        return float(np.median(np.log(joules / seconds / measured)))

    low, high = _LOWEST, _HIGHEST
    if excess(low) > 0.0 or excess(high) < 0.0:
        raise EnergyModelError(
            f"no factor of the joules per byte from {low} to {high} gives the measured power"
        )
    for _ in range(_STEPS):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if excess(middle) > 0.0 else (middle, high)
    return float(np.sqrt(low * high))


def _command(
    folder: Annotated[Path, typer.Argument(help="Folder with the public data.")],
    gpu: Annotated[str, typer.Option(help="Calibration to find the factor for.")] = "a100",
) -> None:
    """Print the factor by which the joules per byte of a calibration are too small."""
    try:
        rows, _ = read_public(folder)
        split = load_split()
        fitted = [r for r in rows if is_power_fitted(r, split) and r.joules_per_output_token]
        if not fitted:
            raise EnergyModelError(f"{folder}: holds no row that {SPLIT_FILE} opens for its power")
        runs = runs_of(fitted)
        print(f"{bytes_factor(runs, load_calibration(gpu)):.4f} from {len(runs)} runs")
    except EnergyModelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(_command)
