"""A prediction as one web page that needs nothing else: figures, tables, and the result itself.

The page holds the JSON of the result; every number shown is a `<data>` element with the key it was
taken from and its full value. Needs matplotlib and Jinja: pip install 'energymodel[report]'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energymodel import plots
from energymodel.errors import EnergyModelError
from energymodel.report import (
    COMPONENTS,
    LATENCIES,
    count_text,
    gap_text,
    grams_text,
    joules_text,
    render,
    seconds_text,
    setup_text,
    share_text,
    three_digits,
    usd_text,
    watt_hours_text,
)
from energymodel.results import Prediction
from energymodel.svg_charts import inline_svg
from energymodel.terminal import check_writable

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_LIBRARIES = ("matplotlib", "jinja2")
_WIDTHS = {"wide": 8.4, "narrow": 3.9}  # inches, of which CSS shows the one that fits

WAYS_TO_WRITE: Mapping[str, Callable[[Any], str]] = {
    "joules": joules_text,
    "watt_hours": watt_hours_text,
    "seconds": seconds_text,
    "grams": grams_text,
    "usd": usd_text,
    "watts": lambda value: f"{three_digits(value)} W",
    "times": lambda value: f"{three_digits(value)}x",
    "gap": gap_text,
    "count": count_text,
    "whole": lambda value: f"{value:,}",
    "number": lambda value: f"{value:g}",
    "scientific": lambda value: f"{value:.3g}",
    "percent": lambda value: f"{value:.0%}",
}
"""How numbers are written, by the name that the template uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    draw: Callable[..., Figure]
    label: str


_CHARTS = {
    "breakdown": _Chart(
        draw=plots.energy_breakdown, label="Energy by phase, component and operator"
    ),
    "power": _Chart(draw=plots.power_over_time, label="Power over time by phase"),
    "bins": _Chart(
        draw=lambda result, **options: plots.bin_heatmap(result.bins, **options),
        label="Energy by bin of input and output length",
    ),
    "naive": _Chart(draw=plots.naive_gap, label="Simple rules against the prediction"),
    "roofline": _Chart(draw=plots.roofline, label="Roofline with the workload's operators"),
    "latency": _Chart(draw=plots.latency, label="Latency percentiles"),
}


def check_report_file(report: Path, *others: str | Path | None) -> None:
    """Fail before the work.

    Parameters
    ----------
    report : where the page will be written
    others : names or files that are read or written elsewhere

    Raises
    ------
    EnergyModelError
        If a library is missing, or the file is one of `others` or cannot be written.
    """
    _check_libraries()
    for other in others:
        if other and Path(other).resolve() == report.resolve():
            raise EnergyModelError(
                f"--report {report} is used by another option; name another file"
            )
    check_writable(report, option="--report")


def _check_libraries() -> None:
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise EnergyModelError(
            f"--report needs {' and '.join(missing)}: pip install 'energymodel[report]'"
        )


def html_report(result: Prediction) -> str:
    """The page, as text to be written to a file.

    Raises
    ------
    EnergyModelError
        If a library is missing.
    """
    _check_libraries()
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("energymodel", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    document = result.to_dict()
    charts = {
        name: _drawn(name, chart, result)
        for name, chart in _CHARTS.items()
        if name != "power" or result.timeline is not None
    }
    environment.globals.update(
        number=_number_writer(document),
        share=lambda joules: share_text(joules / result.energy_joules),
    )
    page: str = environment.get_template("report.html").render(
        r=document,
        setup=setup_text(result),
        charts=charts,
        components=COMPONENTS,
        latencies=LATENCIES,
        busy=result.busy_seconds / (result.wall_seconds * result.replicas),
        result_json=_script_safe(render(result, "json")),
    )
    return page


def _number_writer(document: Mapping[str, Any]) -> Callable[..., Markup]:
    """What the template calls to show a number of the result: `number("bins", 0, "requests")`."""
    from markupsafe import Markup  # noqa: PLC0415 (comes with Jinja)

    def number(kind: str, *path: str | int) -> Markup:
        value: Any = document
        for key in path:
            value = value[key]
        text = "-" if value is None else WAYS_TO_WRITE[kind](value)
        key = ".".join(str(part) for part in path)
        return Markup('<data value="{}" data-key="{}">{}</data>').format(value, key, text)

    return number


def _drawn(name: str, chart: _Chart, result: Prediction) -> Markup:
    """The chart for wide and for narrow screens."""
    from markupsafe import Markup  # noqa: PLC0415 (comes with Jinja)

    svgs = [
        inline_svg(
            chart.draw(result, width_inches=inches),
            f"{name}-{size}",
            chart.label,
            f"chart {size}",
        )
        for size, inches in _WIDTHS.items()
    ]
    return Markup("".join(svgs))


def _script_safe(text: str) -> Markup:
    """JSON that cannot end the script element that holds it; as JSON it is the same."""
    from markupsafe import Markup  # noqa: PLC0415 (comes with Jinja)

    return Markup(text.replace("<", "\\u003c"))
