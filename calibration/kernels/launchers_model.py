"""Builds the larger cases: mixture-of-experts blocks and whole decode steps.

The four ways to run an experts' block do the same useful work: `moe_fused` (vLLM's Triton
kernel), `moe_grouped` (torch's grouped GEMM), `moe_loop` (a loop over the experts, as plain
PyTorch models write it) and `moe_dense` (one MLP as wide as the experts of a token
together: the GEMM with the same useful FLOPs, without routing).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from calibration.kernels.cases import Case
from calibration.kernels.launchers import Bed, UnavailableError, normal, sets, silu_mul
from calibration.kernels.pump import Work

_WEIGHT_SCALE = 0.02
_ROUTINGS = 8
_WEIGHT_SETS = 2
_STACK_WEIGHT_SETS = 8
_EPSILON = 1e-5
_BF16_BYTES = 2


def routings(case: Case, count: int) -> Any:
    """Chosen experts (count, tokens, top_k), int64 on the CPU, the same on every machine.

    Balanced: uniform without replacement. Skewed: expert popularity falls as 1 / rank
    (Gumbel top-k draws without replacement in proportion to it).
    """
    tokens, experts, top_k = (int(case.shape[n]) for n in ("tokens", "experts", "top_k"))
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    uniform = torch.rand(count, tokens, experts, generator=generator).clamp_(1e-7, 1 - 1e-7)
    scores = -torch.log(-torch.log(uniform))
    if int(case.shape["skewed"]):
        ranks = torch.randperm(experts, generator=generator) + 1
        scores = scores - torch.log(ranks.to(torch.float32))
    return scores.topk(top_k, dim=-1).indices


def routing_counts(case: Case, ids: Any) -> tuple[Any, float]:
    """Tokens per expert (routings, experts), and the mean number of distinct experts."""
    experts = int(case.shape["experts"])
    counts = torch.stack([torch.bincount(r.flatten(), minlength=experts) for r in ids])
    return counts, float((counts > 0).sum(dim=1).to(torch.float64).mean())


def _expert_bytes(case: Case, touched: float) -> float:
    return touched * 3.0 * case.shape["width"] * case.shape["hidden"] * _BF16_BYTES


def _expert_weights(case: Case, bed: Bed) -> list[tuple[Any, Any]]:
    """Gate-and-up (experts, 2 width, hidden) and down (experts, hidden, width) weights."""
    experts, width, hidden = (int(case.shape[n]) for n in ("experts", "width", "hidden"))
    return [
        (
            normal(bed, experts, 2 * width, hidden, scale=_WEIGHT_SCALE),
            normal(bed, experts, hidden, width, scale=_WEIGHT_SCALE),
        )
        for _ in range(_WEIGHT_SETS)
    ]


def moe_fused(case: Case, bed: Bed) -> Work:
    """Fused Triton kernel of vLLM, alignment of rows to tiles included."""
    if bed.moe is None:
        raise UnavailableError("vLLM's fused MoE kernel is not installed")
    tokens, experts, top_k, hidden = (
        int(case.shape[n]) for n in ("tokens", "experts", "top_k", "hidden")
    )
    chosen = routings(case, _ROUTINGS)
    counts, distinct = routing_counts(case, chosen)
    weights = _expert_weights(case, bed)
    x = normal(bed, tokens, hidden)
    ids = chosen.to(device=bed.device, dtype=torch.int32).contiguous()
    shares = torch.rand(tokens, top_k, device=bed.device).softmax(dim=-1)
    run = bed.moe.fused_experts
    config = bed.moe.try_get_optimal_moe_config(
        tuple(weights[0][0].size()), tuple(weights[0][1].size()), top_k, None, tokens
    )
    tile = int(config["BLOCK_SIZE_M"])
    if tokens * top_k * 4 <= experts:  # vLLM then gives every row a tile of its own
        rows = float(tokens * top_k * tile)
    else:
        rows = float((torch.ceil(counts / tile) * tile).sum(dim=1).mean())
    return Work(
        call=lambda i: run(x, *weights[i % _WEIGHT_SETS], shares, ids[i]),
        rotation=_ROUTINGS,
        backend="vllm-triton",
        details={"distinct_experts": distinct, "expert_rows": rows, "config": dict(config)},
        counts={
            "hbm_bytes": _expert_bytes(case, distinct),
            "executed_flops": case.flops * rows / (tokens * top_k),
        },
    )


def moe_dense(case: Case, bed: Bed) -> Work:
    """One gated MLP of width top_k times the experts'."""
    tokens, hidden = int(case.shape["tokens"]), int(case.shape["hidden"])
    width = int(case.shape["top_k"] * case.shape["width"])
    count = sets(bed, 3.0 * width * hidden * _BF16_BYTES)
    up = [normal(bed, 2 * width, hidden, scale=_WEIGHT_SCALE) for _ in range(count)]
    down = [normal(bed, hidden, width, scale=_WEIGHT_SCALE) for _ in range(count)]
    x = normal(bed, tokens, hidden)
    wide = torch.empty(tokens, 2 * width, device=bed.device, dtype=torch.bfloat16)
    narrow = torch.empty(tokens, width, device=bed.device, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    activate, backend = silu_mul(bed)

    def call(i: int) -> None:
        torch.mm(x, up[i].t(), out=wide)
        activate(narrow, wide)
        torch.mm(narrow, down[i].t(), out=out)

    return Work(call=call, rotation=count, backend=f"torch+{backend}")


def moe_grouped(case: Case, bed: Bed) -> Work:
    """Torch's grouped GEMM over rows gathered by expert, then summed per token."""
    grouped = getattr(torch, "_grouped_mm", None)
    if grouped is None:
        raise UnavailableError("this torch has no grouped GEMM")
    tokens, top_k, width, hidden = (
        int(case.shape[n]) for n in ("tokens", "top_k", "width", "hidden")
    )
    chosen = routings(case, _ROUTINGS)
    counts, distinct = routing_counts(case, chosen)
    weights = [(a.transpose(1, 2), b.transpose(1, 2)) for a, b in _expert_weights(case, bed)]
    x = normal(bed, tokens, hidden)
    shares = torch.rand(tokens * top_k, 1, device=bed.device).to(torch.bfloat16)
    ends = counts.cumsum(dim=1).to(device=bed.device, dtype=torch.int32)
    order = chosen.flatten(1).argsort(dim=1, stable=True)
    rows = (order // top_k).to(bed.device)
    narrow = torch.empty(tokens * top_k, width, device=bed.device, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    activate, backend = silu_mul(bed)

    def call(i: int) -> None:
        up, down = weights[i % _WEIGHT_SETS]
        gathered = x.index_select(0, rows[i])
        activate(narrow, grouped(gathered, up, offs=ends[i]))
        result = grouped(narrow, down, offs=ends[i]).mul_(shares)
        out.zero_().index_add_(0, rows[i], result)

    return Work(
        call=call,
        rotation=_ROUTINGS,
        backend=f"torch-grouped+{backend}",
        details={"distinct_experts": distinct},
        counts={"hbm_bytes": _expert_bytes(case, distinct)},
    )


def moe_loop(case: Case, bed: Bed) -> Work:
    """Loop over the experts that were hit, found by the host (eager; it synchronises)."""
    tokens, experts, top_k, hidden = (
        int(case.shape[n]) for n in ("tokens", "experts", "top_k", "hidden")
    )
    chosen = routings(case, _ROUTINGS)
    _, distinct = routing_counts(case, chosen)
    weights = _expert_weights(case, bed)
    x = normal(bed, tokens, hidden)
    ids = chosen.to(bed.device)
    shares = torch.rand(tokens, top_k, device=bed.device).softmax(dim=-1).to(torch.bfloat16)
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu

    def call(i: int) -> None:
        up, down = weights[i % _WEIGHT_SETS]
        out = torch.zeros_like(x)
        mask = torch.nn.functional.one_hot(ids[i], experts).permute(2, 1, 0)
        for expert in (mask.sum(dim=(1, 2)) > 0).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            gate, wide = linear(x[token], up[expert]).chunk(2, dim=-1)
            result = linear(silu(gate) * wide, down[expert]) * shares[token, slot, None]
            out.index_add_(0, token, result)

    return Work(
        call=call,
        rotation=_ROUTINGS,
        details={"distinct_experts": distinct},
        counts={"hbm_bytes": _expert_bytes(case, distinct)},
    )


def decode_stack(case: Case, bed: Bed) -> Work:
    """One decode step of a Llama-shaped model written in plain PyTorch operations.

    The layers share eight sets of weights (far more than the L2 holds), so that the large
    model fits small GPUs; each layer has its own static KV cache.
    """
    names = ("batch", "context", "layers", "hidden", "heads", "kv_heads", "head_dim", "mlp")
    batch, context, layers, hidden, heads, kv_heads, width, mlp = (
        int(case.shape[n]) for n in names
    )
    vocab = int(case.shape["vocab"])

    def weight(rows: int, columns: int) -> Any:
        return normal(bed, rows, columns, scale=_WEIGHT_SCALE)

    blocks = [
        {
            "q": weight(heads * width, hidden),
            "k": weight(kv_heads * width, hidden),
            "v": weight(kv_heads * width, hidden),
            "o": weight(hidden, heads * width),
            "gate": weight(mlp, hidden),
            "up": weight(mlp, hidden),
            "down": weight(hidden, mlp),
            "norm1": normal(bed, hidden),
            "norm2": normal(bed, hidden),
        }
        for _ in range(min(layers, _STACK_WEIGHT_SETS))
    ]
    caches = [normal(bed, 2, batch, kv_heads, context, width) for _ in range(layers)]
    table, head, last_norm = weight(vocab, hidden), weight(vocab, hidden), normal(bed, hidden)
    tokens = torch.randint(0, vocab, (batch,), device=bed.device)
    position = torch.tensor([context - 1], device=bed.device)
    angles = torch.rand(1, 1, 1, width // 2, device=bed.device) * 2 * math.pi
    cos = torch.cat((angles, angles), dim=-1).cos().to(torch.bfloat16)
    sin = torch.cat((angles, angles), dim=-1).sin().to(torch.bfloat16)
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    attend = torch.nn.functional.scaled_dot_product_attention

    def norm(x: Any, scale: Any) -> Any:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _EPSILON)
        return scale * wide.to(x.dtype)

    def turn(x: Any) -> Any:
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), dim=-1)
        return x * cos + half * sin

    def step(_: int) -> Any:
        x = torch.nn.functional.embedding(tokens, table)
        for layer in range(layers):
            w = blocks[layer % len(blocks)]
            y = norm(x, w["norm1"])
            q = linear(y, w["q"]).view(batch, heads, 1, width)
            k = linear(y, w["k"]).view(batch, kv_heads, 1, width)
            v = linear(y, w["v"]).view(batch, kv_heads, 1, width)
            keys, values = caches[layer][0], caches[layer][1]
            keys.index_copy_(2, position, turn(k))
            values.index_copy_(2, position, v)
            a = attend(turn(q), keys, values, enable_gqa=heads != kv_heads)
            x = x + linear(a.reshape(batch, heads * width), w["o"])
            y = norm(x, w["norm2"])
            x = x + linear(silu(linear(y, w["gate"])) * linear(y, w["up"]), w["down"])
        return linear(norm(x, last_norm), head).to(torch.float32).argmax(dim=-1)

    return Work(call=step, details={"dispatched_ops": _dispatched_ops(step)})


def _dispatched_ops(step: Callable[[int], Any]) -> int:
    """Operations of one call that launch work (views left out)."""
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415

    class Counter(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not func.is_view:
                self.count += 1
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        step(0)
    return int(counter.count)


MODEL_LAUNCHERS: dict[str, Callable[[Case, Bed], Work]] = {
    "moe_fused": moe_fused,
    "moe_dense": moe_dense,
    "moe_grouped": moe_grouped,
    "moe_loop": moe_loop,
    "decode_stack": decode_stack,
}
