"""Joules per byte from published power."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from calibration.fitting.public_power import _command, bytes_factor
from calibration.fitting.serving_runs import Run, runs_of, simulated
from calibration.validation.rows import MeasuredRow, offline
from energymodel.calibrations import Calibration, load_calibration
from energymodel.errors import EnergyModelError
from energymodel.models import load_model

A100 = load_calibration("a100")


def run(batch: int) -> Run:
    """A batch of Llama-3.1-8B on an A100."""
    row = MeasuredRow(
        source="made up",
        name="row",
        gpu="a100",
        model=load_model("llama-3.1-8b"),
        model_name="llama-3.1-8b",
        stack="vllm",
        phase="batch",
        batch=batch,
        requests=offline("row", [128] * batch, 64),
        joules_per_output_token=1.0,
        seconds_per_output_token=1.0,
    )
    return runs_of([row])[0]


def times(factor: float, start: Calibration) -> Calibration:
    return replace(
        start,
        joules_per_hbm_byte=start.joules_per_hbm_byte * factor,
        joules_per_onchip_byte=start.joules_per_onchip_byte * factor,
    )


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_the_factor_behind_the_watts_is_found_whatever_the_seconds(factor: float) -> None:
    runs = []
    for batch in (1, 2, 8):
        made = run(batch)
        joules, seconds, *_ = simulated([made], times(factor, A100))
        runs.append(replace(made, joules=2.0 * joules[0], seconds=2.0 * seconds[0]))
    assert bytes_factor(runs, A100) == pytest.approx(factor, rel=1e-6)


def test_power_that_no_factor_explains_is_refused() -> None:
    with pytest.raises(EnergyModelError, match=r"no factor.*0\.2 to 5"):
        bytes_factor([replace(run(1), joules=1e6, seconds=1.0)], A100)


def test_without_data_the_command_says_so(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(_command)
    outcome = CliRunner().invoke(app, [str(tmp_path)])
    assert outcome.exit_code == 2
