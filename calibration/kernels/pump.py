"""Keeps the GPU busy and times what it does: CUDA graphs, bounded queues, events.

A `Work` is one kernel call; `graphed` turns many calls of it, rotating over its buffers,
into one CUDA graph of about 10 ms; a `Pump` keeps a few launches in flight while the meter
waits for its ticks, and tells how long an iteration took. Torch is imported inside.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LAUNCH_SECONDS = 0.010
"""Aim for the length of one launch: long enough to leave the host free, short at the edges."""
_EAGER_SECONDS = 0.003  # the host is in the launch all this time and cannot watch the counter
_MOST_ITERATIONS = 4000
_PROBE_ITERATIONS = 16
_MOST_WARM_CALLS = 8
_QUEUE_DEPTH = 3
_NAP_SECONDS = 2e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A kernel ready to be called."""

    call: Callable[[int], Any]
    """Enqueues iteration i; buffers are chosen by i modulo `rotation`."""
    rotation: int = 1
    """Sets of buffers, so that data meant to come from HBM is not in L2."""
    backend: str = "torch"
    """Whose kernel it is (`torch`, `vllm`, `vllm-fa3`)."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only the launcher knows: tile sizes, distinct experts, versions."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """Work per iteration that replaces the case's estimate (`hbm_bytes`, `executed_flops`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launchable:
    """What the pump launches."""

    launch: Callable[[], Any]
    iterations: int
    """Iterations of the work in one launch."""
    graph: bool


class HostEvent:
    """Stand-in for a CUDA event where work is synchronous (CPU)."""

    def __init__(self) -> None:
        self._seconds = math.nan

    def record(self) -> None:
        """Note the time."""
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """Everything before it is done: the work is synchronous."""
        return True

    def elapsed_time(self, later: HostEvent) -> float:
        """Time until `later` [ms], as torch's events give it."""
        return (later._seconds - self._seconds) * 1e3


def new_event(device: str) -> Any:
    """Return a timing event of the device."""
    if not device.startswith("cuda"):
        return HostEvent()
    import torch  # noqa: PLC0415

    return torch.cuda.Event(enable_timing=True)


def synchronize(device: str) -> None:
    """Wait for the device; raises torch's error if its context is lost."""
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415

        torch.cuda.synchronize()


def _seconds_of(launch: Callable[[], Any], device: str) -> float:
    first, last = new_event(device), new_event(device)
    synchronize(device)
    first.record()
    launch()
    last.record()
    synchronize(device)
    return float(first.elapsed_time(last)) / 1e3


def eager(work: Work, device: str) -> Launchable:
    """Launch the work call by call, as many per launch as make about 3 ms."""

    def some(first: int, count: int) -> None:
        for i in range(first, first + count):
            work.call(i % work.rotation)

    some(0, min(work.rotation, _MOST_WARM_CALLS))
    some(0, 1)
    seconds = min(_seconds_of(lambda: some(0, 1), device) for _ in range(2))
    wanted = round(_EAGER_SECONDS / max(seconds, 1e-7))
    iterations = max(1, min(_MOST_ITERATIONS, wanted))
    state = {"next": 0}

    def launch() -> None:
        some(state["next"], iterations)
        state["next"] = (state["next"] + iterations) % work.rotation

    return Launchable(launch=launch, iterations=iterations, graph=False)


def graphed(work: Work) -> Launchable:
    """Capture calls of the work, rotating over its buffers, in one CUDA graph of about 10 ms.

    The calls are first made on a side stream (compilation, workspaces and autotuning must
    not happen while a graph is captured); nothing may synchronise inside the capture.
    """
    import torch  # noqa: PLC0415

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(max(2, min(work.rotation, _MOST_WARM_CALLS))):
            work.call(i % work.rotation)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    def capture(iterations: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(iterations):
                work.call(i % work.rotation)
        graph.replay()  # the first replay uploads the graph
        return graph

    probe_iterations = work.rotation * math.ceil(_PROBE_ITERATIONS / work.rotation)
    if work.rotation >= _PROBE_ITERATIONS:
        probe_iterations = min(work.rotation, _MOST_ITERATIONS)
    started = time.perf_counter()
    work.call(0)
    torch.cuda.synchronize()
    if time.perf_counter() - started > LAUNCH_SECONDS / 2:  # long kernels: no more than needed
        probe_iterations = min(work.rotation, 2)
    graph = capture(probe_iterations)
    seconds = _seconds_of(graph.replay, "cuda") / probe_iterations
    wanted = max(1, math.ceil(LAUNCH_SECONDS / max(seconds, 1e-7)))
    iterations = min(_MOST_ITERATIONS, work.rotation * math.ceil(wanted / work.rotation))
    if seconds * work.rotation > 3 * LAUNCH_SECONDS:  # one turn of the rotation is too long
        iterations = max(probe_iterations, wanted)
    if iterations > 1.5 * probe_iterations:
        del graph
        graph = capture(iterations)
    else:
        iterations = probe_iterations
    torch.cuda.synchronize()
    return Launchable(launch=graph.replay, iterations=iterations, graph=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of an iteration over a stretch of the pump's launches."""

    iteration_seconds: float | None
    """Mean, gaps between launches included [s]; None with fewer than two launches done."""
    launch_std_share: float | None
    """Standard deviation of a launch's time over its mean [1]."""
    launches: int
    host_seconds_per_iteration: float | None
    """Time the host spent in launching, per iteration [s]."""


class Pump:
    """Keeps at most a few launches in flight; call it again and again."""

    def __init__(self, launchable: Launchable, device: str) -> None:
        self._work = launchable
        self._device = device
        self._queue: deque[Any] = deque()
        self._done: list[Any] = []
        self._host_seconds = 0.0
        self._launches = 0
        self._mark = (0, 0.0, 0)

    def __call__(self) -> None:
        """Top the queue up; nap briefly when it is full."""
        self._collect()
        if len(self._queue) >= _QUEUE_DEPTH:
            time.sleep(_NAP_SECONDS)
            return
        started = time.perf_counter()
        self._work.launch()
        event = new_event(self._device)
        event.record()
        self._host_seconds += time.perf_counter() - started
        self._launches += 1
        self._queue.append(event)

    def run(self, seconds: float) -> None:
        """Pump for a while."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self()

    def mark(self) -> None:
        """Start of the stretch that `timing` covers."""
        self._collect()
        self._mark = (len(self._done), self._host_seconds, self._launches)

    def timing(self) -> Timing:
        """Timing from the last mark until now, of launches that ended in between."""
        self._collect()
        first, host_seconds, launches = self._mark
        events = self._done[first:]
        launched = self._launches - launches
        host = None
        if launched:
            host = (self._host_seconds - host_seconds) / (launched * self._work.iterations)
        if len(events) < 2:
            return Timing(
                iteration_seconds=None,
                launch_std_share=None,
                launches=len(events),
                host_seconds_per_iteration=host,
            )
        total = float(events[0].elapsed_time(events[-1])) / 1e3
        mean = total / (len(events) - 1)
        square = math.fsum(
            (float(a.elapsed_time(b)) / 1e3 - mean) ** 2 for a, b in itertools.pairwise(events)
        ) / (len(events) - 1)
        return Timing(
            iteration_seconds=mean / self._work.iterations,
            launch_std_share=math.sqrt(square) / mean if mean > 0 else None,
            launches=len(events),
            host_seconds_per_iteration=host,
        )

    def drain(self) -> None:
        """Wait for everything in flight."""
        synchronize(self._device)
        self._collect()

    def _collect(self) -> None:
        while self._queue and self._queue[0].query():
            self._done.append(self._queue.popleft())
