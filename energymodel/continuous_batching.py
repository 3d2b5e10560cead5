"""Continuous batching as vLLM V1 schedules it, one replica, compiled.

The scheduler's rules were read from vLLM 0.22 (`v1/core/sched/scheduler.py`): running requests
first in order of admission, then waiting ones first come first served, within a budget of
tokens, sequences and KV blocks; prompts are chunked; when blocks run out the last admitted
request is preempted and recomputed. Scheduling is asynchronous: a step is scheduled when its
predecessor starts, so arrivals and freed slots take effect one step later.

Work is done per event (a request joins, ends, crosses its sliding window, is preempted), never per
sequence and step:

- Every decoding sequence gains one token a step, so its context is `offset + step` with a constant
  offset, and the sums over the batch follow from sums over the offsets.
- While nothing happens, the costs of steps form an arithmetic series: k steps are taken at once.
- A sequence's joules are differences of running sums between its first and last step.
- Sequences wait for their last step in a heap; how many need a new KV block in a step, or give one
  back that their window left behind, depends on the offset modulo the block size alone, so counts
  of the residues tell. In vLLM a sequence gives back as its turn comes, here all do so first.

The token budget is at least the batch limit (`simulator.simulate` checks), so that every decoding
sequence runs in every step, and at most one prompt, the last admitted, is unfinished.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from energymodel.compiled import compiled
from energymodel.costs import CostTables
from energymodel.kv_cache import asked_blocks, held_blocks, left_behind
from energymodel.requests_in_flight import (
    ABANDONED,
    CACHED,
    CHUNK,
    COMPUTED,
    FIRST,
    GENERATED,
    INPUT,
    JOULES,
    OUTPUT,
    SERVED,
    STUCK,
    idle_until,
    note_done,
    occupy,
    steps_until,
)
from energymodel.step_costs import (
    CLOCK,
    DECODE,
    DECODE_ATTENTION,
    HOST_BOUND,
    LONGEST_THROTTLED_JUMP,
    NOW,
    PREEMPT,
    PREFILL,
    PREFILL_ATTENTION,
    SECONDS,
    TOTALS,
    account,
    between,
    pairs,
    step_cost,
    told_late,
)
from energymodel.step_heaps import SLOTS, drop, pop, push

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# columns of Replica.slot_ints and slot_floats behind those of `requests_in_flight`
_OFFSET, _ENDS, _ORDER = range(7, 10)
_BY_SEQUENCE0, _BY_CONTEXT0, _BY_STEP0 = range(3, 6)
# Replica.counts
(
    _DECODING,
    _PARTIAL,
    _FREE_BLOCKS,
    _LATE_SLOTS,
    _LATE_BLOCKS,
    _PREEMPTED,
    _STEP,
    _OFFSETS,
    _BELOW,
    _BELOW_OFFSETS,
    _WINDOWED,
    _FREE_SLOTS,
    _ADMITTED,
) = range(13)
# Replica.clocks
_CUTOFF, _BY_SEQUENCE, _BY_CONTEXT, _BY_STEP = range(4)


class Replica(NamedTuple):
    """What one replica remembers between two calls of `advance`. Slots hold requests in flight."""

    totals: Array
    counts: Ints
    clocks: Array
    slot_ints: Ints
    slot_floats: Array
    ending: Ints
    """Heap of decoding sequences by the step in which they end."""
    windowed: Ints
    """Heap of those that fill their sliding window before that, by the step."""
    residues: Ints
    """Decoding sequences by the step, modulo the block size, in which they need a new block."""
    leaving: Ints
    """Those that have filled their window, by the step in which it leaves a block behind."""
    preempted: Ints
    """Stack of slots."""
    free_slots: Ints
    """Stack of slots."""
    chunked: Ints
    """Slots with a piece of prompt in the present step."""


def new_replica(costs: CostTables) -> Replica:
    """An idle replica at time 0."""
    max_batch, kv = costs.scheduler.max_batch, costs.scheduler.kv
    counts = np.zeros(13, np.int64)
    counts[_PARTIAL] = -1
    counts[_FREE_BLOCKS] = kv.blocks
    counts[_FREE_SLOTS] = max_batch
    return Replica(
        totals=np.zeros(len(TOTALS)),
        counts=counts,
        clocks=np.zeros(4),
        slot_ints=np.zeros((max_batch, 10), np.int64),
        slot_floats=np.zeros((max_batch, 6)),
        ending=np.zeros(max_batch, np.int64),
        windowed=np.zeros(max_batch, np.int64),
        residues=np.zeros(kv.block_tokens, np.int64),
        leaving=np.zeros(kv.block_tokens, np.int64),
        preempted=np.zeros(max_batch, np.int64),
        free_slots=np.arange(max_batch, dtype=np.int64)[::-1].copy(),
        chunked=np.zeros(max_batch, np.int64),
    )


@compiled
def _new_blocks(decoding, filled, residues, leaving, step, k, kv):  # type: ignore[no-untyped-def]
    """KV blocks that decoding sequences take, less those given back, in k - 1 steps after `step`.

    filled : sequences that have filled their window
    """
    groups = kv.full_groups + kv.window_groups
    rounds = (k - 1) // kv.block_tokens
    needed = rounds * (groups * decoding - kv.window_groups * filled)
    for i in range(step + 1 + rounds * kv.block_tokens, step + k):
        at = i % kv.block_tokens
        needed += groups * residues[at] - kv.window_groups * leaving[at]
    return needed


@compiled
def _steps_within(  # type: ignore[no-untyped-def]
    free, wanted, decoding, residues, leaving, step, longest, kv
):
    """Steps, at most `longest`, that the free blocks allow; those of the first are taken.

    Where somebody waits for `wanted` blocks, no step after the first has as many.
    """
    groups = kv.full_groups + kv.window_groups
    waits = wanted > 0 and kv.window_groups > 0  # else free blocks only get fewer
    if not waits and ((longest - 1) // kv.block_tokens + 1) * groups * decoding <= free:
        return longest
    left = free
    for steps in range(1, longest):
        at = (step + steps) % kv.block_tokens
        left -= groups * residues[at] - kv.window_groups * leaving[at]
        if left < 0 or (waits and left >= wanted):
            return steps
    return longest


@compiled
def advance(  # type: ignore[no-untyped-def]
    replica,
    sums,
    requests,
    first_id,
    no_more,
    tables,
    host,
    limits,
    scheduler,
    jump,
    patience,
    done,
):
    """Serve requests until they run out, or until more must be known about later ones.

    Parameters
    ----------
    replica, sums : changed in place
    requests : arrival [s], input, output and cached prompt tokens, each (n,), in order of arrival
    first_id : number of requests[0]
    no_more : these are the last requests. Otherwise at most a batch of them is left over, to be
        handed in again before the next ones
    tables, host, limits, scheduler : of `costs.CostTables`
    jump : take many steps at once where they are alike
    patience : give up once a request has waited this long for admission [s]
    done : room for the requests and a batch more

    Returns
    -------
    Requests admitted, requests done, and one of SERVED, STUCK, ABANDONED.
    """
    arrival, inputs, _, cached = requests
    max_batch, budget_tokens, window, tile, kv = scheduler
    block, groups = kv.block_tokens, kv.full_groups + kv.window_groups
    totals, counts, clocks = replica.totals, replica.counts, replica.clocks
    ints, floats = replica.slot_ints, replica.slot_floats
    ending, windowed = replica.ending, replica.windowed
    residues, leaving = replica.residues, replica.leaving
    preempted, free_slots, chunked = replica.preempted, replica.free_slots, replica.chunked
    n = arrival.shape[0]
    head = 0
    n_done = 0
    status = SERVED
    decoding, partial, free = counts[_DECODING], counts[_PARTIAL], counts[_FREE_BLOCKS]
    late_slots, late_blocks = counts[_LATE_SLOTS], counts[_LATE_BLOCKS]
    n_preempted, step, offsets = counts[_PREEMPTED], counts[_STEP], counts[_OFFSETS]
    below, below_offsets = counts[_BELOW], counts[_BELOW_OFFSETS]
    n_windowed, n_free, admitted = counts[_WINDOWED], counts[_FREE_SLOTS], counts[_ADMITTED]
    cutoff, by_sequence = clocks[_CUTOFF], clocks[_BY_SEQUENCE]
    by_context, by_step = clocks[_BY_CONTEXT], clocks[_BY_STEP]
    while True:
        if not no_more and n - head <= max_batch:
            break
        starting = decoding == 0 and partial < 0
        if starting:  # nothing in flight: the schedule happens now
            free += late_blocks
            late_slots = late_blocks = 0
            if n_preempted == 0:
                if head >= n:
                    break
                idle_until(arrival[head], totals)
            cutoff = totals[NOW]
        if head < n and cutoff - arrival[head] > patience:
            status = ABANDONED
            break
        # --- blocks that windows have left behind, and sequences that fill their window now
        free += kv.window_groups * leaving[step % block]
        while n_windowed > 0 and windowed[0] // SLOTS <= step:
            offset = ints[windowed[0] % SLOTS, _OFFSET]
            below -= 1
            below_offsets -= offset
            leaving[(window - 1 - offset) % block] += 1
            pop(windowed, n_windowed)
            n_windowed -= 1
        # --- schedule: running requests first
        needed = groups * residues[step % block]
        chunk = 0
        held = 0
        if partial >= 0:
            computed = ints[partial, COMPUTED]
            known = ints[partial, INPUT] + ints[partial, GENERATED]
            free += left_behind(computed, kv) - left_behind(computed - ints[partial, CHUNK], kv)
            chunk = min(known - computed, budget_tokens - decoding)
            held = held_blocks(computed, computed, kv)
            needed += held_blocks(computed, computed + chunk, kv) - held
        any_preempted = needed > free
        while needed > free:  # the last admitted gives way
            if partial >= 0:
                victim = partial
                computed = ints[victim, COMPUTED]
                needed -= held_blocks(computed, computed + chunk, kv) - held
                partial = -1
                chunk = 0
            else:
                victim = ending[0] % SLOTS
                for i in range(1, decoding):
                    slot = ending[i] % SLOTS
                    if ints[slot, _ORDER] > ints[victim, _ORDER]:
                        victim = slot
                drop(ending, decoding, victim)
                decoding -= 1
                offset = ints[victim, _OFFSET]
                computed = offset + step
                held = held_blocks(computed, computed, kv)
                offsets -= offset
                residues[-offset % block] -= 1
                if -offset % block == step % block:
                    needed -= groups
                if window > 0 and computed + 1 < window:
                    below -= 1
                    below_offsets -= offset
                    n_windowed = drop(windowed, n_windowed, victim)
                elif window > 0:
                    leaving[(window - 1 - offset) % block] -= 1
                ints[victim, GENERATED] = ints[victim, OUTPUT] - (ints[victim, _ENDS] - step)
                floats[victim, JOULES] += (
                    by_sequence
                    - floats[victim, _BY_SEQUENCE0]
                    + (offset + 1) * (by_context - floats[victim, _BY_CONTEXT0])
                    + by_step
                    - floats[victim, _BY_STEP0]
                )
            free += held
            preempted[n_preempted] = victim
            n_preempted += 1
            totals[PREEMPT] += 1
        free -= needed
        budget = budget_tokens - decoding - chunk
        n_chunked = 0
        if partial >= 0:
            ints[partial, CHUNK] = chunk
            chunked[0] = partial
            n_chunked = 1
        # --- then waiting ones
        if not any_preempted:
            while budget > 0 and decoding + n_chunked + late_slots < max_batch:
                if n_preempted > 0:
                    slot = preempted[n_preempted - 1]
                    known = ints[slot, INPUT] + ints[slot, GENERATED]
                    computed = ints[slot, CACHED]
                elif head < n and arrival[head] <= cutoff:
                    slot = -1
                    known = inputs[head]
                    computed = cached[head]
                else:
                    break
                chunk = min(known - computed, budget)
                if asked_blocks(known, computed, chunk, kv) > free:
                    break
                if slot >= 0:
                    n_preempted -= 1
                else:
                    n_free -= 1
                    slot = free_slots[n_free]
                    occupy(slot, requests, head, first_id + head, ints, floats)
                    head += 1
                free -= held_blocks(computed, computed + chunk, kv)
                budget -= chunk
                ints[slot, _ORDER] = admitted
                admitted += 1
                ints[slot, COMPUTED] = computed
                ints[slot, CHUNK] = chunk
                chunked[n_chunked] = slot
                n_chunked += 1
        free += late_blocks
        late_slots = late_blocks = 0
        running = decoding + n_chunked
        if running == 0:
            # nothing could run with what was known at the cutoff: look again now
            if cutoff < totals[NOW]:
                continue
            status = STUCK
            break
        # --- statistics of the step
        tokens = decoding
        prefills = 0
        decodes = decoding
        context = float(offsets + decoding * (step + 1))
        near = 0.0
        if window > 0:
            near = float(below_offsets + below * (step + 1) + (decoding - below) * window)
        full = 0.0
        cut = 0.0
        for i in range(n_chunked):
            slot = chunked[i]
            computed = ints[slot, COMPUTED]
            tokens += ints[slot, CHUNK]
            if ints[slot, CHUNK] == 1 and computed > 0:  # one token, as far as attention can tell
                decodes += 1
                context += computed + 1
                near += min(computed + 1, window)
            else:
                prefills += 1
                whole, windowed_pairs = pairs(
                    float(computed), float(ints[slot, CHUNK]), float(window), tile
                )
                full += whole
                cut += windowed_pairs
        att = (context, near, full, cut)
        first = step_cost(tokens, running, att, prefills, decodes, starting, tables, host, limits)
        last = first
        att_last = att
        # --- how many steps like this one can be taken at once
        k = 1
        arrives = False
        if jump and n_chunked == 0 and not any_preempted:
            k = ending[0] // SLOTS - step
            if n_windowed > 0:
                k = min(k, windowed[0] // SLOTS - step)
            wanted = 0  # blocks that somebody waits for
            if running < max_batch:
                # where none are given back, who waits for blocks waits for a sequence to end
                if n_preempted > 0:
                    slot = preempted[n_preempted - 1]
                    known = ints[slot, INPUT] + ints[slot, GENERATED]
                    computed = ints[slot, CACHED]
                    chunk = min(known - computed, budget)
                    wanted = asked_blocks(known, computed, chunk, kv)
                    if wanted <= free:
                        k = 1
                elif head < n:
                    chunk = min(inputs[head] - cached[head], budget)
                    wanted = asked_blocks(inputs[head], cached[head], chunk, kv)
                    if wanted <= free:
                        arrives = arrival[head] > cutoff
                        if not arrives:
                            k = 1
                        wanted = 0
            if k > 1:
                k = _steps_within(free, wanted, decoding, residues, leaving, step, k, kv)
        while k > 1:
            att_last = (context + (k - 1) * decoding, near + (k - 1) * below, 0.0, 0.0)
            last = step_cost(tokens, running, att_last, 0, decodes, False, tables, host, limits)
            throttled = first[CLOCK] < 1.0 or last[CLOCK] < 1.0
            if throttled and k > LONGEST_THROTTLED_JUMP:
                k = LONGEST_THROTTLED_JUMP
                continue
            if first[HOST_BOUND] != last[HOST_BOUND]:
                k = k // 2
                continue
            if arrives:
                # the last step of the jump is the first that starts after the next arrival
                wanted = arrival[head] - totals[NOW]
                until = 1 + steps_until(wanted, first[SECONDS], last[SECONDS], k)
                if until < k:
                    if throttled:
                        k = until
                        continue
                    last = between(first, last, (until - 1) / (k - 1))
                    k = until
                    att_last = (context + (k - 1) * decoding, near + (k - 1) * below, 0.0, 0.0)
            break
        if k == 1:
            last = first
            att_last = att
        # --- run them
        start = totals[NOW]
        account(k, first, last, att, att_last, prefills, decodes, sums, totals)
        end = totals[NOW]
        cutoff = start + 0.5 * k * (first[SECONDS] + last[SECONDS]) - last[SECONDS]
        if k > 1:
            filled = decoding - below if window > 0 else 0
            free -= _new_blocks(decoding, filled, residues, leaving, step, k, kv)
        each = 0.0
        per_context = 0.0
        if decodes > 0:
            each = 0.5 * k * (first[DECODE] + last[DECODE]) / decodes
            per_context = (
                k * (first[DECODE_ATTENTION] + last[DECODE_ATTENTION]) / (att[0] + att_last[0])
            )
            by_sequence += each
            by_context += per_context
            by_step += per_context * (step + 0.5 * (k - 1))
        step += k
        # --- prompts
        before = n_done
        partial = -1
        for i in range(n_chunked):
            slot = chunked[i]
            chunk = ints[slot, CHUNK]
            computed = ints[slot, COMPUTED]
            if chunk == 1 and computed > 0:
                floats[slot, JOULES] += each + per_context * (computed + 1)
            else:
                whole, _ = pairs(float(computed), float(chunk), float(window), tile)
                floats[slot, JOULES] += first[PREFILL] / (tokens - decodes) * chunk
                floats[slot, JOULES] += first[PREFILL_ATTENTION] / max(full, 1.0) * whole
            computed += chunk
            if computed < ints[slot, INPUT] + ints[slot, GENERATED]:
                ints[slot, COMPUTED] = computed
                partial = slot
                continue
            generated = ints[slot, GENERATED] + 1
            if generated == 1:
                floats[slot, FIRST] = end
            if generated >= ints[slot, OUTPUT]:
                note_done(done, n_done, slot, end, floats[slot, JOULES], ints, floats)
                n_done += 1
                late_slots += 1
                late_blocks += held_blocks(computed - chunk, computed, kv)
                free_slots[n_free] = slot
                n_free += 1
                continue
            offset = computed - step
            ends = step + ints[slot, OUTPUT] - generated
            ints[slot, _OFFSET] = offset
            ints[slot, _ENDS] = ends
            floats[slot, _BY_SEQUENCE0] = by_sequence
            floats[slot, _BY_CONTEXT0] = by_context
            floats[slot, _BY_STEP0] = by_step
            push(ending, decoding, ends * SLOTS + slot)
            decoding += 1
            offsets += offset
            residues[-offset % block] += 1
            if window > 0 and computed < window:
                below += 1
                below_offsets += offset
                fills = window - 1 - offset
                if fills < ends:
                    push(windowed, n_windowed, fills * SLOTS + slot)
                    n_windowed += 1
            elif window > 0:  # from the next step on, `leaving` tells what it gives back
                leaving[(window - 1 - offset) % block] += 1
                free += left_behind(computed - 1, kv) - left_behind(computed - chunk, kv)
        # --- sequences that end
        while decoding > 0 and ending[0] // SLOTS <= step:
            slot = ending[0] % SLOTS
            pop(ending, decoding)
            decoding -= 1
            offset = ints[slot, _OFFSET]
            offsets -= offset
            residues[-offset % block] -= 1
            if window > 0 and window - 1 - offset >= step:  # it never filled its window
                below -= 1
                below_offsets -= offset
            elif window > 0:
                leaving[(window - 1 - offset) % block] -= 1
            joules = (
                floats[slot, JOULES]
                + by_sequence
                - floats[slot, _BY_SEQUENCE0]
                + (offset + 1) * (by_context - floats[slot, _BY_CONTEXT0])
                + by_step
                - floats[slot, _BY_STEP0]
            )
            note_done(done, n_done, slot, end, joules, ints, floats)
            n_done += 1
            late_slots += 1
            late_blocks += held_blocks(offset + step - 1, offset + step, kv)
            free_slots[n_free] = slot
            n_free += 1
        # --- first tokens of those that go on
        ended = n_done - before
        if n_chunked > 0 and decoding > 0:
            late = told_late(
                first, tokens, running, running - ended, prefills, starting, tables[4], host
            )
            for i in range(n_chunked):
                if floats[chunked[i], FIRST] == end:
                    floats[chunked[i], FIRST] += late
    counts[_DECODING], counts[_PARTIAL], counts[_FREE_BLOCKS] = decoding, partial, free
    counts[_LATE_SLOTS], counts[_LATE_BLOCKS] = late_slots, late_blocks
    counts[_PREEMPTED], counts[_STEP], counts[_OFFSETS] = n_preempted, step, offsets
    counts[_BELOW], counts[_BELOW_OFFSETS] = below, below_offsets
    counts[_WINDOWED], counts[_FREE_SLOTS], counts[_ADMITTED] = n_windowed, n_free, admitted
    clocks[_CUTOFF], clocks[_BY_SEQUENCE] = cutoff, by_sequence
    clocks[_BY_CONTEXT], clocks[_BY_STEP] = by_context, by_step
    return head, n_done, status
