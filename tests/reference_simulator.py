"""vLLM V1's scheduler in plain Python, one step at a time: the oracle of the compiled simulator.

Costs are taken from `roofline` for each step's own statistics, not from tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from energymodel.calibrations import Calibration
from energymodel.costs import (
    _attention_rows,
    _attention_sequences,
    split_table,
)
from energymodel.kv_cache import kv_cache
from energymodel.operators import operator_table, step_stats, window_tokens
from energymodel.roofline import clock_under_cap, operator_costs, step_seconds_and_joules
from energymodel.specs import GpuSpec, ModelSpec, MoeSpec, ServingConfig

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
    """Of each group of layers, those that its window left behind among them."""
    behind: int = 0
    """Of each group with a window."""

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


def of_experts(model: ModelSpec, serving: ServingConfig) -> float:
    """Launches of a layer that its experts take more; all layers of these models are alike."""
    has_experts = isinstance(model.layers[0].feed_forward, MoeSpec)
    return 13.0 if has_experts and serving.stack.startswith("vllm") else 0.0


def tile_tokens(model: ModelSpec, serving: ServingConfig) -> float:
    """Query heads that share keys fill vLLM's tiles together, of 192 rows for narrow heads."""
    if not serving.stack.startswith("vllm"):
        return TILE
    a, gpus = model.layers[0].attention, serving.tensor_parallel
    shared = a.num_heads / gpus / max(1, a.num_kv_heads / gpus)
    return (192 if a.head_dim <= 64 else 128) / shared


def in_key_blocks(rows: float) -> float:
    """Each row with the keys up to it, in whole blocks."""
    pairs, blocks = 0.0, 1
    while rows > 0:
        pairs += min(rows, TILE) * TILE * blocks
        rows, blocks = rows - TILE, blocks + 1
    return pairs


def chunk_pairs(start: int, count: int, window: int, tile: float) -> tuple[float, float]:
    padded = ceil(count / tile) * tile
    full = padded * start + in_key_blocks(padded)
    if not window:
        return full, 0.0
    first = min(max(window - start, 0), padded)
    cut = first * start + in_key_blocks(first) + (padded - first) * (window + TILE / 2)
    return full, min(cut, full)


def step_cost(
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    work: list[tuple[Request, int]],
    *,
    starting: bool,
) -> tuple[float, float, float]:
    """Seconds and joules, and how late after its end its tokens are told: the next step is launched
    first, unless the GPU is busy for longer than that takes."""
    link = 0.0
    if serving.tensor_parallel > 1:  # awake links draw as much between all-reduces as in them
        kernel = calibration.kernels["communication"]
        link = kernel.active_watts
        kernels = {**calibration.kernels, "communication": replace(kernel, active_watts=0.0)}
        calibration = replace(calibration, kernels=kernels)
    tokens = sum(count for _, count in work)
    decodes = [r for r, count in work if count == 1 and r.computed > 0]
    prefills = [(r, count) for r, count in work if not (count == 1 and r.computed > 0)]
    window = window_tokens(model)
    padded = tokens
    graphs = serving.graph_batch_sizes if serving.stack == "vllm" else ()
    in_graph = bool(graphs) and tokens <= max(graphs)
    if in_graph:
        padded = min(size for size in graphs if size >= tokens)
    tile = tile_tokens(model, serving)
    pairs = [chunk_pairs(r.computed, count, window, tile) for r, count in prefills]
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
    attention = split_table(table)[2]
    per_row = _attention_rows(model, attention, np.array([padded]), gpu, calibration)
    per_sequence = _attention_sequences(model, attention, np.array([len(work)]), gpu, calibration)
    tables = costs.tables() + per_row.tables() + per_sequence.tables()
    stack = calibration.stacks[serving.stack]
    host = stack.step_host_seconds + stack.sequence_host_seconds * len(work)
    ends = sum(r.computed + n == r.known and r.generated + 1 == r.output_tokens for r, n in work)
    going_on = len(work) - ends
    following = stack.step_host_seconds + stack.sequence_host_seconds * going_on
    launches = model.num_layers * stack.launch_seconds
    each_kernel = (stack.kernels_per_layer + of_experts(model, serving)) * launches
    if not (graphs and going_on <= max(graphs)):
        following += each_kernel
    if not in_graph:
        host += each_kernel
    elif prefills:
        host += stack.piecewise_kernels * launches
    gap = stack.step_gap_seconds
    if starting:
        gap += stack.start_gap_seconds + stack.request_host_seconds * len(prefills)
    else:
        host += stack.request_host_seconds * len(prefills)
    seconds, joules = step_seconds_and_joules(tables, calibration, host, gap, link)
    x = clock_under_cap(*tables.T, calibration, host, gap, link)[0]
    busy = float(tables[0, 0] + tables[0, 1] / x)
    if seconds[0] > max(busy, host) + gap:  # stretched to meet the limit
        busy = float(seconds[0]) - gap
    late = max(0.0, following - max(0.0, busy - host))
    return float(seconds[0]), float(joules[0]), late


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
    kv = kv_cache(model, serving, gpu)
    free = kv.blocks if blocks is None else blocks
    size = serving.block_tokens
    full, windowed = kv.full_groups, kv.window_groups

    def behind(request: Request) -> int:
        return max(0, request.computed - kv.window + 1) // size if windowed else 0

    def held(request: Request) -> int:
        return full * request.blocks + windowed * (request.blocks - request.behind)

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
            free += sum(held(r) for r in late)
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
        for request in running:
            free += windowed * (behind(request) - request.behind)
            request.behind = behind(request)
        for request in list(running):
            if budget == 0 or request not in running:
                break
            count = min(request.known - request.computed, budget)
            blocks_then = ceil((request.computed + count) / size)
            needed = (full + windowed) * (blocks_then - request.blocks)
            while needed > free and request in running:
                preempted = True
                victim = running.pop()
                free += held(victim)
                victim.blocks = victim.behind = 0
                victim.computed = victim.cached
                waiting.insert(0, victim)
                outcome.preemptions += 1
            if request not in running:
                break
            free -= needed
            request.blocks = blocks_then
            budget -= count
            work.append((request, count))
        while not preempted and waiting and budget and len(running) + len(late) < serving.max_batch:
            request = waiting[0]
            request.computed = request.cached  # a prefix found in the cache is not computed
            request.behind = behind(request)
            count = min(request.known - request.computed, budget)
            request.blocks = ceil(request.known / size)
            whole = full * request.blocks
            if windowed:
                longest = serving.max_model_len or model.max_model_len
                most = ceil(min(kv.window - 1 + serving.max_step_tokens, longest) / size) + 1
                whole += windowed * max(0, min(request.blocks, most) - request.behind)
            request.blocks = ceil((request.computed + count) / size)
            if max(whole, held(request)) > free:
                request.blocks = request.behind = 0
                break
            free -= held(request)
            budget -= count
            running.append(waiting.pop(0))
            work.append((request, count))
        free += sum(held(r) for r in late)
        late = []
        if not work:
            cutoff = now
            continue
        seconds, joules, told = step_cost(model, serving, gpu, calibration, work, starting=starting)
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
        if any(r.generated and r.computed == r.known - 1 for r in running):  # a step follows
            for request in running:
                if outcome.first_token.get(request.index) == now:
                    outcome.first_token[request.index] += told
    return outcome


def as_arrays(outcome: Outcome, count: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.array([outcome.first_token[i] for i in range(count)])
    finish = np.array([outcome.finish[i] for i in range(count)])
    return first, finish


@dataclass
class Drafted:
    """A request that is decoded with drafts."""

    index: int
    arrival: float
    input_tokens: int
    output_tokens: int
    cached: int = 0
    held: float = 0.0
    """Tokens in the KV cache."""
    generated: float = 0.0
    rounds_left: int = 0
    blocks: int = 0

    @property
    def known(self) -> int:
        return self.input_tokens + int(self.generated + 1e-9)


def pass_costs(
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    *,
    tokens: int,
    rows: int,
    keys: list[float],
    chunks: list[tuple[int, int]],
) -> tuple[np.ndarray, bool]:
    """Costs of a pass (1, 4) as `OperatorCosts.tables`, and whether a graph runs it.

    keys : tokens that each decoding sequence attends to; chunks : start and length of pieces of
    prompts
    """
    window = window_tokens(model)
    graphs = serving.graph_batch_sizes if serving.stack == "vllm" else ()
    in_graph = bool(graphs) and tokens <= max(graphs)
    padded = min(size for size in graphs if size >= tokens) if in_graph else tokens
    tile = tile_tokens(model, serving)
    pairs = [chunk_pairs(start, count, window, tile) for start, count in chunks]
    stats = step_stats(
        model,
        tokens=padded,
        rows=rows,
        decode_kv_tokens=sum(keys),
        decode_window_kv_tokens=sum(min(k, window) for k in keys),
        prefill_pairs=sum(p[0] for p in pairs),
        prefill_window_pairs=sum(p[1] for p in pairs),
    )
    table = operator_table(model, serving)
    attention = split_table(table)[2]
    tables = operator_costs(table, stats, gpu, calibration).tables()
    tables += _attention_rows(model, attention, np.array([padded]), gpu, calibration).tables()
    tables += _attention_sequences(model, attention, np.array([rows]), gpu, calibration).tables()
    return tables, in_graph


def round_cost(
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    work: list[tuple[Drafted, int]],
    per_round: float,
    *,
    starting: bool,
) -> tuple[float, float]:
    """Seconds and joules of a round: a check, and as many drafts as it has."""
    draft = serving.draft
    assert draft is not None
    drafts, count = draft.tokens, len(work)
    held = [r.held for r, _ in work if r.rounds_left]
    chunks = [(int(r.held), tokens) for r, tokens in work if not r.rounds_left]
    tokens = sum(tokens for _, tokens in work)
    rows = (drafts + 1) * len(held) + len(chunks)
    alone = replace(serving, draft=None, decode_queries=1)
    first = replace(alone, decode_queries=drafts + 2)
    fitted = (gpu, calibration)
    tables, captured = pass_costs(
        model,
        serving,
        *fitted,
        tokens=tokens,
        rows=rows,
        keys=[c + drafts + 1 for c in held],
        chunks=chunks,
    )
    stack = calibration.stacks[serving.stack]
    kernels, drafting = (
        stack.kernels_per_layer + of_experts(m, serving) for m in (model, draft.model)
    )
    launches = 0.0
    if not captured:
        launches = kernels * model.num_layers
    elif chunks:
        launches = stack.piecewise_kernels * model.num_layers
    host = launches * stack.launch_seconds
    for j in range(1, drafts + 1):
        if j == 1:
            own, _ = pass_costs(
                draft.model,
                first,
                *fitted,
                tokens=tokens + count,
                rows=count,
                keys=[c + drafts + 2 for c in held],
                chunks=chunks,
            )
        else:
            ahead = [c + per_round for c in held] + [float(start + size) for start, size in chunks]
            own, _ = pass_costs(
                draft.model,
                alone,
                *fitted,
                tokens=count,
                rows=count,
                keys=[c + j for c in ahead],
                chunks=[],
            )
        tables = tables + own
        launches = drafting * draft.model.num_layers
        host += stack.draft_host_seconds + launches * stack.launch_seconds
    gap = stack.round_host_seconds
    gap += (stack.sequence_host_seconds + stack.round_sequence_host_seconds) * count
    gap += stack.request_host_seconds * len(chunks)
    gap += stack.step_gap_seconds * (1 + drafts)
    gap += stack.start_gap_seconds * starting
    seconds, joules = step_seconds_and_joules(tables, calibration, host, gap)
    return float(seconds[0]), float(joules[0])


def simulate_with_drafts(
    arrivals: list[float],
    inputs: list[int],
    outputs: list[int],
    *,
    model: ModelSpec,
    serving: ServingConfig,
    gpu: GpuSpec,
    calibration: Calibration,
    blocks: int,
    cached: list[int] | None = None,
) -> Outcome:
    """vLLM V1 with a draft model: each round is scheduled when its predecessor has ended."""
    draft = serving.draft
    assert draft is not None
    drafts, size, free = draft.tokens, serving.block_tokens, blocks
    per_round = sum(draft.acceptance**i for i in range(drafts + 1))
    cached = cached or [0] * len(arrivals)
    future = [
        Drafted(i, *row)
        for i, row in enumerate(zip(arrivals, inputs, outputs, cached, strict=True))
    ]
    waiting: list[Drafted] = []
    running: list[Drafted] = []
    outcome = Outcome()
    now = 0.0

    def needs(tokens: float) -> int:
        return ceil((tokens - 1e-9) / size)

    while future or waiting or running:
        starting = not running
        if starting and not waiting and future[0].arrival > now:
            outcome.idle_seconds += future[0].arrival - now
            now = future[0].arrival
        while future and future[0].arrival <= now:
            waiting.append(future.pop(0))
        budget = serving.max_step_tokens - serving.max_batch
        work: list[tuple[Drafted, int]] = []
        preempted = False
        for request in list(running):
            if request not in running:
                break
            if request.rounds_left:
                count, ahead = drafts + 1, 2 * drafts + 1
            else:
                count = min(request.known - int(request.held), budget)
                ahead = count + drafts
            needed = max(needs(request.held + ahead) - request.blocks, 0)
            while needed > free and request in running:
                preempted = True
                victim = running.pop()
                free += victim.blocks
                victim.blocks = 0
                victim.held = victim.cached
                victim.generated = min(int(victim.generated + 1e-9), victim.output_tokens - 1)
                victim.rounds_left = 0
                waiting.insert(0, victim)
                outcome.preemptions += 1
            if request not in running:
                break
            free -= needed
            request.blocks += needed
            budget -= count
            work.append((request, count))
        while not preempted and waiting and budget and len(running) < serving.max_batch:
            request = waiting[0]
            count = min(request.known - request.cached, budget)
            ahead = drafts if request.cached else 0
            wanted = needs(request.cached + count + ahead)
            if max(wanted, needs(request.known)) > free:
                break
            request.held = request.cached
            request.blocks = wanted
            free -= wanted
            budget -= count
            running.append(waiting.pop(0))
            work.append((request, count))
        seconds, joules = round_cost(
            model, serving, gpu, calibration, work, per_round, starting=starting
        )
        now += seconds
        outcome.joules += joules
        outcome.steps += 1
        for request, count in work:
            if request.rounds_left:
                request.rounds_left -= 1
                request.held += per_round
                request.generated += per_round
                if not request.rounds_left:
                    outcome.finish[request.index] = now
            else:
                request.held += count
                if request.held == request.known:
                    request.generated += 1
                    outcome.first_token.setdefault(request.index, now)
                    left = request.output_tokens - request.generated
                    request.rounds_left = ceil(left / per_round - 1e-9)
                    if not left:
                        outcome.finish[request.index] = now
        free += sum(r.blocks for r in running if r.index in outcome.finish)
        running = [r for r in running if r.index not in outcome.finish]
    return outcome
