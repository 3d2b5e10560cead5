"""Many replicas fed with requests in pieces: memory stays flat, results are sums and histograms.

    for piece in read_batches("week.csv"):
        fleet.serve(piece.arrival_seconds, piece.input_tokens, piece.output_tokens)
    served = fleet.finish()

The replicas are simulated exactly, as `replicas.serve_on_replicas` does for traces that fit into
memory; only latencies are rounded, to 1 %, so that percentiles can be taken from histograms.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.accounting import add_up, energy_parts
from energymodel.bins import EXACT_GRID
from energymodel.continuous_batching import Replica, advance, new_replica
from energymodel.deployment import Deployment
from energymodel.errors import CapacityError, ConfigurationError
from energymodel.requests_in_flight import SERVED, new_done
from energymodel.simulator import Simulation, parameters, pass_counts
from energymodel.step_costs import TOTALS, new_sums

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_BUCKETS_PER_E = 100  # a latency bucket is 1 % wide
_SHORTEST_SECONDS = 1e-6
_BUCKETS = 3300  # up to e^33 us, some years


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FleetServed:
    """How a fleet served its requests.

    Energies [J] are of all GPUs together, times [s] count from the first arrival.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    active_joules: float
    idle_joules: float
    prefill_joules: float
    decode_joules: float
    by_component_joules: Mapping[str, float]
    by_operator_joules: Mapping[str, float]
    bin_requests: Ints
    """(inputs, outputs) requests by the bins of `bins.EXACT_GRID`."""
    bin_active_joules: Array
    """(inputs, outputs) active energy by the same bins."""
    wall_seconds: float
    busy_seconds: float
    steps: int
    preemptions: int
    ttft: LatencyHistogram
    tpot: LatencyHistogram
    e2e: LatencyHistogram

    @property
    def energy_joules(self) -> float:
        """Active and idle."""
        return self.active_joules + self.idle_joules


@dataclass(slots=True)
class LatencyHistogram:
    """Counts of latencies by buckets 1 % wide."""

    counts: Ints = field(default_factory=lambda: np.zeros(_BUCKETS, np.int64))

    def add(self, seconds: Array) -> None:
        """Count latencies [s]."""
        bucket = np.log(np.maximum(seconds, _SHORTEST_SECONDS) / _SHORTEST_SECONDS)
        index = np.minimum((bucket * _BUCKETS_PER_E).astype(np.int64), _BUCKETS - 1)
        self.counts += np.bincount(index, minlength=_BUCKETS)

    def percentile(self, percent: float) -> float | None:
        """Latency that `percent` of the requests do not exceed [s]; None without requests."""
        total = int(self.counts.sum())
        if total == 0:
            return None
        bucket = int(np.searchsorted(np.cumsum(self.counts), percent / 100.0 * total))
        middle = (bucket + 0.5) / _BUCKETS_PER_E
        return float(_SHORTEST_SECONDS * np.exp(middle))


class Fleet:
    """Replicas of one deployment, to which requests go round robin in order of arrival.

    Parameters
    ----------
    deployment : Deployment
        With continuous batching.
    replicas : int
    threads : int
        Cores to use; replicas are independent.

    Raises
    ------
    ConfigurationError
        If the deployment serves static batches.
    """

    def __init__(self, deployment: Deployment, replicas: int, *, threads: int = 1) -> None:
        if deployment.static_batches:
            raise ConfigurationError(
                "a stream of requests is served with continuous batching only; use --stack vllm"
            )
        if deployment.serving.draft is not None:
            raise ConfigurationError("a stream of requests is served without a draft model only")
        self.deployment = deployment
        self._groups = [
            _Group(deployment, range(first, replicas, threads), replicas)
            for first in range(min(threads, replicas))
        ]
        self._replicas = replicas
        self._first = 0
        self._tokens = np.zeros(2, np.int64)

    def serve(self, arrival_seconds: Array, input_tokens: Ints, output_tokens: Ints) -> None:
        """Serve the next requests, each array (n,); arrivals go on from the piece before.

        Raises
        ------
        CapacityError
            If a request can never be scheduled.
        """
        piece = (
            np.ascontiguousarray(arrival_seconds, np.float64),
            np.ascontiguousarray(input_tokens, np.int64),
            np.ascontiguousarray(output_tokens, np.int64),
        )
        self._tokens += (int(piece[1].sum()), int(piece[2].sum()))
        self._run(piece, no_more=False)
        self._first += len(piece[0])

    def finish(self) -> FleetServed:
        """Serve what is still waiting or running, and add up."""
        nothing = (np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._run(nothing, no_more=True)
        return self._add_up()

    def _run(self, piece: tuple[Array, Ints, Ints], *, no_more: bool) -> None:
        if len(self._groups) == 1:
            self._groups[0].run(piece, self._first, no_more)
            return
        with ThreadPoolExecutor(len(self._groups)) as pool:
            jobs = [pool.submit(g.run, piece, self._first, no_more) for g in self._groups]
            for job in jobs:
                job.result()

    def _add_up(self) -> FleetServed:
        groups, deployment = self._groups, self.deployment
        wall = max(group.last_finish for group in groups)
        runs = [group.as_simulation() for group in groups]
        busy = sum(run.totals["gpu_seconds"] + run.totals["wait_seconds"] for run in runs)
        served = add_up(
            runs,
            deployment,
            weights=np.ones(len(runs)),
            first_token_seconds=np.zeros(0),
            finish_seconds=np.zeros(0),
            request_joules=np.zeros(0),
            wall_seconds=wall,
            idle_seconds=wall * self._replicas - busy,
        )
        bins = np.sum([group.bins for group in groups], axis=0)
        latencies = [
            LatencyHistogram(np.sum([h.counts for h in same], axis=0))
            for same in zip(*(group.latencies for group in groups), strict=True)
        ]
        components, operators = energy_parts(served)
        return FleetServed(
            requests=self._first,
            input_tokens=int(self._tokens[0]),
            output_tokens=int(self._tokens[1]),
            active_joules=served.prefill_joules + served.decode_joules,
            idle_joules=served.idle_joules,
            prefill_joules=served.prefill_joules,
            decode_joules=served.decode_joules,
            by_component_joules=components,
            by_operator_joules=operators,
            bin_requests=bins[0].astype(np.int64),
            bin_active_joules=bins[1] * deployment.gpus_per_replica,
            wall_seconds=wall,
            busy_seconds=served.busy_seconds,
            steps=served.steps,
            preemptions=served.preemptions,
            ttft=latencies[0],
            tpot=latencies[1],
            e2e=latencies[2],
        )


class _Group:
    """The replicas that one thread runs, and what they add up together."""

    def __init__(self, deployment: Deployment, members: range, replicas: int) -> None:
        costs = deployment.costs
        self.members = members
        self.step = replicas
        self.parameters = parameters(costs)
        self.name = f"{deployment.gpus_per_replica} x {deployment.gpu.title}"
        self.replicas: list[Replica] = [new_replica(costs) for _ in members]
        empty = (np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.left_over: list[tuple[Array, Ints, Ints]] = [empty for _ in members]
        self.sums = new_sums(len(costs.tokens), len(costs.rows))
        self.bins = np.zeros((2, EXACT_GRID.input_edges.size, EXACT_GRID.output_edges.size))
        self.latencies = (LatencyHistogram(), LatencyHistogram(), LatencyHistogram())
        self.last_finish = 0.0
        self.max_batch = costs.scheduler.max_batch

    def run(self, piece: tuple[Array, Ints, Ints], first: int, no_more: bool) -> None:
        for place, member in enumerate(self.members):
            share = slice((member - first) % self.step, None, self.step)
            arrival, inputs, outputs = (
                np.concatenate([old, new[share]])
                for old, new in zip(self.left_over[place], piece, strict=True)
            )
            done = new_done(arrival.size + self.max_batch)
            call: tuple[Any, ...] = (
                *(self.replicas[place], self.sums),
                *((arrival, inputs, outputs, np.zeros_like(inputs)), 0, no_more),
                *(*self.parameters, True, np.inf, done),
            )
            admitted, ended, status = advance(*call)
            if status != SERVED:
                raise CapacityError(
                    f"a request of {inputs[admitted]} input and {outputs[admitted]} output tokens "
                    f"does not fit the KV cache of {self.name}"
                )
            self.left_over[place] = (arrival[admitted:], inputs[admitted:], outputs[admitted:])
            self._fold(done.ids[:ended], done.times[:ended])

    def _fold(self, ids: Ints, times: Array) -> None:
        if not len(ids):
            return
        _, inputs, outputs = ids.T
        arrival, first_token, finish, joules = times.T
        ttft, tpot, e2e = self.latencies
        ttft.add(first_token - arrival)
        e2e.add(finish - arrival)
        several = outputs > 1
        tpot.add((finish - first_token)[several] / (outputs[several] - 1))
        shape = self.bins.shape[1:]
        cell = np.searchsorted(EXACT_GRID.input_edges, inputs) * shape[1] + np.searchsorted(
            EXACT_GRID.output_edges, outputs
        )
        size = shape[0] * shape[1]
        self.bins[0] += np.bincount(cell, minlength=size).reshape(shape)
        self.bins[1] += np.bincount(cell, joules, size).reshape(shape)
        self.last_finish = max(self.last_finish, float(finish.max()))

    def as_simulation(self) -> Simulation:
        """The sums of all members, as if one replica had done it all."""
        totals = np.sum([replica.totals for replica in self.replicas], axis=0)
        return Simulation(
            first_token_seconds=np.zeros(0),
            finish_seconds=np.zeros(0),
            request_joules=np.zeros(0),
            passes=(pass_counts(self.sums),),
            slices=self.sums[4],
            slice_seconds=float(self.sums[5][0]),
            totals=dict(zip(TOTALS, totals.tolist(), strict=True)),
        )
