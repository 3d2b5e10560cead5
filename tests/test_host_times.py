"""What the host does for a step: kernels by architecture, further processes, drafts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shapes import calibration, gpu, tiny

from energymodel.costs import host_seconds
from energymodel.models import load_model
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


def launched(model: str) -> float:
    """Kernels a layer launches."""
    spec = load_model(model)
    seconds = host_seconds(spec, STACK, ServingConfig())[2] - 1e-3
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


def test_further_gpus_take_host_time() -> None:
    one, two = (
        host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig(tensor_parallel=n))
        for n in (1, 2)
    )
    assert np.flatnonzero(two - one).tolist() == [0, 1, 2, 3]  # every kind of step, and sequences
    assert two[0] - one[0] == pytest.approx(5e-4)
    assert two[3] == pytest.approx(0.4 * one[3])


def test_gpus_that_wait_for_each_other_spin_in_an_all_reduce() -> None:
    """One draws the base while it waits for the host; two draw what small all-reduces draw."""
    spinning = calibration()
    kernels = dict(spinning.kernels)
    kernels["communication"] = replace(kernels["communication"], active_watts=30.0)
    spinning = replace(spinning, kernels=kernels)

    def host_wait(gpus: int, with_spin: bool) -> float:
        found = predict(
            "summarization",
            gpu=gpu(),
            model=tiny(),
            calibration=spinning if with_spin else calibration(),
            tensor_parallel=gpus,
        )
        return found.by_component_joules["host_wait"]

    base = calibration().base_watts
    assert host_wait(1, with_spin=True) == pytest.approx(host_wait(1, with_spin=False))
    ratio = host_wait(2, with_spin=True) / host_wait(2, with_spin=False)
    assert ratio == pytest.approx((base + 30.0) / base)


def test_a_draft_model_s_kernels_are_launched_one_by_one() -> None:
    draft = Draft(model=load_model("llama-3.2-1b"), tokens=4, acceptance=0.7)
    found = host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig(draft=draft))
    assert found[8:] == pytest.approx([3e-4 + 16 * 70 * 1e-5, 2e-3, 1e-4])
    assert host_seconds(load_model("llama-3.1-8b"), STACK, ServingConfig())[8] == 3e-4
