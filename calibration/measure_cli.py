"""The `measure` command: meters whole serving stacks, and says how far the prediction is off."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from energymodel.terminal import print_text, user_errors


class MeasuredStack(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """Stacks that can be measured."""

    vllm = "vllm"
    vllm_eager = "vllm-eager"
    transformers = "transformers"
    transformers_compile = "transformers-compile"


class MeasuredArrivals(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """When a trace's requests arrive."""

    trace = "trace"
    offline = "offline"


def measure(
    model: Annotated[
        str | None, typer.Option(help="Bundled name, a config.json or a folder with one.")
    ] = None,
    stack: Annotated[MeasuredStack, typer.Option(help="What serves it.")] = MeasuredStack.vllm,
    gpu: Annotated[
        list[int] | None,
        typer.Option(
            help="GPU, as nvidia-smi numbers it; twice: split over two.", show_default="0"
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Static batches: sizes, e.g. 1,8,64.")] = "",
    input: Annotated[str, typer.Option(help="Their input tokens, e.g. 128,2048.")] = "128",
    output: Annotated[str, typer.Option(help="Their output tokens.")] = "128",
    trace: Annotated[
        str | None,
        typer.Option(help="Trace or built-in workload: replayed, or --steady's lengths."),
    ] = None,
    arrivals: Annotated[
        MeasuredArrivals, typer.Option(help="trace (at its own times) or offline (all at once).")
    ] = MeasuredArrivals.trace,
    speed: Annotated[float, typer.Option(help="How many times faster they arrive.")] = 1.0,
    first: Annotated[int, typer.Option(help="Requests of the trace to use; 0 = all.")] = 0,
    steady: Annotated[
        str, typer.Option(help="Steady states: sequences always running, e.g. 32,128.")
    ] = "",
    steady_seconds: Annotated[float, typer.Option(help="How long each is metered.")] = 20.0,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Argument of vLLM's LLM class, NAME=VALUE; with --url, the server's."),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan file (JSON) in place of all options above.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Running OpenAI-compatible server on this GPU to measure.")
    ] = None,
    tracker: Annotated[
        str | None, typer.Option(help="codecarbon: let it meter the same runs, and compare.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets plan.json and serving.jsonl.")] = Path(
        "serving-runs"
    ),
    window_seconds: Annotated[
        float, typer.Option(help="A short batch is repeated until it has lasted so long.")
    ] = 2.5,
    time_limit_seconds: Annotated[float, typer.Option(help="Stop in time.")] = 1800.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the plan and stop.")] = False,
) -> None:
    """Measure a serving stack on this machine's GPU: random weights, no download.

    Joules and seconds of static batches, trace replays and steady states, each beside its
    prediction. `fit` and `validate --own` take the records.
    """
    with user_errors():
        from calibration.serving import measure as measure_runs  # noqa: PLC0415

        if plan is None:
            options = measure_runs.Options(
                model=model,
                stack=stack.value,
                gpus=tuple(gpu or (0,)),
                batch=batch,
                input_tokens=input,
                output_tokens=output,
                trace=trace,
                arrivals=arrivals.value,
                speed=speed,
                first=first,
                steady=steady,
                steady_seconds=steady_seconds,
                engine=tuple(engine or ()),
                tracker=tracker,
                window_seconds=window_seconds,
            )
            plan = measure_runs.write_plan(options, out, is_server=url is not None)
        if dry_run:
            print_text(measure_runs.list_cases(plan))
            return
        records = out / "serving.jsonl"
        before = records.stat().st_size if records.is_file() else 0
        failed = 0
        if url is None:
            failed = measure_runs.run_engines(plan, records, time_limit_seconds)
        else:
            measure_runs.run_server(plan, records, url, time_limit_seconds)
        text, measured = measure_runs.table(records, before)
        print_text(text)
        typer.echo(f"Records: {records}. They are what `energymodel fit` takes.", err=True)
        if failed:
            typer.echo(f"{failed} engine(s) failed; see the .log files in {out}", err=True)
        if failed or not measured:
            raise typer.Exit(1)
