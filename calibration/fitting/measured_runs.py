"""Reads this project's own serving records (`serving.py` writes them) as measured rows."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from calibration.serving.engine import VLLM_ARGUMENTS
from calibration.validation.rows import OWN, LeftOut, MeasuredRow, offline
from energymodel.acceptance import break_even_acceptance
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.models import load_model, model_from_config
from energymodel.operators import moe_spec
from energymodel.specs import STATIC_STACKS, MoeSpec
from energymodel.traces import Requests

_KV_DTYPES = {"auto": None, "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8"}
_QUANTISED = {"fp8": "fp8", "auto_gptq": "int4"}
"""Dtype of weights by vLLM's method: asked for as they load, or the checkpoint's."""
_OF_THE_MODEL = ("mxfp4", "gpt_oss_mxfp4")
"""Methods that a model's own profile knows: only its experts are stored so."""
_GPTQ_BITS = 4


UNSTEADY_SPREAD = 2.0
"""Ratio of p90 to p10 of a batch's decode steps beyond which its host was disturbed."""

_MODELLED_ARGUMENTS = {
    *VLLM_ARGUMENTS,
    "block_size",
    "enforce_eager",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_batched_tokens",
    "pipeline_parallel_size",
    "quantization",
    "speculative_config",
    "tensor_parallel_size",
}
"""Arguments of vLLM's `LLM` class that the prediction knows, or that change neither time nor
energy; a run with any other is left out."""


def read_own(source: Path | Sequence[Path]) -> tuple[list[MeasuredRow], list[LeftOut]]:
    """Read the runs of files, or of every `*.jsonl` and `*.jsonl.gz` of a folder by name.

    Raises
    ------
    EnergyModelError
        If a file cannot be read or a record lacks what a run needs; names file and line.
    """
    rows: list[MeasuredRow] = []
    reasons: Counter[str] = Counter()
    for path in _files(source):
        engines: dict[tuple[str, int], Mapping[str, Any]] = {}
        records = list(_records(path, reasons))
        counted = {(r["plan"], r["run"]): r["experts"] for _, r in records if r.get("experts")}
        for number, record in records:
            try:
                if record["kind"] == "engine":
                    engines[record["plan"], record["run"]] = record
                elif record["kind"] in ("run", "steady"):
                    run = record["plan"], record["run"]
                    item = _row(record, engines.get(run), experts=counted.get(run))
                    if isinstance(item, str):
                        reasons[item] += 1
                    else:
                        rows.append(item)
                elif record["kind"] in ("error", "skipped", "exit"):
                    reasons[f"not measured ({record['kind']})"] += 1
            except (KeyError, TypeError, ValueError) as error:
                raise EnergyModelError(
                    f"{path}, line {number}: not a serving record as `energymodel measure` "
                    f"writes it ({type(error).__name__}: {error})"
                ) from error
            except EnergyModelError as error:
                raise EnergyModelError(f"{path}, line {number}: {error}") from error
    return rows, [LeftOut(source=OWN, reason=r, rows=n) for r, n in sorted(reasons.items())]


def read_idle(source: Path | Sequence[Path], gpu: str) -> list[tuple[str, str, float]]:
    """Idle states (`context`, `polling`) of a GPU with an engine up: board, state, power [W]."""
    found = []
    for path in _files(source):
        boards: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for _, record in _records(path, Counter()):
            if record["kind"] == "engine":
                boards[record["plan"], record["run"]] = record["identity"]["gpus"]
            elif record["kind"] == "idle" and record["window"]["valid"]:
                window = record["window"]
                of_run = boards[record["plan"], record["run"]]
                for board, joules in zip(of_run, window["energy_joules"], strict=True):
                    if joules is not None and load_gpu(board["name"]).name == gpu:
                        name = str(board.get("uuid_sha256") or path.name)
                        watts = float(joules / window["duration_seconds"])
                        found.append((name, record["case"]["state"], watts))
    return found


def _files(source: Path | Sequence[Path]) -> list[Path]:
    if isinstance(source, Path):
        return sorted([*source.glob("*.jsonl"), *source.glob("*.jsonl.gz")])
    return list(source)


def _records(path: Path, reasons: Counter[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records; lines cut off when a run was killed are counted, not used."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EnergyModelError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            reasons["line cut off (the run was killed)"] += 1
            continue
        yield number, record


def _strange_routing(moe: MoeSpec, experts: Sequence[Mapping[str, float]] | None) -> str | None:
    """Why a run does not tell what a served mixture of experts takes, or None if it does."""
    if not experts:
        return "mixture of experts whose chosen experts were not counted"
    several = [e["distinct_mean"] for e in experts if e["step_tokens"] > 1]
    if several and max(several) <= moe.experts_per_token:
        return "mixture of experts of which every token chose the same, as no trained model does"
    return None


def _row(
    record: Mapping[str, Any],
    engine: Mapping[str, Any] | None,
    *,
    experts: Sequence[Mapping[str, float]] | None,
) -> MeasuredRow | str:
    """Turn a record of kind `run` or `steady` into a row, or say why it is none.

    `experts` are the counts of the engine's experts by size of step, None where none were made.
    """
    if engine is None:
        raise EnergyModelError("a run without the record of its engine before it")
    if not record["window"]["valid"]:
        return f"window not valid: {record['window']['invalid_reason']}"
    asked, settings, case = engine["run_plan"]["engine"], engine["settings"], record["case"]
    if why := _not_modelled(engine):
        return why
    drafting = settings.get("speculative_config") or {}
    model_name = Path(record["model"]).name.removesuffix(".json")
    model = model_from_config(engine["config"], name=model_name)
    if (moe := moe_spec(model)) is not None and (why := _strange_routing(moe, experts)):
        return why
    boards = engine["identity"]["gpus"]
    gpu = load_gpu(boards[0]["name"]).name
    name = f"{model_name} {record['case_name'].removeprefix('static-').replace('-', ' ')}"
    unsteady, ramp = False, None
    if record["kind"] == "steady":
        requests, ramp = _steady_requests(name, record)
        phase = "saturated"
    elif case["kind"] == "static":
        unsteady = _unsteady(record["decode_step_seconds"])
        requests = offline(name, [case["input_tokens"]] * case["batch"], case["output_tokens"])
        phase = "prefill" if case["output_tokens"] == 1 else "batch"
    else:
        requests = _trace_requests(name, record["trace"])
        phase = "trace"
    return MeasuredRow(
        source=OWN,
        name=name,
        gpu=gpu,
        model=model,
        model_name=model_name,
        stack=record["stack"],
        phase=phase,
        batch=record.get("sequences", len(requests.input_tokens)),
        requests=requests,
        ramp=ramp,
        options=_options(record["stack"], settings, asked, requests)
        | _in_flight(record)
        | _decoding(case, drafting, asked),
        joules_per_output_token=_per_token(record, "joules"),
        seconds_per_output_token=_per_token(record, "seconds"),
        mean_batch=record.get("mean_sequences"),
        ttft_seconds=_median(record["ttft_seconds"]),
        tpot_seconds=_median(record["tpot_seconds"]),
        unsteady=unsteady,
        note=f"weights: {settings.get('weights', 'unknown')}; plan {record['plan']}",
    )


def weights_dtype(engine: Mapping[str, Any]) -> str | None:
    """Dtype of an engine's quantised weights, None for 16-bit ones and what the model implies.

    `engine` : a record of this kind. KeyError where its method is not modelled.
    """
    method = _quantisation(engine["run_plan"]["engine"], engine["settings"])
    return None if method is None else _QUANTISED[method]


def _quantisation(asked: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Method by which vLLM quantises, None for 16-bit weights and what the model implies."""
    method = asked.get("quantization") or settings.get("quantization")
    return None if method in _OF_THE_MODEL else method


def _not_modelled(engine: Mapping[str, Any]) -> str | None:
    """What of an engine's arguments and settings no prediction knows, or None."""
    asked, settings = engine["run_plan"]["engine"], engine["settings"]
    if strange := sorted(set(asked) - _MODELLED_ARGUMENTS):
        return f"engine argument that is not modelled: {', '.join(strange)}"
    if settings.get("prefix_caching"):
        return "engine with prefix caching, which is not modelled"
    quantised = _quantisation(asked, settings)
    bits = (engine["config"].get("quantization_config") or {}).get("bits", _GPTQ_BITS)
    if quantised is not None and (quantised not in _QUANTISED or bits != _GPTQ_BITS):
        return f"weights quantised in a way that is not modelled: {quantised}, {bits} bits"
    drafting = settings.get("speculative_config") or {}
    modelled = drafting.get("method") == "draft_model" and drafting.get("acceptance_rates")
    if "speculative_config" in asked and not modelled:
        return "speculative_config without a draft model, or without an imposed acceptance"
    return None


def _per_token(record: Mapping[str, Any], what: str) -> float:
    if record["kind"] == "steady":
        return float(record[f"{what}_per_output_token"])
    return float(record[f"{what}_per_repeat"] / record["output_tokens"])


def _in_flight(record: Mapping[str, Any]) -> dict[str, int]:
    return {"max_batch": record["sequences"]} if record["kind"] == "steady" else {}


def _decoding(
    case: Mapping[str, Any], drafting: Mapping[str, Any], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `predict` for other decoding than greedy, one token a step."""
    options: dict[str, Any] = {"decoding": "sampling"} if case.get("top_p") else {}
    if case.get("beams", 1) > 1:
        options = {"decoding": f"beam:{case['beams']}"}
    if drafting:
        # the rates: all drafts up to each being accepted; the check gives one token more
        tokens = 1.0 + sum(drafting["acceptance_rates"])
        options |= {
            "draft_model": load_model(asked["speculative_config"]["model"]),
            "draft_tokens": int(drafting["draft_tokens"]),
            "acceptance": float(break_even_acceptance(tokens, int(drafting["draft_tokens"]))),
        }
    return options


def _steady_requests(name: str, record: Mapping[str, Any]) -> tuple[Requests, Requests]:
    """Two offline workloads whose difference is what was admitted in the window.

    Both begin with what was admitted before it, and drain with as many requests as were in flight.
    """
    inputs = np.array(record["requests"]["input_tokens"], dtype=np.int64)
    outputs = np.array(record["requests"]["output_tokens"], dtype=np.int64)
    before, sequences = record["requests"]["before_window"], record["sequences"]
    if before >= len(inputs):
        raise EnergyModelError("no request was admitted in the window; measure for longer")
    drain = np.resize(np.arange(before, len(inputs)), sequences)
    whole = np.r_[0 : len(inputs), drain]
    ramp = np.r_[0:before, drain]
    return offline(name, inputs[whole], outputs[whole]), offline(name, inputs[ramp], outputs[ramp])


def _trace_requests(name: str, trace: Mapping[str, Any]) -> Requests:
    arrivals = np.array(trace["arrival_seconds"], dtype=float)
    return Requests(
        name=name,
        arrival_seconds=arrivals - arrivals[0],
        input_tokens=np.array(trace["input_tokens"], dtype=np.int64),
        output_tokens=np.array(trace["output_tokens"], dtype=np.int64),
    )


def _median(spread: Mapping[str, float] | None) -> float | None:
    return None if spread is None else spread["p50"]


def _unsteady(decode_steps: Mapping[str, float] | None) -> bool:
    if decode_steps is None:
        return False
    return decode_steps["p90"] > UNSTEADY_SPREAD * decode_steps["p10"]


def _options(
    stack: str, settings: Mapping[str, Any], asked: Mapping[str, Any], requests: Requests
) -> dict[str, Any]:
    """Arguments of `predict`: the engine's own settings, else what it was asked for."""
    if stack in STATIC_STACKS:
        return {"max_batch": len(requests.input_tokens)}

    def setting(name: str) -> Any:
        value = settings.get(name)
        return asked.get(name, VLLM_ARGUMENTS.get(name)) if value is None else value

    cache = settings.get("kv_cache_dtype") or "auto"
    if cache not in _KV_DTYPES:
        raise EnergyModelError(f"KV cache of dtype {cache} is not modelled")
    quantised = _quantisation(asked, settings)
    return {
        "max_batch": int(setting("max_num_seqs")),
        "max_step_tokens": setting("max_num_batched_tokens"),
        "max_model_len": setting("max_model_len"),
        "tensor_parallel": int(setting("tensor_parallel_size") or 1),
        "pipeline_parallel": int(setting("pipeline_parallel_size") or 1),
        "kv_dtype": _KV_DTYPES[cache],
        **({"dtype": _QUANTISED[quantised]} if quantised else {}),
        "gpu_memory_utilization": setting("gpu_memory_utilization"),
    }
