"""Figures of the page on measured kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.kernels.comparisons import flops_per_second
from calibration.validation import kernel_tables as tables
from calibration.validation.kernel_boards import BAR, Board, Repeat, by_case, middle, repeats
from calibration.validation.kernel_errors import CLASSES, P90_BAR, WITHOUT_BAR, HeldOut, of_class
from energymodel.plot_style import (
    COLORS,
    INK,
    LINES,
    MARKERS,
    MUTED,
    RED,
    figure_function,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 9.5
MOE, GRAPH, GEMM, BOARDS, ERRORS = (
    f"img/kernels-{name}.png" for name in ("moe", "graph", "gemm", "boards", "errors")
)
_GEMM_SHOWN = ("llama-3.1-8b.gate_up", "llama-3.2-1b.o")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Two quantities over a third, of one GPU."""

    gpu: str
    variant: str
    """What the line style stands for."""
    panel: str
    """Title of the column it belongs to."""
    x: Sequence[float]
    upper: Sequence[float]
    lower: Sequence[float]


@figure_function
def two_rows(
    curves: Sequence[Curve],
    *,
    x_label: str,
    upper_label: str,
    lower_label: str,
    stated: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    logarithmic: bool = True,
    reference: float | None = 1.0,
) -> Figure:
    """One column a panel: the upper quantity above, the lower one below, both over x.

    `stated` are points (x, y) of the paper by panel, drawn in the upper row.
    """
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    gpus = list(dict.fromkeys(curve.gpu for curve in curves))
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    figure = new_figure(_WIDTH, 5.4)
    grid = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    labels: dict[str, Artist] = {}
    for column, panel in enumerate(panels):
        for row, label in enumerate((upper_label, lower_label)):
            axes = grid[row, column]
            for curve in (c for c in curves if c.panel == panel):
                (line,) = axes.plot(
                    curve.x,
                    curve.lower if row else curve.upper,
                    color=COLORS[gpus.index(curve.gpu) % len(COLORS)],
                    linestyle=LINES[variants.index(curve.variant) % len(LINES)],
                    marker=MARKERS[variants.index(curve.variant) % len(MARKERS)],
                )
                gpu = curve.gpu.upper()
                name = f"{gpu}, {curve.variant}" if len(variants) > 1 else gpu
                labels.setdefault(name, line)
            if row == 0 and stated and panel in stated:
                points = axes.scatter(*stated[panel], color=RED, marker="D", s=34, zorder=5)
                labels.setdefault("stated by the paper", points)
            if reference is not None:
                axes.axhline(reference, color=INK, lw=0.8)
            _x_over_powers(axes)
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
            if column == 0:
                axes.set_ylabel(label)
        grid[0, column].set_title(panel)
        grid[1, column].set_xlabel(x_label)
    figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=4)
    return figure


def _x_over_powers(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """Points of one colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@figure_function
def board_differences(
    panels: Mapping[str, Sequence[Cloud]], *, bar: float, width_inches: float = _WIDTH
) -> Figure:
    """Differences of two boards [%] over power [W], a panel each; the bar as a band."""
    figure = new_figure(width_inches, 3.2)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    labels: dict[str, Artist] = {}
    for axes, (title, clouds) in zip(grid, panels.items(), strict=True):
        axes.axhspan(-100 * bar, 100 * bar, color=MUTED, alpha=0.18, lw=0)
        axes.axhline(0.0, color=INK, lw=0.8)
        for index, cloud in enumerate(clouds):
            points = axes.scatter(
                cloud.x,
                100.0 * np.asarray(cloud.y),
                s=14,
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
            )
            labels.setdefault(cloud.label, points)
        axes.set(title=title, xlabel="power on the first board [W]")
        axes.set_yscale("symlog", linthresh=5.0)
        axes.set_yticks([-20, -10, -5, -2, 0, 2, 5, 10, 20, 50])
        axes.yaxis.set_major_formatter("{x:g}")
    grid[0].set_ylabel("second board over first [%]")
    figure.legend(list(labels.values()), list(labels), loc="outside upper center", ncols=3)
    return figure


@figure_function
def errors_by_class(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    bar: float,
    width_inches: float = _WIDTH,
) -> Figure:
    """Every held-out error [%] by class, one panel a quantity; the p90 bar as a band.

    Parameters
    ----------
    panels : by title, errors [-] by the name of a row
    """
    rows = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure = new_figure(width_inches, 0.9 + 0.34 * len(rows))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, errors) in zip(grid, panels.items(), strict=True):
        axes.axvspan(-100 * bar, 100 * bar, color=MUTED, alpha=0.18, lw=0)
        axes.axvline(0.0, color=INK, lw=0.8)
        for row, name in enumerate(rows):
            values = 100.0 * np.sort(np.asarray(errors.get(name, ())))
            spread = row + 0.3 * np.sin(np.arange(len(values)) * 2.4)  # apart, the same every time
            axes.scatter(values, spread, s=10, color=COLORS[row % 2], alpha=0.8, lw=0)
            if len(values):
                axes.plot([np.median(values)] * 2, [row - 0.4, row + 0.4], color=INK, lw=1.6)
        axes.set(title=title, xlabel="predicted over measured [%]")
        axes.set_xscale("symlog", linthresh=20.0)
        axes.set_xticks([-50, -20, -10, 0, 10, 20, 50])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    grid[0].set_yticks(range(len(rows)), rows)
    grid[0].invert_yaxis()
    return figure


# -- those of the page ------------------------------------------------------------------------


def figures(boards: Sequence[Board], errors: Mapping[str, HeldOut]) -> dict[str, Figure]:
    """Figures of the page by file; those without data are left out.

    Raises
    ------
    EnergyModelError
        If matplotlib is not installed.
    """
    found: dict[str, Figure] = {}
    experts, graphs, gemms = (list(f(boards)) for f in (_expert_curves, _graph_curves, gemm_curves))
    if experts:
        found[MOE] = two_rows(
            experts,
            x_label="tokens",
            upper_label="time over the GEMM's [-]",
            lower_label="energy over the GEMM's [-]",
            stated={tables.PAPER_MODEL: _stated()},
        )
    if graphs:
        found[GRAPH] = two_rows(
            graphs,
            x_label="sequences in the batch",
            upper_label="graph's time over eager [-]",
            lower_label="graph's energy over eager [-]",
            logarithmic=False,
        )
    if gemms:
        found[GEMM] = two_rows(
            gemms,
            x_label="rows m",
            upper_label="rate [TFLOP/s]",
            lower_label="energy [pJ/FLOP]",
            reference=None,
        )
    gpus = {board.name: board.gpu for board in boards}
    pairs: dict[str, list[Sequence[Repeat]]] = {}
    for pair in repeats(boards):
        pairs.setdefault(gpus[pair[0].boards[0]].upper(), []).append(pair)
    if pairs:
        found[BOARDS] = board_differences(
            {
                title: [_cloud(gpu, each, value) for gpu, each in pairs.items()]
                for title, value in _DIFFERENCES.items()
            },
            bar=BAR,
        )
    if errors:
        found[ERRORS] = errors_by_class(
            {
                quantity: {
                    f"{gpu.upper()}, {name}": of_class(mine, name).errors()[quantity].tolist()
                    for name in CLASSES
                    for gpu, mine in errors.items()
                    if name not in WITHOUT_BAR
                }
                for quantity in ("seconds", "joules")
            },
            bar=P90_BAR,
        )
    return found


_DIFFERENCES: Mapping[str, Callable[[Repeat], float | None]] = {
    "seconds": lambda r: r.seconds,
    "watts": lambda r: r.watts,
    "joules": lambda r: r.joules,
}


def _cloud(
    gpu: str, pairs: Sequence[Sequence[Repeat]], value: Callable[[Repeat], float | None]
) -> Cloud:
    known = [
        (float(r.first["power_watts"]), v)
        for pair in pairs
        for r in pair
        if (v := value(r)) is not None
    ]
    count = f"{len(pairs)} pair{'s' if len(pairs) > 1 else ''} of boards"
    return Cloud(label=f"{gpu}, {count}", x=[x for x, _ in known], y=[y for _, y in known])


def _stated() -> tuple[list[float], list[float]]:
    known = tables.findings()
    batches = tables.STATED_BATCHES
    return list(batches.values()), [1.0 + (known[name].stated or 0.0) for name in batches]


def _expert_curves(boards: Sequence[Board]) -> Iterator[Curve]:
    for gpu in tables.gpus_of(boards):
        works = tables.experts_of(tables.of_gpu(boards, gpu))
        for model in dict.fromkeys(work.model for work in works):
            for kernel in ("fused", "grouped", "loop"):
                points = [
                    (w.tokens, tables.over_gemm(k, kernel, tables.SECONDS),
                     tables.over_gemm(k, kernel, tables.JOULES))
                    for w, k in works.items() if w.model == model and not w.skewed
                ]  # fmt: skip
                known = [(x, s, j) for x, s, j in points if s is not None and j is not None]
                if known:
                    x, seconds, joules = zip(*known, strict=True)
                    yield Curve(
                        gpu=gpu, variant=kernel, panel=model, x=x, upper=seconds, lower=joules
                    )


def _graph_curves(boards: Sequence[Board]) -> Iterator[Curve]:
    for gpu in tables.gpus_of(boards):
        steps = tables.graph_steps(tables.of_gpu(boards, gpu))
        for model in dict.fromkeys(model for model, _ in steps):
            batches = [batch for name, batch in steps if name == model]
            seconds, joules = (
                [tables.graph_over_eager(steps[model, b], field) for b in batches]
                for field in (tables.SECONDS, tables.JOULES)
            )
            yield Curve(
                gpu=gpu, variant="graph", panel=model, x=batches, upper=seconds, lower=joules
            )


def gemm_curves(boards: Sequence[Board]) -> Iterator[Curve]:
    """Rate and energy of two weight matrices over the rows, by GPU model and dtype."""
    for gpu in tables.gpus_of(boards):
        chosen: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
        for records in by_case(tables.of_gpu(boards, gpu)).values():
            r = records[0]
            if r["op_class"] != "gemm" or r["shape"]["resident"] or r["family"] not in _GEMM_SHOWN:
                continue
            rate = middle(records, flops_per_second)
            joules = middle(records, tables.JOULES) / r["flops"]
            points = chosen.setdefault((r["family"], r["dtype"]), {})
            points[int(r["shape"]["m"])] = (rate / 1e12, joules * 1e12)
        for (family, dtype), points in sorted(chosen.items()):
            rows = sorted(points)
            yield Curve(
                gpu=gpu,
                variant=dtype,
                panel=family,
                x=rows,
                upper=[points[m][0] for m in rows],
                lower=[points[m][1] for m in rows],
            )
