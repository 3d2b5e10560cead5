"""The `whatif` command: options to a grid of settings, points to a table or a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from energymodel import options
from energymodel.errors import ConfigurationError
from energymodel.specs import DEFAULT_DTYPE, DEFAULT_MODEL, DEFAULT_STACK
from energymodel.terminal import (
    check_writable,
    kept_until_done,
    user_errors,
    write_bytes,
    write_text,
)

if TYPE_CHECKING:
    from energymodel.pareto import Comparison, Targets
    from energymodel.settings import Setting
    from energymodel.sweep import Point, Workload
    from energymodel.sweep_run import PointsJournal

_LARGEST_HELD_BYTES = 400e6  # of a trace file whose requests are held in memory
_STEADY_SECONDS = 600.0  # a shorter trace is simulated: most of it is no steady state
ARRIVAL_SCALES = {"least": 1e-6, "most": 1e4}
MOST_PUE = 10.0
CACHED = {"least": 0.0, "most": 0.9999}  # share of a prompt: its last token is always computed


class SweepFormat(str, Enum):  # noqa: UP042 - typer wants the str mixin
    """How points are printed."""

    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


def whatif(
    trace: options.Trace,
    gpu: Annotated[str, typer.Option(help="GPUs, separated by commas, as all lists below.")],
    model: Annotated[str, typer.Option(help="Models.")] = DEFAULT_MODEL,
    stack: Annotated[str, typer.Option(help="Stacks.")] = DEFAULT_STACK,
    dtype: Annotated[str, typer.Option(help="Dtypes of the weights.")] = DEFAULT_DTYPE,
    kv_dtype: Annotated[str | None, typer.Option(help="Dtypes of the KV cache.")] = None,
    tensor_parallel: Annotated[str, typer.Option(help="GPUs a layer is split over.")] = "1",
    pipeline_parallel: Annotated[str, typer.Option(help="Stages.")] = "1",
    replicas: Annotated[str, typer.Option(help="Replicas; auto = the fewest.")] = "auto",
    prefill_replicas: Annotated[
        str, typer.Option(help="Replicas for prompts alone, beside --replicas that decode.")
    ] = "0",
    prefill_gpu: Annotated[
        str | None, typer.Option(help="GPUs of those.", show_default="--gpu")
    ] = None,
    max_batch: Annotated[str, typer.Option(help="Sequences in flight.")] = "256",
    max_step_tokens: Annotated[
        str | None, typer.Option(help="Tokens a step.", show_default="as vLLM")
    ] = None,
    gpu_memory_utilization: Annotated[
        str | None,
        typer.Option(
            help="Shares of a GPU's memory for weights and KV cache (vLLM 0.22: 0.92).",
            show_default="0.9",
        ),
    ] = None,
    power_limit: Annotated[
        str | None, typer.Option(help="Board power limits [W].", show_default="the GPU's own")
    ] = None,
    arrival_scale: Annotated[str, typer.Option(help="How many times faster arrivals come.")] = "1",
    prefix_hit: Annotated[
        str,
        typer.Option(help="Shares of prompt tokens in the prefix cache; trace = by its block ids."),
    ] = "0",
    pue: Annotated[str, typer.Option(help="Power usage effectiveness of the site.")] = "1",
    grid: Annotated[str | None, typer.Option(help="Grids, or their gCO2/kWh.")] = None,
    objective: options.Objective = "energy",
    ttft: options.TtftTarget = None,
    tpot: options.TpotTarget = None,
    percentile: options.TargetPercentile = "p99",
    mode: Annotated[
        str, typer.Option(help="binned (estimate, then confirm the best) or exact (simulate all).")
    ] = "binned",
    confirm: Annotated[int, typer.Option(help="Best points that are simulated exactly.")] = 10,
    compare: Annotated[
        str | None,
        typer.Option(help="Two points' numbers, e.g. 1,4: why one takes less than the other."),
    ] = None,
    price: options.Prices = None,
    top: Annotated[int, typer.Option(help="Points shown in the table.")] = 15,
    format: Annotated[SweepFormat, typer.Option(help="How to print.")] = SweepFormat.table,
    output: Annotated[
        Path | None,
        typer.Option(help="Write there; points are kept beside it until all are done."),
    ] = None,
    report: options.WebPage = None,
    backend: options.Backend = "loky",
    scheduler: options.Scheduler = None,
    jobs: options.Jobs = -1,
    max_model_len: options.LongestContext = None,
    seed: options.DrawnSeed = 0,
    trace_format: Annotated[str | None, typer.Option(help="Force the trace's format.")] = None,
    strict: Annotated[bool, typer.Option(help="Refuse traces with bad rows.")] = False,
    calibration: options.GpusCalibration = None,
) -> None:
    """Compare many settings for a trace: the best, the Pareto front, and why."""
    with user_errors():
        check_writable(output)
        if format is SweepFormat.parquet and output is None:
            raise ConfigurationError("--format parquet needs --output FILE")
        if report is not None:
            from energymodel.html_report import check_report_file  # noqa: PLC0415

            check_report_file(report, output, trace, calibration)
        from energymodel.journal import journal_path  # noqa: PLC0415
        from energymodel.pareto import Targets  # noqa: PLC0415
        from energymodel.settings import check_names, grid_of  # noqa: PLC0415
        from energymodel.sweep import MODES  # noqa: PLC0415
        from energymodel.sweep_run import BACKENDS, points_journal  # noqa: PLC0415

        targets = Targets(ttft_seconds=ttft, tpot_seconds=tpot, percentile=percentile)
        targets.check()
        one_of("mode", mode, MODES)
        one_of("objective", objective, ("energy", "cost", "carbon"))
        if scheduler is not None and backend == "loky":
            backend = "dask"
        one_of("backend", backend, BACKENDS)
        if scheduler is not None and backend != "dask":
            raise ConfigurationError("--scheduler is for --backend dask")
        axes: dict[str, Sequence[Any]] = {
            "gpu": values_of("gpu", gpu, str),
            "model": values_of("model", model, str),
            "stack": values_of("stack", stack, str),
            "dtype": values_of("dtype", dtype, str),
            "tensor_parallel": values_of("tensor-parallel", tensor_parallel, int, least=1),
            "pipeline_parallel": values_of("pipeline-parallel", pipeline_parallel, int, least=1),
            "replicas": values_of("replicas", replicas, _auto_or_int, least=1),
            "prefill_replicas": values_of("prefill-replicas", prefill_replicas, int, least=0),
            "max_batch": values_of("max-batch", max_batch, int, least=1),
            "arrival_scale": values_of("arrival-scale", arrival_scale, float, **ARRIVAL_SCALES),
            "prefix_hit": values_of("prefix-hit", prefix_hit, share_or_trace, **CACHED),
            "pue": values_of("pue", pue, float, least=1, most=MOST_PUE),
        }
        for name, text, kind, limits in (
            ("kv_dtype", kv_dtype, str, {}),
            ("prefill_gpu", prefill_gpu, str, {}),
            ("max_step_tokens", max_step_tokens, int, {"least": 1}),
            ("gpu_memory_utilization", gpu_memory_utilization, float, {"least": 0, "most": 1}),
            ("power_limit_watts", power_limit, float, {"least": 1, "most": 1e5}),
            ("grid", grid, str, {}),
        ):
            if text is not None:
                option = name.removesuffix("_watts").replace("_", "-")
                axes[name] = values_of(option, text, kind, **limits)
        settings = grid_of(axes)
        check_names(settings)
        workload = load_workload(
            trace,
            price=price,
            max_model_len=max_model_len,
            calibration=calibration,
            seed=seed,
            trace_format=trace_format,
            strict=strict,
            prefixes="trace" in axes["prefix_hit"],
        )
        if workload.requests is not None and workload.binned.duration_seconds < _STEADY_SECONDS:
            mode = "exact"
        pair = None if compare is None else _pair(compare, len(settings))
        path = journal_path(output, "points")
        journal = None if path is None else points_journal(path, workload)
        with kept_until_done(journal):
            points, comparison = _sweep(
                settings,
                workload,
                objective,
                targets,
                mode=mode,
                confirm=confirm,
                pair=pair,
                journal=journal,
                backend=backend,
                scheduler=scheduler,
                jobs=jobs,
            )
            _print_points(points, objective, targets, comparison, top, format, output)
            if report is not None:
                from energymodel.sweep_page import sweep_page  # noqa: PLC0415

                page = sweep_page(points, objective, targets, comparison, workload, top=top)
                write_text(page, report)


def _sweep(
    settings: Sequence[Setting],
    workload: Workload,
    objective: str,
    targets: Targets,
    *,
    mode: str,
    confirm: int,
    pair: tuple[int, int] | None,
    journal: PointsJournal | None,
    **where: Any,
) -> tuple[list[Point], Comparison | None]:
    """Points in the order of the settings, the best of them exact, and the comparison."""
    from energymodel.pareto import compare, ranking  # noqa: PLC0415
    from energymodel.sweep_run import run_sweep  # noqa: PLC0415

    with progress(len(settings), f"{len(settings)} settings") as report:
        points = run_sweep(settings, workload, mode=mode, journal=journal, report=report, **where)
    if mode == "binned":
        points = _confirmed(points, workload, objective, targets, confirm, journal, where)
    comparison = None
    if pair is not None:
        chosen = [settings[i] for i in pair]
        exact = run_sweep(chosen, workload, mode="exact", journal=journal, **where)
        for number, point in zip(pair, exact, strict=True):
            points[number] = point
        comparison = compare(exact[0], exact[1], workload.binned.total_requests)
    ranking(points, objective, targets)  # says early what is not known
    return points, comparison


def _confirmed(
    points: list[Point],
    workload: Workload,
    objective: str,
    targets: Targets,
    confirm: int,
    journal: PointsJournal | None,
    where: dict[str, Any],
) -> list[Point]:
    """The same points, the `confirm` best replaced by exact ones, until those are the best."""
    from energymodel.pareto import ranking  # noqa: PLC0415
    from energymodel.sweep_run import run_sweep  # noqa: PLC0415

    points = list(points)
    for _ in range(3):  # exact points may fall behind, or miss targets: look again
        best = ranking(points, objective, targets)[:confirm]
        open_numbers = [i for i in best if points[i].mode == "binned"]
        if not open_numbers:
            break
        with progress(len(open_numbers), f"confirming the best {len(open_numbers)}") as report:
            exact = run_sweep(
                [points[i].setting for i in open_numbers],
                workload,
                mode="exact",
                journal=journal,
                report=report,
                **where,
            )
        for number, point in zip(open_numbers, exact, strict=True):
            points[number] = point
    return points


def _print_points(
    points: list[Point],
    objective: str,
    targets: Targets,
    comparison: Comparison | None,
    top: int,
    form: SweepFormat,
    output: Path | None,
) -> None:
    from energymodel import sweep_report  # noqa: PLC0415

    if form is SweepFormat.parquet and output is not None:
        write_bytes(sweep_report.as_parquet(points), output)
        return
    if form is SweepFormat.csv:
        text = sweep_report.as_csv(points)
    elif form is SweepFormat.json:
        text = sweep_report.as_json(points, objective, targets, comparison)
    else:
        color = output is None and sys.stdout.isatty()
        text = sweep_report.as_tables(points, objective, targets, comparison, top=top, color=color)
    write_text(text, output)


def load_workload(
    trace: str,
    *,
    price: str | None,
    max_model_len: int | None,
    calibration: str | None,
    seed: int,
    trace_format: str | None,
    strict: bool,
    prefixes: bool = False,
) -> Workload:
    """The trace in both forms, with prices; a very large file is only binned."""
    from energymodel.prefix import with_traced_prefixes  # noqa: PLC0415
    from energymodel.prices import load_prices  # noqa: PLC0415
    from energymodel.steady_state import summarise  # noqa: PLC0415
    from energymodel.sweep import Workload  # noqa: PLC0415
    from energymodel.traces import explain_dropped, read_batches  # noqa: PLC0415
    from energymodel.workloads import load_requests  # noqa: PLC0415

    prices = load_prices(_prices(price))
    path = Path(trace)
    if trace != "-" and path.is_file() and path.stat().st_size > _LARGEST_HELD_BYTES:
        binned = summarise(read_batches(trace, trace_format=trace_format))
        requests = None
    else:
        requests = load_requests(trace, trace_format=trace_format, strict=strict, seed=seed)
        for rows in requests.dropped:
            typer.echo(f"warning: {explain_dropped(rows)}", err=True)
        if prefixes:
            requests = with_traced_prefixes(requests, trace)
        binned = summarise(requests)
    return Workload(
        binned=binned,
        requests=requests,
        output_tokens=int(binned.output_tokens.sum()),
        prices=prices,
        max_model_len=max_model_len,
        calibration=calibration,
        path=trace,
        trace_format=trace_format,
    )


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[object], None]]:
    """A bar on stderr, if that is a terminal; yields a function to call for each thing done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task)


def one_of(option: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is not one of the known ones."""
    from energymodel.errors import unknown_name  # noqa: PLC0415

    if value not in known:
        raise ConfigurationError(unknown_name(option, value, known))


def values_of(
    option: str,
    text: str,
    kind: Callable[[str], Any],
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> list[Any]:
    """Values separated by commas; numbers among them from `least` to `most`."""
    found = []
    for part in text.split(","):
        try:
            value = kind(part.strip())
        except ValueError:
            raise ConfigurationError(
                f"--{option} {text}: '{part.strip()}' is no "
                f"{'number' if kind in (int, float) else 'value'}; separate values by commas"
            ) from None
        if part.strip() == "":
            raise ConfigurationError(f"--{option} {text}: there is an empty value")
        if isinstance(value, float | int) and not least <= value <= most:
            limits = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise ConfigurationError(f"--{option} {part.strip()}: must be {limits}")
        found.append(value)
    return found


def _auto_or_int(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)


def share_or_trace(text: str) -> float | str:
    """A share of the prompts, or `trace`."""
    return "trace" if text == "trace" else float(text)


def _prices(text: str | None) -> dict[str, float]:
    prices = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        gpu, _, usd = part.partition("=")
        try:
            prices[gpu.strip()] = float(usd)
        except ValueError:
            raise ConfigurationError(
                f"--price {text}: '{part.strip()}' is not GPU=USD, e.g. h100=2.50"
            ) from None
    return prices


def _pair(text: str, count: int) -> tuple[int, int]:
    numbers = values_of("compare", text, int)
    if len(numbers) != 2 or not all(1 <= n <= count for n in numbers):
        raise ConfigurationError(
            f"--compare {text}: give two numbers of points, 1 to {count}, e.g. 1,2"
        )
    return numbers[0] - 1, numbers[1] - 1
