"""Continuous batching as vLLM V1 schedules it, simulated exactly, step by step in effect.

The scheduler's rules were read from vLLM 0.22 (`v1/core/sched/scheduler.py`): running requests
first in order of admission, then waiting ones first come first served, within a budget of
tokens, sequences and KV blocks; prompts are chunked; when blocks run out the last admitted
request is preempted and recomputed. Scheduling is asynchronous: a step is scheduled when its
predecessor starts, so arrivals and freed slots take effect one step later.

While no request arrives, finishes, crosses its sliding window or runs out of blocks, every
step differs from the last only by one token of context per sequence; `_simulate` jumps over
such runs of steps, whose costs form an arithmetic series. `tests/reference_simulator.py` is
the same without jumps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from energymodel.costs import ATTENTION_STATS, CostTables

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

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
)
_T = {name: i for i, name in enumerate(TOTALS)}
_NOW, _IDLE, _GPU, _WAIT, _STEPS, _PREEMPT, _PRE_J, _DEC_J, _THROTTLED, _STRETCH = range(
    len(TOTALS)
)

_LONGEST_THROTTLED_JUMP = 32  # steps; under the power limit costs are only nearly linear
_TILE = 128  # query rows of an attention tile (FlashAttention 3, head_dim 64 to 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What one replica did, per GPU of it. Times from the first arrival [s], energies [J]."""

    first_token_seconds: Array
    """(n,) when each request's first token was out."""
    finish_seconds: Array
    """(n,) when each request's last token was out."""
    request_joules: Array
    """(n,) active energy of each request."""
    token_steps: Array
    """(tokens, 3) steps by table row: count, sum of 1/clock share, sum of core-energy factor."""
    row_steps: Array
    """(rows, 3) the same by rows of logits."""
    attention_sums: Array
    """(len(ATTENTION_STATS), 3) sums of the attention statistics, weighted the same way."""
    phase_steps: Array
    """(2, 3) steps with prefill and steps with decode attention."""
    totals: dict[str, float]
    """By the names in TOTALS."""


@njit(cache=True)
def _clock(memory, compute, fixed, core, base, cap, exponent):  # type: ignore[no-untyped-def]
    """Scalar twin of `roofline.clock_under_cap`, plus the stretched GPU time."""
    seconds = memory + compute
    if seconds <= 0.0:
        return 1.0, 1.0, 0.0, 0.0
    if fixed + core <= (cap - base) * seconds:
        return 1.0, 1.0, seconds, 0.0
    low, high = 0.2, 1.0
    for _ in range(40):
        x = 0.5 * (low + high)
        if fixed + core * x**exponent > (cap - base) * (memory + compute / x):
            high = x
        else:
            low = x
    g = low**exponent
    seconds = memory + compute / low
    needed = (fixed + core * g) / (cap - base)
    if needed > seconds:
        return low, g, needed, needed - seconds
    return low, g, seconds, 0.0


@njit(cache=True)
def _step(  # type: ignore[no-untyped-def]
    tokens, rows, att, prefills, decodes, tables, host, limits, out
):
    """Cost of one step into `out`; returns nothing.

    out: 0 total s, 1 GPU s, 2 x, 3 g, 4 decode J (attention left out), 5 decode attention J,
    6 prefill J (attention left out), 7 prefill attention J, 8 stretched s, 9 table row,
    10 row-table row, 11 whether the host is slower than the GPU
    """
    token_table, row_table, att_table, phase_table, graph_tokens = tables
    base, cap, exponent, pipeline = limits[0], limits[1], limits[2], limits[3]
    n_token_rows = token_table.shape[0]
    share = int(np.ceil(tokens / pipeline))
    row_index = int(np.ceil(rows / pipeline))
    in_graph = share < graph_tokens.shape[0]
    index = graph_tokens[share] if in_graph else share
    scale = 1.0
    if index >= n_token_rows:
        scale = index / (n_token_rows - 1)
        index = n_token_rows - 1
    parts = np.zeros((4, 4))  # token, rows, decode attention, prefill attention
    for j in range(4):
        parts[0, j] = token_table[index, j] * scale
        parts[1, j] = row_table[min(row_index, row_table.shape[0] - 1), j]
        if decodes > 0:
            parts[2, j] = (
                phase_table[1, j] + (att[0] * att_table[0, j] + att[1] * att_table[1, j]) / pipeline
            )
        if prefills > 0:
            parts[3, j] = (
                phase_table[0, j] + (att[2] * att_table[2, j] + att[3] * att_table[3, j]) / pipeline
            )
    memory = parts[:, 0].sum()
    compute = parts[:, 1].sum()
    x, g, gpu, stretched = _clock(
        memory, compute, parts[:, 2].sum(), parts[:, 3].sum(), base, cap, exponent
    )
    # host: 0 graph step, 1 piecewise step, 2 eager step, 3 per sequence, 4 gap, 5 gap per
    # sequence, 6 gap of a step with prompts, 7 host per new prompt
    host_seconds = host[3] * rows
    if not in_graph:
        host_seconds += host[2]
    elif prefills > 0:
        host_seconds += host[1]
    else:
        host_seconds += host[0]
    gap = host[4] + host[5] * rows
    if prefills > 0:
        host_seconds += host[7] * prefills
        gap += host[6]
    total = max(gpu, host_seconds) + gap
    rest = base * (total - gpu + stretched)
    joules = np.empty(4)
    for i in range(4):
        seconds = parts[i, 0] + parts[i, 1] / x
        joules[i] = parts[i, 2] + parts[i, 3] * g + base * seconds
    by_token = (joules[0] + rest) / tokens
    by_row = joules[1] / rows
    out[0] = total
    out[1] = gpu
    out[2] = x
    out[3] = g
    out[4] = by_token * decodes + by_row * decodes
    out[5] = joules[2]
    out[6] = by_token * (tokens - decodes) + by_row * (rows - decodes)
    out[7] = joules[3]
    out[8] = stretched
    out[9] = index
    out[10] = min(row_index, row_table.shape[0] - 1)
    out[11] = 1.0 if host_seconds > gpu else 0.0


@njit(cache=True)
def _pairs(start, count, window):  # type: ignore[no-untyped-def]
    """Query-key pairs of a prompt chunk: (whole context, under the window), tiles filled."""
    padded = np.ceil(count / _TILE) * _TILE
    full = padded * start + padded * (padded + _TILE) / 2.0
    if window <= 0:
        return full, 0.0
    first = min(max(window - start, 0.0), padded)
    cut = first * start + first * (first + _TILE) / 2.0 + (padded - first) * (window + _TILE / 2.0)
    return full, min(cut, full)


@njit(cache=True)
def _account(k, first, last, att, att_last, prefills, decodes, sums, totals):  # type: ignore[no-untyped-def]
    """Add k steps whose costs run linearly from `first` to `last`."""
    token_steps, row_steps, attention_sums, phase_steps = sums
    weights = (1.0, 0.5 * (1.0 / first[2] + 1.0 / last[2]), 0.5 * (first[3] + last[3]))
    for w in range(3):
        token_steps[int(first[9]), w] += k * weights[w]
        row_steps[int(first[10]), w] += k * weights[w]
        for s in range(4):
            attention_sums[s, w] += k * 0.5 * (att[s] + att_last[s]) * weights[w]
        if prefills > 0:
            phase_steps[0, w] += k * weights[w]
        if decodes > 0:
            phase_steps[1, w] += k * weights[w]
    seconds = 0.5 * k * (first[0] + last[0])
    gpu = 0.5 * k * (first[1] + last[1])
    totals[_NOW] += seconds
    totals[_GPU] += gpu
    totals[_WAIT] += seconds - gpu
    totals[_STEPS] += k
    totals[_PRE_J] += 0.5 * k * (first[6] + first[7] + last[6] + last[7])
    totals[_DEC_J] += 0.5 * k * (first[4] + first[5] + last[4] + last[5])
    totals[_STRETCH] += 0.5 * k * (first[8] + last[8])
    if first[2] < 1.0:
        totals[_THROTTLED] += gpu


@njit(cache=True)
def _simulate(  # type: ignore[no-untyped-def]
    arrival, inputs, outputs, tables, host, limits, config, jump, abandon_seconds
):
    """Run one replica to the end. config: max batch, step tokens, KV blocks, block, window."""
    max_batch, budget_tokens, num_blocks, block, window = config
    n = arrival.shape[0]
    first_token = np.zeros(n)
    finish = np.zeros(n)
    request_joules = np.zeros(n)
    computed = np.zeros(n, np.int64)
    generated = np.zeros(n, np.int64)
    held = np.zeros(n, np.int64)
    running = np.empty(max_batch, np.int64)
    scheduled = np.empty(max_batch, np.int64)
    chunk = np.empty(max_batch, np.int64)
    preempted = np.empty(n, np.int64)
    n_preempted = 0
    n_running = 0
    free = num_blocks
    late_slots = 0  # slots and blocks of requests that ended in the previous step
    late_blocks = 0
    head = 0  # next request never admitted
    totals = np.zeros(len(TOTALS))
    sums = (
        np.zeros((tables[0].shape[0], 3)),
        np.zeros((tables[1].shape[0], 3)),
        np.zeros((4, 3)),
        np.zeros((2, 3)),
    )
    first = np.zeros(12)
    last = np.zeros(12)
    att = np.zeros(4)
    att_last = np.zeros(4)
    cutoff = 0.0
    while True:
        if n_running == 0:  # nothing in flight: the schedule happens now
            free += late_blocks
            late_slots = late_blocks = 0
            if n_preempted == 0 and head < n and arrival[head] > totals[_NOW]:
                totals[_IDLE] += arrival[head] - totals[_NOW]
                totals[_NOW] = arrival[head]
            cutoff = totals[_NOW]
            if n_preempted == 0 and head >= n:
                break
        if head < n and cutoff - arrival[head] > abandon_seconds:
            return (first_token, finish, request_joules, sums, totals, head)
        # --- schedule: running requests first
        budget = budget_tokens
        n_scheduled = 0
        any_preempted = False
        position = 0
        while position < n_running and budget > 0:
            r = running[position]
            count = min(inputs[r] + generated[r] - computed[r], budget)
            needed = (computed[r] + count + block - 1) // block - held[r]
            while needed > free:
                any_preempted = True
                n_running -= 1
                victim = running[n_running]
                free += held[victim]
                held[victim] = 0
                computed[victim] = 0
                preempted[n_preempted] = victim
                n_preempted += 1
                totals[_PREEMPT] += 1
                if victim == r:
                    break
            if position >= n_running:
                break
            free -= needed
            held[r] += needed
            budget -= count
            scheduled[n_scheduled] = r
            chunk[n_scheduled] = count
            n_scheduled += 1
            position += 1
        # --- then waiting ones
        if not any_preempted:
            while budget > 0 and n_running + late_slots < max_batch:
                if n_preempted > 0:
                    r = preempted[n_preempted - 1]
                elif head < n and arrival[head] <= cutoff:
                    r = head
                else:
                    break
                known = inputs[r] + generated[r]
                if (known + block - 1) // block > free:
                    break
                count = min(known, budget)
                needed = (count + block - 1) // block
                free -= needed
                held[r] = needed
                budget -= count
                running[n_running] = r
                n_running += 1
                scheduled[n_scheduled] = r
                chunk[n_scheduled] = count
                n_scheduled += 1
                if n_preempted > 0:
                    n_preempted -= 1
                else:
                    head += 1
        free += late_blocks
        late_slots = late_blocks = 0
        if n_scheduled == 0:
            # nothing could run with what was known at the cutoff: look again now
            if n_running == 0 and cutoff < totals[_NOW]:
                continue
            if n_running == 0 and (n_preempted > 0 or head < n) and cutoff >= totals[_NOW]:
                return (first_token, finish, request_joules, sums, totals, head)
            cutoff = totals[_NOW]
            continue
        # --- statistics of the step
        att[:] = 0.0
        tokens = 0
        prefills = 0
        decodes = 0
        below = 0  # decoding sequences that have not filled the window yet
        k: Any = np.int64(1) << 40
        for i in range(n_scheduled):
            r = scheduled[i]
            tokens += chunk[i]
            if chunk[i] == 1 and computed[r] > 0:
                decodes += 1
                context = computed[r] + 1
                att[0] += context
                if window > 0:
                    att[1] += min(context, window)
                    if context < window:
                        below += 1
                        k = min(k, window - context)
                k = min(k, outputs[r] - generated[r])
            else:
                prefills += 1
                full, cut = _pairs(float(computed[r]), float(chunk[i]), float(window))
                att[2] += full
                att[3] += cut
        _step(tokens, n_scheduled, att, prefills, decodes, tables, host, limits, first)
        # --- how many steps like this one can be taken at once
        admissible = False
        if n_running < max_batch:
            if n_preempted > 0:
                admissible = True
            elif head < n:
                known = inputs[head]
                admissible = arrival[head] > cutoff or (known + block - 1) // block <= free
        if (
            not jump
            or prefills > 0
            or n_scheduled < n_running
            or any_preempted
            or (
                n_running < max_batch
                and (n_preempted > 0 or (head < n and arrival[head] <= cutoff and admissible))
            )
        ):
            k = 1
        # blocks for k steps must be there
        while k > 1:
            extra = 0
            for i in range(n_scheduled):
                r = scheduled[i]
                extra += (computed[r] + k + block - 1) // block - held[r]
                if extra > free:
                    break
            if extra <= free:
                break
            k = k // 2
        while k > 1:
            for s in range(4):
                att_last[s] = att[s]
            att_last[0] += (k - 1) * decodes
            att_last[1] += (k - 1) * below
            _step(tokens, n_scheduled, att_last, prefills, decodes, tables, host, limits, last)
            throttles = first[2] < 1.0 or last[2] < 1.0
            if first[11] != last[11] or (throttles and k > _LONGEST_THROTTLED_JUMP):
                k = k // 2
                continue
            if head < n and admissible and arrival[head] > cutoff:
                # the last step of the jump is the first that starts after the next arrival
                wanted = arrival[head] - totals[_NOW]
                slope = (last[0] - first[0]) / (k - 1)
                steps = 0
                if wanted > 0.0:
                    if slope > 1e-15 * first[0]:
                        b = first[0] - 0.5 * slope
                        root = (np.sqrt(b * b + 2.0 * slope * wanted) - b) / slope
                    else:
                        root = wanted / first[0]
                    steps = int(np.ceil(root - 1e-9))
                if steps + 1 < k:
                    k = steps + 1
                    continue
            break
        if k == 1:
            last[:] = first
            att_last[:] = att
        # --- run them
        start = totals[_NOW]
        last_start = start + 0.5 * k * (first[0] + last[0]) - last[0]
        _account(k, first, last, att, att_last, prefills, decodes, sums, totals)
        end = totals[_NOW]
        cutoff = last_start
        per_decode = 0.0
        per_context = 0.0
        if decodes > 0:
            per_decode = 0.5 * k * (first[4] + last[4]) / decodes
            per_context = k * (first[5] + last[5]) / max(att[0] + att_last[0], 1.0)
        per_token = 0.0
        if tokens > decodes:
            per_token = first[6] / (tokens - decodes)
        per_pair = first[7] / max(att[2], 1.0)
        for i in range(n_scheduled):
            r = scheduled[i]
            if chunk[i] == 1 and computed[r] > 0:
                context = computed[r] + 1 + 0.5 * (k - 1)
                request_joules[r] += per_decode + per_context * context
                needed = (computed[r] + k + block - 1) // block - held[r]
                if needed > 0:
                    held[r] += needed
                    free -= needed
                computed[r] += k
                if generated[r] == 0:  # the last chunk of a prompt may be a single token
                    first_token[r] = start + first[0]
                generated[r] += k
            else:
                full, cut = _pairs(float(computed[r]), float(chunk[i]), float(window))
                request_joules[r] += per_token * chunk[i] + per_pair * full
                computed[r] += chunk[i]
                if computed[r] == inputs[r] + generated[r]:
                    generated[r] += 1
                    if generated[r] == 1:
                        first_token[r] = end
        keep = 0
        for i in range(n_running):
            r = running[i]
            if generated[r] >= outputs[r]:
                finish[r] = end
                late_slots += 1
                late_blocks += held[r]
                held[r] = 0
            else:
                running[keep] = r
                keep += 1
        n_running = keep
    return (first_token, finish, request_joules, sums, totals, n)


@njit(cache=True)
def _simulate_static(  # type: ignore[no-untyped-def]
    arrival, inputs, outputs, tables, host, limits, config
):
    """Static batches in order of arrival, padded to the longest prompt and output."""
    max_batch, window = config[0], config[4]
    n = arrival.shape[0]
    first_token = np.zeros(n)
    finish = np.zeros(n)
    request_joules = np.zeros(n)
    totals = np.zeros(len(TOTALS))
    sums = (
        np.zeros((tables[0].shape[0], 3)),
        np.zeros((tables[1].shape[0], 3)),
        np.zeros((4, 3)),
        np.zeros((2, 3)),
    )
    first = np.zeros(12)
    last = np.zeros(12)
    att = np.zeros(4)
    att_last = np.zeros(4)
    start = 0
    while start < n:
        if arrival[start] > totals[_NOW]:
            totals[_IDLE] += arrival[start] - totals[_NOW]
            totals[_NOW] = arrival[start]
        stop = start
        longest_input = 0
        longest_output = 0
        while stop < n and stop - start < max_batch and arrival[stop] <= totals[_NOW]:
            longest_input = max(longest_input, inputs[stop])
            longest_output = max(longest_output, outputs[stop])
            stop += 1
        batch = stop - start
        before = totals[_PRE_J] + totals[_DEC_J]
        full, cut = _pairs(0.0, float(longest_input), float(window))
        att[:] = 0.0
        att[2] = full * batch
        att[3] = cut * batch
        _step(batch * longest_input, batch, att, batch, 0, tables, host, limits, first)
        _account(1, first, first, att, att, batch, 0, sums, totals)
        for r in range(start, stop):
            first_token[r] = totals[_NOW]
        done = 1
        while done < longest_output:
            context = longest_input + done
            k = min(longest_output - done, _LONGEST_THROTTLED_JUMP)
            if window > 0 and context < window:
                k = min(k, window - context)
            att[:] = 0.0
            att_last[:] = 0.0
            while True:
                att[0] = batch * context
                att_last[0] = batch * (context + k - 1)
                if window > 0:
                    att[1] = batch * min(context, window)
                    att_last[1] = batch * min(context + k - 1, window)
                _step(batch, batch, att, 0, batch, tables, host, limits, first)
                _step(batch, batch, att_last, 0, batch, tables, host, limits, last)
                if k > 1 and first[11] != last[11]:
                    k = k // 2
                    continue
                break
            _account(k, first, last, att, att_last, 0, batch, sums, totals)
            done += k
            for r in range(start, stop):
                if outputs[r] <= done and finish[r] == 0.0:
                    finish[r] = totals[_NOW]
        joules = totals[_PRE_J] + totals[_DEC_J] - before
        weight = 0.0
        for r in range(start, stop):
            if finish[r] == 0.0:
                finish[r] = totals[_NOW]
            weight += inputs[r] + outputs[r]
        for r in range(start, stop):
            request_joules[r] = joules * (inputs[r] + outputs[r]) / weight
        start = stop
    return (first_token, finish, request_joules, sums, totals, n)


def simulate(
    arrival_seconds: Array,
    input_tokens: Ints,
    output_tokens: Ints,
    costs: CostTables,
    *,
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
    static_batches : serve padded batches one after another instead of continuously
    jump : False takes every step singly (for tests)
    abandon_seconds : give up once a request has waited this long for admission

    Returns
    -------
    None if given up.
    """
    requests = (
        np.ascontiguousarray(arrival_seconds, np.float64),
        np.ascontiguousarray(input_tokens, np.int64),
        np.ascontiguousarray(output_tokens, np.int64),
    )
    tables = (costs.tokens, costs.rows, costs.attention, costs.phases, costs.graph_tokens)
    common: tuple[Any, ...] = (*requests, tables, costs.host, costs.limits, costs.config)
    if static_batches:
        result: Any = _simulate_static(*common)
    else:
        continuous: tuple[Any, ...] = (*common, jump, float(abandon_seconds))
        result = _simulate(*continuous)
    first_token, finish, request_joules, sums, totals, served = result
    if served < len(requests[0]):
        return None
    return Simulation(
        first_token_seconds=first_token,
        finish_seconds=finish,
        request_joules=request_joules,
        token_steps=sums[0],
        row_steps=sums[1],
        attention_sums=sums[2],
        phase_steps=sums[3],
        totals={name: float(totals[i]) for name, i in _T.items()},
    )


assert len(ATTENTION_STATS) == 4
