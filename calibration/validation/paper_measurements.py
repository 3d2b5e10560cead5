"""What the committed H100 measurements say about the findings of the paper.

The H100 is not among the paper's GPUs, so these stand beside the predictions and test none of
them; which of them a fit may have used is in `data/split.json`. Cases are matched by model, lengths
and batch; repeats of a case count once, by their median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

from calibration.fitting.measured_runs import read_own
from calibration.metering.windows import read_jsonl
from calibration.validation.rows import DATA, MeasuredRow
from energymodel.gpus import load_gpu
from energymodel.models import load_model
from energymodel.naive import flops_tdp_joules
from energymodel.operators import request_flops
from energymodel.paper_findings import Measured

GPU = "h100"
_DENSE_FOR_OLMOE = ("olmo-1b", "llama-3.2-1b")
"""Dense models of about OLMoE's active parameters, the paper's own first."""
_DATASETS = ("burstgpt", "azure_code", "azure_conv")


def measured_findings(
    serving: Path = DATA / "serving", kernels: Path = DATA / "kernels"
) -> dict[str, Measured]:
    """Measurements by finding; findings that nothing was measured for are left out.

    Raises
    ------
    EnergyModelError
        If a file cannot be read.
    """
    rows, _ = read_own(serving)
    runs = [row for row in rows if row.gpu == GPU and not row.unsteady]
    return dict([*_stacks(runs), *_experts(runs, kernels), *_parallel(runs), *_phases(runs)])


_Found = Iterator[tuple[str, Measured]]


def _joules(row: MeasuredRow) -> float:
    assert row.joules_per_output_token is not None
    return row.joules_per_output_token * float(row.requests.output_tokens.sum())


def _seconds(row: MeasuredRow) -> float:
    return row.seconds_per_output_token * float(row.requests.output_tokens.sum())


def _case(row: MeasuredRow) -> str:
    """Lengths and batch, without the model."""
    return row.name.removeprefix(row.model_name).strip()


def _ratios(
    runs: Sequence[MeasuredRow],
    one: Callable[[MeasuredRow], bool],
    other: Callable[[MeasuredRow], bool],
    quantity: Callable[[MeasuredRow], float],
    *,
    same_model: bool = True,
) -> dict[str, float]:
    """Quantity of `one` over that of `other` by case, for cases that both have."""

    def by_case(chosen: Callable[[MeasuredRow], bool]) -> dict[str, float]:
        cases: dict[str, list[float]] = {}
        for row in runs:
            if row.plain and chosen(row):
                name = f"{row.model_name} {_case(row)}" if same_model else _case(row)
                cases.setdefault(name, []).append(quantity(row))
        return {name: median(values) for name, values in cases.items()}

    top, bottom = by_case(one), by_case(other)
    return {name: top[name] / bottom[name] for name in top if name in bottom}


def _changes(ratios: dict[str, float], setting: str) -> Measured | None:
    """Median, least and largest of ratios, minus 1."""
    if not ratios:
        return None
    values = [ratio - 1.0 for ratio in ratios.values()]
    return Measured(
        gpu=GPU,
        setting=f"{setting}: {', '.join(sorted(ratios))}",
        value=median(values),
        low=min(values),
        high=max(values),
        cases=len(values),
    )


def _stacks(runs: Sequence[MeasuredRow]) -> _Found:
    """CUDA graphs against eager launches, vLLM against Transformers, energy over the ideal."""

    def on(stack: str) -> Callable[[MeasuredRow], bool]:
        return lambda row: row.stack == stack and row.phase == "batch" and row.tensor_parallel == 1

    graphs = _changes(_ratios(runs, on("vllm"), on("vllm-eager"), _joules), "vllm against eager")
    if graphs is not None:
        yield "graph-a100", graphs
        yield "graph-a6000", graphs
    served = _ratios(runs, on("vllm"), on("transformers"), _joules)
    saving = _changes(served, "static batches, not this trace; vllm against transformers")
    if saving is not None:
        for dataset in _DATASETS:
            yield f"saving-{dataset}", saving
    for dataset in _DATASETS:
        gaps = {
            row.name: _joules(row) / _ideal_joules(row)
            for row in runs
            if row.phase == "trace" and row.name.endswith("offline") and dataset in row.name
            if row.stack == "vllm" and row.tensor_parallel == 1
        }
        gap = _changes(gaps, "all at once, lengths as they are, over the H100's dense peak")
        if gap is not None:
            yield f"gap-{dataset}-vllm", gap


def _ideal_joules(row: MeasuredRow) -> float:
    gpu = load_gpu(row.gpu)
    model = load_model(row.model) if isinstance(row.model, str) else row.model
    lengths = (row.requests.input_tokens, row.requests.output_tokens)
    inputs, outputs = (tokens.astype(np.float64) for tokens in lengths)
    flops, _ = request_flops(model, inputs, outputs)
    peak = gpu.peak_flops_per_s["bf16"]
    return float(flops_tdp_joules(flops.sum(), tdp_watts=gpu.tdp_watts, peak_flops_per_s=peak))


def _experts(runs: Sequence[MeasuredRow], kernels: Path) -> _Found:
    for dense in _DENSE_FOR_OLMOE:
        ratios = _ratios(
            runs,
            lambda row: row.model_name == "olmoe-1b-7b" and row.stack == "vllm",
            lambda row, dense=dense: row.model_name == dense and row.stack == "vllm",  # type: ignore[misc]
            _joules,
            same_model=False,
        )
        energy = _changes(ratios, f"olmoe-1b-7b against {dense}")
        if energy is not None:
            yield "moe-energy", replace(energy, value=energy.high)  # the paper states the largest
            break
    seconds = _kernel_seconds(kernels)
    for tokens in (1, 8):
        fused, dense_pair = (seconds.get(f"moe.{kind}.olmoe-1b-7b.t{tokens}") for kind in _KINDS)
        if fused and dense_pair:
            ratio = {f"{tokens} tokens": median(fused) / median(dense_pair)}
            measured = _changes(ratio, "vLLM's fused kernel against two cuBLAS GEMMs")
            assert measured is not None
            yield f"moe-kernel-{tokens}", measured


_KINDS = ("fused", "dense")


def _kernel_seconds(kernels: Path) -> dict[str, list[float]]:
    """Seconds of the experts' kernels by case; a case's repeats end in `.r2`, `.r3`, ..."""
    found: dict[str, list[float]] = {}
    for path in sorted(kernels.glob(f"{GPU}*.jsonl*")):
        for record in read_jsonl(path):
            if record.get("valid") and record.get("case", "").startswith("moe."):
                name, _, repeat = record["case"].rpartition(".r")
                case = name if repeat.isdecimal() else record["case"]
                found.setdefault(case, []).append(record["iteration_seconds"])
    return found


def _parallel(runs: Sequence[MeasuredRow]) -> _Found:
    def on(gpus: int) -> Callable[[MeasuredRow], bool]:
        return lambda row: row.tensor_parallel == gpus and row.batch == 1 and row.stack == "vllm"

    for gpus in (2, 4):
        for quantity, name in ((_seconds, "latency"), (_joules, "energy")):
            measured = _changes(_ratios(runs, on(gpus), on(1), quantity), f"{gpus} GPUs against 1")
            if measured is not None:
                yield f"tp{gpus}-{name}", measured


def _phases(runs: Sequence[MeasuredRow]) -> _Found:
    """Share of decode: what a batch takes beyond the same batch stopped at its first token."""

    def shape(row: MeasuredRow) -> tuple[str, int, int]:
        return row.model_name, int(row.requests.input_tokens[0]), row.batch

    served = [row for row in runs if row.stack == "vllm" and row.tensor_parallel == 1]
    prefill: dict[tuple[str, int, int], list[float]] = {}
    for row in served:
        if row.phase == "prefill":
            prefill.setdefault(shape(row), []).append(_joules(row))
    shares: dict[str, list[float]] = {}
    for row in served:
        if row.phase == "batch" and shape(row) in prefill:
            share = 1.0 - median(prefill[shape(row)]) / _joules(row)
            shares.setdefault(row.name, []).append(share)
    if shares:
        values = [median(repeats) for repeats in shares.values()]
        yield (
            "shape-decode-share",
            Measured(
                gpu=GPU,
                setting=f"beyond the same prompts alone: {', '.join(sorted(shares))}",
                value=median(values),
                low=min(values),
                high=max(values),
                cases=len(values),
            ),
        )
