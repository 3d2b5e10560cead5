"""Decoding strategies and the compiled static cache: work counted by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served_triples import with_blocks
from shapes import calibration, gpu, tiny

from calibration.fitting.kernel_windows import read_windows
from calibration.validation.rows import DATA
from energymodel.calibrations import load_calibration
from energymodel.costs import cost_tables
from energymodel.deployment import STACKS
from energymodel.errors import ConfigurationError
from energymodel.gpus import load_gpu
from energymodel.kv_cache import kv_cache
from energymodel.models import load_model
from energymodel.operators import STATS, OperatorTable, operator_table, step_stats
from energymodel.results import Prediction
from energymodel.roofline import operator_costs
from energymodel.simulator import Simulation, simulate
from energymodel.specs import ModelSpec, ServingConfig
from energymodel.traces import Requests
from energymodel.workload import predict

BLOCK_KV_BYTES = 2 * 2 * 2 * 64 * 2.0  # of `tiny`, per token: layers x (K, V) x heads x width x B


def batch(size: int, inputs: int, outputs: int) -> Requests:
    return Requests(
        name="batch",
        arrival_seconds=np.zeros(size),
        input_tokens=np.full(size, inputs),
        output_tokens=np.full(size, outputs),
    )


def run(requests: Requests, **options: Any) -> Prediction:
    values: dict[str, Any] = {"gpu": gpu(), "model": tiny(), "calibration": calibration()}
    return predict(requests, **(values | options))


def column(table: OperatorTable, field: str, stat: str) -> dict[str, float]:
    values = getattr(table, field)[:, STATS.index(stat)]
    return dict(zip(table.names, values.tolist(), strict=True))


def served(stack: str, rows: list[tuple[int, int]], model: ModelSpec, **more: Any) -> Simulation:
    serving = ServingConfig(stack=stack, **more)  # type: ignore[arg-type]
    costs = cost_tables(model, serving, gpu(), calibration())
    inputs, outputs = (np.array(c) for c in zip(*rows, strict=True))
    result = simulate(np.zeros(len(rows)), inputs, outputs, costs, static_batches=True)
    assert result is not None
    return result


# --- choosing a token ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "decoding", "bytes_per_logit"),
    [
        ("vllm", "greedy", 14.0),
        ("vllm", "sampling", 14.0 + 52.0),
        ("vllm", "sampling-sorted", 14.0 + 284.0),
        ("transformers", "sampling", 14.0 + 284.0),
        ("transformers", "beam:4", 14.0 + 40.0),
    ],
)
def test_bytes_of_choosing_a_token(stack: str, decoding: str, bytes_per_logit: float) -> None:
    name, _, beams = decoding.partition(":")
    serving = ServingConfig(stack=stack, decoding=name, beams=int(beams or 1))  # type: ignore[arg-type]
    table = operator_table(tiny(), serving)
    passed = column(table, "activation_bytes", "rows")
    others = ("logits", "attention_combine")
    assert sum(v for k, v in passed.items() if k not in others) == 1000 * bytes_per_logit


@pytest.mark.parametrize("stack", STACKS)
def test_sampling_costs_more_than_greedy_and_nothing_else_changes(stack: str) -> None:
    requests = batch(3, 50, 20)
    greedy, sampled = (run(requests, stack=stack, decoding=d) for d in ("greedy", "sampling"))
    extra = sampled.by_operator_joules["top_p"]
    assert extra > 0.0
    assert "top_p" not in greedy.by_operator_joules
    same = {k: v for k, v in sampled.by_operator_joules.items() if k not in ("top_p", "host_wait")}
    for name, joules in same.items():
        assert joules == pytest.approx(greedy.by_operator_joules[name], rel=1e-9)
    assert sampled.steps == greedy.steps
    assert (greedy.inputs["decoding"], sampled.inputs["decoding"]) == ("greedy", "sampling")


@pytest.mark.parametrize("rows", [64, 256])
def test_a_sorted_vocabulary_takes_what_it_took_on_h100s(rows: int) -> None:
    """What the windows `sampling.sorted` took, which end with the choice of the largest value."""
    files = sorted((DATA / "kernels").glob("h100-card-*"))
    windows = [w for f in files for w in read_windows(f) if w["case"] == f"sampling.sorted.r{rows}"]
    taken = np.median([w["iteration_seconds"] for w in windows])
    model, h100 = load_model("llama-3.1-8b"), load_gpu("h100")
    assert {w["shape"]["vocab"] for w in windows} == {model.vocab_size}
    table = operator_table(model, ServingConfig(stack="vllm", decoding="sampling-sorted"))
    size = np.array([float(rows)])
    costs = operator_costs(
        table, step_stats(model, tokens=size, rows=size), h100, load_calibration("h100")
    )
    seconds = (costs.memory_seconds + costs.compute_seconds)[0]
    predicted = sum(seconds[table.names.index(name)] for name in ("top_p", "sampling"))
    assert predicted == pytest.approx(taken, rel=0.04)


# --- beam search -------------------------------------------------------------------------------


@given(beams=st.integers(2, 8), size=st.integers(1, 4), outputs=st.integers(2, 30))
@settings(max_examples=20)
def test_beams_compute_every_prompt_and_step_of_as_many_sequences(
    beams: int, size: int, outputs: int
) -> None:
    result = served("transformers", [(40, outputs)] * size, tiny(), beams=beams, decoding="beam")
    counts = result.passes[0]
    rows = np.flatnonzero(counts.row_steps[:, 0])
    assert rows.tolist() == [beams * size]
    tokens = np.flatnonzero(counts.token_steps[:, 0])
    assert tokens.tolist() == [beams * size, 40 * beams * size]
    keys = sum(40 + done for done in range(1, outputs)) * beams * size
    assert counts.attention_sums[0, 0] == pytest.approx(keys)


def test_beams_move_the_cache_five_times() -> None:
    # append reads and writes what attention reads, reordering the beams does so once more
    for beams, passes in ((1, 3.0), (4, 5.0)):
        serving = ServingConfig(stack="transformers", beams=beams)
        moved = column(operator_table(tiny(), serving), "hbm_bytes", "decode_kv_tokens")
        assert moved["attention_decode"] == passes * BLOCK_KV_BYTES


def test_more_beams_cost_more_and_one_is_greedy() -> None:
    requests = batch(2, 60, 20)
    joules = [
        run(requests, stack="transformers", decoding=f"beam:{n}").energy_joules
        for n in (1, 2, 4, 8)
    ]
    assert joules == sorted(joules)
    assert joules[0] == run(requests, stack="transformers").energy_joules
    assert run(requests, stack="transformers", decoding="beam:4").inputs["decoding"] == "beam:4"


def test_beams_fill_the_cache() -> None:
    serving = ServingConfig(stack="transformers", beams=4, decoding="beam", max_batch=64)
    costs = cost_tables(tiny(), serving, gpu(), calibration())
    costs = with_blocks(costs, 100)  # 1600 tokens: 400 of each beam
    result = simulate(np.zeros(6), np.full(6, 100), np.full(6, 33), costs, static_batches=True)
    assert result is not None
    assert result.totals["steps"] == 2 * 33  # three requests of 4 x 133 tokens fit at once


# --- the compiled static cache --------------------------------------------------------------------


def test_a_static_cache_is_attended_to_as_a_whole() -> None:
    result = served("transformers-compile", [(40, 11)] * 3, tiny())
    decode, prompts = result.passes
    assert decode.attention_sums[0, 0] == 3 * 10 * (40 + 11 - 1)
    assert decode.phase_steps[:, 0].tolist() == [0.0, 10.0]
    assert prompts.phase_steps[:, 0].tolist() == [1.0, 0.0]
    # prompts are computed as by eager Transformers
    eager = served("transformers", [(40, 11)] * 3, tiny()).passes[0]
    assert prompts.attention_sums[2].tolist() == eager.attention_sums[2].tolist()


def test_a_static_cache_stays_as_long_as_the_longest_batch() -> None:
    rows = [(100, 21), (40, 11)]
    result = served("transformers-compile", rows, tiny(), max_batch=1)
    assert result.passes[0].attention_sums[0, 0] == 20 * 120 + 10 * 120
    result = served("transformers-compile", rows[::-1], tiny(), max_batch=1)
    assert result.passes[0].attention_sums[0, 0] == 10 * 50 + 20 * 120


def test_a_mask_repeats_keys_and_values_for_every_query_head() -> None:
    serving = ServingConfig(stack="transformers-compile")  # tiny: 4 query heads on 2 of KV
    moved = column(operator_table(tiny(), serving), "hbm_bytes", "decode_kv_tokens")
    assert moved["attention_decode"] == (1 + 2 * 2) * BLOCK_KV_BYTES


def test_compiled_steps_launch_no_kernels_one_by_one() -> None:
    requests = batch(2, 50, 41)
    fitted = calibration()
    result = run(requests, stack="transformers-compile", calibration=fitted)
    stack = fitted.stacks["transformers-compile"]
    per_step = stack.step_host_seconds + 2 * stack.sequence_host_seconds + stack.step_gap_seconds
    assert result.tpot_seconds.p50 == pytest.approx(per_step, rel=1e-9)  # the host is slower here
    eager = per_step + stack.kernels_per_layer * 2 * stack.launch_seconds
    slower = run(requests, stack="transformers", calibration=fitted)
    assert slower.tpot_seconds.p50 == pytest.approx(eager, rel=1e-9)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoding": "nucleus"}, "sampling-sorted or beam:N"),
        ({"decoding": "beam:0"}, "from 1 to 64"),
        ({"decoding": "beam:many"}, "from 1 to 64"),
        ({"decoding": "beam:4"}, "sends every hypothesis anew"),
        ({"decoding": "beam:4", "stack": "transformers-compile"}, "compiles no step of it"),
    ],
)
def test_strategies_that_are_not_modelled_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run(batch(1, 10, 5), **options)


@pytest.mark.parametrize("field", ["stacks", "intervals"])
def test_a_calibration_without_the_stack_says_what_it_has(field: str) -> None:
    known = {k: v for k, v in getattr(calibration(), field).items() if "compile" not in k}
    with pytest.raises(ConfigurationError, match=r"does not know the stack.*vllm-eager"):
        run(
            batch(1, 10, 5),
            stack="transformers-compile",
            calibration=calibration(**{field: known}),
        )


def test_room_for_the_cache_does_not_depend_on_the_strategy() -> None:
    blocks = {
        kv_cache(tiny(), ServingConfig(stack="transformers", decoding=d), gpu())  # type: ignore[arg-type]
        for d in ("greedy", "sampling")
    }
    assert len(blocks) == 1
