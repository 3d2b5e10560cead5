"""Small made-up models, a GPU and a calibration for tests that must not follow the data files."""

from __future__ import annotations

from energymodel.calibrations import (
    Calibration,
    IntervalCalibration,
    KernelCalibration,
    StackCalibration,
)
from energymodel.deployment import STACKS
from energymodel.specs import AttentionSpec, GpuSpec, LayerGroup, MlpSpec, ModelSpec, MoeSpec


def llama_8b() -> ModelSpec:
    """Llama-3.1-8B by its published config."""
    attention = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, value_head_dim=128)
    layer = LayerGroup(
        count=32,
        attention=attention,
        feed_forward=MlpSpec(intermediate_size=14336),
        norm_elements=2 * 4096,
    )
    return ModelSpec(
        name="llama-8b",
        architecture="LlamaForCausalLM",
        hidden_size=4096,
        vocab_size=128256,
        tied_embeddings=False,
        max_model_len=131072,
        layers=(layer,),
        final_norm_elements=4096,
    )


def tiny(*, experts: int = 0, window: int | None = None) -> ModelSpec:
    """A model of two layers: dense or with experts, optionally one layer with a window."""
    feed_forward: MlpSpec | MoeSpec = MlpSpec(intermediate_size=512)
    if experts:
        feed_forward = MoeSpec(
            num_experts=experts, experts_per_token=2, expert_intermediate_size=128
        )

    def group(width: int | None) -> LayerGroup:
        attention = AttentionSpec(
            num_heads=4, num_kv_heads=2, head_dim=64, value_head_dim=64, window_tokens=width
        )
        return LayerGroup(
            count=1, attention=attention, feed_forward=feed_forward, norm_elements=512
        )

    return ModelSpec(
        name="tiny",
        architecture="LlamaForCausalLM",
        hidden_size=256,
        vocab_size=1000,
        tied_embeddings=True,
        max_model_len=4096,
        layers=(group(None), group(window)),
        final_norm_elements=256,
    )


def gpu(**changes: object) -> GpuSpec:
    """A GPU with round numbers."""
    values: dict[str, object] = {
        "name": "round",
        "title": "Round GPU",
        "aliases": (),
        "architecture": "test",
        "peak_flops_per_s": {"bf16": 1e15, "fp16": 1e15, "fp8": 2e15},
        "hbm_bytes": 80e9,
        "hbm_bytes_per_s": 3e12,
        "l2_bytes": 50e6,
        "link_bytes_per_s": 450e9,
        "tdp_watts": 700.0,
        "sm_count": 132,
        "boost_clock_hz": 2e9,
        "idle_watts": None,
        "sources": {},
    }
    return GpuSpec(**(values | changes))  # type: ignore[arg-type]


def ideal_kernel(**changes: float) -> KernelCalibration:
    """A kernel class without losses."""
    values = {
        "compute_efficiency": 1.0,
        "memory_efficiency": 1.0,
        "call_seconds": 0.0,
        "sharpness": 64.0,
    }
    return KernelCalibration(**(values | changes))


KERNEL_CLASSES = (
    "gemm",
    "gemm_scaled",
    "gemm_packed",
    "moe_packed",
    "moe",
    "attention_prefill",
    "attention_decode",
    "elementwise",
    "sampling",
    "communication",
)


def calibration(**changes: object) -> Calibration:
    """A calibration with round numbers and no losses; no power limit unless given."""
    stack = StackCalibration(
        step_host_seconds=2e-4,
        sequence_host_seconds=1e-5,
        launch_seconds=5e-6,
        kernels_per_layer=10,
        step_gap_seconds=5e-5,
        start_gap_seconds=1e-4,
        request_host_seconds=2e-5,
    )
    interval = IntervalCalibration(level=0.9, low=0.9, high=1.1, basis="made up")
    values: dict[str, object] = {
        "gpu": "round",
        "origin": "datasheet",
        "cold_idle_watts": 50.0,
        "context_idle_watts": 70.0,
        "polling_idle_watts": 110.0,
        "base_watts": 120.0,
        "joules_per_flop": {"bf16": 5e-13, "fp16": 5e-13, "fp8": 3e-13},
        "joules_per_hbm_byte": 8e-11,
        "joules_per_onchip_byte": 1e-11,
        "joules_per_link_byte": 5e-11,
        "power_cap_watts": 1e6,
        "clock_energy_exponent": 1.5,
        "kernels": {name: ideal_kernel() for name in KERNEL_CLASSES},
        "stacks": dict.fromkeys(STACKS, stack),
        "intervals": dict.fromkeys(STACKS, interval),
        "provenance": {},
    }
    return Calibration(**(values | changes))  # type: ignore[arg-type]
