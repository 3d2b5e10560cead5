"""What one serving step computes and moves, operator by operator.

A step is described by a few sufficient statistics (`STATS`); every operator's FLOPs and
bytes are linear in them, so a step, or a million steps, is one matrix product. Everything
here counts work of one GPU of the tensor-parallel group; nothing here knows a time or a joule.

Counting rules: a multiply-add is 2 FLOPs; weights are read from device memory once a step;
activations are written and read once by each kernel they pass. Shapes follow the papers of
the architectures: GQA (Ainslie et al. 2023), MLA (DeepSeek-V2, section 2.1), SwiGLU (Shazeer
2020), token-choice MoE (Fedus et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from energymodel.experts import (
    distinct_experts,
    expert_activation_bytes,
    expert_rows,
    wide_tile_saving,
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
from energymodel.tiles import (
    KEY_BLOCK,
    SOFTMAX_WIDTH,
    TILE,
    decode_head_width,
    decode_query_rows,
)
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
QUANTISE_BYTES = 5.0
"""What making an element of 8-bit activations passes [B]: its 16 bits twice, the first time for the
largest of the row, and its 8 bits (vLLM 0.22, `dynamic_per_token_scaled_fp8_quant`)."""
_CACHE_WRITE_KERNELS, _CACHE_WRITE_PASSES, _LATENT_WRITE_PASSES = 1.6, 2400.0, 950.0
"""What writing the cache takes beside its bytes: 2.1 us for one token, as 1.6 small kernels, and a
thread block for each token, as long as that many elements that a kernel passes slowly (`tiles`).
16,384 tokens take 134 to 186 us for 1,024 to 6,144 elements a token, 54 us for a latent of 576;
kernels of steps on H200s (tests/test_step_kernels.py), as are the next two."""
_ROTARY_PASSES = 0.22
"""Slow passes of the rotation's elements: 2.2 to 2.5 TB/s for 16,384 tokens."""
_COMBINE_KERNELS, _COMBINE_PASSES = 1.45, 0.84
"""The same of what adds up parts of decode attention: 1.9 to 2.5 us for up to 32 sequences, 3.9 for
128 and 7.1 for 256 (32 heads of 128)."""
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
_PART_BYTES = 4.0
"""Of an output of decode attention while parts of a sequence are added up: 32 bits [B]."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    name: str
    op_class: str
    compute_dtype: str
    calls: float
    gemm_n: float = 0.0
    gemm_k: float = 0.0
    flops: dict[str, float] | None = None
    executed_flops: dict[str, float] | None = None
    hbm_bytes: dict[str, float] | None = None
    activation_bytes: dict[str, float] | None = None
    link_bytes: dict[str, float] | None = None
    tiles: dict[str, float] | None = None
    block_bytes: float = 0.0
    reductions: float = 0.0


EIGHT_BIT = ("fp8", "int8")
"""Compute dtypes of 8 bits."""
WEIGHTS_ONLY = frozenset({"int4", "mxfp4"})
"""Formats of stored weights that are unpacked to 16 bit before they are multiplied."""


def compute_dtype(weight_dtype: str) -> str:
    """Dtype of the matrix units for a weight dtype: weight-only formats compute in bf16."""
    return "bf16" if weight_dtype in WEIGHTS_ONLY else weight_dtype


def _class(op_class: str, dtype: str) -> str:
    """Operator class of products with weights of a dtype: each is another library's."""
    if dtype in WEIGHTS_ONLY:
        return f"{op_class}_packed"
    return "gemm_scaled" if op_class == "gemm" and dtype in EIGHT_BIT else op_class


def _gemm(
    name: str, n: float, k: float, count: float, dtype: str, per: str = "tokens"
) -> _Operator:
    work = {per: 2.0 * n * k * count}
    return _Operator(
        name=name,
        op_class=_class("gemm", dtype),
        compute_dtype=compute_dtype(dtype),
        calls=count,
        gemm_n=n,
        gemm_k=k,
        flops=work,
        executed_flops=work,
        hbm_bytes={"one": n * k * count * BYTES_PER_ELEMENT[dtype]},
        activation_bytes={per: (n + k) * count * ACTIVATION_BYTES},
        tiles={per: n * count / TILE**2},
    )


def _attention(group: LayerGroup, hidden: int, serving: ServingConfig) -> Iterator[_Operator]:
    spec, count, tp = group.attention, float(group.count), serving.tensor_parallel
    dtype = serving.weight_dtype
    heads = spec.num_heads / tp
    kv_heads = max(1.0, spec.num_kv_heads / tp)
    kv_bytes = BYTES_PER_ELEMENT[serving.kv_dtype]
    windowed = spec.window_tokens is not None
    kv_stat = "decode_window_kv_tokens" if windowed else "decode_kv_tokens"
    pair_stat = "prefill_window_pairs" if windowed else "prefill_pairs"
    if spec.kind == "mla":
        nope = spec.head_dim - spec.qk_rope_head_dim
        latent = spec.kv_lora_rank + spec.qk_rope_head_dim
        if spec.q_lora_rank:
            yield _gemm("qkv_proj", spec.q_lora_rank + latent, hidden, count, dtype)
            yield _gemm("q_b_proj", heads * spec.head_dim, spec.q_lora_rank, count, dtype)
        else:
            yield _gemm("qkv_proj", heads * spec.head_dim + latent, hidden, count, dtype)
        up_width = heads * (nope + spec.value_head_dim)
        yield _gemm("kv_b_proj", up_width, spec.kv_lora_rank, count, dtype)
        kv_elements = float(latent)
        decode_flops = 2.0 * heads * (latent + spec.kv_lora_rank)
        executed, last_block = decode_flops * serving.decode_queries, 0.0
    else:
        qkv = heads * spec.head_dim + kv_heads * (spec.head_dim + spec.value_head_dim)
        yield _gemm("qkv_proj", qkv, hidden, count, dtype)
        kv_elements = kv_heads * (spec.head_dim + spec.value_head_dim)
        decode_flops = 2.0 * heads * (spec.head_dim + spec.value_head_dim)
        rows = float(decode_query_rows(heads / kv_heads * serving.decode_queries))
        width = (spec.head_dim + spec.value_head_dim) / 2.0
        if serving.stack.startswith("vllm"):  # whose kernel it is
            width = float(decode_head_width(width))
        executed = 4.0 * kv_heads * rows * width
        last_block = executed * KEY_BLOCK / 2.0  # half of it is empty on average
    query = heads * spec.head_dim
    output = heads * spec.value_head_dim
    passed = (query + output + kv_elements) * ACTIVATION_BYTES
    # one thread block serves the query heads of a KV head, MLA's latent up to 64 of them
    sequence_tiles = heads / 64.0 if spec.kind == "mla" else kv_heads
    pair_flops = 2.0 * heads * (spec.head_dim + spec.value_head_dim) * count
    softmax_flops = 4.0 * heads * SOFTMAX_WIDTH * count
    queries = float(serving.decode_queries)  # share the keys and values that are read once
    yield _Operator(
        name="attention_prefill",
        op_class="attention_prefill",
        compute_dtype="bf16",
        calls=count,
        flops={pair_stat: pair_flops},
        executed_flops={pair_stat: pair_flops + softmax_flops},
        activation_bytes={"prefill_rows": passed * count},
        tiles={"prefill_rows": heads * count / TILE},
    )
    yield _Operator(
        name="attention_decode",
        op_class="attention_decode",
        compute_dtype="bf16",
        calls=count,
        flops={kv_stat: decode_flops * count * queries},
        executed_flops={
            kv_stat: executed * count,
            "decode_sequences": last_block * count / queries,
        },
        hbm_bytes={kv_stat: kv_elements * kv_bytes * count * _cache_passes(spec, serving)},
        activation_bytes={"decode_sequences": (query + output) * ACTIVATION_BYTES * count},
        tiles={"decode_sequences": sequence_tiles * count / queries},
    )
    is_mla = spec.kind == "mla"
    keys = float(spec.qk_rope_head_dim) if is_mla else kv_heads * spec.head_dim
    yield _rotary_and_kv_write(query, keys, kv_elements, count, serving, is_mla=is_mla)
    if spec.qk_norm_elements and serving.stack != "vllm":  # whose compiler fuses them with rotary
        normed = query + kv_heads * spec.head_dim
        norms = _elementwise("qk_norm", 2.0 * normed * ACTIVATION_BYTES, count, kernels=2)
        yield _after_copies(norms, normed) if serving.stack == "vllm-eager" else norms
    yield _gemm("o_proj", hidden, output, count, dtype)
    if dtype in EIGHT_BIT:
        yield _quantise("attention", hidden + output, count, kernels=2)


def _rotary_and_kv_write(
    query: float, keys: float, cached: float, count: float, serving: ServingConfig, *, is_mla: bool
) -> _Operator:
    """Rotates queries and keys, writes keys and values to the cache; all read and written once."""
    name = "rotary_and_kv_write"
    if not serving.stack.startswith("vllm"):
        return _elementwise(name, 2.0 * (query + cached) * ACTIVATION_BYTES, count, kernels=2)
    rotated = query + keys
    kernels = 2 if serving.stack == "vllm" else 1  # compiled: one for queries, one for keys
    passed = 2.0 * (rotated + cached) * ACTIVATION_BYTES
    slow = _ROTARY_PASSES * rotated + (_LATENT_WRITE_PASSES if is_mla else _CACHE_WRITE_PASSES)
    both = _elementwise(name, passed, count, kernels + _CACHE_WRITE_KERNELS)
    return replace(both, tiles={"tokens": slow * count})


def _attention_combine(model: ModelSpec, group: LayerGroup, serving: ServingConfig) -> _Operator:
    """What decode attention launches beside its own kernel, once for a layer.

    From a CUDA graph, which fixes how often sequences may be split, a second kernel adds up the
    parts, two of 32 bits, of each output, split or not. Where windows differ between layers the
    split is not planned once for a step, but by a kernel before each layer's.
    """
    spec = group.attention
    width = spec.kv_lora_rank if spec.kind == "mla" else spec.value_head_dim
    output = spec.num_heads / serving.tensor_parallel * width
    passed = output * (2.0 * _PART_BYTES + ACTIVATION_BYTES)
    windows = {g.attention.window_tokens for g in model.layers}
    kernels = _COMBINE_KERNELS + (0.0 if len(windows) == 1 else 1.0)
    combine = _elementwise("attention_combine", passed, float(group.count), kernels, per="rows")
    return replace(combine, tiles={"rows": _COMBINE_PASSES * output * group.count})


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


def _cache_passes(spec: AttentionSpec, serving: ServingConfig) -> float:
    """Times that a decode step moves the KV cache it attends to, over reading it once [-].

    Transformers' `DynamicCache` appends by copying: reads and writes what attention reads. Beam
    search puts the cache in the order of the beams (`index_select`): reads and writes it again.
    With a static cache there is a mask, for which `sdpa_attention_forward` repeats keys and values
    for every query head: one read, one write and one read of the repeated ones.
    """
    if serving.stack == "transformers":
        return 5.0 if serving.beams > 1 else 3.0
    if serving.stack == "transformers-compile" and spec.kind == "gqa":
        repeats = spec.num_heads / spec.num_kv_heads
        return 1.0 + 2.0 * repeats if repeats > 1.0 else 1.0
    return 1.0


def _elementwise(
    name: str,
    bytes_each: float,
    count: float,
    kernels: float,
    per: str = "tokens",
    block_bytes: float = 0.0,
    reductions: float = 0.0,
) -> _Operator:
    return _Operator(
        name=name,
        op_class="elementwise",
        compute_dtype="bf16",
        calls=count * kernels,
        activation_bytes={per: bytes_each * count},
        block_bytes=block_bytes,
        reductions=reductions,
    )


def _after_copies(norms: _Operator, elements: float) -> _Operator:
    """Norms of queries and keys with the copies before them: a kernel of vLLM's needs them apart.

    They lie side by side; PyTorch's copies do not vectorise then (`unfused.py`).
    """
    assert norms.activation_bytes is not None
    return replace(
        norms,
        activation_bytes={k: 2.0 * v for k, v in norms.activation_bytes.items()},
        tiles={"tokens": elements * norms.calls / 2.0},
        calls=2.0 * norms.calls,
    )


def _quantise(
    name: str, width: float, count: float, kernels: int, bytes_each: float = QUANTISE_BYTES
) -> _Operator:
    """Activations of products in 8 bit: a kernel scales each row by its largest element."""
    return _elementwise(f"{name}_quantise", width * bytes_each, count, kernels)


def _dense_mlp(
    prefix: str, width: float, gated: bool, hidden: int, count: float, serving: ServingConfig
) -> Iterator[_Operator]:
    up, dtype = 2.0 * width if gated else width, serving.weight_dtype
    yield _gemm(f"{prefix}up_proj", up, hidden, count, dtype)
    passed = (up + width) * ACTIVATION_BYTES
    row = 0.0 if serving.stack == "vllm" else passed  # compiled, it spreads a row over blocks
    yield _elementwise("activation", passed, count, kernels=1, block_bytes=row)
    yield _gemm(f"{prefix}down_proj", hidden, width, count, dtype)
    if dtype in EIGHT_BIT:
        yield _quantise(f"{prefix}mlp", hidden + width, count, kernels=2)


def _feed_forward(
    model: ModelSpec, group: LayerGroup, serving: ServingConfig
) -> Iterator[_Operator]:
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
    yield _gemm("router", spec.num_experts, hidden, count, "bf16")
    if spec.shared_intermediate_size:
        width = spec.shared_intermediate_size / tp
        yield from _dense_mlp("shared_", width, spec.gated, hidden, count, serving)
    dtype = model.expert_dtype or serving.weight_dtype
    width = spec.expert_intermediate_size / tp
    up = 2.0 * width if spec.gated else width
    per_row = (up + width) * hidden
    top_k = spec.experts_per_token
    yield _Operator(
        name="experts",
        op_class=_class("moe", dtype),
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
        yield _elementwise("routing", passed, count, kernels)
    if dtype in EIGHT_BIT:
        elements = hidden + width * top_k
        made = _EXPERT_QUANTISE_KERNELS, _EXPERT_QUANTISE_BYTES
        yield _quantise("experts", elements, count, *made)


def _operators(model: ModelSpec, serving: ServingConfig) -> Iterator[_Operator]:
    tp, hidden = serving.tensor_parallel, model.hidden_size
    for group in model.layers:
        count = float(group.count)
        yield from _attention(group, hidden, serving)
        if serving.stack == "vllm":
            yield _attention_combine(model, group, serving)
        yield from _feed_forward(model, group, serving)
        norms = norms_per_layer(model, group)
        # fused add and norm: reads input and residual, writes both
        passed = 4.0 * hidden * ACTIVATION_BYTES
        row = NORM_PASSES["add_rms_norm"] * hidden * ACTIVATION_BYTES
        norm = _elementwise(
            "norm", norms * passed, count, kernels=norms, block_bytes=row, reductions=1.0
        )
        one_by_one = serving.stack == "vllm-eager" and has_gemma_norms(model, group)
        yield _unfused(norm, model) if one_by_one else norm
        if tp > 1:
            yield _all_reduce(hidden, tp, count)
    yield _elementwise("embedding", 2.0 * hidden * ACTIVATION_BYTES, 1.0, kernels=1)
    if serving.pipeline_parallel > 1:
        hops = float(serving.pipeline_parallel - 1)
        yield _Operator(
            name="pipeline_transfer",
            op_class="communication",
            compute_dtype="bf16",
            calls=hops,
            link_bytes={"tokens": hops * hidden * ACTIVATION_BYTES},
        )
    vocab = model.vocab_size / tp
    yield replace(_gemm("logits", vocab, hidden, 1.0, "bf16", per="rows"), name="logits")
    yield _Operator(
        name="sampling",
        op_class="sampling",
        compute_dtype="bf16",
        calls=1.0,
        activation_bytes={"rows": model.vocab_size * GREEDY_BYTES_PER_LOGIT},
    )
    draw = BEYOND_GREEDY.get((serving.decoding, serving.stack in STATIC_STACKS))
    if draw is not None:
        passed = model.vocab_size * draw.bytes_per_logit
        drawn = _elementwise(draw.name, passed, 1.0, draw.kernels, per="rows")
        yield replace(drawn, tiles={"rows": model.vocab_size * draw.slow_passes})


def _all_reduce(hidden: int, tp: int, count: float) -> _Operator:
    # ring all-reduce after attention and after the MLP: 2 (n-1)/n of the buffer each way
    sent = 2.0 * (tp - 1) / tp * hidden * ACTIVATION_BYTES
    return _Operator(
        name="all_reduce",
        op_class="communication",
        compute_dtype="bf16",
        calls=2.0 * count,
        link_bytes={"tokens": 2.0 * sent * count},
    )


def _unfused(op: _Operator, model: ModelSpec) -> _Operator:
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
    merged: dict[tuple[str, str, float], list[_Operator]] = {}
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
    """Weights held by one GPU [B]: every expert, the embeddings once more where not tied."""
    table = operator_table(model, serving)
    moe = moe_spec(model)
    everything = np.zeros(len(STATS))
    everything[_STAT["one"]] = 1.0
    everything[_STAT["distinct_experts"]] = moe.num_experts if moe else 0.0
    weights = float((table.hbm_bytes @ everything).sum())
    embedding = 0.0 if model.tied_embeddings else model.vocab_size * model.hidden_size * 2.0
    return weights / serving.pipeline_parallel + embedding / serving.tensor_parallel


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
