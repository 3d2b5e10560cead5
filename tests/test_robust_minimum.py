"""Robust least squares to the last digit: known minima, bounds, kinks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calibration.fitting.robust_minimum import Minimum, robust_minimum

FAR = 1e6
"""Robust scale so large that the sum is that of squares."""


def minimum(residuals: Any, start: list[float], **changes: Any) -> Minimum:
    n = len(start)
    options = {
        "bounds": (np.full(n, -10.0), np.full(n, 10.0)),
        "x_scale": np.ones(n),
        "robust_scale": FAR,
    }
    return robust_minimum(residuals, np.array(start), **(options | changes))


def test_a_line_through_points_by_hand() -> None:
    # y = 1, 3, 5.3 at 0, 1, 2: slope 4.3 / 2, intercept 9.3 / 3 - slope
    x, y = np.arange(3.0), np.array([1.0, 3.0, 5.3])
    found = minimum(lambda p: p[0] + p[1] * x - y, [0.1, 0.2])
    assert found.converged
    assert found.x == pytest.approx([9.3 / 3 - 2.15, 2.15], rel=1e-6)
    assert found.std == pytest.approx([np.sqrt(5 / 6), np.sqrt(1 / 2)], rel=1e-6)


def test_an_outlier_counts_less_than_its_square() -> None:
    values = np.array([0.0, 0.0, 0.0, 0.0, 8.0])
    plain = minimum(lambda p: p[0] - values, [0.5])
    robust = minimum(lambda p: p[0] - values, [0.5], robust_scale=0.1)
    assert plain.x[0] == pytest.approx(1.6, rel=1e-4)
    assert 0.0 < robust.x[0] < 0.1


def test_two_starts_end_at_the_same_digits() -> None:
    x = np.linspace(0.1, 3.0, 20)
    y = 2.0 * np.exp(-0.7 * x) + 0.01 * np.sin(40 * x)

    def residuals(p: Any) -> Any:
        return p[0] * np.exp(p[1] * x) - y

    one, two = minimum(residuals, [1.0, -0.1]), minimum(residuals, [3.0, -1.5])
    assert one.converged
    assert two.converged
    assert np.abs(one.x - two.x).max() < 1e-11


def test_a_minimum_beyond_a_bound_lies_on_it() -> None:
    found = minimum(
        lambda p: np.array([p[0] - 3.0, p[1] - 1.0 + 0.5 * p[0]]),
        [0.0, 0.0],
        bounds=(np.full(2, -2.0), np.full(2, 2.0)),
    )
    assert found.x == pytest.approx([2.0, 0.0], abs=1e-5)


def test_a_kink_is_said_not_to_repeat() -> None:
    def residuals(p: Any) -> Any:
        below = np.where(p.real < 0.3, 0.3 - p, 3.0 * (p - 0.3))
        return np.array([below[0] + 1.0])

    found = minimum(residuals, [0.0])
    assert found.x[0] == pytest.approx(0.3, abs=1e-2)
    assert not found.converged
