"""How every figure looks: colours, fonts, units on axes, and what a point says when pointed at."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from energymodel.errors import EnergyModelError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
"""Text and axes, notes, grid lines."""

COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d31")
"""Okabe and Ito (2008), Color Universal Design, yellow replaced by brown to be seen on white."""
BLUE, ORANGE, GREEN, RED, PINK, SKY, BROWN = COLORS
GREY = "#9a9a9a"
HEAT = "cividis"
"""Nunez et al. 2018: looks the same with and without red-green colour blindness."""

PHASE_COLORS = {"prefill": ORANGE, "decode": BLUE, "idle": GREY}
COMPONENT_COLORS = {
    "base": BROWN,
    "flops": RED,
    "onchip": PINK,
    "hbm": BLUE,
    "link": GREEN,
    "host_wait": ORANGE,
    "idle": GREY,
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")

STYLE: Any = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "svg.fonttype": "none",
    "svg.hashsalt": "energymodel",
}

NARROW_INCHES = 4.5
"""Below this width panels stand under each other and labels are left out."""


def figure_function(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in the common style, whatever the caller's settings; say how to get matplotlib."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        try:
            import matplotlib as mpl  # noqa: PLC0415 (slow to import)
        except ImportError as error:
            raise EnergyModelError(
                "figures need matplotlib: pip install 'energymodel[report]'"
            ) from error
        with mpl.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            for axes in figure.axes:  # ticks are made when drawn, outside of these settings
                axes.tick_params(labelsize=8.0, color=MUTED, labelcolor=INK, width=0.7, length=3.0)
        return figure

    return styled


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure whose parts make room for each other."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def hover(artist: Artist, text: str) -> None:
    """Give an artist the text that the HTML report shows when it is pointed at.

    It is kept as the id of the SVG group; only such ids hold spaces.
    """
    artist.set_gid(text)


def unit_ticks(axes: Axes, which: str, unit: str) -> None:
    """Ticks of one axis (`x` or `y`) with a prefix and the unit: 200 kJ.

    On a logarithmic axis as it is now: 1, 2 and 5 of every decade where there are few, and even
    steps where there is not one.
    """
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator  # noqa: PLC0415

    axis = axes.xaxis if which == "x" else axes.yaxis
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        if high < 6.0 * low:
            axis.set_major_locator(MaxNLocator(5))
        else:
            subs = (1.0, 2.0, 5.0) if high < 500.0 * low else (1.0,)
            axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_locator(LogLocator(subs=()))
    axis.set_major_formatter(EngFormatter(unit=unit))


def grid_only(axes: Axes, which: str) -> None:
    """Grid lines across one axis (`x`, `y`) or none (``)."""
    axes.grid(visible=False)
    if which == "x":
        axes.xaxis.grid(visible=True)
    elif which == "y":
        axes.yaxis.grid(visible=True)


def beside(axes: Axes, text: str, x: float, row: float) -> None:
    """A short text to the right of the end of a row's bar."""
    axes.annotate(text, (x, row), (3, 0), textcoords="offset points", va="center", fontsize=7.5)


def above(axes: Axes, text: str, row: float) -> None:
    """A row's name at the left edge, above what the row shows: long names take no width."""
    axes.annotate(
        text,
        (0.0, row),
        (2, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="bottom",
        fontsize=8.0,
    )
