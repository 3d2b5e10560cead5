"""The cheapest fleet that serves some traces within latency targets, from a stock of GPUs.

    candidates: for each trace, setting and share of its traffic, the fewest replicas that meet the
                targets, found by exact simulation (`plan_candidates`)
    choice:     the integer programme below
    check:      the chosen pools simulated on the requests that they would get

With y_j = 1 if option j is chosen, e_j its energy (or cost, or carbon), s_j the share of its
trace's traffic it serves and g_j its GPUs, of type t_j:

    min  sum e_j y_j
    s.t. sum over the options of a trace  s_j y_j  = 1
         sum over the options of a type   g_j y_j <= stock
         sum over the options of a type   g_j y_j <= (GPUs a rack can power) x racks of that type
         racks of all types <= racks

solved with HiGHS through `scipy.optimize.milp`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from energymodel.errors import ConfigurationError
from energymodel.gpus import load_gpu
from energymodel.pareto import OBJECTIVES
from energymodel.sweep import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """The GPUs there are, and what their racks can power."""

    gpus: Mapping[str, int]
    """Boards by canonical GPU name."""
    rack_watts: float | None = None
    """Power budget of a rack for GPU boards; None = no limit. A rack holds one type."""
    racks: int | None = None

    def check(self) -> None:
        """Refuse an empty stock, and racks that power nothing."""
        if not self.gpus or not any(self.gpus.values()):
            raise ConfigurationError("the stock is empty; give GPUs with --stock GPU=COUNT,...")
        for gpu, count in self.gpus.items():
            if count < 0:
                raise ConfigurationError(f"--stock {gpu}={count}: a count is 0 or more")
        if (self.rack_watts is None) != (self.racks is None):
            raise ConfigurationError("--rack-watts and --racks belong together; give both")
        if self.racks is not None and self.racks < 1:
            raise ConfigurationError(f"--racks {self.racks} makes no sense; it is at least 1")
        if self.rack_watts is not None:
            least = min(load_gpu(gpu).tdp_watts for gpu in self.gpus)
            if not self.rack_watts > 0:
                raise ConfigurationError(f"--rack-watts {self.rack_watts:g}: must be above 0 W")
            if self.rack_watts < 0.25 * least:
                raise ConfigurationError(
                    f"--rack-watts {self.rack_watts:g} powers none of the GPUs in stock (the "
                    f"smallest board limit is {least:.0f} W)"
                )

    def per_rack(self, watts: float) -> int | None:
        """Boards of a given limit [W] that a rack powers; None = no limit."""
        return None if self.rack_watts is None else int(self.rack_watts // watts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A pool that could serve a share of a trace within the targets, as simulated."""

    demand: int
    """Number of the trace."""
    share: Fraction
    """Of the trace's requests."""
    point: Point
    """What it costs; `point.replicas` includes the spare ones."""
    gpu: str
    board_watts: float
    """Power limit of a board [W]."""

    @property
    def gpus(self) -> int:
        """Boards that it takes."""
        assert self.point.gpus is not None
        return self.point.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The options chosen and their objective."""

    options: tuple[Option, ...]
    value: float


def value_of(option: Option, objective: str) -> float:
    """Objective of an option: J, USD or g CO2e. ConfigurationError if it is not known."""
    value = OBJECTIVES[objective](option.point)
    if value is None:
        need = {"cost": f"--price {option.gpu}=USD", "carbon": "--grid"}[objective]
        raise ConfigurationError(f"the {objective} of {option.gpu} is not known; give {need}")
    return value


def choose(options: Sequence[Option], demands: int, stock: Stock, objective: str) -> Choice | None:
    """The options of least objective that serve every trace from the stock; None if none do.

    Parameters
    ----------
    options : candidates of all traces
    demands : number of traces
    stock : Stock
    objective : `energy`, `cost` or `carbon`
    """
    if not options:
        return None
    from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415

    types = sorted({(option.gpu, option.board_watts) for option in options})
    gpus = sorted({gpu for gpu, _ in types})
    n, r = len(options), len(types)
    values = np.array([value_of(option, objective) for option in options])
    scale = float(np.abs(values).max()) or 1.0
    # variables: n options (0 or 1), then the racks of each type
    rows: list[np.ndarray] = []
    low: list[float] = []
    high: list[float] = []

    def add(coefficients: np.ndarray, least: float, most: float) -> None:
        rows.append(coefficients)
        low.append(least)
        high.append(most)

    for demand in range(demands):
        of_demand = [option.demand == demand for option in options]
        parts = [option.share.denominator for option in options if option.demand == demand]
        whole = int(np.lcm.reduce(parts)) if parts else 1
        shares = np.array([float(option.share * whole) for option in options])
        add(np.concatenate([shares * of_demand, np.zeros(r)]), whole, whole)
    for gpu in gpus:
        boards = np.array([option.gpus * (option.gpu == gpu) for option in options])
        add(np.concatenate([boards, np.zeros(r)]), 0, stock.gpus.get(gpu, 0))
    if stock.racks is not None:
        for t, (gpu, watts) in enumerate(types):
            same = [(option.gpu, option.board_watts) == (gpu, watts) for option in options]
            boards = np.array([option.gpus for option in options]) * same
            racks = np.zeros(r)
            racks[t] = -float(stock.per_rack(watts) or 0)
            add(np.concatenate([boards, racks]), -np.inf, 0)
        add(np.concatenate([np.zeros(n), np.ones(r)]), 0, stock.racks)
    most_racks = float(stock.racks or 0)
    result = milp(
        np.concatenate([values / scale, np.zeros(r)]),
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=np.ones(n + r),
        bounds=Bounds(np.zeros(n + r), np.concatenate([np.ones(n), np.full(r, most_racks)])),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    chosen = tuple(option for option, y in zip(options, result.x[:n], strict=True) if y > 0.5)
    return Choice(options=chosen, value=sum(value_of(option, objective) for option in chosen))


def fits(options: Sequence[Option], stock: Stock) -> bool:
    """Whether the stock and its racks hold the options' boards."""
    by_type: dict[tuple[str, float], int] = {}
    by_gpu: dict[str, int] = {}
    for option in options:
        key = (option.gpu, option.board_watts)
        by_type[key] = by_type.get(key, 0) + option.gpus
        by_gpu[option.gpu] = by_gpu.get(option.gpu, 0) + option.gpus
    if any(count > stock.gpus.get(gpu, 0) for gpu, count in by_gpu.items()):
        return False
    if stock.racks is None:
        return True
    racks = 0
    for (_, watts), count in by_type.items():
        per_rack = stock.per_rack(watts)
        if not per_rack:
            return False
        racks += -(-count // per_rack)
    return racks <= stock.racks


def choose_by_trying(
    options: Sequence[Option], demands: int, stock: Stock, objective: str
) -> Choice | None:
    """The same as `choose` by trying every combination: for small cases and for tests."""
    by_demand = []
    for demand in range(demands):
        own = [option for option in options if option.demand == demand]
        by_demand.append(
            [
                subset
                for size in range(1, len(own) + 1)
                for subset in itertools.combinations(own, size)
                if sum(option.share for option in subset) == 1
            ]
        )
    best: Choice | None = None
    for parts in itertools.product(*by_demand):
        chosen = tuple(option for part in parts for option in part)
        value = sum(value_of(option, objective) for option in chosen)
        if fits(chosen, stock) and (best is None or value < best.value):
            best = Choice(options=chosen, value=value)
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """A constraint without which the plan would be cheaper."""

    constraint: str
    saving: float
    """Of the objective [J, USD or g], if the constraint were not there."""
    share: float
    """The saving over the plan's objective [-]."""
    change: str
    """What the plan would be instead."""


def without_stock_limit(stock: Stock, gpu: str) -> Stock:
    """The stock with as many boards of a type as one likes."""
    return replace(stock, gpus={**stock.gpus, gpu: 1 << 20})


def without_racks(stock: Stock) -> Stock:
    """The stock without a power budget."""
    return replace(stock, rack_watts=None, racks=None)
