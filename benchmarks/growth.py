"""How time and memory grow with the number of requests, up to a week of fleet traffic.

    python benchmarks/growth.py [LARGEST]

Files of 10^4 to LARGEST rows (44,107,694 if not given; about 1.8 GB in the temporary folder) in the
form of the Azure 2024 week are written, then each is, in processes of their own:

    scanned    the three columns read by Polars and summed, dates parsed: the floor of any reader
    binned     read piece by piece, reduced to windows and lengths, energy estimated (`whatif`)
    simulated  read piece by piece and simulated exactly over 40 replicas, on one core and on two

Rows that fit a smaller week have the same rate over less time, so that the load is the same.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from week import ROWS, write_week

REPLICAS = 40
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, ROWS)

_SCAN = """
import sys, time
import polars as pl
start = time.perf_counter()
columns = ("ContextTokens", "GeneratedTokens")
table = pl.scan_csv(sys.argv[1], try_parse_dates=sys.argv[2] == "dates")
print(table.select(pl.len(), pl.col("TIMESTAMP").max(), *(pl.col(c).sum() for c in columns))
      .collect(engine="streaming").row(0))
print("seconds", time.perf_counter() - start)
"""
_BINNED = """
import sys, time
from energymodel.steady_state import estimate, summarise
from energymodel.settings import Setting
from energymodel.sweep import Workload, deployment_of
from energymodel.traces import read_batches
start = time.perf_counter()
binned = summarise(read_batches(sys.argv[1]))
workload = Workload(binned=binned, requests=None, output_tokens=1, prices={})
print(estimate(binned, deployment_of(Setting(gpu="a100"), workload), int(sys.argv[2])))
print("seconds", time.perf_counter() - start)
"""
_SIMULATED = """
import sys, time
from energymodel.fleet import Fleet
from energymodel.steady_state import summarise
from energymodel.settings import Setting
from energymodel.sweep import Workload, deployment_of
from energymodel.traces import read_batches
start = time.perf_counter()
workload = Workload(binned=None, requests=None, output_tokens=1, prices={})
fleet = Fleet(deployment_of(Setting(gpu="a100"), workload), int(sys.argv[2]),
              threads=int(sys.argv[3]))
for piece in read_batches(sys.argv[1]):
    fleet.serve(piece.arrival_seconds, piece.input_tokens, piece.output_tokens)
served = fleet.finish()
print(served.requests, served.energy_joules, served.ttft.percentile(99))
print("seconds", time.perf_counter() - start)
"""


def main(largest: int) -> None:
    """Print a row for each size."""
    print(measuring.machine())
    rows = [
        (
            "requests",
            "scan, no dates [s]",
            "scan [s]",
            "binned [s]",
            "x scan",
            "MB",
            "simulated [s]",
            "CPU [s]",
            "requests/CPU s",
            "on 2 cores [s]",
            "MB",
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            if size > largest:
                break
            path = Path(folder) / f"{size}.csv"
            write_week(path, size, share=size / ROWS)
            bare = _seconds(measuring.python(_SCAN, str(path), "text"))
            scan = _seconds(measuring.python(_SCAN, str(path), "dates"))
            binned = measuring.python(_BINNED, str(path), str(REPLICAS))
            one = measuring.python(_SIMULATED, str(path), str(REPLICAS), "1")
            two = measuring.python(_SIMULATED, str(path), str(REPLICAS), "2")
            rows.append(
                (
                    f"{size:,}",
                    f"{bare:.2f}",
                    f"{scan:.2f}",
                    f"{_seconds(binned):.2f}",
                    f"{_seconds(binned) / scan:.1f}",
                    f"{binned.peak_bytes / 1e6:.0f}",
                    f"{_seconds(one):.2f}",
                    f"{one.cpu_seconds:.2f}",
                    f"{size / one.cpu_seconds:,.0f}",
                    f"{_seconds(two):.2f}",
                    f"{max(one.peak_bytes, two.peak_bytes) / 1e6:.0f}",
                )
            )
            path.unlink()
    measuring.show(rows)


def _seconds(found: measuring.Measured) -> float:
    """Time without the start of Python."""
    return float(found.output.split("seconds")[-1])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS)
