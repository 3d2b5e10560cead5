"""Builds products with quantised weights, as vLLM runs them; packed ones are unpacked to 16 bit.

`gemm_scaled` multiplies 8-bit numbers, each token's activations with a scale of their own (vLLM's
CUTLASS kernels), and `fp8_quant` makes them. `gemm_int4` is Machete (groups of 128 weights share a
scale: the layout of GPTQ and AWQ, and what vLLM chooses for it on Hopper), `moe_mxfp4` the Triton
kernels of gpt-oss, routing included, which they do themselves. Packed bits are random.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from calibration.kernels.cases import Case
from calibration.kernels.launchers import Bed, UnavailableError, normal, sets, sizes
from calibration.kernels.launchers_model import routing_counts, routings
from calibration.kernels.pump import Work
from energymodel.experts import packed_tile_rows
from energymodel.units import BYTES_PER_ELEMENT

_GROUP = 128
_BLOCK = 32
"""Weights that share a scale: of GPTQ's layout, of OCP microscaling's."""
_SCALE = 0.005
_SCALE_EXPONENT_BYTE = 120
_ROUTINGS = 8
_WEIGHT_SETS = 2
_MOE = "vllm.model_executor.layers"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnavailableError(f"{name} does not load ({type(error).__name__}: {error})") from error


def gemm_int4(case: Case, bed: Bed) -> Work:
    """Linear layer with 4-bit weights and 16-bit activations (vLLM's Machete)."""
    if bed.ops is None or not hasattr(torch.ops._C, "machete_mm"):
        raise UnavailableError("vLLM's Machete kernel is not installed")
    m, n, k = sizes(case, "m", "n", "k")
    kind = _module("vllm.scalar_type").scalar_types.uint4b8
    count = sets(bed, n * k * BYTES_PER_ELEMENT["int4"])
    weights, scales = [], []
    for _ in range(count):
        bits = torch.randint(-(2**31), 2**31, (n, k // 8), device=bed.device, dtype=torch.int32)
        packed = bed.ops.machete_prepack_B(
            bits.t(), a_type=torch.bfloat16, b_type=kind, group_scales_type=torch.bfloat16
        )
        weights.append(packed)
        scales.append(normal(bed, k // _GROUP, n, scale=_SCALE))
    x = normal(bed, m, k)
    multiply = bed.ops.machete_mm
    return Work(
        call=lambda i: multiply(
            a=x, b_q=weights[i], b_type=kind, b_group_scales=scales[i], b_group_size=_GROUP
        ),
        rotation=count,
        backend="vllm-machete",
    )


def gemm_scaled(case: Case, bed: Bed) -> Work:
    """Linear layer in fp8 with a scale per token and one for the weights (vLLM's CUTLASS)."""
    if bed.ops is None or not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        raise UnavailableError("vLLM's CUTLASS kernels are not installed")
    m, n, k = sizes(case, "m", "n", "k")
    count = sets(bed, float(n * k))
    weights = [normal(bed, n, k).to(torch.float8_e4m3fn).t() for _ in range(count)]
    x = normal(bed, m, k).to(torch.float8_e4m3fn)
    of_rows = torch.full((m, 1), _SCALE, device=bed.device, dtype=torch.float32)
    of_weights = torch.full((1, 1), _SCALE, device=bed.device, dtype=torch.float32)
    multiply = bed.ops.cutlass_scaled_mm
    return Work(
        call=lambda i: multiply(x, weights[i], of_rows, of_weights, torch.bfloat16),
        rotation=count,
        backend="vllm-cutlass",
    )


def fp8_quant(case: Case, bed: Bed) -> Work:
    """Activations to fp8, a scale per token (vLLM's own kernel)."""
    if bed.ops is None or not hasattr(torch.ops._C, "dynamic_per_token_scaled_fp8_quant"):
        raise UnavailableError("vLLM's quantisation kernels are not installed")
    tokens, width = sizes(case, "tokens", "hidden")
    count = sets(bed, 3.0 * tokens * width) if case.shape["rotated"] else 1
    x = [normal(bed, tokens, width) for _ in range(count)]
    quantise = bed.ops.scaled_fp8_quant
    return Work(
        call=lambda i: quantise(x[i], use_per_token_if_dynamic=True),
        rotation=count,
        backend="vllm",
    )


def moe_mxfp4(case: Case, bed: Bed) -> Work:
    """Fused experts with 4-bit weights (vLLM's Triton kernels for gpt-oss), routing included."""
    if bed.moe is None:
        raise UnavailableError("vLLM's fused MoE kernels are not installed")
    if not _module("vllm.utils.import_utils").has_triton_kernels():
        raise UnavailableError("triton_kernels is not installed")
    kernels = _module(f"{_MOE}.fused_moe.experts.gpt_oss_triton_kernels_moe")
    swizzle = _module(f"{_MOE}.quantization.utils.mxfp4_utils")._swizzle_mxfp4
    configured = _module(f"{_MOE}.fused_moe.config").mxfp4_w4a16_moe_quant_config
    ogs = _module("triton_kernels.matmul_ogs")
    tokens, experts, top_k, width, hidden = sizes(
        case, "tokens", "experts", "top_k", "width", "hidden"
    )

    def matrix(rows: int, columns: int) -> tuple[Any, Any, Any]:
        shape = experts, rows, columns // 2
        bits = torch.randint(0, 256, shape, device=bed.device, dtype=torch.uint8)
        scale = torch.full(
            (experts, rows, columns // _BLOCK),
            _SCALE_EXPONENT_BYTE,
            device=bed.device,
            dtype=torch.uint8,
        )
        packed, flex, packed_scale = swizzle(bits, scale)
        bias = torch.zeros(experts, rows, device=bed.device, dtype=torch.float32)
        precision = ogs.PrecisionConfig(
            weight_scale=packed_scale, flex_ctx=ogs.FlexCtx(rhs_data=flex)
        )
        return packed, precision, bias

    layers = []
    for _ in range(_WEIGHT_SETS):
        up, up_scale, up_bias = matrix(2 * width, hidden)
        down, down_scale, down_bias = matrix(hidden, width)
        config = configured(
            w1_scale=up_scale, w2_scale=down_scale, w1_bias=up_bias, w2_bias=down_bias
        )
        layers.append((up, down, config))
    chosen = routings(case, _ROUTINGS)
    counts, distinct = routing_counts(case, chosen)
    logits = torch.full((_ROUTINGS, tokens, experts), -8.0)
    logits.scatter_(2, chosen, torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)))
    logits = logits.to(device=bed.device, dtype=torch.bfloat16)
    x = normal(bed, tokens, hidden)
    tile = int(packed_tile_rows(np.array(float(tokens)), experts, top_k))
    rows = float((torch.ceil(counts / tile) * tile).sum(dim=1).mean())

    def call(i: int) -> Any:
        up, down, config = layers[i % _WEIGHT_SETS]
        return kernels.triton_kernel_moe_forward(
            x, up, down, logits[i], top_k, True, quant_config=config, global_num_experts=experts
        )

    return Work(
        call=call,
        rotation=_ROUTINGS,
        backend="vllm-triton-kernels",
        details={"distinct_experts": distinct, "expert_rows": rows, "config": {"BLOCK_M": tile}},
        counts={
            "hbm_bytes": distinct * 3.0 * width * hidden * BYTES_PER_ELEMENT["mxfp4"],
            "executed_flops": case.flops * rows / (tokens * top_k),
        },
    )


PACKED_LAUNCHERS = {
    "gemm_scaled": gemm_scaled,
    "fp8_quant": fp8_quant,
    "gemm_int4": gemm_int4,
    "moe_mxfp4": moe_mxfp4,
}
