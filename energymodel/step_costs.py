"""Cost of one serving step from the cost tables, compiled; shared by both schedulers.

`TOTALS` and the arrays of `new_sums` are what every simulation adds up, per GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from energymodel.compiled import compiled, inlined

Array = NDArray[np.float64]

# indices of the scalars that a simulation accumulates (per GPU)
TOTALS = (
    "now",
    "idle_seconds",
    "gpu_seconds",
    "wait_seconds",
    "steps",
    "preemptions",
    "prefill_joules",
    "decode_joules",
    "throttled_seconds",
    "stretch_seconds",
    "slow_host_seconds",
)
NOW, IDLE, GPU, WAIT, STEPS, PREEMPT, PRE_J, DEC_J, THROTTLED, STRETCH, SLOW = range(len(TOTALS))

# fields of the tuple that `step_cost` returns
SECONDS, GPU_SECONDS, CLOCK, CORE, DECODE, DECODE_ATTENTION = 0, 1, 2, 3, 4, 5
PREFILL, PREFILL_ATTENTION, STRETCHED, TOKEN_ROW, ROW_ROW, HOST_BOUND = 6, 7, 8, 9, 10, 11
SLOW_HOST, TOKEN_SCALE = 12, 13

SLOW_HOST_RATIO = 1.5
"""Of a slow host's times to the calibration's. A host whose cores other machines share is met at
1.2 to 1.5 times the mean of its two speeds (docs/residuals.md)."""

LONGEST_THROTTLED_JUMP = 32  # steps; under the power limit costs are only nearly linear
_KEY_BLOCK = 128  # keys that attention takes at a time for the queries of a prompt
_LOWEST_CLOCK = 0.2  # share of the highest clock, as in `roofline.clock_under_cap`


SLICES = 256  # of time, at most; where they do not last, neighbours become one
_FIRST_SLICE_SECONDS = 2.0**-10


def new_sums(token_rows: int, row_rows: int) -> tuple[Array, ...]:
    """Zeros for token_steps, row_steps, attention_sums, phase_steps and slices of `Simulation`.

    The last array, (1,), holds the length of a slice [s], which doubles as time goes on.
    """
    shapes = (token_rows, 3), (row_rows, 3), (4, 3), (2, 3), (SLICES, 3)
    return *(np.zeros(shape) for shape in shapes), np.array([_FIRST_SLICE_SECONDS])


@compiled
def under_limit(memory, compute, fixed, core, host, gap, base, cap, exponent):  # type: ignore[no-untyped-def]
    """Scalar twin of `roofline.clock_under_cap`, plus the stretched GPU time.

    Newton's method, kept inside a bracket, instead of the bisection: the excess over the limit
    grows with the clock.
    """
    seconds = memory + compute
    if seconds <= 0.0:
        return 1.0, 1.0, 0.0, 0.0
    watts = cap - base
    if fixed + core <= watts * (max(seconds, host) + gap):
        return 1.0, 1.0, seconds, 0.0
    low, high = _LOWEST_CLOCK, 1.0
    x = max(0.5 * (low + high), watts * (max(seconds, host) + gap) / (fixed + core))
    for _ in range(60):
        power = core * x**exponent
        seconds = memory + compute / x
        excess = fixed + power - watts * (max(seconds, host) + gap)
        if excess > 0.0:
            high = x
        else:
            low = x
        slope = exponent * power / x
        if seconds > host:
            slope += watts * compute / (x * x)
        following = x - excess / slope if slope > 0.0 else 0.5 * (low + high)
        if abs(following - x) < 1e-13:
            x = following
            break
        if not low < following < high:
            following = 0.5 * (low + high)
        x = following
    g = x**exponent
    seconds = memory + compute / x
    needed = (fixed + core * g) / watts - gap
    if needed > max(seconds, host):
        return x, g, needed, needed - seconds
    return x, g, seconds, 0.0


@inlined
def pass_parts(tokens, rows, att, prefills, decodes, tables):  # type: ignore[no-untyped-def]
    """Costs of one pass through a model, by what they depend on.

    Arguments as in `step_cost`. Returns the four numbers of a table row (memory s, compute s, fixed
    J, core J) of tokens, of rows of logits, of decode and of prefill attention; then the table
    row, the row-table row, whether a captured graph runs the pass, and how many times the last
    table row it takes where it holds more tokens than that.
    """
    token_table, row_table, att_table, phase_table, graph_tokens = tables
    row_index = min(rows, row_table.shape[0] - 1)
    in_graph = tokens < graph_tokens.shape[0]
    index = graph_tokens[tokens] if in_graph else tokens
    scale = 1.0
    if index >= token_table.shape[0]:
        scale = index / (token_table.shape[0] - 1)
        index = token_table.shape[0] - 1
    t0, t1 = token_table[index, 0] * scale, token_table[index, 1] * scale
    t2, t3 = token_table[index, 2] * scale, token_table[index, 3] * scale
    r0, r1 = row_table[row_index, 0], row_table[row_index, 1]
    r2, r3 = row_table[row_index, 2], row_table[row_index, 3]
    d0 = d1 = d2 = d3 = 0.0
    if decodes > 0:
        a, b = att[0], att[1]
        d0 = phase_table[1, 0] + a * att_table[0, 0] + b * att_table[1, 0]
        d1 = phase_table[1, 1] + a * att_table[0, 1] + b * att_table[1, 1]
        d2 = phase_table[1, 2] + a * att_table[0, 2] + b * att_table[1, 2]
        d3 = phase_table[1, 3] + a * att_table[0, 3] + b * att_table[1, 3]
    p0 = p1 = p2 = p3 = 0.0
    if prefills > 0:
        a, b = att[2], att[3]
        p0 = phase_table[0, 0] + a * att_table[2, 0] + b * att_table[3, 0]
        p1 = phase_table[0, 1] + a * att_table[2, 1] + b * att_table[3, 1]
        p2 = phase_table[0, 2] + a * att_table[2, 2] + b * att_table[3, 2]
        p3 = phase_table[0, 3] + a * att_table[2, 3] + b * att_table[3, 3]
    return (
        (t0, t1, t2, t3),
        (r0, r1, r2, r3),
        (d0, d1, d2, d3),
        (p0, p1, p2, p3),
        index,
        row_index,
        in_graph,
        scale,
    )


@inlined
def host_of_step(in_graph, rows, prefills, starting, host):  # type: ignore[no-untyped-def]
    """Host seconds of a step that the GPU's overlap.

    host: 0 graph step, 1 piecewise step, 2 eager step, 3 per sequence, 4 gap, 5 gap per token of KV
    cache attended to, 6 gap of a first step, 7 host per new prompt
    """
    seconds = host[3] * rows
    if not in_graph:
        seconds += host[2]
    elif prefills > 0:
        seconds += host[1]
    else:
        seconds += host[0]
    if not starting:
        seconds += host[7] * prefills
    return seconds


@compiled
def told_late(  # type: ignore[no-untyped-def]
    cost, tokens, rows, going_on, prefills, starting, graph_tokens, host
):
    """Seconds after the end of a step, whose `cost` this is, at which its tokens are handed out.

    vLLM's engine launches the next step first (`v1/engine/core.py`, `step_with_batch_queue`), here
    taken as one that decodes those of its sequences that go on. Where the GPU is busy for longer
    than that takes, nobody waits for it.
    """
    own = host_of_step(tokens < graph_tokens.shape[0], rows, prefills, starting, host)
    following = host_of_step(going_on < graph_tokens.shape[0], going_on, 0, False, host)
    return max(0.0, following - max(0.0, cost[GPU_SECONDS] - own))


@compiled
def step_cost(  # type: ignore[no-untyped-def]
    tokens, rows, att, prefills, decodes, starting, tables, host, limits
):
    """Cost of one step.

    tokens, rows : tokens and rows of logits; att : the four attention statistics, a tuple;
    prefills, decodes : sequences of each kind; starting : nothing ran before, so that nothing
    overlaps the preparation; tables, host, limits : of `costs.CostTables`

    Returns a tuple, see the names above: total s, GPU s, clock share, core-energy factor,
    decode J (attention left out), decode attention J, prefill J (attention left out), prefill
    attention J, stretched s, table row, row-table row, whether the host is slower than the GPU,
    what a slow host would add (`slowed`).
    """
    base, cap, exponent, pipeline = limits[0], limits[1], limits[2], limits[3]
    t, r, d, p, index, row_index, in_graph, scale = pass_parts(
        tokens, rows, att, prefills, decodes, tables
    )
    host_seconds = host_of_step(in_graph, rows, prefills, starting, host)
    gap = host[4] + host[5] * att[0]
    if starting:
        gap += host[6] + host[7] * prefills
    x, g, gpu, stretched = under_limit(
        t[0] + r[0] + d[0] + p[0], t[1] + r[1] + d[1] + p[1],
        t[2] + r[2] + d[2] + p[2], t[3] + r[3] + d[3] + p[3],
        host_seconds, gap, base, cap, exponent,
    )  # fmt: skip
    total = max(gpu, host_seconds) + gap
    rest = base * (total - gpu + stretched)
    by_token = (stage_joules(t, x, g, base, pipeline) + rest) / tokens
    by_row = stage_joules(r, x, g, base, pipeline) / rows
    return (
        total,
        gpu,
        x,
        g,
        (by_token + by_row) * decodes,
        stage_joules(d, x, g, base, pipeline),
        by_token * (tokens - decodes) + by_row * (rows - decodes),
        stage_joules(p, x, g, base, pipeline),
        stretched,
        index,
        row_index,
        host_seconds > gpu,
        slowed(gpu, host_seconds, gap),
        scale,
    )


@inlined
def stage_joules(part, x, g, base, pipeline):  # type: ignore[no-untyped-def]
    """Energy of a GPU for a table row at clock share x and core-energy factor g, its base included.

    Stages of a pipeline work one after another: vLLM 0.22 schedules a step before the tokens of
    the one before it are out, and its first stage waits for these. So each stage does its share,
    and is awake all the while.
    """
    return (part[2] + part[3] * g) / pipeline + base * (part[0] + part[1] / x)


@compiled
def slowed(gpu, host, gap):  # type: ignore[no-untyped-def]
    """Seconds that a step takes longer where the host takes `SLOW_HOST_RATIO` as long."""
    later = max(gpu, SLOW_HOST_RATIO * host) - max(gpu, host)
    return later + (SLOW_HOST_RATIO - 1.0) * gap


@compiled
def pairs(start, count, window, tile):  # type: ignore[no-untyped-def]
    """Query-key pairs of a prompt chunk: (whole context, under the window), tiles filled.

    tile : tokens whose queries fill one (`tiles.prompt_tile_tokens`)
    """
    rows = np.ceil(count / tile) * tile
    full = rows * start + _causal(rows)
    if window <= 0:
        return full, 0.0
    first = min(max(window - start, 0.0), rows)
    cut = first * start + _causal(first) + (rows - first) * (window + _KEY_BLOCK / 2.0)
    return full, min(cut, full)


@inlined
def _causal(rows):  # type: ignore[no-untyped-def]
    """Pairs of query rows with the keys up to them, in whole blocks."""
    blocks = np.floor(rows / _KEY_BLOCK)
    rest = rows - blocks * _KEY_BLOCK
    return _KEY_BLOCK * (blocks + 1.0) * (_KEY_BLOCK * blocks / 2.0 + rest)


@compiled
def add_to_slices(start, seconds, prefill, decode, slices, slice_seconds):  # type: ignore[no-untyped-def]
    """Spread prefill and decode joules, and the seconds, evenly over their slices of time.

    Slices that do not reach the end are joined two by two.
    """
    size = slices.shape[0]
    end = start + seconds
    while end >= size * slice_seconds[0]:
        slice_seconds[0] *= 2.0
        for column in range(3):
            for i in range(size // 2):
                slices[i, column] = slices[2 * i, column] + slices[2 * i + 1, column]
            slices[size // 2 :, column] = 0.0
    width = slice_seconds[0]
    first, last = int(start / width), int(end / width)
    for i in range(first, last + 1):
        within = min(end, (i + 1) * width) - max(start, i * width)
        share = within / seconds if last > first else 1.0
        slices[i, 0] += share * prefill
        slices[i, 1] += share * decode
        slices[i, 2] += share * seconds


@compiled
def between(first, last, share):  # type: ignore[no-untyped-def]
    """Cost of a step of decodes between two of the same kind, neither under the power limit."""
    return (
        first[0] + (last[0] - first[0]) * share,
        first[1] + (last[1] - first[1]) * share,
        first[2],
        first[3],
        first[4] + (last[4] - first[4]) * share,
        first[5] + (last[5] - first[5]) * share,
        first[6],
        first[7],
        first[8],
        first[9],
        first[10],
        first[11],
        first[12] + (last[12] - first[12]) * share,
        first[13],
    )


@compiled
def account(k, first, last, att, att_last, prefills, decodes, sums, totals):  # type: ignore[no-untyped-def]
    """Add k steps whose costs run linearly from `first` to `last`."""
    rows = first[TOKEN_ROW], first[ROW_ROW], first[TOKEN_SCALE]
    count_passes(k, 1.0, first, last, rows, att, att_last, prefills, decodes, sums)
    add_steps(k, first, last, sums[4], sums[5], totals)


@compiled
def count_passes(  # type: ignore[no-untyped-def]
    k, passes, first, last, rows, att, att_last, prefills, decodes, sums
):
    """Count what the passes of one kind cost by: `passes` in each of k steps.

    rows : table row, row-table row, and how many times the first counts; att, att_last : attention
    statistics of a pass of the first and of the last step
    """
    token_steps, row_steps, attention_sums, phase_steps = sums[0], sums[1], sums[2], sums[3]
    weights = (
        passes * k,
        0.5 * passes * k * (1.0 / first[CLOCK] + 1.0 / last[CLOCK]),
        0.5 * passes * k * (first[CORE] + last[CORE]),
    )
    for w in range(3):
        token_steps[rows[0], w] += rows[2] * weights[w]
        row_steps[rows[1], w] += weights[w]
        if prefills > 0:
            phase_steps[0, w] += weights[w]
            attention_sums[2, w] += att[2] * weights[w]
            attention_sums[3, w] += att[3] * weights[w]
        if decodes > 0:
            phase_steps[1, w] += weights[w]
            attention_sums[0, w] += 0.5 * (att[0] + att_last[0]) * weights[w]
            attention_sums[1, w] += 0.5 * (att[1] + att_last[1]) * weights[w]


@compiled
def add_steps(k, first, last, slices, slice_seconds, totals):  # type: ignore[no-untyped-def]
    """Add time and energy of k steps whose costs run linearly from `first` to `last`."""
    half = 0.5 * k
    seconds = half * (first[SECONDS] + last[SECONDS])
    gpu = half * (first[GPU_SECONDS] + last[GPU_SECONDS])
    prefill = half * (
        first[PREFILL] + first[PREFILL_ATTENTION] + last[PREFILL] + last[PREFILL_ATTENTION]
    )
    decode = half * (
        first[DECODE] + first[DECODE_ATTENTION] + last[DECODE] + last[DECODE_ATTENTION]
    )
    add_to_slices(totals[NOW], seconds, prefill, decode, slices, slice_seconds)
    totals[NOW] += seconds
    totals[GPU] += gpu
    totals[WAIT] += seconds - gpu
    totals[STEPS] += k
    totals[PRE_J] += prefill
    totals[DEC_J] += decode
    totals[STRETCH] += half * (first[STRETCHED] + last[STRETCHED])
    totals[SLOW] += half * (first[SLOW_HOST] + last[SLOW_HOST])
    if first[CLOCK] < 1.0:
        totals[THROTTLED] += gpu
