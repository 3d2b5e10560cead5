"""Fits a calibration to what one machine measured: `energymodel fit`. No torch, no GPU.

Three stages, each starting from the one before; the first starts from the GPU's shipped
calibration:

1. seconds of kernels alone, class by class (`fit.fit_kernel_seconds`; 8-bit products after the
   16-bit ones),
2. seconds and watts of all kernel windows together (`fit_serving.fit_serving` without runs),
3. where serving runs were measured: host times of their stacks, the gap between kernels and the
   base power (`fit_serving.fit_serving`); what kernels cost stays as measured alone.

Errors are of what a fit did not see: kernel windows by shape family, serving runs by model (by
shape, where a stack served one model only). Trace replays are never fitted. The same files give
the same calibration.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fit import (
    TIME_PARAMETERS,
    ErrorSummary,
    KernelRows,
    fit_kernel_seconds,
    summarize,
)
from calibration.fit_serving import (
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
from calibration.kernel_windows import kernel_rows
from calibration.measured_runs import read_idle, read_own
from calibration.windows import read_jsonl
from energymodel import __version__
from energymodel.calibrations import Calibration, IntervalCalibration
from energymodel.errors import ConfigurationError, EnergyModelError, ProfileError
from energymodel.gpus import load_gpu
from energymodel.roofline import EIGHT_BIT
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]
Progress = Callable[[str], None]
"""Called with what is done next."""

_SERVING_KINDS = {"engine", "run", "idle", "experts", "done", "skipped", "error", "exit"}
_KERNEL_KINDS = {"header", "case", "software"}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What the given files hold, all of one GPU model."""

    board: str
    """Name as the driver gives it."""
    gpu: GpuSpec
    kernel_files: tuple[Path, ...]
    serving_files: tuple[Path, ...]
    records: tuple[Mapping[str, Any], ...]
    """Of the kernel files, in order."""

    @property
    def windows(self) -> list[dict[str, Any]]:
        """Valid kernel windows and idle states."""
        return [dict(r) for r in self.records if r.get("kind") == "case" and r.get("valid")]


# -- reading -----------------------------------------------------------------------------------


def read_measurements(paths: Sequence[Path], gpu: str | None = None) -> Measurements:
    """Sort files into kernel windows and serving records, and find out which GPU they are of.

    Parameters
    ----------
    paths : files (`.jsonl`, `.jsonl.gz`), or folders with such files anywhere inside
    gpu : name of the GPU, needed where the driver's name for the board is not known

    Raises
    ------
    EnergyModelError
        If a file is neither, the files are of several GPU models or power limits, the GPU is
        unknown, or there is no valid kernel window.
    """
    kernel_files, serving_files = [], []
    records: list[dict[str, Any]] = []
    boards: dict[str, Path] = {}
    for path in _files(paths):
        found = read_jsonl(path)
        kinds = {r.get("kind") for r in found}
        if kinds and kinds <= _KERNEL_KINDS:
            kernel_files.append(path)
            records += found
        elif kinds and kinds <= _SERVING_KINDS:
            serving_files.append(path)
        else:
            raise ConfigurationError(
                f"{path}: holds neither kernel windows (of `energymodel calibrate`) nor serving "
                "records (of `energymodel measure`); leave it out"
            )
        for record in found:
            if "identity" in record:
                boards[str(record["identity"]["gpus"][0]["name"])] = path
    known = _known(boards, gpu)
    if not any(r.get("kind") == "case" and r.get("valid") for r in records):
        raise EnergyModelError(
            f"no valid kernel window in {', '.join(map(str, paths))}; measure some with "
            "`energymodel calibrate`"
        )
    return Measurements(
        board=next(iter(boards)),
        gpu=known,
        kernel_files=tuple(kernel_files),
        serving_files=tuple(serving_files),
        records=tuple(records),
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
            if not inside:
                raise ConfigurationError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _known(boards: Mapping[str, Path], gpu: str | None) -> GpuSpec:
    """GPU that all boards are; `gpu` names it where the driver's name is not known."""
    if not boards:
        raise EnergyModelError("no file says which GPU was measured (no header); measure again")
    asked = None if gpu is None else load_gpu(gpu)
    found: dict[str, Path] = {}
    for board, path in boards.items():
        try:
            spec = load_gpu(board)
        except ProfileError as error:
            if asked is None:
                raise ProfileError(
                    f"{path}: the driver calls this GPU '{board}', which is not known by that "
                    "name; say which it is with --gpu (`energymodel known` lists all)"
                ) from error
            spec = asked
        found[spec.name] = path
        if asked is not None and spec.name != asked.name:
            raise ConfigurationError(
                f"--gpu {gpu}: {path} was measured on a {spec.title}; leave --gpu out"
            )
    if len(found) > 1:
        each = ", ".join(f"{name} ({path})" for name, path in found.items())
        raise ConfigurationError(f"the files are of several GPUs: {each}; fit them apart")
    return load_gpu(next(iter(found))) if asked is None else asked


# -- fitting -----------------------------------------------------------------------------------


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
    start = replace(start, gpu=gpu.name, **_measured_watts(measured))
    rows = kernel_rows(windows, gpu.boost_clock_hz)
    rows = rows.pick([d in gpu.peak_flops_per_s for d in rows.dtype])
    families = len(set(rows.family))
    if families < _FEWEST_FAMILIES:
        raise EnergyModelError(
            f"{len(rows)} kernel windows of {families} shape families are too few to fit: at least "
            f"{_FEWEST_FAMILIES} families are needed; run `energymodel calibrate --suite quick`"
        )
    progress(f"{len(rows)} kernel windows of {families} shape families")
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
        **_machine(measured),
        "start": f"calibration of {start.gpu}, origin {start.origin}",
        "start_has_seen": sorted(files[sha] for sha in files if sha in _seen(start)),
        "files": files,
        "kernel_windows": dict(Counter(rows.op_class)),
        "shape_families": {
            c: len(set(rows.of_class(c).family)) for c in dict.fromkeys(rows.op_class)
        },
        "classes_not_measured": [c for c in start.kernels if c not in rows.op_class],
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


def _measured_watts(measured: Measurements) -> dict[str, float]:
    """Idle states, base power and power limit [W], under the names of the calibration."""
    found: dict[str, list[float]] = {}
    idle = [(r["case"].removeprefix("idle."), r["power_watts"]) for r in measured.windows]
    for state, watts in [*idle, *read_idle(measured.serving_files, measured.gpu.name)]:
        if state in ("cold", "context", "polling"):
            found.setdefault(f"{state}_idle_watts", []).append(watts)
    values = {field: float(np.median(watts)) for field, watts in found.items()}
    base = [r["power_watts"] for r in measured.windows if r["op_class"] == "base"]
    if base:
        values["base_watts"] = min(base)
    limits = {
        float(watts)
        for r in measured.records
        if r.get("kind") == "header"
        and (watts := r["identity"]["gpus"][0].get("power_limit_watts")) is not None
    }
    if len(limits) > 1:
        raise ConfigurationError(
            "the windows were measured under several power limits "
            f"({', '.join(f'{w:.0f} W' for w in sorted(limits))}); fit them apart"
        )
    if limits:
        values["power_cap_watts"] = limits.pop()
    return values


def _machine(measured: Measurements) -> dict[str, Any]:
    """Boards (hashed), driver, software and days of measurement, from the files alone."""
    headers = [r for r in measured.records if r.get("kind") == "header"]
    engines = [
        r for path in measured.serving_files for r in read_jsonl(path) if r.get("kind") == "engine"
    ]
    software: dict[str, set[str]] = {}
    for record in measured.records:
        for name, version in record.get("software", {}).items():
            software.setdefault(name, set()).add(str(version)[:60])
    for engine in engines:
        for name in ("torch", "cuda", "vllm", "transformers"):
            if version := engine["settings"].get(f"{name}_version"):
                software.setdefault(name, set()).add(str(version))
    times = [r["started_unix_seconds"] for r in headers] + [r["unix_seconds"] for r in engines]
    days = sorted({datetime.fromtimestamp(t, UTC).date().isoformat() for t in times})
    identities = [r["identity"] for r in (*headers, *engines)]
    return {
        "boards_sha256": sorted({str(i["gpus"][0].get("uuid_sha256")) for i in identities}),
        "driver": sorted({str(i.get("driver_version")) for i in identities}),
        "software": {name: sorted(versions) for name, versions in sorted(software.items())},
        "measured_on": days,
    }


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
