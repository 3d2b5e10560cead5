"""The joint fit of serving runs and kernel windows.

Moves all parameters together, by robust least squares on the log residuals of

- joules and seconds of serving runs,
- seconds and watts of the GPU's kernel windows,

each parameter pulled towards its start by a prior as wide as that start is uncertain. Boards of one
kind draw differently for equal work: where windows are of several, each has a level of its own,
about that of the calibration, which then is of no board in particular, and the idle power that was
measured on it. The simulator is part of the residuals: what is fitted is what `energymodel predict`
prints, but for steps that take the host as long as the GPU, see `recorded_steps.ROUNDING`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import KernelRows, row_costs, row_tables
from calibration.fitting.parameters import Parameter, value_at, with_values
from calibration.fitting.recorded_steps import recorded_runs
from calibration.fitting.robust_minimum import robust_minimum
from calibration.fitting.serving_runs import Run
from energymodel.calibrations import Calibration
from energymodel.roofline import step_seconds_and_joules
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]


def predicted_windows(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    levels: Mapping[str, float] | None = None,
) -> tuple[Array, Array]:
    """Seconds and watts of kernel windows as `predict` has them, each (n,).

    The clock is what the power limit leaves, not the measured one. `levels` are what boards draw
    for equal work, base power apart, over a board that the calibration is of; 1 where not named.
    The base is that of each row's board (`board_idle_watts`).
    """
    tables = row_tables(row_costs(rows, gpu, calibration))
    if levels:
        level = np.array([levels.get(board, 1.0) for board in rows.board])
        tables = np.concatenate([tables[:, :2], tables[:, 2:] * level[:, None]], axis=1)
    seconds, joules = step_seconds_and_joules(
        tables, calibration, further_watts=rows.board_idle_watts
    )
    return seconds, joules / seconds


JOULES_SIGMA, SECONDS_SIGMA, TTFT_SIGMA, WINDOW_SIGMA = 0.02, 0.03, 0.1, 0.06
"""Log residual that weighs as one standard deviation: repeats of a run on two boards differ by 1 to
2.5 % in joules and up to 4 % in seconds; kernels of a class differ more than the model knows."""
BOARD_SIGMA = 0.04
"""Spread of boards in joules of equal work: 31 cases on two H100s differ by 1 to 8 %."""
ROBUST_SCALE = 2.0
"""Standard deviations from which on soft_l1 grows linearly."""
_FARTHEST_BOARD = 0.3  # logarithm of a level


@dataclass(frozen=True, slots=True, kw_only=True)
class JointFit:
    """A fitted calibration and how well the data determine each parameter."""

    calibration: Calibration
    log_std: dict[str, float]
    """Standard deviation of the logarithm of each parameter, prior included [-]."""
    board_levels: dict[str, float]
    """Joules of a board over those of the calibration [-]; empty for windows of one board."""
    converged: bool
    """Whether any machine finds the same digits, see `robust_minimum.Minimum`."""


def joint_fit(
    runs: Sequence[Run],
    windows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    parameters: Sequence[Parameter],
) -> JointFit:
    """Calibration that fits runs and windows best, see the module's text; parameters to six digits.

    Raises
    ------
    ValueError
        If requests of a run arrive over time, or runs are of several GPUs (`recorded_runs`).
    """
    start = np.log([value_at(calibration, p.paths[0]) for p in parameters])
    prior = np.array([p.prior for p in parameters])
    low, high = np.log([[p.low, p.high] for p in parameters]).T
    recorded = recorded_runs([(r.deployment, r.row.requests) for r in runs]) if runs else None
    measured = np.log([[r.joules for r in runs], [r.seconds for r in runs]])
    has_ttft = np.array([r.ttft_seconds is not None for r in runs], dtype=bool)
    ttft_measured = np.log([r.ttft_seconds for r in runs if r.ttft_seconds is not None])

    def at(values: NDArray[Any]) -> Calibration:
        """The calibration with values, which may be complex: see `robust_minimum`."""
        pairs = zip(parameters, values.tolist(), strict=True)
        return with_values(calibration, {p: v for q, v in pairs for p in q.paths})

    boards = sorted(set(windows.board))
    boards = boards if len(boards) > 1 else []
    count = len(parameters)
    start = np.concatenate([start, np.zeros(len(boards))])
    prior = np.concatenate([prior, np.full(len(boards), BOARD_SIGMA)])
    low = np.concatenate([low, np.full(len(boards), -_FARTHEST_BOARD)])
    high = np.concatenate([high, np.full(len(boards), _FARTHEST_BOARD)])

    def levels_at(theta: NDArray[Any]) -> dict[str, Any]:
        return dict(zip(boards, np.exp(theta[count:]).tolist(), strict=True))

    def residuals(theta: NDArray[Any]) -> NDArray[Any]:
        candidate = at(np.exp(theta[:count]))
        totals = np.empty((3, 0)) if recorded is None else recorded.totals(candidate)
        joules, seconds, ttft = np.log(totals)
        alone, watts = predicted_windows(windows, gpu, candidate, levels_at(theta))
        return np.concatenate(
            [
                (joules - measured[0]) / JOULES_SIGMA,
                (seconds - measured[1]) / SECONDS_SIGMA,
                (ttft[has_ttft] - ttft_measured) / TTFT_SIGMA,
                (np.log(alone) - np.log(windows.seconds)) / WINDOW_SIGMA,
                (np.log(watts) - np.log(windows.watts)) / WINDOW_SIGMA,
                (theta - start) / prior,
            ]
        )

    found = robust_minimum(
        residuals,
        start,
        bounds=(low, high),
        x_scale=np.minimum(prior, 0.5),
        robust_scale=ROBUST_SCALE,
    )
    names = [p.paths[0] for p in parameters]
    return JointFit(
        calibration=at(np.array([float(f"{v:.6g}") for v in np.exp(found.x[:count])])),
        log_std=dict(zip(names, found.std[:count].tolist(), strict=True)),
        board_levels=levels_at(found.x),
        converged=found.converged,
    )
