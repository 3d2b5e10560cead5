"""Speculative decoding: the expected tokens, the break-even, and costs that agree with predict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.acceptance import break_even_acceptance, expected_tokens
from energymodel.deployment import Deployment, deploy
from energymodel.errors import ConfigurationError
from energymodel.speculation import decode_costs
from energymodel.traces import Requests
from energymodel.workload import predict

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def deployed(model: str, gpu: str = "a6000", stack: str = "vllm") -> Deployment:
    return deploy(gpu=gpu, model=model, stack=stack)


@pytest.mark.parametrize(
    ("acceptance", "draft_tokens", "tokens"),
    [
        (0.8, 5, (1 - 0.8**6) / (1 - 0.8)),  # equation 1 of Leviathan et al.
        (0.0, 4, 1.0),  # only the token that the check itself gives
        (1.0, 4, 5.0),  # all drafts, and the check's own
        (0.5, 1, 1.5),
    ],
)
def test_expected_tokens(acceptance: float, draft_tokens: int, tokens: float) -> None:
    assert expected_tokens(acceptance, draft_tokens) == pytest.approx(tokens, rel=1e-12)


def test_expected_tokens_equals_a_drawn_mean() -> None:
    draws = np.random.default_rng(0).random((200_000, 4)) < 0.7
    accepted = np.cumprod(draws, axis=1).sum(axis=1)
    assert expected_tokens(0.7, 4) == pytest.approx(accepted.mean() + 1.0, rel=5e-3)


@given(st.floats(0.01, 0.99), st.integers(1, 12))
def test_break_even_inverts_expected_tokens(acceptance: float, draft_tokens: int) -> None:
    ratio = expected_tokens(acceptance, draft_tokens)
    assert break_even_acceptance(ratio, draft_tokens) == pytest.approx(acceptance, abs=1e-6)


def test_break_even_outside() -> None:
    assert break_even_acceptance(0.9, 4) == 0.0
    assert np.isnan(break_even_acceptance(5.1, 4))


@pytest.mark.parametrize(("acceptance", "draft_tokens"), [(1.1, 4), (-0.1, 4), (float("nan"), 4)])
def test_impossible_acceptance_is_refused(acceptance: float, draft_tokens: int) -> None:
    with pytest.raises(ConfigurationError, match="acceptance"):
        expected_tokens(acceptance, draft_tokens)


def test_no_draft_tokens_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="draft tokens"):
        expected_tokens(0.5, 0)


@pytest.mark.parametrize("batch", [1, 8, 16])  # prompts that one step holds
def test_a_plain_step_is_that_of_predict(batch: int) -> None:
    requests = Requests(
        name="batch",
        arrival_seconds=np.zeros(batch),
        input_tokens=np.full(batch, 512),
        output_tokens=np.full(batch, 65),
    )
    whole = predict(requests, gpu="a6000", model="llama-3.1-8b")
    costs = decode_costs(
        deployed("llama-3.1-8b"),
        deployed("llama-3.2-1b"),
        batch=batch,
        context_tokens=512 + 32.5,
        draft_tokens=4,
    )
    assert costs.step_joules[0] * 64 == pytest.approx(whole.decode_joules, rel=0.01)
    assert costs.step_seconds[0] == pytest.approx(whole.tpot_seconds.p50, rel=0.01)


def test_speculation_pays_at_small_batches_and_not_at_large_ones() -> None:
    costs = decode_costs(
        deployed("llama-3.1-8b"),
        deployed("llama-3.2-1b"),
        batch=BATCHES,
        context_tokens=544,
        draft_tokens=4,
    )
    change = costs.change(0.7)
    assert change[0] < 0.0 < change[-1]
    last = costs.last_paying_batch(0.7)
    assert last is not None
    assert 1 < last < 128
    assert np.all(np.diff(costs.break_even_acceptance()) > 0.0)
    assert costs.last_paying_batch(0.0) is None
    assert costs.last_paying_batch(1.0) == float("inf")
    assert np.all(costs.change(0.9) < costs.change(0.6))
    # a check of five tokens costs more than a step, and less than five of them
    assert np.all(costs.round_joules > costs.step_joules)
    assert costs.round_seconds[0] < 5 * costs.step_seconds[0]
    assert costs.speedup(0.9)[0] > 1.0


def test_pairs_that_cannot_be_are_refused() -> None:
    target = deployed("llama-3.1-8b")
    for draft, message in (
        (deployed("llama-3.2-1b", gpu="h100"), "GPUs and the stack"),
        (deployed("llama-3.2-1b", stack="vllm-eager"), "GPUs and the stack"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            decode_costs(target, draft, batch=1, context_tokens=512, draft_tokens=4)
    static = [deployed(m, stack="transformers") for m in ("llama-3.1-8b", "llama-3.2-1b")]
    with pytest.raises(ConfigurationError, match="modelled for vllm"):
        decode_costs(*static, batch=1, context_tokens=512, draft_tokens=4)
