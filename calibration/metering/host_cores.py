"""Times a Python loop on every core of the host, one after another.

    python -m calibration.metering.host_cores --out cores.jsonl

A host whose cores other work shares is fast on some and slow on others at the same moment
(docs/residuals.md). One JSON object a round over the cores; a second altogether. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calibration.metering.recording import append_record

_STEPS = 20_000
_REPEATS = 3
_ROUNDS = 3


def core_seconds(cores: Sequence[int]) -> list[float]:
    """Time of a step of the loop on each core, the least of three repeats [s]."""
    allowed = os.sched_getaffinity(0)
    try:
        found = []
        for core in cores:
            os.sched_setaffinity(0, {core})
            found.append(min(_loop() for _ in range(_REPEATS)) / _STEPS)
        return found
    finally:
        os.sched_setaffinity(0, allowed)


def _loop() -> float:
    started, total = time.perf_counter(), 0
    for i in range(_STEPS):
        total += i
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.metering.host_cores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    for _ in range(_ROUNDS):
        found = {"kind": "cores", "unix_seconds": time.time(), "cores": cores}
        append_record(options.out, {**found, "loop_step_seconds": core_seconds(cores)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
