"""What a step does to decode attention: the same call alone, and as an engine's step surrounds it.

    python -m calibration.kernels.attention_within --out attention.jsonl

vLLM's kernel takes longer within a step than alone (docs/residuals.md). Each variant changes one
thing of the call alone: the longest context it is told of, the order of the cache's blocks, the
size of the cache, a large product before each call. Kernels are timed by torch's profiler from
CUDA graphs; a JSON object for each shape and variant. Needs vLLM and a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.metering.recording import append_record
from calibration.serving.step_kernels import per_step, traced

_BLOCK_TOKENS, _SPLITS, _LONGEST = 16, 32, 40960
_PRODUCT_ROWS, _PRODUCT_WIDTH = 16384, 8192
_LAYERS, _MANY_LAYERS, _LAYER_BYTES = 8, 32, 2**31
_REPLAYS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Decode attention of equal sequences."""

    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int


SHAPES = tuple(
    Shape(heads=32, kv_heads=kv, head_dim=width, batch=batch, context=context)
    for kv, width, batch, context in (
        *((8, 128, 32, 132), (8, 128, 128, 132), (8, 128, 8, 2056)),
        *((8, 64, 128, 132), (4, 128, 128, 132), (8, 128, 128, 700)),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """How the call differs from one alone."""

    longest_of_model: bool = False
    """The call and its schedule are told of the model's longest context, not of the batch's."""
    in_order: bool = False
    """Blocks of the cache lie one after another, not scattered."""
    large_cache: bool = False
    """32 layers of 2 GiB in place of 8 as large as the batch needs."""
    products: bool = False
    """A product that reads 256 MiB of weights runs before each call."""


VARIANTS = {
    "window": Surroundings(),
    "longest in both": Surroundings(longest_of_model=True),
    "in order": Surroundings(in_order=True),
    "large caches": Surroundings(large_cache=True),
    "large caches, in order": Surroundings(large_cache=True, in_order=True),
    "products between": Surroundings(products=True),
    "all": Surroundings(longest_of_model=True, large_cache=True, products=True),
}


def measure(shape: Shape, around: Surroundings) -> list[dict[str, Any]]:
    """Kernels of a layer: name, calls and seconds of each, longest first."""
    import torch  # noqa: PLC0415

    attention = importlib.import_module("vllm.vllm_flash_attn")
    blocks = shape.batch * math.ceil(shape.context / _BLOCK_TOKENS)
    layers, held = _LAYERS, blocks
    if around.large_cache:
        block_bytes = 2 * _BLOCK_TOKENS * shape.kv_heads * shape.head_dim * 2
        layers, held = _MANY_LAYERS, max(blocks, _LAYER_BYTES // block_bytes)

    def normal(*size: int) -> Any:
        return torch.randn(*size, device="cuda").to(torch.bfloat16)

    block = (_BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
    order = torch.arange(held, device="cuda") if around.in_order else torch.randperm(held).cuda()
    used_blocks = order[:blocks]
    caches = []
    for _ in range(layers):
        cache = torch.empty(2, held, *block, device="cuda", dtype=torch.bfloat16)
        cache[:, used_blocks] = normal(2, blocks, *block)
        caches.append(cache)
    longest = _LONGEST if around.longest_of_model else shape.context
    table = torch.zeros(
        shape.batch, math.ceil(longest / _BLOCK_TOKENS), dtype=torch.int32, device="cuda"
    )
    each = blocks // shape.batch
    table[:, :each] = used_blocks.to(torch.int32).view(shape.batch, each)
    q = normal(shape.batch, shape.heads, shape.head_dim)
    out = torch.empty_like(q)
    starts = torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32)
    used = torch.full((shape.batch,), shape.context, device="cuda", dtype=torch.int32)
    common: dict[str, Any] = {"max_seqlen_q": 1, "max_seqlen_k": longest, "causal": True}
    schedule = attention.get_scheduler_metadata(
        batch_size=shape.batch,
        num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads,
        headdim=shape.head_dim,
        cache_seqlens=used,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=_BLOCK_TOKENS,
        window_size=(-1, -1),
        num_splits=_SPLITS,
        **common,
    )
    weights = normal(_PRODUCT_ROWS, _PRODUCT_WIDTH) if around.products else None
    x = normal(shape.batch, _PRODUCT_WIDTH)

    def step() -> None:
        for cache in caches:
            if weights is not None:
                torch.mm(x, weights.t())
            attention.flash_attn_varlen_func(
                q=q,
                k=cache[0],
                v=cache[1],
                out=out,
                cu_seqlens_q=starts,
                seqused_k=used,
                softmax_scale=shape.head_dim**-0.5,
                window_size=[-1, -1],
                block_table=table,
                scheduler_metadata=schedule,
                num_splits=_SPLITS,
                fa_version=3,
                **common,
            )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    return per_step(
        traced(lambda: [graph.replay() for _ in range(_REPLAYS)]), steps=_REPLAYS * layers
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.kernels.attention_within",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    options = parser.parse_args(arguments)
    for shape in SHAPES:
        for name, around in VARIANTS.items():
            found = {"shape": asdict(shape), "variant": name, "kernels": measure(shape, around)}
            append_record(options.out, {"kind": "attention", **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
