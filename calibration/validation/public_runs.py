"""Reads what others measured of whole models: power, energy and latency.

Nothing here is fitted. Each reader names the rows that it cannot use and why. The assumptions
that a source forces on us (prompt lengths, engine version, board) are in `SOURCES` and are
printed in the report.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.validation.rows import LeftOut, MeasuredRow, offline, steady_state
from energymodel.calibrations import list_calibrations
from energymodel.errors import EnergyModelError

V3, V2, SPLITWISE, ENERGAIZER = "ML.ENERGY v3", "ML.ENERGY v2", "Splitwise", "EnergAIzer"

V3_INPUT_TOKENS = 300.0
"""Assumed mean prompt of ML.ENERGY v3's chat task, which does not publish it. Where it comes
from: `physics_check.implied_input_tokens`."""
V2_INPUT_TOKENS = 200.0
"""The same for v2: about the mean first prompt of ShareGPT."""
SERVER_STEP_TOKENS = 8192
"""`max_num_batched_tokens` that vLLM's server chooses on a GPU of 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSource:
    """Where rows come from and what has to be assumed about them."""

    title: str
    citation: str
    assumption: str


SOURCES: Mapping[str, PublicSource] = {
    V3: PublicSource(
        title="ML.ENERGY leaderboard v3, chat (H100)",
        citation=(
            "ml-energy/leaderboard@0cd52dab, Apache-2.0; Chung et al., arXiv 2505.06371; settings "
            "from ml-energy/benchmark (mlenergy/llm/benchmark.py, configs/vllm/lm-arena-chat)"
        ),
        assumption=(
            "vLLM 0.11.1, asynchronous scheduling, 8192 tokens a step, taken as the stack `vllm`; "
            "all requests sent at once, measured from the moment that max_num_seqs requests have "
            "their first token until as many are left: taken as the steady state. Prompts are "
            "conversations so far, their lengths are not published: log-normal with a mean of "
            f"{V3_INPUT_TOKENS:.0f} tokens, which the published average batches imply (see below). "
            "Outputs: gamma distributed around the published mean. Tokens were drawn with top-p "
            "0.95, which 0.11 does by a sort of the whole vocabulary: predicted as "
            "sampling-sorted, with what such a sort took on this project's H100s. Not in the "
            "prediction: turns of one conversation may share prefixes."
        ),
    ),
    V2: PublicSource(
        title="ML.ENERGY leaderboard v2, chat (A100 40 GB, H100)",
        citation="ml-energy/leaderboard-v2@c3af7f31, Apache-2.0",
        assumption=(
            "vLLM 0.5.4, an engine with far more host time a step than the one modelled; energy "
            "from power over the whole run, not the steady state, so low. Prompts: log-normal "
            f"with a mean of {V2_INPUT_TOKENS:.0f} tokens (ShareGPT). Where the A100 40 GB "
            "has no calibration of its own: that of the A100 80 GB with its own datasheet."
        ),
    ),
    SPLITWISE: PublicSource(
        title="Splitwise, Llama-2-70B (A100, H100)",
        citation="Mutinifni/splitwise-sim@8f99e7d, MIT; Patel et al., ISCA 2024",
        assumption=(
            "vLLM of 2023 without CUDA graphs, taken as `vllm-eager`; the prompts of a batch in "
            "one step. Median of the repeats. Energy = average power (a share of 400 W on each "
            "GPU, A100 alone) x end-to-end time. Left out: rows that ended before their output "
            "length, and average powers below a quarter of the TDP (no power of GPUs at work)."
        ),
    ),
    ENERGAIZER: PublicSource(
        title="EnergAIzer, prefill (H100)",
        citation="yifueve/energaizer-ispass26-artifact, MIT",
        assumption=(
            "Transformers without the output projection, SM clock fixed at 1830 MHz of 1980; power "
            "up to 580 W says that the board is the SXM one. Usable: decoder-only models at 128 "
            "tokens. Longer prompts ran with unfused attention (on the A100, rows marked as eager "
            "attention and rows not marked agree within 1 %), which writes out every score; the "
            "stack modelled uses fused attention. A100 rows are at 900 MHz, which the model "
            "cannot be told."
        ),
    ),
}

_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Meta-Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "google/gemma-2-9b-it": "gemma-2-9b",
    "google/gemma-2-27b-it": "gemma-2-27b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral-8x7b",
    "microsoft/Phi-3-mini-4k-instruct": "phi-3-mini",
    "Qwen3-8B": "qwen3-8b",
    "Qwen3-32B": "qwen3-32b",
    "Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
    "llama2-70b": "llama-2-70b",
    "gpt2model_gpt2": "gpt2",
    "optmodel_opt-1p3b": "opt-1.3b",
    "qwen2model_qwen2-1p5b": "qwen2-1.5b",
}
"""Names that the sources use, and the bundled model of each."""

_Item = MeasuredRow | str  # a row, or why there is none


def read_public(folder: Path) -> tuple[list[MeasuredRow], list[LeftOut]]:
    """Read all public rows below a folder.

    Parameters
    ----------
    folder : Path
        Holds `data/validation/` with the sources' files, and `reference/paper_facts.md` with
        tables A1 and A2 of more rows of ML.ENERGY.

    Raises
    ------
    EnergyModelError
        If the folder or a file of it is missing or malformed; names file and row.
    """
    data = folder / "data" / "validation"
    facts = folder / "reference" / "paper_facts.md"
    readers: tuple[tuple[str, Path, Callable[[Path], Iterator[_Item]]], ...] = (
        (V3, data / "mlenergy" / "v3_h100_llama31_chat.csv", _mlenergy_v3),
        (V3, facts, _facts_a1),
        (V2, data / "mlenergy" / "v2_a100_40gb.csv", _mlenergy_v2),
        (V2, facts, _facts_a2),
        (SPLITWISE, data / "splitwise_perf_model.csv", _splitwise),
        (ENERGAIZER, data / "energaizer" / "h100_nvml_parsed.csv", _energaizer),
        (ENERGAIZER, data / "energaizer" / "a100_nvml_parsed.csv", _energaizer),
    )
    rows: list[MeasuredRow] = []
    reasons: Counter[tuple[str, str]] = Counter()
    for source, path, read in readers:
        try:
            for item in read(path):
                if isinstance(item, str):
                    reasons[source, item] += 1
                else:
                    rows.append(item)
        except OSError as error:
            raise EnergyModelError(f"{path}: cannot be read ({error.strerror})") from error
        except (KeyError, ValueError) as error:
            raise EnergyModelError(f"{path}: a column is missing or no number ({error})") from error
    left = [LeftOut(source=s, reason=r, rows=n) for (s, r), n in sorted(reasons.items())]
    return rows, left


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def saturated_row(
    *,
    source: str,
    gpu: str,
    model: str,
    max_num_seqs: int,
    mean_input_tokens: float,
    mean_output_tokens: float,
    joules_per_output_token: float,
    tokens_per_second: float,
    mean_batch: float,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    calibration: str | None = None,
) -> MeasuredRow:
    """One row of ML.ENERGY: a server kept at `max_num_seqs` sequences."""
    name = f"{model} tp{tensor_parallel} b{max_num_seqs}"
    whole, ramp = steady_state(
        name,
        batch=max_num_seqs,
        mean_input_tokens=mean_input_tokens,
        mean_output_tokens=mean_output_tokens,
    )
    options: dict[str, Any] = {
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "max_batch": max_num_seqs,
        "max_step_tokens": SERVER_STEP_TOKENS,
    }
    if source == V3:
        options["decoding"] = "sampling-sorted"
    return MeasuredRow(
        source=source,
        name=name,
        gpu=gpu,
        model=model,
        model_name=model,
        stack="vllm",
        phase="saturated",
        batch=max_num_seqs,
        requests=whole,
        ramp=ramp,
        options=options if calibration is None else {**options, "calibration": calibration},
        joules_per_output_token=joules_per_output_token,
        seconds_per_output_token=1.0 / tokens_per_second,
        mean_batch=mean_batch,
    )


def _mlenergy_v3(path: Path) -> Iterator[_Item]:
    for raw in _table(path):
        yield saturated_row(
            source=V3,
            gpu=raw["gpu_model"].lower(),
            model=_MODELS[raw["model_id"]],
            tensor_parallel=int(raw["tensor_parallel"]),
            max_num_seqs=int(raw["max_num_seqs"]),
            mean_input_tokens=V3_INPUT_TOKENS,
            mean_output_tokens=float(raw["avg_output_len"]),
            joules_per_output_token=float(raw["energy_per_token_joules"]),
            tokens_per_second=float(raw["output_throughput_tokens_per_sec"]),
            mean_batch=float(raw["avg_batch_size"]),
        )


def _mlenergy_v2(path: Path) -> Iterator[_Item]:
    for raw in _table(path):
        if raw["task"] != "llm_text_generation/chat":
            yield "not the chat task: code completion has long prompts of unpublished length"
        elif raw["model_id"] not in _MODELS:
            yield "the model's config is not bundled"
        else:
            yield saturated_row(
                source=V2,
                gpu="a100-40gb",
                model=_MODELS[raw["model_id"]],
                tensor_parallel=int(raw["tensor_parallel"]),
                pipeline_parallel=int(raw["pipeline_parallel"]),
                max_num_seqs=int(raw["max_num_seqs"]),
                mean_input_tokens=V2_INPUT_TOKENS,
                mean_output_tokens=float(raw["avg_output_len"]),
                joules_per_output_token=float(raw["energy_per_output_token_joules"]),
                tokens_per_second=float(raw["output_throughput_tokens_per_sec"]),
                mean_batch=float(raw["avg_batch_size"]),
                calibration=None if "a100-40gb" in list_calibrations() else "a100",
            )


def _markdown_table(path: Path, heading: str) -> Iterator[list[str]]:
    """Cells of the data rows of the first table after a heading."""
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith(heading)]
    if not starts:
        raise EnergyModelError(f"{path}: the heading '{heading}' is missing")
    inside = False
    for line in lines[starts[0] + 1 :]:
        if line.startswith("|"):
            if inside:
                yield [cell.strip() for cell in line.strip().strip("|").split("|")]
            inside = inside or set(line) <= set("|- ")
        elif inside:
            return


def _facts_a1(path: Path) -> Iterator[_Item]:
    for cells in _markdown_table(path, "### A1."):
        model, _, parallel, seqs, mean_batch, out, _, joules, rate = cells
        ways = {word[:2]: int(word[2:]) for word in parallel.split()}
        if not model.startswith("Qwen3"):
            continue  # in the CSV, with more digits
        if ways["ep"] > 1:
            yield "expert parallel is not modelled"
            continue
        yield saturated_row(
            source=V3,
            gpu="h100",
            model=_MODELS[model],
            tensor_parallel=ways["tp"],
            max_num_seqs=int(seqs),
            mean_input_tokens=V3_INPUT_TOKENS,
            mean_output_tokens=float(out),
            joules_per_output_token=float(joules),
            tokens_per_second=float(rate),
            mean_batch=float(mean_batch),
        )


def _facts_a2(path: Path) -> Iterator[_Item]:
    for cells in _markdown_table(path, "### A2."):
        model, gpu, ways, seqs, mean_batch, out, _, joules, rate = cells
        if "H100" not in gpu:
            continue  # in the CSV
        yield saturated_row(
            source=V2,
            gpu="h100",
            model=_MODELS[f"meta-llama/{model}"],
            tensor_parallel=int(ways),
            max_num_seqs=int(seqs),
            mean_input_tokens=V2_INPUT_TOKENS,
            mean_output_tokens=float(out),
            joules_per_output_token=float(joules),
            tokens_per_second=float(rate),
            mean_batch=float(mean_batch),
        )


_SPLITWISE_GPUS = {"a100-80gb": ("a100", 400.0), "h100-80gb": ("h100", 700.0)}
_LEAST_POWER_SHARE = 0.25
_END_TO_END_TOLERANCE = 0.1


def _splitwise(path: Path) -> Iterator[_Item]:
    repeats: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for raw in _table(path):
        if raw["model"] not in _MODELS:
            yield "the model's architecture (BLOOM) is not modelled"
        elif raw["hardware"] not in _SPLITWISE_GPUS:
            yield "power-capped H100: its times are scaled from the other rows, not measured"
        else:
            keys = ("model", "hardware", "tensor_parallel", "prompt_size", "batch_size")
            repeats[(*(raw[k] for k in keys), raw["token_size"])].append(raw)
    for (model, hardware, ways, prompt, batch, tokens), group in repeats.items():
        gpu, tdp_watts = _SPLITWISE_GPUS[hardware]
        yield _splitwise_row(
            group,
            gpu=gpu,
            tdp_watts=tdp_watts,
            model=_MODELS[model],
            ways=int(ways),
            prompt=int(prompt),
            batch=int(batch),
            tokens=int(tokens),
        )


def _splitwise_row(
    group: list[dict[str, str]],
    *,
    gpu: str,
    tdp_watts: float,
    model: str,
    ways: int,
    prompt: int,
    batch: int,
    tokens: int,
) -> _Item:
    def median(column: str, scale: float = 1.0) -> float:
        return statistics.median(float(raw[column]) for raw in group) * scale

    seconds = median("e2e_time", 1e-3)
    ttft, tpot = median("prompt_time", 1e-3), median("token_time", 1e-3)
    if abs(ttft + (tokens - 1) * tpot - seconds) > _END_TO_END_TOLERANCE * seconds:
        return "ended before its output length, or waited (end-to-end is not prompt + tokens)"
    share = median("average_power")
    if 0.0 < share < _LEAST_POWER_SHARE:
        return "average power near idle although the GPUs worked throughout"
    joules = share * tdp_watts * ways * seconds if share else None
    name = f"{model} tp{ways} i{prompt} o{tokens} b{batch}"
    return MeasuredRow(
        source=SPLITWISE,
        name=name,
        gpu=gpu,
        model=model,
        model_name=model,
        stack="vllm-eager",
        phase="batch",
        batch=batch,
        requests=offline(name, [prompt] * batch, tokens),
        options={
            "tensor_parallel": ways,
            "max_batch": batch,
            "max_step_tokens": prompt * batch,
            "max_model_len": prompt + tokens,
        },
        joules_per_output_token=None if joules is None else joules / (batch * tokens),
        seconds_per_output_token=seconds / (batch * tokens),
        ttft_seconds=ttft,
        tpot_seconds=tpot,
    )


_LONGEST_UNFUSED_TOKENS = 128
"""Up to here unfused attention is a small part of a prefill."""

_ENERGAIZER_NAME = re.compile(
    r"(?P<model>\w+?model_[\w-]+?)_+p(?P<dtype>\w+?)_b(?P<batch>\d+)_s(?P<tokens>\d+)"
    r"_modeprefill(?P<eager>_attneager)?_freq(?P<mhz>\d+)_"
)


def _energaizer(path: Path) -> Iterator[_Item]:
    for raw in _table(path):
        found = _ENERGAIZER_NAME.match(raw["workload"])
        if found is None or found["model"] not in _MODELS:
            yield "not a decoder-only model"
        elif path.name.startswith("a100"):
            yield "SM clock fixed at 900 MHz of 1410"
        elif int(found["tokens"]) > _LONGEST_UNFUSED_TOKENS:
            yield "unfused attention over a long prompt, which is not modelled"
        else:
            model, batch, tokens = (
                _MODELS[found["model"]],
                int(found["batch"]),
                int(found["tokens"]),
            )
            name = f"{model} i{tokens} b{batch}"
            yield MeasuredRow(
                source=ENERGAIZER,
                name=name,
                gpu="h100",
                model=model,
                model_name=model,
                stack="transformers",
                phase="prefill",
                batch=batch,
                requests=offline(name, [tokens] * batch, 1),
                options={"max_batch": batch, "max_model_len": tokens + 1},
                joules_per_output_token=float(raw["energy"]) / batch,
                seconds_per_output_token=float(raw["time"]) * 1e-3 / batch,
            )
