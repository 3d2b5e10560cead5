"""The `plan` command: traces, stock and targets to a fleet."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from energymodel import options
from energymodel.errors import ConfigurationError
from energymodel.specs import DEFAULT_DTYPE, DEFAULT_MODEL
from energymodel.sweep_cli import (
    ARRIVAL_SCALES,
    CACHED,
    MOST_PUE,
    load_workload,
    one_of,
    progress,
    share_or_trace,
    values_of,
)
from energymodel.terminal import check_writable, kept_until_done, user_errors, write_text


class PlanFormat(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How a plan is printed."""

    table = "table"
    json = "json"


def plan(
    trace: Annotated[
        str, typer.Option(help="Trace files or built-in workloads, separated by commas.")
    ],
    stock: Annotated[str, typer.Option(help="GPUs there are, e.g. h100=8,a100=16.")],
    model: Annotated[
        str, typer.Option(help="Model, or one for each trace, separated by commas.")
    ] = DEFAULT_MODEL,
    ttft: options.TtftTarget = None,
    tpot: options.TpotTarget = None,
    percentile: options.TargetPercentile = "p99",
    objective: options.Objective = "energy",
    margin: Annotated[
        float, typer.Option(help="Share of each pool's replicas that may be down.")
    ] = 0.0,
    rack_watts: Annotated[
        float | None, typer.Option(help="Power a rack has for GPU boards [W].")
    ] = None,
    racks: Annotated[int | None, typer.Option(help="Racks; each holds one GPU type.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtypes to try, separated by commas.")] = DEFAULT_DTYPE,
    tensor_parallel: Annotated[str, typer.Option(help="Splits to try.")] = "1,2",
    max_batch: Annotated[str, typer.Option(help="Batch limits to try.")] = "64,256",
    gpu_memory_utilization: options.GpuMemoryUtilization = None,
    power_limit: Annotated[
        str | None,
        typer.Option(help="Board power limits to try [W].", show_default="the GPU's own"),
    ] = None,
    arrival_scale: Annotated[float, typer.Option(help="How many times faster arrivals come.")] = 1,
    prefix_hit: Annotated[
        str, typer.Option(help="Share of prompt tokens in the prefix cache; trace = by block ids.")
    ] = "0",
    pue: options.Pue = 1.0,
    grid: Annotated[str | None, typer.Option(help="Grid, or its gCO2/kWh.")] = None,
    price: options.Prices = None,
    scale_every: Annotated[
        float | None, typer.Option(help="Also change replicas this often \\[s], e.g. 3600.")
    ] = None,
    park: Annotated[
        str, typer.Option(help="GPUs not needed are off, cold (no process) or context.")
    ] = "cold",
    format: Annotated[PlanFormat, typer.Option(help="How to print.")] = PlanFormat.table,
    output: Annotated[
        Path | None,
        typer.Option(help="Write there; searches are kept beside it until all is done."),
    ] = None,
    report: options.WebPage = None,
    backend: options.Backend = "loky",
    scheduler: options.Scheduler = None,
    jobs: options.Jobs = -1,
    max_model_len: options.LongestContext = None,
    seed: options.DrawnSeed = 0,
    trace_format: Annotated[str | None, typer.Option(help="Force the traces' format.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse traces with bad rows.")] = False,
    calibration: options.GpusCalibration = None,
) -> None:
    """Find the fleet of least energy, cost or carbon that serves traces within latency targets."""
    with user_errors():
        check_writable(output)
        if report is not None:
            from energymodel.html_report import check_report_file  # noqa: PLC0415

            check_report_file(report, output, calibration, *trace.split(","))
        from energymodel import plan_report  # noqa: PLC0415
        from energymodel.fleet_plan import make_plan  # noqa: PLC0415
        from energymodel.journal import journal_path  # noqa: PLC0415
        from energymodel.models import load_model  # noqa: PLC0415
        from energymodel.pareto import OBJECTIVES, Targets  # noqa: PLC0415
        from energymodel.plan_candidates import Demand, search_journal  # noqa: PLC0415
        from energymodel.plan_scaling import PARKED, ScaledPool, scale  # noqa: PLC0415
        from energymodel.planning import Stock  # noqa: PLC0415
        from energymodel.settings import check_names, grid_of  # noqa: PLC0415
        from energymodel.sweep_run import BACKENDS  # noqa: PLC0415

        one_of("objective", objective, OBJECTIVES)
        one_of("park", park, PARKED)
        if scheduler is not None and backend == "loky":
            backend = "dask"
        one_of("backend", backend, BACKENDS)
        targets = Targets(ttft_seconds=ttft, tpot_seconds=tpot, percentile=percentile)
        there = Stock(gpus=_stock(stock), rack_watts=rack_watts, racks=racks)
        there.check()
        targets.check()
        axes: dict[str, Any] = {
            "gpu": [gpu for gpu, count in there.gpus.items() if count],
            "dtype": values_of("dtype", dtype, str),
            "tensor_parallel": values_of("tensor-parallel", tensor_parallel, int, least=1),
            "max_batch": values_of("max-batch", max_batch, int, least=1),
            "arrival_scale": values_of(
                "arrival-scale", str(arrival_scale), float, **ARRIVAL_SCALES
            ),
            "prefix_hit": values_of("prefix-hit", prefix_hit, share_or_trace, **CACHED)[:1],
            "pue": values_of("pue", str(pue), float, least=1, most=MOST_PUE),
        }
        if gpu_memory_utilization is not None:
            axes["gpu_memory_utilization"] = [gpu_memory_utilization]
        if power_limit is not None:
            axes["power_limit_watts"] = values_of(
                "power-limit", power_limit, float, least=1, most=1e5
            )
        if grid is not None:
            axes["grid"] = [grid]
        settings = grid_of(axes)
        check_names(settings)
        traces = values_of("trace", trace, str)
        models = values_of("model", model, str)
        if len(models) not in (1, len(traces)):
            raise ConfigurationError(
                f"--model names {len(models)} models for {len(traces)} traces; give one, or one "
                "for each trace"
            )
        models *= len(traces) // len(models)
        for name in models:
            load_model(name)
        demands: list[Demand] = []
        for name, served_by in zip(traces, models, strict=True):
            workload = load_workload(
                name,
                price=price,
                max_model_len=max_model_len,
                calibration=calibration,
                seed=seed,
                trace_format=trace_format,
                strict=strict,
                prefixes=prefix_hit == "trace",
            )
            if workload.requests is None:
                raise ConfigurationError(
                    f"{name} is too large to plan for at once; plan for a typical day of it"
                )
            if workload.binned.duration_seconds == 0.0:
                raise ConfigurationError(
                    f"{name}: all requests arrive at once, so there is no load that a fleet has to "
                    "keep up with. Give a trace with times of arrival; for a batch job, compare "
                    f"what settings take: energymodel whatif --trace {name} "
                    f"--gpu {','.join(there.gpus)} --replicas 1,2,4"
                )
            same = sum(demand.workload.binned.name == workload.binned.name for demand in demands)
            title = workload.binned.name + (f" ({same + 1})" if same else "")
            demands.append(Demand(name=title, model=served_by, workload=workload))
        where = {"backend": backend, "scheduler": scheduler, "jobs": jobs}
        path = journal_path(output, "searches")
        journal = None if path is None else search_journal(path, demands, targets, margin)
        with kept_until_done(journal):
            with progress(len(settings) * len(demands), "simulating candidates") as done:
                found = make_plan(
                    demands,
                    settings,
                    there,
                    targets,
                    objective=objective,
                    margin=margin,
                    journal=journal,
                    report=done,
                    **where,
                )
            scaling = None
            if scale_every is not None and found.feasible:
                names = [demand.name for demand in demands]
                pools = [
                    ScaledPool(
                        demand=names.index(pool.demand),
                        setting=pool.point.setting,
                        share=pool.share,
                        first=pool.first,
                    )
                    for pool in found.pools
                ]
                scaling = scale(
                    pools,
                    [demand.workload for demand in demands],
                    targets,
                    period_seconds=scale_every,
                    parked=park,
                    **where,
                )
            if format is PlanFormat.json:
                text = plan_report.as_json(found, scaling)
            else:
                color = output is None and sys.stdout.isatty()
                text = plan_report.as_tables(found, scaling, color=color)
            write_text(text, output)
            if report is not None:
                from energymodel.plan_page import plan_page  # noqa: PLC0415

                write_text(plan_page(found, scaling, demands, there, margin=margin), report)


def _stock(text: str) -> dict[str, int]:
    from energymodel.gpus import load_gpu  # noqa: PLC0415

    stock: dict[str, int] = {}
    for part in text.split(","):
        if not part.strip():
            continue
        gpu, _, count = part.partition("=")
        try:
            number = int(count)
        except ValueError:
            raise ConfigurationError(
                f"--stock {text}: '{part.strip()}' is not GPU=COUNT, e.g. h100=8"
            ) from None
        name = load_gpu(gpu.strip()).name
        if name in stock:
            raise ConfigurationError(f"--stock {text}: names {name} twice")
        stock[name] = number
    return stock
