"""What the host does for a step: kernels by architecture, further processes, drafts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shapes import calibration, gpu, tiny

from energymodel.calibrations import Calibration
from energymodel.host_times import host_seconds
from energymodel.models import load_model
from energymodel.results import Prediction
from energymodel.specs import Draft, ServingConfig
from energymodel.workload import predict

STACK = replace(
    calibration().stacks["vllm"],
    step_host_seconds=1e-3,
    launch_seconds=1e-5,
    kernels_per_layer=70.0,
    norm_kernels=8.0,
    parallel_host_seconds=5e-4,
    parallel_sequence_share=0.4,
    draft_host_seconds=3e-4,
    round_host_seconds=2e-3,
    round_sequence_host_seconds=1e-4,
)


def launched(model: str, stack: str = "vllm") -> float:
    """Kernels a layer launches."""
    spec = load_model(model)
    seconds = host_seconds(spec, STACK, ServingConfig(stack=stack))[2] - 1e-3
    return float(seconds / 1e-5 / spec.num_layers)


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        ("llama-3.1-8b", 70),  # two RMS norms of 8 kernels are among them
        ("qwen3-4b", 70 + 2 * 8),  # and norms of queries and keys
        ("olmo-1b", 70 - 2 * 8 + 2 * 3),  # layer norms
        ("gemma-2-9b", 70 + 2 * 8),  # four norms a layer
        ("phi-2", 70 - 2 * 8 + 3),  # one layer norm for attention and MLP
    ],
)
def test_norms_of_an_architecture_are_launched(model: str, kernels: float) -> None:
    assert launched(model) == pytest.approx(kernels)


def test_what_compiled_code_checks_grows_with_the_layers() -> None:
    stack = replace(STACK, step_gap_seconds=1e-3, layer_gap_seconds=5e-5)
    spec = load_model("llama-3.1-8b")
    gap = host_seconds(spec, stack, ServingConfig(stack="transformers-compile"))[4]
    assert gap == pytest.approx(1e-3 + 32 * 5e-5)


def test_eager_norms_of_gemma_run_op_by_op() -> None:
    stack = replace(STACK, norm_kernels=1.0, kernels_per_layer=16.0)
    eager = ServingConfig(stack="vllm-eager")
    gemma, llama = (load_model(name) for name in ("gemma-2-9b", "llama-3.1-8b"))
    each = {
        model.name: (host_seconds(model, stack, eager)[2] - 1e-3) / 1e-5 / model.num_layers
        for model in (gemma, llama)
    }
    assert each[llama.name] == pytest.approx(16)
    assert each[gemma.name] == pytest.approx(14 + 4 * 5)


@pytest.mark.parametrize(
    ("model", "stack", "more"),
    [
        ("qwen3-30b-a3b", "vllm", 2 * 8 + 13),  # norms of queries and keys, and experts
        ("qwen3-30b-a3b", "vllm-eager", 2 * (8 + 1) + 13),  # a copy before each of these norms
        ("qwen3-30b-a3b", "transformers", 2 * 8),  # other kernels, not measured
        ("gpt-oss-20b", "vllm", 0),  # packed: one call
    ],
)
def test_experts_take_the_host_longer_to_launch(model: str, stack: str, more: float) -> None:
    assert launched(model, stack) == pytest.approx(70 + more)


def test_further_gpus_take_host_time() -> None:
    one, two = (
        host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig(tensor_parallel=n))
        for n in (1, 2)
    )
    assert np.flatnonzero(two - one).tolist() == [0, 1, 2, 3]  # every kind of step, and sequences
    assert two[0] - one[0] == pytest.approx(5e-4)
    assert two[3] == pytest.approx(0.4 * one[3])


def test_links_of_a_group_stay_awake() -> None:
    """What small all-reduces draw is drawn all the while, in kernels and in waiting."""
    awake = calibration()
    kernels = dict(awake.kernels)
    kernels["communication"] = replace(kernels["communication"], active_watts=30.0)
    awake = replace(awake, kernels=kernels)

    def served(gpus: int, fitted: Calibration) -> Prediction:
        return predict(
            "summarization", gpu=gpu(), model=tiny(), calibration=fitted, tensor_parallel=gpus
        )

    alone, same = served(1, calibration()), served(1, awake)
    assert same.by_component_joules == pytest.approx(alone.by_component_joules)
    before, after = served(2, calibration()), served(2, awake)
    assert after.wall_seconds == pytest.approx(before.wall_seconds)  # below the power limit
    assert after.active_joules - before.active_joules == pytest.approx(
        2 * 30.0 * before.busy_seconds
    )
    base = calibration().base_watts
    for part in ("base", "host_wait"):
        ratio = after.by_component_joules[part] / before.by_component_joules[part]
        assert ratio == pytest.approx((base + 30.0) / base)
    for part in ("flops", "onchip", "hbm", "link"):
        assert after.by_component_joules[part] == pytest.approx(before.by_component_joules[part])


def test_a_draft_model_s_kernels_are_launched_one_by_one() -> None:
    draft = Draft(model=load_model("llama-3.2-1b"), tokens=4, acceptance=0.7)
    found = host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig(draft=draft))
    assert found[8:] == pytest.approx([3e-4 + 16 * 70 * 1e-5, 2e-3, 1e-4])
    assert host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig())[8] == 3e-4
