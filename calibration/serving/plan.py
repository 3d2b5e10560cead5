"""What a serving measurement runs: the plan file, its cases, and the requests of each case.

A plan is a JSON file::

    {
      "name": "h100", "gpu_indices": [0], "window_seconds": 2.5, "seed": 0,
      "engine": {"max_num_seqs": 256},
      "case_sets": {
        "static": [{"input_tokens": 128, "output_tokens": 32, "batch": 8}],
        "conv": [{"kind": "trace", "trace": "conv.csv", "arrivals": "own", "first": 100}]
      },
      "runs": [{"model": "llama-3.1-8b", "stack": "vllm", "budget_seconds": 150,
                "case_sets": ["static", "conv"]}]
    }

`engine` holds arguments of vLLM's `LLM` class, for all runs or for one; the `model` of a
`speculative_config` is named as that of a run. `budget_seconds` is
what a run is sure to get; time that earlier runs leave goes to the next one. A trace is a CSV
with the columns arrival_seconds, input_tokens, output_tokens, its path relative to the plan.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError, TraceError, unknown_name

STACKS = ("vllm", "vllm-eager", "transformers", "transformers-compile")
TRACKERS = ("codecarbon",)
KINDS = ("static", "trace", "steady", "idle", "experts", "kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure in an engine that is up."""

    kind: str = "static"
    """`static`: one batch of equal requests; `trace`: requests of a file; `steady`: always `batch`
    sequences running (the engine's max_num_seqs), of one length or those of a trace; `idle`: no
    work; `experts`: how many experts a step touches; `kernels`: which kernels a step runs (both not
    metered)."""
    input_tokens: int = 0
    output_tokens: int = 0
    batch: int = 0
    trace: str = ""
    """CSV file of a `trace` case, relative to the plan."""
    first: int = 0
    """Requests of the trace to use; 0 = all."""
    arrivals: str = "offline"
    """`own`: the trace's arrival times divided by `speed`; `offline`: all at once."""
    speed: float = 1.0
    max_total_tokens: int = 0
    """Requests with more input and output tokens are left out (and counted); 0 = none are."""
    state: str = "context"
    """Idle state: `context` (the process sleeps) or `polling` (it asks the engine for work)."""
    seconds: float = 2.0
    """Length of an idle or steady case."""
    batches: tuple[int, ...] = ()
    """Batch sizes of an `experts` or `kernels` case."""
    top_p: float = 0.0
    """Share of probability to sample the next token from; 0 = greedy."""
    beams: int = 1
    """Hypotheses of each request of a static case; more than 1 is beam search (Transformers)."""

    @property
    def name(self) -> str:
        """Short unique name of the case within its run."""
        if self.kind == "static":
            decoding = f"-p{self.top_p:g}" if self.top_p else ""
            decoding += f"-beam{self.beams}" if self.beams > 1 else ""
            return f"static-i{self.input_tokens}-o{self.output_tokens}-b{self.batch}{decoding}"
        if self.kind == "trace":
            rate = f"x{self.speed:g}" if self.arrivals == "own" else "offline"
            return f"trace-{Path(self.trace).stem}-{self.first or 'all'}-{rate}"
        if self.kind == "steady":
            of = Path(self.trace).stem or f"i{self.input_tokens}-o{self.output_tokens}"
            return f"steady-{of}-n{self.batch}"
        if self.kind == "kernels":
            return f"kernels-i{self.input_tokens}-o{self.output_tokens}"
        return f"idle-{self.state}" if self.kind == "idle" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """One engine process: a model on a stack, and its cases in the order of their worth."""

    model: str
    """Name of a file in `profiles/models`, or path of a `config.json`."""
    stack: str
    budget_seconds: float
    cases: tuple[Case, ...]
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for vLLM's `LLM` class beside the defaults."""
    weights: str = "normal"
    """`normal`: as a model is before training; `dummy`: the engine's own random weights."""

    @property
    def name(self) -> str:
        """Model and stack."""
        return f"{Path(self.model).name.removesuffix('.json')}/{self.stack}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A list of engine runs, one after another on the same GPUs."""

    name: str
    runs: tuple[EngineRun, ...]
    folder: Path
    """Folder of the plan file; traces are relative to it."""
    gpu_indices: tuple[int, ...] = (0,)
    """GPUs of every engine, as NVML counts them; all are metered."""
    window_seconds: float = 2.5
    """A short case is repeated back to back until it has lasted this long."""
    seed: int = 0
    tracker: str = ""
    """Another program that meters the same runs, see `trackers`; empty = none."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests of one case; arrays of equal length, ordered by arrival."""

    arrival_seconds: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    left_out: int = 0
    """Requests of the trace that were too long for the case's limit."""
    top_p: float = 0.0
    """As of the case."""
    beams: int = 1
    """As of the case."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.arrival_seconds)


def load_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises
    ------
    ConfigurationError
        If the file cannot be read or a field of it makes no sense; names the field.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the plan {path}: {error}") from error
    where = str(path)
    _check_fields(
        raw,
        {*(f.name for f in fields(Plan)), "engine", "case_sets", "comment"} - {"folder"},
        where,
    )
    case_sets = {
        name: tuple(
            _case(entry, f"{where}, case set '{name}', case {i}") for i, entry in enumerate(entries)
        )
        for name, entries in _get(raw, "case_sets", where).items()
    }
    runs = tuple(
        _run(entry, case_sets, raw.get("engine", {}), f"{where}, run {i}")
        for i, entry in enumerate(_get(raw, "runs", where))
    )
    if not runs:
        raise ConfigurationError(f"{where}: 'runs' is empty; give at least one")
    return Plan(
        name=raw.get("name", path.stem),
        runs=runs,
        folder=path.resolve().parent,
        gpu_indices=_gpus(raw.get("gpu_indices", [0]), where),
        window_seconds=float(
            raw.get("window_seconds", Plan.__dataclass_fields__["window_seconds"].default)
        ),
        seed=int(raw.get("seed", 0)),
        tracker=_tracker(raw.get("tracker", ""), where),
    )


def _gpus(value: object, where: str) -> tuple[int, ...]:
    if not (isinstance(value, list) and value and all(isinstance(i, int) for i in value)):
        raise ConfigurationError(f"{where}: 'gpu_indices' is a list such as [0], not {value!r}")
    if len(set(value)) < len(value) or min(value) < 0:
        raise ConfigurationError(f"{where}: 'gpu_indices' names a GPU twice or below 0: {value}")
    return tuple(value)


def _tracker(name: str, where: str) -> str:
    if name not in ("", *TRACKERS):
        raise ConfigurationError(f"{where}: {unknown_name('tracker', name, TRACKERS)}")
    return name


def _get(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in raw:
        raise ConfigurationError(f"{where}: field '{key}' is missing; add it")
    return raw[key]


def _check_fields(raw: object, known: Iterable[str], where: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigurationError(f"{where}: expected an object with named fields, got {raw!r}")
    for key in raw:
        if key not in known:
            raise ConfigurationError(f"{where}: {unknown_name('field', key, known)}")


def _case(raw: dict[str, Any], where: str) -> Case:
    _check_fields(raw, [f.name for f in fields(Case)], where)
    case = Case(**{**raw, "batches": tuple(raw.get("batches", ()))})
    if case.kind not in KINDS:
        raise ConfigurationError(f"{where}: {unknown_name('kind', case.kind, KINDS)}")
    if case.kind == "static" and min(case.input_tokens, case.output_tokens, case.batch) < 1:
        raise ConfigurationError(
            f"{where}: a static case needs input_tokens, output_tokens and batch of at least 1"
        )
    if case.kind == "trace" and (not case.trace or case.arrivals not in ("own", "offline")):
        raise ConfigurationError(
            f"{where}: a trace case needs 'trace' (a CSV) and 'arrivals' own or offline"
        )
    if case.kind == "steady" and (
        case.batch < 1 or not (case.trace or min(case.input_tokens, case.output_tokens) >= 1)
    ):
        raise ConfigurationError(
            f"{where}: a steady case needs 'batch' (sequences running) and either 'trace' or "
            "input_tokens and output_tokens of at least 1"
        )
    if case.kind == "idle" and case.state not in ("context", "polling"):
        raise ConfigurationError(f"{where}: 'state' of an idle case is context or polling")
    if case.kind == "experts" and not case.batches:
        raise ConfigurationError(f"{where}: an experts case needs 'batches', a list of sizes")
    if case.kind == "kernels" and (
        not case.batches or case.input_tokens < 1 or case.output_tokens < 2
    ):
        raise ConfigurationError(
            f"{where}: a kernels case needs 'batches', input_tokens of at least 1 and "
            "output_tokens of at least 2"
        )
    if not 0 <= case.top_p <= 1:
        raise ConfigurationError(f"{where}: 'top_p' lies between 0 and 1, not {case.top_p:g}")
    if case.beams < 1 or (case.beams > 1 and (case.kind != "static" or case.top_p)):
        raise ConfigurationError(
            f"{where}: 'beams' of more than 1 is for a static case without 'top_p'"
        )
    if case.speed <= 0:
        raise ConfigurationError(f"{where}: 'speed' must be above 0, not {case.speed:g}")
    return case


def _run(
    raw: dict[str, Any],
    case_sets: Mapping[str, tuple[Case, ...]],
    engine: Mapping[str, Any],
    where: str,
) -> EngineRun:
    _check_fields(raw, [*(f.name for f in fields(EngineRun)), "case_sets"], where)
    cases: list[Case] = []
    for name in _get(raw, "case_sets", where):
        if name not in case_sets:
            raise ConfigurationError(f"{where}: {unknown_name('case set', name, case_sets)}")
        cases.extend(case_sets[name])
    run = EngineRun(
        model=_get(raw, "model", where),
        stack=_get(raw, "stack", where),
        budget_seconds=float(_get(raw, "budget_seconds", where)),
        cases=tuple(cases),
        engine={**engine, **raw.get("engine", {})},
        weights=raw.get("weights", "normal"),
    )
    if run.stack not in STACKS:
        raise ConfigurationError(f"{where}: {unknown_name('stack', run.stack, STACKS)}")
    if run.stack != "transformers" and any(case.beams > 1 for case in run.cases):
        raise ConfigurationError(f"{where}: 'beams' is for the stack transformers alone")
    if run.weights not in ("normal", "dummy"):
        raise ConfigurationError(f"{where}: 'weights' is normal or dummy, not '{run.weights}'")
    return run


def model_config(model: str) -> dict[str, Any]:
    """Fields of a model's `config.json`, with bf16 weights; notes and its own code stripped.

    Raises
    ------
    ConfigurationError
        If there is no such model; lists those that ship.
    """
    path = Path(model) if model.endswith(".json") else data_path("models", f"{model}.json")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = [p.stem for p in data_path("models").glob("*.json")]
        raise ConfigurationError(unknown_name("model", model, known)) from error
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read the model config {path}: {error}") from error
    config = {key: value for key, value in raw.items() if not key.startswith("_")}
    for name in ("dtype", "auto_map"):  # a model's own code is not shipped
        config.pop(name, None)
    config["torch_dtype"] = "bfloat16"
    return config


def requests_of(case: Case, folder: Path) -> Requests:
    """Requests of a static or trace case, ordered by arrival, the first one at time 0.

    Raises
    ------
    TraceError
        If the trace cannot be read or holds no usable request.
    """
    if case.kind == "static":
        return Requests(
            np.zeros(case.batch),
            np.full(case.batch, case.input_tokens),
            np.full(case.batch, case.output_tokens),
            top_p=case.top_p,
            beams=case.beams,
        )
    arrival, inputs, outputs = _read_trace(folder / case.trace)
    fits = np.ones(len(arrival), dtype=bool)
    if case.max_total_tokens:
        fits = inputs + outputs <= case.max_total_tokens
    count = case.first or len(arrival)
    kept = np.flatnonzero(fits)[:count]
    if len(kept) == 0:
        raise TraceError(
            f"{case.trace}: no request has at most {case.max_total_tokens} tokens; "
            "raise max_total_tokens"
        )
    seconds = (arrival[kept] - arrival[kept[0]]) / case.speed
    return Requests(
        seconds if case.arrivals == "own" else np.zeros(len(kept)),
        inputs[kept],
        outputs[kept],
        left_out=int(np.count_nonzero(~fits[: kept[-1]])),
        top_p=case.top_p,
    )


def trace_lengths(case: Case, folder: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Input and output tokens of the requests of a case's trace, in order of arrival.

    Raises
    ------
    TraceError
        If the trace cannot be read or holds no usable request.
    """
    requests = requests_of(replace(case, kind="trace"), folder)
    return requests.input_tokens, requests.output_tokens


def _read_trace(
    path: Path,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    columns = ("arrival_seconds", "input_tokens", "output_tokens")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from error
    values = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            try:
                values[i, j] = float(row[column])
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(
                    f"{path}, row {i + 2}, column {column}: expected a number, "
                    f"got {row.get(column)!r}"
                ) from error
            if not 0 <= values[i, j] < float("inf") or (j and values[i, j] < 1):
                raise TraceError(
                    f"{path}, row {i + 2}, column {column}: {row[column]} is out of range"
                )
    values = values[np.argsort(values[:, 0], kind="stable")]
    return values[:, 0], values[:, 1].astype(np.int64), values[:, 2].astype(np.int64)
