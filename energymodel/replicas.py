"""How many replicas a trace needs, and what each of them does with its share of the requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from energymodel.accounting import Served, add_up, timeline
from energymodel.deployment import Deployment
from energymodel.errors import CapacityError, ConfigurationError
from energymodel.simulator import Simulation, simulate
from energymodel.traces import Requests

MOST_REPLICAS = 65536
_HOPELESS_SECONDS = 600.0  # no trace is refused for a shorter wait
_ROUNDING = 1e-9  # of times that are sums over many steps
_SAMPLED_REPLICAS = 4  # simulated to judge a number of replicas while searching


def serve_on_replicas(
    requests: Requests, replicas: int | str, deployment: Deployment
) -> tuple[Served, int]:
    """Serve the requests, dealt round robin to the replicas, and add up.

    Parameters
    ----------
    requests : Requests
    replicas : int or `auto`
        `auto` takes the fewest replicas on which no request waits longer than `bearable_seconds`.
    deployment : Deployment

    Returns
    -------
    Served
    int
        Replicas used.

    Raises
    ------
    ConfigurationError
        If `replicas` is neither `auto` nor a number from 1 to `MOST_REPLICAS`.
    CapacityError
        If the replicas cannot keep up with the arrivals: a request would wait longer than the
        trace lasts, and than ten minutes. Says how many would do.
    """
    if replicas == "auto":
        bearable = bearable_seconds(requests)
        count = _fewest(1, requests, deployment, bearable)
        while (runs := _simulate_all(requests, count, deployment, bearable)) is None:
            count += 1  # one that the search did not sample is overloaded
        return _add_up(runs, requests, count, deployment), count
    count = _whole(replicas)
    offline = requests.arrival_seconds[-1] == 0.0
    patience = np.inf if offline else max(float(requests.arrival_seconds[-1]), _HOPELESS_SECONDS)
    served = _simulate_all(requests, count, deployment, patience)
    if served is None:
        enough = _fewest(count + 1, requests, deployment, bearable_seconds(requests))
        raise CapacityError(
            f"{requests.name}: {count} replica{'s' if count > 1 else ''} cannot keep up with the "
            f"arrivals, requests would wait without end; {enough} would. Use --replicas {enough} "
            "or --replicas auto, or --arrivals offline to ignore arrival times."
        )
    return _add_up(served, requests, count, deployment), count


def bearable_seconds(requests: Requests) -> float:
    """Longest wait of a load that is kept up with: 30 s and a tenth of the trace's duration.

    Infinite where all requests arrive at once: they have to wait for each other.
    """
    duration = float(requests.arrival_seconds[-1])
    return np.inf if duration == 0.0 else 30.0 + 0.1 * duration


def _whole(replicas: int | str) -> int:
    try:
        count = int(replicas)
    except ValueError:
        count = 0
    if not 1 <= count <= MOST_REPLICAS:
        raise ConfigurationError(
            f"--replicas {replicas} makes no sense; it is auto or 1 to {MOST_REPLICAS}"
        )
    return count


def _fewest(start: int, requests: Requests, deployment: Deployment, patience: float) -> int:
    """Fewest replicas, at least `start`, whose sampled members keep up: doubling, then halving."""
    low, high = start - 1, start
    while not _keep_up(high, requests, deployment, patience):
        if high >= MOST_REPLICAS:
            raise CapacityError(
                f"{requests.name}: even {high} replicas cannot keep up with the arrivals: a "
                "request takes too long by itself; use a faster GPU or more --tensor-parallel"
            )
        low, high = high, min(2 * high, MOST_REPLICAS)
    while high - low > 1:
        middle = (low + high) // 2
        if _keep_up(middle, requests, deployment, patience):
            high = middle
        else:
            low = middle
    return high


def _keep_up(count: int, requests: Requests, deployment: Deployment, patience: float) -> bool:
    sampled = np.unique(np.linspace(0, count - 1, min(count, _SAMPLED_REPLICAS)).astype(int))
    return all(
        _simulate_share(requests, int(index), count, deployment, patience) is not None
        for index in sampled
        if index < requests.input_tokens.size
    )


def _simulate_all(
    requests: Requests, count: int, deployment: Deployment, patience: float
) -> list[Simulation] | None:
    """What every replica that sees a request does; None if one cannot keep up."""
    runs = []
    for index in range(min(count, requests.input_tokens.size)):
        run = _simulate_share(requests, index, count, deployment, patience)
        if run is None:
            return None
        runs.append(run)
    return runs


def _simulate_share(
    requests: Requests, index: int, count: int, deployment: Deployment, patience: float
) -> Simulation | None:
    """One replica's run; None if a request would wait longer than `patience` [s]."""
    share = slice(index, None, count)
    arrival = requests.arrival_seconds[share]
    run = simulate(
        arrival,
        requests.input_tokens[share],
        requests.output_tokens[share],
        deployment.costs,
        cached_tokens=None if requests.cached_tokens is None else requests.cached_tokens[share],
        static_batches=deployment.static_batches,
        abandon_seconds=patience,
    )
    if run is None:
        return None
    # static batches have no admission to give up on: look at the waits afterwards
    if deployment.static_batches and np.max(run.first_token_seconds - arrival) > patience:
        return None
    return run


def _add_up(
    runs: list[Simulation], requests: Requests, count: int, deployment: Deployment
) -> Served:
    first, finish, joules = _gather(runs, requests.input_tokens.size, count)
    wall = float(finish.max())
    busy = sum(run.totals["gpu_seconds"] + run.totals["wait_seconds"] for run in runs)
    idle = wall * count - busy  # replicas that never see a request idle as well
    if idle < _ROUNDING * wall * count:
        idle = 0.0
    served = add_up(
        runs,
        deployment,
        weights=np.ones(len(runs)),
        first_token_seconds=first,
        finish_seconds=finish,
        request_joules=joules,
        wall_seconds=wall,
        idle_seconds=idle,
    )
    over_time = timeline(runs, deployment, replicas=count, wall_seconds=wall)
    return replace(served, timeline=over_time)


def _gather(runs: list[Simulation], size: int, count: int) -> tuple[NDArray[np.float64], ...]:
    """First token, finish and joules of all requests, in the trace's order."""
    first, finish, joules = np.zeros((3, size))
    for index, run in enumerate(runs):
        share = slice(index, None, count)
        first[share], finish[share] = run.first_token_seconds, run.finish_seconds
        joules[share] = run.request_joules
    return first, finish, joules
