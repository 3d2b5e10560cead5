"""Results as web pages that need nothing else: what the pages of all commands share.

A page holds the JSON of its result; every number shown is a `<data>` element with the key it was
taken from and its full value. What each page shows is in `prediction_page.py`, `sweep_page.py` and
`plan_page.py` (and `calibration/validation/page.py`). Needs matplotlib and Jinja: pip install
'energymodel[report]'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from energymodel import __version__
from energymodel.errors import EnergyModelError
from energymodel.report import (
    count_text,
    gap_text,
    grams_text,
    joules_text,
    seconds_text,
    share_text,
    three_digits,
    usd_text,
    watt_hours_text,
)
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
    "hours": lambda value: f"{value:,.1f}",
    "number": lambda value: f"{value:g}",
    "scientific": lambda value: f"{value:.3g}",
    "percent": lambda value: f"{value:.0%}",
    "share": share_text,
    "signed": lambda value: f"{value:+.1%}",
}
"""How numbers are written, by the name that the templates use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure of a page."""

    draw: Callable[..., Figure]
    """Takes `width_inches` and draws the figure in that width."""
    label: str
    """What it shows, for those who do not see it."""


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


def html_page(template: str, result_json: str, charts: Mapping[str, Chart], **shown: Any) -> str:
    """A page, as text to be written to a file.

    Parameters
    ----------
    template : name of a file in `templates/` that extends `base.html`
    result_json : the JSON document that the page holds, and that its numbers are taken from; the
        template knows it as `r`
    charts : by the name that the template uses
    shown : more that the template shows

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
    document = json.loads(result_json)
    environment.globals["number"] = _number_writer(document)
    page: str = environment.get_template(template).render(
        r=document,
        charts={name: _drawn(name, chart) for name, chart in charts.items()},
        version=__version__,
        result_json=_script_safe(result_json),
        **shown,
    )
    return page


def _number_writer(document: Mapping[str, Any]) -> Callable[..., Markup]:
    """What templates call to show a number of the result: `number("bins", 0, "requests")`."""
    from markupsafe import Markup  # noqa: PLC0415 (comes with Jinja)

    def number(kind: str, *path: str | int) -> Markup:
        value: Any = document
        for key in path:
            value = value[key]
        shown = "-" if value is None else WAYS_TO_WRITE[kind](value)
        whole = "null" if value is None else value
        key = ".".join(str(part) for part in path)
        return Markup('<data value="{}" data-key="{}">{}</data>').format(whole, key, shown)

    return number


def _drawn(name: str, chart: Chart) -> Markup:
    """The chart for wide and for narrow screens."""
    from markupsafe import Markup  # noqa: PLC0415 (comes with Jinja)

    svgs = [
        inline_svg(
            chart.draw(width_inches=inches),
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
