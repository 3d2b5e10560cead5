"""Fits a calibration to what one machine measured: `energymodel fit`. No torch, no GPU.

Three stages, each starting from the one before; the first starts from the GPU's shipped
calibration:

1. seconds of kernels alone, class by class (`fit.fit_kernel_seconds`; 8-bit products after the
   16-bit ones),
2. seconds and watts of all kernel windows together (`fit_serving.fit_serving` without runs;
   all-reduces of two GPUs are fitted apart before: `fit_link`),
3. where serving runs were measured: host times of their stacks, the gap between kernels and the
   base power (`fit_serving.fit_serving`); what kernels cost stays as measured alone.

Errors are of what a fit did not see: kernel windows by shape family, serving runs by model (by
shape, where a stack served one model only). Trace replays are never fitted. The same files give
the same calibration.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import (
    TIME_PARAMETERS,
    ErrorSummary,
    KernelRows,
    fit_kernel_seconds,
    summarize,
)
from calibration.fitting.fit_serving import (
    LEVEL,
    PARAMETERS,
    Parameter,
    Run,
    fit_serving,
    runs_of,
    simulated,
    usable,
    value_at,
    window_seconds_and_watts,
)
from calibration.fitting.kernel_windows import kernel_rows, link_rows
from calibration.fitting.measured_runs import read_own
from calibration.fitting.measurements import Measurements, machine_of, measured_watts
from energymodel import __version__
from energymodel.calibrations import Calibration, IntervalCalibration
from energymodel.errors import EnergyModelError
from energymodel.roofline import EIGHT_BIT
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]
Progress = Callable[[str], None]
"""Called with what is done next."""

_KERNEL_FOLDS, _RUN_FOLDS = 8, 4
_FEWEST_FAMILIES = 3
_FEWEST_RUNS, _RUNS_FOR_P90 = 3, 10
"""Held-out runs that an interval takes at least; with fewer than 10, their largest error counts."""
_WIDER = 1.25
_ONE_MODEL = 2.0
"""Widening where one model was measured: a fit to Llama-3.1-8B on one H100 had a p90 of 7.7 % by
input length, and on another H100 of 2.9 % for the same model, 6.8 % for OLMoE-1B-7B and 13.4 % for
Llama-3.2-1B, whose steps wait for the host as the 8B's never do."""
_WHOLE_RUNS = ("kernel_gap_seconds", "burst_joules")
"""What only whole runs tell of the GPU, beside the stacks' host times."""
_DIGITS = 6


def fit_machine(
    measured: Measurements, start: Calibration, progress: Progress = lambda _: None
) -> Calibration:
    """Calibration of the measured GPU, with held-out errors, intervals and provenance.

    Raises
    ------
    EnergyModelError
        If there are too few kernel windows to fit, or windows under several power limits.
    """
    gpu = measured.gpu
    windows = measured.windows
    start = replace(start, gpu=gpu.name, **measured_watts(measured))
    rows = kernel_rows(windows, gpu.boost_clock_hz)
    rows = rows.pick([d in gpu.peak_flops_per_s for d in rows.dtype])
    families = len(set(rows.family))
    if families < _FEWEST_FAMILIES:
        raise EnergyModelError(
            f"{len(rows)} kernel windows of {families} shape families are too few to fit: at least "
            f"{_FEWEST_FAMILIES} families are needed; run `energymodel calibrate --suite quick`"
        )
    progress(f"{len(rows)} kernel windows of {families} shape families")
    links = link_rows(windows, gpu.boost_clock_hz)
    start = fit_link(links, gpu, start)
    kernels, log_std = fit_windows(rows, gpu, start)
    errors = _summaries(rows, *held_out_windows(rows, gpu, start))
    found, left_out = read_own(measured.serving_files)
    mine = [r for r in found if usable(r, gpu.name)]
    runs = runs_of([row for row in mine if row.phase in ("prefill", "batch")])
    replays = runs_of([row for row in mine if row.phase == "trace"])
    calibration = kernels
    held_out: dict[str, list[tuple[Run, Calibration]]] = {}
    if runs:
        progress(f"{len(runs)} serving runs")
        fitted = fit_serving(runs, rows, gpu, kernels, _run_parameters(kernels, runs))
        calibration, log_std = fitted.calibration, {**log_std, **fitted.log_std}
        held_out = _held_out_runs(runs, rows, gpu, kernels, progress)
        for run in replays:
            held_out.setdefault(run.row.stack, []).append((run, calibration))
    run_errors = {stack: _run_errors(pairs) for stack, pairs in held_out.items()}
    worst = errors["all"]["joules"].p90
    calibration = _rounded(calibration)
    intervals = {
        stack: _run_interval(held_out[stack], run_errors[stack]["joules"])
        if len(held_out.get(stack, ())) >= _FEWEST_RUNS
        else _kept_interval(interval, start, worst)
        for stack, interval in start.intervals.items()
    }
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in (*measured.kernel_files, *measured.serving_files)
    }
    provenance: dict[str, Any] = {
        "command": "energymodel fit",
        "energymodel": __version__,
        "board": measured.board,
        **machine_of(measured),
        "start": f"calibration of {start.gpu}, origin {start.origin}",
        "start_has_seen": sorted(files[sha] for sha in files if sha in _seen(start)),
        "files": files,
        "kernel_windows": dict(Counter(rows.op_class + links.op_class)),
        "shape_families": {
            c: len(set(rows.of_class(c).family)) for c in dict.fromkeys(rows.op_class)
        },
        "classes_not_measured": [
            c for c in start.kernels if c not in rows.op_class + links.op_class
        ],
        "held_out_windows": "each predicted by a fit without any window of its shape family",
        "held_out_errors": {c: {k: _plain(v) for k, v in e.items()} for c, e in errors.items()},
        "serving_runs": {
            "fitted": len(runs),
            "never fitted": len(replays),
            "unsteady, left out": len(found) - len(mine),
            **{entry.reason: entry.rows for entry in left_out},
        },
        "held_out_runs": {
            stack: {k: _plain(v) for k, v in e.items()} for stack, e in run_errors.items()
        },
        "parameter_log_std": {key: round(value, 3) for key, value in log_std.items()},
    }
    return replace(calibration, origin="measured", intervals=intervals, provenance=provenance)


def fit_windows(
    rows: KernelRows, gpu: GpuSpec, start: Calibration
) -> tuple[Calibration, dict[str, float]]:
    """Calibration fitted to kernel windows alone, and the spread of its parameters' logarithms."""
    eight_bit = np.array([d in EIGHT_BIT for d in rows.dtype])
    fitted = start
    for part in (rows.pick(~eight_bit), rows.pick(eight_bit)):
        for op_class in TIME_PARAMETERS:
            if len(part.of_class(op_class)) > len(TIME_PARAMETERS[op_class]):
                kernel = fit_kernel_seconds(part, gpu, fitted, op_class)
                fitted = replace(fitted, kernels={**fitted.kernels, op_class: kernel})
    parameters = [
        _from_start(p, fitted)
        for p in PARAMETERS
        if not p.paths[0].startswith("stacks.") and p.paths[0] not in _WHOLE_RUNS
    ]
    parameters += [
        Parameter(paths=(f"joules_per_flop.{dtype}",), prior=1.0)
        for dtype in sorted(set(rows.dtype) & set(EIGHT_BIT) & set(fitted.joules_per_flop))
    ]
    fit = fit_serving([], rows, gpu, fitted, parameters)
    moved = {path for p in parameters for path in p.paths}
    change = fit.calibration.joules_per_flop["bf16"] / start.joules_per_flop["bf16"]
    joules = {  # dtypes that were not measured change as bf16 did
        dtype: value
        if f"joules_per_flop.{dtype}" in moved
        else start.joules_per_flop[dtype] * change
        for dtype, value in fit.calibration.joules_per_flop.items()
    }
    return replace(fit.calibration, joules_per_flop=joules), fit.log_std


def fit_link(rows: KernelRows, gpu: GpuSpec, start: Calibration) -> Calibration:
    """Calibration with seconds and joules of the link fitted to all-reduces, if there are enough.

    They are one shape family: nothing is held out. Joules per byte are what the larger half drew
    above the base.
    """
    if len(rows) <= len(TIME_PARAMETERS["communication"]):
        return start
    kernel = fit_kernel_seconds(rows, gpu, start, "communication")
    large = rows.link_bytes >= np.median(rows.link_bytes)
    above = (rows.watts - start.base_watts) * rows.seconds / rows.link_bytes
    return replace(
        start,
        kernels={**start.kernels, "communication": kernel},
        joules_per_link_byte=float(max(0.0, np.median(above[large]))),
    )


def _from_start(parameter: Parameter, start: Calibration) -> Parameter:
    """The parameter starting at the calibration's value, if that is one (0 has no logarithm)."""
    own = value_at(start, parameter.paths[0])
    return replace(parameter, start=None) if own > 0 else parameter


def _run_parameters(start: Calibration, runs: Sequence[Run]) -> list[Parameter]:
    """Host times of the stacks that were measured, and what else only whole runs tell."""
    measured = {run.row.stack for run in runs}
    chosen = []
    for parameter in PARAMETERS:
        path = parameter.paths[0]
        stacks = {p.split(".")[1] for p in parameter.paths if p.startswith("stacks.")}
        if path in (*_WHOLE_RUNS, "base_watts") or stacks & measured:
            chosen.append(_from_start(parameter, start))
    return chosen


def held_out_windows(rows: KernelRows, gpu: GpuSpec, start: Calibration) -> tuple[Array, Array]:
    """Seconds and watts of the rows, each by a fit without its shape family; both (n,)."""
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415

    families = np.array(rows.family)
    seconds, watts = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    folds = GroupKFold(min(_KERNEL_FOLDS, len(set(rows.family))))
    for _, test in folds.split(families, groups=families):
        held = np.isin(np.arange(len(rows)), test)
        fitted, _ = fit_windows(rows.pick(~held), gpu, start)
        seconds[held], watts[held] = window_seconds_and_watts(rows.pick(held), gpu, fitted)
    return seconds, watts


def _held_out_runs(
    runs: Sequence[Run], rows: KernelRows, gpu: GpuSpec, kernels: Calibration, progress: Progress
) -> dict[str, list[tuple[Run, Calibration]]]:
    """Each run with a fit that did not see it, by stack; see the module's text."""
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415

    models: dict[str, set[str]] = {}
    for run in runs:
        models.setdefault(run.row.stack, set()).add(run.row.model_name)
    groups = np.array(
        [
            run.row.model_name
            if len(models[run.row.stack]) > 1
            else f"{run.row.model_name} {run.row.requests.input_tokens[0]}"
            for run in runs
        ]
    )
    found: dict[str, list[tuple[Run, Calibration]]] = {}
    count = min(_RUN_FOLDS, len(set(groups)))
    if count < 2:
        return found
    for number, (train, test) in enumerate(GroupKFold(count).split(groups, groups=groups), 1):
        progress(f"serving runs left out, fit {number} of {count}")
        seen = [runs[i] for i in train]
        fitted = fit_serving(seen, rows, gpu, kernels, _run_parameters(kernels, seen)).calibration
        for i in test:
            found.setdefault(runs[i].row.stack, []).append((runs[i], fitted))
    return found


# -- errors, intervals, provenance -------------------------------------------------------------


def _summaries(
    rows: KernelRows, seconds: Array, watts: Array
) -> dict[str, dict[str, ErrorSummary]]:
    """Errors of seconds, watts and joules by operator class, and of all of them."""
    found = {}
    for op_class in (*dict.fromkeys(rows.op_class), "all"):
        mine = np.array([op_class in (c, "all") for c in rows.op_class])
        s, w = rows.seconds[mine], rows.watts[mine]
        found[op_class] = {
            "seconds": summarize(seconds[mine], s),
            "watts": summarize(watts[mine], w),
            "joules": summarize(seconds[mine] * watts[mine], s * w),
        }
    return found


def _run_errors(pairs: Sequence[tuple[Run, Calibration]]) -> dict[str, ErrorSummary]:
    predicted = [simulated([run], calibration) for run, calibration in pairs]
    return {
        "joules": summarize(
            np.array([p[0][0] for p in predicted]), np.array([run.joules for run, _ in pairs])
        ),
        "seconds": summarize(
            np.array([p[1][0] for p in predicted]), np.array([run.seconds for run, _ in pairs])
        ),
    }


def _run_interval(
    pairs: Sequence[tuple[Run, Calibration]], errors: ErrorSummary
) -> IntervalCalibration:
    models = sorted({run.row.model_name for run, _ in pairs})
    what = f"{errors.n} held-out serving runs of this machine ({', '.join(models)})"
    if errors.n >= _RUNS_FOR_P90:
        size, basis = errors.p90, f"p90 of the errors of {what}"
    else:
        size, basis = _WIDER * errors.max, f"{_WIDER:g} x the largest error of {what}"
    if len(models) == 1:
        size *= _ONE_MODEL
        basis = f"{_ONE_MODEL:g} x {basis}, held out by input length: no other model was measured"
    return _interval(size, basis)


def _kept_interval(
    shipped: IntervalCalibration, start: Calibration, worst: float
) -> IntervalCalibration:
    """Interval of a stack that was not measured here: the start's, unless the kernels err more."""
    if worst > shipped.high - 1.0:
        return _interval(worst, "p90 of the errors of the held-out kernel windows' joules")
    basis = (
        f"as the calibration it started from (origin {start.origin}): fewer than {_FEWEST_RUNS} "
        f"held-out runs of this stack on this machine. That one: {shipped.basis}"
    )
    return replace(shipped, basis=basis)


def _interval(size: float, basis: str) -> IntervalCalibration:
    size = round(size, 4)
    low, high = round(1.0 / (1.0 + size), _DIGITS), 1.0 + size
    return IntervalCalibration(level=LEVEL, low=low, high=high, basis=basis)


def _seen(start: Calibration) -> set[str]:
    """Checksums of the files that the start was fitted to."""
    files = start.provenance.get("files", {})
    return {*files, *map(str, files.values())} if isinstance(files, dict) else set()


def _plain(error: ErrorSummary) -> dict[str, float]:
    return {
        "n": error.n,
        "median": round(error.median, 4),
        "p90": round(error.p90, 4),
        "max": round(error.max, 4),
        "bias": round(error.bias, 4),
    }


def _rounded(value: Any) -> Any:
    """Numbers of a calibration with as many digits as a fit can repeat."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rounded(getattr(value, f.name)) for f in fields(value)})
    return value
