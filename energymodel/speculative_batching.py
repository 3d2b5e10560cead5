"""Continuous batching with a draft model, as vLLM 0.22 runs it, one replica, compiled.

A round drafts g tokens for each sequence and checks them. Read from vLLM 0.22
(`v1/spec_decode/llm_base_proposer.py`, `v1/core/sched/scheduler.py`, `config/vllm.py`):

- The served model runs g + 1 tokens of each decoding sequence (the drafts and the token before
  them) and the pieces of prompts; logits are computed for all of the first, and for one token of
  each piece.
- The draft model then runs g passes. The first one sees the same tokens and one more of each
  sequence, pieces of prompts included, so that it computes the prompts as well; the others see one
  token of each sequence. Each computes one row of logits a sequence. The host launches its kernels
  singly: measured rounds take four passes as long as eager steps of the draft model do.
- Scheduling is synchronous: the next round is scheduled when the drafts of the last are known.
  Arrivals and freed slots take effect in the next round.
- A block of KV cache holds its tokens for both models. A decoding sequence of c tokens holds
  blocks for c + 1 + 2 g: those checked, and those that will be proposed. `max_batch` tokens of the
  step's budget are kept for the draft model's additional ones.

A round gives a sequence E tokens on average (`acceptance.expected_tokens`), and here in every
round: its context grows by E, a real number, and an output of O tokens takes

    R = ceil((O - 1) / E)

rounds after the prompt. With c tokens in the cache, the check attends to c + g + 1 keys, the draft
model's first pass to c + g + 2, and its j-th one, j = 2 .. g, to c + E + j. A round takes

    max(GPU time of all passes, host time of all passes) + gaps + host time of the round

and the power limit holds on average over it. Contexts grow linearly, so many rounds are taken at
once while nothing happens, as in `continuous_batching`; sequences are few (a batch), and each event
passes over them.
"""

from __future__ import annotations

import numpy as np

from energymodel.compiled import compiled
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
    ROW_ROW,
    SECONDS,
    TOKEN_ROW,
    add_steps,
    count_passes,
    pairs,
    pass_parts,
    slowed,
    stage_joules,
    under_limit,
)

# fields of a round's cost beyond those of a step: rows of the draft model's tables
_FIRST_TOKENS, _FIRST_ROWS, _NEXT_TOKENS, _NEXT_ROWS = 13, 14, 15, 16

# columns of the slots' whole numbers behind those of `requests_in_flight`
(
    _ROUNDS,  # done since the sequence began to decode
    _LEFT,  # rounds to do; 0 for prompts
    _BLOCKS,
) = range(7, 10)
_TINY = 1e-9  # of a token: sums of real numbers that should be whole


@compiled
def round_cost(  # type: ignore[no-untyped-def]
    work, check, first, further, starting, tables, host, limits, draft_tokens
):
    """Cost of one round.

    work : decoding sequences, prompts, tokens of the prompts; check, first : attention statistics
    of the served model and of the draft model's first pass; further : those of its other passes,
    one pass's mean, and the share of the decoding sequences in them; tables : of the served model,
    the draft model's first pass, its further ones; host, limits : of `costs.CostTables`

    Returns the fields of `step_costs.step_cost`, then the rows of the draft model's tables: tokens
    and rows of logits of the first pass, and of the others.
    """
    decoding, prompts, prompt_tokens = work
    sequences = decoding + prompts
    queries = draft_tokens + 1
    others = draft_tokens - 1
    base, cap, exponent = limits[0], limits[1], limits[2]
    checked = queries * decoding
    tokens = checked + prompt_tokens
    rows = checked + prompts
    t, r, d, p, t_row, r_row, t_graph, _ = pass_parts(
        tokens, rows, check, prompts, decoding, tables[0]
    )
    first_tokens = tokens + sequences
    ft, fr, fd, fp, ft_row, fr_row, _, _ = pass_parts(
        first_tokens, sequences, first, prompts, decoding, tables[1]
    )
    nt, nr, nd, _, nt_row, nr_row, _, _ = pass_parts(
        sequences, sequences, further, 0, sequences, tables[2]
    )
    memory = t[0] + r[0] + d[0] + p[0] + ft[0] + fr[0] + fd[0] + fp[0]
    compute = t[1] + r[1] + d[1] + p[1] + ft[1] + fr[1] + fd[1] + fp[1]
    fixed = t[2] + r[2] + d[2] + p[2] + ft[2] + fr[2] + fd[2] + fp[2]
    core = t[3] + r[3] + d[3] + p[3] + ft[3] + fr[3] + fd[3] + fp[3]
    memory += others * (nt[0] + nr[0] + nd[0])
    compute += others * (nt[1] + nr[1] + nd[1])
    fixed += others * (nt[2] + nr[2] + nd[2])
    core += others * (nt[3] + nr[3] + nd[3])
    host_seconds = draft_tokens * host[8]
    if not t_graph:
        host_seconds += host[2] - host[0]
    elif prompts > 0:
        host_seconds += host[1] - host[0]
    gap = host[9] + (host[3] + host[10]) * sequences + host[7] * prompts
    gap += host[4] * (1 + draft_tokens)
    if starting:
        gap += host[6]
    x, g, gpu, stretched = under_limit(
        memory, compute, fixed, core, host_seconds, gap, base, cap, exponent
    )
    total = max(gpu, host_seconds) + gap

    rest = base * (total - gpu + stretched)
    by_token = (stage_joules(t, x, g, base, 1.0) + rest) / tokens
    by_row = stage_joules(r, x, g, base, 1.0) / rows
    by_first_token = stage_joules(ft, x, g, base, 1.0) / first_tokens
    by_sequence = stage_joules(fr, x, g, base, 1.0) / sequences
    by_sequence += (
        others * (stage_joules(nt, x, g, base, 1.0) + stage_joules(nr, x, g, base, 1.0)) / sequences
    )
    further_attention = others * stage_joules(nd, x, g, base, 1.0)
    of_decoding = further[4]
    return (
        total,
        gpu,
        x,
        g,
        (by_token + by_row) * checked
        + by_first_token * (checked + decoding)
        + by_sequence * decoding,
        stage_joules(d, x, g, base, 1.0)
        + stage_joules(fd, x, g, base, 1.0)
        + further_attention * of_decoding,
        by_token * prompt_tokens
        + by_row * prompts
        + by_first_token * (prompt_tokens + prompts)
        + by_sequence * prompts
        + further_attention * (1.0 - of_decoding),
        stage_joules(p, x, g, base, 1.0) + stage_joules(fp, x, g, base, 1.0),
        stretched,
        t_row,
        r_row,
        host_seconds > gpu,
        slowed(gpu, host_seconds, gap),
        ft_row,
        fr_row,
        nt_row,
        nr_row,
    )


@compiled
def _cut(tokens, window):  # type: ignore[no-untyped-def]
    return min(tokens, float(window)) if window > 0 else 0.0


@compiled
def _statistics(running, count, ints, ahead, per_round, draft_tokens, window, draft_window, tile):  # type: ignore[no-untyped-def]
    """Attention statistics of the round `ahead` rounds from now: (check, first, further)."""
    queries = draft_tokens + 1
    others = draft_tokens - 1
    keys = near = first_keys = first_near = 0.0
    next_keys = next_near = next_decoding = 0.0
    full = cut = draft_cut = 0.0
    for i in range(count):
        slot = running[i]
        chunk = ints[slot, CHUNK]
        if chunk == 0:
            held = ints[slot, COMPUTED] + per_round * (ints[slot, _ROUNDS] + ahead)
            keys += held + queries
            near += _cut(held + queries, window)
            first_keys += held + queries + 1
            first_near += _cut(held + queries + 1, draft_window)
            held += per_round
        else:
            start = float(ints[slot, COMPUTED])
            whole, windowed = pairs(start, float(chunk), float(window), tile)
            full += whole
            cut += windowed
            draft_cut += pairs(start, float(chunk), float(draft_window), tile)[1]
            held = start + chunk
        for j in range(2, draft_tokens + 1):
            next_keys += held + j
            next_near += _cut(held + j, draft_window)
            if chunk == 0:
                next_decoding += held + j
    share = next_decoding / next_keys if others > 0 else 1.0
    passes = max(others, 1)
    return (
        (keys, near, full, cut),
        (first_keys, first_near, full, draft_cut),
        (next_keys / passes, next_near / passes, 0.0, 0.0, share),
    )


@compiled
def _blocks(tokens, block):  # type: ignore[no-untyped-def]
    return int(np.ceil((tokens - _TINY) / block))


@compiled
def _new_blocks(running, count, ints, ahead, per_round, reserve, block):  # type: ignore[no-untyped-def]
    """KV blocks that decoding sequences need beyond those they hold, `ahead` rounds from now."""
    needed = 0
    for i in range(count):
        slot = running[i]
        held = ints[slot, COMPUTED] + per_round * (ints[slot, _ROUNDS] + ahead)
        needed += max(_blocks(held + reserve, block) - ints[slot, _BLOCKS], 0)
    return needed


@compiled
def _linear_rounds(running, count, ints, per_round, draft_tokens, window):  # type: ignore[no-untyped-def]
    """Rounds in which what a window cuts is linear: no sequence fills it."""
    rounds = 1 << 40
    for i in range(count):
        slot = running[i]
        held = ints[slot, COMPUTED] + per_round * ints[slot, _ROUNDS]
        if held + 1.0 >= window:
            continue
        longest = held + per_round + draft_tokens + 2.0
        rounds = min(rounds, max(1, int((window - longest) / per_round) + 1))
    return rounds


@compiled
def serve_with_drafts(  # type: ignore[no-untyped-def]
    requests, sums, tables, host, limits, scheduler, drafting, jump, patience, done, totals
):
    """Serve requests in order of arrival; returns how many ended, and SERVED, STUCK or ABANDONED.

    Parameters
    ----------
    requests : arrival [s], input, output and cached prompt tokens, each (n,)
    sums, tables : of the served model, the draft model's first pass, and its further ones
    host, limits, scheduler : of `costs.CostTables`
    drafting : draft tokens, tokens a round gives on average, the draft model's sliding window
    jump : take many rounds at once where they are alike
    patience : give up once a request has waited this long for admission [s]
    done : as of `continuous_batching.advance`; totals : changed in place
    """
    arrival, inputs, _, cached = requests
    max_batch, step_tokens, window, tile, kv = scheduler
    free, block = kv.blocks, kv.block_tokens
    draft_tokens, per_round, draft_window = drafting
    queries = draft_tokens + 1
    reserve = queries + draft_tokens
    n = arrival.shape[0]
    ints = np.zeros((max_batch, 10), np.int64)
    floats = np.zeros((max_batch, 3))
    running = np.zeros(max_batch, np.int64)  # slots in order of admission
    preempted = np.zeros(max_batch, np.int64)
    unused = np.arange(max_batch)
    head = count = n_preempted = n_done = 0
    n_unused = max_batch
    while True:
        starting = count == 0
        if starting and n_preempted == 0:
            if head >= n:
                return n_done, SERVED
            idle_until(arrival[head], totals)
        if head < n and totals[NOW] - arrival[head] > patience:
            return n_done, ABANDONED
        # --- schedule: running requests first
        budget = step_tokens - max_batch
        any_preempted = False
        i = 0
        while i < count:
            slot = running[i]
            if ints[slot, _LEFT] > 0:
                chunk = 0
                tokens = queries
                held = ints[slot, COMPUTED] + per_round * ints[slot, _ROUNDS]
                wanted = _blocks(held + reserve, block)
            else:
                known = ints[slot, INPUT] + ints[slot, GENERATED]
                chunk = tokens = min(known - ints[slot, COMPUTED], budget)
                wanted = _blocks(ints[slot, COMPUTED] + chunk + draft_tokens, block)
            needed = max(wanted - ints[slot, _BLOCKS], 0)
            while needed > free and i < count:  # the last admitted gives way
                count -= 1
                victim = running[count]
                free += ints[victim, _BLOCKS]
                ints[victim, _BLOCKS] = 0
                if ints[victim, _LEFT] > 0:
                    made = ints[victim, GENERATED] + per_round * ints[victim, _ROUNDS]
                    whole_tokens = min(int(made + _TINY), ints[victim, OUTPUT] - 1)
                    ints[victim, GENERATED] = whole_tokens
                    ints[victim, _LEFT] = 0
                preempted[n_preempted] = victim
                n_preempted += 1
                totals[PREEMPT] += 1
                any_preempted = True
            if i >= count:
                break
            free -= needed
            ints[slot, _BLOCKS] += needed
            ints[slot, CHUNK] = chunk
            budget -= tokens
            i += 1
        # --- then waiting ones
        while not any_preempted and budget > 0 and count < max_batch:
            if n_preempted > 0:
                slot = preempted[n_preempted - 1]
                known = ints[slot, INPUT] + ints[slot, GENERATED]
                computed = ints[slot, CACHED]
            elif head < n and arrival[head] <= totals[NOW]:
                slot = -1
                known = inputs[head]
                computed = cached[head]
            else:
                break
            chunk = min(known - computed, budget)
            ahead = draft_tokens if computed > 0 else 0
            wanted = _blocks(computed + chunk + ahead, block)
            if max(wanted, _blocks(known, block)) > free:
                break
            if slot >= 0:
                n_preempted -= 1
            else:
                n_unused -= 1
                slot = unused[n_unused]
                occupy(slot, requests, head, head, ints, floats)
                head += 1
            free -= wanted
            budget -= chunk
            ints[slot, COMPUTED] = computed
            ints[slot, CHUNK] = chunk
            ints[slot, _LEFT] = 0
            ints[slot, _BLOCKS] = wanted
            running[count] = slot
            count += 1
        if count == 0:
            return n_done, STUCK
        # --- the round
        decoding = prompts = prompt_tokens = 0
        k = 1 << 40
        for i in range(count):
            slot = running[i]
            if ints[slot, _LEFT] > 0:
                decoding += 1
                k = min(k, ints[slot, _LEFT])
            else:
                prompts += 1
                prompt_tokens += ints[slot, CHUNK]
        work = (decoding, prompts, prompt_tokens)
        shape = (per_round, draft_tokens, window, draft_window, tile)
        check, first_att, further = _statistics(running, count, ints, 0, *shape)
        first = round_cost(
            work, check, first_att, further, starting, tables, host, limits, draft_tokens
        )
        # --- how many rounds like this one can be taken at once
        arrives = False
        if not jump or prompts > 0 or any_preempted:
            k = 1
        else:
            if n_preempted == 0 and head < n and count < max_batch:
                # who waits for blocks waits for a sequence to end: free blocks only get fewer
                arrives = arrival[head] > totals[NOW] and _blocks(inputs[head], block) <= free
            for limit in (window, draft_window):
                if limit > 0:
                    within = _linear_rounds(running, count, ints, per_round, draft_tokens, limit)
                    k = min(k, within)
            low, high = 1, k
            while low < high:  # the most rounds whose blocks are free
                middle = (low + high + 1) // 2
                taken = _new_blocks(running, count, ints, middle - 1, per_round, reserve, block)
                if taken <= free:
                    low = middle
                else:
                    high = middle - 1
            k = low
        last, check_last, first_last, further_last = first, check, first_att, further
        while k > 1:
            check_last, first_last, further_last = _statistics(running, count, ints, k - 1, *shape)
            last = round_cost(
                work, check_last, first_last, further_last, False, tables, host, limits,
                draft_tokens,
            )  # fmt: skip
            throttled = first[CLOCK] < 1.0 or last[CLOCK] < 1.0
            if throttled and k > LONGEST_THROTTLED_JUMP:
                k = LONGEST_THROTTLED_JUMP
                continue
            if first[HOST_BOUND] != last[HOST_BOUND]:
                k = k // 2
                continue
            if arrives:
                wanted_seconds = arrival[head] - totals[NOW]
                until = steps_until(wanted_seconds, first[SECONDS], last[SECONDS], k)
                if until < k:
                    k = until
                    continue
            break
        if k == 1:
            last, check_last, first_last, further_last = first, check, first_att, further
        # --- run them
        rows = first[TOKEN_ROW], first[ROW_ROW], 1.0
        count_passes(k, 1.0, first, last, rows, check, check_last, prompts, decoding, sums[0])
        rows = first[_FIRST_TOKENS], first[_FIRST_ROWS], 1.0
        count_passes(k, 1.0, first, last, rows, first_att, first_last, prompts, decoding, sums[1])
        if draft_tokens > 1:
            rows = first[_NEXT_TOKENS], first[_NEXT_ROWS], 1.0
            others = float(draft_tokens - 1)
            count_passes(k, others, first, last, rows, further, further_last, 0, count, sums[2])
        add_steps(k, first, last, sums[0][4], sums[0][5], totals)
        each = per_key = 0.0
        if decoding > 0:
            each = 0.5 * k * (first[DECODE] + last[DECODE]) / decoding
            per_key = k * (first[DECODE_ATTENTION] + last[DECODE_ATTENTION])
            per_key /= check[0] + check_last[0]
        kept = 0
        for i in range(count):
            slot = running[i]
            chunk = ints[slot, CHUNK]
            ended = False
            if ints[slot, _LEFT] > 0:
                middle_round = ints[slot, _ROUNDS] + 0.5 * (k - 1)
                keys = ints[slot, COMPUTED] + per_round * middle_round + queries
                floats[slot, JOULES] += each + per_key * keys
                ints[slot, _ROUNDS] += k
                ints[slot, _LEFT] -= k
                held = ints[slot, COMPUTED] + per_round * (ints[slot, _ROUNDS] - 1)
                wanted = max(_blocks(held + reserve, block), ints[slot, _BLOCKS])
                free -= wanted - ints[slot, _BLOCKS]
                ints[slot, _BLOCKS] = wanted
                ended = ints[slot, _LEFT] == 0
            else:
                whole, _ = pairs(float(ints[slot, COMPUTED]), float(chunk), float(window), tile)
                floats[slot, JOULES] += first[PREFILL] / prompt_tokens * chunk
                floats[slot, JOULES] += first[PREFILL_ATTENTION] / max(check[2], 1.0) * whole
                ints[slot, COMPUTED] += chunk
                if ints[slot, COMPUTED] == ints[slot, INPUT] + ints[slot, GENERATED]:
                    ints[slot, GENERATED] += 1
                    if ints[slot, GENERATED] == 1:
                        floats[slot, FIRST] = totals[NOW]
                    left = ints[slot, OUTPUT] - ints[slot, GENERATED]
                    ints[slot, CHUNK] = 0
                    ints[slot, _ROUNDS] = 0
                    ints[slot, _LEFT] = int(np.ceil(left / per_round - _TINY))
                    ended = left == 0
            if ended:
                note_done(done, n_done, slot, totals[NOW], floats[slot, JOULES], ints, floats)
                n_done += 1
                free += ints[slot, _BLOCKS]
                unused[n_unused] = slot
                n_unused += 1
            else:
                running[kept] = slot
                kept += 1
        count = kept
