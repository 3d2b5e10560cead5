"""Turns a trace's dates into microseconds: the usual form by its digits, all others by parsing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

# `2024-05-10 00:00:00.009930+00:00`, in UTC or without an offset
_USUAL = r"^\d{4}-\d{2}-\d{2} (?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.\d{6,7}(?:\+00:00)?$"


def epoch_microseconds(text: pl.Series) -> pl.Series:
    """Microseconds since 1970 of dates, with or without UTC offset; null where it is no date."""
    import polars as pl  # noqa: PLC0415

    usual = text.str.contains(_USUAL)
    column = pl.col(text.name)
    if not usual.all():
        forms = ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f%#z")
        parsed = [
            column.str.to_datetime(form, time_unit="us", strict=False).dt.epoch("us")
            for form in forms
        ]
        return text.to_frame().select(pl.coalesce(parsed).cast(pl.Float64)).to_series()

    def number(start: int, digits: int) -> pl.Expr:
        return column.str.slice(start, digits).cast(pl.Int64, strict=False)

    days = column.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False).cast(pl.Int64)
    seconds = (days * 24 + number(11, 2)) * 3600 + number(14, 2) * 60 + number(17, 2)
    time = seconds * 1_000_000 + number(20, 6)
    return text.to_frame().select(time.cast(pl.Float64)).to_series()
