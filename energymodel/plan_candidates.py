"""Pools that can serve a share of a trace: the fewest replicas within the targets, simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from energymodel.journal import Journal
from energymodel.pareto import OBJECTIVES, Targets
from energymodel.settings import Setting
from energymodel.steady_state import summarise
from energymodel.sweep import Point, Workload, evaluate
from energymodel.sweep_run import fingerprint
from energymodel.traces import Requests

SHARES = tuple(Fraction(k, 4) for k in (4, 3, 2, 1))
"""Shares of a trace's requests that a pool may serve."""
_MOST_REPLICAS = 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """A trace to serve, and the model that serves it."""

    name: str
    model: str
    workload: Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What to look for: one setting, one share of one trace, at most so many replicas."""

    demand: int
    setting: Setting
    share: Fraction
    most_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The outcome of a search."""

    search: Search
    point: Point | None
    """The fewest replicas that meet the targets, spare ones included; None if none do."""
    reason: str = ""
    """Why there is none."""


SearchJournal = Journal[Search, tuple[Found, ...]]


def search_journal(
    path: Path, demands: Sequence[Demand], targets: Targets, margin: float
) -> SearchJournal:
    """The journal of a plan's searches; SweepError as in `Journal`."""
    traces = [(demand.model, fingerprint(demand.workload)) for demand in demands]
    digest = sha256(repr((traces, targets, margin)).encode()).hexdigest()[:16]
    return Journal(path, digest, what="searches", read=_from_json, write=_to_json)


def _to_json(task: Search, found: tuple[Found, ...]) -> dict[str, Any]:
    outcomes = [
        {"point": None if one.point is None else one.point.to_dict(), "reason": one.reason}
        for one in found
    ]
    return {**asdict(task), "share": str(task.share), "found": outcomes}


def _from_json(value: Any) -> tuple[Search, tuple[Found, ...]]:
    task = Search(
        demand=value["demand"],
        setting=Setting(**value["setting"]),
        share=Fraction(value["share"]),
        most_replicas=value["most_replicas"],
    )
    return task, tuple(
        Found(
            search=task,
            point=None if one["point"] is None else Point.from_dict(one["point"]),
            reason=one["reason"],
        )
        for one in value["found"]
    )


def part_of(requests: Requests, share: Fraction, first: int = 0) -> Requests:
    """Every so many requests of a trace, in turn; arrivals still count from the trace's start.

    Of 1/share.denominator-ths of the requests it takes share.numerator, from `first` on.
    """
    if share == 1:
        return requests
    turn = (np.arange(requests.arrival_seconds.size) - first) % share.denominator
    return requests.take(turn < share.numerator)


def part_workload(workload: Workload, share: Fraction, first: int = 0) -> Workload:
    """The workload of such a part."""
    if share == 1:
        return workload
    assert workload.requests is not None
    requests = part_of(workload.requests, share, first)
    return replace(
        workload,
        requests=requests,
        binned=summarise(requests),
        output_tokens=int(requests.output_tokens.sum()),
    )


def spare_replicas(replicas: int, margin: float) -> int:
    """Replicas of which a share `margin` may be down while `replicas` are left.

    The least n with n - ceil(margin n) >= replicas; `margin` is below 1.
    """
    n = replicas
    while n - ceil(margin * n - 1e-9) < replicas:
        n += 1
    return n


def search(
    task: Search, workload: Workload, variants: Sequence[tuple[Targets, float]]
) -> tuple[Found, ...]:
    """Find the fewest replicas on which a share of a trace meets the targets.

    Doubling from the estimate, then halving; every step is an exact simulation. Latencies fall
    with the number of replicas, but for chance.

    Parameters
    ----------
    task : Search
    workload : of the whole trace
    variants : targets and the share of replicas that may be down, a search for each
    """
    part = part_workload(workload, task.share)
    served = int(part.binned.total_requests)
    most = max(1, min(_MOST_REPLICAS, served, task.most_replicas))
    guess = evaluate(replace(task.setting, replicas="auto"), part, "binned")
    if not guess.served and "keep up" not in guess.reason:
        return tuple(Found(search=task, point=None, reason=guess.reason) for _ in variants)
    tried: dict[int, Point] = {}

    def point_of(count: int) -> Point:
        if count not in tried:
            tried[count] = evaluate(replace(task.setting, replicas=count), part, "exact")
        return tried[count]

    first = min(max(guess.replicas or 1, 1), most)
    return tuple(
        _fewest(task, targets, margin, point_of, first, most) for targets, margin in variants
    )


def _fewest(
    task: Search,
    targets: Targets,
    margin: float,
    point_of: Callable[[int], Point],
    first: int,
    most: int,
) -> Found:
    def meets(count: int) -> bool:
        point = point_of(count)
        return point.served and not targets.missed(point.ttft_seconds, point.tpot_seconds)

    low, high = 0, first
    while not meets(high):
        if high == most:
            last = point_of(high)
            missed = targets.missed(last.ttft_seconds, last.tpot_seconds)
            plural = "s" if high > 1 else ""
            reason = f"with {high} replica{plural}: {last.reason or '; '.join(missed)}"
            return Found(search=task, point=None, reason=reason)
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return Found(search=task, point=point_of(spare_replicas(high, margin)))


def best_settings(found: Sequence[Found], objective: str, keep: int) -> list[Setting]:
    """Settings of the best points: the `keep` of least objective, and the one of fewest GPUs."""
    points = [f.point for f in found if f.point is not None]
    value = OBJECTIVES[objective]
    known = sorted((p for p in points if value(p) is not None), key=lambda p: value(p) or 0.0)[
        :keep
    ]
    if points:
        known.append(min(points, key=lambda p: p.gpus or 0))
    return list(dict.fromkeys(replace(p.setting, replicas="auto") for p in known))
