"""A validation as one web page: aims, errors by group, predicted against measured, every row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from calibration.validation.public_runs import SOURCES
from calibration.validation.validate import NAIVE_RULES, ErrorStats, Validation, by_source, group_by
from energymodel import plots
from energymodel.html_report import Chart, html_page


def validation_page(
    validation: Validation, result_json: str, points: Sequence[plots.MeasuredPoint]
) -> str:
    """The page of `validate --report FILE.html`.

    Parameters
    ----------
    validation : what is shown
    result_json : the same as `--format json` prints it; every number is taken from it
    points : of the chart of predicted against measured

    Raises
    ------
    EnergyModelError
        If a library is missing.
    """
    charts = {
        "points": Chart(
            draw=partial(plots.predicted_against_measured, points),
            label="Predicted against measured joules per output token",
        )
    }
    for split, fitted in (("held_out", False), ("fit", True)):
        groups = group_by(validation.comparisons, by_source, fitted=fitted)
        if groups:
            charts[split] = Chart(
                draw=partial(
                    plots.errors_and_coverage,
                    [f"{group.name} ({group.rows})" for group in groups],
                    [_statistic(group.joules, "median_abs") for group in groups],
                    [_statistic(group.joules, "p90_abs") for group in groups],
                    [_statistic(group.naive["flops_tdp"], "median_abs") for group in groups],
                    [np.nan if g.coverage is None else g.coverage for g in groups],
                ),
                label="Errors of the energy and coverage of the interval by source",
            )
    sources = dict.fromkeys(c.row.source for c in validation.comparisons)
    return html_page(
        "validation.html",
        result_json,
        charts,
        rules=NAIVE_RULES,
        sources={
            name: f"{SOURCES[name].title}. {SOURCES[name].citation}. {SOURCES[name].assumption}"
            for name in sources
            if name in SOURCES
        },
    )


def _statistic(stats: ErrorStats | None, name: str) -> float:
    return np.nan if stats is None else float(getattr(stats, name))
