"""The suite as data: complete, consistent with the operator table, well ordered; launchers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.kernels.cases import Case
from calibration.kernels.suite import build_suite, estimated_seconds, ordered
from energymodel.errors import ConfigurationError

FULL = build_suite("full", gpus=2)


def case(name: str) -> Case:
    return next(c for c in FULL if c.name == name)


def test_names_are_unique_and_suites_nest() -> None:
    names = [c.name for c in FULL]
    assert len(set(names)) == len(names)
    quick = {c.name for c in build_suite("quick")}
    assert quick <= set(names)
    assert len(quick) < len(names) / 3


def test_every_class_of_the_energy_model_is_measured() -> None:
    classes = Counter(c.op_class for c in FULL)
    for needed in (
        *("gemm", "moe", "attention_prefill", "attention_decode", "elementwise", "sampling"),
        *("communication", "copy", "base", "idle", "decode_stack", "gemm_pair"),
    ):
        assert classes[needed] > 0, needed
    assert sum(classes.values()) >= 300
    assert {c.launcher for c in FULL if c.op_class == "idle"} >= {
        "idle_cold",
        "idle_context",
        "idle_polling",
    }


def test_only_gpu_pairs_run_collectives() -> None:
    assert not [c for c in build_suite("full") if c.gpus > 1]


def test_work_of_known_cases() -> None:
    gemm = case("gemm.bf16.llama-3.1-8b.gate_up.m16")
    assert gemm.flops == 2 * 16 * 28672 * 4096
    assert gemm.hbm_bytes == 28672 * 4096 * 2
    assert gemm.activation_bytes == 16 * (28672 + 4096) * 2
    resident = case("gemm.bf16.llama-3.2-1b.o.m16.l2")
    assert resident.hbm_bytes == 0
    decode = case("decode.32x8x128.b8.c2048")
    assert decode.hbm_bytes == 8 * 2048 * 4096  # 4 KiB per token and layer of Llama-3.1-8B
    assert decode.flops == 4 * 8 * 2048 * 32 * 128
    prefill = case("prefill.32x8x128.b1.t512.past2048")
    assert prefill.flops == 4 * 32 * 128 * sum(2048 + i + 1 for i in range(512))
    step = case("stack.llama-3.1-8b.b1.graph")
    assert step.flops == pytest.approx(2 * 7.5e9, rel=0.02)  # 8.03e9 less the embedding table


def test_dense_twins_do_the_same_useful_flops() -> None:
    fused = {c.name: c for c in FULL if c.op_class == "moe" and c.repeat == 1}
    twins = [c for c in FULL if c.op_class == "gemm_pair" and c.repeat == 1]
    assert twins
    for twin in twins:
        assert twin.flops == fused[twin.name.replace("dense", "fused")].flops


def test_graph_and_eager_come_in_pairs() -> None:
    names = {c.name for c in FULL if c.op_class == "decode_stack" and c.repeat == 1}
    assert {n.replace("graph", "eager") for n in names} == {n for n in names if "eager" in n}


def test_unknown_suite_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match="full, quick"):
        build_suite("fall")


@given(st.integers(0, 2**32))
def test_order_is_seeded_complete_and_most_valuable_first(seed: int) -> None:
    order = ordered(FULL, seed)
    assert order == ordered(FULL, seed)
    assert sorted(c.name for c in order) == sorted(c.name for c in FULL)
    assert order[0].launcher == "idle_cold"  # before anything touches the GPU
    assert order[1].launcher == "idle_context"
    priorities = [c.priority for c in order[2:]]
    assert priorities == sorted(priorities)


def test_classes_are_spread_over_the_run() -> None:
    order = [c for c in ordered(FULL, 1) if c.priority == 1]
    for op_class in ("gemm", "moe", "elementwise"):
        first = sum(c.op_class == op_class for c in order[: len(order) // 2])
        total = sum(c.op_class == op_class for c in order)
        assert abs(first - total / 2) <= 0.15 * total + 1


def test_expected_time_covers_the_window() -> None:
    assert all(estimated_seconds(c, 1.2) > 1.2 + c.warmup_seconds for c in FULL)


# -- launchers, on the CPU and in miniature -----------------------------------------------

_SMALL = {
    **{"n": 64, "k": 128, "m": 32, "context": 40, "tokens": 24, "heads": 4, "kv_heads": 2},
    **{"head_dim": 16, "experts": 8, "top_k": 2, "width": 32, "hidden": 64, "layers": 3},
    **{"mlp": 48, "vocab": 300, "rows": 4, "bytes": 4096, "elements": 32, "batch": 2},
}


def _miniatures() -> list[Case]:
    seen: dict[tuple[Any, ...], Case] = {}
    for c in FULL:
        if c.op_class in ("idle", "communication"):
            continue
        past = 16 if c.shape.get("past") else 0
        shape = {**c.shape, **{k: v for k, v in _SMALL.items() if k in c.shape}}
        if "past" in shape:
            shape["past"] = past
        key = (c.launcher, c.dtype, past, *(c.shape.get(k) for k in ("skewed", "rotated")))
        small = dataclasses.replace(c, shape=shape, hbm_bytes=min(c.hbm_bytes, 8000.0))
        seen.setdefault(key, small)
    return list(seen.values())


@pytest.mark.parametrize("small", _miniatures(), ids=lambda c: c.name)
def test_launchers_run_in_miniature_on_the_cpu(small: Case) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from calibration.kernels.launchers import Bed, UnavailableError, prepare  # noqa: PLC0415
    from calibration.kernels.pump import Pump, eager  # noqa: PLC0415

    bed = Bed(devices=("cpu",), l2_bytes=2e4)
    with torch.no_grad():
        try:
            work = prepare(small, bed)
        except UnavailableError:
            ours = ("moe_fused", "gemm_scaled", "fp8_quant", "gemm_int4", "moe_mxfp4")
            assert small.launcher in ours
            return
        for i in range(work.rotation):
            result = work.call(i)
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                assert torch.isfinite(result.float()).all()
        if small.shape.get("rotated") == 1:
            assert work.rotation > 1
        pump = Pump(eager(work, "cpu"), "cpu")
        pump.mark()
        for _ in range(4):
            pump()
        timing = pump.timing()
    assert timing.launches >= 3
    assert timing.iteration_seconds is not None
    assert timing.iteration_seconds > 0


def test_routing_is_the_same_everywhere_and_counted() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from calibration.kernels.launchers import Bed  # noqa: PLC0415
    from calibration.kernels.launchers_model import moe_grouped, moe_loop, routings  # noqa: PLC0415

    bed = Bed(devices=("cpu",), l2_bytes=2e4)
    small = next(c for c in _miniatures() if c.launcher == "moe_loop")
    chosen = routings(small, 3)
    assert chosen.shape == (3, 24, 2)
    assert (chosen[..., 0] != chosen[..., 1]).all()  # without replacement
    assert torch.equal(chosen, routings(small, 3))  # the same on every machine
    skewed = dataclasses.replace(small, shape={**small.shape, "skewed": 1, "tokens": 500})
    even = dataclasses.replace(small, shape={**small.shape, "tokens": 500})
    spread = [torch.bincount(routings(c, 1).flatten()).max() for c in (even, skewed)]
    assert spread[1] > 1.5 * spread[0]
    with torch.no_grad():
        loop, grouped = moe_loop(small, bed), moe_grouped(small, bed)
    assert loop.details == grouped.details
    assert 1 <= loop.details["distinct_experts"] <= 8
    assert loop.counts["hbm_bytes"] == loop.details["distinct_experts"] * 3 * 32 * 64 * 2


def test_padded_rows_of_the_fused_kernel_are_counted() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed here")
    from calibration.kernels.launchers import Bed  # noqa: PLC0415
    from calibration.kernels.launchers_model import moe_fused  # noqa: PLC0415

    calls: list[tuple[Any, ...]] = []

    def fused_experts(
        hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any
    ) -> Any:
        assert w1.shape == (8, 64, 64)
        assert w2.shape == (8, 64, 32)
        assert topk_weights.dtype == torch.float32
        assert topk_ids.dtype == torch.int32
        calls.append((hidden_states.shape, topk_ids.shape))
        return hidden_states

    fake = SimpleNamespace(
        fused_experts=fused_experts,
        try_get_optimal_moe_config=lambda w1, w2, top_k, dtype, m: {"BLOCK_SIZE_M": 16},
    )
    bed = Bed(devices=("cpu",), l2_bytes=2e4, moe=fake)
    base = next(c for c in _miniatures() if c.launcher == "moe_fused")
    for tokens in (1, 100):
        work = moe_fused(dataclasses.replace(base, shape={**base.shape, "tokens": tokens}), bed)
        for i in range(work.rotation):
            work.call(i)
        rows = work.details["expert_rows"]
        if tokens == 1:  # each of the two rows is a tile of its own
            assert rows == 32
            assert work.details["distinct_experts"] == 2
        else:  # 200 rows over 8 experts, each padded to a multiple of 16
            assert 200 <= rows <= 200 + 8 * 15
        assert work.counts["executed_flops"] == pytest.approx(base.flops * rows / (tokens * 2))
    assert calls[-1] == ((100, 64), (100, 2))
