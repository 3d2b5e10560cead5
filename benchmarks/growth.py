"""How time and memory grow with the number of requests, up to a week of fleet traffic.

    python benchmarks/growth.py [LARGEST]

Files of 10^4 to LARGEST rows in the form of the Azure 2024 week are written, then each is, in
processes of their own:

    scanned    the three columns read by Polars and summed, dates parsed: the floor of any reader
    binned     read piece by piece, reduced to windows and lengths, energy estimated (`whatif`)
    simulated  read piece by piece and simulated exactly over 40 replicas, on one core and on two

LARGEST is 10^6 if not given, and `week` for all 44,107,694 rows (`make bench-week`: some minutes,
and 1.8 GB in the temporary folder). Fewer rows have the same rate over less time, so that the load
is the same. Seconds are without the start of Python; `+us/request` is the CPU time that each
further request takes, from one size to the next: where it is constant, time grows in proportion.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import measuring
from week import ROWS, write_week

REPLICAS = 40
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, ROWS)

_SCAN = """
import sys, time
import polars as pl
start = time.perf_counter(), time.process_time()
columns = ("ContextTokens", "GeneratedTokens")
table = pl.scan_csv(sys.argv[1], try_parse_dates=sys.argv[2] == "dates")
print(table.select(pl.len(), pl.col("TIMESTAMP").max(), *(pl.col(c).sum() for c in columns))
      .collect(engine="streaming").row(0))
print("seconds", time.perf_counter() - start[0], time.process_time() - start[1])
"""
_BINNED = """
import sys, time
from energymodel.steady_state import estimate, summarise
from energymodel.settings import Setting
from energymodel.sweep import Workload, deployment_of
from energymodel.traces import read_batches
start = time.perf_counter(), time.process_time()
binned = summarise(read_batches(sys.argv[1]))
workload = Workload(binned=binned, requests=None, output_tokens=1, prices={})
print(estimate(binned, deployment_of(Setting(gpu="a100"), workload), int(sys.argv[2])))
print("seconds", time.perf_counter() - start[0], time.process_time() - start[1])
"""
_SIMULATED = """
import sys, time
from energymodel.fleet import Fleet
from energymodel.steady_state import summarise
from energymodel.settings import Setting
from energymodel.sweep import Workload, deployment_of
from energymodel.traces import read_batches
start = time.perf_counter(), time.process_time()
workload = Workload(binned=None, requests=None, output_tokens=1, prices={})
fleet = Fleet(deployment_of(Setting(gpu="a100"), workload), int(sys.argv[2]),
              threads=int(sys.argv[3]))
for piece in read_batches(sys.argv[1]):
    fleet.serve(piece.arrival_seconds, piece.input_tokens, piece.output_tokens)
served = fleet.finish()
print(served.requests, served.energy_joules, served.ttft.percentile(99))
print("seconds", time.perf_counter() - start[0], time.process_time() - start[1])
"""


def main(largest: int) -> None:
    """Print a row for each size."""
    print(measuring.machine())
    read = [
        (
            *("requests", "scan, no dates [CPU s]", "scan [CPU s]", "read and estimated [CPU s]"),
            *("x scan", "+us/request", "wall s", "MB"),
        )
    ]
    run = [
        (
            *("requests", "simulated [CPU s]", "requests/CPU s", "+us/request"),
            *("wall s", "wall s, two cores", "MB"),
        )
    ]
    before: tuple[int, float, float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            if size > largest:
                break
            path = Path(folder) / f"{size}.csv"
            write_week(path, size, share=size / ROWS)
            bare = _times(measuring.python(_SCAN, str(path), "text"))
            scan = _times(measuring.python(_SCAN, str(path), "dates"))
            binned_run = measuring.python(_BINNED, str(path), str(REPLICAS))
            one_run = measuring.python(_SIMULATED, str(path), str(REPLICAS), "1")
            two_run = measuring.python(_SIMULATED, str(path), str(REPLICAS), "2")
            binned, one, two = (_times(found) for found in (binned_run, one_run, two_run))
            more = ["-", "-"]
            if before is not None:
                further = size - before[0]
                more = [
                    f"{1e6 * (now - then) / further:.2f}"
                    for now, then in ((binned.cpu, before[1]), (one.cpu, before[2]))
                ]
            before = (size, binned.cpu, one.cpu)
            read.append(
                (
                    f"{size:,}",
                    f"{bare.cpu:.2f}",
                    f"{scan.cpu:.2f}",
                    f"{binned.cpu:.2f}",
                    f"{binned.cpu / scan.cpu:.1f}",
                    more[0],
                    f"{binned.wall:.2f}",
                    f"{binned_run.peak_bytes / 1e6:.0f}",
                )
            )
            run.append(
                (
                    f"{size:,}",
                    f"{one.cpu:.2f}",
                    f"{size / one.cpu:,.0f}",
                    more[1],
                    f"{one.wall:.2f}",
                    f"{two.wall:.2f}",
                    f"{max(one_run.peak_bytes, two_run.peak_bytes) / 1e6:.0f}",
                )
            )
            path.unlink()
    measuring.show(read)
    print()
    measuring.show(run)


class _Times(NamedTuple):
    """Seconds without the start of Python."""

    wall: float
    cpu: float


def _times(found: measuring.Measured) -> _Times:
    wall, cpu = found.output.split("seconds")[-1].split()
    return _Times(float(wall), float(cpu))


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else "1000000"
    main(ROWS if asked == "week" else int(asked))
