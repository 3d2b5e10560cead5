"""Wall and CPU time of commands as a user runs them, start-up included.

    python benchmarks/commands.py

Targets: the Azure code trace in under 2 s and conv in under 4 s, exactly simulated; a what-if of
1,000 settings over conv in under 60 s; a plan for conv and code from three GPU types in under 60 s.
They are wall seconds on a machine with two free cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import measuring

COMMAND = [sys.executable, "-m", "energymodel"]
REPEATS = 3


def main() -> None:
    """Print a row for each command: best of three for short ones, once for long ones."""
    code, conv, mooncake = (measuring.trace(name) for name in ("code", "conv", "mooncake"))
    print(measuring.machine())
    rows = [("command", "wall s", "target", "CPU s", "peak MB")]
    predict = [*COMMAND, "predict", "--gpu", "a100", "--replicas", "auto", "--trace"]
    short = [
        ("--help", [*COMMAND, "--help"], 0.5),
        ("predict code, a100", [*COMMAND, "predict", "--gpu", "a100", "--trace", code], 2.0),
        ("predict conv, a100", [*COMMAND, "predict", "--gpu", "a100", "--trace", conv], 4.0),
    ]
    if mooncake is not None:
        short.append(("predict mooncake, a100, auto replicas", [*predict, mooncake], None))
    for title, command, target in short:
        rows.append(_row(title, command, target, REPEATS))
    grid = [
        *(*COMMAND, "whatif", "--trace", conv, "--gpu", "a100,h100,h200"),
        *("--stack", "vllm,vllm-eager", "--tensor-parallel", "1,2"),
        *("--max-batch", "16,32,64,128,256", "--replicas", "auto,1,2,3,4,6"),
        *("--arrival-scale", "0.5,1,2", "--ttft", "1", "--tpot", "0.05", "--top", "1"),
    ]
    rows.append(_row("whatif conv, 1,080 settings, 10 confirmed", grid, 60.0, 1))
    rows.append(_row("the same, all simulated exactly", [*grid, "--mode", "exact"], None, 1))
    plan = [
        *(*COMMAND, "plan", "--trace", f"{conv},{code}", "--stock", "h100=8,h200=8,a100=16"),
        *("--ttft", "1", "--tpot", "0.05"),
    ]
    rows.append(_row("plan conv and code, h100, h200, a100", plan, 60.0, 1))
    measuring.show(rows)


def _row(title: str, command: list[str], target: float | None, repeats: int) -> tuple[str, ...]:
    found = [measuring.run(command) for _ in range(repeats)]
    seconds = min(one.seconds for one in found)
    peak = max(one.peak_bytes for one in found)
    cpu = min(one.cpu_seconds for one in found)
    aim = "-" if target is None else f"{target:g}"
    return title, f"{seconds:.2f}", aim, f"{cpu:.2f}", f"{peak / 1e6:.0f}"


if __name__ == "__main__":
    main()
