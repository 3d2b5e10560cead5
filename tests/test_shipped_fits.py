"""`energymodel fit` makes the shipped calibrations again, byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.validation.rows import DATA, SPLIT_FILE
from energymodel.calibrations import load_calibration
from energymodel.cli import app
from energymodel.datafiles import data_path


def files_of(gpu: str) -> list[Path]:
    return [f for kind in ("kernels", "serving") for f in sorted((DATA / kind).glob(f"{gpu}-*"))]


@pytest.mark.parametrize(
    ("gpu", "start"), [("h200", "h100"), ("h100", str(DATA / "start/h100.json"))]
)
def test_the_measurements_give_the_shipped_calibration(
    gpu: str, start: str, tmp_path: Path
) -> None:
    out = tmp_path / f"{gpu}.json"
    files = [str(f) for f in files_of(gpu)]
    command = ["fit", *files, "--start", start, "--split", str(SPLIT_FILE), "--out", str(out)]
    outcome = CliRunner().invoke(app, command)
    assert outcome.exit_code == 0, outcome.output
    shipped = data_path("calibrations", f"{gpu}.json")
    assert json.loads(out.read_text()) == json.loads(shipped.read_text())  # says what differs
    assert out.read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_shipped_calibrations_are_of_the_committed_measurements(gpu: str) -> None:
    shipped = load_calibration(gpu)
    assert shipped.origin == "measured"
    known = {hashlib.sha256(f.read_bytes()).hexdigest(): f.name for f in files_of(gpu)}
    assert shipped.provenance["files"] == known
    assert sum(shipped.provenance["kernel_windows"].values()) > 190
    assert shipped.provenance["digits_repeat"]
