"""What one serving step computes and moves, operator by operator.

A step is described by a few sufficient statistics (`STATS`); every operator's FLOPs and
bytes are linear in them, so a step, or a million steps, is one matrix product. Everything
here counts work of one GPU of the tensor-parallel group; nothing here knows a time or a joule.

Counting rules: a multiply-add is 2 FLOPs; weights are read from device memory once a step;
activations are written and read once by each kernel they pass. Shapes follow the papers of
the architectures: SwiGLU (Shazeer 2020), token-choice MoE (Fedus et al. 2021); attention has a file
of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from energymodel.attention_operators import attention, attention_combine
from energymodel.experts import (
    distinct_experts,
    expert_activation_bytes,
    expert_rows,
    wide_tile_saving,
)
from energymodel.operator_parts import (
    EIGHT_BIT,
    WEIGHTS_ONLY,
    Operator,
    compute_dtype,
    elementwise,
    gemm,
    operator_class,
    quantise,
)
from energymodel.sampling import BEYOND_GREEDY, GREEDY_BYTES_PER_LOGIT
from energymodel.specs import (
    STATIC_STACKS,
    AttentionSpec,
    LayerGroup,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    ServingConfig,
)
from energymodel.tiles import TILE, prompt_tile_tokens
from energymodel.unfused import UNFUSED
from energymodel.units import ACTIVATION_BYTES, BYTES_PER_ELEMENT

Array = NDArray[np.float64]

STATS = (
    "one",  # 1 for every step
    "tokens",  # tokens processed: prefill chunks and one for each decoding sequence
    "rows",  # sequences for which logits are computed
    "decode_kv_tokens",  # sum of context lengths over decoding sequences
    "decode_window_kv_tokens",  # the same, each cut at the sliding window
    "prefill_pairs",  # query-key pairs of the prefill chunks under the causal mask
    "prefill_window_pairs",  # the same under the sliding window
    "distinct_experts",  # experts of a layer that at least one token chose
    "expert_rows",  # rows the fused expert kernel computes, tile padding included
    "expert_rows_saved",  # rows whose time wider tiles save
    "decode_sequences",  # sequences in decode attention
    "prefill_rows",  # query rows of the prefill chunks, attention tiles filled
)
"""Sufficient statistics of a step, in the order of the coefficient columns."""

_STAT = {name: i for i, name in enumerate(STATS)}
_VECTOR_LOADS = 1.0 / 3.0
"""Time of a byte of a norm over that of an activation [-]: its thread blocks load 16 bytes at once
(vLLM 0.22, `layernorm_kernels.cu`). Windows of 8 rows: 95 GB/s a block, where the activation's pass
at 29 to 39 (H200, hidden sizes of 2,048 to 5,120)."""
NORM_PASSES = {"rms_norm": 3.0 * _VECTOR_LOADS, "add_rms_norm": 5.0 * _VECTOR_LOADS}
"""How often a norm's thread block reads or writes the elements of its row: once more than it moves,
for the sum of squares (the same file); in passes as slow as an activation's."""
_ROUTING_KERNELS = 4.6
"""Small kernels that last as long as those of a router: a top-k (3.2 to 3.9 us for 64 and 128
experts where a copy takes 1.0) and the copy of the experts' output; and what its product takes
longer than others, which two thread blocks do alone (5 us). Kernels of steps on an H200
(tests/test_step_kernels.py): within 6 % for 1 to 32 tokens, 10 % short for 128."""
_GROUPED_ROUTING_KERNELS = 18
"""The same where experts are chosen within groups, for which vLLM 0.22 has a kernel only with a
bias (DeepSeek-V3): softmax, two top-k, their masks and copies by torch (DeepSeek-V2-Lite on an
H200, tests/test_step_kernels.py)."""
_EXPERT_QUANTISE_KERNELS, _EXPERT_QUANTISE_BYTES = 6, 15.0
"""Kernels, and bytes an element that pass as long as they take, where activations of 8-bit experts
are made: for either product the largest element of all rows, its zero before it, and the division
(vLLM 0.22, `scaled_fp8_quant`; 123 and 491 us for 4,096 and 16,384 tokens of Qwen3-30B, H200)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorTable:
    """Coefficients of every operator on `STATS`, for one GPU of the group.

    `flops`, `executed_flops`, `hbm_bytes`, `activation_bytes`, `link_bytes` and `tiles` have the
    shape (operators, statistics); the rest (operators,). `flops` counts useful work,
    `executed_flops` what the kernel takes the time of (tile padding of the experts included).
    `tiles` counts the thread blocks' pieces of work: TILE x TILE outputs of a GEMM, TILE query rows
    of a head in prefill attention, a sequence of a KV head in decode attention, an element that a
    kernel of PyTorch passes slowly (`unfused.py`).
    """

    names: tuple[str, ...]
    op_class: tuple[str, ...]
    compute_dtype: tuple[str, ...]
    calls: Array
    gemm_n: Array
    """Output columns of a GEMM [elements]; 0 for the others."""
    gemm_k: Array
    """Length of the sums of a GEMM [elements]; 0 for the others."""
    flops: Array
    executed_flops: Array
    hbm_bytes: Array
    activation_bytes: Array
    link_bytes: Array
    tiles: Array
    block_bytes: Array
    """What a thread block reads and writes for a row that it passes alone [B]; 0 where kernels
    spread a row over blocks."""
    reductions: Array
    """Sums over a row of one call, for which a thread block's threads wait for each other."""


def norms_per_layer(model: ModelSpec, group: LayerGroup) -> int:
    """Norms of a layer beside those of queries and keys: two, four where outputs are normed too.

    An RMS norm has a weight for each element; layer norms come with biases or without weights.
    """
    if model.layer_norm:
        return 1 if model.parallel_block else 2
    return max(1, round(group.norm_elements / model.hidden_size))


def has_gemma_norms(model: ModelSpec, group: LayerGroup) -> bool:
    """Whether these are layers of Gemma 2 or 3, whose norms weigh by 1 + w: no kernel of vLLM's."""
    return not model.layer_norm and group.norm_elements == 4 * model.hidden_size


def _dense_mlp(
    prefix: str, width: float, gated: bool, hidden: int, count: float, serving: ServingConfig
) -> Iterator[Operator]:
    up, dtype = 2.0 * width if gated else width, serving.weight_dtype
    yield gemm(f"{prefix}up_proj", up, hidden, count, dtype)
    passed = (up + width) * ACTIVATION_BYTES
    row = 0.0 if serving.stack == "vllm" else passed  # compiled, it spreads a row over blocks
    yield elementwise("activation", passed, count, kernels=1, block_bytes=row)
    yield gemm(f"{prefix}down_proj", hidden, width, count, dtype)
    if dtype in EIGHT_BIT:
        yield quantise(f"{prefix}mlp", hidden + width, count, kernels=2)


def _feed_forward(
    model: ModelSpec, group: LayerGroup, serving: ServingConfig
) -> Iterator[Operator]:
    spec, count, hidden, tp = (
        group.feed_forward,
        float(group.count),
        model.hidden_size,
        serving.tensor_parallel,
    )
    if isinstance(spec, MlpSpec):
        width = spec.intermediate_size / tp
        yield from _dense_mlp("", width, spec.gated, hidden, count, serving)
        return
    yield gemm("router", spec.num_experts, hidden, count, "bf16")
    if spec.shared_intermediate_size:
        width = spec.shared_intermediate_size / tp
        yield from _dense_mlp("shared_", width, spec.gated, hidden, count, serving)
    dtype = model.expert_dtype or serving.weight_dtype
    width = spec.expert_intermediate_size / tp
    up = 2.0 * width if spec.gated else width
    per_row = (up + width) * hidden
    top_k = spec.experts_per_token
    yield Operator(
        name="experts",
        op_class=operator_class("moe", dtype),
        compute_dtype=compute_dtype(dtype),
        calls=count,
        flops={"tokens": 2.0 * per_row * top_k * count},
        executed_flops={
            "expert_rows": 2.0 * per_row * count,
            "expert_rows_saved": -2.0 * per_row * count,
        },
        hbm_bytes={"distinct_experts": per_row * BYTES_PER_ELEMENT[dtype] * count},
        activation_bytes={"tokens": expert_activation_bytes(hidden, up, width, top_k) * count},
        tiles={"expert_rows": (up + hidden) * count / TILE**2},
    )
    if dtype not in WEIGHTS_ONLY:  # whose kernels do it themselves
        # top-k over the router's logits; the experts' output is copied
        passed = spec.num_experts * 8.0 + 2.0 * hidden * ACTIVATION_BYTES
        kernels = _GROUPED_ROUTING_KERNELS if spec.grouped_top_k else _ROUTING_KERNELS
        yield elementwise("routing", passed, count, kernels)
    if dtype in EIGHT_BIT:
        elements = hidden + width * top_k
        made = _EXPERT_QUANTISE_KERNELS, _EXPERT_QUANTISE_BYTES
        yield quantise("experts", elements, count, *made)


def _operators(model: ModelSpec, serving: ServingConfig) -> Iterator[Operator]:
    tp, hidden = serving.tensor_parallel, model.hidden_size
    for group in model.layers:
        count = float(group.count)
        yield from attention(group, hidden, serving)
        if serving.stack == "vllm":
            yield attention_combine(model, group, serving)
        yield from _feed_forward(model, group, serving)
        norms = norms_per_layer(model, group)
        # fused add and norm: reads input and residual, writes both
        passed = 4.0 * hidden * ACTIVATION_BYTES
        row = NORM_PASSES["add_rms_norm"] * hidden * ACTIVATION_BYTES
        norm = elementwise(
            "norm", norms * passed, count, kernels=norms, block_bytes=row, reductions=1.0
        )
        one_by_one = serving.stack == "vllm-eager" and has_gemma_norms(model, group)
        yield _unfused(norm, model) if one_by_one else norm
        if tp > 1:
            yield _all_reduce(hidden, tp, count)
    yield elementwise("embedding", 2.0 * hidden * ACTIVATION_BYTES, 1.0, kernels=1)
    if serving.pipeline_parallel > 1:
        hops = float(serving.pipeline_parallel - 1)
        yield Operator(
            name="pipeline_transfer",
            op_class="communication",
            compute_dtype="bf16",
            calls=hops,
            link_bytes={"tokens": hops * hidden * ACTIVATION_BYTES},
        )
    vocab = model.vocab_size / tp
    yield replace(gemm("logits", vocab, hidden, 1.0, "bf16", per="rows"), name="logits")
    yield Operator(
        name="sampling",
        op_class="sampling",
        compute_dtype="bf16",
        calls=1.0,
        activation_bytes={"rows": model.vocab_size * GREEDY_BYTES_PER_LOGIT},
    )
    draw = BEYOND_GREEDY.get((serving.decoding, serving.stack in STATIC_STACKS))
    if draw is not None:
        passed = model.vocab_size * draw.bytes_per_logit
        drawn = elementwise(draw.name, passed, 1.0, draw.kernels, per="rows")
        yield replace(drawn, tiles={"rows": model.vocab_size * draw.slow_passes})


def _all_reduce(hidden: int, tp: int, count: float) -> Operator:
    # ring all-reduce after attention and after the MLP: 2 (n-1)/n of the buffer each way
    sent = 2.0 * (tp - 1) / tp * hidden * ACTIVATION_BYTES
    return Operator(
        name="all_reduce",
        op_class="communication",
        compute_dtype="bf16",
        calls=2.0 * count,
        link_bytes={"tokens": 2.0 * sent * count},
    )


def _unfused(op: Operator, model: ModelSpec) -> Operator:
    """Operator as eager Transformers runs it."""
    is_layer_norm = op.name == "norm" and model.layer_norm
    parts = UNFUSED.get("layer_norm" if is_layer_norm else op.name)
    if parts is None or op.activation_bytes is None:
        return op
    slow = parts.slow_passes_per_byte
    return replace(
        op,
        activation_bytes={k: parts.bytes_over_fused * v for k, v in op.activation_bytes.items()},
        tiles={k: slow * v for k, v in op.activation_bytes.items()},
        calls=parts.kernels * op.calls,
        block_bytes=0.0,
        reductions=0.0,
    )


def operator_table(model: ModelSpec, serving: ServingConfig) -> OperatorTable:
    """Coefficients of every operator of a step; operators of equal name and shape are merged."""
    merged: dict[tuple[str, str, float], list[Operator]] = {}
    operators = _operators(model, serving)
    if serving.stack == "transformers":
        operators = (_unfused(op, model) for op in operators)
    for op in operators:
        merged.setdefault((op.name, op.compute_dtype, op.gemm_n), []).append(op)
    groups = list(merged.values())

    def coefficients(field: str) -> Array:
        matrix = np.zeros((len(groups), len(STATS)))
        for row, group in enumerate(groups):
            for op in group:
                for stat, value in (getattr(op, field) or {}).items():
                    matrix[row, _STAT[stat]] += value
        return matrix

    return OperatorTable(
        names=tuple(g[0].name for g in groups),
        op_class=tuple(g[0].op_class for g in groups),
        compute_dtype=tuple(g[0].compute_dtype for g in groups),
        calls=np.array([sum(op.calls for op in g) for g in groups]),
        gemm_n=np.array([g[0].gemm_n for g in groups]),
        gemm_k=np.array([g[0].gemm_k for g in groups]),
        flops=coefficients("flops"),
        executed_flops=coefficients("executed_flops"),
        hbm_bytes=coefficients("hbm_bytes"),
        activation_bytes=coefficients("activation_bytes"),
        link_bytes=coefficients("link_bytes"),
        tiles=coefficients("tiles"),
        block_bytes=np.array([g[0].block_bytes for g in groups]),
        reductions=np.array([g[0].reductions for g in groups]),
    )


def step_stats(model: ModelSpec, **stats: Array | float) -> Array:
    """Rows of statistics (steps, len(STATS)) from named columns; experts are derived.

    `tokens` decides statistics of experts unless `distinct_experts` are given.
    """
    columns = {name: np.atleast_1d(np.asarray(value, dtype=float)) for name, value in stats.items()}
    length = max(len(c) for c in columns.values())
    matrix = np.zeros((length, len(STATS)))
    matrix[:, 0] = 1.0
    for name, value in columns.items():
        matrix[:, _STAT[name]] = value
    moe = moe_spec(model)
    if moe is not None and "distinct_experts" not in stats:
        tokens = matrix[:, _STAT["tokens"]]
        chosen = (moe.num_experts, moe.experts_per_token)
        matrix[:, _STAT["distinct_experts"]] = distinct_experts(tokens, *chosen)
        packed = model.expert_dtype in WEIGHTS_ONLY
        rows = expert_rows(tokens, *chosen, packed=packed, tuned=moe.tiles)
        matrix[:, _STAT["expert_rows"]] = rows
        matrix[:, _STAT["expert_rows_saved"]] = rows * wide_tile_saving(tokens, moe.tiles)
    return matrix


def moe_spec(model: ModelSpec) -> MoeSpec | None:
    """The model's expert block, None for dense models."""
    for group in model.layers:
        if isinstance(group.feed_forward, MoeSpec):
            return group.feed_forward
    return None


def window_tokens(model: ModelSpec) -> int:
    """The model's sliding window [tokens]; 0 where every layer sees the whole context."""
    windows = {g.attention.window_tokens for g in model.layers if g.attention.window_tokens}
    return max(windows, default=0)


def query_tile_tokens(model: ModelSpec, serving: ServingConfig) -> float:
    """Tokens of a prompt whose queries fill a tile of attention, in the first layer."""
    spec = model.layers[0].attention
    if spec.kind == "mla" or not serving.stack.startswith("vllm"):
        return float(TILE)
    kv_heads = max(1.0, spec.num_kv_heads / serving.tensor_parallel)
    group = spec.num_heads / serving.tensor_parallel / kv_heads
    return float(prompt_tile_tokens(group, spec.head_dim))


def kv_bytes_per_token(model: ModelSpec, serving: ServingConfig) -> float:
    """KV cache of one token on one GPU [B], all layers of its pipeline stage."""

    def elements(spec: AttentionSpec) -> float:
        if spec.kind == "mla":
            return float(spec.kv_lora_rank + spec.qk_rope_head_dim)
        heads = max(1.0, spec.num_kv_heads / serving.tensor_parallel)
        return heads * (spec.head_dim + spec.value_head_dim)

    total = sum(g.count * elements(g.attention) for g in model.layers)
    return total * BYTES_PER_ELEMENT[serving.kv_dtype] / serving.pipeline_parallel


def weight_bytes(model: ModelSpec, serving: ServingConfig) -> float:
    """Weights held by one GPU [B], every expert among them.

    Of a pipeline the fullest stage counts: a share of the layers, and the embeddings or the weights
    of the logits, which lie at its two ends.
    """
    table = operator_table(model, serving)
    moe = moe_spec(model)
    everything = np.zeros(len(STATS))
    everything[_STAT["one"]] = 1.0
    everything[_STAT["distinct_experts"]] = moe.num_experts if moe else 0.0
    by_operator = table.hbm_bytes @ everything
    head = float(by_operator[table.names.index("logits")])
    layers = float(by_operator.sum()) - head
    embedding = model.vocab_size * model.hidden_size * 2.0 / serving.tensor_parallel
    if serving.pipeline_parallel > 1:
        return layers / serving.pipeline_parallel + max(head, embedding)
    return layers + head + (0.0 if model.tied_embeddings else embedding)


def request_flops(
    model: ModelSpec, input_tokens: Array, output_tokens: Array
) -> tuple[Array, Array]:
    """Useful FLOPs of whole requests: (all, those of the output tokens alone), on one GPU.

    A request of I input and O output tokens runs I + O - 1 tokens through the layers, O rows
    of logits, and attention over (I + O - 1)(I + O) / 2 query-key pairs.
    """
    table = operator_table(model, ServingConfig())
    flops = table.flops.sum(axis=0)
    inputs, outputs = np.asarray(input_tokens, float), np.asarray(output_tokens, float)
    window = float(window_tokens(model)) or np.inf

    def pairs(length: Array, limit: float) -> Array:
        short = np.minimum(length, limit)
        below: Array = short * (short + 1.0) / 2.0
        return below if np.isinf(limit) else below + (length - short) * limit

    def run(tokens: Array, rows: Array, first: Array) -> Array:
        last = first + tokens
        full = pairs(last, np.inf) - pairs(first, np.inf)
        cut = pairs(last, window) - pairs(first, window)
        total: Array = (
            tokens * flops[_STAT["tokens"]]
            + rows * flops[_STAT["rows"]]
            + full * flops[_STAT["prefill_pairs"]]
            + cut * flops[_STAT["prefill_window_pairs"]]
        )
        return total

    prefill = run(inputs, np.minimum(outputs, 1.0), np.zeros_like(inputs))
    decode = run(outputs - 1.0, outputs - 1.0, inputs)
    # without the prompt every output token is one pass at its context, the first included
    output_alone = run(outputs, outputs, np.maximum(inputs - 1.0, 0.0))
    return prefill + decode, output_alone
