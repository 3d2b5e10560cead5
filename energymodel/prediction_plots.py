"""Figures of one prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from energymodel.plot_style import (
    BLUE,
    COLORS,
    COMPONENT_COLORS,
    GREY,
    HEAT,
    INK,
    MARKERS,
    MUTED,
    NARROW_INCHES,
    PHASE_COLORS,
    RULE,
    figure_function,
    grid_only,
    hover,
    new_figure,
    unit_ticks,
)
from energymodel.report import (
    COMPONENTS,
    LATENCIES,
    gap_text,
    joules_text,
    range_text,
    rate_text,
    seconds_text,
    share_text,
    shown_operators,
    three_digits,
)
from energymodel.results import BinEnergy, Percentiles, Prediction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 8.0  # inches
_ROOM_FOR_TEXT = 0.28  # inches of a heat map's cell from which on it holds a number


# -- one prediction -------------------------------------------------------------------


@figure_function
def energy_breakdown(result: Prediction, *, width_inches: float = _WIDTH) -> Figure:
    """Where the joules go: by phase, by component and by operator; each adds up to the total."""
    phases = {
        "prefill": result.prefill_joules,
        "decode": result.decode_joules,
        "idle": result.idle_joules,
    }
    components = {name: j for name, j in result.by_component_joules.items() if j > 0.0}
    operators = shown_operators(result)
    total = result.energy_joules
    left_bars, right_bars = len(phases) + len(components), len(operators)
    if width_inches < NARROW_INCHES:
        figure = new_figure(width_inches, 1.6 + 0.2 * (left_bars + right_bars))
        ratios = [len(phases) + 1, len(components) + 1, right_bars + 1]
        axes = list(figure.subplots(3, 1, height_ratios=ratios))
    else:
        figure = new_figure(width_inches, 1.0 + 0.2 * max(left_bars + 2, right_bars))
        grid = figure.add_gridspec(2, 2, height_ratios=[len(phases) + 1, len(components) + 1])
        axes = [figure.add_subplot(grid[cell]) for cell in ((0, 0), (1, 0), (slice(None), 1))]
    _share_bars(axes[0], "By phase", phases, PHASE_COLORS, total)
    _share_bars(axes[1], "By component", components, COMPONENT_COLORS, total)
    _share_bars(axes[2], "By operator", operators, {"idle": GREY, "host_wait": GREY}, total)
    return figure


def _share_bars(
    axes: Axes,
    title: str,
    joules: Mapping[str, float],
    colors: Mapping[str, str],
    total: float,
) -> None:
    names = sorted(joules, key=lambda name: -joules[name])
    values = [joules[name] for name in names]
    bars = axes.barh(names, values, color=[colors.get(name, BLUE) for name in names], height=0.72)
    for name, value, bar in zip(names, values, bars, strict=True):
        text = f"{joules_text(value)}, {share_text(value / total)}"
        meaning = f" ({COMPONENTS[name]})" if name in COMPONENTS else ""
        hover(bar, f"{name}: {text}{meaning}")
        axes.annotate(
            text,
            (value, bar.get_y() + 0.36),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_title(title)
    axes.set_xlim(0.0, 1.45 * max(values))
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=4)
    unit_ticks(axes, "x", "J")
    grid_only(axes, "x")


@figure_function
def bin_heatmap(bins: Sequence[BinEnergy], *, width_inches: float = _WIDTH) -> Figure:
    """Energy by bin of input and output length; the number is the share of the total in %."""
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import LogNorm  # noqa: PLC0415
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    rows = sorted({(b.input_low, b.input_high) for b in bins})
    columns = sorted({(b.output_low, b.output_high) for b in bins})
    energies = np.array([b.energy_joules for b in bins])
    largest, total = energies.max(), energies.sum()
    norm = LogNorm(np.clip(energies.min(), 1e-4 * largest, 0.1 * largest), largest)
    colormap = colormaps[HEAT]
    figure = new_figure(width_inches, 1.3 + 0.3 * len(rows))
    axes = figure.subplots()
    room = (width_inches - 2.2) / len(columns) >= _ROOM_FOR_TEXT
    for b in bins:
        row, column = (
            rows.index((b.input_low, b.input_high)),
            columns.index((b.output_low, b.output_high)),
        )
        shade = norm(b.energy_joules)
        cell = Rectangle((column, row), 1, 1, facecolor=colormap(shade), edgecolor=RULE, lw=0.5)
        hover(axes.add_patch(cell), _bin_text(b, total))
        share = 100.0 * b.energy_joules / total
        if room and share >= 0.05:
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{share:.1f}" if share < 9.95 else f"{share:.0f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="#000000" if shade > 0.55 else "#ffffff",
            )
    axes.set_xlim(0, len(columns))
    axes.set_ylim(0, len(rows))
    # the label of a cell is its longest length; thinned out where there is no room
    step = 1 if room else 2
    axes.set_xticks(np.arange(len(columns))[::step] + 0.5, [_tokens(c[1]) for c in columns][::step])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [_tokens(r[1]) for r in rows])
    axes.set_xlabel("output, at most [tokens]")
    axes.set_ylabel("input, at most [tokens]")
    grid_only(axes, "")
    bar = figure.colorbar(ScalarMappable(norm, colormap), ax=axes, label="energy [J]", aspect=30)
    unit_ticks(bar.ax, "y", "J")
    return figure


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _bin_text(b: BinEnergy, total: float) -> str:
    return (
        f"input {b.input_low}-{b.input_high}, output {b.output_low}-{b.output_high}: "
        f"{joules_text(b.energy_joules)} ({share_text(b.energy_joules / total)}), interval "
        f"{range_text(b.energy_joules_low, b.energy_joules_high)}; {b.requests:,} requests, "
        f"{joules_text(b.joules_per_request)} each; FLOPs x TDP / peak says "
        f"{joules_text(b.naive_flops_tdp_joules)}"
    )


@figure_function
def naive_gap(result: Prediction, *, width_inches: float = _WIDTH) -> Figure:
    """The simple rules' answers against the prediction and its interval."""
    names = sorted(result.underestimate_factor, key=lambda name: -result.underestimate_factor[name])
    values = [result.naive[f"{name}_joules"] for name in names]
    figure = new_figure(width_inches, 1.0 + 0.28 * (len(names) + 1))
    axes = figure.subplots()
    labels = ["this prediction", *names]
    bars = axes.barh(
        labels, [result.energy_joules, *values], height=0.7, color=[BLUE] + [GREY] * len(names)
    )
    spread = range_text(result.energy_joules_low, result.energy_joules_high)
    texts = [f"{joules_text(result.energy_joules)}, {result.interval_level:.0%}: {spread}"]
    texts += [f"{joules_text(v)}, {gap_text(result.energy_joules / v)}" for v in values]
    tops = [result.energy_joules_high, *values]
    for label, text, bar, top in zip(labels, texts, bars, tops, strict=True):
        hover(bar, f"{label}: {text}")
        axes.annotate(
            text,
            (top, bar.get_y() + 0.35),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    below = result.energy_joules - result.energy_joules_low
    above = result.energy_joules_high - result.energy_joules
    axes.errorbar(
        result.energy_joules, 0, xerr=[[below], [above]], color=INK, capsize=3, linewidth=1.0
    )
    axes.axvspan(result.energy_joules_low, result.energy_joules_high, color=BLUE, alpha=0.12, lw=0)
    axes.invert_yaxis()
    axes.set_xlim(0.0, max(tops) * (2.2 if width_inches < NARROW_INCHES else 1.4))
    axes.set_xlabel("energy [J]")
    axes.locator_params(axis="x", nbins=5)
    unit_ticks(axes, "x", "J")
    grid_only(axes, "x")
    return figure


@figure_function
def roofline(result: Prediction, *, width_inches: float = _WIDTH) -> Figure:
    """FLOP/s that each operator reaches over its FLOPs per byte of device memory, on one GPU.

    Roofs are the datasheet's. The area of a point is its share of the energy. Operators without
    FLOPs in matrix products (norms, sampling), or that find all their data on the chip, have no
    place on it; a note says what they take.
    """
    peak, bandwidth = result.peak_flops_per_s, result.hbm_bytes_per_s
    points = []
    for name, work in result.operator_work.items():
        if work.executed_flops > 0.0 and work.hbm_bytes > 0.0 and work.gpu_seconds > 0.0:
            intensity = work.executed_flops / work.hbm_bytes
            speed = work.executed_flops / work.gpu_seconds
            points.append((name, intensity, speed, result.by_operator_joules[name]))
    points.sort(key=lambda point: -point[2])
    ridge = peak / bandwidth
    intensities = [point[1] for point in points] + [ridge]
    x = np.geomspace(min(intensities) / 3.0, max(intensities) * 4.0, 200)
    figure = new_figure(width_inches, 3.6)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log")
    axes.plot(x, np.minimum(peak, bandwidth * x), color=INK)
    lowest = min([point[2] for point in points] + [bandwidth * x[0]]) / 2.0
    axes.set_ylim(lowest, peak * 2.5)
    axes.set_xlim(x[0], x[-1])
    axes.annotate(
        f"{rate_text(peak, 'FLOP/s')}",
        (x[-1], peak),
        (0, 9),
        ha="right",
        textcoords="offset points",
        fontsize=7.5,
        color=MUTED,
    )
    axes.annotate(
        f"{rate_text(bandwidth, 'B/s')}",
        (x[0], max(bandwidth * x[0], lowest)),
        (14, 0),
        textcoords="offset points",
        fontsize=7.5,
        color=MUTED,
    )
    heights = _spread([np.log(p[2]) for p in points], np.log(lowest), np.log(peak * 2.5), 0.062)
    for (name, intensity, speed, joules), height in zip(points, heights, strict=True):
        roof = min(peak, bandwidth * intensity)
        share = joules / result.energy_joules
        point = axes.scatter(intensity, speed, s=12 + 500 * share, color=BLUE, alpha=0.75, lw=0)
        hover(
            point,
            f"{name}: {rate_text(speed, 'FLOP/s')}, {speed / roof:.0%} of its roof, "
            f"{three_digits(intensity)} FLOP/B, {joules_text(joules)} ({share_text(share)})",
        )
        axes.annotate(
            name,
            (intensity, speed),
            (1.01, height),
            va="center",
            fontsize=7.5,
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "lw": 0.4, "shrinkB": 0},
        )
    axes.set_xlabel("FLOPs per byte of device memory [FLOP/B]")
    axes.set_ylabel("reached by one GPU [FLOP/s]")
    unit_ticks(axes, "x", "")
    unit_ticks(axes, "y", "")
    if rest := set(result.operator_work) - {point[0] for point in points}:
        share = sum(result.by_operator_joules.get(name, 0.0) for name in rest)
        axes.set_title(
            f"no FLOPs or no bytes: {share_text(share / result.energy_joules)} of the energy",
            loc="right",
            fontsize=7.5,
            fontweight="normal",
            color=MUTED,
        )
    return figure


def _spread(values: Sequence[float], low: float, high: float, apart: float) -> list[float]:
    """Places (0 to 1) for labels near their values, which descend, at least `apart`."""
    wanted = [(value - low) / (high - low) for value in values]
    places: list[float] = []
    for place in wanted:
        places.append(min([place, *(p - apart for p in places[-1:])]))
    lift = max(0.0, 0.02 - places[-1]) if places else 0.0
    return [min(place + lift, 1.0 - apart * i) for i, place in enumerate(places)]


@figure_function
def power_over_time(result: Prediction, *, width_inches: float = _WIDTH) -> Figure:
    """Power of all boards, averaged over slices of time, by phase.

    Raises
    ------
    ValueError
        If the result has no timeline (the paper's accounting).
    """
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    timeline = result.timeline
    if timeline is None:
        raise ValueError("a result of the paper's accounting has no power over time")
    starts = timeline.slice_seconds * np.arange(len(timeline.idle_joules))
    edges = np.append(starts, result.wall_seconds)
    lengths = np.diff(edges)
    phases = {name: np.array(getattr(timeline, f"{name}_joules")) for name in PHASE_COLORS}
    unit, size = next(
        (unit for unit in (("h", 3600.0), ("min", 60.0), ("s", 1.0)) if edges[-1] >= 2.0 * unit[1]),
        ("ms", 1e-3),
    )
    figure = new_figure(width_inches, 2.7)
    axes = figure.subplots()
    base = np.zeros_like(lengths)
    for name in ("idle", "decode", "prefill"):
        top = base + phases[name] / lengths
        axes.stairs(
            top, edges / size, baseline=base, fill=True, color=PHASE_COLORS[name], label=name, lw=0
        )
        base = top
    highest = 1.12 * float(base.max())
    for i, start in enumerate(starts):
        pane = Rectangle((start / size, 0.0), lengths[i] / size, highest, alpha=0.0, lw=0)
        parts = ", ".join(f"{n} {three_digits(j[i] / lengths[i])}" for n, j in phases.items())
        when = f"{seconds_text(start)} to {seconds_text(edges[i + 1])}"
        hover(axes.add_patch(pane), f"{when}: {three_digits(base[i])} W ({parts})")
    axes.axhline(result.average_watts, color=INK, lw=0.9, ls="--")
    axes.annotate(
        f"average {three_digits(result.average_watts)} W",
        (edges[-1] / size, result.average_watts),
        (-2, 3),
        ha="right",
        textcoords="offset points",
        fontsize=7.5,
    )
    axes.set_xlim(0.0, edges[-1] / size)
    axes.set_ylim(0.0, highest)
    axes.set_xlabel(f"time since the first arrival [{unit}]")
    axes.set_ylabel("power [W]" if result.gpus == 1 else f"power of {result.gpus} GPUs [W]")
    grid_only(axes, "y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


@figure_function
def latency(result: Prediction, *, width_inches: float = _WIDTH) -> Figure:
    """Median, 90th and 99th percentile of TTFT, TPOT and end-to-end time."""
    found: dict[str, Percentiles] = {
        "TTFT": result.ttft_seconds,
        "TPOT": result.tpot_seconds,
        "E2E": result.e2e_seconds,
    }
    figure = new_figure(width_inches, 1.9)
    axes = figure.subplots()
    axes.set_xscale("log")
    for row, (name, percentiles) in enumerate(found.items()):
        values = (percentiles.p50, percentiles.p90, percentiles.p99)
        known = [value for value in values if value is not None and value > 0.0]
        if not known:
            continue
        axes.plot(known, [row] * len(known), color=COLORS[row], lw=2.5, alpha=0.5)
        for place, value, marker in zip(("p50", "p90", "p99"), values, MARKERS, strict=False):
            if value is not None and value > 0.0:
                point = axes.scatter(value, row, color=COLORS[row], marker=marker, s=34, zorder=3)
                hover(point, f"{name} {place}: {seconds_text(value)} ({LATENCIES[name]})")
    for place, marker in zip(("p50", "p90", "p99"), MARKERS, strict=False):
        axes.scatter([], [], color=MUTED, marker=marker, s=30, label=place)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("time [s]")
    unit_ticks(axes, "x", "s")
    grid_only(axes, "x")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
