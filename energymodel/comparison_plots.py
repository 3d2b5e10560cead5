"""Figures that set several predictions, or predictions and measurements, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energymodel.plot_style import (
    BLUE,
    COLORS,
    GREY,
    INK,
    LINES,
    MARKERS,
    MUTED,
    NARROW_INCHES,
    RED,
    above,
    beside,
    figure_function,
    grid_only,
    hover,
    new_figure,
    unit_ticks,
)
from energymodel.report import joules_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 8.0  # inches
_MOST_NAMES = 3  # of points on top of each other
_CHARACTER_POINTS, _LINE_POINTS = 4.4, 8.5  # size of a name
_RATIO_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCurve:
    """Energy per output token over the number of sequences in a batch."""

    gpu: str
    variant: str
    """What else sets it apart: stack or model."""
    batch: ArrayLike
    """(n,) sequences."""
    joules_per_output_token: ArrayLike
    """(n,) [J]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """A measured energy per output token, and the prediction for it."""

    source: str
    """Who measured it: its colour."""
    kind: str
    """Kind of run, such as `prefill` or `trace`: its marker."""
    name: str
    fitted: bool
    """Open to fits (hollow), or held out (filled)."""
    batch: int
    measured_joules: float
    predicted_joules: float


@figure_function
def joules_per_token_over_batch(
    curves: Sequence[BatchCurve], *, width_inches: float = _WIDTH
) -> Figure:
    """J per output token over the batch: a colour for each GPU, a line style for each variant."""
    figure = new_figure(width_inches, 3.6)
    axes = figure.subplots()
    _draw_curves(axes, curves)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


@figure_function
def graph_against_eager(
    graph: Sequence[BatchCurve], eager: Sequence[BatchCurve], *, width_inches: float = _WIDTH
) -> Figure:
    """What CUDA graphs save over eager launches, by batch.

    Parameters
    ----------
    graph, eager : curves of the same GPUs and batches, pairwise
    """
    return _pairs(graph, eager, "CUDA graphs take less by [%]", width_inches)


@figure_function
def moe_against_dense(
    moe: Sequence[BatchCurve], dense: Sequence[BatchCurve], *, width_inches: float = _WIDTH
) -> Figure:
    """What a mixture of experts saves over a dense model of as many active parameters, by batch.

    Below 0 it takes more: a batch reaches more experts than one token does, and all their weights
    are read.

    Parameters
    ----------
    moe, dense : curves of the same GPUs and batches, pairwise
    """
    return _pairs(moe, dense, "mixture of experts takes less by [%]", width_inches)


def _pairs(
    first: Sequence[BatchCurve], second: Sequence[BatchCurve], label: str, width_inches: float
) -> Figure:
    """Both on the left, and how much less the first takes on the right."""
    if width_inches < NARROW_INCHES:
        figure = new_figure(width_inches, 5.6)
        left, right = figure.subplots(2, 1)
    else:
        figure = new_figure(width_inches, 3.4)
        left, right = figure.subplots(1, 2)
    _draw_curves(left, [*first, *second])
    gpus = list(dict.fromkeys(curve.gpu for curve in first))
    for one, other in zip(first, second, strict=True):
        batch = np.asarray(one.batch, float)
        if one.gpu != other.gpu or not np.array_equal(batch, np.asarray(other.batch, float)):
            raise ValueError(f"{one.gpu} {one.variant} and {other.gpu} {other.variant} do not pair")
        less = 100.0 * (
            1.0
            - np.asarray(one.joules_per_output_token, float)
            / np.asarray(other.joules_per_output_token, float)
        )
        color = COLORS[gpus.index(one.gpu) % len(COLORS)]
        right.plot(batch, less, color=color, marker="o")
        for b, value in zip(batch, less, strict=True):
            text = f"{one.gpu}, batch {b:g}: {one.variant} {value:+.1f} % less than {other.variant}"
            hover(right.scatter(b, value, s=60, alpha=0.0), text)
    right.axhline(0.0, color=INK, lw=0.9)
    right.set(xlabel="sequences in the batch", ylabel=label)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _draw_curves(axes: Axes, curves: Sequence[BatchCurve]) -> None:
    gpus = list(dict.fromkeys(curve.gpu for curve in curves))
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    for curve in curves:
        batch = np.asarray(curve.batch, float)
        joules = np.asarray(curve.joules_per_output_token, float)
        axes.plot(
            batch,
            joules,
            color=COLORS[gpus.index(curve.gpu) % len(COLORS)],
            linestyle=LINES[variants.index(curve.variant) % len(LINES)],
            marker=MARKERS[variants.index(curve.variant) % len(MARKERS)],
            label=f"{curve.gpu}, {curve.variant}",
        )
        for b, value in zip(batch, joules, strict=True):
            text = f"{curve.gpu}, {curve.variant}, batch {b:g}: {joules_text(value)} per token"
            hover(axes.scatter(b, value, s=60, alpha=0.0), text)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="sequences in the batch", ylabel="energy per output token [J]")
    unit_ticks(axes, "y", "J")


@figure_function
def predicted_against_measured(
    points: Sequence[MeasuredPoint], *, width_inches: float = 11.0
) -> Figure:
    """Predicted against measured joules per output token, and the ratio over the batch.

    Hollow points were open to fits, filled ones are held out. Dotted lines: 20 % less, 25 % more.
    """
    narrow = width_inches < NARROW_INCHES
    if narrow:
        figure = new_figure(width_inches, 7.5)
        left, right = figure.subplots(2, 1)
    else:
        figure = new_figure(width_inches, 0.45 * width_inches)
        left, right = figure.subplots(1, 2)
    sources = list(dict.fromkeys(p.source for p in points))
    kinds = list(dict.fromkeys(p.kind for p in points))
    for p in points:
        color = COLORS[sources.index(p.source) % len(COLORS)]
        marker = MARKERS[kinds.index(p.kind) % len(MARKERS)]
        face = "none" if p.fitted else color
        ratio = p.predicted_joules / p.measured_joules
        text = (
            f"{p.source}, {p.kind}, {p.name}: measured {joules_text(p.measured_joules)}, predicted "
            f"{joules_text(p.predicted_joules)} ({100.0 * (ratio - 1.0):+.1f} %)"
        )
        look = {"edgecolors": color, "facecolors": face, "marker": marker, "s": 18, "lw": 0.8}
        hover(left.scatter(p.measured_joules, p.predicted_joules, **look), text)
        hover(right.scatter(max(p.batch, 1), ratio, **look), text)
    if points:
        values = [p.measured_joules for p in points]
        ends = np.array([min(values) * 0.7, max(values) * 1.4])
        left.plot(ends, ends, color=INK, lw=0.8)
        for factor in (0.8, 1.25):
            left.plot(ends, ends * factor, color=INK, lw=0.5, ls=":")
        left.set(xscale="log", yscale="log")
        for which in ("x", "y"):
            unit_ticks(left, which, "J")
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        low, high = right.get_ylim()
        ticks = [tick for tick in _RATIO_TICKS if low <= tick <= high]
        right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        right.minorticks_off()
        right.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="measured [J per output token]", ylabel="predicted [J per output token]")
    left.set_title("Energy (dotted: 20 % less, 25 % more)")
    right.axhline(1.0, color=INK, lw=0.8)
    right.set(xlabel="sequences in the batch", ylabel="predicted / measured [-]")
    right.set_title("Ratio over the batch")
    for color, source in zip(COLORS, sources, strict=False):
        left.scatter([], [], color=color, marker="o", s=18, label=source)
    for marker, kind in zip(MARKERS, kinds, strict=False):
        left.scatter([], [], color=MUTED, marker=marker, s=18, label=kind)
    if any(p.fitted for p in points):
        left.scatter(
            [],
            [],
            edgecolors=MUTED,
            facecolors="none",
            marker="o",
            s=18,
            lw=0.8,
            label="hollow: open to fits",
        )
    if narrow:
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    else:
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    return figure


@figure_function
def errors_and_coverage(
    names: Sequence[str],
    median: ArrayLike,
    p90: ArrayLike,
    naive_median: ArrayLike,
    coverage: ArrayLike,
    *,
    level: float = 0.9,
    width_inches: float = _WIDTH,
) -> Figure:
    """Size of errors by group, and how often the interval holds what was measured.

    Parameters
    ----------
    names : (n,) groups
    median, p90 : (n,) of the absolute relative error [-]
    naive_median : (n,) median absolute error of the usual estimate [-]
    coverage : (n,) share of measurements within the interval [-]
    level : share that is meant to be [-]

    NaN where a group has no such figure.
    """
    narrow = width_inches < NARROW_INCHES
    height = 0.9 + 0.4 * len(names)
    figure = new_figure(width_inches, (2.0 if narrow else 1.0) * height)
    left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2, width_ratios=[3, 2])
    found = {
        "median": (100.0 * np.asarray(median, float), BLUE, "o"),
        "p90": (100.0 * np.asarray(p90, float), BLUE, "^"),
        "FLOPs x TDP / peak, median": (100.0 * np.asarray(naive_median, float), GREY, "D"),
    }
    covered = 100.0 * np.asarray(coverage, float)
    for row, name in enumerate(names):
        for statistic, (values, color, marker) in found.items():
            if np.isfinite(values[row]):
                point = left.scatter(values[row], row, color=color, marker=marker, s=30, zorder=3)
                hover(point, f"{name}: {statistic} |error| {values[row]:.1f} %")
        ends = [found["median"][0][row], found["p90"][0][row]]
        left.plot(ends, [row, row], color=BLUE, lw=2.5, alpha=0.5)
        if np.isfinite(covered[row]):
            (bar,) = right.barh(row, covered[row], height=0.4, color=BLUE)
            hover(bar, f"{name}: {covered[row]:.0f} % of measured energies are in the interval")
            beside(right, f"{covered[row]:.0f} %", covered[row], row)
        for axes in (left, right):
            above(axes, name, row - 0.24)
    for statistic, (_, color, marker) in found.items():
        left.scatter([], [], color=color, marker=marker, s=30, label=statistic)
    for axes in (left, right):
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.5, -0.8)
        grid_only(axes, "x")
    left.set_xscale("log")
    unit_ticks(left, "x", "")
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="|error| of the energy [%]")
    right.axvline(100.0 * level, color=INK, lw=1.0, ls="--")
    right.set_xlim(0.0, 118.0)
    right.set_xticks([0, 25, 50, 75, 100])
    right.set(xlabel=f"measured energy in the {level:.0%} interval [%]")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


@figure_function
def pareto(
    joules_per_request: ArrayLike,
    seconds: ArrayLike,
    labels: Sequence[str],
    on_front: ArrayLike,
    *,
    latency: str = "TTFT p99",
    marks: Sequence[str] | None = None,
    target_seconds: float | None = None,
    width_inches: float = _WIDTH,
) -> Figure:
    """Energy against latency of many settings; those that nothing beats are joined and named.

    Parameters
    ----------
    joules_per_request : (n,) [J]
    seconds : (n,) latency [s]
    labels : (n,) what each point is
    on_front : (n,) boolean, as from `pareto.pareto_front` of the two columns
    latency : name of the latency, for the axis
    marks : (n,) names to write beside the front's points where labels are long
    target_seconds : most latency wanted [s], drawn as a line
    """
    joules, times = np.asarray(joules_per_request, float), np.asarray(seconds, float)
    front = np.asarray(on_front, bool)
    from matplotlib.lines import Line2D  # noqa: PLC0415

    height_inches = 3.8
    figure = new_figure(width_inches, height_inches)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.update_datalim(np.column_stack([times, joules]))
    joined = np.flatnonzero(front)[np.argsort(times[front])]
    axes.plot(times[joined], joules[joined], color=BLUE, lw=1.0, alpha=0.6)
    named: dict[tuple[str, str], list[int]] = {}
    for i, label in enumerate(labels):
        color, order = (BLUE, 3) if front[i] else (GREY, 2)
        point = Line2D([times[i]], [joules[i]], ls="", marker="o", ms=5.1, mew=0.0, color=color)
        point.set(zorder=order, in_layout=False)
        axes.add_artist(point)  # a thousand of these are faster than a thousand scatters
        text = f"{joules_text(joules[i])} a request, {latency} {seconds_text(times[i])}"
        hover(point, f"{label}: {text}")
        if front[i]:
            named.setdefault((f"{times[i]:.2g}", f"{joules[i]:.2g}"), []).append(i)
    size = (0.85 * 72.0 * width_inches, 0.8 * 72.0 * height_inches)  # of the axes, points
    _name_points(axes, size, times, joules, labels if marks is None else marks, [*named.values()])
    if target_seconds is not None:
        line = axes.axvline(target_seconds, color=RED, lw=1.2)
        hover(line, f"target: {latency} at most {seconds_text(target_seconds)}")
    axes.set(xlabel=f"{latency} [s]", ylabel="energy per request [J]")
    unit_ticks(axes, "x", "s")
    unit_ticks(axes, "y", "J")
    return figure


def _name_points(
    axes: Axes,
    size: tuple[float, float],
    times: NDArray[np.float64],
    joules: NDArray[np.float64],
    marks: Sequence[str],
    groups: Sequence[Sequence[int]],
) -> None:
    """Names beside points on logarithmic axes; those on top of each other share one.

    A name that would cover another one is left out.
    """
    spans = [np.ptp(np.log(values)) or 1.0 for values in (times, joules)]
    placed: list[tuple[float, float, float]] = []
    for same in sorted(groups, key=lambda group: times[group[0]]):
        first = same[0]
        more = ", ..." if len(same) > _MOST_NAMES else ""
        text = ", ".join(marks[i] for i in same[:_MOST_NAMES]) + more
        x = size[0] * np.log(times[first] / times.min()) / spans[0]  # points
        y = size[1] * np.log(joules[first] / joules.min()) / spans[1]
        end = x + _CHARACTER_POINTS * len(text)
        if all(x > e or end < b or abs(y - h) > _LINE_POINTS for b, e, h in placed):
            placed.append((x, end, y))
            at = (times[first], joules[first])
            axes.annotate(text, at, (4, 4), textcoords="offset points", fontsize=7.5)
