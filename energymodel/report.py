"""A prediction as text: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from energymodel.results import BinEnergy, Prediction
from energymodel.units import JOULES_PER_KWH

if TYPE_CHECKING:
    from rich.table import Table

_MOST_BINS = 20


def render(prediction: Prediction, form: str, *, color: bool = False) -> str:
    """Text of a prediction in `form`: table, json or csv (the bins, one line each)."""
    if form == "json":
        return json.dumps(prediction.to_dict(), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(prediction)
    return _tables(prediction, color=color)


def joules_text(joules: float) -> str:
    """Three significant digits with a prefix: `12.3 MJ`."""
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3)):
        if abs(joules) >= size:
            return (
                f"{joules / size:.3g} {unit}"
                if joules / size < 999.5
                else f"{joules / size:.0f} {unit}"
            )
    return f"{joules:.3g} J"


def seconds_text(seconds: float) -> str:
    """Three significant digits in the unit that reads best."""
    if seconds < 1.0:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120.0:
        return f"{seconds:.3g} s"
    if seconds < 7200.0:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"


def _csv(prediction: Prediction) -> str:
    text = io.StringIO()
    names = [f.name for f in fields(BinEnergy)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in prediction.bins)
    return text.getvalue().rstrip("\n")


def _tables(p: Prediction, *, color: bool) -> str:
    from rich.console import Console  # noqa: PLC0415

    width = shutil.get_terminal_size((100, 24)).columns if color else 100
    console = Console(
        file=io.StringIO(), force_terminal=color, width=min(max(width, 80), 120), highlight=False
    )
    console.print(_headline(p))
    console.print()
    console.print(
        _shares("Where the joules go", p.by_component_joules, p.energy_joules, _COMPONENTS)
    )
    console.print()
    console.print(_operators(p))
    console.print()
    console.print(_naive(p))
    console.print()
    console.print(_bins(p))
    console.print()
    console.print(_origin(p))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in str(text).splitlines()).rstrip()


_COMPONENTS = {
    "base": "GPU awake and its kernels resident",
    "flops": "arithmetic",
    "onchip": "activations between kernels, on chip",
    "hbm": "weights, KV cache and spilled activations from device memory",
    "link": "GPU to GPU",
    "host_wait": "GPU awake, waiting for the host within and between steps",
    "idle": "no request in flight",
}


def _headline(p: Prediction) -> Table:
    from rich.table import Table  # noqa: PLC0415

    i = p.inputs
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    gpus = f"{p.gpus} x {i['gpu']}" if p.gpus > 1 else i["gpu"]
    table.add_row(
        "Workload",
        f"{i['trace']}: {p.requests:,} requests, {p.input_tokens:,} input and "
        f"{p.output_tokens:,} output tokens, arrivals {i['arrivals']}",
    )
    table.add_row(
        "Setup", f"{i['model']} ({i['dtype']}) on {gpus}, {i['stack']}, batch <= {i['max_batch']}"
    )
    level = f"{p.interval_level:.0%}"
    table.add_row(
        "Energy",
        f"[bold]{joules_text(p.energy_joules)}[/bold] = {p.energy_joules / JOULES_PER_KWH:.3g} kWh"
        f", {level} interval {joules_text(p.energy_joules_low)} to "
        f"{joules_text(p.energy_joules_high)}",
    )
    table.add_row(
        "",
        f"{joules_text(p.joules_per_request)} per request, "
        f"{joules_text(p.joules_per_output_token)} per output token, {p.average_watts:.0f} W on "
        "average",
    )
    table.add_row(
        "Phases",
        f"prefill {joules_text(p.prefill_joules)}, decode {joules_text(p.decode_joules)}, "
        f"idle {joules_text(p.idle_joules)}",
    )
    busy = p.busy_seconds / (p.wall_seconds * p.replicas)
    table.add_row(
        "Time", f"{seconds_text(p.wall_seconds)} first arrival to last token, busy {busy:.0%}"
    )
    table.add_row(
        "Latency",
        ", ".join(
            f"{name} p50 {seconds_text(v.p50)} p99 {seconds_text(v.p99)}"
            for name, v in (
                ("TTFT", p.ttft_seconds),
                ("TPOT", p.tpot_seconds),
                ("E2E", p.e2e_seconds),
            )
        ),
    )
    if p.inputs["pue"] != 1.0 or p.carbon_grams is not None:
        carbon = "" if p.carbon_grams is None else f", {p.carbon_grams:,.0f} g CO2e"
        table.add_row(
            "Site", f"{joules_text(p.facility_joules)} at PUE {p.inputs['pue']:g}{carbon}"
        )
    return table


def _shares(title: str, parts: object, total: float, labels: dict[str, str]) -> Table:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("component", "energy", "share", ""):
        table.add_column(heading, justify="right" if heading in ("energy", "share") else "left")
    for name, value in dict(parts).items():  # type: ignore[call-overload]
        if value:
            table.add_row(name, joules_text(value), f"{value / total:.1%}", labels[name])
    return table


def _operators(p: Prediction) -> Table:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="By operator", title_justify="left", box=None, pad_edge=False)
    for heading in ("operator", "energy", "share"):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    for name, value in p.by_operator_joules.items():
        if value / p.energy_joules >= 0.001:
            table.add_row(name, joules_text(value), f"{value / p.energy_joules:.1%}")
    return table


def _naive(p: Prediction) -> Table:
    from rich.table import Table  # noqa: PLC0415

    table = Table(title="The naive answers", title_justify="left", box=None, pad_edge=False)
    table.add_column("rule", no_wrap=True)
    table.add_column("energy", justify="right", no_wrap=True)
    table.add_column("ours / naive", justify="right", no_wrap=True)
    table.add_column("what it takes for granted")
    for name, factor in p.underestimate_factor.items():
        joules = p.naive[f"{name}_joules"]
        table.add_row(name, joules_text(joules), f"{factor:.2f}x", p.naive_explanations[name])
    return table


def _bins(p: Prediction) -> Table:
    from rich.table import Table  # noqa: PLC0415

    shown = sorted(p.bins, key=lambda b: -b.energy_joules)[:_MOST_BINS]
    more = len(p.bins) - len(shown)
    note = f" (the {len(shown)} largest of {len(p.bins)}; --format csv has all)" if more else ""
    table = Table(title=f"Bins{note}", title_justify="left", box=None, pad_edge=False)
    for heading in (
        "input",
        "output",
        "requests",
        "energy",
        "interval",
        "J/request",
        "naive",
        "factor",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for b in shown:
        table.add_row(
            f"{b.input_low}-{b.input_high}",
            f"{b.output_low}-{b.output_high}",
            f"{b.requests:,}",
            joules_text(b.energy_joules),
            f"{joules_text(b.energy_joules_low)} - {joules_text(b.energy_joules_high)}",
            f"{b.joules_per_request:.3g}",
            joules_text(b.naive_flops_tdp_joules),
            f"{b.underestimate_factor:.2f}x",
        )
    return table


def _origin(p: Prediction) -> str:
    return (
        f"Calibration of {p.inputs['gpu']}: {p.provenance['origin']}. "
        f"Interval: {p.provenance['interval_basis']}"
    )
