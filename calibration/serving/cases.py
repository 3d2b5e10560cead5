"""Meters the cases of a serving plan in an engine that is up: batches, traces, idle states.

The energy of a case is that of the GPU from the first arrival to the last completion. The
window opens on a tick of the energy counter and closes on the first tick that is sure to hold
the work's end (the counter lags behind); the time between completion and that tick is
subtracted at the power metered right after it. Short cases are repeated back to back.
"""

from __future__ import annotations

import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from calibration.metering.host_speed import python_step_seconds_now
from calibration.metering.trackers import tracked
from calibration.metering.windows import Meter, Reading, window_to_json
from calibration.serving.engine import Engine, RunLog, TimeUpError, clock
from calibration.serving.plan import Case, EngineRun, Plan, Requests, requests_of
from calibration.serving.steady import measure_steady
from calibration.serving.step_kernels import per_step, traced

COUNTER_LAG_SECONDS = 0.04
"""How long after the work's end the counter is left alone, so that the tick holds all of it."""
WARMUP_OUTPUT_TOKENS = 16
_WARM_UP_TOKENS: dict[str, int | None] = {"transformers": None, "transformers-compile": None}
"""Output tokens of the warm-up by stack; None = all. Transformers' attention (cuDNN) plans anew
for each KV length it meets for the first time, about 60 ms a step: it must have met them all. A
static cache is as long as input and output together, and what is compiled depends on it."""
CASE_OVERHEAD_SECONDS = 1.5
"""Warm-up and ticks of a case beside its window."""
_MOST_FRESH = 16
"""Repeats of a batch, each with prompts of its own, at a server that may cache prompts."""
STEPS_KEPT = 6000
"""A record keeps the single steps of a run with at most so many."""


class TickMeter(Meter, Protocol):
    """A meter that can also be read at the counter's ticks."""

    def wait_tick(self) -> Reading:
        """Return the counter at its next tick."""


def metered(meter: TickMeter, name: str, work: Callable[[], Sequence[RunLog]]) -> dict[str, Any]:
    """Energy of `work`, from its first start to its last end.

    Returns
    -------
    dict
        `joules` (all GPUs, corrected for the tail), `active_seconds`, `tail_seconds`,
        `tail_watts`, the meter's `window`, and `logs` as `work` returned them.
    """
    meter.begin(name, align=True)
    try:
        logs = work()
        time.sleep(COUNTER_LAG_SECONDS)
        window = meter.end(align=True)
    except BaseException:
        meter.abandon()
        raise
    first, second = meter.wait_tick(), meter.wait_tick()
    tail_watts = (math.fsum(second.energy_joules) - math.fsum(first.energy_joules)) / (
        second.time_seconds - first.time_seconds
    )
    active_seconds = logs[-1].end_seconds - logs[0].start_seconds
    tail_seconds = max(0.0, window.duration_seconds - active_seconds)
    return {
        "joules": window.total_joules - tail_seconds * tail_watts,
        "active_seconds": active_seconds,
        "tail_seconds": tail_seconds,
        "tail_watts": tail_watts,
        "window": window_to_json(window),
        "logs": logs,
    }


def measure_case(
    engine: Engine,
    meter: TickMeter,
    case: Case,
    plan: Plan,
    vocab_size: int,
    deadline: float,
    *,
    warm_up_tokens: int | None = WARMUP_OUTPUT_TOKENS,
) -> dict[str, Any]:
    """Measure a static or trace case: a warm-up, then repeats until the window is full.

    `warm_up_tokens` are the output tokens of each request of the warm-up; None = all of them.

    Raises
    ------
    TimeUpError
        If the monotonic clock passes `deadline` before the case is complete.
    """
    requests = requests_of(case, plan.folder)
    prompts = _prompts(requests, vocab_size, plan.seed)
    repeats: Iterable[Any] = itertools.repeat(engine.prepare(requests, prompts))
    if getattr(engine, "caches_prefixes", False):  # prompts that it has met would cost nothing
        seeds = range(plan.seed + 1, plan.seed + 1 + (_MOST_FRESH if case.kind == "static" else 1))
        fresh = (_prompts(requests, vocab_size, seed) for seed in seeds)
        repeats = [engine.prepare(requests, each) for each in fresh]
    for count in (1, 16) if case.kind == "trace" else (len(requests),):
        engine.run(_warm_up(engine, count, requests, prompts, warm_up_tokens), deadline)

    def work() -> list[RunLog]:
        logs: list[RunLog] = []
        for prepared in repeats:
            logs.append(engine.run(prepared, deadline))
            lasted = logs[-1].end_seconds - logs[0].start_seconds
            if case.kind != "static" or lasted >= plan.window_seconds:
                break
        return logs

    host_before = python_step_seconds_now()
    with tracked(plan.tracker, plan.gpu_indices) as tracker:
        result = metered(meter, case.name, work)
    logs: list[RunLog] = result.pop("logs")
    record = {
        "requests": len(requests),
        "requests_left_out": requests.left_out,
        "input_tokens": int(requests.input_tokens.sum()),
        "output_tokens": int(requests.output_tokens.sum()),
        "repeats": len(logs),
        "joules_per_repeat": result["joules"] / len(logs),
        "seconds_per_repeat": result["active_seconds"] / len(logs),
        "python_step_seconds": [host_before, python_step_seconds_now()],
        **result,
        **_summary(logs, requests),
        **tracker.compared(result["window"]),
    }
    if case.kind == "trace":
        record["trace"] = {
            "arrival_seconds": np.round(requests.arrival_seconds, 6),
            "input_tokens": requests.input_tokens,
            "output_tokens": requests.output_tokens,
            "ttft_seconds": np.round(logs[-1].ttft_seconds, 6),
            "finish_seconds": np.round(logs[-1].finish_seconds, 6),
        }
    return record


def _warm_up(
    engine: Engine,
    count: int,
    requests: Requests,
    prompts: list[list[int]],
    most_tokens: int | None,
) -> Any:
    """Prepare the first requests with few output tokens, all at once.

    An engine takes half a second for the first lone request that it meets, which the queue of a
    trace that begins with a burst keeps for seconds.
    """
    count = min(count, len(requests))
    outputs = requests.output_tokens[:count]
    if most_tokens is not None:
        outputs = np.minimum(outputs, most_tokens)
    short = replace(
        requests,
        arrival_seconds=np.zeros(count),
        input_tokens=requests.input_tokens[:count],
        output_tokens=outputs,
    )
    return engine.prepare(short, prompts[:count])


def _prompts(requests: Requests, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).tolist() for n in requests.input_tokens]


def _summary(logs: Sequence[RunLog], requests: Requests) -> dict[str, Any]:
    """Steps, latencies and their spread; the single steps of the last repeat."""
    last = logs[-1]
    gaps = [np.diff(log.step_end_seconds) for log in logs]
    decode = [
        gap[(log.step_tokens == log.step_sequences)[1:]]
        for gap, log in zip(gaps, logs, strict=True)
    ]
    more = requests.output_tokens > 1
    tpot = [
        (log.finish_seconds - requests.arrival_seconds - log.ttft_seconds)[more]
        / (requests.output_tokens[more] - 1)
        for log in logs
    ]
    kept = slice(0, STEPS_KEPT if len(last.step_tokens) <= STEPS_KEPT else 0)
    seconds = [log.seconds for log in logs]
    return {
        "repeat_seconds": {
            "min": min(seconds),
            "median": float(np.median(seconds)),
            "max": max(seconds),
        },
        "add_seconds_median": float(np.median([log.add_seconds for log in logs])),
        "first_step_seconds_median": (
            float(np.median([log.step_end_seconds[0] for log in logs]))
            if len(last.step_end_seconds)
            else None  # a server does not tell its steps
        ),
        "steps_per_repeat": len(last.step_tokens),
        "scheduled_tokens_per_repeat": int(last.step_tokens.sum()),
        "step_gap_seconds": _spread(np.concatenate(gaps)),
        "decode_step_seconds": _spread(np.concatenate(decode)),
        "ttft_seconds": _spread(np.concatenate([log.ttft_seconds for log in logs])),
        "tpot_seconds": _spread(np.concatenate(tpot)),
        "steps": {
            "end_microseconds": np.round(last.step_end_seconds[kept] * 1e6).astype(np.int64),
            "tokens": last.step_tokens[kept],
            "sequences": last.step_sequences[kept],
        },
    }


def _spread(values: ArrayLike) -> dict[str, float] | None:
    array = np.asarray(values, dtype=float)
    if not array.size:
        return None
    p10, p50, p90, p99 = np.percentile(array, [10, 50, 90, 99])
    return {"mean": float(array.mean()), "p10": p10, "p50": p50, "p90": p90, "p99": p99}


def measure_idle(engine: Engine, meter: TickMeter, case: Case) -> dict[str, Any]:
    """Power of the GPU with the engine up and no work."""
    time.sleep(0.5)  # the clocks and the power settle after work

    def work() -> list[RunLog]:
        none, counts = np.empty(0), np.empty(0, dtype=np.int64)
        start = clock()
        while clock() < start + case.seconds:
            if case.state == "polling":
                engine.poll()
            else:
                time.sleep(0.05)
        return [RunLog(start, clock(), 0.0, none, none, none, counts, counts)]

    result = metered(meter, case.name, work)
    window = result["window"]
    watts = sum(window["energy_joules"]) / window["duration_seconds"]
    return {"watts": watts, "window": window, "tail_watts": result["tail_watts"]}


def measure_experts(engine: Any, case: Case, seed: int, vocab_size: int) -> dict[str, Any]:
    """Distinct experts by step size, for each batch of the case; not metered."""
    found: list[dict[str, float]] = []
    for batch in case.batches:
        requests = Requests(
            np.zeros(batch),
            np.full(batch, case.input_tokens or 64),
            np.full(batch, case.output_tokens or 8),
        )
        found += engine.distinct_experts(batch, requests, _prompts(requests, vocab_size, seed))
    return {"experts": found}


def measure_kernels(
    engine: Engine, case: Case, seed: int, vocab_size: int, deadline: float
) -> dict[str, Any]:
    """Kernels of a prompt's step and of a decode step, for each batch of the case; not metered.

    A decode step's are those that `output_tokens` tokens take beyond the first, over their number.
    """
    found = []
    for batch in case.batches:
        inputs = np.full(batch, case.input_tokens)
        requests = [
            Requests(np.zeros(batch), inputs, np.full(batch, n)) for n in (1, case.output_tokens)
        ]
        first, all_of_them = (engine.prepare(r, _prompts(r, vocab_size, seed)) for r in requests)
        engine.run(all_of_them, deadline)
        log = engine.run(all_of_them, deadline)
        short, long = (traced(partial(engine.run, work, deadline)) for work in (first, all_of_them))
        found.append(
            {
                "batch": batch,
                "first_step_seconds": float(log.step_end_seconds[0]),
                "decode_step_seconds": _spread(np.diff(log.step_end_seconds)),
                "steps": len(log.step_tokens),
                "first_step": per_step(short),
                "decode_step": per_step(long, short, case.output_tokens - 1),
            }
        )
    return {"kernels": found}


def run_cases(
    engine: Engine,
    meter: TickMeter,
    run: EngineRun,
    plan: Plan,
    *,
    vocab_size: int,
    deadline: float,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Measure the run's cases in order until the deadline; each outcome is one record."""
    for case in run.cases:
        began = clock()
        base = {"case_name": case.name, "case": asdict(case)}
        try:
            if began + _least_seconds(case, plan) + CASE_OVERHEAD_SECONDS > deadline:
                raise TimeUpError("the time for this engine is used up")
            if case.kind == "idle":
                result = measure_idle(engine, meter, case)
            elif case.kind == "steady":
                result = measure_steady(engine, meter, case, plan, vocab_size, deadline)
            elif case.kind == "experts":
                result = measure_experts(engine, case, plan.seed, vocab_size)
            elif case.kind == "kernels":
                result = measure_kernels(engine, case, plan.seed, vocab_size, deadline)
            else:
                result = measure_case(
                    engine,
                    meter,
                    case,
                    plan,
                    vocab_size,
                    deadline,
                    warm_up_tokens=_WARM_UP_TOKENS.get(run.stack, WARMUP_OUTPUT_TOKENS),
                )
        except TimeUpError as error:
            write({"kind": "skipped", **base, "reason": str(error)})
        except Exception as error:  # one case must not end the others
            write({"kind": "error", **base, **described(error)})
        else:
            kind = "run" if case.kind in ("static", "trace") else case.kind
            write({"kind": kind, **base, "case_seconds": clock() - began, **result})


def _least_seconds(case: Case, plan: Plan) -> float:
    if case.kind in ("idle", "steady"):
        return case.seconds
    if case.kind == "trace":
        return max(plan.window_seconds, float(requests_of(case, plan.folder).arrival_seconds[-1]))
    return plan.window_seconds


def described(error: BaseException) -> dict[str, str]:
    """Type, message and end of the traceback of an error."""
    lines = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error}", "traceback": lines[-4000:]}
