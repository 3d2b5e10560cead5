"""Prices of electricity: by place or as a number, each with where it comes from."""

from __future__ import annotations

import csv

import pytest

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError
from energymodel.prices import load_electricity_price


@pytest.mark.parametrize("name", ["New York", "new-york", " new_york "])
def test_a_state_by_name(name: str) -> None:
    price = load_electricity_price(name)
    assert price.name == "New York"
    assert price.usd_per_kwh == 0.1801  # US EIA, Electric Power Annual 2023, commercial
    assert "EIA" in price.source
    assert price.source.endswith("2023")


@pytest.mark.parametrize(("text", "usd"), [("0", 0.0), ("0.085", 0.085), ("1e-1", 0.1)])
def test_a_number_is_dollars_per_kwh(text: str, usd: float) -> None:
    price = load_electricity_price(text)
    assert (price.usd_per_kwh, price.source) == (usd, "given")


@pytest.mark.parametrize("text", ["-0.1", "8.5", "nan", "inf"])
def test_cents_and_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="dollars"):
        load_electricity_price(text)


def test_an_unknown_place_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean virginia.*Wisconsin"):
        load_electricity_price("virgina")


def test_every_shipped_price_is_one_of_commercial_customers() -> None:
    with data_path("electricity_prices.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == len(rows) == 50
    for row in rows:
        assert 0.05 < float(row["usd_per_kwh"]) < 0.5
        assert row["source"]
        assert row["year"] == "2023"
