"""Which settings nobody beats in everything, which are best, and why one beats another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from energymodel.errors import ConfigurationError, unknown_name
from energymodel.settings import AXES
from energymodel.sweep import Point

OBJECTIVES: Mapping[str, Callable[[Point], float | None]] = {
    "energy": lambda point: point.energy_joules,
    "cost": lambda point: point.usd,
    "carbon": lambda point: point.carbon_grams,
}
"""What can be made least: energy [J], rent [USD], carbon [g]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Latency targets; None = no target. Percentiles over all requests of a trace."""

    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    percentile: str = "p99"
    """p50, p90 or p99."""

    def missed(self, ttft: Mapping[str, float], tpot: Mapping[str, float]) -> list[str]:
        """The targets that these latencies miss, in words."""
        found = []
        for name, target, values in (
            ("TTFT", self.ttft_seconds, ttft),
            ("TPOT", self.tpot_seconds, tpot),
        ):
            value = values.get(self.percentile)
            if target is not None and value is not None and value > target:
                found.append(f"{name} {self.percentile} {value:.3g} s is above {target:g} s")
        return found

    def check(self) -> None:
        """Refuse targets that nothing can meet or that are no numbers."""
        if self.percentile not in ("p50", "p90", "p99"):
            raise ConfigurationError(
                unknown_name("percentile", self.percentile, ("p50", "p90", "p99"))
            )
        for option, value in (("ttft", self.ttft_seconds), ("tpot", self.tpot_seconds)):
            if value is not None and not 0.0 < value < np.inf:
                raise ConfigurationError(f"--{option} {value:g}: must be above 0 s")


def pareto_front(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows that no other row beats: nowhere worse, somewhere better. Smaller is better.

    Parameters
    ----------
    values : (points, criteria); a row with NaN is never on the front

    Returns
    -------
    (points,) boolean
    """
    usable = ~np.isnan(values).any(axis=1)
    front = np.zeros(len(values), bool)
    rows = np.flatnonzero(usable)
    rows = rows[np.lexsort(values[rows].T[::-1])]  # whoever beats a row stands before it
    kept: list[int] = []
    for row in rows:
        better = values[kept] if kept else np.empty((0, values.shape[1]))
        beaten = (better <= values[row]).all(axis=1) & (better < values[row]).any(axis=1)
        if not beaten.any():
            kept.append(int(row))
    front[kept] = True
    return front


def criteria(points: Sequence[Point]) -> NDArray[np.float64]:
    """(points, criteria) J/request, TTFT p99, TPOT p99, and USD and g CO2e where all know them."""
    columns = [
        [point.joules_per_request for point in points],
        [point.ttft_seconds.get("p99") for point in points],
        [point.tpot_seconds.get("p99", 0.0) if point.served else None for point in points],
    ]
    for name in ("usd", "carbon_grams"):
        values = [getattr(point, name) for point in points]
        if all(
            value is not None or not point.served
            for value, point in zip(values, points, strict=True)
        ):
            columns.append(values)
    return np.array(columns, dtype=float).T


def ranking(points: Sequence[Point], objective: str, targets: Targets) -> list[int]:
    """Numbers of the points that serve the trace and meet the targets, the best first.

    Raises
    ------
    ConfigurationError
        If the objective is unknown, or no served point knows it.
    """
    if objective not in OBJECTIVES:
        raise ConfigurationError(unknown_name("objective", objective, OBJECTIVES))
    value = OBJECTIVES[objective]
    served = [i for i, point in enumerate(points) if point.served]
    known = [i for i in served if value(points[i]) is not None]
    if served and not known:
        need = {
            "cost": "give prices with --price GPU=USD",
            "carbon": "give the grid with --grid NAME or grams per kWh",
        }
        raise ConfigurationError(f"{objective} is not known for any setting; {need[objective]}")
    fitting = [
        i for i in known if not targets.missed(points[i].ttft_seconds, points[i].tpot_seconds)
    ]
    return sorted(fitting, key=lambda i: (value(points[i]), i))


def differing_axes(points: Sequence[Point]) -> list[str]:
    """Axes on which the settings are not all the same."""
    return [name for name in AXES if len({getattr(point.setting, name) for point in points}) > 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two settings side by side, joules a request."""

    first: Point
    second: Point
    by_component: Mapping[str, tuple[float, float]]
    """Component: joules a request of the first and of the second."""
    sentence: str
    """Which is cheaper, by how much, and through what."""


def compare(first: Point, second: Point, requests: int) -> Comparison:
    """Why one setting is cheaper than another.

    Parameters
    ----------
    first, second : exact points of the same trace
    requests : of the trace

    Raises
    ------
    ConfigurationError
        If one of them cannot be served.
    """
    for point in (first, second):
        if not point.served:
            raise ConfigurationError(f"a setting to compare cannot be served: {point.reason}")
    names = dict.fromkeys([*first.by_component_joules, *second.by_component_joules])
    parts = {
        name: (
            first.by_component_joules.get(name, 0.0) / requests,
            second.by_component_joules.get(name, 0.0) / requests,
        )
        for name in names
    }
    totals = [sum(pair[side] for pair in parts.values()) for side in (0, 1)]
    saving = totals[0] - totals[1]
    cheaper, dearer = ("second", "first") if saving > 0 else ("first", "second")
    changes = {name: (a - b) if saving > 0 else (b - a) for name, (a, b) in parts.items()}
    gains = sorted(changes.items(), key=lambda item: -item[1])
    size = abs(saving)
    if size < 1e-9 * max(totals):
        sentence = "Both take the same energy."
    else:
        saved = [f"{name} ({value:.3g} J)" for name, value in gains if value > 0.05 * size]
        added = [f"{name} ({-value:.3g} J)" for name, value in gains if value < -0.05 * size]
        sentence = (
            f"The {cheaper} takes {size / max(totals):.0%} less than the {dearer}, "
            f"{size:.3g} J a request. It saves on {', '.join(saved)}"
        )
        sentence += f"; it takes more for {', '.join(added)}." if added else "."
    return Comparison(first=first, second=second, by_component=parts, sentence=sentence)
