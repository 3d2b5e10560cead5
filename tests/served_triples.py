"""Small traces for the compiled simulator, as triples of arrival [s], input and output tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from reference_simulator import Outcome, as_arrays
from shapes import gpu

from energymodel.calibrations import Calibration
from energymodel.costs import CostTables, cost_tables
from energymodel.simulator import Simulation, simulate
from energymodel.specs import ModelSpec, ServingConfig

Triples = list[tuple[float, int, int]]

lengths = st.integers(1, 200)
# no arrival may fall on the very end of a step (multiples of 1e-5 s here): the order would be that
# of rounding errors, which jumps and single steps make in different places
arrival_seconds = st.integers(0, 20_000).map(lambda i: i * 1.000314159e-5)
requests = st.lists(
    st.tuples(arrival_seconds, lengths, st.integers(1, 60)),
    min_size=1,
    max_size=8,
)


def ordered(triples: Triples) -> Triples:
    triples = sorted(triples, key=lambda t: t[0])
    start = triples[0][0]
    return [(a - start, i, o) for a, i, o in triples]


def cached_tokens(shares: list[float], triples: Triples) -> list[int]:
    """Tokens of each prompt in the prefix cache, by shares of it."""
    return [int(share * (i - 1)) for share, (_, i, _) in zip(shares, triples, strict=False)]


def with_blocks(costs: CostTables, blocks: int) -> CostTables:
    """The costs where so many blocks of KV cache are free."""
    kv = costs.scheduler.kv._replace(blocks=blocks)
    return replace(costs, scheduler=costs.scheduler._replace(kv=kv))


def serve(
    triples: Triples,
    model: ModelSpec,
    serving: ServingConfig,
    calibration: Calibration,
    *,
    blocks: int | None = None,
    jump: bool = True,
    cached: list[int] | None = None,
) -> tuple[Simulation, CostTables]:
    costs = cost_tables(model, serving, gpu(), calibration)
    if blocks is not None:
        costs = with_blocks(costs, blocks)
    arrivals, inputs, outputs = (np.array(column) for column in zip(*triples, strict=True))
    result = simulate(
        arrivals.astype(float),
        inputs,
        outputs,
        costs,
        jump=jump,
        cached_tokens=None if cached is None else np.array(cached),
    )
    assert result is not None
    return result, costs


def assert_served_alike(result: Simulation, expected: Outcome, *, rtol: float = 1e-9) -> None:
    """The compiled simulator did what the plain one did."""
    first, finish = as_arrays(expected, len(result.finish_seconds))
    assert result.totals["steps"] == expected.steps
    assert result.totals["preemptions"] == expected.preemptions
    np.testing.assert_allclose(result.first_token_seconds, first, rtol=rtol)
    np.testing.assert_allclose(result.finish_seconds, finish, rtol=rtol)
    np.testing.assert_allclose(result.totals["idle_seconds"], expected.idle_seconds, atol=rtol)
    joules = result.totals["prefill_joules"] + result.totals["decode_joules"]
    np.testing.assert_allclose(joules, expected.joules, rtol=rtol)


def assert_same_run(fast: Simulation, slow: Simulation) -> None:
    """Steps taken at once came to what single ones did."""
    np.testing.assert_allclose(fast.finish_seconds, slow.finish_seconds, rtol=1e-9)
    np.testing.assert_allclose(fast.request_joules, slow.request_joules, rtol=1e-4)
    for name, value in slow.totals.items():
        np.testing.assert_allclose(fast.totals[name], value, rtol=1e-9, atol=1e-9)


def assert_shares_out_the_active_energy(result: Simulation) -> None:
    active = result.totals["prefill_joules"] + result.totals["decode_joules"]
    np.testing.assert_allclose(result.request_joules.sum(), active, rtol=1e-9)
    assert (result.request_joules > 0).all()
