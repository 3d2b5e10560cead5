"""A prediction as text: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from energymodel.results import BinEnergy, Percentiles, Prediction, Speculation
from energymodel.specs import DEFAULT_GPU_MEMORY_UTILIZATION, STATIC_STACKS

if TYPE_CHECKING:
    from rich.table import Table

_MOST_BINS = 20
_NARROWEST, _DEFAULT, _WIDEST = 80, 100, 120  # columns
_ROOMY = 96  # columns from which on there are two spaces between columns
_SMALLEST_SHARE = 0.001  # of an operator with a row of its own

_Units = tuple[tuple[str, float], ...]  # name and size, largest first

_JOULES: _Units = (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3), ("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6))
_WATT_HOURS: _Units = (("MWh", 3.6e9), ("kWh", 3.6e6), ("Wh", 3.6e3), ("mWh", 3.6))
_GRAMS: _Units = (("t", 1e6), ("kg", 1e3), ("g", 1.0), ("mg", 1e-3))
_COUNTS: _Units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_RATES: _Units = (("P", 1e15), ("T", 1e12), *_COUNTS, ("", 1.0))
_SECONDS: _Units = (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_MINUTES_FROM, _HOURS_FROM = 120.0, 7200.0  # seconds: smaller ones read better in the smaller unit

COMPONENTS: Mapping[str, str] = {
    "base": "GPU awake and its kernels resident",
    "flops": "arithmetic",
    "onchip": "bytes that pass the chip: from device memory and between kernels",
    "hbm": "weights, KV cache and spilled activations from device memory",
    "link": "GPU to GPU",
    "host_wait": "GPU awake, waiting for the host within and between steps",
    "idle": "no request in flight",
}
"""What each component of the energy is."""
_BIN_COLUMNS = (
    "input",
    "output",
    "requests",
    "tokens",
    "energy",
    "interval",
    "/request",
    "naive",
    "factor",
)
LATENCIES: Mapping[str, str] = {
    "TTFT": "time to first token, from arrival",
    "TPOT": "time per output token after the first",
    "E2E": "end to end, from arrival to last token",
}
"""What each latency is."""


def render(prediction: Prediction, form: str, *, color: bool = False) -> str:
    """Text of a prediction in `form`: table, json or csv (the bins, one line each)."""
    if form == "json":
        return json.dumps(prediction.to_dict(), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(prediction)
    return _tables(prediction, color=color)


def parquet_bytes(prediction: Prediction) -> bytes:
    """The bins as a Parquet file, columns as in csv."""
    data = io.BytesIO()
    prediction.to_frame().write_parquet(data)
    return data.getvalue()


def three_digits(value: float) -> str:
    """Three significant digits, scientific only if tiny: `65.0`, `1,240`, `0.0123`."""
    if value == 0.0:
        return "0"
    rounded = float(f"{value:.2e}")
    whole = abs(rounded)
    decimals = 0 if whole >= 100.0 else 1 if whole >= 10.0 else 2 if whole >= 1.0 else None
    return f"{rounded:,.{decimals}f}" if decimals is not None else f"{rounded:.3g}"


def joules_text(joules: float) -> str:
    """Three significant digits with a prefix: `12.3 MJ`."""
    return _with_unit(joules, _JOULES)


def watt_hours_text(joules: float) -> str:
    """The same energy in watt-hours: `3.42 kWh`."""
    return _with_unit(joules, _WATT_HOURS)


def grams_text(grams: float) -> str:
    """Three significant digits with a unit of mass: `26.5 g`."""
    return _with_unit(grams, _GRAMS)


def gap_text(factor: float) -> str:
    """How far an answer is from one that is `factor` times as large: `6.56x too low`."""
    if 0.995 <= factor < 1.005:
        return "the same"
    if factor >= 1.0:
        return f"{three_digits(factor)}x too low"
    return f"{three_digits(1.0 / factor)}x too high"


def share_text(share: float) -> str:
    """A share in %: `12.3%`, `<0.1%`."""
    return "<0.1%" if 0.0 < share < 0.0005 else f"{share:.1%}"


def usd_text(usd: float) -> str:
    """Dollars to the cent, small amounts to three digits: `1,240.00 USD`, `0.0123 USD`."""
    return f"{usd:,.2f} USD" if usd >= 1.0 else f"{three_digits(usd)} USD"


def rate_text(per_second: float, unit: str) -> str:
    """Three significant digits, a prefix and the unit: `989 TFLOP/s`."""
    return _with_unit(per_second, _RATES) + unit


def seconds_text(seconds: float | None) -> str:
    """Three significant digits in the unit that reads best; `-` for None."""
    if seconds is None:
        return "-"
    units = _SECONDS
    if seconds < _MINUTES_FROM:
        units = units[2:]
    elif seconds < _HOURS_FROM:
        units = units[1:]
    return _with_unit(seconds, units)


def count_text(count: int) -> str:
    """Whole below a thousand, then three significant digits: `51`, `2.91M`."""
    return str(count) if count < 1000 else _with_unit(count, _COUNTS).replace(" ", "")


def range_text(low: float, high: float) -> str:
    """Two energies, the unit once where it is the same: `314 - 784 kJ`."""
    low_text, high_text = joules_text(low), joules_text(high)
    number, _, unit = low_text.partition(" ")
    return f"{number if high_text.endswith(f' {unit}') else low_text} - {high_text}"


def _with_unit(value: float, units: _Units) -> str:
    if value == 0.0:
        return "0 " + next((name for name, size in units if size == 1.0), units[-1][0])
    name, size = next((u for u in units if abs(float(f"{value:.2e}")) >= u[1]), units[-1])
    return f"{three_digits(value / size)} {name}"


def _csv(prediction: Prediction) -> str:
    text = io.StringIO()
    names = [f.name for f in fields(BinEnergy)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in prediction.bins)
    return text.getvalue().rstrip("\n")


def _tables(p: Prediction, *, color: bool) -> str:
    from rich.console import Console  # noqa: PLC0415 (slow to import)

    columns = shutil.get_terminal_size((_DEFAULT, 24)).columns
    width = min(max(columns, _NARROWEST), _WIDEST)
    console = Console(
        file=io.StringIO(), force_terminal=color, width=width, highlight=False, force_jupyter=False
    )
    gap = 2 if width >= _ROOMY else 1
    for table in (_headline(p), _latency(p), _components(p), _operators(p), _naive(p)):
        console.print(table)
        console.print()
    console.print(_bins(p, gap))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip()


def _table(title: str, *columns: tuple[str, str], gap: int = 2) -> Table:
    """A table without lines; columns are (heading, `left` or `right`)."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(
        title=title, title_justify="left", box=None, pad_edge=False, padding=(0, gap, 0, 0)
    )
    for heading, side in columns:
        table.add_column(
            heading,
            justify="right" if side == "right" else "left",
            no_wrap=side != "text",
        )
    return table


def _headline(p: Prediction) -> Table:
    from rich.markup import escape  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    i = p.inputs
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row(
        "Workload",
        f"{escape(str(i['trace']))}: {p.requests:,} requests, {p.input_tokens:,} input and "
        f"{p.output_tokens:,} output tokens, arrivals {i['arrivals']}",
    )
    table.add_row("Setup", escape(setup_text(p)))
    table.add_row(
        "Energy",
        f"[bold]{joules_text(p.energy_joules)}[/bold] "
        f"({watt_hours_text(p.energy_joules)}), {p.interval_level:.0%} interval "
        f"{range_text(p.energy_joules_low, p.energy_joules_high)}",
    )
    table.add_row(
        "",
        f"{joules_text(p.joules_per_request)} per request, "
        f"{joules_text(p.joules_per_output_token)} per output token, "
        f"{three_digits(p.average_watts)} W on average",
    )
    table.add_row(
        "Phases",
        f"prefill {joules_text(p.prefill_joules)}, decode {joules_text(p.decode_joules)}, "
        f"idle {joules_text(p.idle_joules)}",
    )
    busy = p.busy_seconds / (p.wall_seconds * p.replicas)
    table.add_row(
        "Time",
        f"{seconds_text(p.wall_seconds)} from first arrival to last token, GPUs busy {busy:.0%} "
        "of it",
    )
    if p.speculation is not None:
        table.add_row("Drafts", drafts_text(p.speculation, i["max_batch"]))
    if i["pue"] != 1.0 or p.carbon_grams is not None or p.electricity_usd is not None:
        site = f"{joules_text(p.facility_joules)} at PUE {i['pue']:g}"
        if p.carbon_grams is not None:
            site += f", {grams_text(p.carbon_grams)} CO2e at {i['grid_grams_per_kwh']:g} g/kWh"
            site += f" ({p.provenance['grid_source']})"
        if p.electricity_usd is not None:
            site += f", {usd_text(p.electricity_usd)} of electricity"
            site += f" ({p.provenance['electricity_source']})"
        table.add_row("Site", escape(site))
    table.add_row(
        "Basis",
        escape(
            f"{p.provenance['origin']} calibration of {p.provenance['calibration_gpu']}; "
            f"interval: {p.provenance['interval_basis']}"
        ),
    )
    for warning in p.warnings:
        table.add_row("[yellow]Warning[/yellow]", f"[yellow]{escape(warning)}[/yellow]")
    return table


def setup_text(p: Prediction) -> str:
    """Model, GPUs and serving options in one line."""
    i = p.inputs
    parts = [f"{i['model']} ({i['dtype']}, KV cache {i['kv_dtype']})"]
    parts[0] += f" on {p.gpus} x {i['gpu']}" if p.gpus > 1 else f" on {i['gpu']}"
    if p.replicas > 1:
        parts.append(f"{p.replicas} replicas")
    for key in ("tensor_parallel", "pipeline_parallel"):
        if i[key] > 1:
            parts.append(f"{key.replace('_', ' ')} {i[key]}")
    parts.append(i["stack"])
    parts.append(f"batch up to {i['max_batch']}")
    if i["gpu_memory_utilization"] != DEFAULT_GPU_MEMORY_UTILIZATION:
        parts.append(f"{i['gpu_memory_utilization']:.4g} of the GPU's memory")
    if i["decoding"] != "greedy":
        parts.append(f"{i['decoding']} decoding")
    if p.speculation is not None:
        parts.append(
            f"{i['draft_tokens']} tokens drafted by {i['draft_model']}, acceptance "
            f"{i['acceptance']:g}"
        )
    if i["stack"] not in STATIC_STACKS:
        parts.append(f"{i['max_step_tokens']} tokens a step")
    if i["host_ratio"] != 1.0:
        parts.append(f"host times x {i['host_ratio']:g}")
    if i["cached_input_tokens"]:
        share = share_text(i["cached_input_tokens"] / p.input_tokens)
        parts.append(f"prefix cache holds {share} of the input tokens")
    return ", ".join(parts)


def drafts_text(drafts: Speculation, max_batch: int) -> str:
    """What drafting tokens saves or costs, and up to which batch it saves."""
    if drafts.change is None:
        change = "without drafts the replicas do not keep up"
    else:
        word = "less" if drafts.change < 0.0 else "more"
        change = f"{abs(drafts.change):.1%} {word} energy per output token than without drafts"
    context = f"at a context of {drafts.mean_context_tokens:.0f} tokens"
    if drafts.paying_batch == 0:
        batch = f"they pay at no batch {context}"
        if drafts.change is not None and drafts.change < 0.0:
            batch += ": rounds take longer, so that batches are larger"
    elif drafts.paying_batch == max_batch:
        batch = f"they pay at every batch up to {max_batch} {context}"
    else:
        batch = f"they pay up to a batch of {drafts.paying_batch} {context}"
    return f"{three_digits(drafts.tokens_per_round)} tokens a round, {change}; {batch}"


def _latency(p: Prediction) -> Table:
    columns = [("", "left"), *((f"p{n}", "right") for n in (50, 90, 99)), ("", "text")]
    table = _table("Latency", *columns)
    values: dict[str, Percentiles] = {
        "TTFT": p.ttft_seconds,
        "TPOT": p.tpot_seconds,
        "E2E": p.e2e_seconds,
    }
    for name, v in values.items():
        texts = (seconds_text(t) for t in (v.p50, v.p90, v.p99))
        table.add_row(name, *texts, LATENCIES[name])
    return table


def _components(p: Prediction) -> Table:
    columns = (("component", "left"), ("energy", "right"), ("share", "right"), ("", "text"))
    table = _table("Where the joules go", *columns)
    for name, joules in p.by_component_joules.items():
        if joules:
            share = f"{joules / p.energy_joules:.1%}"
            table.add_row(name, joules_text(joules), share, COMPONENTS[name])
    return table


def _operators(p: Prediction) -> Table:
    table = _table("By operator", ("operator", "left"), ("energy", "right"), ("share", "right"))
    for name, joules in shown_operators(p).items():
        table.add_row(name, joules_text(joules), f"{joules / p.energy_joules:.1%}")
    return table


def shown_operators(p: Prediction) -> Mapping[str, float]:
    """Operators by energy, those below a thousandth as one row."""
    least = _SMALLEST_SHARE * p.energy_joules
    shown = {name: joules for name, joules in p.by_operator_joules.items() if joules >= least}
    others = sum(joules for name, joules in p.by_operator_joules.items() if name not in shown)
    return shown | {"others": others} if others > 0.0 else shown


def _naive(p: Prediction) -> Table:
    table = _table(
        "The naive answers (below 1x they overestimate)",
        ("rule", "left"),
        ("energy", "right"),
        ("ours/naive", "right"),
        ("what it assumes and misses", "text"),
    )
    for name, factor in p.underestimate_factor.items():
        joules = joules_text(p.naive[f"{name}_joules"])
        table.add_row(name, joules, _factor(factor), p.naive_explanations[name])
    return table


def _factor(factor: float) -> str:
    return f"{three_digits(factor)}x"


def _bins(p: Prediction, gap: int) -> Table:
    shown = sorted(p.bins, key=lambda b: -b.energy_joules)[:_MOST_BINS]
    note = "naive: flops_tdp"
    if len(shown) < len(p.bins):
        share = sum(b.energy_joules for b in shown) / p.energy_joules
        note += f"; {len(shown)} largest of {len(p.bins)}, {share:.0%} of the energy; csv has all"
    table = _table(f"Bins ({note})", *((name, "right") for name in _BIN_COLUMNS), gap=gap)
    for column in table.columns[:2]:
        column.no_wrap, column.overflow = False, "fold"  # long bounds are broken, not cut
    for b in shown:
        table.add_row(
            f"{b.input_low}-{b.input_high}",
            f"{b.output_low}-{b.output_high}",
            f"{b.requests:,}",
            count_text(b.input_tokens + b.output_tokens),
            joules_text(b.energy_joules),
            _interval(b),
            joules_text(b.joules_per_request),
            joules_text(b.naive_flops_tdp_joules),
            _factor(b.underestimate_factor),
        )
    return table


def _interval(b: BinEnergy) -> str:
    """Low and high in the unit in which the energy is shown."""
    unit = joules_text(b.energy_joules).rpartition(" ")[2]
    size = dict(_JOULES)[unit]
    return f"{three_digits(b.energy_joules_low / size)}-{three_digits(b.energy_joules_high / size)}"
