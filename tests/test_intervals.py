"""Intervals that widen with what a slow host would add."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import calibration, gpu, tiny

from calibration.fitting.fit_errors import bound, narrowest, ratio_errors
from calibration.validation.rows import offline
from energymodel.calibrations import IntervalCalibration, with_host_times
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
def test_a_host_that_matters_more_never_narrows(one: float, other: float) -> None:
    less, more = (INTERVAL.with_host(share) for share in sorted((one, other)))
    assert more.low <= less.low <= INTERVAL.low
    assert more.high >= less.high >= INTERVAL.high


def test_a_prediction_widens_by_what_a_slow_host_would_add_to_it() -> None:
    """To a batch that the host holds up; one that it does not keeps the interval."""
    made = calibration()
    spread = replace(made, intervals=dict.fromkeys(made.intervals, INTERVAL))
    batch = offline("a batch", [64] * 8, 32)
    found = predict(batch, gpu=gpu(), model=tiny(), calibration=spread)
    slow = predict(batch, gpu=gpu(), model=tiny(), calibration=with_host_times(spread, 1.5))
    share = slow.energy_joules / found.energy_joules - 1.0
    assert share > 0.1
    expected = INTERVAL.with_host(share)
    assert found.energy_joules_high == pytest.approx(found.energy_joules * expected.high)
    assert found.bins[0].energy_joules_low == pytest.approx(
        found.bins[0].energy_joules * expected.low
    )
    never = predict(batch, gpu=gpu(), model=tiny(), calibration=with_host_times(spread, 1e-9))
    assert never.energy_joules_high == pytest.approx(never.energy_joules * INTERVAL.high)


def test_the_narrowest_interval_by_hand() -> None:
    # nine of ten hold the next one with 9 / 11; a slow host adds 10 or 20 % to four, which err more
    errors = np.array([0.01, 0.01, 0.02, 0.02, 0.02, 0.02, 0.05, 0.05, 0.10, 0.30])
    slow = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2])
    size, spread = narrowest(errors, slow, level=0.8)
    # at 2 %: sqrt(0.05^2 - 0.02^2) / 0.1 = 0.458, sqrt(0.1^2 - 0.02^2) / 0.2 = 0.490
    assert size == 0.02
    assert spread == pytest.approx(0.4899, abs=1e-4)


def test_a_bound_leaves_the_next_error_its_chance() -> None:
    assert bound(np.arange(1.0, 20.0)) == 18.0  # ceil(0.9 x 20) of 19
    assert bound(np.arange(1.0, 19.0)) == 18.0  # 18 runs: their largest
    assert bound(np.array([0.3, 0.1])) == 0.3  # too few to promise 90 %


@given(st.integers(9, 60), st.integers(0, 2**32 - 1))
def test_a_bound_holds_the_share_that_it_promises(n: int, seed: int) -> None:
    """Of n + 1 exchangeable errors each is the next one of the others as often as any."""
    errors = np.random.default_rng(seed).permutation(n + 1).astype(float)
    below = [errors[i] <= bound(np.delete(errors, i)) for i in range(n + 1)]
    assert np.mean(below) >= 0.9


def test_an_error_counts_by_the_interval_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted 80 and 125 J where 100 J were measured: both need 25 %."""
    runs = [
        SimpleNamespace(joules=100.0, predicted=80.0),
        SimpleNamespace(joules=100.0, predicted=125.0),
    ]
    monkeypatch.setattr(
        "calibration.fitting.fit_errors.simulated",
        lambda runs, _: (np.array([runs[0].predicted]),),
    )
    assert ratio_errors([(run, None) for run in runs]) == pytest.approx([0.25, 0.25])  # type: ignore[misc]


def test_where_no_host_matters_the_narrowest_is_the_quantile() -> None:
    errors = np.linspace(0.01, 0.2, 20)
    assert narrowest(errors, np.zeros(20)) == (pytest.approx(errors[18]), 0.0)


@given(
    st.lists(
        st.tuples(st.floats(1e-4, 1.0), st.floats(0.0, 1.0) | st.just(0.0)), min_size=5, max_size=60
    )
)
def test_the_narrowest_holds_its_share(runs: list[tuple[float, float]]) -> None:
    errors, slow = np.array(runs).T
    size, spread = narrowest(errors, slow)
    held = errors <= np.hypot(size, spread * slow) * (1.0 + 1e-9)
    assert held.mean() >= 0.9
    assert size >= np.median(errors)
