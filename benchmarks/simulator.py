"""Requests a second of the exact simulator, against the plain one of the tests and a plain scan.

    python benchmarks/simulator.py

Each trace is simulated on one core, on as many replicas as keep up and on twice as many; the plain
simulator (`tests/reference_simulator.py`) is timed on the first requests of the same trace in the
same run, and its results are compared. Times are CPU seconds, so that other work on the machine
counts little.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import measuring
import numpy as np

from energymodel.deployment import Deployment
from energymodel.replicas import serve_on_replicas
from energymodel.settings import Setting
from energymodel.simulator import simulate
from energymodel.steady_state import summarise
from energymodel.sweep import Workload, deployment_of
from energymodel.traces import Requests
from energymodel.workloads import load_requests

PLAIN_REQUESTS = 100
REPEATS = 5


def main() -> None:
    """Print a row for each trace and number of replicas."""
    print(measuring.machine())
    rows = [
        ("trace, GPU", "replicas", "requests/s", "steps/s", "ns/request", "plain requests/s", "x")
    ]
    for name in ("code", "conv", "mooncake"):
        source = measuring.trace(name)
        if source is None:
            continue
        requests = load_requests(source)
        for gpu in ("a100", "h100"):
            deployment = _deployment(gpu, requests)
            _, fewest = serve_on_replicas(requests, "auto", deployment)
            plain = _plain_rate(requests, deployment)
            for replicas in (fewest, 2 * fewest):
                seconds, steps = _exact(requests, replicas, deployment)
                rate = requests.rows_read / seconds
                rows.append(
                    (
                        f"{name} ({requests.rows_read:,}), {gpu}",
                        str(replicas),
                        f"{rate:,.0f}",
                        f"{steps / seconds:,.0f}",
                        f"{1e9 / rate:,.0f}",
                        f"{plain:,.0f}",
                        f"{rate / plain:,.0f}",
                    )
                )
    measuring.show(rows)


def _deployment(gpu: str, requests: Requests) -> Deployment:
    workload = Workload(binned=summarise(requests), requests=requests, output_tokens=1, prices={})
    return deployment_of(Setting(gpu=gpu), workload)


def _exact(requests: Requests, replicas: int, deployment: Deployment) -> tuple[float, float]:
    best, steps = np.inf, 0.0
    for _ in range(REPEATS):
        start = time.process_time()
        steps = 0.0
        for index in range(replicas):
            share = slice(index, None, replicas)
            run = simulate(
                requests.arrival_seconds[share],
                requests.input_tokens[share],
                requests.output_tokens[share],
                deployment.costs,
            )
            assert run is not None
            steps += run.totals["steps"]
        best = min(best, time.process_time() - start)
    return best, steps


def _plain_rate(requests: Requests, deployment: Deployment) -> float:
    from reference_simulator import simulate as simulate_plainly  # noqa: PLC0415

    few = replace(
        requests,
        arrival_seconds=requests.arrival_seconds[:PLAIN_REQUESTS],
        input_tokens=requests.input_tokens[:PLAIN_REQUESTS],
        output_tokens=requests.output_tokens[:PLAIN_REQUESTS],
    )
    start = time.process_time()
    plain = simulate_plainly(
        few.arrival_seconds.tolist(),
        few.input_tokens.tolist(),
        few.output_tokens.tolist(),
        model=deployment.model,
        serving=deployment.serving,
        gpu=deployment.gpu,
        calibration=deployment.calibration,
    )
    seconds = time.process_time() - start
    run = simulate(few.arrival_seconds, few.input_tokens, few.output_tokens, deployment.costs)
    assert run is not None
    joules = run.totals["prefill_joules"] + run.totals["decode_joules"]
    off = abs(joules / plain.joules - 1.0)
    if off > 1e-6:
        print(f"the plain simulator differs by {off:.1e} in energy")
    return PLAIN_REQUESTS / seconds


if __name__ == "__main__":
    main()
