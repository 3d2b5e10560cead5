"""Figures of settings and fleets: what they take by component, how fast they are, how many run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from energymodel.plot_style import (
    BLUE,
    COLORS,
    COMPONENT_COLORS,
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
from energymodel.report import COMPONENTS, joules_text, seconds_text, share_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 8.0  # inches
_PERCENTILES = ("p50", "p90", "p99")
_MOST_PERIODS_WITH_TEXT = 200


@figure_function
def energy_by_component(
    names: Sequence[str],
    joules: Sequence[Mapping[str, float]],
    *,
    of: str = "energy [J]",
    width_inches: float = _WIDTH,
) -> Figure:
    """A bar for each setting or pool, made of the components of its energy.

    Parameters
    ----------
    names : (n,) what each bar is
    joules : (n,) component: energy [J]
    of : label of the axis
    """
    components = [name for name in COMPONENTS if any(parts.get(name) for parts in joules)]
    narrow = width_inches < NARROW_INCHES
    figure = new_figure(width_inches, (1.5 if narrow else 1.1) + 0.5 * len(names))
    axes = figure.subplots()
    for row, (name, parts) in enumerate(zip(names, joules, strict=True)):
        start, total = 0.0, sum(parts.values())
        for component in components:
            value = parts.get(component, 0.0)
            if not value:
                continue
            (bar,) = axes.barh(
                row, value, left=start, height=0.42, color=COMPONENT_COLORS[component]
            )
            share = share_text(value / total)
            text = f"{name}: {component} {joules_text(value)}, {share} ({COMPONENTS[component]})"
            hover(bar, text)
            start += value
        beside(axes, joules_text(total), total, row)
        above(axes, name, row - 0.27)
    for component in components:
        axes.barh(0.0, 0.0, color=COMPONENT_COLORS[component], label=component)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.6, -0.75)
    axes.set_xlim(0.0, 1.15 * max((sum(parts.values()) for parts in joules), default=1.0))
    axes.set_xlabel(of)
    axes.locator_params(axis="x", nbins=4 if narrow else 8)
    unit_ticks(axes, "x", "J")
    grid_only(axes, "x")
    columns = 4 if narrow else 7
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
    return figure


@figure_function
def latency_against_targets(
    latencies: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    ttft_seconds: float | None = None,
    tpot_seconds: float | None = None,
    percentile: str = "p99",
    width_inches: float = _WIDTH,
) -> Figure:
    """Percentiles of TTFT and TPOT of every trace, and the targets as lines.

    Parameters
    ----------
    latencies : by trace, `ttft_seconds` and `tpot_seconds` by percentile [s]
    ttft_seconds, tpot_seconds : targets [s]; None = no target
    percentile : that the targets are for
    """
    narrow = width_inches < NARROW_INCHES
    height = 0.6 + 0.45 * len(latencies)
    figure = new_figure(width_inches, 0.4 + (2.0 if narrow else 1.0) * height)
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for axes, name, target in zip(
        panels, ("TTFT", "TPOT"), (ttft_seconds, tpot_seconds), strict=True
    ):
        axes.set_xscale("log")
        for row, (trace, found) in enumerate(latencies.items()):
            values = found[f"{name.lower()}_seconds"]
            known = {p: values[p] for p in _PERCENTILES if values.get(p, 0.0) > 0.0}
            axes.plot([*known.values()], [row] * len(known), color=BLUE, lw=2.5, alpha=0.5)
            for place, value in known.items():
                marker = MARKERS[_PERCENTILES.index(place)]
                point = axes.scatter(value, row, color=BLUE, marker=marker, s=34, zorder=3)
                goal = f", target {seconds_text(target)}" if target and place == percentile else ""
                hover(point, f"{trace}, {name} {place}: {seconds_text(value)}{goal}")
            above(axes, trace, row - 0.18)
        if target is not None:
            line = axes.axvline(target, color=RED, lw=1.4)
            hover(line, f"target: {name} {percentile} at most {seconds_text(target)}")
        axes.set_yticks([])
        axes.set_ylim(len(latencies) - 0.5, -0.75)
        axes.set_xlabel(f"{name} [s]")
        axes.margins(x=0.1)
        unit_ticks(axes, "x", "s")
        grid_only(axes, "x")
    for place, marker in zip(_PERCENTILES, MARKERS, strict=False):
        panels[0].scatter([], [], color=MUTED, marker=marker, s=30, label=place)
    if ttft_seconds is not None or tpot_seconds is not None:
        panels[0].plot([], [], color=RED, lw=1.4, label=f"target of {percentile}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


@figure_function
def replicas_over_time(
    names: Sequence[str],
    replicas: ArrayLike,
    period_seconds: float,
    *,
    width_inches: float = _WIDTH,
) -> Figure:
    """How many replicas of each pool serve, by period.

    Parameters
    ----------
    names : (pools,)
    replicas : (pools, periods)
    period_seconds : length of a period
    """
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    counts = np.asarray(replicas)
    periods = counts.shape[1]
    hours = np.arange(periods + 1) * period_seconds / 3600.0
    figure = new_figure(width_inches, 2.7)
    axes = figure.subplots()
    for row, (name, served) in enumerate(zip(names, counts, strict=True)):
        axes.stairs(
            served,
            hours,
            baseline=None,
            color=COLORS[row % len(COLORS)],
            linestyle=LINES[row % len(LINES)],
            lw=2.0,
            label=name,
        )
    highest = 1.15 * float(counts.max()) + 0.2
    if periods <= _MOST_PERIODS_WITH_TEXT:
        for period in range(periods):
            pane = Rectangle((hours[period], 0.0), hours[1], highest, alpha=0.0, lw=0)
            parts = ", ".join(f"{n}: {c}" for n, c in zip(names, counts[:, period], strict=True))
            start = seconds_text(period * period_seconds)
            end = seconds_text((period + 1) * period_seconds)
            hover(axes.add_patch(pane), f"{start} to {end}: {parts}")
    axes.set_xlim(0.0, hours[-1])
    axes.set_ylim(0.0, highest)
    axes.locator_params(axis="y", integer=True)
    axes.set(xlabel="time since the first arrival [h]", ylabel="replicas that serve")
    grid_only(axes, "y")
    columns = 1 if width_inches < NARROW_INCHES else 2
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns)
    return figure
