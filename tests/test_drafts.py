"""Speculative decoding in the simulator: against the plain one, by hand, and what must hold."""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_simulator import simulate_with_drafts
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
from typer.testing import CliRunner

from energymodel.accounting import DRAFT_PREFIX
from energymodel.cli import app
from energymodel.costs import CostTables
from energymodel.deployment import deploy
from energymodel.errors import ConfigurationError
from energymodel.kv_cache import kv_cache
from energymodel.operators import kv_bytes_per_token, weight_bytes
from energymodel.results import Prediction
from energymodel.simulator import Simulation
from energymodel.specs import Draft, ModelSpec, ServingConfig
from energymodel.traces import Requests
from energymodel.workload import predict

SMALL = replace(tiny(), layers=tiny().layers[:1], name="smaller")


def fitted(**changes: object) -> Any:
    made = calibration(**changes)
    stacks = {
        name: replace(
            stack,
            draft_host_seconds=3e-5,
            round_host_seconds=2e-4,
            round_sequence_host_seconds=7e-6,
        )
        for name, stack in made.stacks.items()
    }
    return replace(made, stacks=stacks)


def serving_with(tokens: int, acceptance: float, **changes: Any) -> ServingConfig:
    values: dict[str, Any] = {
        "max_batch": 4,
        "max_step_tokens": 96,
        "graph_batch_sizes": (tokens + 1, 2 * (tokens + 1), 4 * (tokens + 1)),
        "draft": Draft(model=SMALL, tokens=tokens, acceptance=acceptance),
        "decode_queries": tokens + 1,
    }
    return ServingConfig(**(values | changes))


def run(
    triples: list[tuple[float, int, int]],
    serving: ServingConfig,
    *,
    model: ModelSpec | None = None,
    blocks: int | None = None,
    jump: bool = True,
    cap: float = 1e6,
    cached: list[int] | None = None,
) -> tuple[Simulation, CostTables]:
    made = fitted(power_cap_watts=cap)
    return serve(triples, model or tiny(), serving, made, blocks=blocks, jump=jump, cached=cached)


acceptances = st.sampled_from([0.0, 0.3, 0.7, 0.85, 1.0])


@pytest.mark.parametrize("stack", ["vllm", "vllm-eager"])
@pytest.mark.parametrize("shape", ["dense", "experts", "window"])
@settings(max_examples=12)
@given(
    triples=requests,
    tokens=st.integers(1, 5),
    acceptance=acceptances,
    spare=st.integers(0, 8),
    shares=st.lists(st.floats(0, 1), min_size=8),
)
def test_equals_the_plain_simulator(
    stack: str,
    shape: str,
    triples: list[tuple[float, int, int]],
    tokens: int,
    acceptance: float,
    spare: int,
    shares: list[float],
) -> None:
    model = {"dense": tiny(), "experts": tiny(experts=8), "window": tiny(window=50)}[shape]
    serving = serving_with(tokens, acceptance, stack=stack)
    triples = ordered(triples)
    cached = cached_tokens(shares, triples)
    blocks = max(-(-(i + o + 2 * tokens) // 16) for _, i, o in triples) + spare
    result, _ = run(triples, serving, model=model, blocks=blocks, cached=cached)
    arrivals, inputs, outputs = (list(c) for c in zip(*triples, strict=True))
    expected = simulate_with_drafts(
        arrivals,
        inputs,
        outputs,
        model=model,
        serving=serving,
        gpu=gpu(),
        calibration=fitted(),
        blocks=blocks,
        cached=cached,
    )
    assert_served_alike(result, expected)


@settings(max_examples=20)
@given(triples=requests, tokens=st.integers(1, 5), acceptance=acceptances)
def test_jumping_changes_nothing(
    triples: list[tuple[float, int, int]], tokens: int, acceptance: float
) -> None:
    triples, serving = ordered(triples), serving_with(tokens, acceptance)
    model = tiny(window=50)
    fast, _ = run(triples, serving, model=model)
    slow, _ = run(triples, serving, model=model, jump=False)
    assert_same_run(fast, slow)


@settings(max_examples=20)
@given(triples=requests, tokens=st.integers(1, 5), acceptance=acceptances)
def test_requests_share_out_the_active_energy(
    triples: list[tuple[float, int, int]], tokens: int, acceptance: float
) -> None:
    result, _ = run(ordered(triples), serving_with(tokens, acceptance), model=tiny(experts=8))
    assert_shares_out_the_active_energy(result)


@given(outputs=st.integers(1, 60), tokens=st.integers(1, 5), acceptance=acceptances)
def test_rounds_of_a_request(outputs: int, tokens: int, acceptance: float) -> None:
    per_round = sum(acceptance**i for i in range(tokens + 1))
    rounds = ceil((outputs - 1) / per_round - 1e-9)
    result, _ = run([(0.0, 40, outputs)], serving_with(tokens, acceptance))
    assert result.totals["steps"] == 1 + rounds
    check, first, further = result.passes
    assert check.phase_steps[:, 0].tolist() == [1, rounds]
    assert first.phase_steps[:, 0].tolist() == [1, rounds]
    assert further.phase_steps[1, 0] == (tokens - 1) * (1 + rounds)
    # the check attends to the prompt, E tokens a round, and those it checks
    keys = sum(40 + per_round * i + tokens + 1 for i in range(rounds))
    assert check.attention_sums[0, 0] == pytest.approx(keys)
    assert first.attention_sums[0, 0] == pytest.approx(keys + rounds)
    later = sum(40 + per_round * (i + 1) + j for i in range(rounds) for j in range(2, tokens + 1))
    later += sum(40 + j for j in range(2, tokens + 1))  # in the step of the prompt
    assert further.attention_sums[0, 0] == pytest.approx(later)


def test_a_round_that_waits_for_the_host_by_hand() -> None:
    # the GPU is fast here: three drafts cost the host 3 x (30 us + the kernels of a layer), the
    # round 200 us, 10 us and 7 us for the sequence and 4 gaps of 50 us
    result, _ = run([(0.0, 10, 9)], serving_with(3, 1.0))
    rounds = 2
    stack = fitted().stacks["vllm"]
    a_pass = 30e-6 + stack.kernels_per_layer * stack.launch_seconds
    seconds = result.finish_seconds[0] - result.first_token_seconds[0]
    assert seconds == pytest.approx(rounds * (3 * a_pass + 200e-6 + 17e-6 + 200e-6), rel=1e-9)


def test_the_draft_model_takes_memory() -> None:
    drafted = serving_with(4, 0.5)
    plain = replace(drafted, draft=None, decode_queries=1)
    room = kv_cache(tiny(), plain, gpu()).blocks * 16 * kv_bytes_per_token(tiny(), plain)
    per_block = kv_bytes_per_token(tiny(), plain) + kv_bytes_per_token(SMALL, plain)
    expected = (room - weight_bytes(SMALL, plain)) / (16 * per_block)
    assert kv_cache(tiny(), drafted, gpu()).blocks == pytest.approx(expected, abs=2)


# --- predict -----------------------------------------------------------------------------------

TRACE = Requests(
    name="made",
    arrival_seconds=np.array([0.0, 0.001, 0.4]),
    input_tokens=np.array([50, 300, 20]),
    output_tokens=np.array([40, 10, 90]),
)


def predicted(**options: Any) -> Prediction:
    values: dict[str, Any] = {"gpu": gpu(), "model": tiny(), "calibration": fitted()}
    return predict(TRACE, **(values | options))


def drafting(tokens: int, acceptance: float, model: ModelSpec = SMALL) -> dict[str, Any]:
    return {"draft_model": model, "draft_tokens": tokens, "acceptance": acceptance}


@settings(max_examples=20)
@given(tokens=st.integers(1, 6), acceptance=st.floats(0, 1), limited=st.booleans())
def test_pieces_add_up_to_the_total(tokens: int, acceptance: float, limited: bool) -> None:
    cap = 150.0 if limited else 1e6
    result = predicted(calibration=fitted(power_cap_watts=cap), **drafting(tokens, acceptance))
    total = pytest.approx(result.energy_joules, rel=1e-9)
    assert sum(result.by_operator_joules.values()) == total
    assert sum(result.by_component_joules.values()) == total
    assert result.prefill_joules + result.decode_joules + result.idle_joules == total
    assert result.timeline is not None
    assert sum(result.timeline.decode_joules) == pytest.approx(result.decode_joules, rel=1e-9)
    assert result.by_operator_joules[f"{DRAFT_PREFIX}down_proj"] > 0.0


def test_without_acceptance_drafts_only_cost() -> None:
    plain = predicted()
    costs = [predicted(**drafting(tokens, 0.0)).active_joules for tokens in (1, 2, 4, 8)]
    assert plain.active_joules < costs[0]
    assert costs == sorted(costs)


def test_more_acceptance_costs_less() -> None:
    joules = [predicted(**drafting(4, a)).active_joules for a in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert joules == sorted(joules, reverse=True)


def test_no_drafts_are_no_speculation() -> None:
    plain = predicted()
    assert predicted(**drafting(0, 0.5)).to_dict() == plain.to_dict()
    assert plain.inputs["draft_model"] is None
    assert predicted(**drafting(2, 0.5)).inputs["draft_tokens"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": 4}, "name it with --draft-model"),
        ({"draft_model": SMALL, "acceptance": 0.5}, "--draft-tokens is missing"),
        ({"draft_model": SMALL, "draft_tokens": 4}, "--acceptance is missing"),
        (drafting(-1, 0.5), "--draft-tokens -1"),
        (drafting(4, 1.5), "--acceptance 1.5"),
        (drafting(4, float("nan")), "--acceptance nan"),
        (drafting(4, 0.5) | {"stack": "transformers"}, "modelled for vllm and vllm-eager"),
        (drafting(4, 0.5) | {"pipeline_parallel": 2}, "--pipeline-parallel"),
        (drafting(4, 0.5, replace(SMALL, vocab_size=7)), "vocabularies"),
        (drafting(4, 0.5) | {"max_step_tokens": 500, "max_batch": 256}, "1536 in all"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        predicted(**options)


def test_graphs_are_captured_for_whole_sequences() -> None:
    deployment = deploy(gpu=gpu(), model=tiny(), calibration=fitted(), **drafting(4, 0.5))
    graphs = deployment.costs.graph_tokens
    assert set(np.unique(graphs) % 5) == {0}
    assert len(graphs) - 1 == 500  # 496 rounded up; 512 would become 515, beyond the largest


def test_the_change_is_that_of_two_predictions() -> None:
    plain, drafted = predicted(), predicted(**drafting(3, 0.6))
    found = drafted.speculation
    assert found is not None
    assert plain.speculation is None
    assert found.change == pytest.approx(drafted.energy_joules / plain.energy_joules - 1.0)
    assert found.plain_joules_per_output_token == pytest.approx(plain.joules_per_output_token)
    assert found.tokens_per_round == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    context = (40 * (50 + 20) + 10 * (300 + 5) + 90 * (20 + 45)) / 140
    assert found.mean_context_tokens == pytest.approx(context)


def test_the_batch_up_to_which_drafts_pay_grows_with_the_acceptance() -> None:
    batches = []
    for acceptance in (0.0, 0.5, 0.7, 1.0):
        drafts = {"draft_model": "llama-3.2-1b", "draft_tokens": 4, "acceptance": acceptance}
        result = predict("translation", gpu="h100", arrivals="offline", **drafts)  # type: ignore[arg-type]
        assert result.speculation is not None
        batches.append(result.speculation.paying_batch)
    assert batches[0] == 0
    assert batches == sorted(batches)
    assert batches[-1] > 32


def test_the_command_says_what_drafts_do() -> None:
    options = ["--draft-model", "llama-3.2-1b", "--draft-tokens", "2", "--acceptance", "0.8"]
    trace = ["predict", "--trace", "translation", "--gpu", "h100"]
    table = CliRunner().invoke(app, [*trace, *options])
    assert table.exit_code == 0
    assert "2.44 tokens a round" in table.output
    assert "2 tokens drafted by llama-3.2-1b, acceptance 0.8" in " ".join(table.output.split())
    refused = CliRunner().invoke(app, [*trace, *options[:2]])
    assert refused.exit_code == 2
    assert "--draft-tokens is missing" in refused.output
    printed = CliRunner().invoke(app, [*trace, *options, "--format", "json"]).stdout
    assert json.loads(printed)["speculation"]["paying_batch"] > 0
