from __future__ import annotations

import csv

import pytest

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError
from energymodel.grids import load_grid_intensity


@pytest.mark.parametrize("name", ["france", "France", " FR ", "fra"])
def test_a_country_by_name_or_code(name: str) -> None:
    grid = load_grid_intensity(name)
    assert (grid.name, grid.grams_per_kwh) == ("France", 44.0)  # Our World in Data, 2024
    assert "Ember" in grid.source
    assert "2024" in grid.source


@pytest.mark.parametrize("name", ["united states", "united-states", "United_States", "usa"])
def test_spaces_may_be_dashes(name: str) -> None:
    assert load_grid_intensity(name).name == "United States"


def test_world() -> None:
    assert load_grid_intensity("world").grams_per_kwh == 473.0


@pytest.mark.parametrize(("text", "grams"), [("0", 0.0), ("56.5", 56.5), ("1e2", 100.0)])
def test_a_number_is_grams_per_kwh(text: str, grams: float) -> None:
    grid = load_grid_intensity(text)
    assert (grid.grams_per_kwh, grid.source) == (grams, "given")


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "473000"])
def test_a_number_of_no_grid_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="gCO2e/kWh"):
        load_grid_intensity(text)


@pytest.mark.parametrize("text", ["frence", "atlantis", ""])
def test_an_unknown_grid_lists_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown grid.*France.*World"):
        load_grid_intensity(text)


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean germany"):
        load_grid_intensity("germny")


def test_every_row_is_plausible_sourced_and_named_once() -> None:
    with data_path("grids.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 40
    for row in rows:
        assert 20.0 <= float(row["grams_per_kwh"]) <= 800.0
        assert 2022 <= int(row["year"]) <= 2026
        assert "Ember" in row["source"]
    for column in ("name", "alpha2", "alpha3"):
        values = [row[column].lower() for row in rows if row[column]]
        assert len(values) == len(set(values))
