"""What a GPU costs to rent, and what electricity costs: published prices, or prices given."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.gpus import load_gpu

_HIGHEST_USD_PER_KWH = 5.0  # a larger number is in cents


@dataclass(frozen=True, slots=True, kw_only=True)
class ElectricityPrice:
    """What a kilowatt-hour costs a data centre."""

    name: str
    usd_per_kwh: float
    source: str
    """Where the number comes from, its year included."""


def load_electricity_price(name_or_number: str) -> ElectricityPrice:
    """Price of electricity at a place (`virginia`), or a given one (`0.12`) [USD/kWh].

    The shipped ones are yearly averages of what commercial customers paid in the states of the US
    (`profiles/electricity_prices.csv`); a contract of your own costs something else: give a number.

    Raises
    ------
    ConfigurationError
        If the name is unknown (all known ones are listed), or the number is no price in USD/kWh.
    """
    text = name_or_number.strip()
    try:
        number = float(text)
    except ValueError:
        return _electricity_by_name(text)
    if not (math.isfinite(number) and 0.0 <= number <= _HIGHEST_USD_PER_KWH):
        raise ConfigurationError(
            f"--electricity-price {text}: a price lies between 0 and {_HIGHEST_USD_PER_KWH:g} "
            "USD/kWh; give dollars (not cents) per kWh, or the name of a place"
        )
    return ElectricityPrice(name=f"{number:g} USD/kWh", usd_per_kwh=number, source="given")


def _electricity_by_name(text: str) -> ElectricityPrice:
    with data_path("electricity_prices.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    key = text.lower().replace("-", " ").replace("_", " ")
    for name, row in rows.items():
        if name.lower() == key:
            return ElectricityPrice(
                name=name,
                usd_per_kwh=float(row["usd_per_kwh"]),
                source=f"{row['source']}, {row['year']}",
            )
    raise ConfigurationError(
        unknown_name("electricity price", text, rows) + " Or give a number in USD/kWh."
    )


def load_prices(given: Mapping[str, float] | None = None) -> dict[str, float]:
    """Prices by canonical GPU name [USD per GPU and hour]; `given` ones come first.

    The shipped ones are list prices of one large provider, with date and source in
    `profiles/prices.csv`; contracts and owned machines cost less. A GPU without a published price
    there is absent, never 0.

    Raises
    ------
    ConfigurationError
        If a given price is not a number above 0, or its GPU is unknown.
    """
    with data_path("prices.csv").open(encoding="utf-8", newline="") as file:
        prices = {row["gpu"]: float(row["usd_per_gpu_hour"]) for row in csv.DictReader(file)}
    for gpu, price in (given or {}).items():
        if not 0.0 < price < 1e6:
            raise ConfigurationError(
                f"--price {gpu}={price:g} is no price; give dollars per GPU and hour, above 0"
            )
        prices[load_gpu(gpu).name] = price
    return prices
