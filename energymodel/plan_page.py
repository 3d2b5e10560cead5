"""A plan as one web page: the fleet, what binds, latency against targets, replicas by time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from energymodel import plan_report, plots
from energymodel.fleet_plan import Plan, Pool
from energymodel.html_report import Chart, html_page
from energymodel.plan_candidates import Demand
from energymodel.plan_scaling import Scaling
from energymodel.planning import Stock
from energymodel.report import COMPONENTS
from energymodel.settings import in_words
from energymodel.sweep_page import basis, trace_warnings

_SHOWN = ("gpu", "tensor_parallel", "dtype", "max_batch", "power_limit_watts")


def plan_page(
    plan: Plan,
    scaling: Scaling | None,
    demands: Sequence[Demand],
    stock: Stock,
    *,
    margin: float,
) -> str:
    """The page of `plan --report`; the JSON in it is that of `--format json`.

    Parameters
    ----------
    plan, scaling : as `plan_report.as_json` takes them
    demands, stock, margin : that the plan was made for

    Raises
    ------
    EnergyModelError
        If a library is missing.
    """
    names = [_name(pool) for pool in plan.pools]
    workloads = [demand.workload for demand in demands]
    return html_page(
        "plan.html",
        plan_report.as_json(plan, scaling),
        _charts(plan, scaling, names),
        names=names,
        settings=[in_words(pool.point.setting, _SHOWN) for pool in plan.pools],
        demands=[
            {
                "name": demand.name,
                "model": demand.model,
                "requests": demand.workload.binned.total_requests,
            }
            for demand in demands
        ],
        stock=", ".join(f"{count} {gpu}" for gpu, count in stock.gpus.items()),
        racks="" if stock.racks is None else f"{stock.racks} racks of {stock.rack_watts:g} W",
        margin=margin,
        replicas=sum(pool.point.replicas or 0 for pool in plan.pools),
        parked="" if scaling is None else plan_report.NOT_NEEDED[scaling.parked],
        components={
            name: meaning
            for name, meaning in COMPONENTS.items()
            if any(pool.point.by_component_joules.get(name) for pool in plan.pools)
        },
        basis=basis([pool.point for pool in plan.pools], workloads),
        warnings=trace_warnings(workloads),
    )


def _name(pool: Pool) -> str:
    setting = pool.point.setting
    share = "" if pool.share == 1 else f"{float(pool.share):.0%} of "
    split = "" if setting.tensor_parallel == 1 else f", TP {setting.tensor_parallel}"
    return f"{share}{pool.demand} on {pool.point.gpus} x {setting.gpu}{split}"


def _charts(plan: Plan, scaling: Scaling | None, names: Sequence[str]) -> dict[str, Chart]:
    if not plan.feasible:
        return {}
    charts = {
        "components": Chart(
            draw=partial(
                plots.energy_by_component,
                names,
                [pool.point.by_component_joules for pool in plan.pools],
            ),
            label="Energy of each pool by component",
        ),
        "latency": Chart(
            draw=partial(
                plots.latency_against_targets,
                plan.latencies,
                ttft_seconds=plan.targets.ttft_seconds,
                tpot_seconds=plan.targets.tpot_seconds,
                percentile=plan.targets.percentile,
            ),
            label="Latency of each trace against the targets",
        ),
    }
    if scaling is not None:
        charts["replicas"] = Chart(
            draw=partial(plots.replicas_over_time, names, scaling.replicas, scaling.period_seconds),
            label="Replicas of each pool over time",
        )
    return charts
