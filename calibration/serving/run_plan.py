"""Meters whole serving stacks: energy and time of requests served by vLLM or Transformers.

    python -m calibration.serving.run_plan --plan calibration/plans/h100.json \
        --out serving_a.jsonl --time-limit-seconds 570

One process for each engine of the plan, one after another; the next one imports its libraries
while the current one works. Each result is appended to the output as it is known and synced to
disk, so a run that is killed loses at most the case it was in. A case or an engine that fails
leaves its error as a record, and the rest goes on. How a case is metered is in `cases`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calibration.metering.host_speed import host_speed
from calibration.metering.meter import NvmlMeter
from calibration.metering.preflight import check_metered
from calibration.metering.recording import append_record
from calibration.serving.cases import described, run_cases
from calibration.serving.engine import Engine, build, clock, preload
from calibration.serving.plan import Plan, load_plan, model_config
from energymodel.errors import EnergyModelError

SCHEMA = 1
GRACE_SECONDS = 8.0
"""What an engine process gets beyond its deadline before it is ended."""


def writer(plan: Plan, index: int, out: Path) -> Callable[[dict[str, Any]], None]:
    """Appends a run's records to `out`, each with what it belongs to."""
    run = plan.runs[index]

    def write(record: dict[str, Any]) -> None:
        head = {
            "schema": SCHEMA,
            "plan": plan.name,
            "run": index,
            "model": run.model,
            "stack": run.stack,
            "unix_seconds": time.time(),
        }
        append_record(out, {**head, **record})

    return write


def record_run(
    engine: Engine,
    meter: NvmlMeter,
    plan: Plan,
    *,
    index: int,
    config: dict[str, Any],
    deadline: float,
    write: Callable[[dict[str, Any]], None],
    **more: Any,
) -> None:
    """Write the engine's record, `more` in it, and measure the run's cases."""
    run = plan.runs[index]
    write(
        {
            "kind": "engine",
            "run_plan": asdict(replace(run, cases=())),
            "config": config,
            **more,
            "settings": engine.settings(),
            "host": host_speed(),
            "identity": meter.identity(),
        }
    )
    run_cases(
        engine,
        meter,
        run,
        plan,
        vocab_size=int(config["vocab_size"]),
        deadline=deadline,
        write=write,
    )


def run_engine(plan: Plan, index: int, out: Path) -> int:
    """Run one engine of the plan in this process; waits for `go DEADLINE` on standard input."""
    run = plan.runs[index]
    write = writer(plan, index, out)
    try:
        began = clock()
        cuda_in_import = preload(run.stack)
        import_seconds = clock() - began
        words = sys.stdin.readline().split()
        if len(words) != 2:
            return 1
        deadline = float(words[1])
        began = clock()
        config = model_config(run.model)
        gpus = plan.gpu_indices
        meter = NvmlMeter(gpus, own_processes=1 if len(gpus) == 1 else 1 + len(gpus))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            engine = build(run, Path(folder), config, plan.seed)
            check_metered(meter.uuids())
            record_run(
                engine,
                meter,
                plan,
                index=index,
                config=config,
                deadline=deadline,
                write=write,
                import_seconds=import_seconds,
                cuda_in_import=cuda_in_import,
                startup_seconds=clock() - began,
            )
        write({"kind": "done", "process_seconds": clock() - began})
    except Exception as error:
        write({"kind": "error", **described(error)})
        return 1
    return 0


def run_plan(
    plan_path: Path,
    out: Path,
    time_limit_seconds: float,
    child: Sequence[str] = (sys.executable, "-m", "calibration.serving.run_plan"),
) -> int:
    """Run all engines of a plan, each in a process of its own; returns how many failed."""
    end = clock() + time_limit_seconds - GRACE_SECONDS
    plan = load_plan(plan_path)
    environment = {  # CUDA then counts as NVML does
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, plan.gpu_indices)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)

    def start(index: int) -> subprocess.Popen[str]:
        name = f"{out.stem}.{index}-{plan.runs[index].name.replace('/', '-')}.log"
        with (out.parent / name).open("ab") as log:
            return subprocess.Popen(
                [*child, "--plan", str(plan_path), "--out", str(out), "--engine", str(index)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    failed = 0
    current: subprocess.Popen[str] | None = None
    waiting: subprocess.Popen[str] | None = start(0)
    try:
        for index, run in enumerate(plan.runs):
            reserved = sum(later.budget_seconds for later in plan.runs[index + 1 :])
            deadline = max(end - reserved, min(clock() + run.budget_seconds, end))
            current = waiting
            assert current is not None and current.stdin is not None
            with suppress(BrokenPipeError):  # it died while importing; its record says why
                current.stdin.write(f"go {deadline}\n")
                current.stdin.close()
            waiting = start(index + 1) if index + 1 < len(plan.runs) else None
            print(f"{run.name}: {deadline - clock():.0f} s at most", file=sys.stderr, flush=True)
            began = clock()
            if code := _finish(current, deadline + GRACE_SECONDS - 1.0):
                failed += 1
                append_record(
                    out,
                    {
                        "schema": SCHEMA,
                        "plan": plan.name,
                        "run": index,
                        "model": run.model,
                        "stack": run.stack,
                        "kind": "exit",
                        "code": code,
                    },
                )
            text = f"{run.name}: exit {code} after {clock() - began:.0f} s"
            print(text, file=sys.stderr, flush=True)
    finally:
        for process in (current, waiting):  # an engine has a session of its own, Ctrl-C misses it
            if process is not None and process.poll() is None:
                _end(process)
    return failed


def _finish(process: subprocess.Popen[str], deadline: float) -> int:
    """Wait for a process until the deadline, then end it; returns its exit status."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline - clock()))
    _end(process)
    return process.returncode


def _end(process: subprocess.Popen[str]) -> None:
    """End a process started here and the helpers it started (its own session)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m calibration.serving.run_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, required=True, help="JSON file, see plan.py")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--time-limit-seconds", type=float, default=570.0)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.engine is None:
            return int(run_plan(options.plan, options.out, options.time_limit_seconds) > 0)
        return run_engine(load_plan(options.plan), options.engine, options.out)
    except EnergyModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the records are on disk; an engine's own teardown takes seconds
