"""Attention of a layer as operators: projections, attention itself, rotation and KV cache.

Shapes follow the papers of the architectures: GQA (Ainslie et al. 2023), MLA (DeepSeek-V2, 2.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from energymodel.operator_parts import EIGHT_BIT, Operator, elementwise, gemm, quantise
from energymodel.specs import AttentionSpec, LayerGroup, ModelSpec, ServingConfig
from energymodel.tiles import (
    SOFTMAX_WIDTH,
    TILE,
    decode_head_width,
    decode_key_block,
    decode_query_rows,
)
from energymodel.units import ACTIVATION_BYTES, BYTES_PER_ELEMENT

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
_PART_BYTES = 4.0
"""Of an output of decode attention while parts of a sequence are added up: 32 bits [B]."""


def attention(group: LayerGroup, hidden: int, serving: ServingConfig) -> Iterator[Operator]:
    """Attention of a group of layers, `hidden` elements wide, on one GPU of the group."""
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
            yield gemm("qkv_proj", spec.q_lora_rank + latent, hidden, count, dtype)
            yield gemm("q_b_proj", heads * spec.head_dim, spec.q_lora_rank, count, dtype)
        else:
            yield gemm("qkv_proj", heads * spec.head_dim + latent, hidden, count, dtype)
        up_width = heads * (nope + spec.value_head_dim)
        yield gemm("kv_b_proj", up_width, spec.kv_lora_rank, count, dtype)
        kv_elements = float(latent)
        decode_flops = 2.0 * heads * (latent + spec.kv_lora_rank)
        executed, last_block = decode_flops * serving.decode_queries, 0.0
    else:
        qkv = heads * spec.head_dim + kv_heads * (spec.head_dim + spec.value_head_dim)
        yield gemm("qkv_proj", qkv, hidden, count, dtype)
        kv_elements = kv_heads * (spec.head_dim + spec.value_head_dim)
        decode_flops = 2.0 * heads * (spec.head_dim + spec.value_head_dim)
        width = (spec.head_dim + spec.value_head_dim) / 2.0
        rows = float(decode_query_rows(heads / kv_heads * serving.decode_queries))
        key_block = float(decode_key_block(width))
        if serving.stack.startswith("vllm"):  # whose kernel it is
            width = float(decode_head_width(width))
        executed = 4.0 * kv_heads * rows * width
        last_block = executed * key_block / 2.0  # half of it is empty on average
    query = heads * spec.head_dim
    output = heads * spec.value_head_dim
    passed = (query + output + kv_elements) * ACTIVATION_BYTES
    # one thread block serves the query heads of a KV head, MLA's latent up to 64 of them
    sequence_tiles = heads / 64.0 if spec.kind == "mla" else kv_heads
    pair_flops = 2.0 * heads * (spec.head_dim + spec.value_head_dim) * count
    softmax_flops = 4.0 * heads * SOFTMAX_WIDTH * count
    queries = float(serving.decode_queries)  # share the keys and values that are read once
    yield Operator(
        name="attention_prefill",
        op_class="attention_prefill",
        compute_dtype="bf16",
        calls=count,
        flops={pair_stat: pair_flops},
        executed_flops={pair_stat: pair_flops + softmax_flops},
        activation_bytes={"prefill_rows": passed * count},
        tiles={"prefill_rows": heads * count / TILE},
    )
    yield Operator(
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
        norms = elementwise("qk_norm", 2.0 * normed * ACTIVATION_BYTES, count, kernels=2)
        yield _after_copies(norms, normed) if serving.stack == "vllm-eager" else norms
    yield gemm("o_proj", hidden, output, count, dtype)
    if dtype in EIGHT_BIT:
        yield quantise("attention", hidden + output, count, kernels=2)


def _rotary_and_kv_write(
    query: float, keys: float, cached: float, count: float, serving: ServingConfig, *, is_mla: bool
) -> Operator:
    """Rotates queries and keys, writes keys and values to the cache; all read and written once."""
    name = "rotary_and_kv_write"
    if not serving.stack.startswith("vllm"):
        return elementwise(name, 2.0 * (query + cached) * ACTIVATION_BYTES, count, kernels=2)
    rotated = query + keys
    kernels = 2 if serving.stack == "vllm" else 1  # compiled: one for queries, one for keys
    passed = 2.0 * (rotated + cached) * ACTIVATION_BYTES
    slow = _ROTARY_PASSES * rotated + (_LATENT_WRITE_PASSES if is_mla else _CACHE_WRITE_PASSES)
    both = elementwise(name, passed, count, kernels + _CACHE_WRITE_KERNELS)
    return replace(both, tiles={"tokens": slow * count})


def attention_combine(model: ModelSpec, group: LayerGroup, serving: ServingConfig) -> Operator:
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
    combine = elementwise("attention_combine", passed, float(group.count), kernels, per="rows")
    return replace(combine, tiles={"rows": _COMBINE_PASSES * output * group.count})


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


def _after_copies(norms: Operator, elements: float) -> Operator:
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
