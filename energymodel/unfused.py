"""Kernels that eager Transformers runs op by op where serving engines run one.

Counted in `modeling_llama.py` and `modeling_olmo.py` of Transformers 5. Kernels of PyTorch that
convert 16 to 32 bit, broadcast, or read what lies apart do not vectorise: an SM passes an element
in 0.4 ns then (`tile_seconds` of the class `elementwise`), whatever the memory gives. How many such
passes norms and the rotation take beyond the time of their bytes is read from the kernels of
prompts of Llama-3.1-8B, Qwen3-4B and OLMo-1B (H200, tests/test_step_kernels.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfused:
    """What takes the place of a fused kernel."""

    bytes_over_fused: float
    """Bytes passed over those of the fused kernel [-]."""
    kernels: float
    """Launches for each of the fused kernel [-]."""
    slow_passes_per_byte: float = 0.0
    """Elements passed slowly for each byte that the fused kernel passes [1/B]."""


UNFUSED: Mapping[str, Unfused] = {
    # to 32 bit, square, average, scale, back, weigh: 36 B; the residual added: 6 B
    "norm": Unfused(bytes_over_fused=42 / 8, kernels=9, slow_passes_per_byte=1.9 / 8),
    "qk_norm": Unfused(bytes_over_fused=36 / 4, kernels=8, slow_passes_per_byte=1.9 / 4),
    # one kernel in 32 bit, converted before and after: 20 B; the residual
    "layer_norm": Unfused(bytes_over_fused=26 / 8, kernels=4, slow_passes_per_byte=0.7 / 8),
    # multiply twice, negate a half, concatenate, add; concatenate to the cache: 18 B
    "rotary_and_kv_write": Unfused(
        bytes_over_fused=18 / 4, kernels=6, slow_passes_per_byte=3.6 / 4
    ),
    # SiLU, product
    "activation": Unfused(bytes_over_fused=10 / 6, kernels=2),
}
"""By the name of the operator; `layer_norm` is a `norm` of a model with layer norms."""
