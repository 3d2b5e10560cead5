"""Static batches, compiled: padded to the longest prompt and output, one after another.

A batch takes the requests that have arrived, in order, up to the most sequences allowed and to what
the KV cache holds when all are padded to the longest. With beam search each request is as many
sequences as there are beams, its prompt included: `generate` expands its inputs before it computes
them.

A static cache (`whole_cache`) is as long as the longest batch so far needs: I + O - 1 tokens. Every
decode step attends to all of it.
"""

from __future__ import annotations

import numpy as np

from energymodel.compiled import compiled
from energymodel.step_costs import (
    DEC_J,
    HOST_BOUND,
    IDLE,
    LONGEST_THROTTLED_JUMP,
    NOW,
    PRE_J,
    account,
    pairs,
    step_cost,
)


@compiled
def serve_static_batches(  # type: ignore[no-untyped-def]
    arrival, inputs, outputs, beams, whole_cache, prompt_tables, tables, host, limits, scheduler,
    prompt_sums, sums, totals
):  # fmt: skip
    """Serve requests in order of arrival; returns first token s, finish s and J by request.

    prompt_tables, prompt_sums : costs and counts of the steps that compute prompts; `tables` and
    `sums` of those that decode
    """
    max_batch, _, window, tile, kv = scheduler
    kv_tokens = kv.blocks * kv.block_tokens
    cache = 0
    n = arrival.shape[0]
    first_token = np.zeros(n)
    finish = np.zeros(n)
    request_joules = np.zeros(n)
    start = 0
    while start < n:
        if arrival[start] > totals[NOW]:
            totals[IDLE] += arrival[start] - totals[NOW]
            totals[NOW] = arrival[start]
        stop = start
        longest_input = 0
        longest_output = 0
        while stop < n and stop - start < max_batch and arrival[stop] <= totals[NOW]:
            padded_input = max(longest_input, inputs[stop])
            padded_output = max(longest_output, outputs[stop])
            padded = beams * (padded_input + padded_output)
            if stop > start and (stop - start + 1) * padded > kv_tokens:
                break  # the padded batch would not fit the KV cache
            longest_input, longest_output = padded_input, padded_output
            stop += 1
        batch = (stop - start) * beams
        cache = max(cache, longest_input + longest_output - 1)
        before = totals[PRE_J] + totals[DEC_J]
        full, cut = pairs(0.0, float(longest_input), float(window), tile)
        att = (0.0, 0.0, full * batch, cut * batch)
        first = step_cost(
            batch * longest_input, batch, att, batch, 0, True, prompt_tables, host, limits
        )
        account(1, first, first, att, att, batch, 0, prompt_sums, totals)
        for r in range(start, stop):
            first_token[r] = totals[NOW]
            if outputs[r] == 1:
                finish[r] = totals[NOW]
        done = 1
        while done < longest_output:
            context = longest_input + done
            k = min(longest_output - done, LONGEST_THROTTLED_JUMP)
            for r in range(start, stop):  # a sequence ends with its own step
                if outputs[r] > done:
                    k = min(k, outputs[r] - done)
            if window > 0 and context < window:
                k = min(k, window - context)
            while True:
                seen, last_seen = context, context + k - 1
                if whole_cache:
                    seen = last_seen = cache
                near = float(batch * min(seen, window)) if window > 0 else 0.0
                far = float(batch * min(last_seen, window)) if window > 0 else 0.0
                att = (float(batch * seen), near, 0.0, 0.0)
                att_last = (float(batch * last_seen), far, 0.0, 0.0)
                first = step_cost(batch, batch, att, 0, batch, False, tables, host, limits)
                last = step_cost(batch, batch, att_last, 0, batch, False, tables, host, limits)
                if k > 1 and first[HOST_BOUND] != last[HOST_BOUND]:
                    k = k // 2
                    continue
                break
            account(k, first, last, att, att_last, 0, batch, sums, totals)
            done += k
            for r in range(start, stop):
                if outputs[r] <= done and finish[r] == 0.0:
                    finish[r] = totals[NOW]
        joules = totals[PRE_J] + totals[DEC_J] - before
        weight = 0.0
        for r in range(start, stop):
            if finish[r] == 0.0:
                finish[r] = totals[NOW]
            weight += inputs[r] + outputs[r]
        for r in range(start, stop):
            request_joules[r] = joules * (inputs[r] + outputs[r]) / weight
        start = stop
    return first_token, finish, request_joules
