"""When requests arrive: as in the trace, all at once, or at random."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from energymodel.errors import ConfigurationError, TraceError
from energymodel.traces import MAX_TOKENS, Requests

_LONGEST_SECONDS = 1e9  # 30 years; beyond it a step's length is lost in rounding


def with_arrivals(requests: Requests, arrivals: str, seed: int) -> Requests:
    """The requests with other arrival times, lengths and their order kept.

    Parameters
    ----------
    requests : Requests
    arrivals : str
        `trace` (as they are), `offline` (all at time 0) or `poisson:RATE`, a Poisson process of
        RATE requests per second.
    seed : int
        Of the Poisson process.

    Raises
    ------
    ConfigurationError
        If `arrivals` is none of these, or so slow that the last request arrives after 30 years.
    """
    n = requests.input_tokens.size
    if arrivals == "trace":
        return requests
    if arrivals == "offline":
        return replace(requests, arrival_seconds=np.zeros(n))
    kind, _, rate_text = arrivals.partition(":")
    try:
        rate = float(rate_text)
    except ValueError:
        rate = -1.0
    if kind != "poisson" or not np.isfinite(rate) or rate <= 0:
        raise ConfigurationError(
            f"--arrivals {arrivals} is not understood; it is trace, offline or poisson:RATE "
            "with RATE in requests per second, e.g. poisson:2.5"
        )
    if n > rate * _LONGEST_SECONDS:
        raise ConfigurationError(
            f"--arrivals {arrivals}: {n} requests would take more than 30 years to arrive; RATE is "
            "in requests per second"
        )
    # not the numbers that a built-in workload's lengths were drawn with
    gaps = np.random.default_rng((seed, 1)).exponential(1.0 / rate, n)
    return replace(requests, arrival_seconds=np.cumsum(gaps) - gaps[0])


def checked_requests(requests: Requests) -> Requests:
    """Requests built by a program, sorted by arrival and counted from the first one.

    Raises
    ------
    TraceError
        If the arrays differ in shape or are empty, a time is not finite, or a length is not a
        whole number from 1 to `MAX_TOKENS`, or a prompt has more cached tokens than it may.
    """
    name = requests.name
    arrival = np.asarray(requests.arrival_seconds, dtype=np.float64)
    inputs, outputs = np.asarray(requests.input_tokens), np.asarray(requests.output_tokens)
    if arrival.ndim != 1 or arrival.shape != inputs.shape or arrival.shape != outputs.shape:
        raise TraceError(
            f"{name}: arrival_seconds, input_tokens and output_tokens must be one-dimensional and "
            f"equally long, not {arrival.shape}, {inputs.shape}, {outputs.shape}"
        )
    if arrival.size == 0:
        raise TraceError(f"{name}: there is no request; a trace holds at least one")
    if not np.isfinite(arrival).all() or np.ptp(arrival) > _LONGEST_SECONDS:
        raise TraceError(
            f"{name}: arrival_seconds must be finite and within {_LONGEST_SECONDS:g} s"
        )
    for field, lengths in (("input_tokens", inputs), ("output_tokens", outputs)):
        whole = np.issubdtype(lengths.dtype, np.integer) or np.all(lengths == np.floor(lengths))
        if not whole or lengths.min() < 1 or lengths.max() > MAX_TOKENS:
            raise TraceError(f"{name}: {field} must be whole numbers from 1 to {MAX_TOKENS}")
    cached = requests.cached_tokens
    if cached is not None:
        cached = np.asarray(cached)
        if cached.shape != inputs.shape or (cached < 0).any() or (cached >= inputs).any():
            raise TraceError(f"{name}: cached_tokens must be from 0 to below input_tokens")
    order = np.argsort(arrival, kind="stable")
    return replace(
        requests,
        arrival_seconds=arrival[order] - arrival[order[0]],
        input_tokens=inputs[order].astype(np.int64),
        output_tokens=outputs[order].astype(np.int64),
        cached_tokens=None if cached is None else cached[order].astype(np.int64),
    )
