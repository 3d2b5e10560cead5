"""Meters an engine in the steady state: always as many sequences as it takes, for a while.

The engine takes `batch` sequences (vLLM's `max_num_seqs`), and as many more requests always wait,
so that each sequence that ends is replaced at once, as in ML.ENERGY's benchmark. The first
requests are cut to different lengths, so that sequences end one after another and not all
together; metering begins when those are done. The window's edges lie on ticks of the energy
counter, each awaited while the engine goes on: an edge is off by a step at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.metering.windows import Meter, window_to_json
from calibration.serving.engine import TimeUpError
from calibration.serving.plan import Case, Plan, trace_lengths
from energymodel.errors import ConfigurationError

clock = time.monotonic


class LoopEngine(Protocol):
    """What the loop needs of an engine; Transformers, which has no queue, is none."""

    made_tokens: int
    """Output tokens made since the engine was started."""
    max_sequences: int
    """Sequences in a batch at most."""

    def submit(self, prompt: list[int], output_tokens: int) -> str:
        """Hand over a request; returns its name."""

    def advance(self) -> list[str]:
        """Do a step; names of the requests that it completed."""

    def first_token_seconds(self, name: str) -> float:
        """Monotonic clock at a request's first token."""

    def step_times(self) -> list[tuple[float, int, int]]:
        """End, tokens and sequences of every step since the last `withdraw`."""

    def withdraw(self, names: list[str]) -> None:
        """Take requests back and forget what was noted."""


class Loop:
    """Keeps `sequences` requests running and as many waiting; call it again and again."""

    def __init__(
        self,
        engine: LoopEngine,
        lengths: Callable[[int], tuple[int, int]],
        sequences: int,
        vocab_size: int,
        seed: int,
    ) -> None:
        self.engine = engine
        self.lengths = lengths
        self.sequences = sequences
        self.deadline = float("inf")
        self.admitted: list[tuple[int, int]] = []
        """Input and output tokens of every request so far."""
        self.done: list[tuple[int, float, float]] = []
        """Number, first-token and completion time of every request that has ended."""
        self._numbers: dict[str, int] = {}
        self._rng = np.random.default_rng(seed)
        self._vocab_size = vocab_size

    def __call__(self) -> None:
        """Refill, then do a step of the engine."""
        if clock() > self.deadline:
            raise TimeUpError(f"time was up with {len(self.done)} requests complete")
        while len(self._numbers) < 2 * self.sequences:
            number = len(self.admitted)
            inputs, outputs = self.lengths(number)
            prompt = self._rng.integers(0, self._vocab_size, inputs).tolist()
            self.admitted.append((inputs, outputs))
            self._numbers[self.engine.submit(prompt, outputs)] = number
        for name in self.engine.advance():
            first = self.engine.first_token_seconds(name)
            self.done.append((self._numbers.pop(name), first, clock()))

    def mark(self) -> tuple[float, int, int]:
        """Time, output tokens made and requests started so far."""
        return clock(), self.engine.made_tokens, len(self.admitted) - self.sequences

    def stop(self) -> None:
        """Take back what is in flight."""
        self.engine.withdraw(list(self._numbers))


def lengths_of(case: Case, folder: Path) -> Callable[[int], tuple[int, int]]:
    """Input and output tokens of the n-th request of a steady case.

    Those of the case or, again and again, of its trace; the outputs of the first `batch` requests
    are cut to 1/batch, 2/batch, ... of their length.
    """
    if case.trace:
        inputs, outputs = trace_lengths(case, folder)
    else:
        inputs, outputs = np.array([case.input_tokens]), np.array([case.output_tokens])

    def lengths(number: int) -> tuple[int, int]:
        at = number % len(inputs)
        whole = int(outputs[at])
        if number < case.batch:
            whole = max(1, round(whole * (number + 1) / case.batch))
        return int(inputs[at]), whole

    return lengths


def measure_steady(
    engine: Any, meter: Meter, case: Case, plan: Plan, vocab_size: int, deadline: float
) -> dict[str, Any]:
    """Energy and time per output token with `case.batch` sequences running.

    Raises
    ------
    ConfigurationError
        If the engine serves one batch at a time, or takes another number of sequences.
    TimeUpError
        If the monotonic clock passes `deadline` first.
    """
    if not hasattr(engine, "submit"):
        raise ConfigurationError("this stack serves one batch at a time; leave steady cases out")
    if engine.max_sequences != case.batch:
        raise ConfigurationError(
            f"a steady case of {case.batch} sequences needs an engine with max_num_seqs "
            f"{case.batch}, this one has {engine.max_sequences}; give it a run of its own"
        )
    loop = Loop(engine, lengths_of(case, plan.folder), case.batch, vocab_size, plan.seed)
    loop.deadline = deadline
    try:
        while len(loop.done) < case.batch:
            loop()
        meter.begin(case.name, align=True, keep_busy=loop)
        began, made_before, started_before = loop.mark()
        while clock() < began + case.seconds:
            loop()
        window = meter.end(align=True, keep_busy=loop)
        ended, made, started = loop.mark()
        steps = [s for s in engine.step_times() if began < s[0] <= ended]
    except BaseException:
        meter.abandon()
        raise
    finally:
        loop.stop()
    tokens = made - made_before
    done = [(loop.admitted[n][1], first, end) for n, first, end in loop.done if end > began]
    requests = loop.admitted[:started]
    return {
        "sequences": case.batch,
        "output_tokens": tokens,
        "requests_started": started - started_before,
        "joules": window.total_joules,
        "active_seconds": window.duration_seconds,
        "joules_per_output_token": window.total_joules / tokens,
        "seconds_per_output_token": window.duration_seconds / tokens,
        "mean_sequences": float(np.mean([s[2] for s in steps])),
        "steps": len(steps),
        "step_gap_seconds": _percentiles(np.diff([s[0] for s in steps])),
        "ttft_seconds": None,  # all requests wait: it says nothing
        "tpot_seconds": _percentiles(
            np.array([(end - first) / (o - 1) for o, first, end in done if o > 1])
        ),
        "requests": {
            "before_window": started_before,
            "input_tokens": [i for i, _ in requests],
            "output_tokens": [o for _, o in requests],
        },
        "window": window_to_json(window),
    }


def _percentiles(values: NDArray[np.float64]) -> dict[str, float] | None:
    if not len(values):
        return None
    p10, p50, p90, p99 = map(float, np.percentile(values, [10, 50, 90, 99]))
    return {"mean": float(np.mean(values)), "p10": p10, "p50": p50, "p90": p90, "p99": p99}
