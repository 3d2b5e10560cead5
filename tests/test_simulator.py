"""The compiled simulator against the plain one, and what any scheduler must obey."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_simulator import simulate as simulate_plainly
from served_triples import (
    assert_same_run,
    assert_served_alike,
    assert_shares_out_the_active_energy,
    cached_tokens,
    ordered,
    requests,
    serve,
)
from shapes import calibration, gpu, tiny

from energymodel.costs import CostTables, cost_tables, operator_totals
from energymodel.kv_cache import kv_cache
from energymodel.operators import operator_table
from energymodel.simulator import PassCounts, Simulation, simulate
from energymodel.specs import ModelSpec, ServingConfig

SMALL = ServingConfig(max_batch=4, max_step_tokens=64, graph_batch_sizes=(1, 2, 4, 8, 16))


def run(
    model: ModelSpec,
    triples: list[tuple[float, int, int]],
    serving: ServingConfig = SMALL,
    *,
    blocks: int | None = None,
    jump: bool = True,
    cap: float = 1e6,
    cached: list[int] | None = None,
) -> tuple[Simulation, CostTables]:
    fitted = calibration(power_cap_watts=cap)
    return serve(triples, model, serving, fitted, blocks=blocks, jump=jump, cached=cached)


def with_layers(model: ModelSpec, counts: tuple[int, int]) -> ModelSpec:
    """The model of two kinds of layers with so many of each."""
    kinds = zip(model.layers, counts, strict=True)
    return replace(model, layers=tuple(replace(g, count=n) for g, n in kinds if n))


def counted(result: Simulation, kind: int = 0) -> dict[str, Any]:
    """Arguments of `operator_totals`."""
    return {f.name: getattr(result.passes[kind], f.name) for f in fields(PassCounts)}


@pytest.mark.parametrize("stack", ["vllm", "vllm-eager"])
@pytest.mark.parametrize("shape", ["dense", "experts", "window"])
@settings(max_examples=15)
@given(triples=requests)
def test_equals_the_plain_simulator(
    stack: str, shape: str, triples: list[tuple[float, int, int]]
) -> None:
    model = {"dense": tiny(), "experts": tiny(experts=8), "window": tiny(window=50)}[shape]
    serving = ServingConfig(
        stack=stack,  # type: ignore[arg-type]
        max_batch=4,
        max_step_tokens=64,
        graph_batch_sizes=(1, 2, 4, 8, 16),
    )
    triples = ordered(triples)
    # blocks for the longest request and a little more: preemption happens
    groups = 2 if shape == "window" else 1  # of layers, each with blocks of its own
    blocks = groups * max(-(-(i + o) // 16) for _, i, o in triples) + 6
    result, _ = run(model, triples, serving, blocks=blocks)
    arrivals, inputs, outputs = (list(c) for c in zip(*triples, strict=True))
    expected = simulate_plainly(
        arrivals,
        inputs,
        outputs,
        model=model,
        serving=serving,
        gpu=gpu(),
        calibration=calibration(),
        blocks=blocks,
    )
    assert_served_alike(result, expected)


@pytest.mark.parametrize(
    ("budget", "batch", "layers"),
    [
        (4, 4, (1, 1)),
        (5, 4, (1, 5)),
        (64, 1, (1, 1)),
        (7, 6, (3, 2)),
        (64, 4, (1, 3)),
        (9, 6, (0, 1)),
    ],
)
@settings(max_examples=15)
@given(triples=requests, spare=st.integers(0, 20), shares=st.lists(st.floats(0, 1), min_size=8))
def test_equals_the_plain_simulator_where_it_is_tight(
    budget: int,
    batch: int,
    layers: tuple[int, int],
    triples: list[tuple[float, int, int]],
    spare: int,
    shares: list[float],
) -> None:
    """Few tokens a step, few blocks, and prompts that are partly in the prefix cache.

    layers : those that keep the whole context, and those with a window
    """
    serving = replace(SMALL, max_step_tokens=budget, max_batch=batch)
    triples = ordered(triples)
    cached = cached_tokens(shares, triples)
    model = with_layers(tiny(window=50), layers)
    kv = kv_cache(model, serving, gpu())
    groups = kv.full_groups + kv.window_groups
    blocks = groups * max(-(-(i + o) // 16) for _, i, o in triples) + spare
    result, _ = run(model, triples, serving, blocks=blocks, cached=cached)
    arrivals, inputs, outputs = (list(c) for c in zip(*triples, strict=True))
    expected = simulate_plainly(
        arrivals,
        inputs,
        outputs,
        model=model,
        serving=serving,
        gpu=gpu(),
        calibration=calibration(),
        blocks=blocks,
        cached=cached,
    )
    assert_served_alike(result, expected)


@given(triples=requests)
def test_jumping_under_the_limit_changes_little(
    triples: list[tuple[float, int, int]],
) -> None:
    """Costs are only nearly linear in the context there."""
    triples = ordered(triples)
    fast, _ = run(tiny(), triples, cap=140.0)
    slow, _ = run(tiny(), triples, cap=140.0, jump=False)
    np.testing.assert_allclose(fast.finish_seconds, slow.finish_seconds, rtol=1e-6)
    for name in ("prefill_joules", "decode_joules", "gpu_seconds", "throttled_seconds"):
        assert fast.totals[name] == pytest.approx(slow.totals[name], rel=1e-5, abs=1e-9)


def test_a_cached_prefix_saves_its_prefill() -> None:
    triples = [(0.0, 1000, 5)]
    without, _ = run(tiny(), triples)
    cached, _ = run(tiny(), triples, cached=[900])
    assert cached.totals["steps"] < without.totals["steps"]
    assert cached.totals["prefill_joules"] < 0.3 * without.totals["prefill_joules"]
    with pytest.raises(ValueError, match="below input_tokens"):
        run(tiny(), triples, cached=[1000])


def test_a_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        run(tiny(), [(0.0, 10, 5)], replace(SMALL, max_step_tokens=3))


@given(triples=requests)
def test_jumping_changes_nothing(triples: list[tuple[float, int, int]]) -> None:
    triples = ordered(triples)
    fast, _ = run(tiny(window=50), triples)
    slow, _ = run(tiny(window=50), triples, jump=False)
    assert_same_run(fast, slow)


@given(triples=requests)
def test_requests_share_out_the_active_energy(triples: list[tuple[float, int, int]]) -> None:
    result, _ = run(tiny(experts=8), ordered(triples))
    assert_shares_out_the_active_energy(result)


@given(triples=requests, window=st.sampled_from([0, 50]))
def test_slices_of_time_add_up_to_the_run(
    triples: list[tuple[float, int, int]], window: int
) -> None:
    result, _ = run(tiny(window=window), ordered(triples))
    totals = result.totals
    busy = totals["gpu_seconds"] + totals["wait_seconds"]
    expected = [totals["prefill_joules"], totals["decode_joules"], busy]
    np.testing.assert_allclose(result.slices.sum(axis=0), expected, rtol=1e-9)
    assert (result.slices[:, 2] <= result.slice_seconds * (1 + 1e-9)).all()
    ends = np.flatnonzero(result.slices[:, 2])[-1]
    assert int(totals["now"] / result.slice_seconds) in (ends, ends + 1)


def test_a_pause_is_a_slice_without_joules() -> None:
    result, _ = run(tiny(), [(0.0, 100, 20), (30.0, 100, 20)])
    watts = result.slices[:, :2].sum(axis=1) / result.slice_seconds
    middle = int(15.0 / result.slice_seconds)
    assert watts[0] > 0.0
    assert watts[middle] == 0.0
    assert watts[int(30.0 / result.slice_seconds)] > 0.0


@given(triples=requests)
def test_operators_add_up_to_the_active_energy(triples: list[tuple[float, int, int]]) -> None:
    fitted = calibration()
    model = tiny(experts=8, window=50)
    result, _ = run(model, ordered(triples))
    operators, work = operator_totals(
        model,
        SMALL,
        gpu(),
        fitted,
        **counted(result),
    )
    total = sum(sum(parts.values()) for parts in operators.values())
    waiting = fitted.base_watts * result.totals["wait_seconds"]
    active = result.totals["prefill_joules"] + result.totals["decode_joules"]
    assert total + waiting == pytest.approx(active, rel=1e-9)
    seconds = sum(amounts["gpu_seconds"] for amounts in work.values())
    assert seconds == pytest.approx(result.totals["gpu_seconds"], rel=1e-9)


def test_work_of_operators_is_that_of_their_tokens_and_steps() -> None:
    model = tiny()
    result, _ = run(model, [(0.0, 40, 11)])
    _, work = operator_totals(
        model,
        SMALL,
        gpu(),
        calibration(),
        **counted(result),
    )
    table = operator_table(model, SMALL)
    by_name = dict(zip(table.names, table.flops, strict=True))
    assert work["logits"]["executed_flops"] == pytest.approx(11 * by_name["logits"].sum())
    weights = model.hidden_size * model.vocab_size * 2.0
    assert work["logits"]["hbm_bytes"] == pytest.approx(11 * weights)


@given(triples=requests, order=st.randoms())
def test_order_of_equal_simultaneous_requests_does_not_matter(
    triples: list[tuple[float, int, int]], order: object
) -> None:
    same = [(0.0, triples[0][1], triples[0][2])] * len(triples)
    result, _ = run(tiny(), same)
    steps_of_one_batch = sorted(result.finish_seconds)
    assert steps_of_one_batch == list(result.finish_seconds)


def test_more_output_tokens_cost_more() -> None:
    joules = [
        run(tiny(), [(0.0, 100, outputs)] * 3)[0].request_joules.sum() for outputs in (1, 2, 8, 50)
    ]
    assert joules == sorted(joules)
    assert joules[0] < joules[-1]


def test_one_request_alone_is_prefill_and_then_one_step_a_token() -> None:
    result, costs = run(tiny(), [(0.0, 40, 11)])
    assert result.totals["steps"] == 1 + 10
    assert result.finish_seconds[0] > result.first_token_seconds[0]
    # 40 tokens pass no captured graph (the largest is 16): the host launches kernels one by one
    eager, per_sequence = costs.host[2], costs.host[3]
    gap, start_gap, per_prompt = costs.host[4], costs.host[6], costs.host[7]
    expected = eager + per_sequence + per_prompt + gap + start_gap
    # the engine launches the next step, from a graph, before it hands out this one's token
    expected += costs.host[0] + per_sequence
    assert result.first_token_seconds[0] == pytest.approx(expected, rel=1e-9)


def test_power_limit_holds_and_stretches_time() -> None:
    triples = [(0.0, 200, 50)] * 4
    free, _ = run(tiny(), triples)
    seconds = free.totals["gpu_seconds"]
    watts = (free.totals["prefill_joules"] + free.totals["decode_joules"]) / free.totals["now"]
    cap = 0.5 * (watts + 120.0)
    capped, _ = run(tiny(), triples, cap=cap)
    assert capped.totals["gpu_seconds"] > seconds
    joules = capped.totals["prefill_joules"] + capped.totals["decode_joules"]
    assert joules / capped.totals["now"] <= cap * (1 + 1e-6)


@settings(max_examples=15)
@given(triples=requests)
def test_under_the_power_limit_equals_the_plain_simulator(
    triples: list[tuple[float, int, int]],
) -> None:
    triples = ordered(triples)
    cap = 135.0  # W; the base is 120 W, so that most steps are held down
    result, _ = run(tiny(), triples, cap=cap, jump=False)
    arrivals, inputs, outputs = (list(c) for c in zip(*triples, strict=True))
    expected = simulate_plainly(
        arrivals,
        inputs,
        outputs,
        model=tiny(),
        serving=SMALL,
        gpu=gpu(),
        calibration=calibration(power_cap_watts=cap),
    )
    assert_served_alike(result, expected, rtol=1e-7)


def test_static_batches_run_to_the_longest_output() -> None:
    costs = cost_tables(
        tiny(), ServingConfig(stack="transformers", max_batch=2), gpu(), calibration()
    )
    result = simulate(
        np.zeros(3), np.array([10, 20, 30]), np.array([5, 50, 1]), costs, static_batches=True
    )
    assert result is not None
    assert result.totals["steps"] == 50 + 1
    assert result.finish_seconds[0] < result.finish_seconds[1] < result.finish_seconds[2]


def test_gives_up_when_requests_wait_too_long() -> None:
    costs = cost_tables(tiny(), SMALL, gpu(), calibration())
    arrivals = np.arange(2000) * 1e-5
    assert (
        simulate(arrivals, np.full(2000, 200), np.full(2000, 50), costs, abandon_seconds=0.001)
        is None
    )


@given(triples=requests)
def test_no_first_token_is_told_after_the_last(triples: list[tuple[float, int, int]]) -> None:
    result, _ = run(tiny(), ordered(triples))
    assert (result.first_token_seconds <= result.finish_seconds).all()


def test_sequences_of_a_static_batch_end_with_their_own_steps() -> None:
    """Of one, two and 200 tokens: the second ends a step after the first."""
    costs = cost_tables(tiny(), ServingConfig(stack="transformers"), gpu(), calibration())
    outputs = np.array([1, 2, 200])
    result = simulate(np.zeros(3), np.full(3, 100), outputs, costs, static_batches=True)
    assert result is not None
    decoding = result.finish_seconds - result.first_token_seconds
    assert decoding[0] == 0.0
    assert decoding[1] == pytest.approx(decoding[2] / 199, rel=0.05)


def test_tokens_beyond_the_table_are_counted() -> None:
    """A batch of prompts that Transformers computes at once, longer than vLLM's steps are."""
    serving = ServingConfig(stack="transformers", max_step_tokens=256)
    costs = cost_tables(tiny(), serving, gpu(), calibration())
    result = simulate(np.zeros(8), np.full(8, 100), np.full(8, 3), costs, static_batches=True)
    assert result is not None
    steps = result.passes[0].token_steps[:, 0]
    assert steps @ np.arange(len(steps)) == pytest.approx(8 * 100 + 2 * 8)
