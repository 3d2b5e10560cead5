"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from energymodel.fleet_plan import Plan
from energymodel.plan_scaling import Scaling
from energymodel.report import joules_text, range_text, seconds_text, three_digits
from energymodel.sweep_report import print_whole

SCHEMA_VERSION = 1
"""Of the JSON; rises when a key changes its meaning or goes."""

_WIDTH = 120  # columns where there is no terminal
_MOST_PERIODS_SHOWN = 48

NOT_NEEDED = {"off": "off", "cold": "on without a process", "context": "on with a waiting process"}
"""What a GPU that is not needed does, by `plan_scaling.PARKED`."""


def as_json(plan: Plan, scaling: Scaling | None) -> str:
    """Everything the table shows, and more."""
    return json.dumps(to_dict(plan, scaling), indent=2, allow_nan=False)


def to_dict(plan: Plan, scaling: Scaling | None) -> dict[str, Any]:
    """Plain dicts, lists and numbers."""
    return {
        "schema_version": SCHEMA_VERSION,
        "feasible": plan.feasible,
        "infeasible": plan.infeasible or None,
        "objective": plan.objective,
        "targets": asdict(plan.targets),
        "value": plan.value,
        "energy_joules": plan.energy_joules,
        "energy_joules_low": plan.energy_joules_low,
        "energy_joules_high": plan.energy_joules_high,
        "usd": plan.usd,
        "carbon_grams": plan.carbon_grams,
        "gpus": plan.gpus,
        "latencies": plan.latencies,
        "pools": [
            {"trace": pool.demand, "share": float(pool.share), **pool.point.to_dict()}
            for pool in plan.pools
        ],
        "bindings": [asdict(binding) for binding in plan.bindings],
        "candidates": plan.candidates,
        "scaling": None if scaling is None else asdict(scaling),
    }


def as_tables(plan: Plan, scaling: Scaling | None, *, color: bool) -> str:
    """The fleet, how it does, what binds, and what scaling saves."""
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.markup import escape  # noqa: PLC0415

    width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, 80)
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    if not plan.feasible:
        console.print("[bold]No plan.[/bold] " + escape(plan.infeasible))
        return _text(console)
    assert plan.energy_joules is not None
    assert plan.energy_joules_low is not None
    assert plan.energy_joules_high is not None
    boards = ", ".join(f"{count} x {gpu}" for gpu, count in sorted(plan.gpus.items()))
    console.print(f"[bold]{boards}[/bold], the least {plan.objective} of {plan.candidates} pools")
    energy = f"{joules_text(plan.energy_joules)} (interval "
    energy += f"{range_text(plan.energy_joules_low, plan.energy_joules_high)})"
    rest = [] if plan.usd is None else [f"{plan.usd:,.2f} USD"]
    if plan.carbon_grams is not None:
        rest.append(f"{three_digits(plan.carbon_grams)} g CO2e")
    console.print(", ".join([energy, *rest]))
    console.print()
    print_whole(console, _pools(plan))
    console.print()
    for name, found in plan.latencies.items():
        ttft, tpot = found["ttft_seconds"], found["tpot_seconds"]
        of = plan.targets.percentile
        console.print(
            f"{escape(name)}: TTFT {of} {seconds_text(ttft.get(of))}{_target(plan, 'ttft_seconds')}"
            f", TPOT {of} {seconds_text(tpot.get(of))}{_target(plan, 'tpot_seconds')}; simulated "
            "exactly, all requests of the trace"
        )
    console.print()
    if plan.bindings:
        console.print("What binds:")
        for binding in plan.bindings:
            console.print(
                f"  without the {binding.constraint}: {binding.share:.1%} less {plan.objective} "
                f"({binding.change})",
                markup=False,
            )
    else:
        console.print("No constraint binds: without any one of them the plan would be the same.")
    if scaling is not None:
        console.print()
        _print_scaling(console, plan, scaling)
    return _text(console)


def _text(console: Any) -> str:
    text: str = console.file.getvalue()
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def _target(plan: Plan, name: str) -> str:
    target = getattr(plan.targets, name)
    return "" if target is None else f" (target {seconds_text(target)})"


def _pools(plan: Plan) -> Any:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    for name, side in (
        ("trace", "left"),
        ("share", "right"),
        ("GPU", "left"),
        ("TP", "right"),
        ("dtype", "left"),
        ("batch", "right"),
        ("replicas", "right"),
        ("energy", "right"),
        ("J/request", "right"),
        ("W a GPU", "right"),
    ):
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    for pool in plan.pools:
        point, setting = pool.point, pool.point.setting
        table.add_row(
            pool.demand,
            f"{float(pool.share):.0%}",
            setting.gpu,
            str(setting.tensor_parallel),
            setting.dtype,
            str(setting.max_batch),
            str(point.replicas),
            joules_text(point.energy_joules or 0.0),
            three_digits(point.joules_per_request or 0.0),
            three_digits((point.average_watts or 0.0) / (point.gpus or 1)),
        )
    return table


def _print_scaling(console: Any, plan: Plan, scaling: Scaling) -> None:
    share = scaling.saving_joules / scaling.fixed_joules
    console.print(
        f"Replicas changed every {seconds_text(scaling.period_seconds)}, GPUs not needed "
        f"{NOT_NEEDED[scaling.parked]}: {joules_text(scaling.energy_joules)} instead of "
        f"{joules_text(scaling.fixed_joules)} ({share:.1%} less), "
        f"{scaling.replica_hours:,.1f} instead of {scaling.fixed_replica_hours:,.1f} replica hours"
    )
    for pool, counts in zip(plan.pools, scaling.replicas, strict=True):
        shown = _shortened(counts)
        console.print(f"  {pool.demand} on {pool.point.setting.gpu}: {shown}", markup=False)


def _shortened(counts: Sequence[int]) -> str:
    text = " ".join(str(count) for count in counts[:_MOST_PERIODS_SHOWN])
    return text + (" ... (JSON has all)" if len(counts) > _MOST_PERIODS_SHOWN else "")
