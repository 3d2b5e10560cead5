"""The story of a plan: search candidates, choose, simulate the choice, say what binds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from energymodel.errors import ConfigurationError
from energymodel.gpus import load_gpu
from energymodel.pareto import OBJECTIVES, Targets
from energymodel.plan_candidates import (
    SHARES,
    Demand,
    Found,
    Search,
    SearchJournal,
    best_settings,
    part_workload,
    search,
)
from energymodel.planning import (
    Binding,
    Choice,
    Option,
    Stock,
    choose,
    without_racks,
    without_stock_limit,
)
from energymodel.settings import Setting
from energymodel.sweep import Point, percentiles, simulated
from energymodel.sweep_run import run_tasks

_SPLIT_SETTINGS = 2  # best settings of a GPU type that may serve a part of a trace
_CORRECTIONS = 8  # replicas added where the check misses a target by chance
_AT_LEAST = 8  # replicas that a search may try, however small the stock


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Replicas of one setting that serve a share of one trace, as the check found them."""

    demand: str
    share: Fraction
    first: int
    """Which of the trace's requests the share starts with."""
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fleet chosen, or why there is none. Energies [J] of GPU boards."""

    objective: str
    targets: Targets
    pools: tuple[Pool, ...] = ()
    value: float | None = None
    """Of the objective: J, USD or g CO2e."""
    energy_joules: float | None = None
    energy_joules_low: float | None = None
    energy_joules_high: float | None = None
    usd: float | None = None
    carbon_grams: float | None = None
    gpus: dict[str, int] = field(default_factory=dict)
    """Boards in use, by GPU."""
    latencies: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """By trace: `ttft_seconds` and `tpot_seconds` by percentile, over all its pools."""
    bindings: tuple[Binding, ...] = ()
    candidates: int = 0
    """Pools that would meet the targets."""
    infeasible: str = ""
    """Why no plan exists; empty if there is one."""

    @property
    def feasible(self) -> bool:
        """Whether there is a plan."""
        return not self.infeasible


def make_plan(
    demands: Sequence[Demand],
    settings: Sequence[Setting],
    stock: Stock,
    targets: Targets,
    *,
    objective: str = "energy",
    margin: float = 0.0,
    journal: SearchJournal | None = None,
    report: Callable[[object], object] = lambda done: None,
    **where: Any,
) -> Plan:
    """Find the fleet of least objective.

    Parameters
    ----------
    demands : the traces and their models
    settings : candidates, each with its GPU; model and replicas are set here
    stock : the GPUs there are
    targets : of every trace
    objective : `energy`, `cost` or `carbon`
    margin : share of each pool's replicas that may be down [-], from 0 to below 1
    journal : keeps searches, and gives those of an earlier run
    report : called when a search has ended, for a progress bar
    where : backend, scheduler and jobs, as in `sweep_run.run_tasks`

    Raises
    ------
    ConfigurationError
        If the stock is empty, the margin is out of range, or the objective is not known.
    SweepError
        As in `sweep_run.run_tasks`, and if the journal cannot be written.
    KeyboardInterrupt
        Passed on, after what was found is in the journal.
    """
    stock.check()
    targets.check()
    if not 0.0 <= margin < 1.0:
        raise ConfigurationError(f"--margin {margin:g}: must be from 0 to below 1")
    if objective not in OBJECTIVES:
        raise ConfigurationError(f"unknown objective '{objective}': {', '.join(OBJECTIVES)}")
    variants = _variants(targets, margin)
    names = list(variants)
    run = _Searches(demands, stock, list(variants.values()), journal, report, where)
    whole = run(
        [
            (number, replace(setting, model=demand.model), Fraction(1))
            for number, demand in enumerate(demands)
            for setting in settings
        ]
    )
    found = whole + run(_splits(whole, demands, objective))
    options = {name: _options(found, i) for i, name in enumerate(names)}
    own = options["all"]
    choice = None
    pools: list[Pool] = []
    latencies: dict[str, dict[str, dict[str, float]]] = {}
    for _ in range(_CORRECTIONS):
        choice = choose(own, len(demands), stock, objective)
        if choice is None:
            break
        pools, latencies, failing = _check(choice, demands, targets)
        if failing is None:
            break
        own = _corrected(own, failing, demands, targets)
        choice = None
    if choice is None:
        reason = _why_not(demands, whole, options, stock, objective)
        return Plan(objective=objective, targets=targets, infeasible=reason, candidates=len(own))
    options["all"] = own
    return _plan(choice, pools, latencies, demands, options, stock, objective, targets)


def _variants(targets: Targets, margin: float) -> dict[str, tuple[Targets, float]]:
    """The constraints as given, and with one left out at a time."""
    found = {"all": (targets, margin)}
    if targets.ttft_seconds is not None:
        found["TTFT target"] = (replace(targets, ttft_seconds=None), margin)
    if targets.tpot_seconds is not None:
        found["TPOT target"] = (replace(targets, tpot_seconds=None), margin)
    if margin > 0.0:
        found["availability margin"] = (targets, 0.0)
    return found


class _Searches:
    """Runs searches in parallel; what a search needs goes to workers once."""

    def __init__(
        self,
        demands: Sequence[Demand],
        stock: Stock,
        variants: list[tuple[Targets, float]],
        journal: SearchJournal | None,
        report: Callable[[object], object],
        where: dict[str, Any],
    ) -> None:
        self.shared = ([demand.workload for demand in demands], variants)
        self.stock = stock
        self.journal = journal
        self.report = report
        self.where = where

    def __call__(self, wanted: list[tuple[int, Setting, Fraction]]) -> list[tuple[Found, ...]]:
        tasks = [
            Search(demand=number, setting=setting, share=share, most_replicas=self._most(setting))
            for number, setting, share in wanted
        ]
        found = {} if self.journal is None else dict(self.journal.kept)
        for task in tasks:
            if task in found:
                self.report(found[task])
        left = [task for task in dict.fromkeys(tasks) if task not in found]
        for number, result in run_tasks(_search, left, self.shared, **self.where):
            task = left[number]
            found[task] = result
            if self.journal is not None:
                self.journal.add(task, result)
            self.report(result)
        return [found[task] for task in tasks]

    def _most(self, setting: Setting) -> int:
        """Twice the stock: enough to say how many would do."""
        group = setting.tensor_parallel * setting.pipeline_parallel
        return max(2 * self.stock.gpus.get(load_gpu(setting.gpu).name, 0) // group, _AT_LEAST)


def _search(task: Search, shared: tuple[list[Any], list[tuple[Targets, float]]]) -> Any:
    workloads, variants = shared
    return search(task, workloads[task.demand], variants)


def _options(found: Sequence[tuple[Found, ...]], variant: int) -> list[Option]:
    options = []
    for result in found:
        point = result[variant].point
        if point is not None:
            task = result[variant].search
            options.append(_option(task.demand, task.share, point))
    return options


def _option(demand: int, share: Fraction, point: Point) -> Option:
    gpu = load_gpu(point.setting.gpu)
    return Option(
        demand=demand,
        share=share,
        point=point,
        gpu=gpu.name,
        board_watts=point.setting.power_limit_watts or gpu.tdp_watts,
    )


def _endless(stock: Stock) -> Stock:
    for gpu in stock.gpus:
        stock = without_stock_limit(stock, gpu)
    return without_racks(stock)


def _splits(
    found: Sequence[tuple[Found, ...]], demands: Sequence[Demand], objective: str
) -> list[tuple[int, Setting, Fraction]]:
    """Parts of traces, for the best settings of each GPU type."""
    wanted = []
    for number in range(len(demands)):
        own = [result[0] for result in found if result[0].search.demand == number]
        for gpu in dict.fromkeys(one.search.setting.gpu for one in own):
            same = [one for one in own if one.search.setting.gpu == gpu]
            # where a whole trace is too much, a part may not be
            settings = best_settings(same, objective, _SPLIT_SETTINGS) or [
                one.search.setting for one in same
            ]
            wanted += [(number, s, share) for s in settings for share in SHARES if share < 1]
    return wanted


def _turns(shares: Sequence[Fraction]) -> list[int]:
    """First request of each part, largest part first, so that parts do not overlap."""
    free = set(range(4))
    first = []
    for share in shares:
        size = int(share * 4)
        start = next(
            start
            for start in range(4)
            if {(start + step * (2 if size == 2 else 1)) % 4 for step in range(size)} <= free
        )
        free -= {(start + step * (2 if size == 2 else 1)) % 4 for step in range(size)}
        first.append(start)
    return first


def _check(
    choice: Choice, demands: Sequence[Demand], targets: Targets
) -> tuple[list[Pool], dict[str, dict[str, dict[str, float]]], Option | None]:
    """Simulate the pools on the requests they get; the first option that misses a target."""
    pools: list[Pool] = []
    latencies: dict[str, dict[str, dict[str, float]]] = {}
    for number, demand in enumerate(demands):
        own = sorted((o for o in choice.options if o.demand == number), key=lambda o: -o.share)
        ttft, tpot = [], []
        for option, first in zip(own, _turns([o.share for o in own]), strict=True):
            part = part_workload(demand.workload, option.share, first)
            point, ttft_s, tpot_s = simulated(option.point.setting, part)
            if targets.missed(point.ttft_seconds, point.tpot_seconds):
                return [], {}, option
            pools.append(Pool(demand=demand.name, share=option.share, first=first, point=point))
            ttft.append(ttft_s)
            tpot.append(tpot_s)
        latencies[demand.name] = {
            "ttft_seconds": percentiles(np.concatenate(ttft)),
            "tpot_seconds": percentiles(np.concatenate(tpot)),
        }
    return pools, latencies, None


def _corrected(
    options: list[Option], failing: Option, demands: Sequence[Demand], targets: Targets
) -> list[Option]:
    """The options with one more replica in the pool that missed a target in the check."""
    setting = failing.point.setting
    assert isinstance(setting.replicas, int)
    more = replace(setting, replicas=setting.replicas + 1)
    part = part_workload(demands[failing.demand].workload, failing.share)
    point, _, _ = simulated(more, part)
    return [
        _option(failing.demand, failing.share, point) if option is failing else option
        for option in options
    ]


def _plan(
    choice: Choice,
    pools: list[Pool],
    latencies: dict[str, dict[str, dict[str, float]]],
    demands: Sequence[Demand],
    options: dict[str, list[Option]],
    stock: Stock,
    objective: str,
    targets: Targets,
) -> Plan:
    points = [pool.point for pool in pools]

    def total(name: str) -> float | None:
        values = [getattr(point, name) for point in points]
        return None if any(value is None for value in values) else float(sum(values))

    gpus: dict[str, int] = {}
    for point in points:
        name = load_gpu(point.setting.gpu).name
        gpus[name] = gpus.get(name, 0) + (point.gpus or 0)
    value = total({"energy": "energy_joules", "cost": "usd", "carbon": "carbon_grams"}[objective])
    assert value is not None
    return Plan(
        objective=objective,
        targets=targets,
        pools=tuple(pools),
        value=value,
        energy_joules=total("energy_joules"),
        energy_joules_low=total("energy_joules_low"),
        energy_joules_high=total("energy_joules_high"),
        usd=total("usd"),
        carbon_grams=total("carbon_grams"),
        gpus=gpus,
        latencies=latencies,
        bindings=_bindings(choice, demands, options, stock, objective),
        candidates=len(options["all"]),
    )


def _relaxations(
    options: dict[str, list[Option]], stock: Stock
) -> list[tuple[str, list[Option], Stock]]:
    """Names of constraints, with the options and the stock that are left without each."""
    found = [
        (f"stock of {count} {gpu}", options["all"], without_stock_limit(stock, gpu))
        for gpu, count in stock.gpus.items()
    ]
    if stock.racks is not None:
        found.append(("power budget of the racks", options["all"], without_racks(stock)))
    found += [(name, options[name], stock) for name in options if name != "all"]
    return found


def _bindings(
    choice: Choice,
    demands: Sequence[Demand],
    options: dict[str, list[Option]],
    stock: Stock,
    objective: str,
) -> tuple[Binding, ...]:
    bindings = []
    for name, left, relaxed in _relaxations(options, stock):
        other = choose(left, len(demands), relaxed, objective)
        saving = 0.0 if other is None else choice.value - other.value
        if other is not None and saving > 1e-6 * choice.value:
            bindings.append(
                Binding(
                    constraint=name,
                    saving=saving,
                    share=saving / choice.value,
                    change=in_words(other.options, demands),
                )
            )
    return tuple(sorted(bindings, key=lambda binding: -binding.saving))


def in_words(options: Sequence[Option], demands: Sequence[Demand]) -> str:
    """`conv on 2 x h100, 25% of code on 4 x a100`."""
    words = []
    for option in sorted(options, key=lambda o: (o.demand, -o.share)):
        share = "" if option.share == 1 else f"{float(option.share):.0%} of "
        words.append(f"{share}{demands[option.demand].name} on {option.gpus} x {option.gpu}")
    return ", ".join(words)


def _why_not(
    demands: Sequence[Demand],
    found: Sequence[tuple[Found, ...]],
    options: dict[str, list[Option]],
    stock: Stock,
    objective: str,
) -> str:
    """The reason why no plan exists, and what would make one possible."""
    reasons = []
    for number, demand in enumerate(demands):
        if any(option.demand == number for option in options["all"]):
            continue
        reasons.append(
            f"no GPU in stock serves {demand.name} within the targets ({_refusals(found, number)})"
        )
    if not reasons:
        needs = []
        for number, demand in enumerate(demands):
            own_options = [replace(o, demand=0) for o in options["all"] if o.demand == number]
            alone = choose(own_options, 1, _endless(stock), objective)
            if alone is not None:
                boards = " + ".join(f"{o.gpus} x {o.gpu}" for o in alone.options)
                needs.append(f"{demand.name} alone takes {boards}")
            else:
                reasons.append(
                    f"no replicas of these settings serve all of {demand.name} "
                    f"({_refusals(found, number)}); try others, such as a larger --tensor-parallel"
                )
        if needs:
            reasons.append(f"the stock is too small: {'; '.join(needs)}")
    ways = []
    for name, left, relaxed in _relaxations(options, stock):
        other = choose(left, len(demands), relaxed, objective)
        if other is not None:
            ways.append(f"without the {name}: {in_words(other.options, demands)}")
    text = ". ".join(reason[0].upper() + reason[1:] for reason in reasons)
    return f"{text}. It would work {'; or '.join(ways)}." if ways else f"{text}."


def _refusals(found: Sequence[tuple[Found, ...]], number: int) -> str:
    """Why each GPU does not serve the whole of a demand."""
    own = [r[0] for r in found if r[0].search.demand == number and r[0].search.share == 1]
    by_gpu = {one.search.setting.gpu: one.reason for one in own if one.reason}
    return "; ".join(f"{gpu} {reason}" for gpu, reason in by_gpu.items())
