"""Tokens that a round of speculative decoding gives, and the acceptance that makes it worth it.

If every drafted token is accepted with the same probability, independently, a round of g drafted
tokens gives (1 - a**(g + 1)) / (1 - a) tokens to each sequence on average (Leviathan et al., ICML
2023, arXiv 2211.17192, equation 1): those accepted before the first rejection, and the check's own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energymodel.errors import ConfigurationError

Array = NDArray[np.float64]


def expected_tokens(acceptance: ArrayLike, draft_tokens: int) -> Array:
    """Tokens that a round gives a sequence on average [-], from 1 to draft_tokens + 1.

    Raises
    ------
    ConfigurationError
        If `acceptance` is not in [0, 1] or `draft_tokens` is below 1.
    """
    a = np.asarray(acceptance, dtype=np.float64)
    if draft_tokens < 1:
        raise ConfigurationError(f"{draft_tokens} draft tokens make no sense; it is at least 1")
    if not ((a >= 0.0) & (a <= 1.0)).all():
        raise ConfigurationError(f"an acceptance lies between 0 and 1, not {a}")
    # the sum of a**i, i = 0 .. g, equals the closed form and has no 0/0 at a = 1
    powers: Array = a[..., np.newaxis] ** np.arange(draft_tokens + 1.0)
    total: Array = powers.sum(axis=-1)
    return total


def break_even_acceptance(round_per_step: ArrayLike, draft_tokens: int) -> Array:
    """Acceptance at which a round gives as many tokens as plain steps for its cost would [-].

    Parameters
    ----------
    round_per_step : cost of a round over that of a plain step [-], any shape

    Returns
    -------
    ndarray
        0 where a round costs no more than a step, NaN where it costs more than draft_tokens + 1.
    """
    needed = np.asarray(round_per_step, dtype=np.float64)
    low, high = np.zeros_like(needed), np.ones_like(needed)
    for _ in range(60):  # expected_tokens grows with the acceptance
        middle = 0.5 * (low + high)
        enough = expected_tokens(middle, draft_tokens) >= needed
        high = np.where(enough, middle, high)
        low = np.where(enough, low, middle)
    return np.where(needed > draft_tokens + 1.0, np.nan, np.where(needed <= 1.0, 0.0, high))
