"""The `calibrate` command: measures the kernel suite on this machine's GPU."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from energymodel.terminal import print_text, user_errors

if TYPE_CHECKING:
    from calibration.kernels.collect import Outcome, Progress

_TIME_LIMIT_SECONDS = {"quick": 180.0, "full": 540.0}
_LEAST_SECONDS_TO_RESTART = 30.0


class Suite(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """Which cases are measured."""

    quick = "quick"
    full = "full"


def calibrate(
    gpu: Annotated[
        list[int] | None,
        typer.Option(
            help="GPU, as nvidia-smi numbers it; twice for an all-reduce.", show_default="0"
        ),
    ] = None,
    suite: Annotated[
        Suite, typer.Option(help="quick (3 minutes) or full (9 minutes).")
    ] = Suite.full,
    out: Annotated[
        Path, typer.Option(help="Folder that gets windows.jsonl and its summary.")
    ] = Path("calibration-windows"),
    time_limit_seconds: Annotated[
        float | None,
        typer.Option(help="Stop in time.", show_default="180 for quick, 540 for full"),
    ] = None,
    window_seconds: Annotated[float, typer.Option(help="Length of a window.")] = 1.2,
    preheat_seconds: Annotated[float, typer.Option(help="Heavy load before the first.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Seed of the order of cases.")] = 0,
    vllm: Annotated[
        bool, typer.Option("--vllm/--no-vllm", help="Use vLLM's kernels where it is installed.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases and stop.")] = False,
) -> None:
    """Measure what kernels cost on this machine's GPU; `fit` makes a calibration of it.

    Each window is on disk before the next case starts. The same command goes on where a run
    was stopped, killed, or out of time.
    """
    began = time.monotonic()
    limit = _TIME_LIMIT_SECONDS[suite.value] if time_limit_seconds is None else time_limit_seconds
    gpus = tuple(gpu or (0,))
    with user_errors():
        from calibration.kernels import collect  # noqa: PLC0415

        if dry_run:
            print_text(collect.list_cases(suite.value, window_seconds, seed, len(gpus)))
            return
        try:
            with _progress() as progress:
                outcome = collect.calibrate(
                    gpus,
                    suite.value,
                    out,
                    window_seconds=window_seconds,
                    time_limit_seconds=limit,
                    seed=seed,
                    preheat_seconds=preheat_seconds,
                    use_vllm=vllm,
                    progress=progress,
                )
        except collect.ContextLostError as error:
            left = limit - (time.monotonic() - began)
            if left < _LEAST_SECONDS_TO_RESTART:
                raise
            typer.echo(f"warning: {error}; started again", err=True)
            os.execv(
                sys.executable,
                [
                    *(sys.executable, "-m", "energymodel", "calibrate"),
                    *(f"--gpu={index}" for index in gpus),
                    f"--suite={suite.value}",
                    f"--out={out}",
                    f"--time-limit-seconds={left:.1f}",
                    f"--window-seconds={window_seconds}",
                    f"--preheat-seconds={preheat_seconds}",
                    f"--seed={seed}",
                    "--vllm" if vllm else "--no-vllm",
                ],
            )
        except KeyboardInterrupt:
            typer.echo("stopped; what was measured is kept, the same command goes on", err=True)
            raise typer.Exit(130) from None
        _report(outcome)


def _report(outcome: Outcome) -> None:
    """Print what was done, what to do next, and the summary page."""
    from calibration.kernels.summary import write_summary  # noqa: PLC0415

    typer.echo(
        f"{outcome.measured} valid windows, {outcome.invalid} invalid, {outcome.failed} failed, "
        f"{outcome.skipped} skipped, {outcome.left} left by the time limit, in "
        f"{outcome.wall_seconds:.0f} s: {outcome.path}",
        err=True,
    )
    page = write_summary(outcome.path)
    print_text(page.read_text(encoding="utf-8"))
    if outcome.left:
        typer.echo(f"{outcome.left} case(s) are left: run the same command again", err=True)
    typer.echo(f"This page is {page}. Next: energymodel fit {outcome.path}", err=True)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; drawn between cases only, to leave the host alone."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_progress
        return
    with Bar(console=console, auto_refresh=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, name: str, seconds_left: float) -> None:
            text = f"{name} ({seconds_left:.0f} s left)"
            bar.update(task, completed=done, total=total, description=text, refresh=True)

        yield show


def _print_progress(done: int, total: int, name: str, seconds_left: float) -> None:
    typer.echo(f"[{done + 1:3d}/{total}] {seconds_left:4.0f} s left  {name}", err=True)
