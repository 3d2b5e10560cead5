"""Our prediction of every finding of the paper, on the paper's GPUs.

Where the paper leaves a condition open (batch, GPU, acceptance), the setting is chosen here, before
looking at the result, and the finding is computed over a range of it: `Estimate.spread_low` to
`spread_high`. Nothing is tuned to what the paper states.

The interval of a ratio of two predictions takes their errors as independent (half-widths of the
logarithms add as squares); what the two have in common would make it narrower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from energymodel.deployment import Deployment, deploy
from energymodel.models import load_model
from energymodel.operators import operator_table, step_stats
from energymodel.paper_findings import Estimate, Measured, Row, load_paper
from energymodel.paper_ideal import DATASETS, MODEL, Gap, Reading, Table4, table4
from energymodel.results import Prediction
from energymodel.roofline import operator_costs
from energymodel.specs import LayerGroup, MlpSpec, ModelSpec, MoeSpec
from energymodel.speculation import DecodeCosts, decode_costs
from energymodel.traces import Requests
from energymodel.workload import predict
from energymodel.workloads import load_requests

GPUS = ("a6000", "rtx-6000-ada", "a100-pcie-80gb")
"""The paper's, its main one first."""
INPUT_TOKENS, OUTPUT_TOKENS = 512, 64
"""Of the paper's controlled sweeps; taken wherever it states no lengths."""
BATCHES = (1, 8, 32, 128)

DRAFT_PAIRS = (
    ("a6000", "llama-3.1-8b", "llama-3.2-1b"),
    ("a100-pcie-80gb", "deepseek-r1-distill-qwen-32b", "deepseek-r1-distill-qwen-1.5b"),
)
"""GPU that holds both, target and draft: the paper's two pairs (the first is the main one)."""
ACCEPTANCE, ACCEPTANCES = 0.7, (0.5, 0.6, 0.7, 0.8, 0.9)
"""Assumed, as the paper states none: a draft of the same family, accepted more often than not."""
SPECULATION_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_SMALL_BATCH = 16

_TASKS = ("translation", "generation", "summarization")
_ONLINE = (("continuous-small", 8, 64), ("continuous-large", 128, 512))
"""Finding, batch, requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """A pair of the paper's models: change of energy over batch and acceptance."""

    gpu: str
    target: str
    draft: str
    batch: tuple[int, ...]
    change: Mapping[str, tuple[float, ...]]
    """By acceptance: relative change of joules per output token at each batch [-]."""
    last_paying_batch: Mapping[str, float | None]
    """By acceptance: batch up to which it saves; None = never, infinite = at every one here."""
    break_even_acceptance: tuple[float, ...]
    """By batch; NaN where no acceptance is enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """All findings, and what explains the ones that hang on a reading of the paper."""

    source: str
    rows: tuple[Row, ...]
    readings: tuple[Reading, ...]
    sensitivity: tuple[Gap, ...]
    speculation: tuple[Speculation, ...]
    peak_source: str


def reproduce(measured: Mapping[str, Measured] | None = None) -> Reproduction:
    """Predict every finding of the paper.

    Parameters
    ----------
    measured : measurements by finding, to stand beside the predictions
    """
    paper = load_paper()
    gaps = table4(paper)
    pairs = [_draft_pair(pair, paper.draft_tokens) for pair in DRAFT_PAIRS]
    estimates = dict(
        [
            *_table4_estimates(gaps),
            *_speculation(pairs[0][1], DRAFT_PAIRS[0]),
            *_experts(),
            *_graphs(),
            *_parallel(),
            *_continuous(),
            *_shapes(),
        ]
    )
    known = measured or {}
    return Reproduction(
        source=paper.source,
        rows=tuple(
            Row(finding=f, predicted=estimates.get(f.id), measured=known.get(f.id))
            for f in paper.findings
        ),
        readings=gaps.readings,
        sensitivity=gaps.sensitivity,
        speculation=tuple(summary for summary, _ in pairs),
        peak_source=paper.ideal.source,
    )


# -- ratios of predictions ------------------------------------------------------------


def change(a: Prediction, b: Prediction, *, gpu: str, setting: str) -> Estimate:
    """Energy of `a` over that of `b`, minus 1; the interval is for independent errors."""
    ratio = a.energy_joules / b.energy_joules
    lower = np.hypot(
        np.log(a.energy_joules_low / a.energy_joules),
        np.log(b.energy_joules_high / b.energy_joules),
    )
    upper = np.hypot(
        np.log(a.energy_joules_high / a.energy_joules),
        np.log(b.energy_joules_low / b.energy_joules),
    )
    return Estimate(
        gpu=gpu,
        setting=setting,
        value=ratio - 1.0,
        low=ratio * float(np.exp(-lower)) - 1.0,
        high=ratio * float(np.exp(upper)) - 1.0,
    )


def _spread(chosen: Estimate, values: Sequence[float]) -> Estimate:
    return replace(chosen, spread_low=min(values), spread_high=max(values))


def _requests(batch: int, input_tokens: int, output_tokens: int) -> Requests:
    return Requests(
        name=f"{batch} x {input_tokens} in, {output_tokens} out",
        arrival_seconds=np.zeros(batch),
        input_tokens=np.full(batch, input_tokens),
        output_tokens=np.full(batch, output_tokens),
    )


@cache
def _run(
    gpu: str,
    model: str = MODEL,
    *,
    batch: int,
    stack: str = "vllm",
    input_tokens: int = INPUT_TOKENS,
    output_tokens: int = OUTPUT_TOKENS,
    gpus: int = 1,
) -> Prediction:
    """One batch, from its prompts to its last token."""
    return predict(
        _requests(batch, input_tokens, output_tokens),
        gpu=gpu,
        model=model,
        stack=stack,
        tensor_parallel=gpus,
    )


# -- the findings, topic by topic; each yields (id, estimate) -------------------------

_Estimates = Iterator[tuple[str, Estimate]]


def _table4_estimates(gaps: Table4) -> _Estimates:
    for reading in gaps.readings:
        yield f"gap-{reading.dataset}-{reading.stack}", reading.predicted
    for dataset in DATASETS:
        eager, served = (gaps.energies[dataset, stack] for stack in ("transformers", "vllm"))
        yield (
            f"saving-{dataset}",
            change(
                served,
                eager,
                gpu=served.inputs["gpu"],
                setting=f"{MODEL}, vllm against transformers, paper's bins",
            ),
        )


def _experts() -> _Estimates:
    """OLMoE against dense models, and its fused kernel against GEMMs of equal FLOPs."""
    excesses = [
        _against(gpu, "olmo-1b", batch) for gpu in GPUS for batch in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    main = [e for e in excesses if e.gpu == GPUS[0]]
    yield (
        "moe-energy",
        _spread(max(main, key=lambda e: e.value), [e.value for e in excesses]),
    )
    against_7b = [_against(GPUS[0], "olmo-7b", batch) for batch in BATCHES]
    yield "moe-against-7b", _spread(against_7b[1], [e.value for e in against_7b])
    for batch in (1, 8):
        values = [expert_kernel_ratio(gpu, batch) - 1.0 for gpu in GPUS]
        setting = f"olmoe-1b-7b, {batch} tokens, against the same FLOPs as a dense MLP; range: GPUs"
        chosen = Estimate(gpu=GPUS[0], setting=setting, value=values[0])
        yield f"moe-kernel-{batch}", _spread(chosen, values)


def _against(gpu: str, dense: str, batch: int) -> Estimate:
    return change(
        _run(gpu, "olmoe-1b-7b", batch=batch),
        _run(gpu, dense, batch=batch),
        gpu=gpu,
        setting=f"olmoe-1b-7b against {dense}, batch {batch}, {_lengths()}",
    )


def _lengths() -> str:
    return f"{INPUT_TOKENS} in, {OUTPUT_TOKENS} out"


def expert_kernel_ratio(gpu: str, tokens: int, model: str = "olmoe-1b-7b") -> float:
    """Time of the fused experts over that of a dense MLP with as many FLOPs [-].

    The kernels are taken alone, without the gap between one and the next.
    """
    sparse = _deployed(gpu, model)
    dense = _dense_twin(sparse.model)
    experts = _kernel_seconds(sparse, sparse.model, tokens, ("experts",))
    products = _kernel_seconds(sparse, dense, tokens, ("up_proj", "activation", "down_proj"))
    return experts / products


def _dense_twin(model: ModelSpec) -> ModelSpec:
    """The model with a dense MLP as wide as the experts that one token uses."""

    def dense(group: LayerGroup) -> LayerGroup:
        block = group.feed_forward
        if not isinstance(block, MoeSpec):
            return group
        width = block.experts_per_token * block.expert_intermediate_size
        return replace(group, feed_forward=MlpSpec(intermediate_size=width, gated=block.gated))

    return replace(model, layers=tuple(dense(group) for group in model.layers))


def _kernel_seconds(
    deployment: Deployment, model: ModelSpec, tokens: int, names: Sequence[str]
) -> float:
    table = operator_table(model, deployment.serving)
    alone = replace(deployment.calibration, kernel_gap_seconds=0.0)
    stats = step_stats(model, tokens=float(tokens), rows=float(tokens))
    costs = operator_costs(table, stats, deployment.gpu, alone)
    seconds = (costs.memory_seconds + costs.compute_seconds)[0]
    return float(sum(seconds[table.names.index(name)] for name in names))


def _graphs() -> _Estimates:
    """CUDA graphs against eager launches."""
    for name, gpu in (("graph-a100", "a100-pcie-80gb"), ("graph-a6000", "a6000")):
        savings = [
            change(
                _run(gpu, batch=batch),
                _run(gpu, batch=batch, stack="vllm-eager"),
                gpu=gpu,
                setting=f"{MODEL}, {_lengths()}, batch {BATCHES[1]}; range: batch {BATCHES[0]} to "
                f"{BATCHES[-1]}",
            )
            for batch in BATCHES
        ]
        yield name, _spread(savings[1], [e.value for e in savings])


def _parallel() -> _Estimates:
    for gpus in (2, 4):
        setting = f"{MODEL}, batch 1, {_lengths()}; range: the paper's GPUs"
        energy, seconds = [], []
        for gpu in GPUS:
            one, several = _run(gpu, batch=1), _run(gpu, batch=1, gpus=gpus)
            energy.append(change(several, one, gpu=gpu, setting=setting))
            seconds.append(several.wall_seconds / one.wall_seconds - 1.0)
        latency = Estimate(gpu=GPUS[0], setting=setting, value=seconds[0])
        yield f"tp{gpus}-latency", _spread(latency, seconds)
        yield f"tp{gpus}-energy", _spread(energy[0], [e.value for e in energy])


def _continuous() -> _Estimates:
    """A queue kept `batch` deep against batches that each run to their end."""
    for name, batch, count in _ONLINE:
        estimates = [_online(gpu, batch, count) for gpu in GPUS]
        yield name, _spread(estimates[0], [e.value for e in estimates])


def _online(gpu: str, batch: int, count: int) -> Estimate:
    requests = load_requests("summarization")
    inputs, outputs = requests.input_tokens[:count], requests.output_tokens[:count]

    def served(part: slice) -> Prediction:
        chosen = replace(
            _requests(len(inputs[part]), 1, 1),
            input_tokens=inputs[part],
            output_tokens=outputs[part],
        )
        return predict(chosen, gpu=gpu, model=MODEL, max_batch=batch)

    online = served(slice(None))
    offline = sum(
        served(slice(start, start + batch)).energy_joules for start in range(0, count, batch)
    )
    factor = offline / online.energy_joules
    alone = replace(
        online,
        energy_joules=offline,
        energy_joules_low=online.energy_joules_low * factor,
        energy_joules_high=online.energy_joules_high * factor,
    )
    setting = (
        f"{MODEL}, {count} requests of `summarization`, batch {batch}; range: the paper's GPUs"
    )
    return change(online, alone, gpu=gpu, setting=setting)


def _shapes() -> _Estimates:
    gpu = GPUS[0]

    def prefill(batch: int, tokens: int) -> float:
        return _run(gpu, batch=batch, input_tokens=tokens, output_tokens=1).prefill_joules

    def decode(batch: int, tokens: int) -> float:
        return _run(gpu, batch=batch, input_tokens=64, output_tokens=tokens).decode_joules

    def exponent(small: float, large: float, factor: float) -> float:
        return float(np.log(large / small) / np.log(factor))

    def estimate(setting: str, values: Sequence[float], value: float | None = None) -> Estimate:
        chosen = Estimate(
            gpu=gpu, setting=f"{MODEL}, {setting}", value=values[0] if value is None else value
        )
        return _spread(chosen, values)

    yield (
        "shape-short-prefill",
        estimate("batch 1", [exponent(prefill(1, 32), prefill(1, 128), 4.0)]),
    )
    rates = [exponent(prefill(b, 512), prefill(b, 4096), 8.0) for b in (1, 8, 32)]
    yield "shape-long-prefill", estimate("batch 1; range: batch 1 to 32", rates)
    linear = [exponent(decode(b, 64), decode(b, 512), 8.0) for b in (1, 8, 32)]
    yield "shape-decode-linear", estimate("64 in, batch 1; range: batch 1 to 32", linear)
    shares = [_decode_share(gpu, task, batch) for task in _TASKS for batch in (1, 8)]
    mean = float(np.mean(shares))
    yield (
        "shape-decode-share",
        estimate(f"{', '.join(_TASKS)} at batch 1 and 8", shares, mean),
    )
    yield (
        "shape-classification",
        estimate("batch 8", [_decode_share(gpu, "classification", 8)]),
    )


def _decode_share(gpu: str, task: str, batch: int) -> float:
    requests = load_requests(task)
    p = predict(requests, gpu=gpu, model=MODEL, arrivals="offline", max_batch=batch)
    return p.decode_joules / p.active_joules


# -- speculative decoding -------------------------------------------------------------


def _deployed(gpu: str, model: str) -> Deployment:
    return deploy(gpu=gpu, model=load_model(model))


def _draft_pair(pair: tuple[str, str, str], draft_tokens: int) -> tuple[Speculation, DecodeCosts]:
    gpu, target, draft = pair
    costs = decode_costs(
        _deployed(gpu, target),
        _deployed(gpu, draft),
        batch=SPECULATION_BATCHES,
        context_tokens=INPUT_TOKENS + OUTPUT_TOKENS / 2,
        draft_tokens=draft_tokens,
    )
    summary = Speculation(
        gpu=gpu,
        target=target,
        draft=draft,
        batch=SPECULATION_BATCHES,
        change={f"{a:g}": tuple(costs.change(a).tolist()) for a in ACCEPTANCES},
        last_paying_batch={f"{a:g}": costs.last_paying_batch(a) for a in ACCEPTANCES},
        break_even_acceptance=tuple(costs.break_even_acceptance().tolist()),
    )
    return summary, costs


def _speculation(costs: DecodeCosts, pair: tuple[str, str, str]) -> _Estimates:
    """Best change at small batches, and the change at the largest; over acceptances."""
    gpu, target, draft = pair
    small = costs.batch <= _SMALL_BATCH
    interval = _deployed(gpu, target).calibration.intervals["vllm"]
    width = np.hypot(np.log(interval.high), np.log(interval.low))

    def estimate(values: dict[float, float], batch: str) -> Estimate:
        ratio = 1.0 + values[ACCEPTANCE]
        chosen = Estimate(
            gpu=gpu,
            setting=f"{target} with {draft}, {costs.draft_tokens} draft tokens, {batch}, "
            f"acceptance {ACCEPTANCE:g}; range: {ACCEPTANCES[0]:g} to {ACCEPTANCES[-1]:g}",
            value=values[ACCEPTANCE],
            low=ratio * float(np.exp(-width)) - 1.0,
            high=ratio * float(np.exp(width)) - 1.0,
        )
        return _spread(chosen, list(values.values()))

    best = {a: float(costs.change(a)[small].min()) for a in ACCEPTANCES}
    yield "speculation-small", estimate(best, f"batch up to {_SMALL_BATCH}")
    largest = {a: float(costs.change(a)[-1]) for a in ACCEPTANCES}
    yield "speculation-large", estimate(largest, f"batch {SPECULATION_BATCHES[-1]}")
