"""Recorded steps cost what the simulator's do, for every stack and any calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_triples import with_blocks
from shapes import KERNEL_CLASSES, calibration, gpu, ideal_kernel, llama_8b, tiny

from calibration.fitting.recorded_steps import can_be_recorded, record, recorded_runs
from energymodel.calibrations import Calibration
from energymodel.costs import cost_tables
from energymodel.deployment import STACKS, Deployment, with_drafts
from energymodel.errors import ConfigurationError
from energymodel.simulator import simulate
from energymodel.specs import Draft, ModelSpec, ServingConfig
from energymodel.traces import Requests

SAME = 1e-6
"""Relative difference that counts as none: under the power limit the simulator takes up to 32 steps
as if their costs were linear."""


def uneven(**changes: Any) -> Calibration:
    """A calibration in which every parameter matters."""
    kernels = {
        c: ideal_kernel(
            compute_efficiency=0.7,
            memory_efficiency=0.8,
            call_seconds=3e-6 + 1e-6 * i,
            sharpness=1.0 if c == "attention_prefill" else 3.0,
            wave_exponent=0.2,
            tile_seconds=4e-10 if c == "elementwise" else 1e-6,
            active_watts=20.0 + i,
            flop_energy_factor=1.0 + 0.1 * i,
        )
        for i, c in enumerate(KERNEL_CLASSES)
    }
    plain = calibration()
    stacks = {
        name: replace(
            stack,
            draft_host_seconds=3e-4,
            round_host_seconds=1e-3,
            step_host_seconds=(1 + i) * 1e-4,
        )
        for i, (name, stack) in enumerate(plain.stacks.items())
    }
    return calibration(
        **{"kernels": kernels, "stacks": stacks, "kernel_gap_seconds": 1e-6} | changes
    )


def deployed(
    model: ModelSpec, *, blocks: int | None = None, draft: Draft | None = None, **serving: Any
) -> Deployment:
    config = ServingConfig(**({"max_batch": 16, "max_step_tokens": 512} | serving))
    if draft is not None:
        config = with_drafts(config, draft)
    made_with = calibration()
    costs = cost_tables(model, config, gpu(), made_with)
    if blocks is not None:
        costs = with_blocks(costs, blocks)
    return Deployment(gpu=gpu(), model=model, serving=config, calibration=made_with, costs=costs)


def waiting(inputs: list[int], outputs: list[int]) -> Requests:
    return Requests(
        name="waiting",
        arrival_seconds=np.zeros(len(inputs)),
        input_tokens=np.array(inputs),
        output_tokens=np.array(outputs),
    )


def served(deployment: Deployment, requests: Requests, fitted: Calibration) -> Any:
    d = deployment
    costs = cost_tables(d.model, d.serving, d.gpu, fitted)
    result = simulate(
        requests.arrival_seconds,
        requests.input_tokens,
        requests.output_tokens,
        with_blocks(costs, d.costs.scheduler.kv.blocks),
        static_batches=d.static_batches,
    )
    assert result is not None
    return result


def assert_same(deployment: Deployment, requests: Requests, fitted: Calibration) -> Any:
    """Recorded steps give what the simulation gives, which is returned."""
    joules, seconds, ttft = recorded_runs([(deployment, requests)]).totals(fitted, rounding=0.0)
    result = served(deployment, requests, fitted)
    active = result.totals["prefill_joules"] + result.totals["decode_joules"]
    assert joules[0] == pytest.approx(active * deployment.gpus_per_replica, rel=SAME)
    assert seconds[0] == pytest.approx(result.totals["now"], rel=SAME)
    if requests.output_tokens.min() > 1:  # fits take no TTFT of runs with one token each
        assert ttft[0] == pytest.approx(np.median(result.first_token_seconds), rel=SAME)
    return result


RAGGED = waiting([700, 30, 1, 400, 90, 1300, 64], [3, 60, 25, 2, 40, 12, 100])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("model", [tiny(), tiny(experts=8), tiny(window=128)])
def test_a_mix_of_requests_on_every_stack(stack: str, model: ModelSpec) -> None:
    # prompts longer than a step's budget; static ones longer than the table of tokens
    assert_same(deployed(model, stack=stack), RAGGED, uneven())


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel": 2},
        {"decoding": "sampling"},
        {"decoding": "beam", "beams": 4, "stack": "transformers"},
        {"weight_dtype": "fp8"},
    ],
)
def test_options_of_serving(options: dict[str, Any]) -> None:
    result = assert_same(deployed(llama_8b(), **options), RAGGED, uneven())
    assert result.totals["throttled_seconds"] == 0.0


@pytest.mark.parametrize("stack", STACKS)
def test_under_the_power_limit(stack: str) -> None:
    requests = waiting([600] * 12, [150] * 12)
    limited = uneven(power_cap_watts=270.0, joules_per_flop={"bf16": 1e-12})
    deployment = deployed(llama_8b(), stack=stack, max_step_tokens=4096)
    result = assert_same(deployment, requests, limited)
    assert result.totals["throttled_seconds"] > 0.1 * result.totals["now"]


def test_requests_wait_for_kv_blocks_and_are_preempted() -> None:
    requests = waiting([100, 60, 90, 40, 200], [120, 150, 90, 200, 60])
    result = assert_same(deployed(tiny(), blocks=24), requests, uneven())
    assert result.totals["preemptions"] > 0


@pytest.mark.parametrize("stack", ["vllm", "vllm-eager"])
@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("blocks", [None, 90])
def test_rounds_with_drafts(stack: str, drafts: int, blocks: int | None) -> None:
    draft = Draft(model=tiny(window=128), tokens=drafts, acceptance=0.7)
    deployment = deployed(tiny(experts=8), draft=draft, stack=stack, blocks=blocks)
    assert_same(deployment, RAGGED, uneven())


def test_rounds_with_drafts_under_the_power_limit() -> None:
    draft = Draft(model=llama_8b(), tokens=3, acceptance=0.6)
    deployment = deployed(llama_8b(), draft=draft, max_step_tokens=2048)
    limited = uneven(power_cap_watts=270.0, joules_per_flop={"bf16": 1e-12})
    result = assert_same(deployment, waiting([300] * 10, [90] * 10), limited)
    assert result.totals["throttled_seconds"] > 0.0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 1500), st.integers(1, 90)), min_size=1, max_size=25),
    stack=st.sampled_from(STACKS),
    blocks=st.sampled_from([None, 240]),
    hosts=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_any_requests(
    lengths: list[tuple[int, int]], stack: str, blocks: int | None, hosts: float
) -> None:
    fitted = uneven()
    stacks = {
        name: replace(s, step_host_seconds=hosts * s.step_host_seconds)
        for name, s in fitted.stacks.items()
    }
    requests = waiting([i for i, _ in lengths], [o for _, o in lengths])
    deployment = deployed(tiny(window=200), stack=stack, blocks=blocks)
    assert_same(deployment, requests, replace(fitted, stacks=stacks))


def test_rounding_adds_a_hundredth_at_most() -> None:
    recorded = recorded_runs([(deployed(tiny()), RAGGED)])
    sharp, rounded = (recorded.totals(uneven(), rounding=r)[1] for r in (0.0, 0.02))
    assert sharp[0] < rounded[0] < 1.01 * sharp[0]


def test_runs_are_costed_together_as_alone() -> None:
    runs = [(deployed(tiny(), stack=stack), RAGGED) for stack in STACKS]
    together = recorded_runs(runs).totals(uneven())
    alone = [recorded_runs([run]).totals(uneven()) for run in runs]
    np.testing.assert_allclose(together, np.concatenate(alone, axis=1), rtol=1e-12)


def test_every_token_has_its_step() -> None:
    recording = record(deployed(tiny()), waiting([10, 20], [5, 8]))
    assert sum(count for count, _, _ in recording.spans) == 8
    assert recording.first_tokens.tolist() == [1.0, 1.0]


def test_what_cannot_be_recorded_is_refused() -> None:
    later = replace(RAGGED, arrival_seconds=np.arange(7.0))
    assert can_be_recorded(RAGGED)
    assert not can_be_recorded(later)
    with pytest.raises(ValueError, match="arrive"):
        recorded_runs([(deployed(tiny()), later)])
    other = replace(deployed(tiny()), gpu=gpu(name="other"))
    with pytest.raises(ValueError, match="one GPU"):
        recorded_runs([(deployed(tiny()), RAGGED), (other, RAGGED)])


def test_an_unknown_dtype_is_refused() -> None:
    recorded = recorded_runs([(deployed(tiny()), RAGGED)])
    with pytest.raises(ConfigurationError, match="bf16"):
        recorded.totals(calibration(joules_per_flop={"fp8": 1e-13}))
