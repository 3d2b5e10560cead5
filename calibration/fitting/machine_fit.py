"""Fits a calibration to what was measured on GPUs of one kind: `energymodel fit`. No torch, no GPU.

One joint fit (`joint_fit`) of kernel windows and serving runs moves all parameters of which they
tell something; all-reduces of two GPUs are fitted apart before (`fit_link`). The start is the GPU's
shipped calibration, or another.

Errors are of what a fit did not see. Kernel windows: by shape family. Serving runs: with a written
split (`data/split.json`), the runs it holds out, and beside them each fitted model's runs by a fit
without it; else by model (by input length, where a stack served one model only). Trace replays are
never fitted. The same files give the same calibration.

The shipped calibrations are made this way too, see `docs/calibrating.md`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_errors import (
    Pairs,
    card_spread,
    interval_of_machine,
    interval_of_split,
    plain_each,
    run_errors,
)
from calibration.fitting.fit_kernels import (
    ErrorSummary,
    KernelRows,
    fit_kernel_seconds,
    summarize,
)
from calibration.fitting.hosts import ratio_of_hosts, read_hosts
from calibration.fitting.joint_fit import JointFit, joint_fit, predicted_windows
from calibration.fitting.kernel_windows import kernel_rows, link_rows
from calibration.fitting.measured_runs import read_own
from calibration.fitting.measurements import Measurements, idle_watts, machine_of, measured_watts
from calibration.fitting.parameters import parameters_for
from calibration.fitting.serving_runs import Run, runs_of, usable
from calibration.validation.rows import is_fitted
from energymodel import __version__
from energymodel.calibrations import Calibration, IntervalCalibration, with_host_times
from energymodel.errors import EnergyModelError
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]
Progress = Callable[[str], None]
"""Called with what is done next."""

_KERNEL_FOLDS, _RUN_FOLDS = 8, 4
_FEWEST_FAMILIES = 3
_FEWEST_LINK_ROWS = 2
_NCCL_BYTES = 8 * 2**20
"""Messages from which on NCCL carries them in vLLM; its own all-reduce takes the smaller ones."""
_DIGITS = 6


def fit_machine(
    measured: Measurements,
    start: Calibration,
    progress: Progress = lambda _: None,
    split: Mapping[str, Any] | None = None,
) -> Calibration:
    """Calibration of the measured GPU, with held-out errors, intervals and provenance.

    `split` : of `rows.load_split`; None = every run but trace replays is open to the fit.

    Raises
    ------
    EnergyModelError
        If there are too few kernel windows to fit, or windows under several power limits.
    """
    gpu = measured.gpu
    windows = measured.windows
    origin = f"calibration of the {start.gpu}, origin {start.origin}"
    start = replace(start, gpu=gpu.name, **measured_watts(measured))
    board_idle = idle_watts(measured)[1]
    rows = kernel_rows(windows, gpu, board_idle)
    rows = rows.pick([d in gpu.peak_flops_per_s for d in rows.dtype])
    families = len(set(rows.family))
    if families < _FEWEST_FAMILIES:
        raise EnergyModelError(
            f"{len(rows)} kernel windows of {families} shape families are too few to fit: at least "
            f"{_FEWEST_FAMILIES} families are needed; run `energymodel calibrate --suite quick`"
        )
    progress(f"{len(rows)} kernel windows of {families} shape families")
    links = link_rows(windows, gpu, board_idle)
    start = fit_link(links, gpu, start)
    errors = window_errors(rows, *held_out_windows(rows, gpu, start))
    found, left_out = read_own(measured.serving_files)
    mine = [r for r in found if usable(r, gpu.name)]
    runs = runs_of([row for row in mine if _is_open(row, split)])
    others = runs_of([row for row in mine if not _is_open(row, split)])
    if found:
        progress(f"{len(runs)} serving runs, {len(others)} more that are never fitted")
    hosts = read_hosts(measured.serving_files)
    ratio = 1.0 if runs else ratio_of_hosts(hosts, start)
    start = with_host_times(start, ratio)
    fit = _fit(runs, rows, gpu, start)
    calibration = _rounded(fit.calibration)
    held_out = _by_stack([(run, calibration) for run in others])
    if split is None:
        for stack, pairs in _by_stack(_held_out_runs(runs, rows, gpu, start, progress)).items():
            held_out[stack] = [*pairs, *held_out.get(stack, ())]
        worst = errors["all"]["joules"].p90
        intervals = {
            stack: interval_of_machine(held_out.get(stack, ()), interval, start.origin, worst)
            for stack, interval in start.intervals.items()
        }
        left: dict[str, Pairs] = {}
    else:
        progress("each fitted model left out")
        left = _by_stack(_models_left_out(runs, rows, gpu, start))
        taken_over: Mapping[str, IntervalCalibration] = {} if runs else start.intervals
        intervals = {
            stack: interval_of_split(held_out[stack], left.get(stack, ())) for stack in held_out
        }
        least = max((i.high - 1.0 for i in intervals.values()), default=0.0)
        for stack in start.stacks:
            if stack not in intervals:
                intervals[stack] = interval_of_split(
                    (), left.get(stack, ()), taken_over.get(stack), least
                )
    files = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in (*measured.kernel_files, *measured.serving_files)
    }
    provenance: dict[str, Any] = {
        "command": "energymodel fit",
        "energymodel": __version__,
        "board": measured.board,
        **machine_of(measured),
        "start": origin,
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
        "held_out_errors": {c: plain_each(e) for c, e in errors.items()},
        "serving_runs": {
            "fitted": len(runs),
            "never fitted": len(others),
            "unsteady or saturated, left out": len([r for r in found if r.gpu == gpu.name])
            - len(mine),
            **{entry.reason: entry.rows for entry in left_out},
        },
        "held_out_runs": {s: plain_each(run_errors(pairs)) for s, pairs in held_out.items()},
        "runs_with_their_model_left_out": {
            s: plain_each(run_errors(pairs)) for s, pairs in left.items()
        },
        "spread_between_cards": card_spread([*runs, *others]),
        "parameter_log_std": {key: round(value, 3) for key, value in fit.log_std.items()},
        "board_idle_watts_above_mean": {key: round(value, 1) for key, value in board_idle.items()},
        "board_levels": {key: round(value, 4) for key, value in fit.board_levels.items()},
        "digits_repeat": fit.converged,
    }
    if hosts is not None:
        provenance["hosts"] = {**asdict(hosts), "host_times_scaled_by": round(ratio, 4)}
    return replace(calibration, origin="measured", intervals=intervals, provenance=provenance)


def _is_open(row: Any, split: Mapping[str, Any] | None) -> bool:
    if split is None:
        return row.phase in ("prefill", "batch") and row.pipeline_parallel == 1
    return is_fitted(row, split)


def _fit(runs: Sequence[Run], rows: KernelRows, gpu: GpuSpec, start: Calibration) -> JointFit:
    """The joint fit of what these runs and windows tell, other dtypes' joules changed as bf16's."""
    parameters = parameters_for(
        start,
        classes=set(rows.op_class),
        dtypes=set(rows.dtype),
        stacks={run.row.stack for run in runs},
        tensor_parallel=any(run.row.tensor_parallel > 1 for run in runs),
    )
    fit = joint_fit(runs, rows, gpu, start, parameters)
    moved = {path for p in parameters for path in p.paths}
    new, old = fit.calibration.joules_per_flop, start.joules_per_flop
    joules = {
        dtype: value
        if f"joules_per_flop.{dtype}" in moved
        else old[dtype] * new["bf16"] / old["bf16"]
        for dtype, value in new.items()
    }
    return replace(fit, calibration=replace(fit.calibration, joules_per_flop=joules))


def fit_link(rows: KernelRows, gpu: GpuSpec, start: Calibration) -> Calibration:
    """Calibration with rate and joules of the link fitted to large all-reduces, if there are some.

    They are one shape family: nothing is held out. Small messages take another way in a serving
    engine, whose time only its runs tell; what they draw beyond the base and a running kernel's
    watts is what awake links draw. Joules per byte are what large ones drew beyond all three.
    """
    large = rows.pick(rows.link_bytes >= _NCCL_BYTES)
    if len(large) < _FEWEST_LINK_ROWS:
        return start
    kernel = fit_kernel_seconds(large, gpu, start, "communication", keep=("sharpness",))
    own = start.kernels["communication"]
    running = start.base_watts + start.kernel_watts
    awake = max(0.0, float((rows.watts - rows.board_idle_watts).min()) - running)
    waiting = running + large.board_idle_watts + awake
    above = (large.watts - waiting) * large.seconds / large.link_bytes
    return replace(
        start,
        kernels={
            **start.kernels,
            "communication": replace(
                own, memory_efficiency=kernel.memory_efficiency, active_watts=awake
            ),
        },
        joules_per_link_byte=float(max(0.0, np.median(above))),
    )


# -- held out ----------------------------------------------------------------------------------


def held_out_windows(
    rows: KernelRows,
    gpu: GpuSpec,
    start: Calibration,
    fold: NDArray[np.int64] | None = None,
) -> tuple[Array, Array]:
    """Seconds and watts of the rows, each by a fit without its shape family; both (n,).

    A board's level of joules is what the fit finds in its other windows.
    `fold` (n,) holds out other parts than `window_folds` of the families; rows of negative folds
    are in every fit, and NaN.
    """
    fold = window_folds(rows.op_class, rows.family) if fold is None else fold
    seconds, watts = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for number in np.unique(fold[fold >= 0]):
        held = fold == number
        fit = _fit([], rows.pick(~held), gpu, start)
        seconds[held], watts[held] = predicted_windows(
            rows.pick(held), gpu, fit.calibration, fit.board_levels
        )
    return seconds, watts


def window_folds(classes: Sequence[str], groups: Sequence[str]) -> NDArray[np.int64]:
    """Fold of each window (n,): whole groups, those of a class dealt out one by one.

    So a class of few groups loses one of them at a time, and never two in one fold.
    """
    found = np.zeros(len(groups), dtype=np.int64)
    for op_class in sorted(set(classes)):
        mine = sorted({g for g, c in zip(groups, classes, strict=True) if c == op_class})
        for number, group in enumerate(mine):
            at = [c == op_class and g == group for c, g in zip(classes, groups, strict=True)]
            found[np.array(at)] = number % _KERNEL_FOLDS
    return found


def _models_left_out(
    fitted: Sequence[Run], rows: KernelRows, gpu: GpuSpec, start: Calibration
) -> list[tuple[Run, Calibration]]:
    """Runs of each model with a fit to the other models' runs, where those show what serves it."""
    found = []
    for model in sorted({r.row.model_name for r in fitted}):
        rest = [r for r in fitted if r.row.model_name != model]
        shown = {_served(r) for r in rest}
        own = [r for r in fitted if r.row.model_name == model and _served(r) in shown]
        if own:
            without = _fit(rest, rows, gpu, start).calibration
            found += [(r, without) for r in own]
    return found


def _served(run: Run) -> tuple[str, bool, bool]:
    """Stack, and whether on several GPUs and with a draft model: each has host times of its own."""
    row = run.row
    return row.stack, row.tensor_parallel > 1, "draft_model" in row.options


def _held_out_runs(
    runs: Sequence[Run], rows: KernelRows, gpu: GpuSpec, start: Calibration, progress: Progress
) -> list[tuple[Run, Calibration]]:
    """Each run with a fit that did not see it; see the module's text."""
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
    found: list[tuple[Run, Calibration]] = []
    count = min(_RUN_FOLDS, len(set(groups)))
    if count < 2:
        return found
    for number, (train, test) in enumerate(GroupKFold(count).split(groups, groups=groups), 1):
        progress(f"serving runs left out, fit {number} of {count}")
        fitted = _fit([runs[i] for i in train], rows, gpu, start).calibration
        found += [(runs[i], fitted) for i in test]
    return found


def _by_stack(pairs: Pairs) -> dict[str, Pairs]:
    found: dict[str, list[tuple[Run, Calibration]]] = {}
    for run, calibration in pairs:
        found.setdefault(run.row.stack, []).append((run, calibration))
    return dict(found)


def window_errors(
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


def _seen(start: Calibration) -> set[str]:
    """Checksums of the files that the start was fitted to."""
    files = start.provenance.get("files", {})
    return {*files, *map(str, files.values())} if isinstance(files, dict) else set()


def _rounded(value: Any) -> Any:
    """Numbers of a calibration with as many digits as a fit can repeat."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rounded(getattr(value, f.name)) for f in fields(value)})
    return value
