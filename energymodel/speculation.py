"""Speculative decoding: what drafting and verifying cost, and the batch where that stops paying.

A round is `draft_tokens` passes of a small model and one step of the served model over
batch x (draft_tokens + 1) tokens, which checks them all; `speculative_batching` has the equations,
`acceptance` how many tokens it gives.

Over the batch, only decoding is counted, at one context length; prompts of both models come on
top. Costs are of the whole group of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energymodel.acceptance import break_even_acceptance, expected_tokens
from energymodel.costs import CostTables, cost_tables
from energymodel.deployment import Deployment, with_drafts
from energymodel.errors import ConfigurationError
from energymodel.results import Speculation
from energymodel.simulator import parameters, tables_of
from energymodel.specs import Draft
from energymodel.speculative_batching import round_cost
from energymodel.step_costs import DECODE, DECODE_ATTENTION, SECONDS, step_cost
from energymodel.traces import Requests

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCosts:
    """What decoding costs over the number of sequences in the batch."""

    batch: Array
    """(n,) sequences."""
    draft_tokens: int
    step_seconds: Array
    """(n,) a plain step: one token for each sequence [s]."""
    step_joules: Array
    """(n,) [J]."""
    round_seconds: Array
    """(n,) a round: drafts and their check [s]."""
    round_joules: Array
    """(n,) [J]."""

    @property
    def joules_per_token(self) -> Array:
        """(n,) without speculation [J]."""
        return self.step_joules / self.batch

    def speculative_joules_per_token(self, acceptance: ArrayLike) -> Array:
        """With speculation [J]; `acceptance` broadcasts against (n,)."""
        tokens = expected_tokens(acceptance, self.draft_tokens)
        return self.round_joules / (self.batch * tokens)

    def speedup(self, acceptance: ArrayLike) -> Array:
        """Time of a token without speculation over that with it [-]."""
        tokens = expected_tokens(acceptance, self.draft_tokens)
        return self.step_seconds * tokens / self.round_seconds

    def change(self, acceptance: ArrayLike) -> Array:
        """Relative change of joules per token by speculation [-]; negative where it saves."""
        return self.speculative_joules_per_token(acceptance) / self.joules_per_token - 1.0

    def break_even_acceptance(self) -> Array:
        """(n,) acceptance from which on speculation saves energy [-]; NaN where none does."""
        return break_even_acceptance(self.round_joules / self.step_joules, self.draft_tokens)

    def last_paying_batch(self, acceptance: float) -> float | None:
        """Sequences up to which speculation saves energy, linear between neighbours.

        None where it never does; infinity where it still does at the largest batch.
        """
        change = self.change(acceptance)
        if change[0] >= 0.0:
            return None
        above = np.flatnonzero(change >= 0.0)
        if above.size == 0:
            return float("inf")
        i = above[0]
        return float(np.interp(0.0, change[i - 1 : i + 1], self.batch[i - 1 : i + 1]))


def decode_costs(
    target: Deployment,
    draft: Deployment,
    *,
    batch: ArrayLike,
    context_tokens: float,
    draft_tokens: int,
) -> DecodeCosts:
    """Cost plain decoding and speculative rounds at one context length.

    Parameters
    ----------
    target, draft : the served model and the small one, on the same GPUs and stack
    batch : (n,) sequences, ascending, at least 1
    context_tokens : tokens that each sequence holds so far

    Raises
    ------
    ConfigurationError
        If the two do not run on the same GPUs and stack, or the stack decodes static batches.
    """
    same = (
        target.gpu == draft.gpu
        and target.serving.stack == draft.serving.stack
        and target.gpus_per_replica == draft.gpus_per_replica
    )
    if not same:
        raise ConfigurationError("a draft model runs on the GPUs and the stack of its target")
    if target.static_batches:
        raise ConfigurationError("speculative decoding is modelled for vllm and vllm-eager")
    sequences = np.atleast_1d(np.asarray(batch, dtype=np.int64))
    plain = replace(target.serving, max_batch=max(target.serving.max_batch, int(sequences[-1])))
    # what a round gives only moves the draft model's keys by as many tokens
    drafted = with_drafts(plain, Draft(model=draft.model, tokens=draft_tokens, acceptance=0.0))
    board = (target.gpu, target.calibration)
    return costs_over_batch(
        cost_tables(target.model, plain, *board),
        cost_tables(target.model, drafted, *board),
        sequences,
        context_tokens,
        gpus=target.gpus_per_replica,
    )


def costs_over_batch(
    plain: CostTables,
    drafted: CostTables,
    sequences: NDArray[np.int64],
    context_tokens: float,
    *,
    gpus: int,
) -> DecodeCosts:
    """Costs of plain steps and of rounds from the tables of both, see `decode_costs`."""
    costs = np.empty((4, sequences.size))
    window, draft_window = plain.scheduler.window, drafted.others[0].scheduler.window
    context, drafts, given = context_tokens, drafted.draft_tokens, drafted.tokens_per_round
    tables = tuple(tables_of(each) for each in (drafted, *drafted.others))
    later = float(np.mean([context + given + j for j in range(2, drafts + 1)] or [0.0]))
    for column, n in enumerate(sequences.tolist()):

        def keys(tokens: float, limit: int, n: int = n) -> tuple[float, ...]:
            return n * tokens, n * min(tokens, limit) if limit else 0.0, 0.0, 0.0

        step: tuple[Any, ...] = (n, n, keys(context, window), 0, n, False, *parameters(plain)[:3])
        a_round: tuple[Any, ...] = (
            *((n, 0, 0), keys(context + drafts + 1, window)),
            keys(context + drafts + 2, draft_window),
            *((*keys(later, draft_window), 1.0), False),
            *(tables, drafted.host, drafted.limits, drafts),
        )
        for row, cost in ((0, step_cost(*step)), (2, round_cost(*a_round))):
            costs[row : row + 2, column] = cost[SECONDS], cost[DECODE] + cost[DECODE_ATTENTION]
    return DecodeCosts(
        batch=sequences.astype(np.float64),
        draft_tokens=drafts,
        step_seconds=costs[0],
        step_joules=costs[1] * gpus,
        round_seconds=costs[2],
        round_joules=costs[3] * gpus,
    )


def compare(
    deployment: Deployment,
    plain: Deployment,
    requests: Requests,
    *,
    joules: float,
    plain_joules: float | None,
) -> Speculation:
    """What drafts do to a workload.

    Parameters
    ----------
    deployment, plain : with the draft model and without
    joules, plain_joules : of the workload [J]; None where it cannot be served without drafts
    """
    draft = deployment.serving.draft
    assert draft is not None
    outputs = requests.output_tokens.astype(float)
    context = float(outputs @ (requests.input_tokens + 0.5 * outputs) / outputs.sum())
    sequences = np.arange(1, deployment.serving.max_batch + 1)
    costs = costs_over_batch(
        plain.costs, deployment.costs, sequences, context, gpus=deployment.gpus_per_replica
    )
    saves = costs.change(draft.acceptance) < 0.0
    tokens = int(outputs.sum())
    return Speculation(
        tokens_per_round=float(expected_tokens(draft.acceptance, draft.tokens)),
        mean_context_tokens=context,
        paying_batch=int(np.argmin(saves)) if not saves.all() else int(sequences[-1]),
        plain_joules_per_output_token=None if plain_joules is None else plain_joules / tokens,
        change=None if plain_joules is None else joules / plain_joules - 1.0,
    )
