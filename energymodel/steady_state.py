"""A fast estimate of a trace on replicas: windows of time, each in the steady state of a queue.

The trace is reduced to sums by window of time and a histogram of prompt lengths (`summarise`);
`estimate` then costs the same for a thousand requests as for forty million. Each window is a
processor-sharing queue whose rate depends on the number N of sequences in flight, which does not
depend on the distribution of lengths beyond the mean (Bonald and Proutiere 2003, "Insensitivity in
processor-sharing networks"). With lambda arrivals a second at one replica, O the mean output, d(N)
the time of a step of N decoding sequences and p(N) what a prompt adds to it, a request stays

    S(N) = (O - 1) d(N) / (1 - lambda p(N)) + d(N) + p(N)

and N follows the Bernoulli-Poisson-Pascal law of arrivals with peakedness z (Delbrouck 1981), which
is Poisson for z = 1:

    pi(N) / pi(N - 1) = (lambda S(N) / z + (N - 1) (1 - 1/z)) / N

z is that of gamma-distributed gaps with shape replicas / D, D the variance over the mean of
arrivals a second: dealing requests out in turn evens arrivals out, bursts do the opposite. What
exceeds the capacity of a window waits for the next. docs/planning.md states the error against the
exact simulation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.bins import EXACT_GRID
from energymodel.compiled import compiled
from energymodel.deployment import Deployment
from energymodel.errors import CapacityError, ConfigurationError
from energymodel.simulator import parameters
from energymodel.step_costs import (
    DECODE,
    DECODE_ATTENTION,
    PREFILL,
    PREFILL_ATTENTION,
    SECONDS,
    pairs,
    step_cost,
)
from energymodel.traces import Requests

Array = NDArray[np.float64]

WINDOW_SECONDS = 60.0
_FULLEST = 0.98  # share of its capacity at which a window with a backlog runs
_TAIL = 8  # points that stand for an exponential wait


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BinnedTrace:
    """Sums of a trace by window of time, and its prompt lengths."""

    name: str
    window_seconds: float
    requests: Array
    """(windows,) requests that arrive."""
    dispersion: float
    """Variance over mean of the arrivals a second, within windows [-]; 1 for Poisson."""
    output_tokens: Array
    """(windows,) tokens they put out."""
    context_tokens: Array
    """(windows,) context summed over those tokens."""
    input_lengths: Array
    """(bins,) mean prompt of each bin of length [token]."""
    input_requests: Array
    """(bins,) requests in it."""
    input_tokens: int
    duration_seconds: float
    """From the first arrival to the last."""
    longest_tokens: int
    """Longest input and output together."""

    @property
    def total_requests(self) -> int:
        """Requests of the trace."""
        return int(self.requests.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What `estimate` finds. Energies [J] of all GPUs, latencies [s]."""

    active_joules: float
    idle_joules: float
    wall_seconds: float
    busy_share: float
    ttft_seconds: dict[str, float]
    """p50, p90, p99."""
    tpot_seconds: dict[str, float]
    waiting_seconds: float
    """Longest time that a window's arrivals wait because earlier ones were too many."""


def summarise(
    pieces: Iterable[Requests] | Requests, *, window_seconds: float = WINDOW_SECONDS
) -> BinnedTrace:
    """Reduce a trace, whole or in pieces, to what `estimate` needs."""
    if isinstance(pieces, Requests):
        pieces = [pieces]
    edges = EXACT_GRID.input_edges
    by_length = np.zeros((2, edges.size))
    by_window = np.zeros((4, 0))
    last, longest, inputs_total = 0.0, 0, 0
    name = ""
    for piece in pieces:
        name = piece.name
        window = (piece.arrival_seconds // window_seconds).astype(np.int64)
        size = max(by_window.shape[1], int(window[-1]) + 1)
        by_window = np.pad(by_window, ((0, 0), (0, size - by_window.shape[1])))
        inputs = piece.input_tokens.astype(float)
        outputs = piece.output_tokens.astype(float)
        for row, weights in enumerate((None, outputs, outputs * (inputs + 0.5 * outputs))):
            by_window[row] += np.bincount(window, weights, size)
        seconds = np.bincount(piece.arrival_seconds.astype(np.int64))
        busy = np.flatnonzero(seconds)
        squares = seconds[busy].astype(float) ** 2
        by_window[3] += np.bincount((busy // window_seconds).astype(np.int64), squares, size)
        index = np.searchsorted(edges, piece.input_tokens)
        by_length[0] += np.bincount(index, minlength=edges.size)
        by_length[1] += np.bincount(index, inputs, edges.size)
        last = float(piece.arrival_seconds[-1])
        longest = max(longest, int((piece.input_tokens + piece.output_tokens).max()))
        inputs_total += int(piece.input_tokens.sum())
    used = by_length[0] > 0
    return BinnedTrace(
        name=name,
        window_seconds=window_seconds,
        requests=by_window[0],
        dispersion=_dispersion(by_window[0], by_window[3], window_seconds),
        output_tokens=by_window[1],
        context_tokens=by_window[2],
        input_lengths=by_length[1][used] / by_length[0][used],
        input_requests=by_length[0][used],
        input_tokens=inputs_total,
        duration_seconds=last,
        longest_tokens=longest,
    )


def _dispersion(requests: Array, squares: Array, window_seconds: float) -> float:
    """Variance over mean of arrivals a second around the mean of their window."""
    deviations = (squares - requests**2 / window_seconds).sum()
    return max(float(deviations / requests.sum()), 0.05)


def estimate(
    trace: BinnedTrace,
    deployment: Deployment,
    replicas: int,
    *,
    arrival_scale: float = 1.0,
    prefix_hit: float = 0.0,
) -> Estimate:
    """Energy and latency of a trace on replicas, in steady states.

    Parameters
    ----------
    trace : BinnedTrace
    deployment : Deployment
        With continuous batching.
    replicas : int
        At least 1; each takes an equal share of the arrivals.
    arrival_scale : float
        Arrivals come this many times faster.
    prefix_hit : float
        Share of every prompt that is in the prefix cache [-].

    Raises
    ------
    ConfigurationError
        If the deployment serves static batches, or all requests arrive at once.
    CapacityError
        If the longest request does not fit the KV cache.
    """
    if deployment.static_batches:
        raise ConfigurationError("static batches have no steady state; simulate them exactly")
    if deployment.serving.draft is not None:
        raise ConfigurationError("drafts are not part of the estimate; simulate them exactly")
    if trace.duration_seconds == 0.0:
        raise ConfigurationError(
            f"{trace.name}: all requests arrive at once, which is no steady state; use --mode exact"
        )
    if trace.longest_tokens > deployment.kv_tokens:
        raise CapacityError(
            f"{trace.name}: a request of {trace.longest_tokens} tokens does not fit the KV cache "
            f"of {deployment.kv_tokens} tokens"
        )
    context = float(trace.context_tokens.sum() / trace.output_tokens.sum())
    batch = _batch(trace, deployment, context)
    shares = trace.input_requests / trace.input_requests.sum()
    table: tuple[Any, ...] = (
        *(batch, context, trace.input_lengths, prefix_hit),
        *parameters(deployment.costs),
    )
    step_s, step_j, prompt_s, prompt_j = _steps(*table)
    return _from_steps(
        trace, deployment, replicas, arrival_scale, shares, step_s, step_j, prompt_s, prompt_j
    )


def _batch(trace: BinnedTrace, deployment: Deployment, context: float) -> int:
    """Sequences in flight at most: the batch limit, or what fits the KV cache."""
    return max(
        1, min(deployment.serving.max_batch, deployment.costs.scheduler.kv.sequences(context))
    )


@compiled
def _steps(  # type: ignore[no-untyped-def]
    batch, context, lengths, prefix_hit, tables, host, limits, scheduler
):
    """Seconds and joules of a step of 0 to `batch` sequences, and what prompts add to it.

    Returns (batch + 1,), (batch + 1,), (batch + 1, lengths), (batch + 1, lengths).
    """
    _, budget, window, tile, _ = scheduler
    step_s, step_j = np.zeros(batch + 1), np.zeros(batch + 1)
    prompt_s = np.zeros((batch + 1, lengths.shape[0]))
    prompt_j = np.zeros((batch + 1, lengths.shape[0]))
    near = min(context, float(window)) if window > 0 else 0.0
    for n in range(batch + 1):
        if n > 0:
            cost = step_cost(
                n, n, (n * context, n * near, 0.0, 0.0), 0, n, False, tables, host, limits
            )
            step_s[n] = cost[SECONDS]
            step_j[n] = (
                cost[DECODE] + cost[DECODE_ATTENTION] + cost[PREFILL] + cost[PREFILL_ATTENTION]
            )
        for i in range(lengths.shape[0]):
            length = max(1, round(lengths[i]))
            start = min(int(prefix_hit * length), length - 1)
            alone = n == 0  # nothing overlaps the first piece
            while start < length:
                chunk = min(length - start, max(1, budget - n))
                full, cut = pairs(float(start), float(chunk), float(window), tile)
                att = (n * context, n * near, full, cut)
                cost = step_cost(n + chunk, n + 1, att, 1, n, alone, tables, host, limits)
                prompt_s[n, i] += cost[SECONDS] - step_s[n]
                prompt_j[n, i] += (
                    cost[DECODE] + cost[DECODE_ATTENTION] + cost[PREFILL] + cost[PREFILL_ATTENTION]
                ) - step_j[n]
                start += chunk
                alone = False
    return step_s, step_j, prompt_s, prompt_j


def _from_steps(
    trace: BinnedTrace,
    deployment: Deployment,
    replicas: int,
    arrival_scale: float,
    shares: Array,
    step_s: Array,
    step_j: Array,
    prompt_s: Array,
    prompt_j: Array,
) -> Estimate:
    mean_prompt_s, mean_prompt_j = prompt_s @ shares, prompt_j @ shares
    window = trace.window_seconds / arrival_scale
    output = float(trace.output_tokens.sum() / trace.requests.sum())
    batch = len(step_s) - 1
    # highest rate of one replica: a full batch, prompts in between
    capacity = batch / (output * step_s[batch] + batch * mean_prompt_s[batch])
    rates, backlog_s, windows = _served_rates(
        trace.requests / replicas / window, window, _FULLEST * capacity
    )
    regularity = replicas / trace.dispersion
    law = _states(rates, output, step_s, mean_prompt_s, regularity)
    numbers = np.arange(batch + 1)
    steps_per_s = np.where(numbers > 0, (output - 1.0) / law.residence, 0.0)
    full = law.share.copy()
    full[:, -1] += law.tail  # the queue waits behind a full batch
    idle_watts = deployment.calibration.polling_idle_watts
    gpus = replicas * deployment.gpus_per_replica
    visits = rates / rates.sum()
    # tokens and prompts served are those that arrived
    steps = full * steps_per_s
    tokens = steps @ numbers
    scale = np.divide(rates * (output - 1.0), tokens, out=np.ones(len(rates)), where=tokens > 0)
    watts = (steps * scale[:, None]) @ step_j + rates * (law.seen @ mean_prompt_j)
    busy = (steps * scale[:, None]) @ step_s + rates * (law.seen @ mean_prompt_s)
    idle = np.minimum(full[:, 0], np.maximum(1.0 - busy, 0.0))
    seen = visits @ law.seen
    pace = (visits[:, None] * law.share * step_s * law.slowed).sum(axis=0)
    pace /= np.maximum(visits @ law.share, 1e-300)
    pace[0] = step_s[1]
    # prompts that arrive together wait for each other (Kingman 1961)
    load = np.minimum(rates * (law.seen @ mean_prompt_s), 0.98)
    alone = law.seen @ mean_prompt_s
    spread = 0.5 * (1.0 / regularity + float((prompt_s[0] ** 2 @ shares) / mean_prompt_s[0] ** 2))
    queue_s = float(visits @ (load / (1.0 - load) * spread * alone))
    return Estimate(
        active_joules=float(watts.sum()) * window * gpus,
        idle_joules=float(idle.sum()) * window * idle_watts * gpus,
        wall_seconds=window * windows,
        busy_share=float(1.0 - idle.mean()),
        ttft_seconds=_ttft(
            seen, shares, pace, prompt_s, queue_s, float(visits @ load), backlog_s, visits
        ),
        tpot_seconds=_percentiles(pace[1:], np.append(seen[:-2], seen[-2:].sum())),
        waiting_seconds=float(backlog_s.max(initial=0.0)),
    )


def _served_rates(offered: Array, window: float, most: float) -> tuple[Array, Array, int]:
    """Rates served in each window, seconds its arrivals wait, and the windows it takes in all."""
    if offered.max() <= most:
        return offered, np.zeros(len(offered)), len(offered)
    rates, waits = [], []
    backlog = 0.0
    for rate in offered:
        waiting = backlog + rate * window
        served = min(waiting, most * window)
        backlog = waiting - served
        rates.append(served / window)
        waits.append(backlog / most)
    while backlog > 1e-9:
        served = min(backlog, most * window)
        backlog -= served
        rates.append(served / window)
        waits.append(backlog / most)
    return np.array(rates), np.array(waits), len(rates)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Law:
    share: Array  # (windows, batch + 1) of time with N sequences in flight
    tail: Array  # (windows,) of time with more
    seen: Array  # (windows, batch + 1) of arrivals that find N, those that find more at the end
    residence: Array  # (windows, batch + 1) [s]
    slowed: Array  # (windows, batch + 1) how much prompts stretch decoding


def _states(rates: Array, output: float, step_s: Array, prompt_s: Array, regularity: float) -> _Law:
    batch = len(step_s) - 1
    numbers = np.arange(1, batch + 1)
    slowed = 1.0 / np.maximum(1.0 - np.outer(rates, prompt_s), 0.02)
    residence = (output - 1.0) * step_s * slowed + step_s + prompt_s
    offered = rates[:, None] * residence

    def shares(z: Array) -> tuple[Array, Array]:
        ratio = (offered[:, 1:] / z + (numbers - 1) * (1.0 - 1.0 / z)) / numbers
        with np.errstate(divide="ignore"):
            steps = np.log(np.maximum(ratio, 1e-300))
        log_pi = np.concatenate([np.zeros((len(rates), 1)), np.cumsum(steps, axis=1)], axis=1)
        pi = np.exp(log_pi - log_pi.max(axis=1, keepdims=True))
        last = np.clip(ratio[:, -1], 0.0, 0.995)
        tail = pi[:, -1] * last / (1.0 - last)
        total = pi.sum(axis=1) + tail
        return pi / total[:, None], tail / total

    share, tail = shares(np.ones((len(rates), 1)))
    mean = share @ np.arange(batch + 1) + tail * batch
    # peakedness of gamma renewals at exponential residence: 1 / (1 - phi(1/S)) - lambda S
    mean = np.maximum(mean, 1e-9)
    phi = (regularity * mean / (regularity * mean + 1.0)) ** regularity
    z = np.clip(1.0 / (1.0 - phi) - mean, 0.05, 50.0)[:, None]
    share, tail = shares(z)
    found = np.maximum(offered / z + np.arange(batch + 1) * (1.0 - 1.0 / z), 0.0) * share
    found[:, -1] += tail * found[:, -1] / np.maximum(share[:, -1], 1e-300)
    seen = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-300)
    return _Law(share=share, tail=tail, seen=seen, residence=residence, slowed=slowed)


def _ttft(
    seen: Array,
    shares: Array,
    pace: Array,
    prompt_s: Array,
    queue_s: float,
    queued: float,
    backlog_s: Array,
    visits: Array,
) -> dict[str, float]:
    """Arrivals wait for the step under way and the next one, which is scheduled already."""
    wait = 1.5 * pace
    wait[0] = 0.0
    alone = (wait + pace)[:, None] + prompt_s
    quantiles = (np.arange(_TAIL) + 0.5) / _TAIL
    extra = np.append(0.0, -queue_s / max(queued, 1e-9) * np.log(1.0 - quantiles))
    chance = np.append(1.0 - queued, np.full(_TAIL, queued / _TAIL))
    values = [np.add.outer(alone, extra).ravel()]
    weights = [(np.outer(seen, shares)[:, :, None] * chance).ravel()]
    late = backlog_s > 0.0
    if late.any():
        base = float(alone[-1] @ shares)
        weights = [w * (1.0 - visits[late].sum()) for w in weights]
        values.append(base + backlog_s[late])
        weights.append(visits[late])
    return _percentiles(np.concatenate(values), np.concatenate(weights))


def _percentiles(values: Array, weights: Array) -> dict[str, float]:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    picked = np.searchsorted(cumulative, np.array([0.5, 0.9, 0.99]) * cumulative[-1])
    found = values[order][np.minimum(picked, len(values) - 1)]
    return dict(zip(("p50", "p90", "p99"), found.tolist(), strict=True))
