"""How far the binned estimate is from the exact simulation, over settings of the Azure traces.

python benchmarks/estimate_error.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring
import numpy as np

from energymodel.prices import load_prices
from energymodel.settings import grid_of
from energymodel.steady_state import summarise
from energymodel.sweep import Workload, evaluate
from energymodel.workloads import load_requests

AXES = {
    "gpu": ["a100", "h100", "h200"],
    "stack": ["vllm", "vllm-eager"],
    "tensor_parallel": [1, 2],
    "max_batch": [16, 64, 256],
    "replicas": [1, 2, 4, 8],
    "arrival_scale": [0.5, 1.0, 2.0],
}


def main() -> None:
    """Print signed median and absolute p50, p90 and largest error by trace and quantity."""
    rows = [("trace, quantity", "n", "median", "median abs", "p90 abs", "largest abs")]
    for name in ("conv", "code"):
        requests = load_requests(measuring.trace(name) or name)
        workload = Workload(
            binned=summarise(requests),
            requests=requests,
            output_tokens=int(requests.output_tokens.sum()),
            prices=load_prices(),
        )
        errors: dict[str, list[float]] = {}
        for setting in grid_of(AXES):
            exact = evaluate(setting, workload, "exact")
            found = evaluate(setting, workload, "binned")
            if not (exact.served and found.served):
                continue
            pairs = {
                "energy": (found.energy_joules, exact.energy_joules),
                "TTFT p50": (found.ttft_seconds["p50"], exact.ttft_seconds["p50"]),
                "TTFT p99": (found.ttft_seconds["p99"], exact.ttft_seconds["p99"]),
                "TPOT p50": (found.tpot_seconds["p50"], exact.tpot_seconds["p50"]),
                "TPOT p99": (found.tpot_seconds["p99"], exact.tpot_seconds["p99"]),
            }
            for quantity, (guess, truth) in pairs.items():
                assert guess is not None
                assert truth is not None
                errors.setdefault(quantity, []).append(guess / truth - 1.0)
        for quantity, values in errors.items():
            off = np.abs(values)
            numbers = (np.median(values), np.median(off), np.percentile(off, 90), off.max())
            rows.append(
                (
                    f"{name}, {quantity}",
                    str(len(values)),
                    f"{numbers[0]:+.1%}",
                    *(f"{number:.1%}" for number in numbers[1:]),
                )
            )
    measuring.show(rows)


if __name__ == "__main__":
    main()
