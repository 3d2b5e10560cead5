"""Seconds and joules of operators and of whole steps: the roofline with fitted efficiencies.

Time of an operator, per call (Williams et al. 2009, with a smooth ridge):

    t = call_seconds + hbm_latency_seconds + splits x split_seconds
        + reductions x reduction_seconds + tiles x tile_seconds / SMs
        + (t_compute**p + t_memory**p)**(1/p)

The second term counts where bytes come from device memory. The third is a second kernel that adds
up the parts of sums that were split (`splits`), the fourth the sums over a row, for which the
threads of a block wait for each other, the fifth what an SM spends on each tile before and after
its arithmetic; t_memory holds the bytes from device memory, from the L2 and over links. Where one
thread block passes a row alone, t_memory is in the same way the longer of that and the row's bytes
x block_seconds_per_byte: they leave no faster than one SM takes them, however few rows there are.

Energy of a step whose GPU time is t:

    E = base_watts t + sum_o (active_watts_o t_o + e_flop F_o + e_hbm H_o
                             + e_onchip (A_o + H_o) + e_link K_o)

with useful FLOPs F (rows of zeros that pad a tile switch no transistors) and with H twice: bytes
from device memory cross the chip as those from the L2 do. Where one thread block passes a row,
e_onchip is larger by `block_joules_per_byte`.
A step in which the host takes longer adds the base for the time that its GPU waits. In a
tensor-parallel group the base is higher by what awake links draw (`costs.of_group`).

When that average power exceeds the board's limit, the clock falls to a share x of its highest
(`clock_under_cap`): compute-bound time grows as 1/x and core energy falls as x**a, because
the voltage falls with the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.calibrations import Calibration, KernelCalibration
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.operator_parts import EIGHT_BIT
from energymodel.operators import STATS, OperatorTable
from energymodel.specs import GpuSpec
from energymodel.tiles import TILE

Array = NDArray[np.float64]

_ROWS, _TOKENS = STATS.index("rows"), STATS.index("tokens")
_LOWEST_CLOCK = 0.2
"""Share of the highest clock below which the power limit pushes no GPU [-]."""
_BISECTIONS, _NEWTON_STEPS = 12, 4  # to 2e-4, then to the last digit
_MMA_ROWS = 16
"""Rows a GEMM is padded to: tokens lie on the N side of the matrix instruction, whose N is a
multiple of 8 (PTX ISA, mma.m16n8k16 and wgmma.m64nNk16), and libraries take tiles of 16."""
_LONG_SUM = 8192.0
"""Length of a GEMM's sums [elements] at which `split_seconds` is stated: a unit, no threshold."""
_SPLIT_BELOW = 0.8
"""Decode attention splits sequences while its thread blocks fill less of the SMs (FlashAttention,
`num_splits_heuristic`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorCosts:
    """Costs of operators at the highest clock, one GPU. All arrays (steps, operators).

    `memory_seconds` does not depend on the SM clock, `compute_seconds` goes as 1/clock. The last
    two are the work itself: FLOPs run and bytes of device memory moved.
    """

    memory_seconds: Array
    compute_seconds: Array
    flop_joules: Array
    onchip_joules: Array
    active_memory_joules: Array
    active_compute_joules: Array
    hbm_joules: Array
    link_joules: Array
    executed_flops: Array
    hbm_bytes: Array

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


def splits(
    *, gemm_rows: Array, gemm_columns: Array, gemm_k: Array, tiles: Array, calls: Array,
    is_split_attention: NDArray[np.bool_], sm_count: int,
) -> Array:  # fmt: skip
    """Second kernels that add up parts of split sums, of all `calls` together [-].

    A GEMM's are the more likely, and the longer, the fewer SMs its tiles fill and the longer its
    sums are. Decode attention over several blocks of keys has one wherever its sequences fill too
    few SMs. Arguments broadcast.
    """
    of_gemm = np.ceil(gemm_rows / TILE) * np.ceil(gemm_columns / TILE) / sm_count
    gemm = np.maximum(1.0 - of_gemm, 0.0) * gemm_k / _LONG_SUM
    few = (tiles > 0) & (tiles < _SPLIT_BELOW * sm_count * calls)
    result: Array = calls * np.where(is_split_attention, few, gemm * (gemm_rows > 0))
    return result


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
    classes = [kernel_of(calibration, c) for c in table.op_class]

    def parameter(name: str) -> Array:
        return np.array([getattr(c, name) for c in classes])

    return kernel_costs(
        **operator_work(table, stats, gpu),
        joules_per_flop=np.array([joules_per_flop(calibration, d) for d in table.compute_dtype]),
        gap_seconds=calibration.kernel_gap_seconds,
        gpu=gpu,
        calibration=calibration,
        parameter=parameter,
    )


def operator_work(table: OperatorTable, stats: Array, gpu: GpuSpec) -> dict[str, Any]:
    """Arguments of `kernel_costs` that no calibration changes, by name.

    Each is an array that broadcasts to (steps, operators). Raises ConfigurationError if the GPU has
    no published peak for a dtype in use.
    """
    is_logits = np.array([n == "logits" for n in table.names])
    is_link = np.array([c == "communication" for c in table.op_class])
    gemm_rows = np.where(is_logits, stats[:, [_ROWS]], stats[:, [_TOKENS]])
    tiles = stats @ table.tiles.T
    return {
        "flops": stats @ table.flops.T,
        "executed_flops": stats @ table.executed_flops.T,
        "hbm_bytes": stats @ table.hbm_bytes.T,
        "activation_bytes": stats @ table.activation_bytes.T,
        "link_bytes": stats @ table.link_bytes.T,
        "tiles": tiles,
        "splits": splits(
            gemm_rows=gemm_rows,
            gemm_columns=table.gemm_n,
            gemm_k=table.gemm_k,
            tiles=tiles,
            calls=table.calls,
            # how long the contexts are is not known here: those of one block count as split too
            is_split_attention=np.array([c == "attention_decode" for c in table.op_class]),
            sm_count=gpu.sm_count,
        ),
        "block_bytes": table.block_bytes,
        "reductions": table.reductions,
        "calls": table.calls,
        "gemm_rows": gemm_rows,
        "gemm_columns": table.gemm_n,
        "flops_per_s": np.array([_peak(gpu, d) for d in table.compute_dtype]),
        "eight_bit": np.array([d in EIGHT_BIT for d in table.compute_dtype]),
        "bytes_per_s": np.where(is_link, gpu.link_bytes_per_s, gpu.hbm_bytes_per_s),
    }


def kernel_costs(
    *,
    flops: Array,
    executed_flops: Array,
    hbm_bytes: Array,
    activation_bytes: Array,
    link_bytes: Array,
    tiles: Array,
    splits: Array,
    block_bytes: Array,
    reductions: Array,
    calls: Array,
    gemm_rows: Array,
    gemm_columns: Array,
    flops_per_s: Array,
    eight_bit: NDArray[np.bool_],
    bytes_per_s: Array,
    joules_per_flop: Array,
    gpu: GpuSpec,
    calibration: Calibration,
    parameter: Callable[[str], Array],
    gap_seconds: Array | float = 0.0,
) -> OperatorCosts:
    """Costs of kernels at the highest clock; every argument broadcasts against the others.

    Parameters
    ----------
    flops : useful ones, which take energy; executed_flops : those that take time
    hbm_bytes, activation_bytes, link_bytes, tiles, splits : like the FLOPs, of all `calls` together
    block_bytes : of a row that one thread block passes alone, of one call
    reductions : sums over such a row, of one call
    gemm_rows, gemm_columns : shape of a GEMM's output; columns 0 for other kernels
    flops_per_s, bytes_per_s : the datasheet's peaks for the kernel's dtype and memory (or link)
    eight_bit : whether the kernel multiplies 8-bit numbers
    gap_seconds : time between a kernel and the next; 0 for kernels repeated alone
    parameter : values of a field of `KernelCalibration`, by its name
    """
    # activations beyond what the L2 keeps between two kernels travel through device memory
    kept = calibration.onchip_share_of_l2 * gpu.l2_bytes * calls
    spilled = np.maximum(activation_bytes - kept, 0.0)
    hbm = hbm_bytes + spilled
    moved = hbm + link_bytes + (activation_bytes - spilled) / calibration.onchip_speedup
    memory = moved / (parameter("memory_efficiency") * bytes_per_s)

    is_gemm = gemm_columns > 0
    rows = np.maximum(gemm_rows, 1.0)
    padding = np.where(is_gemm, np.ceil(rows / _MMA_ROWS) * _MMA_ROWS / rows, 1.0)
    fill = np.where(is_gemm, wave_fill(rows, np.maximum(gemm_columns, 1.0), gpu.sm_count), 1.0)
    efficiency = parameter("compute_efficiency") * fill ** parameter("wave_exponent")
    efficiency = efficiency * np.where(eight_bit, parameter("eight_bit_efficiency"), 1.0)
    compute = executed_flops * padding / (flops_per_s * efficiency)
    tiling = tiles * padding * parameter("tile_seconds") / gpu.sm_count

    sharpness = parameter("sharpness")
    one_block = calls * block_bytes * parameter("block_seconds_per_byte")
    memory = _smooth_maximum(memory, one_block, sharpness)
    longest = np.maximum(np.maximum(compute, memory), 1e-30)
    from_compute = (compute / longest) ** sharpness
    from_memory = (memory / longest) ** sharpness
    together = longest * (from_compute + from_memory) ** (1.0 / sharpness)
    busy = (executed_flops + hbm + activation_bytes + link_bytes + tiles) > 0
    compute_share = from_compute / (from_compute + from_memory + 1e-300)
    latency = parameter("hbm_latency_seconds") * (hbm_bytes > 0)
    latency = latency + reductions * parameter("reduction_seconds")
    fixed = calls * (parameter("call_seconds") + gap_seconds + latency)
    fixed = fixed + splits * parameter("split_seconds")
    fixed = np.where(busy, fixed, 0.0)
    compute_seconds = np.where(busy, together * compute_share, 0.0) + tiling
    waiting = np.where(busy, together * (1.0 - compute_share), 0.0)
    active = parameter("active_watts")
    by_block = parameter("block_joules_per_byte") * (block_bytes > 0)
    onchip_joules_per_byte = calibration.joules_per_onchip_byte + by_block
    return OperatorCosts(
        memory_seconds=waiting + fixed,
        compute_seconds=compute_seconds,
        flop_joules=flops * joules_per_flop * parameter("flop_energy_factor"),
        onchip_joules=(activation_bytes + hbm_bytes) * onchip_joules_per_byte,
        active_memory_joules=active * waiting + calibration.kernel_watts * (waiting + fixed),
        active_compute_joules=(active + calibration.kernel_watts) * compute_seconds,
        hbm_joules=hbm * calibration.joules_per_hbm_byte,
        link_joules=link_bytes * calibration.joules_per_link_byte,
        executed_flops=executed_flops,
        hbm_bytes=hbm,
    )


def _smooth_maximum(first: Array, second: Array, sharpness: Array) -> Array:
    """(a**p + b**p)**(1/p), the larger of two times where they differ much."""
    longest = np.maximum(np.maximum(first, second), 1e-30)
    parts = (first / longest) ** sharpness + (second / longest) ** sharpness
    result: Array = longest * parts ** (1.0 / sharpness)
    return np.where((first > 0.0) | (second > 0.0), result, 0.0)


def clock_under_cap(
    memory_seconds: Array,
    compute_seconds: Array,
    fixed_joules: Array,
    core_joules: Array,
    calibration: Calibration,
    host_seconds: Array | float = 0.0,
    gap_seconds: Array | float = 0.0,
    further_watts: Array | float = 0.0,
    rounding: float = 0.0,
) -> Array:
    """Share x of the highest clock at which average power meets the board's limit [-].

    Solves base + (fixed + core x**a) / t = cap, with t = max(t_memory + t_compute / x, t_host) +
    t_gap: the limit is held on average, so that pauses allow a higher clock. 1 where the limit does
    not bind. All arrays of one shape. By bisection, and Newton's method from below.
    """
    exponent = calibration.clock_energy_exponent
    room = calibration.power_cap_watts - calibration.base_watts - further_watts
    everything = np.broadcast_arrays(
        memory_seconds, compute_seconds, fixed_joules, core_joules, host_seconds, gap_seconds, room
    )
    share = np.ones_like(memory_seconds)
    seconds = longer(memory_seconds + compute_seconds, host_seconds, rounding) + gap_seconds
    capped = fixed_joules + core_joules > room * seconds
    if not capped.any():
        return share
    memory, compute, fixed, core, host, gap, watts = (part[capped] for part in everything)

    def excess(x: Array) -> Array:
        seconds = longer(memory + compute / x, host, rounding) + gap
        return np.asarray(fixed + core * x**exponent - watts * seconds)

    low, high = np.full_like(memory, _LOWEST_CLOCK), np.ones_like(memory)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        over = excess(middle) > 0
        high = np.where(over, middle, high)
        low = np.where(over, low, middle)
    x, solvable = low, low > _LOWEST_CLOCK
    for _ in range(_NEWTON_STEPS):
        gpu = memory + compute / x
        share_of_gpu = np.where(gpu > host, 1.0, 0.0)
        if rounding > 0.0:
            share_of_gpu = 0.5 + 0.5 * (gpu - host) / np.sqrt(
                (gpu - host) ** 2 + (rounding * host) ** 2
            )
        of_seconds = share_of_gpu * compute / x**2
        slope = exponent * core * x ** (exponent - 1.0) + watts * of_seconds
        x = np.minimum(
            x - np.where(solvable, excess(x) / np.where(solvable, slope, 1.0), 0.0), high
        )
    share[capped] = x
    return share


def longer(gpu: Array, host: Array | float, rounding: float = 0.0) -> Array:
    """The longer of the GPU's and the host's seconds, rounded where they are nearly equal.

    Within `rounding` of the host's, so that a fit meets no corner; 0 = as the simulator has it.
    """
    if rounding <= 0.0:
        return np.asarray(np.maximum(gpu, host))
    return np.asarray(0.5 * (gpu + host + np.sqrt((gpu - host) ** 2 + (rounding * host) ** 2)))


def step_seconds_and_joules(
    tables: Array,
    calibration: Calibration,
    host_seconds: Array | float = 0.0,
    gap_seconds: Array | float = 0.0,
    further_watts: Array | float = 0.0,
    rounding: float = 0.0,
) -> tuple[Array, Array]:
    """Time [s] and energy [J] of steps from `OperatorCosts.tables()`, power limit applied.

    A step takes the longer of the GPU's and the host's time, and its gap. Where the limit binds
    although nothing is compute-bound, it is stretched until its average power meets the limit.
    `further_watts` are drawn beyond the calibration's base all the while, e.g. by the links of a
    group (`costs.of_group`). `rounding` : see `longer`.
    """
    memory, compute, fixed, core = tables.T
    base = calibration.base_watts + further_watts
    x = clock_under_cap(
        *(memory, compute, fixed, core, calibration),
        *(host_seconds, gap_seconds, further_watts, rounding),
    )
    seconds = longer(memory + compute / x, host_seconds, rounding) + gap_seconds
    dynamic = fixed + core * x**calibration.clock_energy_exponent
    seconds = np.maximum(seconds, dynamic / (calibration.power_cap_watts - base))
    return seconds, dynamic + base * seconds


_PLAIN = {
    **dict.fromkeys(("gemm_int8", "gemm_scaled", "gemm_packed"), "gemm"),
    "moe_packed": "moe",
}
"""Class of 16-bit products that stands in where a calibration lacks that of quantised ones."""


def kernel_of(calibration: Calibration, op_class: str) -> KernelCalibration:
    """Parameters of a class, a plain one's where the calibration lacks it; else an error."""
    known = calibration.kernels
    try:
        return known[op_class] if op_class in known else known[_PLAIN[op_class]]
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


def joules_per_flop(calibration: Calibration, dtype: str) -> float:
    """Energy of a FLOP of a dtype [J/FLOP]; ConfigurationError if the calibration has none."""
    try:
        return calibration.joules_per_flop[dtype]
    except KeyError:
        raise ConfigurationError(
            f"the calibration of {calibration.gpu} has no energy per {dtype} FLOP: "
            + unknown_name("dtype", dtype, calibration.joules_per_flop)
        ) from None
