"""Fits what only whole serving runs show: host times of the stacks, kernels in their places.

    python -m calibration.fitting.fit_serving h100 --out profiles/calibrations/h100.json

starts from the calibration in `data/public` (kernel seconds from public tables), and moves all
parameters together, by robust least squares on the log residuals of

- joules and seconds of the serving runs that `data/split.json` opens to fits,
- seconds and watts of the GPU's kernel windows (`data/kernels`),

each parameter pulled towards its start by a prior as wide as that start is uncertain. The
simulator is part of the residuals (`recorded_steps`): what is fitted is what `energymodel predict`
prints.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import (
    ErrorSummary,
    KernelRows,
    row_costs,
    row_tables,
    summarize,
)
from calibration.fitting.kernel_windows import kernel_rows, read_windows
from calibration.fitting.measured_runs import read_idle, read_own
from calibration.fitting.recorded_steps import can_be_recorded, recorded_runs
from calibration.validation.rows import DATA, MeasuredRow, is_fitted, load_split
from energymodel.calibrations import (
    Calibration,
    IntervalCalibration,
    load_calibration,
    save_calibration,
)
from energymodel.costs import CostTables, cost_tables
from energymodel.deployment import STACKS, Deployment, deploy
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.simulator import simulate
from energymodel.specs import STATIC_STACKS, GpuSpec

Array = NDArray[np.float64]

WIDE = 3.0
"""Standard deviation of a prior that says next to nothing: a factor of 20 either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A number of the calibration that is fitted; several places may share it."""

    paths: tuple[str, ...]
    """Dotted fields of `Calibration`, `kernels.gemm.memory_efficiency`."""
    prior: float
    """Standard deviation of the logarithm of the start value [-]."""
    start: float | None = None
    """Start value; None = the calibration's own."""
    low: float = 1e-15
    high: float = 1e4


def _stack(field: str, *stacks: str, start: float, prior: float = WIDE) -> Parameter:
    return Parameter(paths=tuple(f"stacks.{s}.{field}" for s in stacks), prior=prior, start=start)


_KERNELS = ("gemm", "moe", "attention_prefill", "attention_decode", "elementwise", "sampling")

PARAMETERS: tuple[Parameter, ...] = (
    # host and gaps: nothing but these runs tells them
    _stack("step_host_seconds", "vllm", "vllm-eager", start=1.5e-3),
    _stack("sequence_host_seconds", "vllm", "vllm-eager", start=3e-5),
    _stack("request_host_seconds", "vllm", "vllm-eager", start=2e-4),
    _stack("start_gap_seconds", "vllm", "vllm-eager", start=1e-3),
    _stack("step_gap_seconds", "vllm", "vllm-eager", start=5e-5, prior=1.0),
    _stack("launch_seconds", "vllm", start=3e-5),
    _stack("piecewise_kernels", "vllm", start=2.0, prior=1.0),
    _stack("launch_seconds", "vllm-eager", start=4e-5),
    # 20.3 ms a decode step of lengths met before (llama-3.2-1b) over its 16 layers of 70 kernels
    _stack("launch_seconds", "transformers", "transformers-compile", start=1.8e-5, prior=0.05),
    _stack("start_gap_seconds", "transformers", "transformers-compile", start=5e-3, prior=1.0),
    _stack("step_host_seconds", "transformers-compile", start=3e-3, prior=1.0),
    _stack("draft_host_seconds", "vllm", "vllm-eager", start=5e-4, prior=1.0),
    _stack("round_host_seconds", "vllm", "vllm-eager", start=2e-3, prior=1.0),
    # kernel seconds: other boards' tables are a good start
    Parameter(paths=("kernel_gap_seconds",), prior=1.0, start=1e-6),
    Parameter(paths=("kernels.gemm.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.gemm.memory_efficiency",), prior=0.05, high=1.1),
    Parameter(paths=("kernels.gemm.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.moe.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.moe.memory_efficiency",), prior=0.1, high=1.1),
    Parameter(paths=("kernels.moe.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.attention_prefill.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.attention_prefill.call_seconds",), prior=0.5),
    Parameter(paths=("kernels.attention_decode.memory_efficiency",), prior=0.1, high=1.1),
    Parameter(paths=("kernels.attention_decode.call_seconds",), prior=0.5),
    Parameter(paths=("kernels.elementwise.memory_efficiency",), prior=0.3, high=1.1),
    Parameter(paths=("kernels.elementwise.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.sampling.call_seconds",), prior=1.0),
    # energy
    Parameter(paths=("base_watts",), prior=0.05, start=130.0),
    Parameter(paths=("joules_per_flop.bf16", "joules_per_flop.fp16"), prior=WIDE, start=8e-13),
    Parameter(paths=("joules_per_hbm_byte",), prior=WIDE, start=1.2e-10),
    Parameter(paths=("joules_per_onchip_byte",), prior=1.0, start=3e-11),
    Parameter(paths=("clock_energy_exponent",), prior=0.5, start=1.0, low=0.2, high=3.0),
    *(
        Parameter(paths=(f"kernels.{c}.active_watts",), prior=1.5, start=20.0, low=0.1)
        for c in _KERNELS
    ),
    *(
        Parameter(paths=(f"kernels.{c}.flop_energy_factor",), prior=0.3)
        for c in ("moe", "attention_prefill", "attention_decode")
    ),
)


def value_at(calibration: Calibration, path: str) -> float:
    """Number at a dotted path of the calibration."""
    value: Any = calibration
    for part in path.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return float(value)


def with_values(calibration: Calibration, values: Mapping[str, float]) -> Calibration:
    """Calibration with the numbers at the given dotted paths replaced."""
    for path, value in values.items():
        calibration = _replaced(calibration, path.split("."), value)
    return calibration


def _replaced(holder: Any, parts: Sequence[str], value: float) -> Any:
    name, rest = parts[0], parts[1:]
    inside = holder[name] if isinstance(holder, Mapping) else getattr(holder, name)
    new = _replaced(inside, rest, value) if rest else value
    return {**holder, name: new} if isinstance(holder, Mapping) else replace(holder, **{name: new})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured run with what serves it."""

    row: MeasuredRow
    deployment: Deployment
    joules: float
    seconds: float
    ttft_seconds: float | None = None
    """Median over the requests; None where it says nothing that `seconds` does not."""


def runs_of(rows: Sequence[MeasuredRow]) -> list[Run]:
    """Rows ready to be simulated; equal deployments are shared."""
    deployments: dict[tuple[Any, ...], Deployment] = {}
    runs = []
    for row in rows:
        options = dict(row.options)
        key = (row.gpu, row.model_name, row.stack, *sorted(options.items(), key=str))
        if key not in deployments:
            deployments[key] = deploy(
                gpu=row.gpu,
                model=row.model,
                stack=row.stack,
                **options,  # type: ignore[arg-type]
            )
        tokens = int(row.requests.output_tokens.sum())
        joules = row.joules_per_output_token
        assert joules is not None
        runs.append(
            Run(
                row=row,
                deployment=deployments[key],
                joules=joules * tokens,
                seconds=row.seconds_per_output_token * tokens,
                ttft_seconds=row.ttft_seconds if row.phase == "batch" else None,
            )
        )
    return runs


def simulated(runs: Sequence[Run], calibration: Calibration) -> tuple[Array, Array, Array]:
    """Joules of all GPUs, seconds and median TTFT of the runs under a calibration; each (n,)."""
    tables: dict[int, CostTables] = {}
    joules, seconds, ttft = np.empty((3, len(runs)))
    for i, run in enumerate(runs):
        d = run.deployment
        if id(d) not in tables:
            tables[id(d)] = cost_tables(d.model, d.serving, d.gpu, calibration)
        requests = run.row.requests
        result = simulate(
            requests.arrival_seconds,
            requests.input_tokens,
            requests.output_tokens,
            tables[id(d)],
            static_batches=d.static_batches,
        )
        assert result is not None
        totals = result.totals
        seconds[i] = totals["now"]
        ttft[i] = np.median(result.first_token_seconds - requests.arrival_seconds)
        joules[i] = totals["prefill_joules"] + totals["decode_joules"]
        joules[i] += totals["idle_seconds"] * calibration.polling_idle_watts
        joules[i] *= d.gpus_per_replica
    return joules, seconds, ttft


def window_seconds_and_watts(
    rows: KernelRows, gpu: GpuSpec, calibration: Calibration
) -> tuple[Array, Array]:
    """Seconds of kernel windows at their clock, and watts at their seconds and clock; each (n,)."""
    memory, compute, fixed, core = row_tables(row_costs(rows, gpu, calibration)).T
    seconds = memory + compute / rows.clock
    joules = fixed + core * rows.clock**calibration.clock_energy_exponent
    return seconds, calibration.base_watts + joules / rows.seconds


JOULES_SIGMA, SECONDS_SIGMA, TTFT_SIGMA, WINDOW_SIGMA = 0.02, 0.03, 0.1, 0.06
"""Log residual that weighs as one standard deviation: repeats of a run on two boards differ by 1 to
2.5 % in joules and up to 4 % in seconds; kernels of a class differ more than the model knows."""
ROBUST_SCALE = 2.0
"""Standard deviations from which on soft_l1 grows linearly."""
_DIFFERENCE = 1e-4
"""Half the step of the central differences in the logarithm of a parameter [-]."""
_TOLERANCE, _MOST_STEPS = 1e-12, 500
"""Of the least squares: tight enough that the six digits of a parameter repeat anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFit:
    """A fitted calibration and how well the data determine each parameter."""

    calibration: Calibration
    log_std: dict[str, float]
    """Standard deviation of the logarithm of each parameter, prior included [-]."""


def fit_serving(
    runs: Sequence[Run],
    windows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    parameters: Sequence[Parameter] = PARAMETERS,
) -> ServingFit:
    """Calibration that fits runs and windows best, see the module's text.

    Its parameters have six digits: more of them would differ from machine to machine.
    """
    from scipy.optimize import least_squares  # noqa: PLC0415

    start = np.log([_start(calibration, p) for p in parameters])
    prior = np.array([p.prior for p in parameters])
    bounds = np.log([[p.low, p.high] for p in parameters]).T
    totals = _totals(runs)
    measured = np.log([[r.joules for r in runs], [r.seconds for r in runs]])
    has_ttft = np.array([r.ttft_seconds is not None for r in runs], dtype=bool)
    ttft_measured = np.log([r.ttft_seconds for r in runs if r.ttft_seconds is not None])

    def at(values: Array) -> Calibration:
        pairs = zip(parameters, values, strict=True)
        return with_values(calibration, {p: float(v) for q, v in pairs for p in q.paths})

    def residuals(theta: Array) -> Array:
        candidate = at(np.exp(theta))
        joules, seconds, ttft = totals(candidate)
        alone, watts = window_seconds_and_watts(windows, gpu, candidate)
        return np.concatenate(
            [
                (np.log(joules) - measured[0]) / JOULES_SIGMA,
                (np.log(seconds) - measured[1]) / SECONDS_SIGMA,
                (np.log(ttft[has_ttft]) - ttft_measured) / TTFT_SIGMA,
                (np.log(alone) - np.log(windows.seconds)) / WINDOW_SIGMA,
                (np.log(watts) - np.log(windows.watts)) / WINDOW_SIGMA,
                (theta - start) / prior,
            ]
        )

    def jacobian(theta: Array) -> Array:
        steps = _DIFFERENCE * np.eye(len(theta))
        columns = [residuals(theta + s) - residuals(theta - s) for s in steps]
        return np.stack(columns, axis=1) / (2.0 * _DIFFERENCE)

    result = least_squares(
        residuals,
        np.clip(start, bounds[0] + 1e-6, bounds[1] - 1e-6),
        jac=jacobian,
        bounds=(bounds[0], bounds[1]),
        loss="soft_l1",
        f_scale=ROBUST_SCALE,
        x_scale=np.minimum(prior, 0.5),
        ftol=_TOLERANCE,
        xtol=_TOLERANCE,
        gtol=_TOLERANCE,
        max_nfev=_MOST_STEPS,
    )
    covariance = np.linalg.pinv(result.jac.T @ result.jac)
    spread = np.sqrt(np.diag(covariance))
    names = [p.paths[0] for p in parameters]
    return ServingFit(
        calibration=at(np.array([float(f"{v:.6g}") for v in np.exp(result.x)])),
        log_std={name: float(value) for name, value in zip(names, spread, strict=True)},
    )


def _totals(runs: Sequence[Run]) -> Callable[[Calibration], Array]:
    """Joules, seconds and median TTFT of the runs (3, n) as a function of the calibration.

    Runs whose requests arrive over time are simulated anew each time, the others recorded once.
    """
    all_wait = np.array([can_be_recorded(r.row.requests) for r in runs], dtype=bool)
    later = [r for r, waiting in zip(runs, all_wait, strict=True) if not waiting]
    offline = [r for r, waiting in zip(runs, all_wait, strict=True) if waiting]
    recorded = recorded_runs([(r.deployment, r.row.requests) for r in offline]) if offline else None

    def totals(calibration: Calibration) -> Array:
        values = np.empty((3, len(runs)))
        values[:, ~all_wait] = simulated(later, calibration)
        if recorded is not None:
            values[:, all_wait] = recorded.totals(calibration)
        return values

    return totals


def _start(calibration: Calibration, parameter: Parameter) -> float:
    own = value_at(calibration, parameter.paths[0])
    return own if parameter.start is None else parameter.start


# -- a GPU's calibration, with held-out errors and intervals ----------------------------------

LEVEL = 0.9
FITTED, HELD_OUT = "fitted", "held out by the split"
LEFT_OUT = "each fitted model left out"
_UNTESTED_MARGIN = 1.25
"""Widening of an interval whose stack was measured with fitted models only."""
_FEWEST_RUNS = 5
_ENOUGH_RUNS = 19
"""Runs from which on their p90 bounds the next error with 90 % probability."""
_UNTESTED = 0.5
"""Size of the interval of a stack with fewer runs than that."""


def usable(row: MeasuredRow, gpu: str) -> bool:
    """Whether a row says something about the steady state of a GPU.

    Saturated servers (rows with a ramp) are left to validation. Transformers lets cuDNN plan
    attention anew for each length of KV cache that it has not met (about 60 ms a step): batches
    that were metered while it did are no steady state.
    """
    planning_attention = row.stack in STATIC_STACKS and row.unsteady
    return row.gpu == gpu and row.ramp is None and not planning_attention


def calibrate_serving(
    name: str, *, serving: Path = DATA / "serving", kernels: Path = DATA / "kernels"
) -> Calibration:
    """Fit a GPU's calibration to its runs and windows; errors and intervals from rows left out.

    Rows that the split holds out are predicted by the fit to all of the split; beside that, each
    model of the split is predicted by a fit to the others.

    Raises
    ------
    EnergyModelError
        If there are no runs or no windows of the GPU.
    """
    gpu = load_gpu(name)
    before = load_calibration(str(DATA / "public" / f"{name}.json"))
    files = sorted(kernels.glob(f"{name}-*.jsonl*"))
    measured = [window for file in files for window in read_windows(file)]
    runs = runs_of([row for row in read_own(serving)[0] if usable(row, name)])
    if not measured or not runs:
        raise EnergyModelError(f"no windows in {kernels} or no runs in {serving} of {name}")
    windows = kernel_rows(measured, gpu.boost_clock_hz)
    before = replace(before, **_idle_watts(measured, read_idle(serving, gpu.name)))
    split = load_split()
    fitted = [r for r in runs if is_fitted(r.row, split)]
    final = _other_dtypes(fit_serving(fitted, windows, gpu, before), before)
    groups = {
        FITTED: [(r, final.calibration) for r in fitted],
        HELD_OUT: [(r, final.calibration) for r in runs if not is_fitted(r.row, split)],
        LEFT_OUT: _each_model_left_out(fitted, windows, gpu, before),
    }
    return _documented(name, final, groups, windows, [*files, *_files(serving, name)])


def _each_model_left_out(
    fitted: Sequence[Run], windows: KernelRows, gpu: GpuSpec, before: Calibration
) -> list[tuple[Run, Calibration]]:
    """Runs of each model with a fit to the other models' runs, where those ran on its stack."""
    found = []
    for model in sorted({r.row.model_name for r in fitted}):
        rest = [r for r in fitted if r.row.model_name != model]
        stacks = {r.row.stack for r in rest}
        without = fit_serving(rest, windows, gpu, before).calibration
        own = [r for r in fitted if r.row.model_name == model and r.row.stack in stacks]
        found += [(r, without) for r in own]
    return found


def _other_dtypes(fit: ServingFit, before: Calibration) -> ServingFit:
    """The fit with the energies of dtypes that were not measured changed as that of bf16."""
    new, old = fit.calibration.joules_per_flop, before.joules_per_flop
    change = new["bf16"] / old["bf16"]
    joules = {d: new[d] if d in ("bf16", "fp16") else v * change for d, v in old.items()}
    return replace(fit, calibration=replace(fit.calibration, joules_per_flop=joules))


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.jsonl*"))


def _idle_watts(
    windows: Sequence[Mapping[str, Any]], serving: Sequence[tuple[str, float]]
) -> dict[str, float]:
    """Median power of the measured idle states [W], under the names of the calibration."""
    found: dict[str, list[float]] = {}
    alone = [(w["case"].removeprefix("idle."), w["power_watts"]) for w in windows]
    for state, watts in [*alone, *serving]:
        if state in ("context", "polling"):
            found.setdefault(f"{state}_idle_watts", []).append(watts)
    return {field: float(np.median(watts)) for field, watts in found.items()}


def _documented(
    name: str,
    fit: ServingFit,
    groups: Mapping[str, Sequence[tuple[Run, Calibration]]],
    windows: KernelRows,
    files: Sequence[Path],
) -> Calibration:
    """Calibration with its intervals and provenance."""
    errors = {
        stack: {group: _errors([p for p in pairs if p[0].row.stack == stack])
                for group, pairs in groups.items()}
        for stack in STACKS
    }  # fmt: skip
    spread = card_spread([run for pairs in groups.values() for run, _ in pairs])
    alone, watts = window_seconds_and_watts(windows, load_gpu(name), fit.calibration)
    provenance: dict[str, Any] = {
        "command": f"python -m calibration.fitting.fit_serving {name}",
        "start": f"calibration/data/public/{name}.json, "
        + str(fit.calibration.provenance.get("source")),
        "files": {
            f"{f.parent.name}/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files
        },
        "kernel_windows": len(windows),
        "serving_runs": {group: len(pairs) for group, pairs in groups.items()},
        "split": "calibration/data/split.json",
        "errors": {
            stack: {group: _rounded(value) for group, value in own.items() if value}
            for stack, own in errors.items()
        },
        "errors_of_kernel_windows": {
            "seconds": _rounded_summary(summarize(alone, windows.seconds)),
            "watts": _rounded_summary(summarize(watts, windows.watts)),
        },
        "spread_between_cards": round(spread, 4),
        "parameter_log_std": {key: round(value, 3) for key, value in fit.log_std.items()},
    }
    intervals = {stack: _interval(own, spread) for stack, own in errors.items()}
    return replace(fit.calibration, origin="measured", intervals=intervals, provenance=provenance)


def card_spread(runs: Sequence[Run]) -> float:
    """p90 of the relative difference in joules of equal cases on two cards; 0 without any."""
    joules: dict[tuple[str, str], list[float]] = {}
    for run in {id(r): r for r in runs}.values():
        joules.setdefault((run.row.name, run.row.stack), []).append(run.joules)
    apart = [abs(pair[1] / pair[0] - 1.0) for pair in joules.values() if len(pair) > 1]
    return float(np.percentile(apart, 100 * LEVEL)) if apart else 0.0


def _errors(pairs: Sequence[tuple[Run, Calibration]]) -> dict[str, ErrorSummary] | None:
    if not pairs:
        return None
    predicted = [simulated([run], calibration) for run, calibration in pairs]
    joules = np.array([p[0][0] for p in predicted])
    seconds = np.array([p[1][0] for p in predicted])
    return {
        "joules": summarize(joules, np.array([run.joules for run, _ in pairs])),
        "seconds": summarize(seconds, np.array([run.seconds for run, _ in pairs])),
    }


def _interval(
    errors: Mapping[str, dict[str, ErrorSummary] | None], spread: float
) -> IntervalCalibration:
    """Interval of a stack from the errors of runs that no fit saw, and the spread of cards.

    With few runs the largest error stands for the 90th percentile, as conformal prediction asks.
    Rows held out from the whole fit are few and near to it; a fit without one of its models has
    lost half of its data. A model that nobody measured lies between: the geometric mean of both.
    """
    tested, left, own = errors[HELD_OUT], errors[LEFT_OUT], errors[FITTED]
    if tested is not None and tested["joules"].n >= _FEWEST_RUNS:
        few = tested["joules"].n < _ENOUGH_RUNS
        error = tested["joules"].max if few else tested["joules"].p90
        basis = f"{'largest' if few else 'p90'} error of {tested['joules'].n} held-out serving runs"
        if left is not None:
            error = float(np.sqrt(error * left["joules"].p90))
            basis += f" and p90 of {left['joules'].n} with their model left out (geometric mean)"
        size = float(np.hypot(error, spread))
        basis += ", with the spread between cards"
    elif own is not None and own["joules"].n >= _FEWEST_RUNS:
        size = _UNTESTED_MARGIN * own["joules"].max
        basis = (
            f"{_UNTESTED_MARGIN:g} x the largest error of {own['joules'].n} fitted serving runs of "
            "this GPU; no other model was measured"
        )
    else:
        size = _UNTESTED
        basis = "assumed: too few steady runs of this stack were measured"
    size = round(size, 4)
    return IntervalCalibration(level=LEVEL, low=1.0 / (1.0 + size), high=1.0 + size, basis=basis)


def _rounded(errors: Mapping[str, ErrorSummary]) -> dict[str, dict[str, float]]:
    return {key: _rounded_summary(value) for key, value in errors.items()}


def _rounded_summary(value: ErrorSummary) -> dict[str, float]:
    return {
        "n": value.n,
        "median": round(value.median, 4),
        "p90": round(value.p90, 4),
        "max": round(value.max, 4),
        "bias": round(value.bias, 4),
    }


def _command(
    gpu: Annotated[str, typer.Argument(help="GPU, as in profiles/gpus.")],
    out: Annotated[Path, typer.Option(help="Calibration file to write.")],
) -> None:
    """Fit a GPU's calibration to its serving runs and kernel windows."""
    try:
        save_calibration(calibrate_serving(gpu), out)
    except EnergyModelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(_command)
