"""Builds the kernels that move bytes: norms, activations, sampling, copies, collectives.

Where `rotated` is set the buffers are rotated over several times the L2 and the traffic
comes from device memory; otherwise every iteration uses the same ones, as a kernel does
whose input the kernel before it has just left in the L2.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from calibration.kernels.cases import Case
from calibration.kernels.launchers import (
    BLOCK_TOKENS,
    Bed,
    UnavailableError,
    normal,
    sets,
    silu_mul,
    sizes,
)
from calibration.kernels.pump import Work

_EPSILON = 1e-5


def _count(case: Case, bed: Bed) -> int:
    return sets(bed, case.hbm_bytes) if int(case.shape["rotated"]) else 1


def rms_norm(case: Case, bed: Bed) -> Work:
    """RMS norm of (tokens, hidden)."""
    tokens, hidden = sizes(case, "tokens", "hidden")
    count = _count(case, bed)
    x = [normal(bed, tokens, hidden) for _ in range(count)]
    weight = normal(bed, hidden)
    if bed.ops is None:
        norm = torch.nn.functional.rms_norm
        return Work(call=lambda i: norm(x[i], (hidden,), weight, _EPSILON), rotation=count)
    out = [torch.empty_like(t) for t in x]
    call = bed.ops.rms_norm
    return Work(call=lambda i: call(out[i], x[i], weight, _EPSILON), rotation=count, backend="vllm")


def add_rms_norm(case: Case, bed: Bed) -> Work:
    """Residual add and RMS norm in one, in place, of (tokens, hidden)."""
    tokens, hidden = sizes(case, "tokens", "hidden")
    count = _count(case, bed)
    x = [normal(bed, tokens, hidden) for _ in range(count)]
    residual = [normal(bed, tokens, hidden) for _ in range(count)]
    weight = normal(bed, hidden)
    if bed.ops is not None:
        fused = bed.ops.fused_add_rms_norm
        return Work(
            call=lambda i: fused(x[i], residual[i], weight, _EPSILON),
            rotation=count,
            backend="vllm",
        )
    norm = torch.nn.functional.rms_norm

    def plain(i: int) -> Any:
        residual[i].add_(x[i], alpha=0.01)
        return norm(residual[i], (hidden,), weight, _EPSILON)

    return Work(call=plain, rotation=count)


def silu_and_mul(case: Case, bed: Bed) -> Work:
    """Gated activation of (tokens, 2 width)."""
    tokens, width = sizes(case, "tokens", "width")
    count = _count(case, bed)
    x = [normal(bed, tokens, 2 * width) for _ in range(count)]
    out = [torch.empty_like(t[:, :width]).contiguous() for t in x]
    function, backend = silu_mul(bed)
    return Work(call=lambda i: function(out[i], x[i]), rotation=count, backend=backend)


def rotary(case: Case, bed: Bed) -> Work:
    """Rotary embedding of queries and keys, in place."""
    tokens, heads, kv_heads, width = sizes(case, "tokens", "heads", "kv_heads", "head_dim")
    count = _count(case, bed)
    q = [normal(bed, tokens, heads * width) for _ in range(count)]
    k = [normal(bed, tokens, kv_heads * width) for _ in range(count)]
    positions = torch.randint(0, 8192, (tokens,), device=bed.device)
    angles = torch.rand(8192, width // 2, device=bed.device) * 2 * math.pi
    table = torch.cat((angles.cos(), angles.sin()), dim=-1).to(torch.bfloat16)
    if bed.ops is not None:
        call = bed.ops.rotary_embedding
        return Work(
            call=lambda i: call(positions, q[i], k[i], width, table, True),
            rotation=count,
            backend="vllm",
        )

    def turn(x: Any) -> None:
        cos, sin = table[positions].chunk(2, dim=-1)
        halves = x.view(tokens, -1, width)
        a, b = halves[..., : width // 2].clone(), halves[..., width // 2 :].clone()
        halves[..., : width // 2] = a * cos[:, None] - b * sin[:, None]
        halves[..., width // 2 :] = b * cos[:, None] + a * sin[:, None]

    def plain(i: int) -> None:
        turn(q[i])
        turn(k[i])

    return Work(call=plain, rotation=count)


def kv_write(case: Case, bed: Bed) -> Work:
    """Write keys and values of (tokens, KV heads, width) into blocks of the paged cache."""
    tokens, kv_heads, width = sizes(case, "tokens", "kv_heads", "head_dim")
    count = _count(case, bed)
    k = [normal(bed, tokens, kv_heads, width) for _ in range(count)]
    v = [normal(bed, tokens, kv_heads, width) for _ in range(count)]
    blocks = math.ceil(tokens / BLOCK_TOKENS) * count
    cache = normal(bed, 2, blocks, BLOCK_TOKENS, kv_heads, width)
    key_cache, value_cache = cache.unbind(0)
    slots = torch.randperm(blocks * BLOCK_TOKENS, device=bed.device)[: tokens * count]
    slot_sets = slots.view(count, tokens)
    if bed.ops is not None:
        one = torch.ones(1, device=bed.device, dtype=torch.float32)
        write = bed.ops.reshape_and_cache_flash
        return Work(
            call=lambda i: write(
                k[i], v[i], key_cache, value_cache, slot_sets[i], "auto", one, one
            ),
            rotation=count,
            backend="vllm",
        )
    flat_keys = key_cache.view(-1, kv_heads, width)
    flat_values = value_cache.view(-1, kv_heads, width)

    def plain(i: int) -> None:
        flat_keys.index_copy_(0, slot_sets[i], k[i])
        flat_values.index_copy_(0, slot_sets[i], v[i])

    return Work(call=plain, rotation=count)


def residual_add(case: Case, bed: Bed) -> Work:
    """Sum of two (tokens, hidden) tensors."""
    tokens, hidden = sizes(case, "tokens", "hidden")
    count = _count(case, bed)
    a = [normal(bed, tokens, hidden) for _ in range(count)]
    b = [normal(bed, tokens, hidden) for _ in range(count)]
    out = [torch.empty_like(t) for t in a]
    return Work(call=lambda i: torch.add(a[i], b[i], out=out[i]), rotation=count)


def embedding(case: Case, bed: Bed) -> Work:
    """Rows of a (vocabulary, hidden) table, chosen at random."""
    tokens, hidden, vocab = sizes(case, "tokens", "hidden", "vocab")
    count = max(8, _count(case, bed))
    table = normal(bed, vocab, hidden)
    ids = torch.randint(0, vocab, (count, tokens), device=bed.device)
    out = torch.empty(tokens, hidden, device=bed.device, dtype=torch.bfloat16)
    return Work(call=lambda i: torch.index_select(table, 0, ids[i], out=out), rotation=count)


def sample_greedy(case: Case, bed: Bed) -> Work:
    """Most likely token of (rows, vocabulary) logits, through fp32 as vLLM does."""
    logits = normal(bed, *sizes(case, "rows", "vocab"))
    return Work(call=lambda i: logits.to(torch.float32).argmax(dim=-1))


def sample_random(case: Case, bed: Bed) -> Work:
    """Token drawn from the softmax of (rows, vocabulary) logits, as vLLM draws it."""
    logits = normal(bed, *sizes(case, "rows", "vocab"))

    def call(i: int) -> Any:
        probabilities = logits.to(torch.float32).softmax(dim=-1)
        return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return Work(call=call)


def sample_top_p(case: Case, bed: Bed) -> Work:
    """Token drawn from the most likely ones that hold `top_p`, as vLLM does without FlashInfer.

    Its Triton filter takes 8 rows or more; fewer are sorted.
    """
    try:
        sampler = importlib.import_module("vllm.v1.sample.ops.topk_topp_sampler")
    except ImportError as error:
        raise UnavailableError(f"needs vLLM: {error}") from error
    rows, vocab = sizes(case, "rows", "vocab")
    logits = normal(bed, rows, vocab)
    top_p = torch.full((rows,), float(case.shape["top_p"]), device=bed.device)

    def call(i: int) -> Any:
        kept = sampler.apply_top_k_top_p(logits.to(torch.float32), None, top_p)
        probabilities = kept.softmax(dim=-1)
        return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return Work(call=call)


def sample_sorted(case: Case, bed: Bed) -> Work:
    """Token drawn from the most likely ones that hold `top_p`, over the sorted vocabulary.

    As engines without a kernel of their own for top-p do it, vLLM up to 0.11 among them.
    """
    logits, top_p = normal(bed, *sizes(case, "rows", "vocab")), float(case.shape["top_p"])

    def call(i: int) -> Any:
        ordered, places = logits.to(torch.float32).sort(dim=-1)
        unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
        unlikely[:, -1] = False
        kept = ordered.masked_fill_(unlikely, -torch.inf)
        probabilities = torch.empty_like(kept).scatter_(-1, places, kept).softmax(dim=-1)
        return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    return Work(call=call)


def _buffers(case: Case, bed: Bed) -> list[Any]:
    size = int(case.shape["bytes"])
    count = sets(bed, size) if int(case.shape["rotated"]) else 1
    return [normal(bed, size // 2) for _ in range(count)]


def copy_copy(case: Case, bed: Bed) -> Work:
    """Read and write: one buffer copied to another."""
    sources = _buffers(case, bed)
    targets = [torch.empty_like(t) for t in sources]
    return Work(call=lambda i: targets[i].copy_(sources[i]), rotation=len(sources))


def copy_read(case: Case, bed: Bed) -> Work:
    """Read only: the sum of a buffer."""
    sources = [t.view(torch.float32) for t in _buffers(case, bed)]
    for t in sources:  # two bf16 read as one fp32 would hold NaN and huge values
        t.normal_()
    return Work(call=lambda i: torch.sum(sources[i]), rotation=len(sources))


def copy_write(case: Case, bed: Bed) -> Work:
    """Write only: a buffer filled with one (non-zero) value."""
    targets = _buffers(case, bed)
    return Work(call=lambda i: targets[i].fill_(math.pi), rotation=len(targets))


def tiny(case: Case, bed: Bed) -> Work:
    """A kernel that does next to nothing: what it draws is the base of a busy GPU."""
    x = normal(bed, int(case.shape["elements"]))
    return Work(call=lambda i: x.neg_())


def all_reduce(case: Case, bed: Bed) -> Work:
    """Sum of one buffer per GPU, to all of them, by NCCL."""
    nccl = importlib.import_module("torch.cuda.nccl")
    elements = int(case.shape["bytes"]) // 2
    wanted = int(case.shape["gpus"])
    if len(bed.devices) < wanted:
        raise UnavailableError(f"needs {wanted} GPUs")
    inputs = [
        torch.randn(elements, device=device, dtype=torch.bfloat16)
        for device in bed.devices[:wanted]
    ]
    outputs = [torch.empty_like(t) for t in inputs]
    return Work(call=lambda i: nccl.all_reduce(inputs, outputs), backend="nccl")


MEMORY_LAUNCHERS: dict[str, Callable[[Case, Bed], Work]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "silu_and_mul": silu_and_mul,
    "rotary": rotary,
    "kv_write": kv_write,
    "residual_add": residual_add,
    "embedding": embedding,
    "sample_greedy": sample_greedy,
    "sample_random": sample_random,
    "sample_sorted": sample_sorted,
    "sample_top_p": sample_top_p,
    "copy_copy": copy_copy,
    "copy_read": copy_read,
    "copy_write": copy_write,
    "tiny": tiny,
    "all_reduce": all_reduce,
}
