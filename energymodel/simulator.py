"""What replicas do with their requests: the schedulers' public face.

`simulate` serves a trace on one replica; `Fleet` serves requests that come in pieces on many, in
memory that does not grow with them. The compiled schedulers are in `continuous_batching.py` and
`static_batching.py`; `tests/reference_simulator.py` is the plain and slow form that they equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.continuous_batching import advance, new_replica
from energymodel.costs import ATTENTION_STATS, CostTables
from energymodel.requests_in_flight import SERVED, Done, new_done
from energymodel.speculative_batching import serve_with_drafts
from energymodel.static_batching import serve_static_batches
from energymodel.step_costs import TOTALS, new_sums
from energymodel.step_heaps import MOST_SLOTS

Array = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCounts:
    """How often passes of one kind ran, by what their cost depends on. Per GPU."""

    token_steps: Array
    """(tokens, 3) passes by table row: count, sum of 1/clock share, sum of core-energy factor."""
    row_steps: Array
    """(rows, 3) the same by rows of logits."""
    attention_sums: Array
    """(len(ATTENTION_STATS), 3) sums of the attention statistics, weighted the same way."""
    phase_steps: Array
    """(2, 3) passes with prefill and passes with decode attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What one replica did, per GPU of it. Times from the first arrival [s], energies [J]."""

    first_token_seconds: Array
    """(n,) when each request's first token was out."""
    finish_seconds: Array
    """(n,) when each request's last token was out."""
    request_joules: Array
    """(n,) active energy of each request."""
    passes: tuple[PassCounts, ...]
    """Of the model as served, then of each of `costs.other_passes`."""
    slices: Array
    """(SLICES, 3) by slice of time: prefill joules, decode joules, seconds with requests in flight.
    What happens alike for many steps is spread evenly over their time."""
    slice_seconds: float
    totals: dict[str, float]
    """By the names in TOTALS."""


def simulate(
    arrival_seconds: Array,
    input_tokens: Ints,
    output_tokens: Ints,
    costs: CostTables,
    *,
    cached_tokens: Ints | None = None,
    static_batches: bool = False,
    jump: bool = True,
    abandon_seconds: float = np.inf,
) -> Simulation | None:
    """Serve the requests on one replica, until the last token.

    Parameters
    ----------
    arrival_seconds : (n,) ascending, from 0
    input_tokens, output_tokens : (n,) lengths >= 1, each fitting the KV cache
    costs : see `costs.cost_tables`
    cached_tokens : (n,) tokens of each prompt whose KV is cached already, fewer than input_tokens
    static_batches : serve padded batches one after another instead of continuously
    jump : False takes every step singly (for tests)
    abandon_seconds : give up once a request has waited this long for admission

    Returns
    -------
    None if given up, or if a request can never be scheduled.
    """
    arrival = np.ascontiguousarray(arrival_seconds, np.float64)
    inputs = np.ascontiguousarray(input_tokens, np.int64)
    outputs = np.ascontiguousarray(output_tokens, np.int64)
    sums = new_sums(len(costs.tokens), len(costs.rows))
    others = tuple(
        (*new_sums(len(other.tokens), len(other.rows))[:4], *sums[4:]) for other in costs.others
    )
    if static_batches:
        totals = np.zeros(len(TOTALS))
        # prompts are computed as decode steps are, unless only those are compiled
        whole_cache = len(costs.others) > 0
        prompts, prompt_sums = (costs.others[0], others[0]) if whole_cache else (costs, sums)
        static: tuple[Any, ...] = (
            *(arrival, inputs, outputs, costs.beams, whole_cache),
            *(tables_of(prompts), *parameters(costs), prompt_sums, sums, totals),
        )
        first_token, finish, joules = serve_static_batches(*static)
    elif costs.draft_tokens > 0:
        totals, done = np.zeros(len(TOTALS)), new_done(len(arrival))
        draft_window = costs.others[0].scheduler.window
        drafted: tuple[Any, ...] = (
            *((arrival, inputs, outputs, _cached(cached_tokens, inputs)), (sums, *others)),
            tuple(tables_of(each) for each in (costs, *costs.others)),
            *(costs.host, costs.limits, costs.scheduler),
            (costs.draft_tokens, costs.tokens_per_round, draft_window),
            *(jump, float(abandon_seconds), done, totals),
        )
        count, status = serve_with_drafts(*drafted)
        if status != SERVED:
            return None
        first_token, finish, joules = _in_order(done, count)
    else:
        _check_budget(costs)
        replica, done = new_replica(costs), new_done(len(arrival))
        requests = (arrival, inputs, outputs, _cached(cached_tokens, inputs))
        patience = float(abandon_seconds)
        whole: tuple[Any, ...] = (
            *(replica, sums, requests, 0, True),
            *(*parameters(costs), jump, patience, done),
        )
        _, count, status = advance(*whole)
        if status != SERVED:
            return None
        totals = replica.totals
        first_token, finish, joules = _in_order(done, count)
    return Simulation(
        first_token_seconds=first_token,
        finish_seconds=finish,
        request_joules=joules,
        passes=tuple(pass_counts(each) for each in (sums, *others)),
        slices=sums[4],
        slice_seconds=float(sums[5][0]),
        totals=dict(zip(TOTALS, totals.tolist(), strict=True)),
    )


def parameters(costs: CostTables) -> tuple[Any, ...]:
    """Arguments of the compiled schedulers: tables, host, limits, scheduler."""
    return tables_of(costs), costs.host, costs.limits, costs.scheduler


def tables_of(costs: CostTables) -> tuple[Any, ...]:
    """The tables that `step_costs.pass_parts` looks up."""
    return costs.tokens, costs.rows, costs.attention, costs.phases, costs.graph_tokens


def pass_counts(sums: tuple[Array, ...]) -> PassCounts:
    """Counts of one kind of pass from the arrays of `new_sums`."""
    return PassCounts(
        token_steps=sums[0], row_steps=sums[1], attention_sums=sums[2], phase_steps=sums[3]
    )


def _in_order(done: Done, count: int) -> Array:
    """First token, finish and joules (3, count) in the requests' order."""
    values = np.empty((3, count))
    values[:, done.ids[:, 0]] = done.times[:, 1:].T
    return values


def _cached(cached_tokens: Ints | None, inputs: Ints) -> Ints:
    if cached_tokens is None:
        return np.zeros_like(inputs)
    cached = np.ascontiguousarray(cached_tokens, np.int64)
    if ((cached < 0) | (cached >= inputs)).any():
        raise ValueError("cached_tokens must be at least 0 and below input_tokens")
    return cached


def _check_budget(costs: CostTables) -> None:
    max_batch, step_tokens = costs.scheduler.max_batch, costs.scheduler.step_tokens
    if step_tokens < max_batch:
        raise ValueError(f"{step_tokens} tokens a step are too few for {max_batch} sequences")
    if max_batch > MOST_SLOTS:
        raise ValueError(f"a batch of {max_batch} sequences is too large, most are {MOST_SLOTS}")


assert len(ATTENTION_STATS) == 4
