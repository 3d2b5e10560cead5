"""A prediction as one web page: where the joules go, when, for which requests, and why."""

from __future__ import annotations

from functools import partial

from energymodel import plots
from energymodel.html_report import Chart, html_page
from energymodel.report import COMPONENTS, LATENCIES, render, setup_text, share_text
from energymodel.results import Prediction


def prediction_page(result: Prediction) -> str:
    """The page of `predict --report`; the JSON in it is that of `--format json`.

    Raises
    ------
    EnergyModelError
        If a library is missing.
    """
    charts = {
        "breakdown": Chart(
            draw=partial(plots.energy_breakdown, result),
            label="Energy by phase, component and operator",
        ),
        "bins": Chart(
            draw=partial(plots.bin_heatmap, result.bins),
            label="Energy by bin of input and output length",
        ),
        "naive": Chart(
            draw=partial(plots.naive_gap, result), label="Simple rules against the prediction"
        ),
        "roofline": Chart(
            draw=partial(plots.roofline, result), label="Roofline with the workload's operators"
        ),
        "latency": Chart(draw=partial(plots.latency, result), label="Latency percentiles"),
    }
    if result.timeline is not None:
        charts["power"] = Chart(
            draw=partial(plots.power_over_time, result), label="Power over time by phase"
        )
    return html_page(
        "prediction.html",
        render(result, "json"),
        charts,
        setup=setup_text(result),
        share=lambda joules: share_text(joules / result.energy_joules),
        components=COMPONENTS,
        latencies=LATENCIES,
        busy=result.busy_seconds / (result.wall_seconds * result.replicas),
    )
