"""Points of a sweep as one web page: the Pareto front, the ranking, and why one beats another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from energymodel import plots, sweep_report
from energymodel.gpus import load_gpu
from energymodel.grids import load_grid_intensity
from energymodel.html_report import Chart, html_page
from energymodel.pareto import (
    Comparison,
    Targets,
    criteria,
    differing_axes,
    pareto_front,
    ranking,
)
from energymodel.report import COMPONENTS, usd_text
from energymodel.settings import AXES, Setting, in_words
from energymodel.sweep import Point, Workload
from energymodel.traces import explain_dropped

_ALWAYS_SAID = ("gpu", "model", "stack", "dtype")
_MOST_BY_COMPONENT = 6
_MOST_REASONS = 10
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT"}


def sweep_page(
    points: Sequence[Point],
    objective: str,
    targets: Targets,
    comparison: Comparison | None,
    workload: Workload,
    *,
    top: int,
) -> str:
    """The page of `whatif --report`; the JSON in it is that of `--format json`.

    Parameters
    ----------
    points, objective, targets, comparison : as `sweep_report.as_json` takes them
    workload : that the points serve
    top : points of the ranking that show without a click

    Raises
    ------
    EnergyModelError
        If a library is missing.
    """
    order = ranking(points, objective, targets)
    axes = [name for name in differing_axes(points) if name != "replicas"]
    usual = Setting(gpu="")
    same = [
        name
        for name in AXES
        if name not in axes
        and name != "replicas"
        and (name in _ALWAYS_SAID or getattr(points[0].setting, name) != getattr(usual, name))
    ]
    names = [_name(number, point, axes) for number, point in enumerate(points, start=1)]
    by_component = [i for i in order if points[i].by_component_joules][:_MOST_BY_COMPONENT]
    compared = [] if comparison is None else [comparison.first, comparison.second]
    pair = [_place(points, point) for point in compared]
    return html_page(
        "sweep.html",
        sweep_report.as_json(points, objective, targets, comparison),
        _charts(points, names, targets, by_component, pair),
        trace=workload.binned.name,
        requests=workload.binned.total_requests,
        output_tokens=workload.output_tokens,
        same=in_words(points[0].setting, same),
        names=names,
        words=[_words(point, axes) for point in points],
        order=order,
        top=top,
        front=pareto_front(criteria(points)),
        missed={
            i: targets.missed(point.ttft_seconds, point.tpot_seconds)
            for i, point in enumerate(points)
            if point.served and i not in set(order)
        },
        refused=sweep_report.refused(points)[:_MOST_REASONS],
        by_component=by_component,
        pair=pair,
        components={
            name: meaning
            for name, meaning in COMPONENTS.items()
            if any(points[i].by_component_joules.get(name) for i in by_component)
        },
        percentile=targets.percentile,
        targets=targets,
        basis=basis(points, [workload]),
        warnings=trace_warnings([workload]),
    )


def _charts(
    points: Sequence[Point],
    names: Sequence[str],
    targets: Targets,
    by_component: Sequence[int],
    pair: Sequence[int],
) -> dict[str, Chart]:
    charts = {}
    for key, latency in _LATENCIES.items():
        of, target = targets.percentile, getattr(targets, f"{key}_seconds")
        served = [
            i
            for i, point in enumerate(points)
            if point.served and getattr(point, f"{key}_seconds").get(of, 0.0) > 0.0
        ]
        if not served:
            continue
        joules = np.array([points[i].joules_per_request for i in served], float)
        seconds = np.array([getattr(points[i], f"{key}_seconds")[of] for i in served])
        draw = partial(
            plots.pareto,
            joules,
            seconds,
            [names[i] for i in served],
            pareto_front(np.column_stack([joules, seconds])),
            latency=f"{latency} {of}",
            marks=[str(i + 1) for i in served],
            target_seconds=target,
        )
        charts[key] = Chart(draw=draw, label=f"Energy per request against {latency} {of}")
    for key, chosen in (("components", by_component), ("comparison", pair)):
        if chosen:
            draw = partial(
                plots.energy_by_component,
                [names[i] for i in chosen],
                [_per_request(points[i]) for i in chosen],
                of="energy per request [J]",
            )
            charts[key] = Chart(draw=draw, label="Energy per request by component")
    return charts


def _per_request(point: Point) -> dict[str, float]:
    """Energy of a request by component [J]."""
    assert point.energy_joules
    assert point.joules_per_request is not None
    share = point.joules_per_request / point.energy_joules
    return {name: joules * share for name, joules in point.by_component_joules.items()}


def _words(point: Point, axes: Sequence[str]) -> str:
    words = in_words(point.setting, axes)
    if point.replicas is None:
        return words
    replicas = f"{point.replicas} replica{'' if point.replicas == 1 else 's'}"
    return f"{words}, {replicas}" if words else replicas


def _name(number: int, point: Point, axes: Sequence[str]) -> str:
    return f"{number}: {_words(point, axes)}"


def _place(points: Sequence[Point], wanted: Point) -> int:
    return next(i for i, point in enumerate(points) if point.setting == wanted.setting)


def basis(points: Sequence[Point], workloads: Sequence[Workload]) -> dict[str, str]:
    """What energies, rents and carbon rest on, for the last part of a page."""
    found = {"trace": ", ".join(workload.path or workload.binned.name for workload in workloads)}
    served = [point for point in points if point.served]
    for gpu in dict.fromkeys(point.setting.gpu for point in served):
        origins = dict.fromkeys(point.origin for point in served if point.setting.gpu == gpu)
        found[f"parameters of {gpu}"] = ", ".join(origins)
    rented = [gpu for p in served for gpu in (p.setting.gpu, p.setting.prefill_gpu) if gpu]
    for gpu in dict.fromkeys(rented):
        price = workloads[0].prices.get(load_gpu(gpu).name)
        found[f"rent of {gpu}"] = (
            "not known; give it with --price"
            if price is None
            else f"{usd_text(price)} per GPU and hour, as given or listed in profiles/prices.csv"
        )
    for name in dict.fromkeys(point.setting.grid for point in points):
        if name is not None:
            grid = load_grid_intensity(name)
            found[f"grid {name}"] = f"{grid.grams_per_kwh:g} gCO2e/kWh ({grid.source})"
    for pue in dict.fromkeys(point.setting.pue for point in points):
        found["PUE"] = f"{found['PUE']}, {pue:g}" if "PUE" in found else f"{pue:g}"
    if workloads[0].calibration is not None:
        found["calibration"] = workloads[0].calibration
    return found


def trace_warnings(workloads: Iterable[Workload]) -> list[str]:
    """Rows of the traces that could not be used."""
    return [
        explain_dropped(rows)
        for workload in workloads
        if workload.requests is not None
        for rows in workload.requests.dropped
    ]
