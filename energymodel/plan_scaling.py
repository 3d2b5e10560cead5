"""Replicas by time of day: how many of a pool a period needs, and what parking the rest saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.calibrations import Calibration
from energymodel.errors import CapacityError, ConfigurationError, unknown_name
from energymodel.pareto import Targets
from energymodel.plan_candidates import part_workload
from energymodel.settings import Setting
from energymodel.steady_state import summarise
from energymodel.sweep import Workload, deployment_of, percentiles, simulated
from energymodel.sweep_run import run_tasks

Array = NDArray[np.float64]

PARKED = ("off", "cold", "context")
"""What a GPU not needed does: no power, no process on it, or a process that waits on it."""
_MOST_PERIODS = 24 * 366


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaledPool:
    """A pool to be scaled: a share of a trace on at most `setting.replicas`."""

    demand: int
    setting: Setting
    share: Fraction
    first: int
    """Which of its trace's requests the share starts with, see `plan_candidates.part_of`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """What a fleet costs whose replicas follow the load. Energies [J] of GPU boards."""

    period_seconds: float
    parked: str
    replicas: tuple[tuple[int, ...], ...]
    """(pools, periods) replicas that serve."""
    energy_joules: float
    parked_joules: float
    """Of that, the GPUs not needed."""
    fixed_joules: float
    """The same fleet with all replicas always on."""
    replica_hours: float
    fixed_replica_hours: float
    latencies: tuple[dict[str, dict[str, float]], ...]
    """By trace, over all its requests."""

    @property
    def saving_joules(self) -> float:
        """What scaling saves."""
        return self.fixed_joules - self.energy_joules


def parked_watts(calibration: Calibration, parked: str) -> float:
    """Power of a parked GPU [W]; ConfigurationError for an unknown state."""
    watts = {
        "off": 0.0,
        "cold": calibration.cold_idle_watts,
        "context": calibration.context_idle_watts,
    }
    if parked not in watts:
        raise ConfigurationError(unknown_name("parking state", parked, PARKED))
    return watts[parked]


def scale(
    pools: Sequence[ScaledPool],
    workloads: Sequence[Workload],
    targets: Targets,
    *,
    period_seconds: float,
    parked: str = "cold",
    **where: Any,
) -> Scaling:
    """Choose replicas for each period by exact simulation, so that every period meets the targets.

    Requests in flight at the end of a period are served to their end by the replicas that have
    them. Starting a replica takes no time and no energy here; give the fleet a margin for that.
    A period that misses the targets even with all replicas keeps them all. If the periods together
    miss a target, every period gets a replica more.

    Parameters
    ----------
    pools : of a plan
    workloads : by trace
    targets : over all requests of a trace
    period_seconds : how often the number of replicas may change
    parked : one of `PARKED`
    where : as in `sweep_run.run_tasks`

    Raises
    ------
    ConfigurationError
        If the period is not above 0, makes too many periods, or the state is unknown.
    """
    if not 0.0 < period_seconds < np.inf:
        raise ConfigurationError(f"--scale-every {period_seconds:g}: must be above 0 s")
    longest = max(workload.binned.duration_seconds for workload in workloads)
    periods = int(longest // period_seconds) + 1
    if periods > _MOST_PERIODS:
        raise ConfigurationError(
            f"--scale-every {period_seconds:g} s makes {periods:,} periods of the trace's "
            f"{longest:,.0f} s; the most are {_MOST_PERIODS:,}"
        )
    parts = [part_workload(workloads[p.demand], p.share, p.first) for p in pools]
    for pool, part in zip(pools, parts, strict=True):
        parked_watts(deployment_of(pool.setting, part).calibration, parked)
    more = 0
    while True:
        tasks = [
            (number, period, more) for number in range(len(pools)) for period in range(periods)
        ]
        shared = (pools, parts, targets, period_seconds, parked)
        found: dict[int, _Served] = dict(run_tasks(_serve_period, tasks, shared, **where))
        served = [found[i] for i in range(len(tasks))]
        latencies = _latencies(pools, len(workloads), served, periods)
        late = any(targets.missed(x["ttft_seconds"], x["tpot_seconds"]) for x in latencies)
        if not late or all(
            s.replicas == _most(pools[t[0]]) for s, t in zip(served, tasks, strict=True)
        ):
            break
        more += 1
    counts = tuple(
        tuple(s.replicas for s in served[n * periods : (n + 1) * periods])
        for n in range(len(pools))
    )
    hours = period_seconds / 3600.0
    return Scaling(
        period_seconds=period_seconds,
        parked=parked,
        replicas=counts,
        energy_joules=sum(s.joules + s.parked_joules for s in served),
        parked_joules=sum(s.parked_joules for s in served),
        fixed_joules=sum(s.fixed_joules for s in served),
        replica_hours=sum(sum(row) for row in counts) * hours,
        fixed_replica_hours=sum(_most(pool) for pool in pools) * periods * hours,
        latencies=tuple(latencies),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Served:
    replicas: int
    joules: float
    parked_joules: float
    fixed_joules: float
    ttft: Array
    tpot: Array


def _most(pool: ScaledPool) -> int:
    assert isinstance(pool.setting.replicas, int)
    return pool.setting.replicas


def _serve_period(task: tuple[int, int, int], shared: Any) -> _Served:
    """The fewest replicas, and `more`, that serve one period of one pool within the targets."""
    number, period, more = task
    pools, parts, targets, period_seconds, parked = shared
    pool: ScaledPool = pools[number]
    part: Workload = parts[number]
    deployment = deployment_of(pool.setting, part)
    group = deployment.gpus_per_replica
    calibration = deployment.calibration
    state_watts = parked_watts(calibration, parked)
    most = _most(pool)
    window = _window(part, period, period_seconds)
    if window is None:  # nobody comes: one replica stays up for who might
        idle = calibration.polling_idle_watts * group * period_seconds
        count = min(1 + more, most)
        return _Served(
            replicas=count,
            joules=count * idle,
            parked_joules=(most - count) * state_watts * group * period_seconds,
            fixed_joules=most * idle,
            ttft=np.zeros(0),
            tpot=np.zeros(0),
        )

    def serve(count: int) -> tuple[float, Array, Array, bool]:
        point, ttft, tpot = simulated(replace(pool.setting, replicas=count), window)
        assert point.energy_joules is not None
        assert point.wall_seconds is not None
        rest = max(period_seconds - point.wall_seconds, 0.0)
        joules = point.energy_joules + count * group * rest * calibration.polling_idle_watts
        late = targets.missed(point.ttft_seconds, point.tpot_seconds)
        return joules, ttft, tpot, not late

    all_on = serve(most)
    low, high = 0, most
    best = all_on
    if all_on[3]:
        while high - low > 1:
            middle = (low + high) // 2
            try:
                found = serve(middle)
            except CapacityError:  # they cannot keep up
                low = middle
                continue
            if found[3]:
                high, best = middle, found
            else:
                low = middle
    if more and high < most:
        high = min(high + more, most)
        best = serve(high)
    return _Served(
        replicas=high,
        joules=best[0],
        parked_joules=(most - high) * state_watts * group * period_seconds,
        fixed_joules=all_on[0],
        ttft=best[1],
        tpot=best[2],
    )


def _window(part: Workload, period: int, period_seconds: float) -> Workload | None:
    """The requests of one period, times from its start; None without any."""
    requests = part.requests
    assert requests is not None
    start, stop = np.searchsorted(
        requests.arrival_seconds, (period * period_seconds, (period + 1) * period_seconds)
    )
    if start == stop:
        return None
    cut = requests.take(slice(int(start), int(stop)))
    cut = replace(cut, arrival_seconds=cut.arrival_seconds - period * period_seconds)
    return replace(
        part, requests=cut, binned=summarise(cut), output_tokens=int(cut.output_tokens.sum())
    )


def _latencies(
    pools: Sequence[ScaledPool], demands: int, served: Sequence[_Served], periods: int
) -> list[dict[str, dict[str, float]]]:
    found = []
    for demand in range(demands):
        own = [s for i, s in enumerate(served) if pools[i // periods].demand == demand]
        found.append(
            {
                "ttft_seconds": percentiles(np.concatenate([s.ttft for s in own])),
                "tpot_seconds": percentiles(np.concatenate([s.tpot for s in own])),
            }
        )
    return found
