"""Errors of what a fit did not see, and the intervals that they earn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import ErrorSummary, summarize
from calibration.fitting.serving_runs import Run, simulated
from energymodel.calibrations import Calibration, IntervalCalibration
from energymodel.step_costs import SLOW_HOST_RATIO

Array = NDArray[np.float64]

LEVEL = 0.9
Pairs = Sequence[tuple[Run, Calibration]]
"""Runs, each with the calibration that predicts it."""

_FEWEST_RUNS, _FEWEST_OWN_RUNS = 5, 3
"""Held-out runs that an interval takes at least: of a written split, and of one machine's own."""
_ENOUGH_RUNS, _RUNS_FOR_P90 = 19, 10
"""Runs from which on `bound` is less than their largest error; and runs of one machine, which are
like each other, from which on `bound` is taken as it is."""
_WIDER = 1.25
_ONE_MODEL = 2.0
"""Widening where one model was measured: a fit to Llama-3.1-8B on one H100 had a p90 of 7.7 % by
input length, and on another H100 of 2.9 % for the same model, 6.8 % for OLMoE-1B-7B and 13.4 % for
Llama-3.2-1B, whose steps wait for the host as the 8B's never do."""
_SLOW_HOST_SHARE = 0.03
"""What a slow host adds to the energy of a run, from which on the run counts as one that depends
on the host. Fewer than the fewest runs of either kind tell nothing of how errors grow with it."""
_NEVER = 1e-6
"""The same of a run that does not depend on the host at all."""
_UNTESTED = 0.5
"""Size of the interval of a stack with too few runs."""


def run_errors(pairs: Pairs) -> dict[str, ErrorSummary]:
    """Errors of joules and seconds of runs, at least one."""
    joules, seconds, _ = _predicted(pairs)
    return {
        "joules": summarize(joules, np.array([run.joules for run, _ in pairs])),
        "seconds": summarize(seconds, np.array([run.seconds for run, _ in pairs])),
    }


def _predicted(pairs: Pairs) -> Array:
    """What `simulated` gives, (3, n); runs of one calibration together, as they share tables."""
    found = np.empty((3, len(pairs)))
    for calibration in {id(c): c for _, c in pairs}.values():
        mine = [i for i, (_, other) in enumerate(pairs) if other is calibration]
        found[:, mine] = simulated([pairs[i][0] for i in mine], calibration)
    return found


def interval_of_split(
    held_out: Pairs, left_out: Pairs, start: IntervalCalibration | None = None, least: float = 0.0
) -> IntervalCalibration:
    """Interval of a stack from the runs that a written split holds out of the fit.

    Enough runs: `narrowest` of them and of the fitted runs, each predicted without its model. A
    few: their largest error. Fewer: the largest one of both, widened. None: the start's, and no
    smaller than `least`.
    """
    if not held_out and not left_out and start is not None:
        basis = f"as on the GPU whose host times were taken over: {start.basis}"
        if least > start.high - 1.0:
            basis = f"as of the stack that was measured here, which is wider than {basis}"
        return interval(max(start.high - 1.0, least), basis)
    if (found := _interval_by_host(held_out, left_out)) is not None:
        return found
    if len(held_out) >= _FEWEST_RUNS:
        size, n = bound(ratio_errors(held_out)), len(held_out)
        what = "bound of the next error after" if n >= _ENOUGH_RUNS else "largest error of"
        basis = f"{what} {n} held-out serving runs"
    elif len(held_out) + len(left_out) >= _FEWEST_RUNS:
        both = [*held_out, *left_out]
        size = _WIDER * float(ratio_errors(both).max())
        basis = (
            f"{_WIDER:g} x the largest error of {len(both)} serving runs, held out or with their "
            "model left out of the fit"
        )
    else:
        size, basis = _UNTESTED, "assumed: too few steady runs of this stack were measured"
    return interval(size, basis)


def _interval_by_host(held_out: Pairs, left_out: Pairs) -> IntervalCalibration | None:
    """Interval that widens with what a slow host would add; None with too few runs of a kind."""
    pairs = [*held_out, *left_out]
    if not held_out:
        return None
    joules, _, slow = _predicted(pairs)
    errors = _ratio_error(joules, np.array([run.joules for run, _ in pairs]))
    some = int((slow >= _SLOW_HOST_SHARE).sum())
    if some < _FEWEST_RUNS or len(pairs) - some < _ENOUGH_RUNS:
        return None
    size, spread = narrowest(errors, slow)
    what = f"{len(held_out)} held-out serving runs"
    if left_out:
        what += f" and {len(left_out)} fitted ones, each predicted without its model"
    basis = (
        f"the narrowest that holds 90 % of {what}; {spread:.2f} x the share of the energy that a "
        f"host {SLOW_HOST_RATIO:g} times as slow would add is added in quadrature ({some} runs: "
        f"{_SLOW_HOST_SHARE:.0%} or more)"
    )
    return replace(interval(size, basis), host_spread=round(spread, 4))


def ratio_errors(pairs: Pairs) -> Array:
    """Sizes that intervals from E / (1 + size) to E (1 + size) need to hold the runs' joules, (n,).

    E is the predicted energy. One that is 20 % too low needs 25 %: 1.25 E was measured.
    """
    return _ratio_error(_predicted(pairs)[0], np.array([run.joules for run, _ in pairs]))


def _ratio_error(predicted: Array, measured: Array) -> Array:
    return np.maximum(predicted / measured, measured / predicted) - 1.0


def bound(errors: Array, level: float = LEVEL) -> float:
    """Error that the next one stays below with probability `level`, if drawn as these were.

    The ceil(level (n + 1))-th of n, their largest where that is beyond n: split conformal
    prediction (Vovk et al. 2005; Lei et al., JASA 2018).
    """
    rank = int(np.ceil(level * (len(errors) + 1)))
    return float(np.sort(errors)[min(rank, len(errors)) - 1])


def narrowest(errors: Array, slow: Array, level: float = LEVEL) -> tuple[float, float]:
    """Size and spread of the on average narrowest interval that holds a share of the errors.

    errors : as `ratio_errors`, (n,); slow : share of the energy that a slow host would add, (n,).
    The interval of a run is hypot(size, spread * slow). Size is one of the errors and no less
    than their median; spread the smallest that holds `level` of the errors then.
    """
    best = np.inf, float(errors.max()), 0.0
    for size in np.unique(errors[errors >= np.median(errors)]):
        beyond = np.sqrt(np.maximum(errors**2 - size**2, 0.0))
        needed = np.full(len(errors), np.inf)
        np.divide(beyond, slow, out=needed, where=slow > _NEVER)
        needed[beyond == 0.0] = 0.0
        spread = bound(needed, level)
        if np.isfinite(spread):
            width = float(np.hypot(size, spread * slow).mean())
            best = min(best, (width, float(size), spread))
    return best[1], best[2]


def interval_of_machine(
    pairs: Pairs, start: IntervalCalibration, start_origin: str, worst_window: float
) -> IntervalCalibration:
    """Interval of a stack from one machine's runs, each with a fit that did not see it.

    With fewer than three the start's, unless the kernel windows err more than it allows:
    `worst_window`, p90 of the errors of their joules.
    """
    if len(pairs) < _FEWEST_OWN_RUNS:
        if worst_window > start.high - 1.0:
            basis = "p90 of the errors of the held-out kernel windows' joules"
            return interval(worst_window, basis)
        basis = (
            f"as the calibration it started from (origin {start_origin}): fewer than "
            f"{_FEWEST_OWN_RUNS} held-out runs of this stack on this machine. That one: "
            f"{start.basis}"
        )
        return replace(start, basis=basis)
    errors = ratio_errors(pairs)
    models = sorted({run.row.model_name for run, _ in pairs})
    what = f"{len(errors)} held-out serving runs of this machine ({', '.join(models)})"
    if len(errors) >= _RUNS_FOR_P90:
        size, basis = bound(errors), f"bound of the next error after {what}"
    else:
        size, basis = _WIDER * float(errors.max()), f"{_WIDER:g} x the largest error of {what}"
    if len(models) == 1:
        size *= _ONE_MODEL
        basis = f"{_ONE_MODEL:g} x {basis}, held out by input length: no other model was measured"
    return interval(size, basis)


def interval(size: float, basis: str) -> IntervalCalibration:
    """Interval of a relative error: measured values from 1 / (1 + size) to 1 + size."""
    size = round(size, 4)
    return IntervalCalibration(
        level=LEVEL, low=round(1.0 / (1.0 + size), 6), high=1.0 + size, basis=basis
    )


def card_spread(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Relative differences in joules of cases measured twice, by stack: n, median and p90."""
    cases: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        cases.setdefault(run.row.case, []).append(run)
    apart: dict[str, list[float]] = {}
    for first, second, *_ in (pair for pair in cases.values() if len(pair) > 1):
        apart.setdefault(first.row.stack, []).append(abs(second.joules / first.joules - 1.0))
    return {
        stack: {
            "n": len(each),
            "median": round(float(np.median(each)), 4),
            "p90": round(float(np.percentile(each, 100 * LEVEL)), 4),
        }
        for stack, each in sorted(apart.items())
    }


def plain(error: ErrorSummary) -> dict[str, float]:
    """Statistics of an error as they are written down."""
    return {
        "n": error.n,
        "median": round(error.median, 4),
        "p90": round(error.p90, 4),
        "max": round(error.max, 4),
        "bias": round(error.bias, 4),
    }


def plain_each(errors: Mapping[str, ErrorSummary]) -> dict[str, dict[str, float]]:
    """The same of several quantities."""
    return {key: plain(value) for key, value in errors.items()}
