"""`energymodel validate`: predictions against everything measured, and how wrong they are.

Rows are read, predicted and grouped; groups get error statistics; recorded error levels
(`data/error_levels.json`) are what later versions are held to. Reports are written by
`report.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calibration.fitting.measured_runs import read_own
from calibration.validation.public_runs import read_public
from calibration.validation.rows import (
    DATA,
    OWN,
    Comparison,
    LeftOut,
    MeasuredRow,
    compare,
    load_split,
)
from energymodel.errors import EnergyModelError

OWN_RUNS = DATA / "serving"
LEVELS_FILE = DATA / "error_levels.json"
RELATIVE_SLACK = 0.05
ABSOLUTE_SLACK = 0.002
"""An error has grown if it exceeds its recorded level by more than 5 % of it and 0.2 points."""

NAIVE_RULES = ("flops_tdp", "output_flops_tdp", "tdp_time", "vidur_energy", "ecologits")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStats:
    """Relative errors of one quantity over a group; fractions, not percent."""

    n: int
    median_abs: float
    p90_abs: float
    max_abs: float
    median: float
    """With its sign: negative = predicted too low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Error statistics of rows that share something; None where nothing was measured."""

    name: str
    fitted: bool
    rows: int
    joules: ErrorStats | None
    seconds: ErrorStats | None
    watts: ErrorStats | None
    ttft: ErrorStats | None
    tpot: ErrorStats | None
    coverage: float | None
    """Share of measured energies within the interval."""
    naive: dict[str, ErrorStats | None]
    """Errors of the naive rules' energies, by rule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """All comparisons, and what could not be compared."""

    comparisons: tuple[Comparison, ...]
    left_out: tuple[LeftOut, ...]
    skipped: tuple[str, ...]
    """Sources that were not there, with the reason."""


def validate(*, public: Path | None, own: Path = OWN_RUNS) -> Validation:
    """Predict every measured row that can be found.

    Parameters
    ----------
    public : folder of public measurements, see `read_public`; None or missing = skipped
    own : folder of this project's serving records, `*.jsonl` and `*.jsonl.gz`

    Raises
    ------
    EnergyModelError
        If a file that is there cannot be understood.
    """
    split = load_split()
    rows: list[MeasuredRow] = []
    left: list[LeftOut] = []
    skipped: list[str] = []
    if own.is_dir():
        found, out = read_own(own)
        rows, left = rows + found, left + out
    if not any(row.source == OWN for row in rows):
        skipped.append(f"own serving runs: {own} holds none")
    if public is not None and public.is_dir():
        found, out = read_public(public)
        rows, left = rows + found, left + out
    else:
        skipped.append(
            "public measurements: no folder was given"
            if public is None
            else f"public measurements: there is no folder {public}"
        )
    comparisons = []
    for row in rows:
        try:
            comparisons.append(compare(row, split))
        except EnergyModelError as error:
            reason = f"the model refuses {row.name} on {row.gpu}: {error}"
            left.append(LeftOut(source=row.source, reason=reason, rows=1))
    return Validation(comparisons=tuple(comparisons), left_out=tuple(left), skipped=tuple(skipped))


def error_stats(errors: Iterable[float | None]) -> ErrorStats | None:
    """Statistics of relative errors; None if there are none."""
    values = np.array([e for e in errors if e is not None], dtype=float)
    if not values.size:
        return None
    size = np.abs(values)
    return ErrorStats(
        n=len(values),
        median_abs=float(np.median(size)),
        p90_abs=float(np.percentile(size, 90)),
        max_abs=float(size.max()),
        median=float(np.median(values)),
    )


def group_by(
    comparisons: Iterable[Comparison], key: Callable[[Comparison], str], *, fitted: bool
) -> list[Group]:
    """Error statistics by `key`, of rows open to fits or of held-out ones, never of both."""
    members: dict[str, list[Comparison]] = {}
    for c in comparisons:
        if c.fitted == fitted:
            members.setdefault(key(c), []).append(c)
    return [_group(name, fitted, rows) for name, rows in members.items()]


def _group(name: str, fitted: bool, rows: Sequence[Comparison]) -> Group:
    covered = [c.covered for c in rows if c.covered is not None]
    return Group(
        name=name,
        fitted=fitted,
        rows=len(rows),
        joules=error_stats(c.joules_error for c in rows),
        seconds=error_stats(c.seconds_error for c in rows),
        watts=error_stats(c.watts_error for c in rows),
        ttft=error_stats(c.ttft_error for c in rows),
        tpot=error_stats(c.tpot_error for c in rows),
        coverage=float(np.mean(covered)) if covered else None,
        naive={rule: error_stats(c.naive_error(rule) for c in rows) for rule in NAIVE_RULES},
    )


def by_source(c: Comparison) -> str:
    """Key of the groups whose error levels are recorded: source, GPU and stack."""
    return f"{c.row.source}, {c.row.gpu}, {c.row.stack}"


def by_model(c: Comparison) -> str:
    """Source, model and how it is split over GPUs."""
    ways = f" tp{c.row.tensor_parallel}" if c.row.tensor_parallel > 1 else ""
    ways += f" pp{c.row.pipeline_parallel}" if c.row.pipeline_parallel > 1 else ""
    return f"{c.row.source}, {c.row.gpu}, {c.row.model_name}{ways}"


def by_phase(c: Comparison) -> str:
    """Source, phase and size of the batch."""
    return f"{c.row.source}, {c.row.gpu}, {c.row.phase}, {_batch_range(c)}"


def _batch_range(c: Comparison) -> str:
    if c.row.phase == "trace":
        return c.row.name
    low = 1
    for high in (1, 8, 32, 128, 512):
        if c.row.batch <= high:
            return "batch 1" if high == 1 else f"batch {low} to {high}"
        low = high + 1
    return f"batch {low} and more"


# -- recorded error levels ------------------------------------------------------------

_HELD_TO = (("joules", "median_abs"), ("joules", "p90_abs"), ("seconds", "median_abs"))


def _label(group: Group) -> str:
    return f"{group.name}, {'fit' if group.fitted else 'held out'}"


def _level_groups(validation: Validation) -> list[Group]:
    return [
        group
        for fitted in (False, True)
        for group in group_by(validation.comparisons, by_source, fitted=fitted)
    ]


def error_levels(validation: Validation) -> dict[str, dict[str, float]]:
    """Rows and errors by group, as `data/error_levels.json` holds them."""
    levels = {}
    for group in _level_groups(validation):
        level: dict[str, float] = {"rows": group.rows}
        for quantity, statistic in _HELD_TO:
            stats: ErrorStats | None = getattr(group, quantity)
            if stats is not None:
                level[f"{quantity}_{statistic}"] = round(getattr(stats, statistic), 4)
        levels[_label(group)] = level
    return levels


def record_levels(validation: Validation, path: Path = LEVELS_FILE) -> None:
    """Write today's error levels; those of groups that were not compared stay as they are."""
    levels = load_levels(path) if path.exists() else {}
    levels |= error_levels(validation)
    path.write_text(json.dumps(dict(sorted(levels.items())), indent=1) + "\n", encoding="utf-8")


def load_levels(path: Path = LEVELS_FILE) -> dict[str, dict[str, float]]:
    """Read recorded error levels.

    Raises
    ------
    EnergyModelError
        If the file is missing or no JSON object of numbers.
    """
    try:
        levels = json.loads(path.read_text(encoding="utf-8"))
        return {g: {k: float(v) for k, v in level.items()} for g, level in levels.items()}
    except OSError as error:
        raise EnergyModelError(
            f"{path}: cannot be read ({error.strerror}); `energymodel validate --record` writes it"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise EnergyModelError(f"{path}: not a JSON object of numbers ({error})") from error


def check_levels(
    validation: Validation, levels: dict[str, dict[str, float]]
) -> tuple[list[str], list[str]]:
    """Compare errors with their recorded levels.

    Returns
    -------
    failures : an error grew, or rows are missing from a source that is there
    notices : groups without a level, and recorded groups whose source is not there
    """
    now = error_levels(validation)
    sources = {c.row.source for c in validation.comparisons}
    failures, notices = [], []
    for name, level in levels.items():
        if name not in now:
            if name.partition(",")[0] in sources:
                failures.append(f"{name}: no rows, {level['rows']:.0f} recorded")
            else:
                notices.append(f"{name}: not checked, its measurements are not there")
            continue
        for key, limit in level.items():
            value = now[name].get(key)
            if key == "rows":
                if value is not None and value < limit:
                    failures.append(f"{name}: {value:.0f} rows, {limit:.0f} recorded")
            elif value is None:
                failures.append(f"{name}: {key} is gone, {limit:.1%} recorded")
            elif value > limit * (1.0 + RELATIVE_SLACK) + ABSOLUTE_SLACK:
                failures.append(f"{name}: {key} is {value:.1%}, {limit:.1%} recorded")
    notices += [f"{name}: no level recorded yet" for name in now if name not in levels]
    return failures, notices


# -- as data --------------------------------------------------------------------------


def to_dict(validation: Validation) -> dict[str, Any]:
    """Everything in plain dicts and numbers, for JSON."""
    return {
        "schema_version": 1,
        "groups": {
            split: {
                kind: [asdict(g) for g in group_by(validation.comparisons, key, fitted=fitted)]
                for kind, key in (("source", by_source), ("model", by_model), ("phase", by_phase))
            }
            for split, fitted in (("held_out", False), ("fit", True))
        },
        "rows": [_row_dict(c) for c in validation.comparisons],
        "left_out": [asdict(entry) for entry in validation.left_out],
        "skipped": list(validation.skipped),
    }


def _row_dict(c: Comparison) -> dict[str, Any]:
    row = c.row
    return {
        "source": row.source,
        "name": row.name,
        "gpu": row.gpu,
        "model": row.model_name,
        "stack": row.stack,
        "tensor_parallel": row.tensor_parallel,
        "phase": row.phase,
        "batch": row.batch,
        "split": "fit" if c.fitted else "held_out",
        "measured": {
            "joules_per_output_token": row.joules_per_output_token,
            "seconds_per_output_token": row.seconds_per_output_token,
            "ttft_seconds": row.ttft_seconds,
            "tpot_seconds": row.tpot_seconds,
        },
        "predicted": {
            "joules_per_output_token": c.joules_per_output_token,
            "joules_per_output_token_low": c.joules_low,
            "joules_per_output_token_high": c.joules_high,
            "seconds_per_output_token": c.seconds_per_output_token,
            "ttft_seconds": c.ttft_seconds,
            "tpot_seconds": c.tpot_seconds,
        },
        "naive_joules_per_output_token": dict(c.naive_joules),
        "errors": {
            "joules": c.joules_error,
            "seconds": c.seconds_error,
            "watts": c.watts_error,
            "ttft": c.ttft_error,
            "tpot": c.tpot_error,
        },
        "unsteady": row.unsteady,
        "note": row.note,
    }
