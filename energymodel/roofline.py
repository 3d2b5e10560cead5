"""Seconds and joules of operators and of whole steps: the roofline with fitted efficiencies.

Time of an operator, per call (Williams et al. 2009, with a smooth ridge):

    t = call_seconds + (t_compute**p + t_memory**p)**(1/p)

Energy of a step whose GPU time is t:

    E = base_watts t + sum_o (active_watts_o t_o + e_flop F_o + e_hbm H_o + e_onchip A_o + e_link K_o)

When that average power exceeds the board's limit, the clock falls to a share x of its highest
(`clock_under_cap`): compute-bound time grows as 1/x and core energy falls as x**a, because
the voltage falls with the clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from energymodel.calibrations import Calibration, KernelCalibration
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.operators import STATS, OperatorTable
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]

TILE = 128
"""Rows and columns of a GEMM output tile on the GPUs modelled (CUTLASS default for Hopper)."""
_MMA_ROWS = 64
"""Rows of one warp-group matrix instruction (PTX ISA, wgmma.m64nNk16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCosts:
    """Costs of operators at the highest clock, one GPU. All arrays (steps, operators).

    `memory_seconds` does not depend on the SM clock, `compute_seconds` goes as 1/clock.
    """

    memory_seconds: Array
    compute_seconds: Array
    flop_joules: Array
    onchip_joules: Array
    active_memory_joules: Array
    active_compute_joules: Array
    hbm_joules: Array
    link_joules: Array

    def tables(self) -> Array:
        """Sums over the operators: (steps, 4) = memory s, compute s, fixed J, core J."""
        fixed = self.hbm_joules + self.link_joules + self.active_memory_joules
        core = self.flop_joules + self.onchip_joules + self.active_compute_joules
        parts = (self.memory_seconds, self.compute_seconds, fixed, core)
        return np.stack([p.sum(axis=1) for p in parts], axis=1)


def wave_fill(rows: Array, columns: Array, sm_count: int) -> Array:
    """Share of the SMs' tile slots that a GEMM's output tiles fill [-].

    Tiles of TILE x TILE run in waves of `sm_count`; the last wave is partly empty
    (NVIDIA, "Matrix Multiplication Background User's Guide", section on wave quantization).
    """
    tiles = np.ceil(rows / TILE) * np.ceil(columns / TILE)
    fill: Array = tiles / (np.ceil(tiles / sm_count) * sm_count)
    return fill


def operator_costs(
    table: OperatorTable, stats: Array, gpu: GpuSpec, calibration: Calibration
) -> OperatorCosts:
    """Costs of every operator in every step, at the highest clock.

    Parameters
    ----------
    table : operators of one GPU
    stats : (steps, len(STATS)) statistics, see `operators.STATS`

    Raises
    ------
    ConfigurationError
        If the GPU has no published peak, or the calibration no energy, for a dtype in use.
    """
    executed = stats @ table.executed_flops.T
    weights_and_kv = stats @ table.hbm_bytes.T
    activations = stats @ table.activation_bytes.T
    link = stats @ table.link_bytes.T
    classes = [_kernel(calibration, c) for c in table.op_class]
    peak = np.array([_peak(gpu, d) for d in table.compute_dtype])
    flop_joules = np.array([_joules_per_flop(calibration, d) for d in table.compute_dtype])

    def column(name: str) -> Array:
        return np.array([getattr(c, name) for c in classes])

    # activations beyond what the L2 keeps between two kernels travel through device memory
    kept = calibration.onchip_share_of_l2 * gpu.l2_bytes * table.calls
    spilled = np.maximum(activations - kept, 0.0)
    hbm = weights_and_kv + spilled

    is_gemm = table.gemm_n > 0
    rows = np.where(
        np.array([n == "logits" for n in table.names]),
        stats[:, [STATS.index("rows")]],
        stats[:, [STATS.index("tokens")]],
    )
    rows = np.maximum(rows, 1.0)
    padding = np.where(is_gemm, np.ceil(rows / _MMA_ROWS) * _MMA_ROWS / rows, 1.0)
    fill = np.where(is_gemm, wave_fill(rows, np.maximum(table.gemm_n, 1.0), gpu.sm_count), 1.0)
    rate = peak * column("compute_efficiency") * fill ** column("wave_exponent")
    compute = executed * padding / rate
    is_link = np.array([c == "communication" for c in table.op_class])
    bandwidth = column("memory_efficiency") * gpu.hbm_bytes_per_s
    memory = (hbm + (activations - spilled) / calibration.onchip_speedup) / bandwidth
    if np.any(is_link):
        memory = np.where(
            is_link, link / (column("memory_efficiency") * gpu.link_bytes_per_s), memory
        )

    sharpness = column("sharpness")
    longest = np.maximum(np.maximum(compute, memory), 1e-30)
    together = longest * ((compute / longest) ** sharpness + (memory / longest) ** sharpness) ** (
        1.0 / sharpness
    )
    compute_share = (compute / longest) ** sharpness
    compute_share = compute_share / (compute_share + (memory / longest) ** sharpness + 1e-300)
    busy = (executed + hbm + activations + link) > 0
    fixed = np.where(busy, table.calls * column("call_seconds"), 0.0)
    compute_seconds = np.where(busy, together * compute_share, 0.0)
    memory_seconds = np.where(busy, together - together * compute_share, 0.0) + fixed
    active = column("active_watts")
    factor = column("flop_energy_factor")
    return OperatorCosts(
        memory_seconds=memory_seconds,
        compute_seconds=compute_seconds,
        flop_joules=executed * flop_joules * factor,
        onchip_joules=activations * calibration.joules_per_onchip_byte,
        active_memory_joules=active * memory_seconds,
        active_compute_joules=active * compute_seconds,
        hbm_joules=hbm * calibration.joules_per_hbm_byte,
        link_joules=link * calibration.joules_per_link_byte,
    )


def clock_under_cap(
    memory_seconds: Array,
    compute_seconds: Array,
    fixed_joules: Array,
    core_joules: Array,
    calibration: Calibration,
) -> Array:
    """Share x of the highest clock at which average power meets the board's limit [-].

    Solves base + (fixed + core x**a) / (t_memory + t_compute / x) = cap by bisection; 1 where
    the limit does not bind. All arrays of one shape.
    """
    base, cap, exponent = (
        calibration.base_watts,
        calibration.power_cap_watts,
        calibration.clock_energy_exponent,
    )
    low, high = np.full_like(memory_seconds, 0.2), np.ones_like(memory_seconds)

    def excess(x: Array) -> Array:
        seconds = memory_seconds + compute_seconds / x
        result: Array = fixed_joules + core_joules * x**exponent - (cap - base) * seconds
        return result

    capped = excess(high) > 0
    for _ in range(40):
        middle = 0.5 * (low + high)
        over = excess(middle) > 0
        high = np.where(over, middle, high)
        low = np.where(over, low, middle)
    return np.where(capped, low, 1.0)


def step_seconds_and_joules(tables: Array, calibration: Calibration) -> tuple[Array, Array]:
    """GPU time [s] and energy [J] of steps from `OperatorCosts.tables()`, power limit applied.

    Where the limit binds although nothing is compute-bound, the step is stretched until its
    average power meets the limit.
    """
    memory, compute, fixed, core = tables.T
    x = clock_under_cap(memory, compute, fixed, core, calibration)
    seconds = memory + compute / x
    dynamic = fixed + core * x**calibration.clock_energy_exponent
    seconds = np.maximum(seconds, dynamic / (calibration.power_cap_watts - calibration.base_watts))
    return seconds, dynamic + calibration.base_watts * seconds


def _kernel(calibration: Calibration, op_class: str) -> KernelCalibration:
    try:
        return calibration.kernels[op_class]
    except KeyError:
        raise ConfigurationError(
            f"the calibration of {calibration.gpu} has no operator class '{op_class}'"
        ) from None


def _peak(gpu: GpuSpec, dtype: str) -> float:
    try:
        return gpu.peak_flops_per_s[dtype]
    except KeyError:
        raise ConfigurationError(
            f"{gpu.title} has no {dtype} peak: "
            + unknown_name("dtype", dtype, gpu.peak_flops_per_s)
        ) from None


def _joules_per_flop(calibration: Calibration, dtype: str) -> float:
    try:
        return calibration.joules_per_flop[dtype]
    except KeyError:
        raise ConfigurationError(
            f"the calibration of {calibration.gpu} has no energy per {dtype} FLOP: "
            + unknown_name("dtype", dtype, calibration.joules_per_flop)
        ) from None
