"""What `energymodel measure` does: options to a plan, a plan to records, records to a table."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.metering.meter import NvmlMeter
from calibration.metering.preflight import free_gpus, require
from calibration.metering.windows import read_jsonl
from calibration.serving.client import ServerEngine
from calibration.serving.plan import load_plan, model_config
from calibration.serving.run_plan import clock, record_run, run_plan, writer
from energymodel.errors import ConfigurationError, EnergyModelError
from energymodel.models import load_model
from energymodel.operators import moe_spec
from energymodel.workloads import load_requests

_PACKAGES = {
    **{"vllm": "vllm", "vllm-eager": "vllm"},
    **{"transformers": "transformers", "transformers-compile": "transformers"},
}
_COUNTED = {"input_tokens": 128, "output_tokens": 5}
_COUNTED_BATCHES = [1, 8, 32, 128]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the command that make a plan; lists are text, as given."""

    model: str | None
    stack: str
    gpus: tuple[int, ...]
    batch: str
    input_tokens: str
    output_tokens: str
    trace: str | None
    arrivals: str
    speed: float
    first: int
    steady: str
    steady_seconds: float
    engine: tuple[str, ...]
    tracker: str | None
    window_seconds: float


def write_plan(options: Options, out: Path, *, is_server: bool = False) -> Path:
    """Write the options as a plan into folder `out`, with its trace and model config beside it.

    Raises
    ------
    EnergyModelError
        If an option makes no sense, there is nothing to measure, or the folder cannot be written.
    """
    if options.model is None:
        raise ConfigurationError("say what to measure with --model, or give a --plan")
    batches, steady = _whole("--batch", options.batch), _whole("--steady", options.steady)
    lengths = {
        "input_tokens": _whole("--input", options.input_tokens),
        "output_tokens": _whole("--output", options.output_tokens),
    }
    if not (batches or steady or options.trace):
        raise ConfigurationError("nothing to measure: give --batch, --trace or --steady")
    if is_server and steady:
        raise ConfigurationError("--steady needs an engine of its own; leave it out with --url")
    if options.speed <= 0:
        raise ConfigurationError(f"--speed must be above 0, not {options.speed:g}")
    if options.stack.startswith("transformers") and (options.trace or steady):
        raise ConfigurationError(
            f"--stack {options.stack} serves one batch at a time; use --batch, --input and --output"
        )
    arguments = _arguments(options.engine)
    if len(options.gpus) > 1 and not is_server:
        if options.stack.startswith("transformers"):
            raise ConfigurationError(f"--stack {options.stack} runs on one GPU; give one --gpu")
        arguments = {"tensor_parallel_size": len(options.gpus), **arguments}
    try:
        out.mkdir(parents=True, exist_ok=True)
        model = _model_file(options.model, out)
        trace = None if options.trace is None else _trace_file(options.trace, out)
    except OSError as error:
        raise EnergyModelError(f"--out {out} cannot be written: {error.strerror}") from error
    shapes = [
        {"input_tokens": i, "output_tokens": o, "batch": b}
        for b, i, o in itertools.product(batches, *lengths.values())
    ]
    states = ("polling",) if is_server else ("context", "polling")
    idle = [{"kind": "idle", "state": state} for state in states]
    counted: list[dict[str, Any]] = []  # a mixture is compared with how many experts it chose
    alone = len(options.gpus) == 1 and not is_server and options.stack.startswith("vllm")
    if alone and moe_spec(load_model(str(model))) is not None:
        counted.append({"kind": "experts", "batches": _COUNTED_BATCHES, **_COUNTED})
    sets: dict[str, list[dict[str, Any]]] = {"idle": idle, "static": shapes, "replay": []}
    sets["experts"] = counted
    if trace is not None and not steady:  # with --steady it gives the lengths
        own = options.arrivals == "trace"
        replay = {"kind": "trace", "trace": trace, "arrivals": "own" if own else "offline"}
        sets["replay"] = [{**replay, "first": options.first, "speed": options.speed}]
    run = {"model": model, "stack": options.stack, "budget_seconds": 180.0}
    runs: list[dict[str, Any]] = []
    if shapes or sets["replay"]:
        names = ["idle", "experts", "static", "replay"]
        runs.append({**run, "case_sets": names, "engine": arguments})
    for count in steady:
        of = {"trace": trace} if trace else {k: v[0] for k, v in lengths.items()}
        case = {"kind": "steady", "batch": count, "seconds": options.steady_seconds, **of}
        sets[f"steady {count}"] = [case]
        limit = {**arguments, "max_num_seqs": count}
        runs.append({**run, "case_sets": [f"steady {count}"], "engine": limit})
    document = {
        "name": out.resolve().name,
        "gpu_indices": list(options.gpus),
        "window_seconds": options.window_seconds,
        "tracker": options.tracker or "",
        "case_sets": sets,
        "runs": runs,
    }
    path = out / "plan.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    load_plan(path)  # says what makes no sense
    return path


def _whole(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(n < 1 for n in numbers):
        raise ConfigurationError(f"{option} takes whole numbers from 1, as in 1,8,64; not '{text}'")
    return numbers


def _arguments(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--engine takes NAME=VALUE, not '{item}'")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _model_file(model: str, out: Path) -> str:
    """Bundled name, or path of a copy of the config in `out`, named after the model."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        model_config(model)  # refuses what is not known
        return model
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    copy = out / f"{name}.json"
    copy.write_text(json.dumps(model_config(str(path)), indent=1) + "\n", encoding="utf-8")
    return str(copy.resolve())


def _trace_file(trace: str, out: Path) -> str:
    """Name of a copy of the trace in `out`, in the form that a plan takes."""
    requests = load_requests(trace)
    path = out / f"{Path(trace).name.partition('.')[0]}.requests.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("arrival_seconds", "input_tokens", "output_tokens"))
        rows.writerows(
            zip(
                requests.arrival_seconds.tolist(),
                requests.input_tokens.tolist(),
                requests.output_tokens.tolist(),
                strict=True,
            )
        )
    return path.name


def list_cases(plan_path: Path) -> str:
    """The plan's engines and their cases."""
    plan = load_plan(plan_path)
    lines = [f"{plan_path}: GPU {', '.join(map(str, plan.gpu_indices))}"]
    for run in plan.runs:
        lines.append(f"{run.name}: {', '.join(case.name for case in run.cases)}")
    return "\n".join(lines)


def run_engines(plan_path: Path, records: Path, time_limit_seconds: float) -> int:
    """Run every engine of the plan in a process of its own; returns how many failed.

    Raises
    ------
    EnergyModelError
        If the GPU cannot be metered or is in use, or software is missing.
    """
    plan = load_plan(plan_path)
    free_gpus(plan.gpu_indices)
    require("torch", "calibrate")
    for run in plan.runs:
        require(_PACKAGES[run.stack], _PACKAGES[run.stack])
    if plan.tracker:
        require(plan.tracker, plan.tracker)
    return run_plan(plan_path, records, time_limit_seconds)


def run_server(plan_path: Path, records: Path, url: str, time_limit_seconds: float) -> None:
    """Send the cases of the plan's first run to a server.

    Raises
    ------
    EnergyModelError
        If there is no server, or the GPU cannot be metered.
    """
    plan = load_plan(plan_path)
    if plan.tracker:
        require(plan.tracker, plan.tracker)
    engine = ServerEngine(url)
    meter = NvmlMeter(plan.gpu_indices, measure_running=True)
    record_run(
        engine,
        meter,
        plan,
        index=0,
        config=model_config(plan.runs[0].model),
        deadline=clock() + time_limit_seconds,
        write=writer(plan, 0, records),
    )


def table(records: Path, offset: int = 0) -> tuple[str, int]:
    """What was measured from byte `offset` of the records on, beside its prediction; how much."""
    from calibration.fitting.measured_runs import read_own  # noqa: PLC0415
    from calibration.validation.rows import compare, load_split  # noqa: PLC0415

    if not records.is_file():
        return "nothing was measured", 0
    new = records.read_bytes()[offset:]
    part = records.with_suffix(".new.jsonl")
    part.write_bytes(new)
    try:
        found = read_jsonl(part)
        measured = sum(r["kind"] in ("run", "steady") for r in found)
        lines = [_failure(r) for r in found if r["kind"] in ("error", "skipped", "exit")]
        lines += [_idle(r) for r in found if r["kind"] == "idle"]
        lines += [_compared_trackers(r) for r in found if r.get("codecarbon")]
        try:
            rows, left_out = read_own([part])
            split = load_split()
            compared = [compare(row, split) for row in rows]
        except EnergyModelError as error:
            return "\n".join([*lines, f"no prediction to compare with: {error}"]), measured
    finally:
        part.unlink()
    lines += [f"left out: {entry.rows} x {entry.reason}" for entry in left_out]
    head = f"{'case':44}{'mJ per output token':>22}{'predicted':>11}{'ms per':>9}{'predicted':>11}"
    lines.append(head)
    for c in compared:
        joules = c.row.joules_per_output_token
        lines.append(
            f"{c.row.name[:43]:44}{'' if joules is None else f'{joules * 1e3:.3f}':>22}"
            f"{'' if c.joules_error is None else f'{c.joules_error:+.1%}':>11}"
            f"{c.row.seconds_per_output_token * 1e3:9.4f}"
            f"{'' if c.seconds_error is None else f'{c.seconds_error:+.1%}':>11}"
        )
    return "\n".join(lines), measured


def _failure(record: dict[str, Any]) -> str:
    what = record.get("case_name", f"{record['model']}/{record['stack']}")
    reason = record.get("error") or record.get("reason") or f"exit code {record.get('code')}"
    return f"{record['kind']}: {what}: {str(reason)[:200]}"


def _idle(record: dict[str, Any]) -> str:
    return f"{record['case_name']}: {record['watts']:.1f} W"


def _compared_trackers(record: dict[str, Any]) -> str:
    other = record["codecarbon"]
    if other["watts"] is None:
        return f"codecarbon, {record['case_name']}: saw no energy of the GPU"
    return (
        f"codecarbon, {record['case_name']}: {other['watts']:.1f} W in {other['seconds']:.1f} s, "
        f"the counter {other['counter_watts']:.1f} W ({other['difference']:+.1%})"
    )
