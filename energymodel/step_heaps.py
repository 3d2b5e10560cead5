"""Heaps of slots by the step in which something happens to them, compiled.

A heap is an array of keys and its number of keys, which the caller keeps; a key is
step x SLOTS + slot.
"""

from __future__ import annotations

from energymodel.compiled import compiled

SLOTS = 1 << 20
MOST_SLOTS = SLOTS - 1


@compiled
def push(heap, size, key):  # type: ignore[no-untyped-def]
    """Add a key to a heap of `size` keys."""
    child = size
    while child > 0:
        parent = (child - 1) >> 1
        if heap[parent] <= key:
            break
        heap[child] = heap[parent]
        child = parent
    heap[child] = key


@compiled
def pop(heap, size):  # type: ignore[no-untyped-def]
    """Drop the smallest key of a heap of `size` keys."""
    key = heap[size - 1]
    parent = 0
    while True:
        child = 2 * parent + 1
        if child >= size - 1:
            break
        if child + 1 < size - 1 and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= key:
            break
        heap[parent] = heap[child]
        parent = child
    heap[parent] = key


@compiled
def drop(heap, size, slot):  # type: ignore[no-untyped-def]
    """Take the key of a slot out of a heap; returns the new size."""
    kept = 0
    for i in range(size):
        key = heap[i]
        if key % SLOTS != slot:
            push(heap, kept, key)
            kept += 1
    return kept
