"""`predict` on a made-up GPU: values worked out by hand, and what must hold for any trace."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import calibration, gpu, ideal_kernel, llama_8b, tiny

import energymodel
from energymodel.calibrations import Calibration, StackCalibration
from energymodel.datafiles import data_path
from energymodel.deployment import STACKS, deploy
from energymodel.errors import (
    CapacityError,
    ConfigurationError,
    EnergyModelError,
    ProfileError,
    TraceError,
)
from energymodel.gpus import load_gpu
from energymodel.naive import load_naive_rules
from energymodel.results import Prediction
from energymodel.settings import Setting
from energymodel.specs import STATIC_STACKS
from energymodel.traces import DroppedRows, Requests
from energymodel.workload import predict


def trace(*rows: tuple[float, int, int], **changes: Any) -> Requests:
    """Requests from (arrival, input, output)."""
    columns = [np.array(column) for column in zip(*rows, strict=True)] or [np.array([])] * 3
    return Requests(
        name=changes.pop("name", "made"),
        arrival_seconds=columns[0].astype(float),
        input_tokens=columns[1],
        output_tokens=columns[2],
        **changes,
    )


def host_bound(**changes: object) -> Calibration:
    """Every step takes the host 10 ms; the GPU draws 100 W then, and 40 W while it polls."""
    stack = StackCalibration(
        step_host_seconds=0.01,
        sequence_host_seconds=0.0,
        launch_seconds=0.0,
        kernels_per_layer=0.0,
        step_gap_seconds=0.0,
    )
    values: dict[str, object] = {
        "base_watts": 100.0,
        "polling_idle_watts": 40.0,
        "context_idle_watts": 30.0,
        "joules_per_flop": {"bf16": 0.0, "fp16": 0.0, "fp8": 0.0},
        "joules_per_hbm_byte": 0.0,
        "joules_per_onchip_byte": 0.0,
        "joules_per_link_byte": 0.0,
        "stacks": dict.fromkeys(STACKS, stack),
    }
    return calibration(**(values | changes))


def run(requests: Requests, **options: Any) -> Prediction:
    values: dict[str, Any] = {"gpu": gpu(), "model": tiny(), "calibration": host_bound()}
    return predict(requests, **(values | options))


# --- worked out by hand -------------------------------------------------------------------------


def test_two_requests_with_a_pause_between_them() -> None:
    # 5 output tokens = 5 steps of 10 ms at 100 W: 5 J each. From 0.05 s to 1 s the GPU polls:
    # 0.95 s x 40 W = 38 J. The last token leaves at 1.05 s.
    result = run(trace((0.0, 10, 5), (1.0, 10, 5)))
    assert result.wall_seconds == pytest.approx(1.05)
    assert result.busy_seconds == pytest.approx(0.1)
    assert result.active_joules == pytest.approx(10.0)
    assert result.idle_joules == pytest.approx(38.0)
    assert result.energy_joules == pytest.approx(48.0)
    assert (result.prefill_joules, result.decode_joules) == pytest.approx((2.0, 8.0))
    assert result.average_watts == pytest.approx(48.0 / 1.05)
    assert result.joules_per_request == pytest.approx(24.0)
    assert result.joules_per_output_token == pytest.approx(4.8)
    assert (result.energy_joules_low, result.energy_joules_high) == pytest.approx((43.2, 52.8))
    assert result.interval_level == 0.9
    assert result.steps == 10
    # the host launches the second step before it hands out the first token
    assert result.ttft_seconds.p50 == pytest.approx(0.02)
    assert result.tpot_seconds.p99 == pytest.approx(0.03 / 4)
    assert result.e2e_seconds.p90 == pytest.approx(0.05)
    assert (result.gpus, result.replicas) == (1, 1)


def test_the_naive_answers_of_a_request() -> None:
    # Weights a token passes: 2 layers x (256 x 512 qkv + 256 x 256 out + 3 x 256 x 512 MLP)
    # = 1,179,648, and 256 x 1000 for each row of logits. 10 in, 5 out: 14 tokens, 5 rows,
    # 14 x 15 / 2 = 105 query-key pairs of 2 x 4 heads x (64 + 64) FLOP in each of 2 layers.
    flops = 14 * 2 * 1_179_648 + 5 * 2 * 256_000 + 105 * 1024 * 2
    result = run(trace((0.0, 10, 5)))
    assert result.naive["flops_tdp_joules"] == pytest.approx(flops * 700.0 / 1e15)
    # outputs alone: 5 tokens at contexts 10 to 14
    alone = 5 * 2 * 1_179_648 + 5 * 2 * 256_000 + (10 + 11 + 12 + 13 + 14) * 1024 * 2
    assert result.naive["output_flops_tdp_joules"] == pytest.approx(alone * 700.0 / 1e15)
    assert result.naive["tdp_time_joules"] == pytest.approx(0.05 * 700.0)
    for name, factor in result.underestimate_factor.items():
        assert factor == pytest.approx(5.0 / result.naive[f"{name}_joules"])
    (only,) = result.bins
    assert only.naive_flops_tdp_joules == pytest.approx(flops * 700.0 / 1e15)
    assert (only.input_low, only.input_high, only.output_low, only.output_high) == (1, 16, 1, 8)


def test_the_rule_from_mfu_sees_busy_and_idle_time_apart() -> None:
    # 0.1 s busy with almost no MFU, 0.95 s at its idle power of 50 W
    result = run(trace((0.0, 10, 5), (1.0, 10, 5)), gpu=gpu(idle_watts=50.0))
    flops = result.naive["flops_tdp_joules"] / 700.0 * 1e15
    rule = load_naive_rules().vidur_energy
    mfu = flops / 0.1 / 1e15
    busy_watts = 50.0 + 650.0 * (mfu / rule.mfu_saturation) ** rule.exponent
    expected = 0.1 * busy_watts + 0.95 * 50.0
    assert result.naive["vidur_energy_joules"] == pytest.approx(expected)
    assert "vidur_energy_joules" not in run(trace((0.0, 10, 5))).naive, "no idle power published"


def test_replicas_idle_each_by_itself() -> None:
    # round robin: one request each; 2 x 1.05 s held, 2 x 0.05 s busy, 2.0 s x 40 W idle
    result = run(trace((0.0, 10, 5), (1.0, 10, 5)), replicas=2)
    assert result.wall_seconds == pytest.approx(1.05)
    assert result.idle_joules == pytest.approx(80.0)
    assert result.active_joules == pytest.approx(10.0)
    # a third replica never sees a request and idles all the time
    more = run(trace((0.0, 10, 5), (1.0, 10, 5)), replicas=3)
    assert more.idle_joules == pytest.approx(80.0 + 1.05 * 40.0)
    assert more.naive["tdp_time_joules"] == pytest.approx(3 * 1.05 * 700.0)


@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel"])
def test_every_gpu_of_a_group_counts(split: str) -> None:
    one = run(trace((0.0, 10, 5), (1.0, 10, 5)))
    two = run(trace((0.0, 10, 5), (1.0, 10, 5)), replicas=2, **{split: 2})
    assert two.gpus == 4
    assert two.wall_seconds == pytest.approx(one.wall_seconds)
    assert two.active_joules == pytest.approx(2 * one.active_joules)
    assert two.idle_joules == pytest.approx(2 * 80.0)
    assert sum(b.energy_joules for b in two.bins) == pytest.approx(two.energy_joules)


def test_stages_of_a_pipeline_take_turns_and_are_awake_throughout() -> None:
    # vLLM's first stage waits for the tokens of the step before: two stages take as long as one
    # GPU with all layers. Each does half of the work, and draws the base all the while.
    requests, free = trace((0.0, 900, 40), (0.0, 300, 60)), calibration()
    options = {"model": llama_8b(), "calibration": free}
    one, two = run(requests, **options), run(requests, **options, pipeline_parallel=2)
    assert two.wall_seconds == pytest.approx(one.wall_seconds, rel=1e-3)  # but for the transfers
    awake = free.base_watts * one.wall_seconds
    assert two.active_joules == pytest.approx(one.active_joules + awake, rel=1e-3)
    flops = [sum(work.executed_flops for work in p.operator_work.values()) for p in (one, two)]
    assert flops[0] == pytest.approx(flops[1])
    parts = two.by_component_joules
    assert parts["hbm"] == pytest.approx(one.by_component_joules["hbm"])
    # links are awake in a group: so much more on both GPUs
    kernels = {**free.kernels, "communication": replace(ideal_kernel(), active_watts=25.0)}
    options["calibration"] = replace(free, kernels=kernels)
    linked = run(requests, **options, pipeline_parallel=2)
    more = linked.active_joules - two.active_joules
    assert more == pytest.approx(2 * 25.0 * two.wall_seconds, rel=1e-3)


def test_a_slower_host_takes_its_share_longer() -> None:
    # ten steps that wait for the host, half as long again
    result = run(trace((0.0, 10, 5), (1.0, 10, 5)), host_ratio=1.5)
    assert result.busy_seconds == pytest.approx(0.15)
    assert result.active_joules == pytest.approx(15.0)
    assert result.inputs["host_ratio"] == 1.5
    with pytest.raises(ConfigurationError, match=r"--host-ratio 0: .* between 0\.05 and 20"):
        run(trace((0.0, 10, 5)), host_ratio=0.0)


def test_offline_sends_everything_at_time_0() -> None:
    # both run in the same 5 steps
    result = run(trace((0.0, 10, 5), (1.0, 10, 5)), arrivals="offline")
    assert result.wall_seconds == pytest.approx(0.05)
    assert result.idle_joules == 0.0
    assert result.energy_joules == pytest.approx(5.0)
    assert result.joules_per_request == pytest.approx(2.5)


@pytest.mark.parametrize("stack", STACKS)
def test_no_idle_energy_is_left_over_from_rounding(stack: str) -> None:
    requests = trace(*((0.0, 10 + i, 1 + i % 37) for i in range(300)))
    fitted = calibration(**slow)
    result = run(requests, stack=stack, max_batch=7, calibration=fitted)
    assert result.idle_joules == 0.0


def test_poisson_arrivals_keep_the_rate_and_follow_the_seed() -> None:
    requests = trace(*((0.0, 10, 1) for _ in range(2000)))
    result = run(requests, arrivals="poisson:4", seed=3)
    assert result.wall_seconds == pytest.approx(500.0, rel=0.1)
    assert run(requests, arrivals="poisson:4", seed=3) == result
    assert run(requests, arrivals="poisson:4", seed=4).wall_seconds != result.wall_seconds


def test_static_batches_wait_for_their_longest() -> None:
    # one batch of 2 and 6 tokens: 6 steps; between batches the context idles at 30 W
    result = run(trace((0.0, 10, 2), (0.0, 10, 6), (1.0, 10, 1)), stack="transformers")
    assert result.active_joules == pytest.approx(7 * 0.01 * 100.0)
    assert result.idle_joules == pytest.approx((1.0 - 0.06) * 30.0)
    assert result.wall_seconds == pytest.approx(1.01)


def test_a_static_batch_is_no_larger_than_the_kv_cache() -> None:
    # 1 KiB a token (2 layers x 2 KV heads x (64 + 64) x 2 B): 100 MB hold 97,656 tokens, that is 97
    # requests padded to 900 + 100, or 108 of 900 + 1. Batches of 97, 108 and 95, not of 256 and 44.
    rows = [(0.0, 900, 100), *[(0.0, 900, 1)] * 299]
    kv_bytes = 100e6
    weights = 2 * (2 * 589_824 + 256_000)
    # 256 tokens of 256 hidden and 3 x 512 MLP elements; logits of 256 sequences over 1,000
    activations = 256 * (3.4 * 256 + 0.97 * 3 * 512) * 2 + 256 * 1000 * 1.3 * 4
    reserved = 0.19 * 2**30 + activations + weights
    small = gpu(hbm_bytes=(reserved + kv_bytes) / 0.9)
    options = {"stack": "transformers", "max_step_tokens": 256, "gpu": small}
    result = run(trace(*rows), **options)
    assert result.steps == 100 + 1 + 1
    assert run(trace(*rows), stack="transformers", max_step_tokens=256).steps == 100 + 1


def test_the_papers_accounting_is_n_over_b_times_a_batch() -> None:
    # 2 requests of (30, 7) become (32, 8): half a batch of 4, whose 8 steps take 80 ms and 8 J
    result = run(trace((0.0, 30, 7), (9.0, 30, 7)), binning="paper", max_batch=4)
    assert result.energy_joules == pytest.approx(4.0)
    assert result.wall_seconds == pytest.approx(0.04)
    assert result.idle_joules == 0.0
    assert (result.input_tokens, result.output_tokens) == (64, 16)
    assert result.inputs["arrivals"] == "offline"
    assert any(
        "from 60 to 64 input and from 14 to 16 output" in warning for warning in result.warnings
    )
    (only,) = result.bins
    assert (only.input_high, only.output_high) == (32, 8)


def test_the_papers_bins_count_what_they_leave_out() -> None:
    rows = [(0.0, 30, 7), (0.0, 30, 513), (0.0, 8193, 1), (0.0, 9000, 600)]
    result = run(trace(*rows), binning="paper", model=replace(tiny(), max_model_len=10_000))
    assert result.requests == 1
    assert result.excluded_requests == {
        "input_too_long": 1,
        "output_too_long": 1,
        "both_too_long": 1,
    }
    assert any("leaves out 3 of 4 requests" in warning for warning in result.warnings)
    with pytest.raises(TraceError, match="all 3 are longer than the paper's bins"):
        run(trace(*rows[1:]), binning="paper")


def test_facility_and_carbon() -> None:
    result = run(trace((0.0, 10, 5)), pue=1.5, grid=400)
    assert result.facility_joules == pytest.approx(7.5)
    assert result.carbon_grams == pytest.approx(7.5 / 3.6e6 * 400)
    assert run(trace((0.0, 10, 5))).carbon_grams is None


def test_one_request_of_one_token() -> None:
    result = run(trace((0.0, 10, 1)))
    assert result.energy_joules == pytest.approx(1.0)
    assert result.decode_joules == 0.0
    assert result.tpot_seconds.p50 is None, "unknown is never 0"
    assert result.e2e_seconds.p50 == result.ttft_seconds.p50 == pytest.approx(0.01)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["tpot_seconds"]["p50"] is None


def test_all_at_once_is_no_overload() -> None:
    result = run(trace(*((7.0, 10, 100) for _ in range(300))), max_batch=1)
    assert result.wall_seconds == pytest.approx(300.0, rel=0.01)
    assert result.warnings == ()


def test_only_the_distance_between_arrivals_counts() -> None:
    rows = [(0.0, 10, 5), (0.5, 30, 2), (2.0, 7, 9), (2.0, 5, 5)]
    expected = run(trace(*rows))
    assert run(trace(*((a + 1e6, i, o) for a, i, o in rows))) == expected
    shuffled = [rows[i] for i in (2, 0, 3, 1)]
    assert run(trace(*shuffled)) == expected


# --- how many replicas --------------------------------------------------------------------------

# 1000 requests in 100 s, each 1 s of an engine that serves one at a time: N replicas end after
# 1000 / N seconds, so the longest wait is about 1000 / N - 100 s; 30 + 100 / 10 s are bearable
BUSY = trace(*((i * 0.1, 10, 100) for i in range(1000)))


@pytest.mark.parametrize("stack", ["vllm", "transformers"])
def test_too_few_replicas_are_refused_with_a_number_that_does(stack: str) -> None:
    with pytest.raises(CapacityError, match=r"1 replica cannot keep up.*--replicas 8 or") as caught:
        run(BUSY, max_batch=1, stack=stack)
    assert "--arrivals offline" in str(caught.value)
    assert run(BUSY, max_batch=1, stack=stack, replicas=8).warnings == ()


def test_auto_takes_the_fewest_that_keep_up() -> None:
    result = run(BUSY, max_batch=1, replicas="auto")
    assert (result.replicas, result.gpus, result.warnings) == (8, 8, ())
    assert result.inputs["replicas"] == 8
    fewer = run(BUSY, max_batch=1, replicas=7)
    assert any("overloaded" in warning for warning in fewer.warnings)
    assert run(BUSY, replicas="auto").replicas == 1


# --- what holds for any trace -------------------------------------------------------------------

rows = st.lists(
    st.tuples(st.floats(0.0, 30.0), st.integers(1, 300), st.integers(1, 40)),
    min_size=1,
    max_size=12,
)
setups = st.fixed_dictionaries(
    {
        "stack": st.sampled_from(STACKS),
        "arrivals": st.sampled_from(["trace", "offline", "poisson:0.7"]),
        "replicas": st.sampled_from([1, 2, 5, "auto"]),
        "tensor_parallel": st.sampled_from([1, 2]),
        "pipeline_parallel": st.sampled_from([1, 2]),
        "max_batch": st.sampled_from([1, 3, 64]),
        "max_step_tokens": st.sampled_from([64, 256]),
        "dtype": st.sampled_from(["bf16", "fp8", "int4"]),
        "kv_dtype": st.sampled_from([None, "fp8"]),
        "decoding": st.sampled_from(["greedy", "sampling"]),
    }
)
shapes = st.sampled_from([tiny(), tiny(experts=8), tiny(window=50), tiny(experts=4, window=100)])
kernels = {
    name: ideal_kernel(compute_efficiency=0.01, memory_efficiency=0.01, call_seconds=2e-6)
    for name in calibration().kernels
}
slow = {"kernels": kernels}


def check_parts(result: Prediction, requests: Requests) -> None:
    """Every part adds up to the total to 1e-9, and every ratio is of the numbers beside it."""
    total = pytest.approx(result.energy_joules, rel=1e-9)
    assert result.active_joules + result.idle_joules == total
    assert result.prefill_joules + result.decode_joules + result.idle_joules == total
    assert sum(result.by_component_joules.values()) == total
    assert sum(result.by_operator_joules.values()) == total
    assert sum(b.energy_joules for b in result.bins) == total
    assert sum(b.active_joules for b in result.bins) == pytest.approx(
        result.active_joules, rel=1e-9
    )
    assert sum(b.naive_flops_tdp_joules for b in result.bins) == pytest.approx(
        result.naive["flops_tdp_joules"], rel=1e-9
    )
    for part in (result.by_component_joules, result.by_operator_joules):
        assert min(part.values()) >= 0.0
        assert part["idle"] == result.idle_joules
    if result.timeline is None:
        assert result.inputs["binning"] == "paper"
    else:
        check_timeline(result)
    for field in ("requests", "input_tokens", "output_tokens"):
        assert sum(getattr(b, field) for b in result.bins) == getattr(result, field)
    assert result.requests == requests.input_tokens.size
    assert result.average_watts * result.wall_seconds == total
    assert result.joules_per_request * result.requests == total
    assert result.joules_per_output_token * result.output_tokens == total
    assert result.energy_joules_low <= result.energy_joules <= result.energy_joules_high
    i = result.inputs
    assert result.gpus == result.replicas * i["tensor_parallel"] * i["pipeline_parallel"]
    assert result.busy_seconds <= result.wall_seconds * result.replicas * (1 + 1e-9)
    assert result.underestimate_factor.keys() == {
        name.removesuffix("_joules") for name in result.naive
    }
    for name, factor in result.underestimate_factor.items():
        assert factor * result.naive[f"{name}_joules"] == total
    for b in result.bins:
        assert b.requests >= 1
        assert b.input_low * b.requests <= b.input_tokens <= b.input_high * b.requests
        assert b.output_low * b.requests <= b.output_tokens <= b.output_high * b.requests
        assert b.underestimate_factor * b.naive_flops_tdp_joules == pytest.approx(b.energy_joules)
        assert b.energy_joules_low <= b.energy_joules <= b.energy_joules_high


def check_timeline(result: Prediction) -> None:
    """Slices of time add up to the result's energies, and end when the result does."""
    timeline = result.timeline
    assert timeline is not None
    for field in ("prefill_joules", "decode_joules", "idle_joules"):
        expected = pytest.approx(getattr(result, field), rel=1e-9, abs=1e-9 * result.energy_joules)
        assert sum(getattr(timeline, field)) == expected, field
        assert min(getattr(timeline, field)) >= 0.0
    count = len(timeline.idle_joules)
    assert (count - 1) * timeline.slice_seconds < result.wall_seconds
    assert result.wall_seconds <= count * timeline.slice_seconds


@settings(max_examples=150)
@given(rows=rows, setup=setups, model=shapes, limited=st.booleans())
def test_parts_add_up(rows: Any, setup: dict[str, Any], model: Any, limited: bool) -> None:
    cap = 150.0 if limited else 1e6  # base is 120 W: the limit binds often
    requests = trace(*rows)
    fitted = calibration(power_cap_watts=cap, **slow)
    result = predict(requests, gpu=gpu(), model=model, calibration=fitted, **setup)
    check_parts(result, requests)
    idle_watts = 70.0 if setup["stack"] in STATIC_STACKS else 110.0
    idle = result.wall_seconds * result.replicas - result.busy_seconds
    group = setup["tensor_parallel"] * setup["pipeline_parallel"]
    assert result.idle_joules == pytest.approx(idle * idle_watts * group, rel=1e-6, abs=1e-6)
    if setup["arrivals"] == "trace":
        arrivals = [row[0] for row in rows]
        assert result.wall_seconds >= max(arrivals) - min(arrivals)
    assert result.ttft_seconds.p99 <= result.e2e_seconds.p99  # type: ignore[operator]


@settings(max_examples=15)
@given(rows=rows, setup=setups)
def test_parts_add_up_in_the_papers_accounting(rows: Any, setup: dict[str, Any]) -> None:
    requests = trace(*rows)
    setup = setup | {"replicas": 1, "arrivals": "trace", "max_step_tokens": 512}
    result = predict(
        requests, gpu=gpu(), model=tiny(), calibration=calibration(**slow), binning="paper", **setup
    )
    check_parts(result, requests)


def test_electricity_has_a_price_with_its_source() -> None:
    result = run(trace((0.0, 10, 5)), pue=1.5, electricity_price="virginia")
    price = result.inputs["electricity_usd_per_kwh"]
    assert price == 0.0895  # US EIA, Electric Power Annual 2023, commercial
    assert result.electricity_usd == pytest.approx(result.energy_joules * 1.5 / 3.6e6 * price)
    assert "EIA" in result.provenance["electricity_source"]
    assert "2023" in result.provenance["electricity_source"]
    unknown = run(trace((0.0, 10, 5)))
    assert unknown.electricity_usd is None
    with pytest.raises(ConfigurationError, match="in USD/kWh"):
        run(trace((0.0, 10, 5)), electricity_price="atlantis")
    with pytest.raises(ConfigurationError, match="not cents"):
        run(trace((0.0, 10, 5)), electricity_price=12.0)


def test_the_result_is_plain_json_with_the_contracts_keys() -> None:
    document = json.loads(json.dumps(run(trace((0.0, 10, 5), (1.0, 90, 50))).to_dict()))
    kinds: dict[str, Any] = {
        **dict.fromkeys(("schema_version", "requests", "input_tokens", "output_tokens"), int),
        **dict.fromkeys(("gpus", "replicas"), int),
        **dict.fromkeys(
            [
                "energy_joules",
                "energy_joules_low",
                "energy_joules_high",
                "interval_level",
                "active_joules",
                "idle_joules",
                "prefill_joules",
                "decode_joules",
                "wall_seconds",
                "busy_seconds",
                "average_watts",
                "joules_per_request",
                "joules_per_output_token",
            ],
            float,
        ),
        **dict.fromkeys(
            [
                "inputs",
                "by_component_joules",
                "by_operator_joules",
                "naive",
                "underestimate_factor",
                "ttft_seconds",
                "tpot_seconds",
                "e2e_seconds",
                "provenance",
            ],
            dict,
        ),
        "bins": list,
        "warnings": list,
    }
    for key, kind in kinds.items():
        assert type(document[key]) is kind, key
    for key in ("ttft_seconds", "tpot_seconds", "e2e_seconds"):
        assert document[key].keys() == {"p50", "p90", "p99"}
    assert document["naive"].keys() >= {
        "flops_tdp_joules",
        "output_flops_tdp_joules",
        "tdp_time_joules",
    }
    whole = {"input_low", "input_high", "output_low", "output_high", "requests"}
    whole |= {"input_tokens", "output_tokens"}
    real = {"energy_joules", "energy_joules_low", "energy_joules_high", "naive_flops_tdp_joules"}
    real |= {"underestimate_factor"}
    for row in document["bins"]:
        assert {key for key, value in row.items() if type(value) is int} >= whole
        assert {key for key, value in row.items() if type(value) is float} >= real
    assert len(document["bins"]) == 2


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, r"does not divide tiny \(4 attention heads\).*possible: 1, 2, 4"),
        ({"tensor_parallel": 0}, "--tensor-parallel 0 makes no sense"),
        ({"pipeline_parallel": 3}, "more than the 2 layers"),
        ({"stack": "tgi"}, "unknown stack 'tgi'.*vllm-eager"),
        ({"dtype": "fp7"}, "unknown dtype 'fp7'"),
        ({"dtype": "int8"}, "Round GPU does not compute in int8.*fp8"),
        ({"kv_dtype": "int4"}, "unknown KV dtype"),
        ({"binning": "fine"}, "unknown binning"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"max_step_tokens": 0}, "--max-step-tokens 0"),
        ({"max_step_tokens": 100}, "below --max-batch 256"),
        ({"max_step_tokens": 10**12, "max_batch": 10**12}, "beyond any engine"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0 .* above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.01}, "--gpu-memory-utilization 1.01"),
        ({"gpu_memory_utilization": float("nan")}, "--gpu-memory-utilization nan"),
        (
            {"max_model_len": 12},
            "1 of 1 requests are longer than the 12 tokens.*10 input and 5 out",
        ),
        ({"replicas": 0}, "--replicas 0"),
        ({"replicas": "some"}, "--replicas some"),
        ({"replicas": 10**9}, "--replicas 1000000000"),
        ({"arrivals": "poisson"}, "poisson:2.5"),
        ({"arrivals": "poisson:nan"}, "not understood"),
        ({"arrivals": "poisson:-1"}, "not understood"),
        ({"arrivals": "poisson:1e-300"}, "more than 30 years"),
        ({"seed": -1}, "--seed -1"),
        ({"pue": 0.5}, "--pue 0.5"),
        ({"pue": float("nan")}, "--pue nan"),
        ({"pue": 1e30}, "--pue 1e"),
        ({"grid": "narnia"}, "unknown grid"),
        ({"grid": -3}, "--grid -3"),
        ({"binning": "paper", "replicas": 2}, "leave out --replicas 2"),
        ({"binning": "paper", "replicas": "auto"}, "leave out --replicas auto"),
        ({"binning": "paper", "arrivals": "poisson:1"}, "leave out --arrivals"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EnergyModelError, match=message) as caught:
        run(trace((0.0, 10, 5)), **options)
    assert isinstance(caught.value, ConfigurationError | TraceError)


texts = st.one_of(st.text(max_size=8), st.sampled_from(["trace", "poisson:1", "auto", "paper"]))
numbers = st.one_of(st.integers(-3, 5000), st.integers(-(10**20), 10**20))


@settings(max_examples=100)
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(
                (
                    "stack",
                    "arrivals",
                    "dtype",
                    "kv_dtype",
                    "binning",
                    "grid",
                    "replicas",
                    "prefix_hit",
                ),
                texts,
            ),
            **dict.fromkeys(
                (
                    "tensor_parallel",
                    "pipeline_parallel",
                    "max_batch",
                    "max_step_tokens",
                    "max_model_len",
                    "seed",
                ),
                numbers,
            ),
            "pue": st.floats(),
            "gpu_memory_utilization": st.floats(),
        },
    )
)
def test_any_options_give_a_result_or_a_clear_error(options: dict[str, Any]) -> None:
    requests = trace((0.0, 10, 5), (1.0, 300, 2))
    try:
        result = run(requests, **options)
    except EnergyModelError as error:
        assert str(error)
    else:
        check_parts(result, requests)
        json.dumps(result.to_dict(), allow_nan=False)


def test_a_longer_context_can_be_asked_for() -> None:
    with pytest.raises(TraceError, match="set --max-model-len 5010"):
        run(trace((0.0, 5000, 10)))
    result = run(trace((0.0, 5000, 10)), max_model_len=5010)
    assert any("exceeds the 4096 tokens tiny allows" in warning for warning in result.warnings)


def test_a_model_that_does_not_fit_says_how_many_gpus_would() -> None:
    small = gpu(hbm_bytes=12e9)
    options = {"gpu": small, "model": llama_8b(), "max_batch": 8, "max_step_tokens": 512}
    with pytest.raises(CapacityError, match=r"GiB.*Round GPU.*(\d) GPUs") as caught:
        run(trace((0.0, 10, 5)), **options)
    enough = int(str(caught.value).split(" GPUs (")[0].rsplit(" ", 1)[1])
    assert run(trace((0.0, 10, 5)), **options, tensor_parallel=enough).gpus == enough


def test_a_checkpoint_smaller_than_the_dtype_served_is_pointed_out() -> None:
    model = replace(llama_8b(), checkpoint_dtype="fp8")
    hint = "stores fp8 weights, --dtype bf16 counts larger ones; --dtype fp8 serves it as published"
    assert any(hint in warning for warning in run(trace((0.0, 10, 5)), model=model).warnings)
    assert run(trace((0.0, 10, 5)), model=model, dtype="fp8").warnings == ()
    with pytest.raises(CapacityError, match="would do. The checkpoint .* " + hint[:18]):
        run(trace((0.0, 10, 5)), model=model, gpu=gpu(hbm_bytes=16e9))
    without = gpu(peak_flops_per_s={"bf16": 1e15, "fp16": 1e15})
    assert run(trace((0.0, 10, 5)), model=model, gpu=without).warnings == ()


def test_weights_that_are_unpacked_first_are_warned_of() -> None:
    said = "int4 weights are predicted by kernels that unpack them, timed on an H200; hardly"
    assert any(said in w for w in run(trace((0.0, 10, 5)), dtype="int4").warnings)
    assert not any("H200" in w for w in run(trace((0.0, 10, 5)), dtype="fp8").warnings)
    packed = replace(tiny(experts=8), expert_dtype="mxfp4")
    assert any("mxfp4 weights are" in w for w in run(trace((0.0, 10, 5)), model=packed).warnings)
    here = replace(host_bound(), provenance={"kernel_windows": {"moe_packed": 12}})
    (said,) = run(trace((0.0, 10, 5)), model=packed, calibration=here).warnings
    assert "mxfp4 weights are predicted by kernels that unpack them; hardly" in said


def test_no_number_of_gpus_is_named_that_the_heads_do_not_allow() -> None:
    (layer,) = llama_8b().layers
    odd = replace(layer, attention=replace(layer.attention, num_heads=35, num_kv_heads=7))
    model = replace(llama_8b(), layers=(odd,))
    options = {"gpu": gpu(hbm_bytes=12e9), "model": model, "max_batch": 8, "max_step_tokens": 512}
    with pytest.raises(CapacityError, match="leaves no room for KV cache") as caught:
        run(trace((0.0, 10, 5)), **options)
    assert "would do" not in str(caught.value)


def test_a_request_longer_than_the_kv_cache_is_refused() -> None:
    small = gpu(hbm_bytes=2e9)  # 1.8 GB less 1.6 GB reserved
    model = replace(tiny(), max_model_len=10**7)
    with pytest.raises(CapacityError, match=r"does not fit the KV cache of \d+ tokens"):
        run(trace((0.0, 5_000_000, 5)), gpu=small, model=model)


def test_the_share_of_memory_that_an_engine_may_use_is_room_for_kv_cache() -> None:
    def kv_bytes(share: float) -> float:
        options = {"gpu": "h100", "model": "llama-3.1-8b", "gpu_memory_utilization": share}
        return deploy(**options).kv_tokens * 2 * 32 * 8 * 128 * 2.0  # K, V, layers, heads, bf16

    block = 16 * 2 * 32 * 8 * 128 * 2.0
    more = kv_bytes(1.0) - kv_bytes(0.5)
    assert more == pytest.approx(0.5 * load_gpu("h100").hbm_bytes, abs=block)
    same = deploy(gpu="h100", model="llama-3.1-8b")
    assert kv_bytes(0.9) / block == same.costs.scheduler.kv.blocks
    with pytest.raises(CapacityError, match="leaves no room for KV cache"):
        kv_bytes(0.01)
    assert run(BUSY, gpu_memory_utilization=0.8).inputs["gpu_memory_utilization"] == 0.8


@pytest.mark.parametrize(
    "field", ["memory_efficiency", "compute_efficiency", "sharpness", "eight_bit_efficiency"]
)
def test_a_calibration_that_would_divide_by_nothing_is_refused(field: str, tmp_path: Path) -> None:
    document = json.loads(data_path("calibrations", "h100.json").read_text(encoding="utf-8"))
    document["kernels"]["gemm"][field] = 0
    path = tmp_path / "own.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ProfileError, match=rf"own\.json: .*gemm\.{field} must be above 0"):
        predict(trace((0.0, 10, 5)), gpu="h100", calibration=str(path))


def test_a_gpu_without_calibration_is_refused_and_another_ones_is_marked() -> None:
    with pytest.raises(ProfileError, match=r"Round GPU \(round\) has no calibration yet.*a100"):
        predict(trace((0.0, 10, 5)), gpu=gpu(), model=tiny())
    result = run(trace((0.0, 10, 5)), calibration=host_bound(gpu="square"))
    assert any("calibration is of square, not of round" in w for w in result.warnings)
    assert result.provenance["calibration_gpu"] == "square"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (trace(), "no request"),
        (trace((np.nan, 1, 1)), "finite"),
        (trace((np.inf, 1, 1)), "finite"),
        (trace((0.0, 1, 1), (1e12, 1, 1)), "within"),
        (trace((0.0, 0, 1)), "input_tokens must be whole numbers"),
        (trace((0.0, 1, -5)), "output_tokens must be whole numbers"),
        (trace((0.0, 1, 10**18)), "output_tokens"),
        (trace((0.0, 1.5, 1)), "input_tokens"),  # type: ignore[arg-type]
        (trace((0.0, np.nan, 1)), "input_tokens"),  # type: ignore[arg-type]
    ],
)
def test_requests_made_by_a_program_are_checked(requests: Requests, message: str) -> None:
    with pytest.raises(TraceError, match=f"made: .*{message}"):
        run(requests)


def test_arrays_of_different_length_are_refused() -> None:
    requests = replace(trace((0.0, 1, 1)), output_tokens=np.array([1, 2]))
    with pytest.raises(TraceError, match="equally long"):
        run(requests)


def test_bad_rows_are_warned_of_and_counted() -> None:
    dropped = (DroppedRows(kind="negative", count=2, first_lines=(3, 4)),)
    result = run(trace((0.0, 10, 5), dropped=dropped, rows_read=3))
    assert any("2 rows negative" in warning for warning in result.warnings)
    assert result.provenance["rows_at_fault"] == {"negative": 2}
    assert result.provenance["rows_read"] == 3


def test_the_public_names() -> None:
    assert energymodel.predict is predict
    with pytest.raises(energymodel.EnergyModelError):
        energymodel.predict("nope", gpu="a100")


def test_a_deployment_has_the_defaults_of_predict() -> None:
    asked = inspect.signature(predict).parameters
    for name, parameter in inspect.signature(deploy).parameters.items():
        assert parameter.default == asked[name].default, name
    for field in fields(Setting):
        if field.name in asked and field.name not in ("gpu", "replicas"):  # replicas: auto there
            assert field.default == asked[field.name].default, field.name
    one = deploy(gpu="a100")
    assert one.serving == deploy(gpu="a100", stack="vllm", max_batch=256, dtype="bf16").serving
