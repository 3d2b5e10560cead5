"""Which published format a trace file is in, found from its columns, and what those mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass

from energymodel.errors import TraceError, unknown_name
from energymodel.trace_files import HEAD_BYTES, unreadable


@dataclass(frozen=True, slots=True)
class TraceFormat:
    """The three columns of a published format."""

    time_columns: tuple[str, ...]
    """Any one of them."""
    input_column: str
    output_column: str
    ticks_per_second: float
    """Of the time column; of microseconds if it holds dates."""
    is_date: bool = False

    def columns_in(self, found: Sequence[str]) -> tuple[str, str, str] | None:
        """Its three columns as the file spells them, or None if one is missing."""
        names = {column.strip().lower(): column for column in reversed(found)}
        time = next((names[c.lower()] for c in self.time_columns if c.lower() in names), None)
        tokens = [names.get(c.lower()) for c in (self.input_column, self.output_column)]
        if time is None or tokens[0] is None or tokens[1] is None:
            return None
        return time, tokens[0], tokens[1]

    def __str__(self) -> str:
        """The columns it needs, as a header."""
        return ",".join(["|".join(self.time_columns), self.input_column, self.output_column])


FORMATS = {
    "azure": TraceFormat(("TIMESTAMP",), "ContextTokens", "GeneratedTokens", 1e6, is_date=True),
    "burstgpt": TraceFormat(("Timestamp",), "Request tokens", "Response tokens", 1.0),
    "mooncake": TraceFormat(("timestamp", "timestamp_ms"), "input_length", "output_length", 1e3),
    "vidur": TraceFormat(("arrived_at",), "num_prefill_tokens", "num_decode_tokens", 1.0),
    "splitwise": TraceFormat(("arrival_timestamp",), "prompt_size", "token_size", 1.0),
    "plain": TraceFormat(("arrival_seconds",), "input_tokens", "output_tokens", 1.0),
}
"""By the name that `--trace-format` takes."""


def known_formats() -> tuple[str, ...]:
    """Names that `trace_format` may take."""
    return tuple(FORMATS)


def check_format(trace_format: str | None) -> None:
    """Refuse a name that is none of `known_formats()`; None is found from the columns."""
    if trace_format is not None and trace_format not in FORMATS:
        raise TraceError(unknown_name("trace format", trace_format, FORMATS))


@dataclass(frozen=True, slots=True)
class Header:
    """What the first line of a text file says."""

    name: str
    """Of the format."""
    columns: tuple[str, str, str]
    """Time, input and output, as the file spells them."""
    found: list[str]
    """All columns."""
    separator: str | None
    """None for JSON lines."""
    first_row: int
    """Lines above it."""


def read_header(head: bytes, where: str, trace_format: str | None) -> Header:
    """Format and columns from the first bytes of a text file; refuses what is no trace."""
    lines = _head_lines(head, where)
    first = next((index for index, text in enumerate(lines) if text.strip()), None)
    if first is None:
        raise TraceError(f"{where}: the file holds only blank lines; a trace has a header and rows")
    if lines[first].lstrip().startswith(("{", "[")):
        found = _json_keys(lines[first], where)
        name, columns = find_format(found, trace_format, where)
        return Header(name, columns, found, None, first)
    separator = max(",;\t", key=lines[first].count)
    try:
        found = next(csv.reader([lines[first].strip("\r")], delimiter=separator))
    except csv.Error as error:
        raise unreadable(where, error) from error
    name, columns = find_format(found, trace_format, where)
    return Header(name, columns, found, separator, first + 1)


def _head_lines(head: bytes, where: str) -> list[str]:
    """First lines of a text file; refuses what is empty, no text, or has no short lines."""
    if not head:
        raise TraceError(f"{where}: the file is empty; a trace has a header and one row a request")
    text = head.decode("utf-8-sig", errors="replace")
    if "\0" in text or text.count("\ufffd") > len(text) / 10:
        raise TraceError(
            f"{where}: binary data, not a trace; give CSV or JSON lines in UTF-8 (plain, gzip or "
            "zstd) or Parquet"
        )
    if len(head) == HEAD_BYTES and head.count(b"\n") < 2:
        raise TraceError(
            f"{where}: the first two lines are longer than {HEAD_BYTES:,} bytes; a trace has "
            "a header line and one line for each request"
        )
    return text.split("\n")


def _json_keys(text: str, where: str) -> list[str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise TraceError(
            f"{where}: the first line is not one JSON object; write one object a line (JSON lines)"
        )
    return [key for key in record if "'" not in key]


def find_format(
    found: Sequence[str], trace_format: str | None, where: str
) -> tuple[str, tuple[str, str, str]]:
    """Name of the format whose columns are there, and those columns: time, input, output."""
    shown = ",".join(found[:20]) + (",..." if len(found) > 20 else "")
    shown = shown if len(shown) <= 300 else shown[:300] + "..."
    candidates = [trace_format] if trace_format else list(FORMATS)
    matches = [
        (name, columns) for name in candidates if (columns := FORMATS[name].columns_in(found))
    ]
    if len(matches) == 1:
        _, columns = matches[0]
        spelled = [column.strip().lower() for column in found]
        for column in columns:
            if spelled.count(column.strip().lower()) > 1:
                raise TraceError(f"{where}: has two columns named {column!r}; leave out one")
        return matches[0]
    if matches:
        names = " and ".join(name for name, _ in matches)
        raise TraceError(f"{where}: has the columns of {names}; choose with --trace-format")
    needed = "; ".join(f"{name}: {FORMATS[name]}" for name in candidates)
    raise TraceError(
        f"{where}: these are not the columns of a known trace format. Found: {shown!r}. "
        f"Needed ({'|'.join(candidates)}): {needed}"
    )
