"""Command line: parse, call the public function, print. Exit code 2 for bad input."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from calibration.calibrate_cli import calibrate
from calibration.fit_cli import fit
from calibration.measure_cli import measure
from energymodel import __version__, options
from energymodel.errors import ConfigurationError
from energymodel.plan_cli import plan
from energymodel.specs import DEFAULT_DTYPE, DEFAULT_MAX_BATCH, DEFAULT_MODEL, DEFAULT_STACK
from energymodel.sweep_cli import whatif
from energymodel.terminal import (
    check_writable,
    in_color,
    print_text,
    user_errors,
    write_bytes,
    write_text,
)

app = typer.Typer(
    name="energymodel",
    help="How many joules does this LLM workload cost, on this GPU, with this serving stack?",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
trace_app = typer.Typer(help="Look at request traces.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")


class OutputFormat(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How a result is printed."""

    table = "table"
    json = "json"
    csv = "csv"


class TableOrJson(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How a report of few numbers is printed."""

    table = "table"
    json = "json"


class PredictionFormat(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How a prediction is printed; csv and parquet hold its bins."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"energymodel {__version__}")
        raise typer.Exit


class FindingsFormat(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How the paper's findings are printed."""

    table = "table"
    json = "json"
    markdown = "markdown"


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def predict(
    trace: options.Trace,
    gpu: Annotated[str, typer.Option(help="GPU name, alias or data file.")],
    model: Annotated[
        str, typer.Option(help="Bundled name, config.json, a folder with one, or a cached hub id.")
    ] = DEFAULT_MODEL,
    stack: Annotated[
        str, typer.Option(help="vllm, vllm-eager, transformers or transformers-compile.")
    ] = DEFAULT_STACK,
    arrivals: Annotated[
        str, typer.Option(help="trace, offline (all at time 0) or poisson:RATE in requests/s.")
    ] = "trace",
    prefix_hit: Annotated[
        str,
        typer.Option(help="Share of prompt tokens in the prefix cache; trace = by its block ids."),
    ] = "0",
    replicas: Annotated[
        str, typer.Option(help="Model instances, or auto for the fewest that keep up.")
    ] = "1",
    tensor_parallel: Annotated[int, typer.Option(help="GPUs a layer is split over.")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Stages the layers are split into.")] = 1,
    max_batch: Annotated[
        int, typer.Option(help="Sequences in flight (vLLM max_num_seqs).")
    ] = DEFAULT_MAX_BATCH,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens a step (vLLM max_num_batched_tokens).", show_default="vLLM's for the GPU"
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest context served.", show_default="the model's")
    ] = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    dtype: Annotated[
        str, typer.Option(help="Weights: bf16, fp16, fp8, int8, int4, mxfp4, fp32.")
    ] = DEFAULT_DTYPE,
    kv_dtype: Annotated[
        str | None, typer.Option(help="KV cache: bf16, fp16 or fp8.", show_default="bf16")
    ] = None,
    decoding: Annotated[
        str,
        typer.Option(
            help="greedy, sampling (top-p), sampling-sorted (top-p as vLLM up to 0.11 draws), or "
            "beam:N with --stack transformers."
        ),
    ] = "greedy",
    draft_model: Annotated[
        str | None, typer.Option(help="Model that drafts tokens, named as --model is.")
    ] = None,
    draft_tokens: Annotated[int | None, typer.Option(help="Tokens that it drafts a round.")] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="Probability that a drafted token is accepted.")
    ] = None,
    binning: Annotated[str, typer.Option(help="exact, or paper for its ceiling bins.")] = "exact",
    pue: options.Pue = 1.0,
    grid: Annotated[
        str | None, typer.Option(help="Country, or carbon intensity in gCO2e/kWh.")
    ] = None,
    electricity_price: Annotated[
        str | None, typer.Option(help="US state, or price of electricity in USD/kWh.")
    ] = None,
    format: Annotated[
        PredictionFormat, typer.Option(help="How to print; csv and parquet hold the bins.")
    ] = PredictionFormat.table,
    output: options.Output = None,
    seed: Annotated[int, typer.Option(help="Seed of drawn workloads and Poisson arrivals.")] = 0,
    trace_format: options.TraceFormat = None,
    strict: options.Strict = False,
    host_ratio: Annotated[
        float,
        typer.Option(help="Host times over those of the calibration's machines (see doctor)."),
    ] = 1.0,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration file in place of the GPU's own.")
    ] = None,
    emissions: Annotated[
        Path | None, typer.Option(help="Also append a row to this emissions.csv (CodeCarbon's).")
    ] = None,
    report: options.WebPage = None,
) -> None:
    """Predict the energy of serving a request trace.

    `energymodel known` lists GPUs, models, workloads and grids.
    """
    with user_errors():
        check_writable(output, trace, gpu, model, calibration)
        if format is PredictionFormat.parquet and output is None:
            raise ConfigurationError("--format parquet needs --output FILE")
        from energymodel.emissions import check_emissions_file  # noqa: PLC0415
        from energymodel.report import parquet_bytes, render  # noqa: PLC0415
        from energymodel.workload import predict as run  # noqa: PLC0415

        check_emissions_file(emissions, output, trace, gpu, model, calibration)
        if report is not None:
            from energymodel.html_report import check_report_file  # noqa: PLC0415
            from energymodel.prediction_page import prediction_page  # noqa: PLC0415

            check_report_file(report, output, emissions, trace, gpu, model, calibration)
        result = run(
            trace,
            gpu=gpu,
            model=model,
            stack=stack,
            arrivals=arrivals,
            prefix_hit=prefix_hit,
            replicas=replicas,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            dtype=dtype,
            kv_dtype=kv_dtype,
            decoding=decoding,
            draft_model=draft_model,
            draft_tokens=draft_tokens,
            acceptance=acceptance,
            binning=binning,
            pue=pue,
            grid=grid,
            electricity_price=electricity_price,
            seed=seed,
            trace_format=trace_format,
            strict=strict,
            host_ratio=host_ratio,
            calibration=calibration,
        )
        if format is not PredictionFormat.table or output is not None:  # a table shows its warnings
            for warning in result.warnings:
                typer.echo(f"warning: {warning}", err=True)
        if format is PredictionFormat.parquet and output is not None:
            write_bytes(parquet_bytes(result), output)
        else:
            write_text(render(result, format.value, color=in_color(output)), output)
        if report is not None:
            write_text(prediction_page(result), report)
        if emissions is not None:  # last: an appended row cannot be taken back
            from energymodel.emissions import append_emissions, emissions_row  # noqa: PLC0415
            from energymodel.grids import load_grid_intensity  # noqa: PLC0415

            place = None if grid is None else load_grid_intensity(grid)
            append_emissions(emissions_row(result, place), emissions)


@trace_app.command("describe")
def trace_describe(
    file: Annotated[str, typer.Argument(help="Trace file, `-`, or a built-in workload's name.")],
    format: Annotated[
        OutputFormat, typer.Option(help="How to print; csv holds the bins.")
    ] = OutputFormat.table,
    output: options.Output = None,
    trace_format: options.TraceFormat = None,
    strict: options.Strict = False,
    seed: options.DrawnSeed = 0,
) -> None:
    """Show a trace's statistics, bins and histograms."""
    with user_errors():
        check_writable(output, file)
        from energymodel.trace_cli import render_description  # noqa: PLC0415
        from energymodel.workloads import load_requests  # noqa: PLC0415

        requests = load_requests(file, trace_format=trace_format, strict=strict, seed=seed)
        color = in_color(output)
        write_text(render_description(requests, format.value, color=color), output)


app.command()(whatif)
app.command()(plan)
app.command()(calibrate)
app.command()(fit)
app.command()(measure)


@app.command()
def known() -> None:
    """List the GPUs, models, stacks, workloads and grids known by name."""
    with user_errors():
        from energymodel.known import render_known  # noqa: PLC0415

        print_text(render_known(color=in_color()))


@app.command()
def doctor(
    format: Annotated[TableOrJson, typer.Option(help="How to print.")] = TableOrJson.table,
) -> None:
    """Say what is installed, which GPUs and calibrations there are, and what is missing."""
    with user_errors():
        from calibration.metering.boards import find_boards  # noqa: PLC0415
        from calibration.metering.host_speed import python_step_seconds  # noqa: PLC0415
        from energymodel.doctor import diagnose, render_diagnosis  # noqa: PLC0415

        diagnosis = diagnose(find_boards(), python_step_seconds())
        if format is TableOrJson.json:
            print_text(json.dumps(diagnosis.to_dict(), indent=2))
        else:
            print_text(render_diagnosis(diagnosis, color=in_color()))


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="result, points, plan, calibration or gpu.")],
    output: options.Output = None,
) -> None:
    """Print the JSON schema of a file format."""
    with user_errors():
        check_writable(output)
        from energymodel.schemas import json_schema  # noqa: PLC0415

        write_text(json.dumps(json_schema(name), indent=2), output)


@app.command()
def validate(
    public: Annotated[
        Path | None,
        typer.Option(help="Folder of measurements that others published.", show_default="none"),
    ] = None,
    own: Annotated[
        Path | None, typer.Option(help="Folder of serving records.", show_default="those that ship")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a web page to this .html file, or validation.md and .png into this folder."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 if an error exceeds its recorded level.")
    ] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Record today's error levels for --check.")
    ] = False,
    format: Annotated[OutputFormat, typer.Option(help="table or json.")] = OutputFormat.table,
) -> None:
    """Compare predictions with measurements, and say how wrong they are."""
    with user_errors():
        from calibration.validation.report import run  # noqa: PLC0415

        if format is OutputFormat.csv:
            raise ConfigurationError("--format csv: rows are in --format json or a --report")
        for folder, option in ((public, "--public"), (own, "--own")):
            if folder is not None and not folder.is_dir():
                raise ConfigurationError(f"{option} {folder}: is no folder")
        as_json = format is OutputFormat.json
        color = in_color()
        text, failures = run(
            public=public,
            own=own,
            report=report,
            check=check,
            record=record,
            as_json=as_json,
            color=color,
        )
        typer.echo(text)
        for failure in failures:
            typer.echo(f"worse than recorded: {failure}", err=True)
        if failures:
            raise typer.Exit(1)


@app.command()
def reproduce(
    format: Annotated[
        FindingsFormat, typer.Option(help="How to print; markdown is the whole page.")
    ] = FindingsFormat.table,
    output: options.Output = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the findings into this .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Set every finding of the paper beside our prediction and our measurement."""
    with user_errors():
        from calibration.validation.paper_measurements import measured_findings  # noqa: PLC0415
        from energymodel.finding_plots import check_figure_file, paper_findings  # noqa: PLC0415
        from energymodel.reproduce import reproduce as run  # noqa: PLC0415
        from energymodel.reproduce_report import figure_address, render  # noqa: PLC0415

        check_writable(output)
        if figure is not None:
            check_writable(figure, option="--figure")
            check_figure_file(figure)
        result = run(measured_findings())
        address = None if figure is None else figure_address(figure, output)
        write_text(render(result, format.value, address, color=in_color(output)), output)
        if figure is not None:
            paper_findings(result.rows).savefig(figure)


def main() -> None:
    """Entry point of the `energymodel` command."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    app()


if __name__ == "__main__":
    main()
