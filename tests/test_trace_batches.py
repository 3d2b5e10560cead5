"""Traces read piece by piece, and the dates in them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.errors import TraceError
from energymodel.trace_dates import epoch_microseconds
from energymodel.traces import read_batches, read_trace

HEADER = "arrival_seconds,input_tokens,output_tokens\n"

moments = st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1))


def microseconds(moment: datetime) -> int:
    return (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )


@given(moments, st.sampled_from(["", "+00:00", "0", "+02:00", "Z"]))
def test_dates_are_read_to_the_microsecond(moment: datetime, end: str) -> None:
    text = moment.strftime("%Y-%m-%d %H:%M:%S.%f").rjust(26, "0") + end
    found = epoch_microseconds(pl.Series("t", [text]))
    shift = 7_200_000_000 if end == "+02:00" else 0
    assert found.to_list() == [microseconds(moment) - shift]


@given(st.lists(moments, min_size=1, max_size=5), st.integers(0, 4))
def test_one_odd_date_does_not_change_the_others(found: list[datetime], place: int) -> None:
    texts = [moment.strftime("%Y-%m-%d %H:%M:%S.%f").rjust(26, "0") for moment in found]
    odd = [*texts]
    odd.insert(min(place, len(odd)), "yesterday")
    with_odd = [value for value in epoch_microseconds(pl.Series("t", odd)) if value is not None]
    assert with_odd == epoch_microseconds(pl.Series("t", texts)).to_list()


@pytest.mark.parametrize("text", ["2024-02-30 00:00:00.000000", "2024-01-01 24:00:00.000000", "x"])
def test_what_is_no_date_is_null(text: str) -> None:
    assert epoch_microseconds(pl.Series("t", [text])).to_list() == [None]


def test_pieces_are_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{i * 0.5},{i % 7},3" for i in range(5000)]  # every seventh has no input
    path.write_text(HEADER + "\n".join(rows))
    whole = read_trace(str(path))
    pieces = list(read_batches(str(path), rows=700))
    assert len(pieces) > 3
    for name in ("arrival_seconds", "input_tokens", "output_tokens"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole, name))
    dropped = [piece.dropped[0] for piece in pieces if piece.dropped]
    assert sum(rows.count for rows in dropped) == whole.dropped[0].count
    assert dropped[0].first_lines == whole.dropped[0].first_lines
    assert sum(piece.rows_read for piece in pieces) == whole.rows_read


def test_pieces_out_of_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    rows = [f"{5000 - i},10,3" for i in range(5000)]
    path.write_text(HEADER + "\n".join(rows))
    with pytest.raises(TraceError, match="sort the file"):
        list(read_batches(str(path), rows=700))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), (HEADER + "0,0,0\n", "no usable row"), ("a,b\n1,2\n", "columns")],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        list(read_batches(str(path)))


def test_streams_and_unknown_formats_are_refused() -> None:
    with pytest.raises(TraceError, match="piece by piece"):
        list(read_batches("-"))
    with pytest.raises(TraceError, match="unknown trace format"):
        list(read_batches("x.csv", trace_format="nonsuch"))
