"""Tables of step costs that the simulator looks up, and the way back to operators.

A step's cost is the sum of a part that depends on the number of tokens, a part that depends on
the rows of logits, and attention, which is linear in its four statistics. Each part is a row of
four numbers (memory s, compute s, fixed J, core J; see `roofline.OperatorCosts.tables`).

What attention costs per query row of a prompt and per decoding sequence is in the first two
parts: a step of T tokens and R rows of logits holds R decoding sequences and T - R query rows,
but for one row per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from energymodel.acceptance import expected_tokens
from energymodel.calibrations import Calibration, StackCalibration
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.host_times import host_seconds
from energymodel.kv_cache import KvCache, kv_cache
from energymodel.operators import (
    OperatorTable,
    kv_bytes_per_token,
    operator_table,
    query_tile_tokens,
    step_stats,
    window_tokens,
)
from energymodel.roofline import OperatorCosts, operator_costs
from energymodel.specs import GpuSpec, ModelSpec, ServingConfig
from energymodel.units import BYTES_PER_ELEMENT

Array = NDArray[np.float64]

ATTENTION_STATS = (
    "decode_kv_tokens",
    "decode_window_kv_tokens",
    "prefill_pairs",
    "prefill_window_pairs",
)
_ROW_OPERATORS = ("attention_combine", "logits", "sampling", "top_p", "beam_top_k")


class SchedulerConfig(NamedTuple):
    """What the compiled schedulers need to know beside costs."""

    max_batch: int
    step_tokens: int
    """Token budget of a step."""
    window: int
    """Sliding window [tokens], the widest; 0 = none."""
    query_tile_tokens: float
    """Tokens whose queries fill a tile of attention."""
    kv: KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTables:
    """What the compiled simulator reads. Costs are of one GPU."""

    tokens: Array
    """(max tokens + 1, 4) by tokens in the step."""
    rows: Array
    """(max batch + 1, 4) by rows of logits."""
    attention: Array
    """(len(ATTENTION_STATS), 4) per unit of each statistic."""
    phases: Array
    """(2, 4) added by a step with prefill, with decode attention."""
    graph_tokens: NDArray[np.int64]
    """(largest graph + 1,) tokens after padding to a captured graph; empty without graphs."""
    host: Array
    """(11,) host and gap seconds, see `host_seconds`."""
    limits: Array
    """(4,) base W (`of_group`), power limit W, clock-energy exponent, pipeline stages."""
    scheduler: SchedulerConfig
    beams: int = 1
    draft_tokens: int = 0
    tokens_per_round: float = 1.0
    """Tokens that a decode step gives each sequence on average, more than 1 with drafts."""
    others: tuple[CostTables, ...] = ()
    """Tables of the passes in `other_passes`."""


def cost_tables(
    model: ModelSpec, serving: ServingConfig, gpu: GpuSpec, calibration: Calibration
) -> CostTables:
    """Evaluate the roofline for every step the scheduler can form.

    Raises
    ------
    CapacityError
        If the weights do not fit the GPUs' memory.
    ConfigurationError
        If the calibration does not know the stack.
    """
    calibration = of_group(calibration, serving)
    token_ops, row_ops, attention_ops = split_table(operator_table(model, serving))
    sequences = serving.max_batch * serving.beams
    graphs = _graph_tokens(serving)
    longest = max(serving.max_step_tokens, sequences, *serving.graph_batch_sizes)
    by_tokens = _costs(
        token_ops, step_stats(model, tokens=np.arange(longest + 1.0)), gpu, calibration
    )
    by_tokens += _attention_rows(
        model, attention_ops, np.arange(longest + 1.0), gpu, calibration
    ).tables()
    by_tokens[0] = 0.0
    rows = np.arange(sequences * serving.decode_queries + 1.0)
    by_rows = _costs(row_ops, step_stats(model, tokens=rows, rows=rows), gpu, calibration)
    by_rows += _attention_sequences(model, attention_ops, rows, gpu, calibration).tables()
    by_rows[0] = 0.0
    attention, phases = _attention_costs(model, attention_ops, gpu, calibration)
    stack, draft = stack_calibration(calibration, serving.stack), serving.draft
    return CostTables(
        tokens=by_tokens,
        rows=by_rows,
        attention=attention,
        phases=phases,
        graph_tokens=graphs,
        host=host_seconds(model, stack, serving, reorder_seconds(model, serving, gpu, calibration)),
        limits=np.array(
            [
                calibration.base_watts,
                calibration.power_cap_watts,
                calibration.clock_energy_exponent,
                float(serving.pipeline_parallel),
            ]
        ),
        scheduler=SchedulerConfig(
            max_batch=serving.max_batch,
            step_tokens=serving.max_step_tokens,
            window=window_tokens(model),
            query_tile_tokens=query_tile_tokens(model, serving),
            kv=kv_cache(model, serving, gpu),
        ),
        beams=serving.beams,
        draft_tokens=0 if draft is None else draft.tokens,
        tokens_per_round=1.0
        if draft is None
        else float(expected_tokens(draft.acceptance, draft.tokens)),
        others=tuple(
            cost_tables(*other, gpu, calibration) for other in other_passes(model, serving)
        ),
    )


def other_passes(
    model: ModelSpec, serving: ServingConfig
) -> tuple[tuple[ModelSpec, ServingConfig], ...]:
    """What runs beside the steps of the model as served: (model, serving) of each kind of pass.

    A draft model's first pass of a round, over the checked tokens and one more, and its further
    ones; or, where only decode steps are compiled, the steps that compute prompts.
    """
    if serving.draft is not None:
        alone = replace(serving, draft=None, decoding="greedy", decode_queries=1)
        first = replace(alone, decode_queries=serving.draft.tokens + 2)
        return (serving.draft.model, first), (serving.draft.model, alone)
    if serving.stack == "transformers-compile":
        return ((model, replace(serving, stack="transformers")),)
    return ()


def stack_calibration(calibration: Calibration, stack: str) -> StackCalibration:
    """The stack's parameters; ConfigurationError if the calibration has none."""
    known = [name for name in calibration.stacks if name in calibration.intervals]
    if stack not in known:
        raise ConfigurationError(
            f"the calibration of {calibration.gpu} does not know the stack {stack}: "
            + unknown_name("stack", stack, known)
        )
    return calibration.stacks[stack]


def reorder_seconds(
    model: ModelSpec, serving: ServingConfig, gpu: GpuSpec, calibration: Calibration
) -> float:
    """GPU seconds a token of KV cache in which beam search puts it into the beams' new order.

    `generate` waits for it before the next step, so that nothing overlaps it: PyTorch's gather,
    which an SM passes element by element like other kernels that do not vectorise (`unfused.py`).
    """
    if serving.beams == 1:
        return 0.0
    elements = kv_bytes_per_token(model, serving) / BYTES_PER_ELEMENT[serving.kv_dtype]
    return elements * calibration.kernels["elementwise"].tile_seconds / gpu.sm_count


def of_group(calibration: Calibration, serving: ServingConfig) -> Calibration:
    """The calibration of a GPU that serves in such a group.

    Its links are awake all the while, between the all-reduces of a step and while it spins in one:
    what small all-reduces draw beyond a running kernel becomes part of the base. A stage of a
    pipeline runs a kernel all the while, too: its own, or one that waits to receive (NCCL spins;
    vLLM 0.22 posts `irecv` before the stage before has begun).
    """
    if serving.tensor_parallel * serving.pipeline_parallel == 1:
        return calibration
    link = calibration.kernels["communication"]
    running = calibration.kernel_watts if serving.pipeline_parallel > 1 else 0.0
    return replace(
        calibration,
        base_watts=calibration.base_watts + link.active_watts + running,
        kernel_watts=calibration.kernel_watts - running,
        kernels={**calibration.kernels, "communication": replace(link, active_watts=0.0)},
    )


def operator_totals(
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    *,
    token_steps: Array,
    row_steps: Array,
    attention_sums: Array,
    phase_steps: Array,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Energy and work of one GPU by operator, from what a simulation counted.

    Arguments as in `simulator.Simulation`.

    Returns
    -------
    joules : by operator and component: base, flops, onchip, hbm, link [J]
    work : by operator: executed_flops [FLOP], hbm_bytes [B], gpu_seconds [s]
    """
    calibration = of_group(calibration, serving)
    token_ops, row_ops, attention_ops = split_table(operator_table(model, serving))
    share = 1.0 / serving.pipeline_parallel
    totals = _Totals(base_watts=calibration.base_watts, share=share, joules={}, work={})
    for table, counts, stat in ((token_ops, token_steps, "tokens"), (row_ops, row_steps, "rows")):
        used = np.flatnonzero(counts[:, 0])
        if not used.size:
            continue
        size = used.astype(float)
        stats = step_stats(model, tokens=size, rows=size if stat == "rows" else 0.0)
        costs = operator_costs(table, stats, gpu, calibration)
        totals.add(table, costs, counts[used])
        per_size = _attention_rows if stat == "tokens" else _attention_sequences
        costs = per_size(model, attention_ops, size, gpu, calibration)
        totals.add(attention_ops, costs, counts[used])
    unit, fixed = _attention_units(model, attention_ops, gpu, calibration)
    totals.add(attention_ops, unit, attention_sums)
    totals.add(attention_ops, fixed, phase_steps)
    return totals.joules, totals.work


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """Sums of `operator_totals`."""

    base_watts: float
    share: float
    """Of a step's work that one GPU does: a stage's of a pipeline; it is awake throughout [-]."""
    joules: dict[str, dict[str, float]]
    work: dict[str, dict[str, float]]

    def add(self, table: OperatorTable, costs: OperatorCosts, weights: Array) -> None:
        """Add costs (n, operators), weighted (n, 3) as in `Simulation.token_steps`."""
        seconds = weights[:, 0] @ costs.memory_seconds + weights[:, 1] @ costs.compute_seconds
        plain, core = self.share * weights[:, 0], self.share * weights[:, 2]
        joules = {
            "base": self.base_watts * seconds
            + plain @ costs.active_memory_joules
            + core @ costs.active_compute_joules,
            "flops": core @ costs.flop_joules,
            "onchip": core @ costs.onchip_joules,
            "hbm": plain @ costs.hbm_joules,
            "link": plain @ costs.link_joules,
        }
        work = {
            "executed_flops": plain @ costs.executed_flops,
            "hbm_bytes": plain @ costs.hbm_bytes,
            "gpu_seconds": self.share * seconds,
        }
        for sums, parts in ((self.joules, joules), (self.work, work)):
            for column, name in enumerate(table.names):
                entry = sums.setdefault(name, dict.fromkeys(parts, 0.0))
                for part, values in parts.items():
                    entry[part] += float(values[column])


def split_table(table: OperatorTable) -> tuple[OperatorTable, OperatorTable, OperatorTable]:
    """Operators that depend on tokens, on rows of logits, and attention."""
    is_row = np.array([n in _ROW_OPERATORS for n in table.names])
    is_attention = np.array([c.startswith("attention") for c in table.op_class])
    return (
        _subset(table, ~is_row & ~is_attention),
        _subset(table, is_row),
        _subset(table, is_attention),
    )


def _subset(table: OperatorTable, mask: NDArray[np.bool_]) -> OperatorTable:
    picked: dict[str, object] = {}
    for f in fields(table):
        value = getattr(table, f.name)
        if isinstance(value, tuple):
            picked[f.name] = tuple(v for v, keep in zip(value, mask, strict=True) if keep)
        else:
            picked[f.name] = value[mask]
    return replace(table, **picked)  # type: ignore[arg-type]


def _costs(table: OperatorTable, stats: Array, gpu: GpuSpec, calibration: Calibration) -> Array:
    return operator_costs(table, stats, gpu, calibration).tables()


def _attention_rows(
    model: ModelSpec, table: OperatorTable, rows: Array, gpu: GpuSpec, calibration: Calibration
) -> OperatorCosts:
    """Attention's costs beyond its calls for query rows of prompts, pairs left out."""
    stats = step_stats(model, tokens=0.0, prefill_rows=rows)
    return operator_costs(table, stats, gpu, _without_calls(calibration))


def _attention_sequences(
    model: ModelSpec, table: OperatorTable, rows: Array, gpu: GpuSpec, calibration: Calibration
) -> OperatorCosts:
    """Attention's costs beyond its calls for decoding sequences, keys and values left out.

    Less what `_attention_rows` counted for their tokens.
    """
    stats = step_stats(model, tokens=0.0, decode_sequences=rows)
    sequences = operator_costs(table, stats, gpu, _without_calls(calibration))
    counted = _attention_rows(model, table, rows, gpu, calibration)
    return OperatorCosts(
        **{f.name: getattr(sequences, f.name) - getattr(counted, f.name) for f in fields(sequences)}
    )


def _without_calls(calibration: Calibration) -> Calibration:
    kernels = {c: replace(k, call_seconds=0.0) for c, k in calibration.kernels.items()}
    return replace(calibration, kernels=kernels, kernel_gap_seconds=0.0)


def _attention_units(
    model: ModelSpec, table: OperatorTable, gpu: GpuSpec, calibration: Calibration
) -> tuple[OperatorCosts, OperatorCosts]:
    """Attention's costs per unit of each statistic, and the fixed cost of a step of each phase.

    A call's time is its fixed part plus a function homogeneous in its work, so two points on
    the line give both.
    """
    size = 1e9
    diagonal = {
        name: size * np.eye(len(ATTENTION_STATS))[i] for i, name in enumerate(ATTENTION_STATS)
    }
    double = {name: 2.0 * v for name, v in diagonal.items()}
    zero = np.zeros(len(ATTENTION_STATS))
    once = operator_costs(table, step_stats(model, tokens=zero, **diagonal), gpu, calibration)
    twice = operator_costs(table, step_stats(model, tokens=zero, **double), gpu, calibration)

    def combine(scale_once: float, scale_twice: float, factor: float) -> OperatorCosts:
        values = {
            f.name: (scale_once * getattr(once, f.name) + scale_twice * getattr(twice, f.name))
            * factor
            for f in fields(OperatorCosts)
        }
        return OperatorCosts(**values)

    unit = combine(-1.0, 1.0, 1.0 / size)
    intercept = combine(2.0, -1.0, 1.0)
    # the fixed part of a phase is there once, whether its layers are windowed or not
    prefill, decode = [2, 3], [0, 1]
    rows = {
        f.name: np.stack(
            [getattr(intercept, f.name)[phase].max(axis=0) for phase in (prefill, decode)]
        )
        for f in fields(OperatorCosts)
    }
    return unit, OperatorCosts(**rows)


def _attention_costs(
    model: ModelSpec, table: OperatorTable, gpu: GpuSpec, calibration: Calibration
) -> tuple[Array, Array]:
    unit, fixed = _attention_units(model, table, gpu, calibration)
    return unit.tables(), np.maximum(fixed.tables(), 0.0)


def _graph_tokens(serving: ServingConfig) -> NDArray[np.int64]:
    """Tokens of a step after padding to a captured graph, by tokens; empty without graphs."""
    if serving.stack == "transformers-compile":  # compiled anew for each batch
        return np.arange(serving.max_batch * serving.beams + 1)
    if serving.stack != "vllm":
        return np.zeros(0, np.int64)
    ordered = np.array(sorted(serving.graph_batch_sizes))
    return ordered[np.searchsorted(ordered, np.arange(ordered[-1] + 1))].astype(np.int64)
