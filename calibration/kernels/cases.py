"""What is measured of kernels, as data: each case with the work that it does.

No torch here: the cases can be listed, costed and tested anywhere. Shapes are those of real models
(`_WEIGHTS`, `_HEADS`, `_EXPERTS`: the published Hugging Face configs), so that whole shape families
can be left out when the fit is cross-validated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from energymodel.operator_parts import compute_dtype
from energymodel.units import BYTES_PER_ELEMENT

_BF16 = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel (or state) to measure, and the work of one iteration of it."""

    name: str
    """Unique and stable: results are resumed and compared by it."""
    op_class: str
    """Operator class as in `energymodel.operators`, or `copy`, `base`, `idle`, `decode_stack`."""
    launcher: str
    """Function of `calibration.kernels.launchers` that builds it."""
    family: str
    """Shape family, left out as a whole in cross-validation."""
    dtype: str = "bf16"
    shape: Mapping[str, float]
    flops: float = 0.0
    """Useful FLOPs; tile padding of fused MoE is found when it is launched."""
    hbm_bytes: float = 0.0
    """Bytes that must cross device memory: buffers are rotated over several times the L2 [B]."""
    activation_bytes: float = 0.0
    """Bytes of buffers that every iteration uses again; in L2 as far as they fit [B]."""
    link_bytes: float = 0.0
    priority: int = 1
    """0 = in the quick suite too; higher ones are measured later."""
    graph: bool = True
    """Replayed from a CUDA graph; False = launched eagerly by the host."""
    warmup_seconds: float = 0.4
    repeat: int = 1
    gpus: int = 1


_WEIGHTS = {
    "llama-3.1-8b.qkv": (6144, 4096),
    "llama-3.1-8b.o": (4096, 4096),
    "llama-3.1-8b.gate_up": (28672, 4096),
    "llama-3.1-8b.down": (4096, 14336),
    "llama-3.1-8b.lm_head": (128256, 4096),
    "llama-3.2-1b.qkv": (3072, 2048),
    "llama-3.2-1b.o": (2048, 2048),
    "llama-3.2-1b.gate_up": (16384, 2048),
    "llama-3.2-1b.down": (2048, 8192),
    "llama-3.2-1b.lm_head": (128256, 2048),
    "qwen3-14b.qkv": (7168, 5120),
    "qwen3-14b.o": (5120, 5120),
    "qwen3-14b.gate_up": (34816, 5120),
    "qwen3-14b.down": (5120, 17408),
    "qwen3-32b.qkv": (10240, 5120),
    "qwen3-32b.o": (5120, 8192),
    "qwen3-32b.gate_up": (51200, 5120),
    "qwen3-32b.down": (5120, 25600),
    "olmo-1b.qkv": (6144, 2048),
}
_ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_WHOLE = ("llama-3.1-8b.gate_up", "llama-3.1-8b.qkv")
_QUICK_ROWS = (1, 16, 128, 512, 2048, 8192)
_LOGIT_ROWS = (1, 8, 64, 256)

_HEADS = {
    "32x8x128": (32, 8, 128),  # Llama-3.1-8B
    "32x4x128": (32, 4, 128),  # Qwen3-30B-A3B
    "16x16x128": (16, 16, 128),  # OLMo-1B, OLMoE-1B-7B
    "40x8x128": (40, 8, 128),  # Qwen3-14B
    "32x8x64": (32, 8, 64),  # Llama-3.2-1B
}
_MORE_HEADS = {
    "14x2x64": (14, 2, 64),  # Qwen2.5-0.5B
    "64x8x64": (64, 8, 64),  # gpt-oss
    "24x8x128": (24, 8, 128),  # Llama-3.2-3B
    "64x8x128": (64, 8, 128),  # Llama-3.1-70B, Qwen3-32B
    "32x32x128": (32, 32, 128),  # Llama-2-7B, OLMo-7B
}
_SHORT_PROMPTS = ("32x8x128", "16x16x128", "32x8x64")
"""Heads with which many short prompts are measured too."""
_LATE = 3
"""Priority of what widens the families that are measured already."""
_EXPERTS = {
    # experts, experts per token, expert width, hidden size
    "olmoe-1b-7b": (64, 8, 1024, 2048),
    "qwen3-30b-a3b": (128, 8, 768, 2048),
    "mixtral-8x7b": (8, 2, 14336, 4096),
    "deepseek-v2-lite": (64, 6, 1408, 2048),
    "qwen3-235b-a22b": (128, 8, 1536, 4096),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "gpt-oss-120b": (128, 4, 2880, 2880),
}
_STACKS = {
    # layers, hidden, query heads, KV heads, head width, MLP width, vocabulary
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256),
}


def _gemm(
    family: str,
    m: int,
    *,
    dtype: str = "bf16",
    resident: bool = False,
    priority: int = 1,
) -> Case:
    n, k = _WEIGHTS[family]
    weights = n * k * BYTES_PER_ELEMENT[dtype]
    passing = m * (k * BYTES_PER_ELEMENT[compute_dtype(dtype)] + n * _BF16)
    flops = 2.0 * m * n * k
    return Case(
        name=f"gemm.{dtype}.{family}.m{m}{'.l2' if resident else ''}",
        op_class="gemm",
        launcher="gemm",
        family=family,
        dtype=dtype,
        shape={"m": m, "n": n, "k": k, "resident": int(resident)},
        flops=flops,
        hbm_bytes=0.0 if resident else weights,
        activation_bytes=passing + (weights if resident else 0.0),
        priority=priority,
        warmup_seconds=0.7 if m >= 512 else 0.4,
    )


def _gemms() -> Iterator[Case]:
    for index, family in enumerate(_WEIGHTS):
        if family.endswith("lm_head"):
            rows: Iterable[int] = _LOGIT_ROWS
        elif family in _WHOLE:
            rows = _ROWS
        else:  # every other row count, shifted from family to family, both ends covered
            rows = sorted({1, 128, *_ROWS[index % 3 :: 3]})
        for m in rows:
            quick = family == _WHOLE[0] and m in _QUICK_ROWS
            core = family in _WHOLE or m <= 128 or index % 2 == 0
            yield _gemm(family, m, priority=0 if quick else 1 if core else 2)
    for m in (1, 16, 128, 1024, 8192):
        yield _gemm("llama-3.1-8b.gate_up", m, dtype="fp8", priority=1)
        yield _gemm("qwen3-14b.down", m, dtype="fp8", priority=2)
    for m in (128, 4096):
        yield _gemm("llama-3.1-8b.gate_up", m, dtype="int8", priority=2)
    for family in ("llama-3.1-8b.qkv", "qwen3-14b.down", "llama-3.2-1b.o"):
        for m in (32, 128, 1024, 4096):  # 17 rows at least, says torch
            yield _gemm(family, m, dtype="int8", priority=_LATE)
    for family in ("llama-3.1-8b.qkv", "qwen3-32b.gate_up", "llama-3.2-1b.o"):
        for m in (1, 16, 128, 1024):
            yield _gemm(family, m, dtype="fp8", priority=_LATE)
    for m in (1, 16, 128, 1024):
        yield _gemm("llama-3.2-1b.qkv", m, resident=True, priority=1)
        yield _gemm("llama-3.2-1b.o", m, resident=True, priority=2)


def _decode(heads: str, batch: int, context: int, priority: int) -> Case:
    query, kv, width = (_HEADS | _MORE_HEADS)[heads]
    return Case(
        name=f"decode.{heads}.b{batch}.c{context}",
        op_class="attention_decode",
        launcher="attention_decode",
        family=heads,
        shape={
            "batch": batch,
            "context": context,
            "heads": query,
            "kv_heads": kv,
            "head_dim": width,
        },
        flops=4.0 * batch * context * query * width,
        hbm_bytes=2.0 * batch * context * kv * width * _BF16,
        activation_bytes=2.0 * batch * query * width * _BF16,
        priority=priority,
    )


def _prefill(heads: str, batch: int, tokens: int, past: int, priority: int) -> Case:
    query, kv, width = (_HEADS | _MORE_HEADS)[heads]
    pairs = batch * (tokens * past + tokens * (tokens + 1) / 2.0)
    return Case(
        name=f"prefill.{heads}.b{batch}.t{tokens}" + (f".past{past}" if past else ""),
        op_class="attention_prefill",
        launcher="attention_prefill",
        family=heads,
        shape={
            "batch": batch,
            "tokens": tokens,
            "past": past,
            "heads": query,
            "kv_heads": kv,
            "head_dim": width,
            "pairs": pairs,
        },
        flops=4.0 * pairs * query * width,
        activation_bytes=batch
        * _BF16
        * width
        * (2.0 * tokens * query + 2.0 * (tokens + past) * kv),
        priority=priority,
    )


_RAGGED = {
    "32x8x128": (
        *((1, 132), (8, 132), (32, 132), (128, 132), (256, 132), (32, 200), (64, 320)),
        *((256, 260), (128, 700), (16, 1500), (4, 3000)),
    ),
    "16x16x128": ((1, 132), (32, 132), (128, 300), (8, 700)),
    "32x8x64": ((1, 132), (32, 132), (256, 300), (64, 1100)),
    "40x8x128": ((8, 132), (128, 132), (64, 300)),
    "32x4x128": ((1, 132), (32, 200), (256, 132)),
}
"""Batches and contexts of decode attention that leave the last block of 128 keys partly filled, as
nearly all do that are served; those beside them fill it."""


def _attentions() -> Iterator[Case]:
    points = [
        *((1, 512), (1, 4096), (1, 16384), (4, 1024), (8, 2048), (8, 16384), (16, 512)),
        *((32, 128), (32, 1024), (64, 512), (64, 4096), (128, 1024), (256, 128), (256, 1024)),
    ]
    for index, (batch, context) in enumerate(points):
        yield _decode("32x8x128", batch, context, 0 if index % 3 == 1 else 1)
    others = [(1, 2048), (8, 1024), (32, 2048), (128, 512), (256, 2048)]
    for heads in list(_HEADS)[1:]:
        for index, (batch, context) in enumerate(others):
            yield _decode(heads, batch, context, 1 if index % 2 == 0 else 2)
    for heads in _MORE_HEADS:
        for batch, context in (*others, (1, 132), (32, 132), (256, 300)):
            yield _decode(heads, batch, context, _LATE)
    for heads, points in _RAGGED.items():
        for batch, context in points:
            yield _decode(heads, batch, context, 1 if batch == 32 else 2)
    prompts = [(1, 128), (1, 512), (1, 2048), (1, 8192), (1, 16384), (4, 2048), (8, 512), (32, 128)]
    for batch, tokens in prompts:
        quick = (batch, tokens) in ((1, 512), (1, 2048), (1, 8192))
        yield _prefill("32x8x128", batch, tokens, 0, 0 if quick else 1)
    few = [(1, 1024), (1, 4096), (8, 512), (2, 8192)]
    for heads in list(_HEADS)[1:]:
        for index, (batch, tokens) in enumerate(few):
            yield _prefill(heads, batch, tokens, 0, 1 if index % 2 == 0 else 2)
    short = [(64, 64), (128, 128), (32, 256), (8, 64)]
    later = dict.fromkeys(_MORE_HEADS, few) | dict.fromkeys(_SHORT_PROMPTS, short)
    for heads, points in later.items():
        for batch, tokens in points:
            yield _prefill(heads, batch, tokens, 0, _LATE)
    for tokens, past in ((512, 2048), (512, 8192), (2048, 8192)):
        yield _prefill("32x8x128", 1, tokens, past, 2)


def _moe(model: str, tokens: int, kernel: str, skewed: bool, priority: int) -> Case:
    experts, top_k, width, hidden = _EXPERTS[model]
    per_expert = 3.0 * width * hidden
    touched = experts * (1.0 - (1.0 - top_k / experts) ** tokens)
    if kernel == "dense":  # one MLP of top_k expert widths: the same useful FLOPs
        touched = top_k
    passing = tokens * top_k * (3.0 * hidden + 3.0 * width) * _BF16
    dtype = "mxfp4" if kernel == "mxfp4" else "bf16"
    classes = {"fused": "moe", "dense": "gemm_pair", "mxfp4": "moe_packed"}
    return Case(
        name=f"moe.{kernel}.{model}.t{tokens}{'.skewed' if skewed else ''}",
        op_class=classes.get(kernel, f"moe_{kernel}"),
        launcher=f"moe_{kernel}",
        family=model,
        dtype=dtype,
        shape={
            "tokens": tokens,
            "experts": experts,
            "top_k": top_k,
            "width": width,
            "hidden": hidden,
            "skewed": int(skewed),
        },
        flops=2.0 * tokens * top_k * per_expert,
        # of the routing drawn: the launcher's count
        hbm_bytes=touched * per_expert * BYTES_PER_ELEMENT[dtype],
        activation_bytes=passing,
        priority=priority,
        graph=kernel != "loop",
        warmup_seconds=0.7 if tokens >= 512 else 0.4,
    )


def _moes() -> Iterator[Case]:
    tokens_of = {
        "olmoe-1b-7b": (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096),
        "qwen3-30b-a3b": (1, 4, 16, 64, 256, 1024, 4096),
        "mixtral-8x7b": (1, 4, 16, 64, 256, 1024),
    }
    for model, all_tokens in tokens_of.items():
        first = model == "olmoe-1b-7b"
        for tokens in all_tokens:
            quick = first and tokens in (1, 8, 64, 1024)
            yield _moe(model, tokens, "fused", False, 0 if quick else 1)
            if first or tokens in (1, 16, 256, 1024):
                yield _moe(model, tokens, "dense", False, 0 if quick else 1)
        for tokens in (16, 256, 1024):
            yield _moe(model, tokens, "fused", True, 1 if tokens == 256 else 2)
    for model in ("deepseek-v2-lite", "qwen3-235b-a22b"):
        for tokens in (1, 8, 32, 128, 512, 2048):
            yield _moe(model, tokens, "fused", False, 2)
    for tokens in (1, 8, 64, 1024):
        yield _moe("olmoe-1b-7b", tokens, "grouped", False, 1)
        yield _moe("olmoe-1b-7b", tokens, "loop", False, 1)
    for tokens in (16, 1024):
        yield _moe("qwen3-30b-a3b", tokens, "grouped", False, 2)


_QUANTISED_ROWS = {
    "llama-3.1-8b.gate_up": (1, 16, 24, 32, 48, 64, 128, 256, 1024, 4096),
    "llama-3.1-8b.qkv": (1, 32, 64, 256, 2048),
    "qwen3-14b.down": (1, 16, 32, 48, 128, 512, 8192),
    "llama-3.2-1b.o": (1, 128, 1024),
}
_MORE_QUANTISED = ("qwen3-32b.down", "llama-3.1-8b.down", "llama-3.2-1b.gate_up")
_MORE_ROWS = (1, 16, 32, 64, 128, 512, 2048)


def _quantised() -> Iterator[tuple[str, int, int]]:
    """Families, rows and priorities of products with quantised weights."""
    for family, all_rows in _QUANTISED_ROWS.items():
        yield from ((family, m, 2) for m in all_rows)
    for family in _MORE_QUANTISED:
        yield from ((family, m, _LATE) for m in _MORE_ROWS)


def _scaled() -> Iterator[Case]:
    """Products in fp8 as vLLM serves them, and the kernel that makes a scale per token."""
    for family, m, priority in _quantised():
        plain = _gemm(family, m, dtype="fp8", priority=priority)
        yield replace(
            plain,
            name=f"gemm.fp8_scaled.{family}.m{m}",
            op_class="gemm_scaled",
            launcher="gemm_scaled",
        )
    for tokens in (8, 64, 1024, 8192):
        yield _elementwise("fp8_quant", tokens, 3.0 * 4096, 2, hidden=4096)


def _packed() -> Iterator[Case]:
    """Products with 4-bit weights, unpacked as they are multiplied."""
    for family, m, priority in _quantised():
        plain = _gemm(family, m, dtype="int4", priority=priority)
        yield replace(plain, op_class="gemm_packed", launcher="gemm_int4")
    tokens_of = {
        "gpt-oss-20b": (1, 4, 16, 64, 256, 1024, 4096),
        "gpt-oss-120b": (1, 16, 64, 256, 1024),
    }
    for model, all_tokens in tokens_of.items():
        for tokens in all_tokens:
            yield _moe(model, tokens, "mxfp4", False, 2)


def _stacks() -> Iterator[Case]:
    context = 512
    for model, (layers, hidden, query, kv, width, mlp, vocab) in _STACKS.items():
        per_layer = hidden * width * (2 * query + 2 * kv) + 3 * hidden * mlp
        weights = (layers * per_layer + vocab * hidden) * _BF16
        for batch in (1, 8, 64):
            cache = 2.0 * layers * batch * context * kv * width * _BF16
            for graph in (True, False):
                yield Case(
                    name=f"stack.{model}.b{batch}.{'graph' if graph else 'eager'}",
                    op_class="decode_stack",
                    launcher="decode_stack",
                    family=model,
                    shape={
                        "batch": batch,
                        "context": context,
                        "layers": layers,
                        "hidden": hidden,
                        "heads": query,
                        "kv_heads": kv,
                        "head_dim": width,
                        "mlp": mlp,
                        "vocab": vocab,
                    },
                    flops=batch * (weights + 4.0 * layers * context * query * width),
                    hbm_bytes=weights + cache,
                    priority=0 if batch < 64 else 1,
                    graph=graph,
                )


def _elementwise(kind: str, tokens: int, per_token: float, priority: int, **shape: float) -> Case:
    traffic = tokens * per_token
    rotated = traffic >= 2**20  # small buffers come from the kernel before: they are in L2
    return Case(
        name=f"elementwise.{kind}.t{tokens}",
        op_class="elementwise",
        launcher=kind,
        family=kind,
        shape={"tokens": tokens, "rotated": int(rotated), **shape},
        hbm_bytes=traffic if rotated else 0.0,
        activation_bytes=0.0 if rotated else traffic,
        priority=priority,
    )


_OTHER_WIDTHS = ((2048, 8192), (5120, 25600))
"""Hidden size and MLP width of Llama-3.2-1B and Qwen3-32B, beside those of Llama-3.1-8B."""


_SAMPLING = (("greedy", 10.0), ("random", 34.0), ("sorted", 90.0), ("top_p", 50.0))
"""Ways to choose a token, and bytes of a logit: a sort or a filter counts as one pass over it."""


def _elementwises() -> Iterator[Case]:
    hidden, mlp, vocab, query, kv, width = 4096, 14336, 128256, 32, 8, 128
    for tokens in (8, 64, 1024, 8192):
        for other, wide in _OTHER_WIDTHS:
            for case in _by_rows(tokens, other, wide, 1):
                name, family = f"{case.name}.h{other}", f"{case.family}.h{other}"
                yield replace(case, name=name, family=family)
        level = 0 if tokens == 1024 else 1
        late = level + 1
        yield from _by_rows(tokens, hidden, mlp, level)
        rotary = 2 * (query + kv) * width * _BF16
        heads = {"heads": query, "kv_heads": kv, "head_dim": width}
        yield _elementwise("rotary", tokens, rotary, late, **heads)
        yield _elementwise("kv_write", tokens, 4 * kv * width * _BF16, late, **heads)
        yield _elementwise(
            "embedding", tokens, 2 * hidden * _BF16, late, hidden=hidden, vocab=vocab
        )
    for rows in (1, 8, 64, 256):
        for kind, per_logit in _SAMPLING:
            yield Case(
                name=f"sampling.{kind}.r{rows}",
                op_class="sampling",
                launcher=f"sample_{kind}",
                family=kind,
                shape={"rows": rows, "vocab": vocab, "top_p": 0.95},
                activation_bytes=per_logit * rows * vocab,
                priority=1 if kind == "greedy" else 2,
            )


def _by_rows(tokens: int, hidden: int, mlp: int, priority: int) -> Iterator[Case]:
    """Norms, the activation and the residual's addition, which take a model's widths alone."""
    yield _elementwise("rms_norm", tokens, 2 * hidden * _BF16, priority, hidden=hidden)
    yield _elementwise("add_rms_norm", tokens, 4 * hidden * _BF16, priority, hidden=hidden)
    yield _elementwise("silu_and_mul", tokens, 3 * mlp * _BF16, priority, width=mlp)
    late = priority + 1
    yield _elementwise("residual_add", tokens, 3 * hidden * _BF16, late, hidden=hidden)


def _states() -> Iterator[Case]:
    mib = 2**20
    for kind, traffic in (("copy", 2.0), ("read", 1.0), ("write", 1.0)):
        for size in (1024 * mib, 256 * mib):
            yield Case(
                name=f"copy.{kind}.hbm.{size // mib}mib",
                op_class="copy",
                launcher=f"copy_{kind}",
                family=f"{kind}.hbm",
                shape={"bytes": size, "rotated": 1},
                hbm_bytes=traffic * size,
                priority=0 if size == 1024 * mib else 2,
            )
        for size in (4 * mib, 16 * mib):
            yield Case(
                name=f"copy.{kind}.l2.{size // mib}mib",
                op_class="copy",
                launcher=f"copy_{kind}",
                family=f"{kind}.l2",
                shape={"bytes": size, "rotated": 0},
                activation_bytes=traffic * size,
                priority=0 if (kind, size) == ("copy", 4 * mib) else 1,
            )
    for elements in (32, 65536):
        yield Case(
            name=f"base.tiny.e{elements}",
            op_class="base",
            launcher="tiny",
            family="tiny",
            shape={"elements": elements},
            activation_bytes=2.0 * elements * _BF16,
            priority=0,
        )
    for kind, interval in (
        ("cold", 0.0),
        ("context", 0.0),
        ("polling", 0.0),
        ("sparse", 0.001),
        ("sparse", 0.01),
    ):
        suffix = f".{interval * 1e3:g}ms" if interval else ""
        yield Case(
            name=f"idle.{kind}{suffix}",
            op_class="idle",
            launcher=f"idle_{kind}",
            family="idle",
            shape={"interval_seconds": interval},
            priority=0,
            graph=False,
            warmup_seconds=0.3 if kind in ("cold", "polling") else 1.5,
        )


def _collectives() -> Iterator[Case]:
    for size in (16 * 2**10, 128 * 2**10, 2**20, 8 * 2**20, 64 * 2**20, 512 * 2**20):
        yield Case(
            name=f"all_reduce.g2.{size // 1024}kib",
            op_class="communication",
            launcher="all_reduce",
            family="all_reduce",
            shape={"bytes": size, "gpus": 2},
            link_bytes=float(size),  # ring: 2 (n - 1) / n of the buffer each way, n = 2
            activation_bytes=2.0 * size,
            priority=1,
            graph=False,
            gpus=2,
        )


def all_cases() -> Iterator[Case]:
    """Every case, whatever GPUs it takes."""
    for source in (
        *(_gemms, _attentions, _moes, _scaled, _packed),
        *(_stacks, _elementwises, _states, _collectives),
    ):
        yield from source()


def preheat_case() -> Case:
    """Return a case that loads a GPU up to its power limit."""
    return _gemm("llama-3.1-8b.gate_up", 4096)
