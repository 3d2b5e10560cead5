"""Robust least squares whose result is the same on any machine, to more digits than are written.

A usual least-squares solver stops where the sum of squares no longer falls. That sum is flat at its
minimum: rounding, which differs from machine to machine, moves the result by 1e-7 and more. Here
Newton's method goes on from there until the gradient vanishes, with derivatives by complex steps
(Squire and Trapp 1998, SIAM Review 40), which have no error of differences:
f'(x) = Im f(x + ih) / h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TINY = 1e-30
"""Imaginary step of first derivatives."""
_DIFFERENCE = 1e-4
"""Step of second derivatives."""
_SAFE_UPDATE = 1e-8
"""Share of its largest possible size that the denominator of an update must have."""
_NEAR = 1e-9
"""Relative change of the sum of squares at which Newton's method takes over."""
_CONVERGED = 1e-11
"""Largest step at the end."""
_MOST_EVALUATIONS, _MOST_STEPS, _LONGEST_STEP = 500, 60, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Minimum:
    """Where the robust sum of squares is smallest."""

    x: Array
    """(parameters,)"""
    std: Array
    """(parameters,) standard deviations, where a residual of 1 is one standard deviation."""
    cost: float
    """Half the robust sum of squares."""
    converged: bool
    """Whether the gradient vanishes; else the digits may differ between machines."""


def robust_minimum(
    residuals: Callable[[NDArray[Any]], NDArray[Any]],
    start: Array,
    *,
    bounds: tuple[Array, Array],
    x_scale: Array,
    robust_scale: float,
) -> Minimum:
    """Minimise the sum of s**2 (sqrt(1 + (r/s)**2) - 1) over the residuals r ("soft L1").

    Parameters
    ----------
    residuals : of (parameters,) real or complex numbers, analytic almost everywhere
    start : (parameters,)
    bounds : lower and upper ones, each (parameters,)
    x_scale : (parameters,) typical steps
    robust_scale : s, the residual from which on the sum grows linearly
    """
    from scipy.optimize import least_squares  # noqa: PLC0415

    low, high = bounds
    directions = 1j * _TINY * np.eye(len(start))

    def jacobian(x: Array) -> Array:
        return np.stack([residuals(x + d).imag for d in directions], axis=1) / _TINY

    near = least_squares(
        residuals,
        np.clip(start, low + 1e-6, high - 1e-6),
        jac=jacobian,  # type: ignore[arg-type]
        bounds=bounds,
        loss="soft_l1",
        f_scale=robust_scale,
        x_scale=x_scale,
        ftol=_NEAR,
        max_nfev=_MOST_EVALUATIONS,
    )

    def cost(x: NDArray[Any]) -> Any:
        return robust_scale**2 * np.sum(np.sqrt(1.0 + (residuals(x) / robust_scale) ** 2) - 1.0)

    def gradient(x: Array, count: int) -> Array:
        """Of the cost, in the first `count` parameters."""
        return np.array([cost(x + d).imag for d in directions[:count]]) / _TINY

    squared = near.jac.T @ near.jac
    x, converged = _newton(gradient, near.x, low, high, squared, learning=True)
    if not converged:
        x, converged = _newton(gradient, near.x, low, high, _curvature(gradient, near.x))
    covariance = np.linalg.pinv(squared)
    return Minimum(x=x, std=np.sqrt(np.diag(covariance)), cost=float(cost(x)), converged=converged)


def _newton(
    gradient: Callable[[Array, int], Array],
    start: Array,
    low: Array,
    high: Array,
    hessian: Array,
    *,
    learning: bool = False,
) -> tuple[Array, bool]:
    """Where the gradient vanishes near `start`, within bounds, and True; else `start`, False.

    The second derivatives decide how fast it converges, not where. `learning` : they are improved
    by what the gradient does at each step (symmetric rank-one updates, Nocedal and Wright 2006,
    6.2), so that the sum of squares' own will do to begin with.
    """
    n = len(start)
    hessian, x, free = hessian.copy(), start.copy(), np.ones(n, dtype=bool)
    slope = gradient(x, n)
    for _ in range(_MOST_STEPS):
        step = np.zeros(n)
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], slope[free])
        length = np.abs(step).max(initial=0.0)
        if not length <= _LONGEST_STEP:
            break
        before, slope_before = x, slope
        x = x - step
        outside = (x < low) | (x > high)
        free &= ~outside
        x = np.clip(x, low, high)
        if length < _CONVERGED and not outside.any():
            return x, True
        slope = gradient(x, n)
        if learning:
            moved = x - before
            missing = slope - slope_before - hessian @ moved
            along = float(missing @ moved)
            if abs(along) > _SAFE_UPDATE * np.linalg.norm(missing) * np.linalg.norm(moved):
                hessian += np.outer(missing, missing) / along
    return start, False


def _curvature(gradient: Callable[[Array, int], Array], x: Array) -> Array:
    """Second derivatives by differences of the gradient, (parameters, parameters)."""
    n = len(x)
    before = gradient(x, n)
    hessian = np.zeros((n, n))
    for i in range(n):
        beside = x.copy()
        beside[i] += _DIFFERENCE
        hessian[i, : i + 1] = (gradient(beside, i + 1) - before[: i + 1]) / _DIFFERENCE
    hessian += np.tril(hessian, -1).T
    return hessian
