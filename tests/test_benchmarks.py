"""The benchmarks run, say which figures hold on any machine, and `make bench` stays short."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="not in a source distribution")


def _would_run(target: str) -> str:
    command = ["make", "--no-print-directory", "-n", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_bench_runs_every_benchmark_and_the_week_only_when_asked() -> None:
    names = re.search(r"for name in ([\w ]+);", _would_run("bench"))
    assert names is not None
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert set(names[1].split()) == scripts - {"measuring", "week"}  # what the others use
    assert "week" not in _would_run("bench")
    assert "growth.py week" in _would_run("bench-week")


def test_the_growth_curve_counts_cpu_time_up_to_the_size_asked_for() -> None:
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / "growth.py"), "10000"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CPU seconds and their ratios depend little" in " ".join(run.stdout.split())
    read, simulated = (
        [re.split(r"\s{2,}", line.strip()) for line in run.stdout.splitlines() if start in line]
        for start in ("x scan", "requests/CPU s")
    )
    assert "read and estimated [CPU s]" in read[0]
    assert "simulated [CPU s]" in simulated[0]
    rows = re.findall(r"^10,000 .*$", run.stdout, re.MULTILINE)
    assert len(rows) == 2
    assert "100,000" not in run.stdout
    assert len(rows[0].split()) == len(read[0])
    assert len(rows[1].split()) == len(simulated[0])
