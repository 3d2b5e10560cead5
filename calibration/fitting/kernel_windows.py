"""Reads the runner's kernel windows (`collect.py` writes them) as rows that the fit takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import KernelRows
from calibration.metering.windows import read_jsonl
from energymodel.errors import EnergyModelError
from energymodel.experts import saving_of_columns
from energymodel.operator_parts import compute_dtype
from energymodel.operators import NORM_PASSES
from energymodel.specs import GpuSpec
from energymodel.step_costs import pairs
from energymodel.tiles import (
    SOFTMAX_WIDTH,
    TILE,
    decode_head_width,
    decode_key_block,
    decode_query_rows,
    prompt_tile_tokens,
)

Array = NDArray[np.float64]

_L2_FOR_WEIGHTS = 0.5
"""Share of the L2 that an expert's weights may fill to stay there between blocks of rows; the rest
holds activations, as `Calibration.onchip_share_of_l2` has it. Of the models measured, experts fill
12 to 16 % of it, or 4.5 times all of it: no window depends on the number."""
_WEIGHT_BYTES = 2.0  # of an element; experts are measured in bf16
_CLASS_OF = {
    "gemm": "gemm",
    "gemm_scaled": "gemm_scaled",
    "gemm_packed": "gemm_packed",
    "moe": "moe",
    "moe_packed": "moe_packed",
    "attention_prefill": "attention_prefill",
    "attention_decode": "attention_decode",
    "elementwise": "elementwise",
    "sampling": "sampling",
    "communication": "communication",
}
"""Operator class of the model by the suite's class; windows of other classes are no kernels."""
_OTHER_KERNELS = (
    *("kv_write", "rotary", "embedding", "sample_random", "sample_sorted", "sample_top_p"),
    "fp8_quant",  # passes its rows twice: `operator_parts.QUANTISE_BYTES`
)
"""Launchers that are no rows of their class: writes scattered over the cache, gathers and drawing
random tokens are bound by other things than their bytes (two of them reach 0.8 TB/s where norms
reach 4), and are small parts of a step. Left out after their residuals had been seen, but for the
sorted draw and top-p, whose windows say what it costs as a whole (`energymodel/sampling.py`)."""


def read_windows(path: Path) -> list[dict[str, Any]]:
    """Records of valid kernel windows and idle states, in the order they were measured.

    Raises
    ------
    EnergyModelError
        If the file cannot be read, or holds no valid window.
    """
    records = read_jsonl(path)
    windows = [r for r in records if r.get("kind") == "case" and r.get("valid")]
    if not windows:
        raise EnergyModelError(f"{path}: holds no valid window; measure with `calibrate` first")
    return windows


def kernel_rows(
    windows: list[dict[str, Any]], gpu: GpuSpec, board_idle: Mapping[str, float] | None = None
) -> KernelRows:
    """Rows of one GPU's windows whose operator class the model knows; repeats are rows too.

    `board_idle` : watts that a board idles at above the mean of its kind; 0 where not named.
    """
    known = set(_CLASS_OF) - {"communication"}
    used = [w for w in windows if w["op_class"] in known and not _is_other(w)]
    return _rows(used, gpu, board_idle or {})


def _op_class(window: Mapping[str, Any]) -> str:
    """Class of a window's kernel; torch's products of int8 numbers are other kernels."""
    found = _CLASS_OF[window["op_class"]]
    return "gemm_int8" if found == "gemm" and window["dtype"] == "int8" else found


def _is_other(window: Mapping[str, Any]) -> bool:
    return any(window["launcher"].endswith(name) for name in _OTHER_KERNELS)


def link_rows(
    windows: list[dict[str, Any]], gpu: GpuSpec, board_idle: Mapping[str, float] | None = None
) -> KernelRows:
    """Rows of the all-reduces, watts of one GPU; what passes on the chip is part of the link's."""
    used = [
        {**w, "activation_bytes": 0.0, "power_watts": w["power_watts"] / w["gpus"]}
        for w in windows
        if w["op_class"] == "communication"
    ]
    return _rows(used, gpu, board_idle or {})


def _rows(used: list[dict[str, Any]], gpu: GpuSpec, board_idle: Mapping[str, float]) -> KernelRows:
    work = [_work(w) for w in used]

    def column(name: str) -> Array:
        return np.array([w.get(name, 0.0) for w in work])

    return KernelRows(
        name=tuple(w["case"] for w in used),
        op_class=tuple(_op_class(w) for w in used),
        family=tuple(f"{w['op_class']} {w['family']}" for w in used),
        dtype=tuple(compute_dtype(w["dtype"]) for w in used),
        board=tuple(w.get("board", "") for w in used),
        board_idle_watts=np.array([board_idle.get(w.get("board", ""), 0.0) for w in used]),
        flops=column("flops"),
        executed_flops=column("executed_flops"),
        hbm_bytes=np.array([w["hbm_bytes"] + _rereads(w, gpu) for w in used]),
        activation_bytes=np.array([w["activation_bytes"] for w in used]),
        link_bytes=np.array([w["link_bytes"] for w in used]),
        tiles=column("tiles"),
        block_bytes=column("block_bytes"),
        reductions=column("reductions"),
        key_blocks=column("key_blocks"),
        calls=np.ones(len(used)),
        gemm_rows=column("gemm_rows"),
        gemm_columns=column("gemm_columns"),
        gemm_k=column("gemm_k"),
        seconds=np.array([w["iteration_seconds"] for w in used]),
        watts=np.array([w["power_watts"] for w in used]),
        clock=np.array([w["window"]["sm_clock_hz"] / gpu.boost_clock_hz for w in used]),
    )


def reread_bytes(
    *, row_blocks: Array, distinct_experts: Array, matrix_bytes: Array, column_blocks: Array,
    gpu: GpuSpec,
) -> Array:  # fmt: skip
    """Bytes of experts' up-projections that fused experts read from device memory again [B].

    An untuned launch takes the column blocks of one block of rows after another. The next rows of
    the same expert find its matrix in the L2 if it fits there; or share it while it is read, if the
    SMs work at several blocks of rows at a time. Else they read it anew. All arguments broadcast;
    `matrix_bytes` and `column_blocks` are of one expert.

    `predict` leaves it out. Of the models known only Mixtral on one GPU has such experts: in 16 bit
    it does not fit an H100, on an H200 and in fp8 vLLM 0.22 ships tuned launches.
    """
    again = (matrix_bytes > _L2_FOR_WEIGHTS * gpu.l2_bytes) & (column_blocks > gpu.sm_count)
    more = np.maximum(row_blocks - distinct_experts, 0.0)
    result: Array = np.where(again, more * matrix_bytes, 0.0)
    return result


def _rereads(window: Mapping[str, Any], gpu: GpuSpec) -> float:
    """Bytes of weights that fused experts read more than once [B], see `reread_bytes`."""
    details, shape = window["details"], window["shape"]
    config = details.get("config", {})
    if window["op_class"] != "moe" or config.get("GROUP_SIZE_M") != 1:
        return 0.0
    again = reread_bytes(
        row_blocks=np.array(details["expert_rows"] / config["BLOCK_SIZE_M"]),
        distinct_experts=np.array(details["distinct_experts"]),
        matrix_bytes=np.array(2.0 * shape["width"] * shape["hidden"] * _WEIGHT_BYTES),
        column_blocks=np.array(2.0 * shape["width"] / config["BLOCK_SIZE_N"]),
        gpu=gpu,
    )
    return float(again)


def _work(window: Mapping[str, Any]) -> dict[str, float]:
    """Work that the model counts its own way, as `operators` does."""
    shape, kind = window["shape"], window["op_class"]
    if kind in ("gemm", "gemm_scaled", "gemm_packed"):
        return {
            "flops": window["flops"],
            "executed_flops": window["flops"],
            "tiles": shape["m"] * shape["n"] / TILE**2,
            "gemm_rows": shape["m"],
            "gemm_columns": shape["n"],
            "gemm_k": shape["k"],
        }
    if kind == "attention_prefill":
        group, past = shape["heads"] / shape["kv_heads"], shape["past"]
        tile = float(prompt_tile_tokens(group, shape["head_dim"]))
        whole, _ = pairs(float(past), float(shape["tokens"]), 0.0, tile)
        executed = shape["batch"] * whole
        rows = shape["batch"] * np.ceil(shape["tokens"] / tile) * tile
        width = shape["head_dim"] + SOFTMAX_WIDTH
        return {
            "flops": 4.0 * shape["heads"] * shape["head_dim"] * executed,
            "executed_flops": 4.0 * shape["heads"] * width * executed,
            "tiles": rows * shape["heads"] / TILE,
        }
    if kind == "attention_decode":
        key_block = float(decode_key_block(shape["head_dim"]))
        key_blocks = np.ceil(shape["context"] / key_block)
        rows = float(decode_query_rows(shape["heads"] / shape["kv_heads"]))
        tiles = shape["batch"] * shape["kv_heads"]
        width = float(decode_head_width(shape["head_dim"]))
        return {
            "flops": window["flops"],
            "executed_flops": 4.0 * tiles * rows * key_blocks * key_block * width,
            "tiles": tiles,
            "key_blocks": key_blocks,
        }
    if kind in ("moe", "moe_packed"):
        rows, config = window["details"]["expert_rows"], window["details"].get("config", {})
        saved = float(saving_of_columns(np.array(config.get("BLOCK_SIZE_N", 0))))
        width, hidden = shape["width"], shape["hidden"]
        return {
            "flops": window["flops"],
            "executed_flops": 6.0 * rows * width * hidden * (1.0 - saved),
            "tiles": rows * (2.0 * width + hidden) / TILE**2,
        }
    is_norm = window["launcher"] in NORM_PASSES
    return {"block_bytes": _block_elements(window) * 2.0, "reductions": float(is_norm)}


def _block_elements(window: Mapping[str, Any]) -> float:
    """Elements that a thread block reads and writes for a row that it passes alone."""
    launcher, shape = window["launcher"], window["shape"]
    if launcher == "silu_and_mul":
        return float(3.0 * shape["width"])
    return NORM_PASSES[launcher] * float(shape["hidden"]) if launcher in NORM_PASSES else 0.0
