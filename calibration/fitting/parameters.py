"""What is fitted: the parameters of a calibration, their priors and bounds.

A fit starts at the values of the calibration it is given. The H100's starts from `data/start`:
kernel seconds fitted to public tables, everything else a guess, hence the priors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from energymodel.calibrations import Calibration

WIDE = 3.0
"""Standard deviation of a prior that says next to nothing: a factor of 20 either way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A number of the calibration that is fitted; several places may share it."""

    paths: tuple[str, ...]
    """Dotted fields of `Calibration`, `kernels.gemm.memory_efficiency`."""
    prior: float
    """Standard deviation of the logarithm of the start value [-]."""
    low: float = 1e-15
    high: float = 1e4


def _stack(field: str, *stacks: str, prior: float = WIDE) -> Parameter:
    return Parameter(paths=tuple(f"stacks.{s}.{field}" for s in stacks), prior=prior)


_QUANTISED = ("gemm_int8", "gemm_scaled", "gemm_packed", "moe_packed")
_KERNELS = (
    *("gemm", "moe", *_QUANTISED),
    *("attention_prefill", "attention_decode", "elementwise", "sampling"),
)

PARAMETERS: tuple[Parameter, ...] = (
    # host and gaps: nothing but these runs tells them
    _stack("step_host_seconds", "vllm", "vllm-eager"),
    _stack("sequence_host_seconds", "vllm", "vllm-eager"),
    _stack("request_host_seconds", "vllm", "vllm-eager"),
    _stack("start_gap_seconds", "vllm", "vllm-eager"),
    _stack("step_gap_seconds", "vllm", "vllm-eager", prior=1.0),
    _stack("launch_seconds", "vllm"),
    _stack("piecewise_kernels", "vllm", prior=1.0),
    _stack("launch_seconds", "vllm-eager"),
    # 20.3 ms a decode step of lengths met before (llama-3.2-1b) over its 16 layers of 70 kernels
    _stack("launch_seconds", "transformers", "transformers-compile", prior=0.05),
    _stack("start_gap_seconds", "transformers", "transformers-compile", prior=1.0),
    _stack("step_gap_seconds", "transformers-compile", prior=1.0),
    _stack("layer_gap_seconds", "transformers-compile", prior=1.0),
    _stack("parallel_host_seconds", "vllm", "vllm-eager", prior=1.0),
    _stack("parallel_sequence_share", "vllm", "vllm-eager", prior=0.5),
    _stack("round_sequence_host_seconds", "vllm", "vllm-eager", prior=1.5),
    _stack("round_host_seconds", "vllm", "vllm-eager", prior=1.0),
    # kernel seconds: other boards' tables are a good start
    # steps less their kernels leave 0.2 to 0.6 us a kernel (docs/kernels.md, "Kernels of a step")
    Parameter(paths=("kernel_gap_seconds",), prior=0.2),
    Parameter(paths=("kernels.gemm.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.gemm.memory_efficiency",), prior=0.05, high=1.1),
    Parameter(paths=("kernels.gemm.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.gemm.sharpness",), prior=0.5, low=1.0, high=16.0),
    Parameter(paths=("kernels.gemm.wave_exponent",), prior=1.0, low=1e-3, high=1.0),
    Parameter(paths=("kernels.gemm.tile_seconds",), prior=0.6),
    Parameter(paths=("kernels.gemm.split_seconds",), prior=1.0),
    Parameter(paths=("kernels.gemm.eight_bit_efficiency",), prior=0.3, high=1.5),
    Parameter(paths=("kernels.moe.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.moe.memory_efficiency",), prior=0.1, high=1.1),
    Parameter(paths=("kernels.moe.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.moe.sharpness",), prior=0.5, low=1.0, high=16.0),
    Parameter(paths=("kernels.moe.tile_seconds",), prior=0.6),
    # quantised weights, as vLLM serves them: no public table says how fast
    *(
        Parameter(paths=(f"kernels.{c}.{field}",), prior=prior, low=low, high=high)
        for c in _QUANTISED
        for field, prior, low, high in (
            ("compute_efficiency", 0.5, 1e-2, 1.3),
            ("memory_efficiency", 0.5, 1e-2, 1.1),
            ("call_seconds", 1.0, 1e-7, 1e-3),
            ("tile_seconds", 1.0, 1e-9, 1e-3),
        )
    ),
    # experts are unpacked, then multiplied: their times add up (a sharpness of 1), as int8's do
    Parameter(paths=("kernels.gemm_scaled.sharpness",), prior=0.5, low=1.0, high=16.0),
    Parameter(paths=("kernels.gemm_packed.sharpness",), prior=0.5, low=1.0, high=16.0),
    Parameter(paths=("kernels.attention_prefill.compute_efficiency",), prior=0.15, high=1.3),
    Parameter(paths=("kernels.attention_prefill.call_seconds",), prior=0.5),
    Parameter(paths=("kernels.attention_prefill.tile_seconds",), prior=0.6),
    Parameter(paths=("kernels.attention_decode.compute_efficiency",), prior=0.5, high=1.3),
    Parameter(paths=("kernels.attention_decode.memory_efficiency",), prior=0.1, high=1.1),
    Parameter(paths=("kernels.attention_decode.call_seconds",), prior=0.5),
    Parameter(paths=("kernels.attention_decode.tile_seconds",), prior=0.6),
    Parameter(paths=("kernels.attention_decode.split_seconds",), prior=1.0),
    # vLLM's own all-reduce in a graph takes 4.9 us on the A100 (data/start/h100.json)
    Parameter(paths=("kernels.communication.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.communication.memory_efficiency",), prior=0.3, high=1.1),
    # all-reduces on two GPUs tell it; runs would have it pay for what GPUs do besides
    Parameter(paths=("joules_per_link_byte",), prior=0.1),
    Parameter(paths=("onchip_speedup",), prior=0.3),
    Parameter(paths=("kernels.elementwise.memory_efficiency",), prior=0.3, high=1.1),
    Parameter(paths=("kernels.elementwise.call_seconds",), prior=0.3),
    Parameter(paths=("kernels.elementwise.sharpness",), prior=0.2, low=1.0, high=16.0),
    Parameter(paths=("kernels.elementwise.block_seconds_per_byte",), prior=0.5),
    Parameter(paths=("kernels.elementwise.block_joules_per_byte",), prior=0.5),
    Parameter(paths=("kernels.elementwise.reduction_seconds",), prior=0.5),
    # 0.38 to 0.41 ns in copies and products of Transformers' prompts (calibration/data/start)
    Parameter(paths=("kernels.elementwise.tile_seconds",), prior=0.03),
    Parameter(paths=("kernels.elementwise.hbm_latency_seconds",), prior=0.5),
    Parameter(paths=("kernels.gemm.hbm_latency_seconds",), prior=0.5),
    Parameter(paths=("kernels.sampling.call_seconds",), prior=1.0),
    # energy
    Parameter(paths=("joules_per_flop.bf16", "joules_per_flop.fp16"), prior=WIDE),
    Parameter(paths=("joules_per_flop.fp8", "joules_per_flop.int8"), prior=1.0),
    Parameter(paths=("joules_per_hbm_byte",), prior=WIDE),
    Parameter(paths=("joules_per_onchip_byte",), prior=1.0),
    # windows hardly tell it; bursts of products do (1.36 to 1.43, tests/test_limit_table.py; the
    # start's 1.1 is a first estimate of the same)
    Parameter(paths=("clock_energy_exponent",), prior=0.15, low=0.2, high=8.0),
    *(Parameter(paths=(f"kernels.{c}.active_watts",), prior=0.5, low=0.1) for c in _KERNELS),
    *(
        Parameter(paths=(f"kernels.{c}.flop_energy_factor",), prior=0.3)
        for c in ("moe", *_QUANTISED, "attention_prefill", "attention_decode")
    ),
)


def parameters_for(
    start: Calibration,
    *,
    classes: Collection[str],
    dtypes: Collection[str],
    stacks: Collection[str],
    tensor_parallel: bool,
) -> list[Parameter]:
    """Parameters that measurements of these operator classes, dtypes and stacks tell something of.

    `stacks` : of the serving runs, `tensor_parallel` : whether some ran on several GPUs. Parameters
    that are 0 at the start stay so.
    """
    chosen = []
    for parameter in PARAMETERS:
        path = parameter.paths[0]
        holder, _, field = path.partition(".")
        group = field.partition(".")[0]
        if holder == "stacks":
            told = any(p.split(".")[1] in stacks for p in parameter.paths)
        elif "communication" in path or "link" in path:
            told = tensor_parallel
        elif holder == "kernels":
            told = group in classes or (bool(stacks) and group not in _QUANTISED)
        elif holder == "joules_per_flop":
            told = bool(stacks) or any(p.split(".")[1] in dtypes for p in parameter.paths)
        else:
            told = bool(stacks) or holder != "kernel_gap_seconds"
        if group == "fp8":
            told = told and "fp8" in dtypes
        known = tuple(p for p in parameter.paths if _holds(start, p))
        if told and known and value_at(start, known[0]) > 0.0:  # 0 has no logarithm
            chosen.append(replace(parameter, paths=known))
    return chosen


def _holds(calibration: Calibration, path: str) -> bool:
    try:
        value_at(calibration, path)
    except KeyError:
        return False
    return True


def value_at(calibration: Calibration, path: str) -> float:
    """Number at a dotted path of the calibration."""
    value: Any = calibration
    for part in path.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    return float(value)


def with_values(calibration: Calibration, values: Mapping[str, float]) -> Calibration:
    """Calibration with the numbers at the given dotted paths replaced."""
    changes: dict[str, Any] = {}
    for path, value in values.items():
        *holders, name = path.split(".")
        inside = changes
        for holder in holders:
            inside = inside.setdefault(holder, {})
        inside[name] = value
    changed: Calibration = _replaced(calibration, changes)
    return changed


def _replaced(holder: Any, changes: Mapping[str, Any]) -> Any:
    is_mapping = isinstance(holder, Mapping)
    new = dict(changes)
    for name, change in changes.items():
        if isinstance(change, dict):
            new[name] = _replaced(holder[name] if is_mapping else getattr(holder, name), change)
    return {**holder, **new} if is_mapping else replace(holder, **new)
