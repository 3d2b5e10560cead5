"""What a GPU costs to rent: list prices on demand, or prices given."""

from __future__ import annotations

import csv
from collections.abc import Mapping

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError
from energymodel.gpus import load_gpu


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
