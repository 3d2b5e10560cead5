"""Tiles that kernels cut their work into, and what attention runs beyond its useful products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TILE = 128
"""Rows and columns of an output tile of a GEMM, and query rows of one of attention."""
SOFTMAX_WIDTH = 64.0
"""Head width whose products take as long as the exponential of a query-key pair: an SM does 16 a
clock (CUDA C++ Programming Guide, arithmetic throughput) and 4,096 dense 16-bit FLOPs (H100
whitepaper), so one is worth 256 FLOPs, the products over 64 elements. FlashAttention hides part
of it, which the fitted efficiency takes up."""
_HEAD_WIDTHS = (64.0, 96.0, 128.0, 192.0, 256.0)
"""Widths of a head that FlashAttention 3 has kernels for."""
_SLOW_WIDTH, _SLOWER = 96.0, 3.2
"""Width whose kernel decodes slower, and by what factor: 32 sequences of two blocks take 81 us in
the steps of Phi-3-mini (H200, tests/test_step_kernels.py); 44 by the width alone, 70 with it."""
_NARROW_WIDTH, _NARROW_TILE = 64.0, 192.0
"""Width of heads up to which attention has tiles of 192 query rows, and decode takes 192 keys at a
time: it counts as not causal there (FlashAttention 3, `tile_size_fwd_sm90`)."""


def _tile(width: Array | float) -> Array:
    return np.where(np.asarray(width) <= _NARROW_WIDTH, _NARROW_TILE, float(TILE))


def decode_key_block(width: Array | float) -> Array:
    """Keys that decode attention takes at a time for heads of `width` [-].

    The last ones of a sequence are padded to as many (FlashAttention 3 over a paged cache).
    """
    return _tile(width)


def decode_query_rows(queries: Array | float) -> Array:
    """Query rows that decode attention multiplies with each key of a KV head [-].

    The query heads of a KV head, and the queries of a sequence, lie in tiles of TILE rows and
    seldom fill one. Narrow heads lie in tiles of 192; windows and public tables of them come out
    nearer with TILE (p90 of the H100's tables 9.7 %, 11.6 with 192).
    """
    result: Array = np.ceil(np.asarray(queries) / TILE) * TILE
    return result


def prompt_tile_tokens(group: Array | float, width: Array | float) -> Array:
    """Tokens of a prompt whose queries fill one tile of attention [-].

    The query heads of a KV head, `group` of them, lie in tiles together (FlashAttention 3 packs
    them for sequences of different lengths), so that only the last tile of a prompt is not full.
    """
    return _tile(width) / group


def decode_head_width(width: Array | float) -> Array:
    """Width of a head whose time decode attention takes for heads of `width` [-].

    FlashAttention 3 has kernels for some widths. That for 96, which heads of 80 take too, has tiles
    of 192 rows and copies a paged cache in pieces of 64 bytes in place of 128.
    """
    given = np.asarray(width, dtype=float)
    kernels = np.searchsorted(_HEAD_WIDTHS, given)
    padded = np.append(_HEAD_WIDTHS, np.inf)[kernels]
    padded = np.where(np.isinf(padded), given, padded)  # wider heads: another library's
    result: Array = np.where(padded == _SLOW_WIDTH, _SLOWER * padded, padded)
    return result
