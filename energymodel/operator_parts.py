"""One operator of a step, and the kinds that models are put together from.

Statistics are those of `operators.STATS`, by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from energymodel.tiles import TILE
from energymodel.units import ACTIVATION_BYTES, BYTES_PER_ELEMENT

EIGHT_BIT = ("fp8", "int8")
"""Compute dtypes of 8 bits."""
WEIGHTS_ONLY = frozenset({"int4", "mxfp4"})
"""Formats of stored weights that are unpacked to 16 bit before they are multiplied."""
QUANTISE_BYTES = 5.0
"""What making an element of 8-bit activations passes [B]: its 16 bits twice, the first time for the
largest of the row, and its 8 bits (vLLM 0.22, `dynamic_per_token_scaled_fp8_quant`)."""


def compute_dtype(weight_dtype: str) -> str:
    """Dtype of the matrix units for a weight dtype: weight-only formats compute in bf16."""
    return "bf16" if weight_dtype in WEIGHTS_ONLY else weight_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """Work of kernels of one kind, coefficients by statistic; see `operators.OperatorTable`."""

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


def operator_class(op_class: str, dtype: str) -> str:
    """Operator class of products with weights of a dtype: each is another library's."""
    if dtype in WEIGHTS_ONLY:
        return f"{op_class}_packed"
    return "gemm_scaled" if op_class == "gemm" and dtype in EIGHT_BIT else op_class


def gemm(name: str, n: float, k: float, count: float, dtype: str, per: str = "tokens") -> Operator:
    """`count` products of a row for each unit of the statistic `per` with (k, n) weights."""
    work = {per: 2.0 * n * k * count}
    return Operator(
        name=name,
        op_class=operator_class("gemm", dtype),
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


def elementwise(
    name: str,
    bytes_each: float,
    count: float,
    kernels: float,
    per: str = "tokens",
    block_bytes: float = 0.0,
    reductions: float = 0.0,
) -> Operator:
    """`count` times `kernels` that pass bytes: `bytes_each` of them for each unit of `per`.

    `block_bytes`, `reductions` : as in `operators.OperatorTable`.
    """
    return Operator(
        name=name,
        op_class="elementwise",
        compute_dtype="bf16",
        calls=count * kernels,
        activation_bytes={per: bytes_each * count},
        block_bytes=block_bytes,
        reductions=reductions,
    )


def quantise(
    name: str, width: float, count: float, kernels: int, bytes_each: float = QUANTISE_BYTES
) -> Operator:
    """Activations of products in 8 bit: a kernel scales each row by its largest element."""
    return elementwise(f"{name}_quantise", width * bytes_each, count, kernels)
