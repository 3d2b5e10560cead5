"""What a batch asks of the fused expert kernel: experts read, rows run, bytes passed.

Token-choice routing (Fedus et al. 2021); the kernels are vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from energymodel.units import ACTIVATION_BYTES

Array = NDArray[np.float64]


def distinct_experts(tokens: Array, num_experts: int, experts_per_token: int) -> Array:
    """Expected experts that at least one of `tokens` tokens chose, routing uniform.

    E (1 - (1 - k/E)^T): each token leaves one given expert out with probability 1 - k/E.
    """
    share = experts_per_token / num_experts
    result: Array = num_experts * -np.expm1(tokens * np.log1p(-min(share, 1.0 - 1e-12)))
    return result


_TILE_ROWS = ((32, 16), (96, 32), (512, 64), (np.inf, 128))


Tiles = Sequence[tuple[float, int, int]]
"""Launches tuned for a GPU, as `MoeSpec.tiles`."""
_WIDE_COLUMNS, _WIDE_SPEEDUP = 256, 1.08
"""Columns of a tile from which on products run faster than with 64 or 128, and by what factor:
windows of tuned launches beside those by the rule (two H200s; held out by model, the median error
of experts' seconds falls from 4.3 to 3.6 %)."""


def wide_tile_saving(tokens: Array, tuned: Tiles = ()) -> Array:
    """Share of the experts' time of computing that wide tiles save, by tokens of the step [-].

    Only tuned launches have them; the engine's rule takes 64 columns, or 128.
    """
    if not tuned:
        return np.zeros_like(tokens)
    last, _, columns = np.array(tuned, dtype=float).T
    return saving_of_columns(columns[np.searchsorted(last, tokens)])


def saving_of_columns(columns: Array) -> Array:
    """Share of the time of computing that tiles of so many columns save [-]."""
    result: Array = np.where(columns >= _WIDE_COLUMNS, 1.0 - 1.0 / _WIDE_SPEEDUP, 0.0)
    return result


def moe_tile_rows(tokens: Array, tuned: Tiles = ()) -> Array:
    """Rows of a tile of the fused expert kernel by tokens of the step.

    vLLM 0.22, `fused_moe.get_default_config` for 16-bit and per-tensor fp8 weights: 16 up to 32
    tokens, 32 up to 96, 64 up to 512, then 128; or those of launches `tuned` for the GPU.
    """
    last, rows = np.array(tuned or _TILE_ROWS, dtype=float).T[:2]
    result: Array = rows[np.searchsorted(last, tokens)]
    return result


def packed_tile_rows(tokens: Array, num_experts: int, experts_per_token: int) -> Array:
    """Rows of a tile of the kernels that unpack experts (gpt-oss) by tokens of the step.

    triton_kernels as in vLLM 0.22, `opt_flags`: the tokens of an expert on average, rounded up to a
    power of two, from 16 to 128.
    """
    mean = np.maximum(np.floor(tokens * experts_per_token / num_experts), 1.0)
    result: Array = np.clip(2.0 ** np.ceil(np.log2(mean)), 16.0, 128.0)
    return result


def expert_rows(
    tokens: Array,
    num_experts: int,
    experts_per_token: int,
    *,
    packed: bool = False,
    tuned: Tiles = (),
) -> Array:
    """Expected rows of the fused expert kernel, each expert's rows padded to whole tiles.

    B * E * sum_j P(n > j B), n ~ Binomial(T, k/E) taken as a normal whose tail is
    approximated by the logistic 1 / (1 + exp(1.702 z)) (Bowling et al. 2009, error < 0.01);
    the j = 0 term is the exact share of experts that are touched at all.
    """
    if packed:
        tile = packed_tile_rows(tokens, num_experts, experts_per_token)
    else:
        tile = moe_tile_rows(tokens, tuned)
    share = experts_per_token / num_experts
    mean = tokens * share
    deviation = np.sqrt(np.maximum(mean * (1.0 - share), 1e-12))
    tiles = distinct_experts(tokens, num_experts, experts_per_token) / num_experts
    most = int(np.max((mean + 4.0 * deviation) / tile, initial=0.0)) + 1
    for j in range(1, most + 1):
        z = np.clip((j * tile + 0.5 - mean) / deviation, -40.0, 40.0)
        tiles = tiles + 1.0 / (1.0 + np.exp(1.702 * z))
    result: Array = np.maximum(tiles * tile * num_experts, tokens * experts_per_token)
    return result


def expert_activation_bytes(hidden: float, up: float, width: float, top_k: float) -> float:
    """Activations of the fused experts per token [B].

    Both GEMMs read and write their rows, the activation between them does too, and the top-k
    outputs are summed.
    """
    return (2.0 * hidden + 2.0 * up + 2.0 * width + hidden) * top_k * ACTIVATION_BYTES
