"""Speculative decoding: what drafting and verifying cost, and the batch where that stops paying.

A round is `draft_tokens` steps of a small model and one step of the served model over
batch x (draft_tokens + 1) tokens, which checks them all. How many tokens it gives is in
`acceptance`.

Only decoding is counted, at one context length; prompts of both models come on top. Costs are of
the whole group of GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energymodel.acceptance import break_even_acceptance, expected_tokens
from energymodel.costs import host_seconds, stack_calibration
from energymodel.deployment import Deployment
from energymodel.errors import ConfigurationError
from energymodel.operators import OperatorTable, operator_table, step_stats, window_tokens
from energymodel.roofline import operator_costs, step_seconds_and_joules

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

    The host prepares a round once, while the GPU works; each pass has a step's gap. Checking reads
    a sequence's KV cache once for all its tokens. The power limit holds on average over a round.

    Parameters
    ----------
    target, draft : the served model and the small one, on the same GPUs and stack
    batch : (n,) sequences, ascending
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
    sequences = np.atleast_1d(np.asarray(batch, dtype=np.float64))
    calibration = target.calibration
    gap = stack_calibration(calibration, target.serving.stack).step_gap_seconds
    gpus = float(target.gpus_per_replica)

    plain = _pass_tables(target, sequences, 1, context_tokens)
    step_seconds, step_joules = step_seconds_and_joules(
        plain, calibration, _host_seconds(target, sequences, 1), gap
    )
    check = _pass_tables(target, sequences, draft_tokens + 1, context_tokens)
    drafts = draft_tokens * _pass_tables(draft, sequences, 1, context_tokens)
    round_seconds, round_joules = step_seconds_and_joules(
        check + drafts,
        calibration,
        _host_seconds(target, sequences, draft_tokens + 1),
        gap * (draft_tokens + 1),
    )
    return DecodeCosts(
        batch=sequences,
        draft_tokens=draft_tokens,
        step_seconds=step_seconds,
        step_joules=step_joules * gpus,
        round_seconds=round_seconds,
        round_joules=round_joules * gpus,
    )


def _pass_tables(
    deployment: Deployment, sequences: Array, queries: int, context_tokens: float
) -> Array:
    """(n, 4) as `OperatorCosts.tables`: a pass over `queries` new tokens of each sequence."""
    model, serving = deployment.model, deployment.serving
    window = window_tokens(model)
    seen = min(context_tokens, window) if window else context_tokens
    rows = sequences * queries
    stats = step_stats(
        model,
        tokens=_graph_tokens(deployment, rows),
        rows=rows,
        decode_kv_tokens=sequences * context_tokens,
        decode_window_kv_tokens=sequences * seen if window else 0.0,
        decode_sequences=sequences,
    )
    table = _with_queries(operator_table(model, serving), queries)
    return operator_costs(table, stats, deployment.gpu, deployment.calibration).tables()


def _with_queries(table: OperatorTable, queries: int) -> OperatorTable:
    """Decode attention of several queries to each sequence's keys, which are read once."""
    decode = np.array([c == "attention_decode" for c in table.op_class])
    times = np.where(decode, float(queries), 1.0)[:, np.newaxis]
    return replace(
        table,
        flops=table.flops * times,
        executed_flops=table.executed_flops * times,
        activation_bytes=table.activation_bytes * times,
    )


def _graph_tokens(deployment: Deployment, tokens: Array) -> Array:
    """Tokens after padding to a captured graph, as the simulator pads them."""
    graphs = deployment.costs.graph_tokens
    inside = tokens < len(graphs)
    index = np.where(inside, tokens, 0.0).astype(np.int64)
    return np.where(inside, graphs[index], tokens) if len(graphs) else tokens


def _host_seconds(deployment: Deployment, sequences: Array, queries: int) -> Array:
    """Host time of one step: with a captured graph, or launching every kernel."""
    stack = stack_calibration(deployment.calibration, deployment.serving.stack)
    in_graph, _, eager, per_sequence, *_ = host_seconds(deployment.model, stack)
    captured = sequences * queries < len(deployment.costs.graph_tokens)
    seconds: Array = np.where(captured, in_graph, eager) + per_sequence * sequences
    return seconds
