"""Sorts requests into bins of input and output length, exactly or as the paper does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_REASONS = ("input_too_long", "output_too_long", "both_too_long", "no_tokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BinGrid:
    """Upper edges of bins; a bin holds lengths in (previous edge, edge], the first from 1."""

    name: str
    input_edges: Ints
    """Longest input of each bin [token], shape (i,), ascending."""
    output_edges: Ints
    """Longest output of each bin [token], shape (o,), ascending."""

    def __post_init__(self) -> None:
        """Refuse edges that are not ascending positive numbers."""
        for edges in (self.input_edges, self.output_edges):
            if edges.size == 0 or edges[0] < 1 or np.any(np.diff(edges) <= 0):
                raise ValueError(f"bin edges must be positive and ascending, not {edges.tolist()}")


PAPER_GRID = BinGrid(
    name="paper",
    input_edges=np.array([32, 128, 256, 512, 1024, 2048, 4096, 8192]),
    output_edges=np.array([8, 16, 32, 64, 128, 256, 512]),
)
"""The bins listed in section 4.1 of Fernandez et al., ACL 2025 (arXiv 2504.17674).

The paper's formula, 2^m for 4 <= m <= 13, would add 16 and 64 to the inputs; the list is used here.
"""

EXACT_GRID = BinGrid(
    name="exact",
    input_edges=2 ** np.arange(4, 25),
    output_edges=2 ** np.arange(3, 25),
)
"""Powers of two up to beyond the longest length that the trace reader accepts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Binned:
    """Which bin each of n requests is in, and the b bins that hold any, by input, then output."""

    grid: BinGrid
    input_bin: Ints
    """Index into `grid.input_edges`, shape (n,); -1 if the grid leaves the request out."""
    output_bin: Ints
    """Index into `grid.output_edges`, shape (n,); -1 if the grid leaves the request out."""
    bin_index: Ints
    """Index into the arrays below, shape (n,); -1 if the grid leaves the request out."""
    input_low: Ints
    """Shortest input a bin may hold [token], shape (b,)."""
    input_high: Ints
    """Longest input a bin may hold [token], shape (b,)."""
    output_low: Ints
    """Shortest output a bin may hold [token], shape (b,)."""
    output_high: Ints
    """Longest output a bin may hold [token], shape (b,)."""
    requests: Ints
    """Requests in each bin, shape (b,), at least 1."""
    mean_input: NDArray[np.float64]
    """Mean input of a bin's requests [token], shape (b,)."""
    mean_output: NDArray[np.float64]
    """Mean output of a bin's requests [token], shape (b,)."""
    excluded: dict[str, int]
    """Requests left out, by reason: `input_too_long`, `output_too_long`, `both_too_long`,
    `no_tokens`. Each counts once; reasons that did not occur are absent."""


def bin_requests(input_tokens: Ints, output_tokens: Ints, grid: BinGrid) -> Binned:
    """Sort requests into the bins of a grid; every request is in a bin or counted as excluded.

    Parameters
    ----------
    input_tokens, output_tokens : (n,) arrays [token]
    grid : BinGrid

    Returns
    -------
    Binned
        With the mean lengths of each bin, so that bin sums add up to the trace's exactly.
    """
    inputs = np.asarray(input_tokens, dtype=np.int64)
    outputs = np.asarray(output_tokens, dtype=np.int64)
    left_out, excluded = _excluded(inputs, outputs, grid)
    input_bin = np.where(left_out, -1, np.searchsorted(grid.input_edges, inputs))
    output_bin = np.where(left_out, -1, np.searchsorted(grid.output_edges, outputs))

    columns = grid.output_edges.size
    keys, index = np.unique((input_bin * columns + output_bin)[~left_out], return_inverse=True)
    bin_index = np.full(inputs.shape, -1)
    bin_index[~left_out] = index
    requests = np.bincount(index, minlength=keys.size)
    rows, cols = keys // columns, keys % columns
    return Binned(
        grid=grid,
        input_bin=input_bin,
        output_bin=output_bin,
        bin_index=bin_index,
        input_low=_lower_edges(grid.input_edges)[rows],
        input_high=grid.input_edges[rows],
        output_low=_lower_edges(grid.output_edges)[cols],
        output_high=grid.output_edges[cols],
        requests=requests,
        mean_input=np.bincount(index, inputs[~left_out], keys.size) / requests,
        mean_output=np.bincount(index, outputs[~left_out], keys.size) / requests,
        excluded=excluded,
    )


def ceil_to_paper(
    input_tokens: Ints, output_tokens: Ints
) -> tuple[Ints, Ints, NDArray[np.bool_], dict[str, int]]:
    """Lengths rounded up to the paper's bins: I* = min{I in bins: I >= i}, O* likewise.

    Parameters
    ----------
    input_tokens, output_tokens : (n,) arrays [token]

    Returns
    -------
    input_ceiled, output_ceiled : (n,) arrays [token], -1 where excluded
    excluded : (n,) boolean array
        Inputs above 8192 or outputs above 512 tokens, which the paper leaves out.
    counts : dict
        Excluded requests by reason, as in `Binned.excluded`.

    References
    ----------
    Fernandez et al., ACL 2025 (arXiv 2504.17674), section 4.1.
    """
    inputs = np.asarray(input_tokens, dtype=np.int64)
    outputs = np.asarray(output_tokens, dtype=np.int64)
    left_out, counts = _excluded(inputs, outputs, PAPER_GRID)
    ceiled = [
        np.where(left_out, -1, edges[np.minimum(np.searchsorted(edges, lengths), edges.size - 1)])
        for edges, lengths in ((PAPER_GRID.input_edges, inputs), (PAPER_GRID.output_edges, outputs))
    ]
    return ceiled[0], ceiled[1], left_out, counts


def _lower_edges(edges: Ints) -> Ints:
    return np.concatenate([[1], edges[:-1] + 1])


def _excluded(
    inputs: Ints, outputs: Ints, grid: BinGrid
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Mask of the requests that a grid leaves out, and their counts by reason."""
    empty = (inputs < 1) | (outputs < 1)
    long_input = inputs > grid.input_edges[-1]
    long_output = outputs > grid.output_edges[-1]
    masks = (
        long_input & ~long_output & ~empty,
        long_output & ~long_input & ~empty,
        long_input & long_output & ~empty,
        empty,
    )
    counts = [int(mask.sum()) for mask in masks]
    found = {reason: count for reason, count in zip(_REASONS, counts, strict=True) if count}
    return long_input | long_output | empty, found
