"""`--emissions`: rows that CodeCarbon's readers take, appended without losing anything."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import energymodel
from energymodel.cli import app
from energymodel.emissions import COLUMNS, append_emissions, emissions_row
from energymodel.grids import load_grid_intensity
from energymodel.results import Prediction

# CodeCarbon 3.3.2, output_methods/emissions_data.py; also in ../shared/reference/measuring.md
CODECARBON = (
    "timestamp project_name run_id experiment_id duration emissions emissions_rate cpu_power "
    "gpu_power ram_power cpu_energy gpu_energy ram_energy energy_consumed water_consumed "
    "country_name country_iso_code region cloud_provider cloud_region os python_version "
    "codecarbon_version cpu_count cpu_model gpu_count gpu_model longitude latitude ram_total_size "
    "tracking_mode cpu_utilization_percent gpu_utilization_percent ram_utilization_percent "
    "ram_used_gb on_cloud pue wue"
)
OLDER = "timestamp,run_id,duration,emissions,gpu_energy,energy_consumed,old_column"


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    return energymodel.predict("translation", gpu="a100", grid="france", pue=1.25)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "small.csv"
    path.write_text("arrival_seconds,input_tokens,output_tokens\n0,100,5\n2,20,3\n")
    return path


def predict(trace: Path, *options: object) -> Result:
    arguments = ["predict", "--trace", trace, "--gpu", "a100", "--format", "json", *options]
    return CliRunner().invoke(app, [str(a) for a in arguments])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_columns_are_codecarbons() -> None:
    assert " ".join(COLUMNS) == CODECARBON


def test_a_row_is_in_codecarbons_units(prediction: Prediction) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    row = emissions_row(prediction, load_grid_intensity("france"), now=now)
    assert set(row) <= set(COLUMNS)
    assert row["timestamp"] == "2026-01-02T03:04:05"
    kwh = 1.25 * prediction.energy_joules / 3.6e6
    assert float(row["energy_consumed"]) == pytest.approx(kwh)
    assert float(row["gpu_energy"]) == pytest.approx(kwh)
    kilograms = kwh * prediction.inputs["grid_grams_per_kwh"] / 1000
    assert float(row["emissions"]) == pytest.approx(kilograms)
    assert float(row["duration"]) == prediction.wall_seconds
    assert float(row["gpu_power"]) * float(row["duration"]) == pytest.approx(kwh * 3.6e6)
    assert float(row["emissions_rate"]) * float(row["duration"]) == pytest.approx(kilograms)
    assert (row["country_name"], row["country_iso_code"]) == ("France", "FRA")
    assert row["tracking_mode"] == "predicted"


def test_what_is_not_known_is_empty_not_zero(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    assert predict(trace, "--emissions", path).exit_code == 0
    (row,) = rows(path)
    for column in ("emissions", "emissions_rate", "cpu_energy", "water_consumed", "country_name"):
        assert row[column] == ""


def test_rows_are_appended_and_the_result_still_printed(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    for _ in range(2):
        outcome = predict(trace, "--emissions", path, "--grid", "50")
        assert json.loads(outcome.stdout)["requests"] == 2
    first, second = rows(path)
    assert first["run_id"] != second["run_id"]
    assert first["emissions"] == second["emissions"] != ""


def test_an_older_file_keeps_its_columns_and_rows(prediction: Prediction, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    path.write_text(f"{OLDER}\n2020,a,1,2,3,4,5")  # no end of line
    append_emissions(emissions_row(prediction, None), path)
    old, new = rows(path)
    assert old["old_column"] == "5"
    assert new["old_column"] == ""
    assert float(new["energy_consumed"]) > 0


def test_an_empty_file_gets_a_header(prediction: Prediction, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    path.touch()
    append_emissions(emissions_row(prediction, None), path)
    assert len(rows(path)) == 1


def test_many_writers_lose_no_row(prediction: Prediction, tmp_path: Path) -> None:
    path = tmp_path / "emissions.csv"
    row = emissions_row(prediction, None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_emissions(row | {"run_id": str(i)}, path), range(40)))
    assert {r["run_id"] for r in rows(path)} == {str(i) for i in range(40)}


@pytest.mark.parametrize("content", ["a,b,c\n1,2,3\n", "\x00\x01\x02", "hello"])
def test_another_file_is_refused_and_untouched(trace: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text(content)
    outcome = predict(trace, "--emissions", path)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert "is no emissions.csv" in outcome.stderr
    assert path.read_text() == content


def test_bad_places_are_refused_before_the_work(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for path, said in (
        (tmp_path, "is not a file"),
        (tmp_path / "none" / "e.csv", "does not exist"),
        (trace, "used by another option"),
        (out, "used by another option"),
    ):
        outcome = predict(trace, "--emissions", path, "--output", out)
        assert outcome.exit_code == 2, outcome.output
        assert said in outcome.stderr
        assert not out.exists()
    assert trace.read_text().startswith("arrival_seconds")


def test_a_full_disk_leaves_the_file_as_it_was(
    prediction: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(energymodel.EnergyModelError, match="cannot be written"):
        append_emissions(emissions_row(prediction, None), full)
