"""What the schedulers with continuous batching do alike with a request, compiled.

A request waits, takes a slot when it is admitted, and leaves it when its last token is out. A slot
is a row of whole numbers and one of real numbers; both schedulers keep the columns below, and add
their own behind them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from energymodel.compiled import compiled
from energymodel.step_costs import IDLE, NOW

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

# how serving ended
SERVED, STUCK, ABANDONED = 0, 1, 2

# columns of the slots' whole numbers
(
    ID,
    INPUT,
    OUTPUT,
    CACHED,
    GENERATED,  # tokens put out when the sequence began to decode, or was preempted
    COMPUTED,  # tokens in the cache then; of prompts, those computed so far
    CHUNK,  # tokens of the prompt in this step
) = range(7)
# columns of the slots' real numbers
ARRIVAL, FIRST, JOULES = range(3)


class Done(NamedTuple):
    """Requests that ended, in order of ending."""

    ids: Ints
    """(m, 3) number of the request in order of arrival, input tokens, output tokens."""
    times: Array
    """(m, 4) arrival, first token and last token [s], active energy [J]."""


def new_done(size: int) -> Done:
    """Room for `size` requests that end."""
    return Done(ids=np.empty((size, 3), np.int64), times=np.empty((size, 4)))


@compiled
def idle_until(arrival_seconds, totals):  # type: ignore[no-untyped-def]
    """Let time pass until a request arrives, if it has not."""
    if arrival_seconds > totals[NOW]:
        totals[IDLE] += arrival_seconds - totals[NOW]
        totals[NOW] = arrival_seconds


@compiled
def occupy(slot, requests, head, number, ints, floats):  # type: ignore[no-untyped-def]
    """Give a free slot to requests[head], whose number is `number`.

    requests : arrival [s], input, output and cached prompt tokens, each (n,)
    """
    arrival, inputs, outputs, cached = requests
    ints[slot, ID] = number
    ints[slot, INPUT] = inputs[head]
    ints[slot, OUTPUT] = outputs[head]
    ints[slot, CACHED] = cached[head]
    ints[slot, GENERATED] = 0
    floats[slot, ARRIVAL] = arrival[head]
    floats[slot, JOULES] = 0.0


@compiled
def note_done(done, n_done, slot, end, joules, ints, floats):  # type: ignore[no-untyped-def]
    """Note that the request of a slot ended at `end` [s], having taken `joules`."""
    done.ids[n_done, 0] = ints[slot, ID]
    done.ids[n_done, 1] = ints[slot, INPUT]
    done.ids[n_done, 2] = ints[slot, OUTPUT]
    done.times[n_done, 0] = floats[slot, ARRIVAL]
    done.times[n_done, 1] = floats[slot, FIRST]
    done.times[n_done, 2] = end
    done.times[n_done, 3] = joules


@compiled
def steps_until(wanted, first, last, k):  # type: ignore[no-untyped-def]
    """Steps until `wanted` seconds have passed, of k that take `first` to `last` seconds."""
    if wanted <= 0.0:
        return 0
    slope = (last - first) / (k - 1)
    if slope > 1e-15 * first:
        b = first - 0.5 * slope
        root = (np.sqrt(b * b + 2.0 * slope * wanted) - b) / slope
    else:
        root = wanted / first
    return int(np.ceil(root - 1e-9)) if root < k else k
