"""Carbon intensity of electricity: by country name or code, or as a number."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass

from energymodel.datafiles import data_path
from energymodel.errors import ConfigurationError, unknown_name

_HIGHEST_GRAMS_PER_KWH = 2000.0  # above any grid; a larger number is in another unit


@dataclass(frozen=True, slots=True, kw_only=True)
class GridIntensity:
    """Life-cycle greenhouse gas of a kilowatt-hour drawn from a grid."""

    name: str
    grams_per_kwh: float
    """CO2 equivalent [g/kWh]."""
    source: str
    """Where the number comes from, its year included."""
    alpha3: str = ""
    """ISO 3166 code of the country; empty for a region or a number."""


def load_grid_intensity(name_or_number: str) -> GridIntensity:
    """Carbon intensity of a grid (`france`, `FR`, `FRA`, `world`) or of a given number (`56`).

    The shipped figures are yearly averages of generation (`profiles/grids.csv`); imports, hours and
    contracts are not in them. Pass a number [gCO2e/kWh] for a grid or a contract of your own.

    Raises
    ------
    ConfigurationError
        If the name is unknown (all known ones are listed), or the number is not one of a grid.
    """
    text = name_or_number.strip()
    try:
        number = float(text)
    except ValueError:
        return _by_name(text)
    if not (math.isfinite(number) and 0.0 <= number <= _HIGHEST_GRAMS_PER_KWH):
        raise ConfigurationError(
            f"--grid {text}: a carbon intensity lies between 0 and {_HIGHEST_GRAMS_PER_KWH:.0f} "
            "gCO2e/kWh; give grams per kWh, or the name of a country"
        )
    return GridIntensity(name=f"{number:g} gCO2e/kWh", grams_per_kwh=number, source="given")


def list_grids() -> tuple[str, ...]:
    """Names of the grids that ship with the package."""
    return tuple(row["name"] for row in _rows())


def _rows() -> list[dict[str, str]]:
    with data_path("grids.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _by_name(text: str) -> GridIntensity:
    key = text.lower().replace("-", " ").replace("_", " ")
    rows = _rows()
    for row in rows:
        if key and key in {row[column].lower() for column in ("name", "alpha2", "alpha3")}:
            return GridIntensity(
                name=row["name"],
                grams_per_kwh=float(row["grams_per_kwh"]),
                source=f"{row['source']}, {row['year']}",
                alpha3=row["alpha3"],
            )
    raise ConfigurationError(
        unknown_name("grid", text, list_grids()) + " Or give a number in gCO2e/kWh."
    )
