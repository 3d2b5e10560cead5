"""Measured serving runs with what serves them, and their simulation under any calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.validation.rows import MeasuredRow
from energymodel.calibrations import Calibration
from energymodel.costs import CostTables, cost_tables, of_group
from energymodel.deployment import Deployment, deploy
from energymodel.simulator import simulate
from energymodel.specs import STATIC_STACKS

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A measured run with what serves it."""

    row: MeasuredRow
    deployment: Deployment
    joules: float
    seconds: float
    ttft_seconds: float | None = None
    """Median over the requests; None where it says nothing that `seconds` does not."""


def runs_of(rows: Sequence[MeasuredRow]) -> list[Run]:
    """Rows ready to be simulated; equal deployments are shared."""
    deployments: dict[tuple[Any, ...], Deployment] = {}
    runs = []
    for row in rows:
        options = dict(row.options)
        key = (row.gpu, row.model_name, row.stack, *sorted(options.items(), key=str))
        if key not in deployments:
            deployments[key] = deploy(
                gpu=row.gpu,
                model=row.model,
                stack=row.stack,
                **options,  # type: ignore[arg-type]
            )
        tokens = int(row.requests.output_tokens.sum())
        joules = row.joules_per_output_token
        assert joules is not None
        runs.append(
            Run(
                row=row,
                deployment=deployments[key],
                joules=joules * tokens,
                seconds=row.seconds_per_output_token * tokens,
                ttft_seconds=row.ttft_seconds if row.phase == "batch" else None,
            )
        )
    return runs


def simulated(runs: Sequence[Run], calibration: Calibration) -> tuple[Array, Array, Array]:
    """Joules of all GPUs, seconds, and the share that a slow host would add to joules.

    Each (n,), by run, under a calibration. Slow host: `step_costs.SLOW_HOST_RATIO`.
    """
    tables: dict[int, CostTables] = {}
    joules, seconds, slow = np.empty((3, len(runs)))
    for i, run in enumerate(runs):
        d = run.deployment
        if id(d) not in tables:
            tables[id(d)] = cost_tables(d.model, d.serving, d.gpu, calibration)
        requests = run.row.requests
        result = simulate(
            requests.arrival_seconds,
            requests.input_tokens,
            requests.output_tokens,
            tables[id(d)],
            static_batches=d.static_batches,
        )
        assert result is not None
        totals = result.totals
        seconds[i] = totals["now"]
        joules[i] = totals["prefill_joules"] + totals["decode_joules"]
        joules[i] += totals["idle_seconds"] * calibration.polling_idle_watts
        base_watts = of_group(calibration, d.serving).base_watts
        slow[i] = totals["slow_host_seconds"] * base_watts / joules[i]
        joules[i] *= d.gpus_per_replica
    return joules, seconds, slow


def usable(row: MeasuredRow, gpu: str) -> bool:
    """Whether a row says something about the steady state of a GPU.

    Saturated servers (rows with a ramp) are left to validation. Transformers lets cuDNN plan
    attention anew for each length of KV cache that it has not met (about 60 ms a step): batches
    that were metered while it did are no steady state.
    """
    planning_attention = row.stack in STATIC_STACKS and row.unsteady
    return row.gpu == gpu and row.ramp is None and not planning_attention
