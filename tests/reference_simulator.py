"""vLLM V1's scheduler in plain Python, one step at a time: the oracle of the compiled simulator.

Costs are taken from `roofline` for each step's own statistics, not from tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import numpy as np

from energymodel.calibrations import Calibration
from energymodel.costs import (
    _attention_rows,
    _attention_sequences,
    _split,
    kv_blocks,
)
from energymodel.operators import operator_table, step_stats, window_tokens
from energymodel.roofline import operator_costs, step_seconds_and_joules
from energymodel.specs import GpuSpec, ModelSpec, ServingConfig

TILE = 128


@dataclass
class Request:
    index: int
    arrival: float
    input_tokens: int
    output_tokens: int
    cached: int = 0
    computed: int = 0
    generated: int = 0
    blocks: int = 0

    @property
    def known(self) -> int:
        return self.input_tokens + self.generated


@dataclass
class Outcome:
    first_token: dict[int, float] = field(default_factory=dict)
    finish: dict[int, float] = field(default_factory=dict)
    joules: float = 0.0
    idle_seconds: float = 0.0
    steps: int = 0
    preemptions: int = 0


def chunk_pairs(start: int, count: int, window: int) -> tuple[float, float]:
    padded = ceil(count / TILE) * TILE
    full = padded * start + padded * (padded + TILE) / 2
    if not window:
        return full, 0.0
    first = min(max(window - start, 0), padded)
    cut = first * start + first * (first + TILE) / 2 + (padded - first) * (window + TILE / 2)
    return full, min(cut, full)


def step_cost(
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    work: list[tuple[Request, int]],
    *,
    starting: bool,
) -> tuple[float, float]:
    tokens = sum(count for _, count in work)
    decodes = [r for r, count in work if count == 1 and r.computed > 0]
    prefills = [(r, count) for r, count in work if not (count == 1 and r.computed > 0)]
    window = window_tokens(model)
    padded = tokens
    graphs = serving.graph_batch_sizes if serving.stack == "vllm" else ()
    in_graph = bool(graphs) and tokens <= max(graphs)
    if in_graph:
        padded = min(size for size in graphs if size >= tokens)
    pairs = [chunk_pairs(r.computed, count, window) for r, count in prefills]
    stats = step_stats(
        model,
        tokens=padded,
        rows=len(work),
        decode_kv_tokens=sum(r.computed + 1 for r in decodes),
        decode_window_kv_tokens=sum(min(r.computed + 1, window) for r in decodes),
        prefill_pairs=sum(p[0] for p in pairs),
        prefill_window_pairs=sum(p[1] for p in pairs),
    )
    table = operator_table(model, serving)
    costs = operator_costs(table, stats, gpu, calibration)
    attention = _split(table)[2]
    per_row = _attention_rows(model, attention, np.array([padded]), gpu, calibration)
    per_sequence = _attention_sequences(model, attention, np.array([len(work)]), gpu, calibration)
    tables = costs.tables() + per_row.tables() + per_sequence.tables()
    stack = calibration.stacks[serving.stack]
    host = stack.step_host_seconds + stack.sequence_host_seconds * len(work)
    launches = model.num_layers * stack.launch_seconds
    if not in_graph:
        host += stack.kernels_per_layer * launches
    elif prefills:
        host += stack.piecewise_kernels * launches
    gap = stack.step_gap_seconds + stack.sequence_gap_seconds * len(work)
    if starting:
        gap += stack.start_gap_seconds + stack.request_host_seconds * len(prefills)
    else:
        host += stack.request_host_seconds * len(prefills)
    seconds, joules = step_seconds_and_joules(tables, calibration, host, gap)
    return float(seconds[0]), float(joules[0])


def simulate(
    arrivals: list[float],
    inputs: list[int],
    outputs: list[int],
    *,
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    blocks: int | None = None,
    cached: list[int] | None = None,
) -> Outcome:
    free = kv_blocks(model, serving, gpu) if blocks is None else blocks
    size = serving.block_tokens
    cached = cached or [0] * len(arrivals)
    future = [
        Request(i, *row)
        for i, row in enumerate(zip(arrivals, inputs, outputs, cached, strict=True))
    ]
    waiting: list[Request] = []
    running: list[Request] = []
    late: list[Request] = []  # ended in the previous step: slot and blocks free one step later
    outcome = Outcome()
    now = cutoff = 0.0
    while future or waiting or running:
        starting = not running
        if starting:
            free += sum(r.blocks for r in late)
            late = []
            if not waiting and future[0].arrival > now:
                outcome.idle_seconds += future[0].arrival - now
                now = future[0].arrival
            cutoff = now
        while future and future[0].arrival <= cutoff:
            waiting.append(future.pop(0))
        budget = serving.max_step_tokens
        work: list[tuple[Request, int]] = []
        preempted = False
        for request in list(running):
            if budget == 0 or request not in running:
                break
            count = min(request.known - request.computed, budget)
            needed = ceil((request.computed + count) / size) - request.blocks
            while needed > free and request in running:
                preempted = True
                victim = running.pop()
                free += victim.blocks
                victim.blocks = 0
                victim.computed = victim.cached
                waiting.insert(0, victim)
                outcome.preemptions += 1
            if request not in running:
                break
            free -= needed
            request.blocks += needed
            budget -= count
            work.append((request, count))
        while not preempted and waiting and budget and len(running) + len(late) < serving.max_batch:
            request = waiting[0]
            if ceil(request.known / size) > free:
                break
            request.computed = request.cached  # a prefix found in the cache is not computed
            count = min(request.known - request.computed, budget)
            request.blocks = ceil((request.computed + count) / size)
            free -= request.blocks
            budget -= count
            running.append(waiting.pop(0))
            work.append((request, count))
        free += sum(r.blocks for r in late)
        late = []
        if not work:
            cutoff = now
            continue
        seconds, joules = step_cost(model, serving, gpu, calibration, work, starting=starting)
        cutoff = now
        now += seconds
        outcome.joules += joules
        outcome.steps += 1
        for request, count in work:
            request.computed += count
            if request.computed == request.known:
                request.generated += 1
                outcome.first_token.setdefault(request.index, now)
                if request.generated == request.output_tokens:
                    outcome.finish[request.index] = now
                    late.append(request)
        running = [r for r in running if r.index not in outcome.finish]
    return outcome


def as_arrays(outcome: Outcome, count: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.array([outcome.first_token[i] for i in range(count)])
    finish = np.array([outcome.finish[i] for i in range(count)])
    return first, finish
