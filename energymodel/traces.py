"""Reads request traces: when each request arrives, how many tokens it takes in and puts out.

Text is read lazily, line by line, in one pass of compiled expressions, so that line numbers are
exact, a bad row never hides its neighbours, and memory grows by a few bytes a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from energymodel.errors import TraceError
from energymodel.trace_dates import epoch_microseconds
from energymodel.trace_files import (
    check_lines,
    is_parquet,
    open_source,
    read_head,
    unreadable,
)
from energymodel.trace_formats import FORMATS, check_format, find_format, read_header

if TYPE_CHECKING:
    import polars as pl

    _Field = tuple[pl.Expr, pl.Expr]  # is it missing, and its value or null

MAX_TOKENS = 10_000_000
"""Longest believable input or output; beyond it a row is `absurd`."""

_MAX_SECONDS = 1e10  # about 300 years: a larger time is in another unit or corrupt
_LINES_KEPT = 5
_SUFFIXES = (".gz", ".zst", ".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedRows:
    """Rows with one kind of fault, and where the first of them are."""

    kind: str
    """A key of `ROW_FAULTS`. `unsorted` rows are sorted, all others are left out."""
    count: int
    first_lines: tuple[int, ...]
    """1-based line numbers in the file (row numbers in Parquet), at most 5."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """Requests in order of arrival."""

    name: str
    arrival_seconds: NDArray[np.float64]
    """Arrival [s] after the first request, shape (n,), ascending; the first is 0."""
    input_tokens: NDArray[np.int64]
    """Prompt tokens [token], shape (n,), at least 1."""
    output_tokens: NDArray[np.int64]
    """Generated tokens [token], shape (n,), at least 1."""
    trace_format: str = "plain"
    source: str = ""
    """File, or citation of the data a built-in workload was derived from."""
    dropped: tuple[DroppedRows, ...] = ()
    rows_read: int = 0
    """Rows in the file, bad ones included, header and blank lines not."""
    cached_tokens: NDArray[np.int64] | None = None
    """Prompt tokens that the prefix cache holds, shape (n,), below input_tokens; None = none."""

    def take(self, which: slice | NDArray[np.bool_]) -> Requests:
        """Some of the requests; arrivals still count from the trace's first."""
        arrivals = self.arrival_seconds[which]
        return replace(
            self,
            arrival_seconds=arrivals,
            input_tokens=self.input_tokens[which],
            output_tokens=self.output_tokens[which],
            cached_tokens=None if self.cached_tokens is None else self.cached_tokens[which],
            rows_read=arrivals.size,
        )


ROW_FAULTS = {
    "extra_fields": "more fields than the header has",
    "missing": "a field is missing or empty",
    "bad_time": "the time is no time, negative, or out of range",
    "non_numeric": "a token count is not a number",
    "negative": "a token count is negative",
    "absurd": f"a token count is above {MAX_TOKENS:,}",
    "fractional": "a token count is not whole",
    "zero_tokens": "no input or no output: a failed request",
    "unsorted": "arrives before the row above it; sorted, not dropped",
}
"""What can be wrong with a row; a row counts under the first fault that it has."""

_CODES = {kind: code for code, kind in enumerate(ROW_FAULTS, start=1)}
_BLANK = 255


def explain_dropped(dropped: DroppedRows) -> str:
    """One line on a kind of bad rows: how many, what is wrong, where the first are."""
    lines = ", ".join(str(line) for line in dropped.first_lines)
    more = ", ..." if dropped.count > len(dropped.first_lines) else ""
    rows = "row" if dropped.count == 1 else "rows"
    where = "line" if dropped.count == 1 else "lines"
    fault = ROW_FAULTS[dropped.kind]
    return f"{dropped.count:,} {rows} {dropped.kind} ({fault}; {where} {lines}{more})"


def read_trace(path: str, *, trace_format: str | None = None, strict: bool = False) -> Requests:
    """Read a request trace.

    CSV (also `;` or tab separated), JSON lines, both plain, gzip or zstd, and Parquet; the content
    decides, not the file's name. Dates are read to the microsecond, with or without UTC offset.

    Parameters
    ----------
    path : str
        A file, or `-` for stdin.
    trace_format : str, optional
        One of `trace_formats.known_formats()`; found from the columns if not given.
    strict : bool
        Refuse a trace with any bad row, instead of leaving bad rows out and counting them.

    Returns
    -------
    Requests
        Sorted by arrival; `dropped` says what was left out.

    Raises
    ------
    TraceError
        If the file cannot be read, is no trace, or has no usable row; with `strict`, on any fault.
    """
    check_format(trace_format)
    where = "stdin" if path == "-" else path
    source = open_source(path, lambda head: read_header(head, where, trace_format))
    import polars as pl  # noqa: PLC0415 (60 ms that only reading a trace should cost)

    try:
        scan = _scan_parquet if is_parquet(source) else _scan_text
        table, first_line, name = scan(source, where, trace_format)
        rows = table.collect(engine="streaming")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
        raise unreadable(where, error) from error
    return _to_requests(
        where=where,
        trace_format=name,
        ticks_per_second=FORMATS[name].ticks_per_second,
        first_line=first_line,
        strict=strict,
        columns=[rows[column].to_numpy() for column in ("time", "input", "output", "code")],
    )


def read_batches(
    path: str, *, trace_format: str | None = None, rows: int = 1_000_000
) -> Iterator[Requests]:
    """Read a trace file piece by piece, in memory that does not grow with it.

    Parameters
    ----------
    path : str
        A file whose requests are in order of arrival.
    trace_format : str, optional
        As in `read_trace`; bad rows are counted and left out in the same way.
    rows : int
        Of a piece, about.

    Yields
    ------
    Requests
        `arrival_seconds` count from the first request of the file.

    Raises
    ------
    TraceError
        As in `read_trace`, and if a piece starts before the one above it has ended.
    """
    check_format(trace_format)
    if path == "-":
        raise TraceError("stdin cannot be read piece by piece; give a trace file")
    source = open_source(path, lambda head: None)
    import polars as pl  # noqa: PLC0415

    first_tick = None
    last_tick = -np.inf
    try:
        scan = _scan_parquet if is_parquet(source) else _scan_text
        table, line, name = scan(source, path, trace_format)
        for piece in table.collect_batches(chunk_size=rows, maintain_order=True):
            columns = [piece[column].to_numpy() for column in ("time", "input", "output", "code")]
            good = columns[3] == 0
            if good.any():
                ticks = columns[0][good]
                first_tick = float(ticks.min()) if first_tick is None else first_tick
                if ticks.min() < last_tick:
                    raise TraceError(
                        f"{path}: requests after line {line} arrive before those above it; sort "
                        "the file by time to read it piece by piece"
                    )
                last_tick = float(ticks.max())
                yield _to_requests(
                    where=path,
                    trace_format=name,
                    ticks_per_second=FORMATS[name].ticks_per_second,
                    first_line=line,
                    strict=False,
                    columns=columns,
                    first_tick=first_tick,
                )
            line += piece.height
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise unreadable(path, error) from error
    if first_tick is None:
        raise TraceError(f"{path}: has no usable row; a trace has one row a request")


def _scan_parquet(
    source: Path | bytes, where: str, trace_format: str | None
) -> tuple[pl.LazyFrame, int, str]:
    """Lazy columns (time, input, output, code), the number of the first row, and the format."""
    import polars as pl  # noqa: PLC0415

    table = pl.scan_parquet(BytesIO(source) if isinstance(source, bytes) else source, glob=False)
    schema = table.collect_schema()
    name, columns = find_format(list(schema), trace_format, where)
    date = FORMATS[name].is_date
    fields = [
        _typed(column, schema[column], where, date and index == 0)
        for index, column in enumerate(columns)
    ]
    never = pl.lit(False)
    return _classify(table, fields, never, never, FORMATS[name].ticks_per_second), 1, name


def _scan_text(
    source: Path | bytes, where: str, trace_format: str | None
) -> tuple[pl.LazyFrame, int, str]:
    """Lazy columns (time, input, output, code), the line of the first row, and the format."""
    import polars as pl  # noqa: PLC0415

    header = read_header(read_head(source, where), where, trace_format)
    quotes = check_lines(source, where)
    line = pl.col("line")
    blank = line.is_null() | (line.str.strip_chars() == "")
    extra = pl.lit(False)
    if header.separator is None:
        fields = [line.str.json_path_match(f"$['{column}']") for column in header.columns]
    else:
        separator = header.separator
        if quotes:  # a quoted separator empties the field
            line = line.str.replace_all(f'"([^"{separator}]*)"|"[^"]*"', "${1}")
        parts = line.str.split_exact(separator, len(header.found)).struct
        fields = [parts[header.found.index(column)] for column in header.columns]
        extra = parts[len(header.found)].str.strip_chars() != ""  # a trailing separator is none
    date = FORMATS[header.name].is_date
    table = _classify(
        _scan_lines(source),
        [_text(field, date and index == 0) for index, field in enumerate(fields)],
        extra,
        blank,
        FORMATS[header.name].ticks_per_second,
    )
    return table.slice(header.first_row), header.first_row + 1, header.name


def _scan_lines(source: Path | bytes) -> pl.LazyFrame:
    import polars as pl  # noqa: PLC0415

    return pl.scan_csv(
        source,
        has_header=False,
        separator="\x01",
        quote_char=None,
        schema={"line": pl.String},
        encoding="utf8-lossy",
        raise_if_empty=False,
        glob=False,
    )


def _text(field: pl.Expr, is_date: bool) -> _Field:
    """A field of text as missing or not, and its number or microseconds since 1970."""
    import polars as pl  # noqa: PLC0415

    text = field.str.strip_chars()
    missing = field.is_null() | (text == "")
    if not is_date:
        return missing, text.cast(pl.Float64, strict=False)
    text = text.str.replace("T", " ", literal=True)
    return missing, text.map_batches(
        epoch_microseconds, return_dtype=pl.Float64, is_elementwise=True
    )


def _typed(column: str, dtype: pl.DataType, where: str, is_date: bool) -> _Field:
    """A Parquet column, the same way."""
    import polars as pl  # noqa: PLC0415

    value = pl.col(column)
    if dtype == pl.String:
        return _text(value, is_date)
    if dtype.is_numeric() and not is_date:
        return value.is_null(), value.cast(pl.Float64)
    if dtype == pl.Datetime and is_date:
        return value.is_null(), value.dt.epoch("us").cast(pl.Float64)
    expected = "dates" if is_date else "numbers"
    raise TraceError(f"{where}: column {column!r} holds {dtype}, not {expected}; cast it")


def _classify(
    table: pl.LazyFrame,
    fields: Sequence[_Field],
    extra: pl.Expr,
    blank: pl.Expr,
    ticks_per_second: float,
) -> pl.LazyFrame:
    """Columns time [tick], input, output [token] and code (0: good, else the fault) of all rows."""
    import polars as pl  # noqa: PLC0415

    names = ("time", "input", "output")
    values = [value.alias(name) for name, (_, value) in zip(names, fields, strict=True)]
    missing = pl.any_horizontal([missing for missing, _ in fields])
    time, *tokens = (pl.col(name) for name in names)

    def any_token(*faults: pl.Expr) -> pl.Expr:
        return pl.any_horizontal([fault.fill_null(True) for fault in faults])

    good_time = time.is_between(0.0, _MAX_SECONDS * ticks_per_second).fill_null(False)
    code = (
        pl.when("blank").then(_BLANK)
        .when("extra").then(_CODES["extra_fields"])
        .when("missing").then(_CODES["missing"])
        .when(~good_time).then(_CODES["bad_time"])
        .when(any_token(*(t.is_nan() for t in tokens))).then(_CODES["non_numeric"])
        .when(any_token(*(t < 0 for t in tokens))).then(_CODES["negative"])
        .when(any_token(*(t > MAX_TOKENS for t in tokens))).then(_CODES["absurd"])
        .when(any_token(*(t != t.floor() for t in tokens))).then(_CODES["fractional"])
        .when(any_token(*(t == 0 for t in tokens))).then(_CODES["zero_tokens"])
        .otherwise(0)
    )  # fmt: skip
    flags = {"blank": blank, "extra": extra, "missing": missing}
    return (
        table.select(*values, **flags)
        .with_columns(code.cast(pl.UInt8).alias("code"))
        .select(
            time.fill_null(0.0),
            *(pl.when(pl.col("code") == 0).then(t).otherwise(0.0).cast(pl.Int32) for t in tokens),
            "code",
        )
    )


def _to_requests(
    *,
    where: str,
    trace_format: str,
    ticks_per_second: float,
    first_line: int,
    strict: bool,
    columns: Sequence[NDArray[np.generic]],
    first_tick: float | None = None,
) -> Requests:
    time, inputs, outputs, code = columns
    good = code == 0
    arrival = time[good].astype(np.float64)
    late = np.flatnonzero(np.diff(arrival) < 0) + 1
    faults = {kind: np.flatnonzero(code == number) for kind, number in _CODES.items()}
    faults["unsorted"] = np.flatnonzero(good)[late] if late.size else late
    dropped = tuple(
        DroppedRows(
            kind=kind,
            count=int(rows.size),
            first_lines=tuple(int(row) + first_line for row in rows[:_LINES_KEPT]),
        )
        for kind, rows in faults.items()
        if rows.size
    )
    rows_read = int(np.count_nonzero(code != _BLANK))
    detail = "; ".join(explain_dropped(fault) for fault in dropped)
    if rows_read == 0:
        raise TraceError(f"{where}: has a header but no rows; a trace has one row a request")
    if arrival.size == 0:
        raise TraceError(f"{where}: none of its {rows_read:,} rows is a usable request: {detail}")
    if strict and dropped:
        raise TraceError(f"{where}: refused because of --strict: {detail}")

    tokens_in, tokens_out = inputs[good].astype(np.int64), outputs[good].astype(np.int64)
    if late.size:
        order = np.argsort(arrival, kind="stable")
        arrival, tokens_in, tokens_out = arrival[order], tokens_in[order], tokens_out[order]
    return Requests(
        name=_trace_name(where),
        arrival_seconds=(arrival - (arrival[0] if first_tick is None else first_tick))
        / ticks_per_second,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        trace_format=trace_format,
        source=where,
        dropped=dropped,
        rows_read=rows_read,
    )


def _trace_name(where: str) -> str:
    """The file's name without the endings of trace files."""
    name = Path(where).name
    while name.lower().endswith(_SUFFIXES) and (stem := Path(name).stem) != name:
        name = stem
    return name or where
