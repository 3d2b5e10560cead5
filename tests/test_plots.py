"""Figures: they show the result's numbers, say their units, look alike and leave no trace."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import energymodel
from energymodel import plots
from energymodel.errors import EnergyModelError
from energymodel.plot_style import COLORS, NARROW_INCHES
from energymodel.report import joules_text
from energymodel.results import Prediction

mpl = pytest.importorskip("matplotlib", reason="the figures' library is an extra")
from matplotlib.figure import Figure  # noqa: E402

BATCHES = [1, 2, 4, 8]


def curve(gpu: str, variant: str, joules: list[float]) -> plots.BatchCurve:
    return plots.BatchCurve(gpu=gpu, variant=variant, batch=BATCHES, joules_per_output_token=joules)


GRAPH = [curve("a100", "vllm", [4.0, 2.0, 1.0, 0.5]), curve("h100", "vllm", [2.0, 1.0, 0.5, 0.3])]
EAGER = [
    curve("a100", "vllm-eager", [8.0, 3.0, 1.2, 0.5]),
    curve("h100", "vllm-eager", [5.0, 2.0, 0.7, 0.3]),
]
POINTS = [
    plots.MeasuredPoint(
        source=f"lab {i % 3}",
        kind=("batch", "trace")[i % 2],
        name=f"run {i}",
        fitted=i == 0,
        batch=2**i,
        measured_joules=0.1 * (i + 1),
        predicted_joules=0.11 * (i + 1),
    )
    for i in range(6)
]


@pytest.fixture(scope="module")
def result() -> Prediction:
    return energymodel.predict("translation", gpu="a100", arrivals="poisson:2")


Draw = Callable[..., Figure]
OF_A_RESULT: dict[str, Draw] = {
    "energy_breakdown": plots.energy_breakdown,
    "bin_heatmap": lambda result, **options: plots.bin_heatmap(result.bins, **options),
    "naive_gap": plots.naive_gap,
    "roofline": plots.roofline,
    "power_over_time": plots.power_over_time,
    "latency": plots.latency,
}
COMPARING: dict[str, Draw] = {
    "joules_per_token_over_batch": lambda **o: plots.joules_per_token_over_batch(GRAPH, **o),
    "graph_against_eager": lambda **o: plots.graph_against_eager(GRAPH, EAGER, **o),
    "moe_against_dense": lambda **o: plots.moe_against_dense(GRAPH, EAGER, **o),
    "predicted_against_measured": lambda **o: plots.predicted_against_measured(POINTS, **o),
    "pareto": lambda **o: plots.pareto([1.0, 2.0], [3.0, 1.0], ["a", "b"], [True, True], **o),
    "energy_by_component": lambda **o: plots.energy_by_component(
        ["a", "b"], [{"base": 2.0, "hbm": 3.0}, {"base": 1.0, "link": 0.5, "idle": 0.0}], **o
    ),
    "latency_against_targets": lambda **o: plots.latency_against_targets(
        {
            "chat": {"ttft_seconds": {"p50": 0.1, "p99": 0.4}, "tpot_seconds": {"p99": 0.02}},
            "one token": {"ttft_seconds": {"p50": 0.1, "p99": 0.4}, "tpot_seconds": {}},
        },
        ttft_seconds=1.0,
        **o,
    ),
    "replicas_over_time": lambda **o: plots.replicas_over_time(
        ["chat", "code"], [[1, 3, 2], [0, 1, 1]], 1800.0, **o
    ),
    "errors_and_coverage": lambda **o: plots.errors_and_coverage(
        ["lab 1", "lab 2"], [0.05, 0.2], [0.1, 0.5], [0.7, np.nan], [0.95, np.nan], **o
    ),
}


def all_figures(result: Prediction, **options: float) -> dict[str, Figure]:
    figures = {name: draw(result, **options) for name, draw in OF_A_RESULT.items()}
    return figures | {name: draw(**options) for name, draw in COMPARING.items()}


def hover_texts(figure: Figure) -> list[str]:
    return [gid for artist in figure.findobj() if (gid := artist.get_gid()) is not None]


def test_every_public_name_is_a_figure_tried_here() -> None:
    functions = {name for name in plots.__all__ if name[0].islower()}
    assert functions == OF_A_RESULT.keys() | COMPARING.keys()


@pytest.mark.parametrize("width", [8.0, NARROW_INCHES - 1.0])
def test_figures_say_their_units_and_look_alike(result: Prediction, width: float) -> None:
    before = dict(mpl.rcParams)
    for name, figure in all_figures(result, width_inches=width).items():
        assert isinstance(figure, Figure), name
        assert figure.get_figwidth() == width
        figure.canvas.draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                label = axis.get_label_text()
                ticks = [tick.get_text() for tick in axis.get_ticklabels()]
                numbers = [tick for tick in ticks if re.match(r"[\d$−]", tick)]  # noqa: RUF001
                with_units = [tick for tick in numbers if re.search(r"[A-Za-z]$", tick)]
                counted = re.search("sequences|tokens|replicas", label)
                assert not numbers or "[" in label or with_units or counted, (name, ticks, label)
            assert not axes.spines["top"].get_visible(), name
            sizes = {tick.get_fontsize() for tick in axes.get_xticklabels() if tick.get_text()}
            assert sizes <= {8.0}, name
        assert hover_texts(figure), name
    assert dict(mpl.rcParams) == before


def test_colours_differ_in_lightness_or_hue_for_everybody() -> None:
    """No two are confused by dichromats: differences in lightness or along blue-yellow."""
    rgb = np.array([mpl.colors.to_rgb(color) for color in COLORS])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    # protanopia and deuteranopia, Viénot, Brettel and Mollon (1999), linear RGB
    for blind in (
        [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
        [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
    ):
        seen = np.clip(linear @ np.array(blind).T, 0.0, 1.0) ** (1 / 2.2)
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        assert distance[~np.eye(len(COLORS), dtype=bool)].min() > 0.08


def bar_widths(figure: Figure, panel: int) -> list[float]:
    return [bar.get_width() for bar in figure.axes[panel].patches]


def test_breakdowns_add_up_to_the_energy(result: Prediction) -> None:
    figure = plots.energy_breakdown(result)
    for panel in range(3):
        assert sum(bar_widths(figure, panel)) == pytest.approx(result.energy_joules, rel=1e-9)


def test_naive_bars_are_the_rules_answers(result: Prediction) -> None:
    widths = bar_widths(plots.naive_gap(result), 0)
    assert set(result.naive.values()) | {result.energy_joules} <= set(widths)


def test_heat_map_has_a_cell_for_each_bin(result: Prediction) -> None:
    texts = hover_texts(plots.bin_heatmap(result.bins))
    assert len(texts) == len(result.bins)
    for b in result.bins:
        start = f"input {b.input_low}-{b.input_high}, output {b.output_low}-{b.output_high}: "
        (text,) = (text for text in texts if text.startswith(start))
        assert text.startswith(start + joules_text(b.energy_joules))


def test_roofline_points_lie_under_the_roof(result: Prediction) -> None:
    figure = plots.roofline(result)
    points = {
        artist.get_gid().split(":")[0]: artist.get_offsets()[0]
        for artist in figure.axes[0].collections
        if artist.get_gid()
    }
    assert {"up_proj", "attention_decode", "logits"} <= points.keys()
    for name, (intensity, speed) in points.items():
        work = result.operator_work[name]
        assert intensity == pytest.approx(work.executed_flops / work.hbm_bytes)
        assert speed == pytest.approx(work.executed_flops / work.gpu_seconds)
        assert speed <= min(result.peak_flops_per_s, result.hbm_bytes_per_s * intensity)


def test_area_under_the_power_is_the_energy(result: Prediction) -> None:
    figure = plots.power_over_time(result)
    heights, edges, _ = max(
        (patch.get_data() for patch in figure.axes[0].patches if hasattr(patch, "get_data")),
        key=lambda data: data.values.sum(),
    )
    hours_minutes_or_seconds = result.wall_seconds / edges[-1]
    joules = (heights * np.diff(edges)).sum() * hours_minutes_or_seconds
    assert joules == pytest.approx(result.energy_joules, rel=1e-9)


def test_no_power_over_time_without_a_timeline(result: Prediction) -> None:
    with pytest.raises(ValueError, match="paper's accounting"):
        plots.power_over_time(replace(result, timeline=None))


def test_savings_are_of_pairs() -> None:
    figure = plots.graph_against_eager(GRAPH, EAGER)
    (a100, h100, _zero) = (line.get_ydata() for line in figure.axes[1].lines)
    np.testing.assert_allclose(a100, [50.0, 100.0 / 3, 100.0 / 6, 0.0])
    np.testing.assert_allclose(h100[0], 60.0)
    with pytest.raises(ValueError, match="do not pair"):
        plots.graph_against_eager(GRAPH, EAGER[::-1])


def test_front_is_joined_in_order_of_latency() -> None:
    figure = plots.pareto(
        [3.0, 1.0, 5.0, 2.0], [1.0, 9.0, 8.0, 4.0], list("abcd"), [True, True, False, True]
    )
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[1, 3], [4, 2], [9, 1]])


def test_points_on_top_of_each_other_share_their_name_and_the_target_is_a_line() -> None:
    figure = plots.pareto(
        [3.0, 3.0, 5.0],
        [1.0, 1.0, 0.5],
        ["long a", "long b", "long c"],
        [True] * 3,
        marks=["1", "2", "3"],
        target_seconds=2.0,
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["3", "1, 2"]
    assert "target: TTFT p99 at most 2.00 s" in hover_texts(figure)


def test_names_that_would_cover_others_are_left_out() -> None:
    seconds = np.linspace(1.0, 2.0, 300)
    figure = plots.pareto(
        1.0 / seconds, seconds, [f"setting {i}" for i in range(300)], [True] * 300
    )
    names = figure.axes[0].texts
    assert 3 < len(names) < 60
    assert len(hover_texts(figure)) == 300


def test_bars_by_component_add_up_and_leave_out_what_is_not_there() -> None:
    figure = COMPARING["energy_by_component"]()
    ends = [p.get_x() + p.get_width() for p in figure.axes[0].patches if p.get_width()]
    assert ends == [2.0, 5.0, 1.0, 1.5]
    assert any("b: link 500 mJ, 33.3%" in text for text in hover_texts(figure))


def test_replicas_of_every_period_can_be_pointed_at() -> None:
    texts = hover_texts(COMPARING["replicas_over_time"]())
    assert texts == [
        "0 s to 30.0 min: chat: 1, code: 0",
        "30.0 min to 60.0 min: chat: 3, code: 1",
        "60.0 min to 90.0 min: chat: 2, code: 1",
    ]


def test_a_group_without_a_figure_has_no_bar() -> None:
    texts = hover_texts(COMPARING["errors_and_coverage"]())
    assert "lab 1: 95 % of measured energies are in the interval" in texts
    assert not any("lab 2" in text and ("interval" in text or "FLOPs" in text) for text in texts)


def test_a_validation_without_rows_is_drawn() -> None:
    plots.predicted_against_measured([]).canvas.draw()


def test_missing_matplotlib_is_said(result: Prediction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnergyModelError, match=r"pip install 'energymodel\[report\]'"):
        plots.latency(result)
