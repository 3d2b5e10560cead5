"""A result as a frame and as Parquet: the same bins in every form."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path

import polars as pl
from typer.testing import CliRunner, Result

import energymodel
from energymodel.cli import app
from energymodel.results import BinEnergy


def predict(*options: object) -> Result:
    arguments = ["predict", "--trace", "translation", "--gpu", "a100", *options]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_frame_holds_the_bins() -> None:
    result = energymodel.predict("translation", gpu="a100")
    frame = result.to_frame()
    assert frame.columns == [f.name for f in fields(BinEnergy)]
    assert frame.to_dicts() == [asdict(row) for row in result.bins]
    assert frame["requests"].sum() == result.requests


def test_parquet_and_csv_hold_the_same_bins(tmp_path: Path) -> None:
    path = tmp_path / "bins.parquet"
    outcome = predict("--format", "parquet", "--output", path)
    assert outcome.exit_code == 0
    assert outcome.stdout == ""
    stored = pl.read_parquet(path)
    rows = list(csv.DictReader(io.StringIO(predict("--format", "csv").stdout)))
    assert stored.columns == list(rows[0])
    assert [float(r["energy_joules"]) for r in rows] == stored["energy_joules"].to_list()


def test_parquet_is_not_printed_to_a_terminal() -> None:
    outcome = predict("--format", "parquet")
    assert outcome.exit_code == 2
    assert "--output FILE" in outcome.stderr
