"""Figure of the paper's findings: stated, predicted and measured, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from energymodel.errors import ConfigurationError, EnergyModelError
from energymodel.paper_findings import Row
from energymodel.plot_style import (
    BLUE,
    GREEN,
    INK,
    RED,
    figure_function,
    hover,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE_INCHES = 0.26
_TICKS = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
_FORMATS = (".png", ".svg", ".pdf")


def check_figure_file(figure: Path) -> None:
    """Fail before the work, not after it.

    Raises
    ------
    ConfigurationError
        If the file's ending is no format of a figure.
    EnergyModelError
        If matplotlib is missing.
    """
    if figure.suffix.lower() not in _FORMATS:
        raise ConfigurationError(f"--figure {figure}: name a file that ends in .png, .svg or .pdf")
    if find_spec("matplotlib") is None:
        raise EnergyModelError("--figure needs matplotlib: pip install 'energymodel[report]'")


@figure_function
def paper_findings(rows: Sequence[Row], *, width_inches: float = 9.0) -> Figure:
    """Ratios of energy or time on a common axis; 1 is no change.

    Thick bars are intervals of predictions, thin ones the range over what the paper leaves open.
    Findings that the paper gives no number for are left out.
    """
    shown = [row for row in rows if row.finding.stated is not None]
    figure = new_figure(width_inches, 1.1 + _LINE_INCHES * len(shown))
    axes = figure.subplots()
    for y, row in enumerate(shown):
        finding, predicted, measured = row.finding, row.predicted, row.measured
        name = finding.title
        stated = 1.0 + (finding.stated or 0.0)
        hover(
            axes.scatter(stated, y, color=RED, marker="D", s=30, zorder=4),
            f"{name}: stated {stated:.3g}",
        )
        if predicted is not None:
            value = 1.0 + predicted.value
            if predicted.low is not None and predicted.high is not None:
                ends = 1.0 + predicted.low, 1.0 + predicted.high
                axes.plot(ends, (y, y), color=BLUE, lw=5.0, alpha=0.25, solid_capstyle="butt")
            if predicted.spread_low is not None and predicted.spread_high is not None:
                ends = 1.0 + predicted.spread_low, 1.0 + predicted.spread_high
                axes.plot(ends, (y, y), color=BLUE, lw=1.2)
            hover(
                axes.scatter(value, y, color=BLUE, marker="o", s=30, zorder=3),
                f"{name}: predicted {value:.3g}",
            )
        if measured is not None:
            ends = 1.0 + measured.low, 1.0 + measured.high
            axes.plot(ends, (y, y), color=GREEN, lw=1.2, ls=":")
            hover(
                axes.scatter(1.0 + measured.value, y, color=GREEN, marker="s", s=26, zorder=3),
                f"{name}: measured {1.0 + measured.value:.3g}",
            )
    for label, color, marker in (
        ("stated by the paper", RED, "D"),
        ("predicted, its GPU", BLUE, "o"),
        ("measured, H100", GREEN, "s"),
    ):
        axes.scatter([], [], color=color, marker=marker, s=30, label=label)
    axes.axvline(1.0, color=INK, lw=0.8)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), [row.finding.title for row in shown])
    axes.invert_yaxis()
    axes.set(xlabel="ratio of energy or time [-]")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure
