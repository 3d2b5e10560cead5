"""What the benchmarks share: the real traces where they are, and peak memory of a child process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces"
"""The published traces, beside the checkout; the built-in workloads stand in where they are not."""


def trace(name: str) -> str | None:
    """`code`, `conv` or `mooncake`: the published file, else a built-in workload, else None."""
    files = {
        "code": "azure_llm_2023_code.csv",
        "conv": "azure_llm_2023_conv.csv",
        "mooncake": "mooncake_conversation.csv",
    }
    path = TRACES / files[name]
    if path.is_file():
        return str(path)
    return {"code": "azure_code", "conv": "azure_conv"}.get(name)


@dataclass(frozen=True)
class Measured:
    """A command's wall and CPU time [s], peak resident memory [B] and output."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    output: str


def run(command: list[str]) -> Measured:
    """Run a command to its end; RuntimeError with its stderr if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    output = process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{errors.decode()}")
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(seconds, cpu, usage.ru_maxrss * 1024.0, output.decode())


def python(code: str, *arguments: str) -> Measured:
    """Run Python code in a process of its own, so that its memory is its own."""
    return run([sys.executable, "-c", code, *arguments])


def machine() -> str:
    """Cores and load, and which figures depend on them."""
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; CPU seconds and "
        "their ratios depend little on other work, wall seconds do"
    )


def show(rows: list[tuple[str, ...]]) -> None:
    """Print rows in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
