"""A prediction as a row of CodeCarbon's `emissions.csv`, beside measured runs.

Columns and units are those of CodeCarbon 3 (`output_methods/emissions_data.py`): s, W, kWh, kg of
CO2 equivalent; power and energy include the PUE, as there. What a prediction does not know (host,
place, water) stays empty, never 0. `tracking_mode` says `predicted`.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from energymodel.errors import EnergyModelError
from energymodel.grids import GridIntensity
from energymodel.results import Prediction
from energymodel.units import JOULES_PER_KWH

COLUMNS = (
    "timestamp",
    "project_name",
    "run_id",
    "experiment_id",
    "duration",
    "emissions",
    "emissions_rate",
    "cpu_power",
    "gpu_power",
    "ram_power",
    "cpu_energy",
    "gpu_energy",
    "ram_energy",
    "energy_consumed",
    "water_consumed",
    "country_name",
    "country_iso_code",
    "region",
    "cloud_provider",
    "cloud_region",
    "os",
    "python_version",
    "codecarbon_version",
    "cpu_count",
    "cpu_model",
    "gpu_count",
    "gpu_model",
    "longitude",
    "latitude",
    "ram_total_size",
    "tracking_mode",
    "cpu_utilization_percent",
    "gpu_utilization_percent",
    "ram_utilization_percent",
    "ram_used_gb",
    "on_cloud",
    "pue",
    "wue",
)
_NEEDED = {"timestamp", "run_id", "duration", "emissions", "gpu_energy", "energy_consumed"}


def emissions_row(
    prediction: Prediction, grid: GridIntensity | None, *, now: datetime | None = None
) -> dict[str, str]:
    """Values by column, as text; columns that a prediction does not know are absent.

    Parameters
    ----------
    prediction : Prediction
    grid : GridIntensity, optional
        The grid it was predicted with; without one the emissions stay empty.
    now : datetime, optional
        Time stamp; the local time if not given.
    """
    p, i = prediction, prediction.inputs
    kwh = p.facility_joules / JOULES_PER_KWH
    row = {
        "timestamp": (now or datetime.now()).strftime("%Y-%m-%dT%H:%M:%S"),
        "project_name": str(i["trace"]),
        "run_id": str(uuid4()),
        "experiment_id": f"{i['model']} {i['stack']}",
        "duration": repr(p.wall_seconds),
        "gpu_power": repr(p.average_watts * i["pue"]),
        "gpu_energy": repr(kwh),
        "energy_consumed": repr(kwh),
        "codecarbon_version": f"energymodel {p.provenance['energymodel_version']}",
        "gpu_count": str(p.gpus),
        "gpu_model": f"{p.gpus} x {i['gpu']}",
        "tracking_mode": "predicted",
        "pue": repr(i["pue"]),
    }
    if p.carbon_grams is not None:
        row["emissions"] = repr(p.carbon_grams / 1000.0)
        row["emissions_rate"] = repr(p.carbon_grams / 1000.0 / p.wall_seconds)
    if grid is not None and grid.alpha3:
        row |= {"country_name": grid.name, "country_iso_code": grid.alpha3}
    return row


def check_emissions_file(path: Path | None, *others: str | Path | None) -> None:
    """Fail before the work: `path` must be new, or an `emissions.csv` that can be appended to.

    Raises
    ------
    EnergyModelError
        If it is one of `others` (files read or written elsewhere), cannot be written, or holds
        something else.
    """
    if path is None:
        return
    try:
        for other in others:
            if other and Path(other).resolve() == path.resolve():
                raise EnergyModelError(
                    f"--emissions {path} is used by another option; name another file"
                )
        if not path.exists():
            if not path.parent.is_dir():
                raise EnergyModelError(
                    f"--emissions {path}: the folder {path.parent} does not exist"
                )
            if not os.access(path.parent, os.W_OK):
                raise EnergyModelError(
                    f"--emissions {path} cannot be written; choose another place"
                )
            return
        if not path.is_file():
            raise EnergyModelError(f"--emissions {path} is not a file; name one")
        if not os.access(path, os.W_OK):
            raise EnergyModelError(f"--emissions {path} cannot be written; choose another place")
        with path.open("rb") as file:
            if head := file.readline(65536):
                _columns(head, path)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, null byte
        raise EnergyModelError(f"--emissions {str(path)!r} is no usable path: {error}") from error


def append_emissions(row: Mapping[str, str], path: Path) -> None:
    """Add a row to an `emissions.csv`, in its own columns; write the header if it is new or empty.

    The file is locked meanwhile, and cut back to what it was if the disk is full: no other row is
    lost or torn.

    Raises
    ------
    EnergyModelError
        If the file holds something else, or cannot be written.
    """
    try:
        with path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.seek(0, os.SEEK_END)
            file.seek(0)
            columns = _columns(file.readline(65536), path) if before else COLUMNS
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
            if before:
                file.seek(before - 1)
                if file.read(1) not in (b"\n", b"\r"):
                    text.write("\n")
            else:
                writer.writeheader()
            writer.writerow(row)
            data = text.getvalue().encode()
            try:
                written = file.write(data)
            except OSError:
                file.truncate(before)
                raise
            if written != len(data):
                file.truncate(before)
                raise EnergyModelError(f"--emissions {path} cannot be written: the disk is full")
    except OSError as error:
        raise EnergyModelError(f"--emissions {path} cannot be written: {error.strerror}") from error


def _columns(head: bytes, path: Path) -> Sequence[str]:
    """Columns of an existing file; refuses what CodeCarbon did not write."""
    try:
        columns = next(csv.reader([head.decode("utf-8-sig").strip()]), [])
    except (UnicodeDecodeError, csv.Error):
        columns = []
    if missing := sorted(_NEEDED - set(columns)):
        raise EnergyModelError(
            f"--emissions {path} is no emissions.csv of CodeCarbon: its first line lacks "
            f"{', '.join(missing)}; name another file, it will be made"
        )
    return columns
