"""Intervals that widen where a GPU waits for its host."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import calibration, gpu, tiny

from energymodel.calibrations import IntervalCalibration
from energymodel.workload import predict

INTERVAL = IntervalCalibration(level=0.9, low=1 / 1.03, high=1.03, basis="made up", host_spread=0.4)


def test_the_width_by_hand() -> None:
    # 3 % and 0.4 x 0.1 = 4 % at right angles: 5 %
    found = INTERVAL.with_host(0.1)
    assert found.high == pytest.approx(1.05)
    assert found.low == pytest.approx(1 / 1.05)
    assert INTERVAL.with_host(0.0) == INTERVAL
    fixed = replace(INTERVAL, host_spread=0.0)
    assert fixed.with_host(0.9) == fixed


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_waiting_never_narrows(one: float, other: float) -> None:
    less, more = (INTERVAL.with_host(share) for share in sorted((one, other)))
    assert more.low <= less.low <= INTERVAL.low
    assert more.high >= less.high >= INTERVAL.high


def test_a_prediction_widens_by_its_own_waiting() -> None:
    made = calibration()
    spread = replace(made, intervals=dict.fromkeys(made.intervals, INTERVAL))
    found = predict("summarization", gpu=gpu(), model=tiny(), calibration=spread, replicas=4)
    share = found.by_component_joules["host_wait"] / found.energy_joules
    assert share > 0.0
    expected = INTERVAL.with_host(share)
    assert found.energy_joules_high == pytest.approx(found.energy_joules * expected.high)
    assert found.bins[0].energy_joules_low == pytest.approx(
        found.bins[0].energy_joules * expected.low
    )
