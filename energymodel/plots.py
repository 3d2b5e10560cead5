"""Figures of results, drawn with matplotlib: pip install 'energymodel[report]'.

Every function takes results or arrays and returns a `Figure`; none shows or saves anything. All
look alike (`plot_style.py`), and the HTML report shows the same figures.

>>> import energymodel
>>> from energymodel import plots
>>> result = energymodel.predict("translation", gpu="a100", arrivals="offline")
>>> figure = plots.energy_breakdown(result)
>>> figure.savefig("breakdown.png")  # doctest: +SKIP

Those of one prediction are in `prediction_plots.py`, those that compare in `comparison_plots.py`,
those of settings and fleets in `fleet_plots.py`.
"""

from energymodel.comparison_plots import (
    BatchCurve,
    MeasuredPoint,
    errors_and_coverage,
    graph_against_eager,
    joules_per_token_over_batch,
    moe_against_dense,
    pareto,
    predicted_against_measured,
)
from energymodel.fleet_plots import (
    energy_by_component,
    latency_against_targets,
    replicas_over_time,
)
from energymodel.prediction_plots import (
    bin_heatmap,
    energy_breakdown,
    latency,
    naive_gap,
    power_over_time,
    roofline,
)

__all__ = [
    "BatchCurve",
    "MeasuredPoint",
    "bin_heatmap",
    "energy_breakdown",
    "energy_by_component",
    "errors_and_coverage",
    "graph_against_eager",
    "joules_per_token_over_batch",
    "latency",
    "latency_against_targets",
    "moe_against_dense",
    "naive_gap",
    "pareto",
    "power_over_time",
    "predicted_against_measured",
    "replicas_over_time",
    "roofline",
]
