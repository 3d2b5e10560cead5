"""Seconds and joules of kernels: values worked out by hand, and what must hold for any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.errors import ConfigurationError
from energymodel.operators import operator_table, step_stats
from energymodel.roofline import (
    OperatorCosts,
    clock_under_cap,
    kernel_costs,
    operator_costs,
    splits,
    step_seconds_and_joules,
    wave_fill,
)
from energymodel.specs import ServingConfig
from tests.shapes import calibration, gpu, ideal_kernel, llama_8b, tiny


def costs_of(kernel: object, eight_bit: bool = False, **work: float) -> OperatorCosts:
    """Costs of one kernel on the round GPU (1 PFLOP/s, 3 TB/s, 132 SMs)."""
    values: dict[str, float] = {
        "executed_flops": 0.0,
        "hbm_bytes": 0.0,
        "activation_bytes": 0.0,
        "link_bytes": 0.0,
        "tiles": 0.0,
        "splits": 0.0,
        "block_bytes": 0.0,
        "reductions": 0.0,
        "calls": 1.0,
        "gemm_rows": 0.0,
        "gemm_columns": 0.0,
    }
    work.setdefault("flops", work.get("executed_flops", 0.0))
    arrays = {k: np.array([v]) for k, v in (values | work).items()}
    return kernel_costs(
        **arrays,
        flops_per_s=np.array([1e15]),
        eight_bit=np.array([eight_bit]),
        bytes_per_s=np.array([3e12]),
        joules_per_flop=np.array([5e-13]),
        gpu=gpu(),
        calibration=calibration(),
        parameter=lambda name: np.array([getattr(kernel, name)]),
    )


def seconds_of(kernel: object, **work: float) -> float:
    costs = costs_of(kernel, **work)
    return float(costs.memory_seconds[0] + costs.compute_seconds[0])


def test_the_longer_of_compute_and_memory_counts() -> None:
    kernel = ideal_kernel()
    assert seconds_of(kernel, executed_flops=1e12, hbm_bytes=3e8) == pytest.approx(1e-3, rel=1e-3)
    assert seconds_of(kernel, executed_flops=1e10, hbm_bytes=3e9) == pytest.approx(1e-3, rel=1e-3)


def test_additive_ridge_and_call_time() -> None:
    kernel = ideal_kernel(sharpness=1.0, call_seconds=1e-5)
    # 1 ms of arithmetic + 0.1 ms of bytes + three calls
    assert seconds_of(kernel, executed_flops=1e12, hbm_bytes=3e8, calls=3.0) == pytest.approx(
        1e-3 + 1e-4 + 3e-5
    )


def test_tiles_cost_their_time_on_every_sm() -> None:
    kernel = ideal_kernel(tile_seconds=2e-6)
    # 264 tiles on 132 SMs: two of 2 us one after another
    assert seconds_of(kernel, tiles=264.0) == pytest.approx(4e-6)


def test_a_gemm_is_padded_to_sixteen_rows() -> None:
    kernel = ideal_kernel()
    one, sixteen, seventeen = (
        seconds_of(kernel, executed_flops=rows * 1e10, gemm_rows=rows, gemm_columns=4096.0)
        for rows in (1.0, 16.0, 17.0)
    )
    assert one == pytest.approx(sixteen)
    assert seventeen == pytest.approx(2 * sixteen)


def test_eight_bit_products_have_an_efficiency_of_their_own() -> None:
    kernel = ideal_kernel(eight_bit_efficiency=0.5)
    assert costs_of(kernel, executed_flops=1e12).compute_seconds == pytest.approx([1e-3])
    slower = costs_of(kernel, eight_bit=True, executed_flops=1e12)
    assert slower.compute_seconds == pytest.approx([2e-3])


def test_wave_fill_of_the_guides_example() -> None:
    # NVIDIA's guide: 12 tiles on a GPU of 8 SMs run in two waves, the last half full
    rows, columns = np.array([384.0]), np.array([512.0])
    assert wave_fill(rows, columns, 8) == pytest.approx([0.75])


def test_activations_beyond_the_l2_travel_through_memory() -> None:
    kernel = ideal_kernel()
    kept = 0.5 * 50e6
    assert seconds_of(kernel, activation_bytes=kept) == pytest.approx(kept / 3.0 / 3e12)
    assert seconds_of(kernel, activation_bytes=kept + 3e9) == pytest.approx(
        (kept / 3.0 + 3e9) / 3e12
    )


def test_joules_of_each_part() -> None:
    kernel = ideal_kernel(active_watts=100.0, flop_energy_factor=2.0)
    costs = costs_of(kernel, executed_flops=1e12, hbm_bytes=1e9, link_bytes=1e6)
    assert costs.flop_joules == pytest.approx([1.0])
    assert costs.hbm_joules == pytest.approx([0.08])
    assert costs.link_joules == pytest.approx([5e-5])
    total = costs.memory_seconds + costs.compute_seconds
    assert costs.active_memory_joules + costs.active_compute_joules == pytest.approx(100.0 * total)


def test_bytes_from_device_memory_pay_for_the_chip_too() -> None:
    # 1 GB from device memory and 2 GB from kernel to kernel cross the chip: 3 GB at 10 pJ/B
    costs = costs_of(ideal_kernel(), hbm_bytes=1e9, activation_bytes=2e9)
    assert costs.onchip_joules == pytest.approx([0.03])
    # but half of the L2, all activations spill, and are paid for once
    spilled = 2e9 - 0.5 * gpu().l2_bytes
    assert costs.hbm_joules == pytest.approx([80e-12 * (1e9 + spilled)])


def test_padding_takes_time_but_no_energy() -> None:
    kernel = ideal_kernel()
    costs = costs_of(kernel, flops=5e11, executed_flops=1e12)
    assert costs.compute_seconds == pytest.approx([1e-3], rel=1e-6)
    assert costs.flop_joules == pytest.approx([0.25])


def splits_of(**work: float | bool) -> float:
    values = {"gemm_rows": 0.0, "gemm_columns": 0.0, "gemm_k": 0.0, "tiles": 0.0, "calls": 1.0}
    arrays = {k: np.array([v]) for k, v in ({**values, "is_split_attention": False} | work).items()}
    return float(splits(**arrays, sm_count=132)[0])


def test_split_sums_by_hand() -> None:
    # 4096 columns are 32 tiles of 132 SMs; sums of 4096 count half
    gemm = {"gemm_columns": 4096.0, "gemm_k": 4096.0, "calls": 3.0}
    assert splits_of(gemm_rows=1.0, **gemm) == pytest.approx(3 * (1 - 32 / 132) / 2)
    assert splits_of(gemm_rows=640.0, **gemm) == 0.0  # 160 tiles
    assert splits_of(**gemm) == 0.0  # no rows, no kernel
    # 13 sequences of 8 KV heads fill 104 of 132 SMs, 14 fill 112: more than 0.8 of them
    assert splits_of(is_split_attention=True, tiles=2 * 104.0, calls=2.0) == 2.0
    assert splits_of(is_split_attention=True, tiles=2 * 112.0, calls=2.0) == 0.0
    assert splits_of(is_split_attention=True) == 0.0


def test_a_split_costs_its_second_kernel() -> None:
    kernel = ideal_kernel(split_seconds=2e-6)
    plain = seconds_of(kernel, executed_flops=1e9)
    assert seconds_of(kernel, executed_flops=1e9, splits=1.5) == pytest.approx(plain + 3e-6)


def test_nothing_costs_nothing() -> None:
    costs = costs_of(ideal_kernel(call_seconds=1e-3, active_watts=100.0))
    assert costs.memory_seconds[0] == costs.compute_seconds[0] == 0.0


work = st.floats(1e3, 1e13)


@given(flops=work, more=st.floats(1.0, 10.0), hbm=work, sharpness=st.floats(1.0, 16.0))
def test_more_work_never_takes_less_time(
    flops: float, more: float, hbm: float, sharpness: float
) -> None:
    kernel = ideal_kernel(sharpness=sharpness, call_seconds=1e-6)
    small = seconds_of(kernel, executed_flops=flops, hbm_bytes=hbm)
    assert seconds_of(kernel, executed_flops=flops * more, hbm_bytes=hbm) >= small * (1 - 1e-12)
    assert seconds_of(kernel, executed_flops=flops, hbm_bytes=hbm * more) >= small * (1 - 1e-12)
    # between the ideal roofline and the sum of its parts
    assert max(flops / 1e15, hbm / 3e12) <= small <= flops / 1e15 + hbm / 3e12 + 1.1e-6


@given(
    memory=st.floats(1e-6, 1e-2),
    compute=st.floats(1e-6, 1e-2),
    fixed=st.floats(0.0, 10.0),
    core=st.floats(1e-3, 100.0),
)
def test_the_limit_is_met_where_it_binds(
    memory: float, compute: float, fixed: float, core: float
) -> None:
    limited = replace(calibration(), power_cap_watts=700.0)
    tables = np.array([[memory, compute, fixed, core]])
    seconds, joules = step_seconds_and_joules(tables, limited)
    assert joules[0] / seconds[0] <= 700.0 * (1 + 1e-6)
    free_seconds, free_joules = step_seconds_and_joules(tables, calibration())
    assert seconds[0] >= free_seconds[0] * (1 - 1e-9)
    if free_joules[0] <= 699.0 * free_seconds[0]:
        assert seconds[0] == pytest.approx(free_seconds[0])
    x = clock_under_cap(*(np.array([v]) for v in (memory, compute, fixed, core)), limited)
    assert 0.2 <= x[0] <= 1.0


def test_a_decode_step_of_an_8b_model_is_its_weights() -> None:
    """One token reads the 7.5e9 weights of the layers and the logits once: 15.0 GB, 5 ms."""
    table = operator_table(llama_8b(), ServingConfig())
    stats = step_stats(llama_8b(), tokens=1.0, rows=1.0, decode_kv_tokens=1.0)
    costs = operator_costs(table, stats, gpu(), calibration())
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336) + 128256 * 4096
    seconds, _ = step_seconds_and_joules(costs.tables(), calibration())
    assert seconds[0] == pytest.approx(2.0 * weights / 3e12, rel=0.01)


def test_sequences_and_rows_are_tiles_of_attention() -> None:
    model = tiny()
    table = operator_table(model, ServingConfig())
    names = list(table.names)
    stats = step_stats(model, tokens=0.0, decode_sequences=8.0, prefill_rows=256.0)
    tiles = (stats @ table.tiles.T)[0]
    # two layers of 2 KV heads and 4 query heads
    assert tiles[names.index("attention_decode")] == 8 * 2 * 2
    assert tiles[names.index("attention_prefill")] == 2 * 4 * 2


def test_a_row_passes_at_the_rate_of_one_thread_block() -> None:
    kernel = ideal_kernel(block_seconds_per_byte=2e-11, call_seconds=1e-6, sharpness=2.0)
    # 86 kB of a row: 1.72 us a call, beside what the bytes of all rows take
    row = 2 * 1.72e-6
    for rows in (8, 16, 64):
        whole = rows * 86e3 / (3e12 * calibration().onchip_speedup)
        taken = seconds_of(kernel, activation_bytes=rows * 86e3, block_bytes=86e3, calls=2.0)
        assert taken == pytest.approx(2e-6 + np.hypot(row, whole))


def test_threads_wait_for_each_other_in_the_sum_over_a_row() -> None:
    kernel = ideal_kernel(reduction_seconds=6e-7, call_seconds=1e-6)
    assert seconds_of(kernel, activation_bytes=1.0, reductions=1.0, calls=3.0) == pytest.approx(
        3 * 1.6e-6, rel=1e-6
    )


def test_the_first_bytes_of_device_memory_come_later() -> None:
    kernel = ideal_kernel(hbm_latency_seconds=5e-7)
    assert seconds_of(kernel, hbm_bytes=3e6, calls=3.0) == pytest.approx(1e-6 + 1.5e-6)
    within_l2 = seconds_of(kernel, activation_bytes=3e6)
    assert within_l2 == pytest.approx(1e-6 / calibration().onchip_speedup)


def test_rows_of_blocks_pay_more_for_a_byte() -> None:
    kernel = ideal_kernel(block_joules_per_byte=3e-11)
    spread = costs_of(kernel, hbm_bytes=1e9, activation_bytes=1e9).onchip_joules[0]
    by_row = costs_of(kernel, hbm_bytes=1e9, activation_bytes=1e9, block_bytes=1e4)
    assert by_row.onchip_joules[0] - spread == pytest.approx(2e9 * 3e-11)


@pytest.mark.parametrize("dtype", ["fp8", "int4"])
def test_products_of_16_bit_stand_in_for_quantised_ones(dtype: str) -> None:
    table = operator_table(llama_8b(), ServingConfig(weight_dtype=dtype))
    stats = step_stats(llama_8b(), tokens=64.0, rows=64.0)
    whole = calibration()
    plain = {c: k for c, k in whole.kernels.items() if c not in ("gemm_scaled", "gemm_packed")}
    fallen = operator_costs(table, stats, gpu(), replace(whole, kernels=plain))
    alike = {c: plain.get(c, plain["gemm"]) for c in whole.kernels}
    alike["moe_packed"] = whole.kernels["moe_packed"]
    expected = operator_costs(table, stats, gpu(), replace(whole, kernels=alike))
    assert fallen.tables() == pytest.approx(expected.tables())
    without = {c: k for c, k in plain.items() if c != "gemm"}
    with pytest.raises(ConfigurationError, match="has no operator class 'gemm"):
        operator_costs(table, stats, gpu(), replace(whole, kernels=without))
