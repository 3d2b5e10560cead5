"""Adds up simulated runs: energy by phase, operator and component, of whole groups of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from energymodel.costs import of_group, operator_totals, other_passes
from energymodel.deployment import Deployment
from energymodel.results import Timeline
from energymodel.simulator import Simulation

Array = NDArray[np.float64]

_ROUNDING = 1e-9  # of times that are sums over many steps
DRAFT_PREFIX = "draft_"
"""Before the names of a draft model's operators."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Served:
    """How a workload was served; sums over replicas (or over the paper's batches).

    Energies [J] are of all GPUs together, times [s] count from the first arrival.
    """

    first_token_seconds: Array
    """(n,) when each request's first token was out."""
    finish_seconds: Array
    """(n,) when each request's last token was out."""
    request_joules: Array
    """(n,) active energy of each request; their sum is prefill + decode."""
    operators: Mapping[str, Mapping[str, float]]
    """Active energy by operator and component, waiting left out."""
    work: Mapping[str, Mapping[str, float]]
    """By operator: executed_flops, hbm_bytes, gpu_seconds."""
    prefill_joules: float
    decode_joules: float
    idle_joules: float
    wait_joules: float
    """Base power while the GPU waits for the host, or is slowed below its kernels' pace."""
    slow_host_joules: float
    """What a slow host would add (`step_costs.SLOW_HOST_RATIO`)."""
    wall_seconds: float
    busy_seconds: float
    """With requests in flight, summed over the replicas."""
    steps: int
    preemptions: int
    throttled_seconds: float
    timeline: Timeline | None = None
    """None where the runs have no common time."""


def add_up(
    runs: Sequence[Simulation],
    deployment: Deployment,
    *,
    weights: Array,
    first_token_seconds: Array,
    finish_seconds: Array,
    request_joules: Array,
    wall_seconds: float,
    idle_seconds: float,
) -> Served:
    """Energy of runs that are each counted `weights` times.

    Parameters
    ----------
    runs : what replicas (or batches) did, per GPU of a group
    weights : (runs,) how often each counts
    first_token_seconds, finish_seconds : (n,) of all requests
    request_joules : (n,) active energy of all requests on one GPU of the group [J]
    wall_seconds : from the first arrival to the last completion
    idle_seconds : without a request in flight, summed over the replicas
    """
    calibration = deployment.calibration
    group = float(deployment.gpus_per_replica)

    def total(name: str) -> float:
        return float(weights @ np.array([run.totals[name] for run in runs]))

    def sums(kind: int, name: str) -> Array:
        counts = [getattr(run.passes[kind], name) for run in runs]
        result: Array = sum(
            (w * each for w, each in zip(weights, counts, strict=True)),
            start=np.zeros_like(counts[0]),
        )
        return result

    operators: dict[str, dict[str, float]] = {}
    work: dict[str, dict[str, float]] = {}
    model, serving = deployment.model, deployment.serving
    for kind, (other, settings) in enumerate([(model, serving), *other_passes(model, serving)]):
        found = operator_totals(
            other,
            settings,
            deployment.gpu,
            calibration,
            token_steps=sums(kind, "token_steps"),
            row_steps=sums(kind, "row_steps"),
            attention_sums=sums(kind, "attention_sums"),
            phase_steps=sums(kind, "phase_steps"),
        )
        prefix = DRAFT_PREFIX if kind > 0 and serving.draft is not None else ""
        named = [{prefix + name: parts for name, parts in own.items()} for own in found]
        operators, work = merged(operators, named[0]), merged(work, named[1])
    base_watts = of_group(calibration, serving).base_watts
    wait = base_watts * (total("wait_seconds") + total("stretch_seconds"))
    prefill, decode = total("prefill_joules"), total("decode_joules")
    # under the power limit a jump's operator sums are products of means: close the sum exactly
    counted = sum(sum(parts.values()) for parts in operators.values())
    closing = (prefill + decode - wait) / counted
    return Served(
        first_token_seconds=first_token_seconds,
        finish_seconds=finish_seconds,
        request_joules=request_joules * group,
        operators={
            name: {part: value * closing * group for part, value in parts.items()}
            for name, parts in operators.items()
        },
        work={
            name: {what: value * group for what, value in amounts.items()}
            for name, amounts in work.items()
        },
        prefill_joules=prefill * group,
        decode_joules=decode * group,
        idle_joules=max(idle_seconds, 0.0) * _idle_watts(deployment) * group,
        wait_joules=wait * group,
        slow_host_joules=base_watts * total("slow_host_seconds") * group,
        wall_seconds=wall_seconds,
        busy_seconds=total("gpu_seconds") + total("wait_seconds"),
        steps=round(total("steps")),
        preemptions=round(total("preemptions")),
        throttled_seconds=total("throttled_seconds"),
    )


def merged(*several: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Sums of nested numbers, key by key."""
    result: dict[str, dict[str, float]] = {}
    for one in several:
        for name, parts in one.items():
            entry = result.setdefault(name, {})
            for part, value in parts.items():
                entry[part] = entry.get(part, 0.0) + value
    return result


def _idle_watts(deployment: Deployment) -> float:
    """Power of a GPU without a request in flight [W]."""
    calibration = deployment.calibration
    if deployment.static_batches:
        return calibration.context_idle_watts
    return calibration.polling_idle_watts


def timeline(
    runs: Sequence[Simulation], deployment: Deployment, *, replicas: int, wall_seconds: float
) -> Timeline:
    """Joules by slice of time, of replicas that run side by side.

    Parameters
    ----------
    runs : what the replicas that saw a request did, per GPU of a group
    replicas : all of them; what is left of a slice's time is idle
    wall_seconds : from the first arrival to the last completion
    """
    width = max(run.slice_seconds for run in runs)
    prefill, decode, busy = np.sum([_joined(run, width) for run in runs], axis=0).T
    starts = np.arange(int(np.ceil(wall_seconds / width))) * width
    count = starts.size
    held = np.minimum(width, wall_seconds - starts) * replicas
    idle_seconds = held - busy[:count]
    idle_seconds[idle_seconds < _ROUNDING * held] = 0.0
    idle = idle_seconds * _idle_watts(deployment)
    group = float(deployment.gpus_per_replica)

    def joules(values: Array) -> tuple[float, ...]:
        return tuple((values[:count] * group).tolist())

    return Timeline(
        slice_seconds=width,
        prefill_joules=joules(prefill),
        decode_joules=joules(decode),
        idle_joules=joules(idle),
    )


def _joined(run: Simulation, width: float) -> Array:
    """A run's slices in the length `width`, which is theirs times a power of two."""
    size = len(run.slices)
    together = min(round(width / run.slice_seconds), size)
    joined = np.zeros_like(run.slices)
    joined[: size // together] = run.slices.reshape(-1, together, 3).sum(axis=1)
    return joined


def energy_parts(served: Served) -> tuple[dict[str, float], dict[str, float]]:
    """Energy by component and by operator [J]; each adds up to the total."""
    rest = {"host_wait": served.wait_joules, "idle": served.idle_joules}
    components = dict.fromkeys(("base", "flops", "onchip", "hbm", "link"), 0.0)
    for parts in served.operators.values():
        for part, value in parts.items():
            components[part] += value
    operators = {name: sum(parts.values()) for name, parts in served.operators.items()} | rest
    return components | rest, dict(sorted(operators.items(), key=lambda item: -item[1]))
