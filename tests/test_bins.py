from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.bins import EXACT_GRID, PAPER_GRID, BinGrid, bin_requests, ceil_to_paper

lengths = st.integers(0, 20_000)
pairs = st.lists(st.tuples(lengths, lengths), max_size=50)
grids = st.builds(
    lambda a, b: BinGrid(name="any", input_edges=np.sort(a), output_edges=np.sort(b)),
    *[st.lists(st.integers(1, 9000), min_size=1, max_size=8, unique=True).map(np.array)] * 2,
)


def columns(rows):
    both = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def test_the_papers_grid_is_its_list():
    # Section 4.1 of arXiv 2504.17674: 8 x 7 = 56 cells
    assert PAPER_GRID.input_edges.tolist() == [32, 128, 256, 512, 1024, 2048, 4096, 8192]
    assert PAPER_GRID.output_edges.tolist() == [8, 16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize(
    ("length", "input_ceiled", "output_ceiled"),
    [(1, 32, 8), (8, 32, 8), (9, 32, 16), (32, 32, 32), (33, 128, 64), (512, 512, 512)],
)
def test_closest_ceiling_bin(length, input_ceiled, output_ceiled):
    inputs, outputs, excluded, counts = ceil_to_paper(np.array([length]), np.array([length]))
    assert (inputs.tolist(), outputs.tolist()) == ([input_ceiled], [output_ceiled])
    assert not excluded.any()
    assert counts == {}


def test_the_papers_exclusions_are_counted_by_kind():
    inputs = np.array([8192, 8193, 100, 9000, 0])
    outputs = np.array([512, 512, 513, 9000, 9000])
    ceiled_in, ceiled_out, excluded, counts = ceil_to_paper(inputs, outputs)
    assert excluded.tolist() == [False, True, True, True, True]
    assert ceiled_in.tolist() == [8192, -1, -1, -1, -1]
    assert ceiled_out.tolist() == [512, -1, -1, -1, -1]
    expected = {"input_too_long": 1, "output_too_long": 1, "both_too_long": 1, "no_tokens": 1}
    assert counts == expected
    assert bin_requests(inputs, outputs, PAPER_GRID).excluded == expected


@given(pairs)
def test_ceiling_never_shortens_and_agrees_with_the_bins(rows):
    inputs, outputs = columns(rows)
    ceiled_in, ceiled_out, excluded, counts = ceil_to_paper(inputs, outputs)
    binned = bin_requests(inputs, outputs, PAPER_GRID)
    assert sum(counts.values()) == excluded.sum()
    np.testing.assert_array_equal(
        excluded, (inputs < 1) | (outputs < 1) | (inputs > 8192) | (outputs > 512)
    )
    kept = ~excluded
    assert np.all(ceiled_in[kept] >= inputs[kept])
    assert np.all(ceiled_out[kept] >= outputs[kept])
    assert set(ceiled_in[kept]) <= set(PAPER_GRID.input_edges)
    np.testing.assert_array_equal(ceiled_in[kept], binned.input_high[binned.bin_index[kept]])
    np.testing.assert_array_equal(ceiled_out[kept], binned.output_high[binned.bin_index[kept]])
    again = ceil_to_paper(ceiled_in[kept], ceiled_out[kept])
    np.testing.assert_array_equal(again[0], ceiled_in[kept])


@given(pairs, grids)
def test_bins_hold_every_request_once_and_add_up(rows, grid):
    inputs, outputs = columns(rows)
    binned = bin_requests(inputs, outputs, grid)
    kept = binned.bin_index >= 0
    index = binned.bin_index[kept]
    assert binned.requests.sum() + sum(binned.excluded.values()) == inputs.size
    np.testing.assert_array_equal(
        np.bincount(index, minlength=binned.requests.size), binned.requests
    )
    assert np.all(binned.requests >= 1)
    for values, low, high, mean in (
        (inputs, binned.input_low, binned.input_high, binned.mean_input),
        (outputs, binned.output_low, binned.output_high, binned.mean_output),
    ):
        assert np.all(low[index] <= values[kept])
        assert np.all(values[kept] <= high[index])
        assert (mean * binned.requests).sum() == pytest.approx(values[kept].sum())
    np.testing.assert_array_equal(
        grid.input_edges[binned.input_bin[kept]], binned.input_high[index]
    )
    np.testing.assert_array_equal(
        grid.output_edges[binned.output_bin[kept]], binned.output_high[index]
    )
    np.testing.assert_array_equal(binned.input_bin == -1, ~kept)


def test_the_exact_grid_leaves_nothing_out():
    longest = np.array([10_000_000])
    assert bin_requests(longest, longest, EXACT_GRID).excluded == {}


@pytest.mark.parametrize("edges", [[], [0, 4], [4, 4], [8, 4]])
def test_grids_that_are_none(edges):
    with pytest.raises(ValueError, match="ascending"):
        BinGrid(name="bad", input_edges=np.array(edges), output_edges=np.array([1]))
