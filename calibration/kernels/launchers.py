"""Builds the kernels of the suite: buffers of random data and the calls on them.

Every launcher takes a `Case` and a `Bed` and returns a `Work`. The kernel is vLLM's where
vLLM is installed and has one, torch's otherwise; `Work.backend` says which. Buffers hold
normal random numbers, never zeros (zeros draw far less power), and are rotated over at
least eight times the L2 where the data is meant to come from device memory.

This module imports torch; import it only where GPU work starts.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from calibration.kernels.cases import Case
from calibration.kernels.pump import Work
from energymodel.errors import EnergyModelError

_CACHE_MULTIPLE = 8
_MOST_SETS = 512
BLOCK_TOKENS = 16  # vLLM's default KV block
_SPLITS = 32  # vLLM's bound on FlashAttention 3 splits inside CUDA graphs
_GRAPH_TOKENS = 512  # vLLM replays steps of up to so many tokens from graphs
_WEIGHT_SCALE = 0.02


class UnavailableError(EnergyModelError):
    """Software that the case needs is missing here; the case is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """Where kernels run: devices and what is installed."""

    devices: tuple[str, ...]
    """Torch devices; the first runs single-GPU cases."""
    l2_bytes: float
    ops: Any = None
    """`vllm._custom_ops`, None without vLLM."""
    attention: Any = None
    """`vllm.vllm_flash_attn`, None without it."""
    attention_version: int = 0
    """FlashAttention version vLLM would use; 0 = torch's SDPA."""
    moe: Any = None
    """`vllm...fused_moe.fused_moe`, None without vLLM."""
    software: tuple[tuple[str, str], ...] = ()
    """Versions, and why a vLLM part is missing."""

    @property
    def device(self) -> str:
        """The device of single-GPU cases."""
        return self.devices[0]


def _import(name: str, software: dict[str, str]) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a broken vLLM must not stop torch's cases
        software[f"missing {name}"] = f"{type(error).__name__}: {error}"[:300]
        return None


def cuda_bed(uuids: tuple[str, ...] = (), *, use_vllm: bool = True) -> Bed:
    """Find the metered GPUs in CUDA, create their contexts and load vLLM's kernels.

    Raises
    ------
    EnergyModelError
        If torch has no CUDA, or a metered GPU is hidden (CUDA_VISIBLE_DEVICES).
    """
    if not torch.cuda.is_available():
        raise EnergyModelError(
            "torch sees no CUDA device (CPU build, or hidden by CUDA_VISIBLE_DEVICES); "
            "install a CUDA build of torch"
        )
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    seen = {}
    for index in range(torch.cuda.device_count()):
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        if uuid is not None:
            seen[str(uuid).removeprefix("GPU-").lower()] = f"cuda:{index}"
    devices = tuple(seen.get(u.removeprefix("GPU-").lower(), "") for u in uuids)
    if not uuids or not seen:
        devices = tuple(f"cuda:{i}" for i in range(max(1, len(uuids))))
    elif not all(devices):
        raise EnergyModelError(
            "a metered GPU is not visible to CUDA; check CUDA_VISIBLE_DEVICES and --gpu"
        )
    torch.cuda.set_device(devices[0])
    for device in devices:
        torch.randn(8, device=device)
    torch.cuda.synchronize()
    software = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    if use_vllm:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    ops = _import("vllm._custom_ops", software) if use_vllm else None
    if ops is not None and not hasattr(torch.ops._C, "rms_norm"):  # it only warns
        software["missing vllm._C"] = "its compiled kernels did not load"
        ops = None
    attention = _import("vllm.vllm_flash_attn", software) if use_vllm else None
    moe = None
    if ops is not None:
        moe = _import("vllm.model_executor.layers.fused_moe.fused_moe", software)
    if moe is not None and not hasattr(torch.ops._moe_C, "moe_align_block_size"):
        software["missing vllm._moe_C"] = "its compiled kernels did not load"
        moe = None
    version = 0
    if attention is not None:
        known = [v for v in (3, 2) if attention.is_fa_version_supported(v)]
        version = known[0] if known else 0
    for name in ("triton", "vllm") if use_vllm else ():
        module = _import(name, software)
        if module is not None:
            software[name] = str(getattr(module, "__version__", "unknown"))
    software["flash_attention"] = str(version)
    return Bed(
        devices=devices,
        l2_bytes=float(torch.cuda.get_device_properties(devices[0]).L2_cache_size),
        ops=ops,
        attention=attention,
        attention_version=version,
        moe=moe,
        software=tuple(software.items()),
    )


def prepare(case: Case, bed: Bed) -> Work:
    """Build a case.

    Raises
    ------
    UnavailableError
        If the software it needs is missing.
    """
    # these modules build on this one
    from calibration.kernels.launchers_memory import MEMORY_LAUNCHERS  # noqa: PLC0415
    from calibration.kernels.launchers_model import MODEL_LAUNCHERS  # noqa: PLC0415
    from calibration.kernels.launchers_packed import PACKED_LAUNCHERS  # noqa: PLC0415

    known = {**LAUNCHERS, **MEMORY_LAUNCHERS, **MODEL_LAUNCHERS, **PACKED_LAUNCHERS}
    return known[case.launcher](case, bed)


def normal(bed: Bed, *shape: int, scale: float = 1.0, dtype: Any = torch.bfloat16) -> Any:
    """Tensor of normal random numbers on the bed's device."""
    tensor = torch.randn(*shape, device=bed.device, dtype=dtype)
    return tensor if scale == 1.0 else tensor.mul_(scale)


def sets(bed: Bed, set_bytes: float) -> int:
    """How many sets of buffers fill eight L2s (one is enough when it alone fills sixteen)."""
    if set_bytes >= 2 * _CACHE_MULTIPLE * bed.l2_bytes:
        return 1
    return min(_MOST_SETS, max(2, math.ceil(_CACHE_MULTIPLE * bed.l2_bytes / set_bytes)))


def sizes(case: Case, *names: str) -> list[int]:
    """Whole-number fields of the case's shape."""
    return [int(case.shape[name]) for name in names]


# -- matrix products -------------------------------------------------------------------


def gemm(case: Case, bed: Bed) -> Work:
    """Multiply (m, k) by the transpose of (n, k): a linear layer."""
    m, n, k, resident = sizes(case, "m", "n", "k", "resident")
    element = 2 if case.dtype == "bf16" else 1
    count = 1 if resident else sets(bed, n * k * element)
    x = normal(bed, m, k)
    weights = [normal(bed, n, k, scale=_WEIGHT_SCALE) for _ in range(count)]
    if case.dtype == "bf16":
        out = torch.empty(m, n, device=bed.device, dtype=torch.bfloat16)
        return Work(call=lambda i: torch.mm(x, weights[i].t(), out=out), rotation=count)
    if case.dtype == "int8":
        x8 = x.mul_(40).round_().clamp_(-127, 127).to(torch.int8)
        weights8 = [w.mul_(2000).round_().clamp_(-127, 127).to(torch.int8) for w in weights]
        return Work(call=lambda i: torch._int_mm(x8, weights8[i].t()), rotation=count)
    x8 = x.to(torch.float8_e4m3fn)
    weights8 = [w.to(torch.float8_e4m3fn) for w in weights]
    one = torch.ones((), device=bed.device, dtype=torch.float32)

    def scaled(i: int) -> Any:
        return torch._scaled_mm(
            x8,
            weights8[i].t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return Work(call=scaled, rotation=count)


# -- attention -------------------------------------------------------------------------


def _metadata(
    bed: Bed, case: Case, batch: int, query_tokens: int, context: int, cu: Any, used: Any
) -> tuple[Any, int]:
    """FlashAttention 3's schedule as vLLM computes it, and the bound on splits."""
    splits = _SPLITS if batch * query_tokens <= _GRAPH_TOKENS else 0
    if bed.attention_version != 3:
        return None, 0
    heads, kv_heads, width = sizes(case, "heads", "kv_heads", "head_dim")
    try:
        schedule = bed.attention.get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=query_tokens,
            max_seqlen_k=context,
            num_heads_q=heads,
            num_heads_kv=kv_heads,
            headdim=width,
            cache_seqlens=used,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=cu,
            page_size=BLOCK_TOKENS,
            causal=True,
            window_size=(-1, -1),
            num_splits=splits,
        )
    except (RuntimeError, TypeError, AttributeError):  # another vLLM: let the kernel schedule
        return None, 0
    return schedule, splits


def _paged_attention(
    case: Case, bed: Bed, batch: int, query_tokens: int, context: int, count: int
) -> Work:
    """Attention of vLLM over a paged KV cache whose blocks lie in random order."""
    heads, kv_heads, width = sizes(case, "heads", "kv_heads", "head_dim")
    per_sequence = math.ceil(context / BLOCK_TOKENS)
    blocks = count * batch * per_sequence
    cache = normal(bed, 2, blocks, BLOCK_TOKENS, kv_heads, width)
    key_cache, value_cache = cache.unbind(0)
    order = torch.randperm(blocks, device=bed.device).to(torch.int32)
    tables = order.view(count, batch, per_sequence)
    q = normal(bed, batch * query_tokens, heads, width)
    out = torch.empty_like(q)
    cu = torch.arange(batch + 1, device=bed.device, dtype=torch.int32) * query_tokens
    used = torch.full((batch,), context, device=bed.device, dtype=torch.int32)
    schedule, splits = _metadata(bed, case, batch, query_tokens, context, cu, used)

    def call(i: int) -> None:
        bed.attention.flash_attn_varlen_func(
            q=q,
            k=key_cache,
            v=value_cache,
            out=out,
            cu_seqlens_q=cu,
            max_seqlen_q=query_tokens,
            seqused_k=used,
            max_seqlen_k=context,
            softmax_scale=width**-0.5,
            causal=True,
            window_size=[-1, -1],
            block_table=tables[i],
            scheduler_metadata=schedule,
            num_splits=splits,
            fa_version=bed.attention_version,
        )

    return Work(
        call=call,
        rotation=count,
        backend=f"vllm-fa{bed.attention_version}",
        details={
            "block_tokens": BLOCK_TOKENS,
            "max_splits": splits,
            "scheduled_ahead": schedule is not None,
        },
    )


def _sdpa(case: Case, bed: Bed, batch: int, query_tokens: int, context: int, count: int) -> Work:
    """Torch's attention over a dense KV cache."""
    heads, kv_heads, width = sizes(case, "heads", "kv_heads", "head_dim")
    q = normal(bed, batch, heads, query_tokens, width)
    caches = [normal(bed, 2, batch, kv_heads, context, width) for _ in range(count)]
    attend = torch.nn.functional.scaled_dot_product_attention
    if query_tokens in (1, context):
        return Work(
            call=lambda i: attend(
                q, caches[i][0], caches[i][1], is_causal=query_tokens > 1, enable_gqa=True
            ),
            rotation=count,
            backend="torch-sdpa",
        )
    bias = importlib.import_module("torch.nn.attention.bias")
    mask = bias.causal_lower_right(query_tokens, context)
    whole = [c.repeat_interleave(heads // kv_heads, dim=2) for c in caches]
    return Work(
        call=lambda i: attend(q, whole[i][0], whole[i][1], attn_mask=mask),
        rotation=count,
        backend="torch-sdpa",
    )


def _attention(
    case: Case, bed: Bed, batch: int, query_tokens: int, context: int, count: int
) -> Work:
    """Attention by vLLM's kernel; by torch's where that is missing or refuses the case."""
    reason = "vLLM's attention is not installed"
    if bed.attention_version:
        try:
            work = _paged_attention(case, bed, batch, query_tokens, context, count)
            work.call(0)
            return work
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"[:300]
    work = _sdpa(case, bed, batch, query_tokens, context, count)
    return replace(work, details={"instead_of_vllm": reason})


def attention_decode(case: Case, bed: Bed) -> Work:
    """One query token per sequence against its whole KV cache."""
    batch, context = sizes(case, "batch", "context")
    return _attention(case, bed, batch, 1, context, sets(bed, case.hbm_bytes))


def attention_prefill(case: Case, bed: Bed) -> Work:
    """Causal attention of new tokens over themselves and `past` earlier ones."""
    batch, tokens, past = sizes(case, "batch", "tokens", "past")
    return _attention(case, bed, batch, tokens, tokens + past, 1)


def silu_mul(bed: Bed) -> tuple[Callable[[Any, Any], Any], str]:
    """Gated activation on (rows, 2 width) into (rows, width), and whose it is."""
    if bed.ops is not None:
        return torch.ops._C.silu_and_mul, "vllm"

    def plain(out: Any, x: Any) -> None:
        gate, up = x.chunk(2, dim=-1)
        torch.mul(torch.nn.functional.silu(gate), up, out=out)

    return plain, "torch"


LAUNCHERS: dict[str, Callable[[Case, Bed], Work]] = {
    "gemm": gemm,
    "attention_decode": attention_decode,
    "attention_prefill": attention_prefill,
}
