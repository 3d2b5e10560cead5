"""The fit finds the parameters of made-up measurements, and reports what it was not shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from calibration.fitting.fit_kernels import (
    KernelRows,
    fit_kernel_seconds,
    fit_watts,
    held_out_seconds,
    implied_clock,
    predicted_seconds,
    predicted_watts,
    summarize,
)
from energymodel.calibrations import Calibration
from tests.shapes import calibration, gpu, ideal_kernel

GEMM = {
    "compute_efficiency": 0.8,
    "memory_efficiency": 0.9,
    "call_seconds": 4e-6,
    "sharpness": 3.0,
    "wave_exponent": 0.2,
    "tile_seconds": 8e-7,
    "active_watts": 60.0,
}


def truth(**changes: object) -> Calibration:
    base = calibration(power_cap_watts=500.0)
    kernels = {**base.kernels, "gemm": ideal_kernel(**GEMM)}
    return replace(base, kernels=kernels, **changes)  # type: ignore[arg-type]


def gemms(clock: float = 1.0) -> KernelRows:
    """GEMMs of 30 shapes and 9 row counts, not yet timed."""
    m, n, k = (
        a.ravel().astype(float)
        for a in np.meshgrid(
            [1, 16, 48, 130, 256, 520, 1100, 4096, 8000],
            [2048, 4096, 5120, 7168, 14336, 28672],
            [1024, 2048, 4096, 8192, 14336],
            indexing="ij",
        )
    )
    ones, zeros = np.ones_like(m), np.zeros_like(m)
    return KernelRows(
        board=("",) * m.size,
        board_idle_watts=zeros,
        name=tuple(f"{a:.0f}x{b:.0f}x{c:.0f}" for a, b, c in zip(m, n, k, strict=True)),
        op_class=("gemm",) * len(m),
        family=tuple(f"{b:.0f}x{c:.0f}" for b, c in zip(n, k, strict=True)),
        dtype=("bf16",) * len(m),
        flops=2 * m * n * k,
        executed_flops=2 * m * n * k,
        hbm_bytes=2 * n * k,
        activation_bytes=2 * m * (n + k),
        link_bytes=zeros,
        tiles=m * n / 128**2,
        block_bytes=zeros,
        reductions=zeros,
        key_blocks=zeros,
        calls=ones,
        gemm_rows=m,
        gemm_columns=n,
        gemm_k=k,
        seconds=ones,
        watts=np.full_like(m, np.nan),
        clock=np.full_like(m, clock),
    )


def timed(rows: KernelRows, noise: float = 0.0) -> KernelRows:
    scatter = np.exp(noise * np.random.default_rng(3).standard_normal(len(rows)))
    return replace(rows, seconds=predicted_seconds(rows, gpu(), truth()) * scatter)


def test_fit_finds_the_parameters_of_seconds() -> None:
    fitted = fit_kernel_seconds(timed(gemms()), gpu(), calibration(), "gemm")
    for name in ("compute_efficiency", "memory_efficiency", "call_seconds", "tile_seconds"):
        assert getattr(fitted, name) == pytest.approx(GEMM[name], rel=0.02)
    assert fitted.sharpness == pytest.approx(3.0, rel=0.05)


def test_fit_keeps_what_it_is_told_to_and_divides_by_the_clock() -> None:
    rows = timed(gemms(clock=0.7))
    start = replace(truth(), kernels={**truth().kernels, "gemm": ideal_kernel(**GEMM)})
    fitted = fit_kernel_seconds(rows, gpu(), start, "gemm", keep=("compute_efficiency",))
    assert fitted.compute_efficiency == GEMM["compute_efficiency"]
    assert fitted.memory_efficiency == pytest.approx(0.9, rel=0.02)


def test_one_slow_board_does_not_move_the_fit() -> None:
    rows = timed(gemms(), noise=0.01)
    slow = np.random.default_rng(0).random(len(rows)) < 0.05
    rows = replace(rows, seconds=np.where(slow, 3.0 * rows.seconds, rows.seconds))
    fitted = fit_kernel_seconds(rows, gpu(), calibration(), "gemm")
    assert fitted.memory_efficiency == pytest.approx(0.9, rel=0.03)


def test_held_out_rows_are_predicted_without_their_family() -> None:
    rows = timed(gemms(), noise=0.02)
    odd = np.array([f == "4096x4096" for f in rows.family])
    rows = replace(rows, seconds=np.where(odd, 2.0 * rows.seconds, rows.seconds))
    predicted = held_out_seconds(rows, gpu(), calibration(), "gemm", folds=30)
    # a family that differs stays wrong, because no fit of its own saw it
    assert summarize(predicted[odd], rows.seconds[odd]).bias == pytest.approx(-0.5, abs=0.05)
    assert summarize(predicted[~odd], rows.seconds[~odd]).median < 0.03


def test_fit_finds_the_joules_below_and_at_the_limit() -> None:
    rows = gemms(clock=np.nan)
    rows = replace(rows, seconds=predicted_seconds(rows, gpu(), truth()))
    clock_known = replace(rows, clock=np.ones(len(rows)))
    free = predicted_seconds(clock_known, gpu(), truth())
    below = rows.seconds <= free * (1 + 1e-9)
    assert 20 < below.sum() < len(rows) - 20
    rows = replace(rows, watts=np.where(below, predicted_watts(clock_known, gpu(), truth()), 500.0))
    clock = implied_clock(rows, gpu(), truth())
    assert clock[below] == pytest.approx(np.ones(below.sum()))
    assert (clock[~below] < 1.0).all()
    start = replace(truth(), joules_per_flop={"bf16": 9e-13}, joules_per_hbm_byte=3e-11)
    fitted = fit_watts(rows, gpu(), start, keep=("active gemm", "onchip", "exponent"))
    assert fitted.joules_per_flop["bf16"] == pytest.approx(5e-13, rel=0.05)
    assert fitted.joules_per_hbm_byte == pytest.approx(8e-11, rel=0.05)
    assert fitted.clock_energy_exponent == start.clock_energy_exponent


def test_energies_that_no_row_shows_stay() -> None:
    rows = timed(gemms()).pick(gemms().gemm_rows < 2)  # one row of tokens: all memory-bound
    rows = replace(rows, watts=predicted_watts(rows, gpu(), truth()))
    start = replace(truth(), joules_per_hbm_byte=4e-11)
    fitted = fit_watts(rows, gpu(), start)
    assert fitted.clock_energy_exponent == pytest.approx(start.clock_energy_exponent, rel=0.02)
    assert fitted.joules_per_flop["fp8"] / fitted.joules_per_flop["bf16"] == pytest.approx(0.6)
    assert summarize(predicted_watts(rows, gpu(), fitted), rows.watts).median < 0.01


def test_a_kept_class_follows_the_gemms_joules() -> None:
    rows = timed(gemms())
    experts = replace(rows, op_class=("moe",) * len(rows))
    both = KernelRows.join([rows, experts])
    kernels = {**truth().kernels, "moe": ideal_kernel(**GEMM, flop_energy_factor=1.2)}
    known = replace(truth(), kernels=kernels)
    both = replace(both, watts=predicted_watts(both, gpu(), known))
    start = replace(known, joules_per_flop={"bf16": 4e-13})
    fitted = fit_watts(both, gpu(), start, keep=("flop moe bf16", "exponent"))
    assert fitted.kernels["moe"].flop_energy_factor == 1.2
    assert fitted.joules_per_flop["bf16"] > 4e-13


def test_summary_by_hand() -> None:
    error = summarize(np.array([1.1, 0.9, 1.0, 2.0]), np.ones(4))
    assert (error.n, error.median, error.max) == (4, pytest.approx(0.1), pytest.approx(1.0))
    assert error.bias == pytest.approx(0.05)


def test_rows_are_picked_and_joined() -> None:
    rows = timed(gemms())
    first, rest = rows.pick(rows.gemm_rows == 1), rows.pick(rows.gemm_rows > 1)
    joined = KernelRows.join([first, rest])
    assert len(joined) == len(rows)
    assert sorted(joined.name) == sorted(rows.name)
    assert len(rows.of_class("moe")) == 0


def test_a_start_without_a_class_lends_it_the_plain_one() -> None:
    """Calibrations that were written before torch's int8 products were a class of their own."""
    rows, start = gemms(), truth()
    older = replace(start, kernels={c: k for c, k in start.kernels.items() if c != "gemm_int8"})
    int8 = replace(rows, op_class=("gemm_int8",) * len(rows))
    plain = predicted_seconds(rows, gpu(), older)
    assert predicted_seconds(int8, gpu(), older).tolist() == plain.tolist()
