"""Fits the kernel parameters of a calibration to measured kernels. No torch, no GPU.

Two stages, both robust least squares on log residuals with bounds at zero:

1. seconds: per operator class, the parameters of `KernelCalibration` (efficiencies, fixed time
   of a call, sharpness of the ridge, cost of a partly filled wave);
2. watts, given the measured seconds: base power, power of busy SMs by class, joules per FLOP by
   dtype and class, joules per byte from device memory and on chip, and the exponent with which
   core energy follows the clock under the power limit.

`fit_*` returns exactly what `energymodel.roofline` takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energymodel.calibrations import Calibration, KernelCalibration
from energymodel.roofline import (
    EIGHT_BIT,
    OperatorCosts,
    kernel_costs,
    kernel_of,
    splits,
    step_seconds_and_joules,
)
from energymodel.specs import GpuSpec

Array = NDArray[np.float64]

ROBUST_SCALE = 0.05
"""Log residual from which on soft_l1 grows linearly: 5 %, the floor of board-to-board spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRows:
    """Measured kernels, one element a row; all arrays (n,)."""

    name: tuple[str, ...]
    op_class: tuple[str, ...]
    family: tuple[str, ...]
    dtype: tuple[str, ...]
    board: tuple[str, ...]
    """Which board each was measured on; empty = unknown."""
    board_idle_watts: Array
    """What that board idles at above the mean of its kind [W]; 0 = unknown."""
    flops: Array
    """Useful ones."""
    executed_flops: Array
    hbm_bytes: Array
    activation_bytes: Array
    link_bytes: Array
    tiles: Array
    """Pieces of work of the thread blocks, as `operators.OperatorTable.tiles`."""
    block_bytes: Array
    """Bytes of a row that one thread block passes alone, as in `operators.OperatorTable`."""
    reductions: Array
    """Sums over such a row, likewise."""
    key_blocks: Array
    """Blocks of keys that decode attention takes for a sequence; 0 for other kernels."""
    calls: Array
    gemm_rows: Array
    gemm_columns: Array
    gemm_k: Array
    seconds: Array
    """Measured time of one iteration [s]."""
    watts: Array
    """Measured mean power [W]; NaN where it was not measured."""
    clock: Array
    """Mean SM clock over the highest [-]; NaN where the power limit may have held it down."""

    def pick(self, mask: NDArray[np.bool_] | Iterable[bool]) -> KernelRows:
        """Rows where `mask` is true."""
        chosen = np.asarray(mask, dtype=bool)
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, tuple):
                values[f.name] = tuple(v for v, keep in zip(value, chosen, strict=True) if keep)
            else:
                values[f.name] = value[chosen]
        return KernelRows(**values)

    @staticmethod
    def join(parts: Sequence[KernelRows]) -> KernelRows:
        """All rows of several tables, one table after another."""
        values: dict[str, Any] = {}
        for f in fields(KernelRows):
            columns = [getattr(part, f.name) for part in parts]
            is_text = isinstance(columns[0], tuple)
            values[f.name] = sum(columns, ()) if is_text else np.concatenate(columns)
        return KernelRows(**values)

    def of_class(self, op_class: str) -> KernelRows:
        """Rows of one operator class."""
        return self.pick(np.array([c == op_class for c in self.op_class]))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.seconds)


def row_costs(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    override: Mapping[str, float] | None = None,
) -> OperatorCosts:
    """Costs of the rows' kernels at the highest clock; arrays (n,).

    `override` replaces parameters of `KernelCalibration` for all rows (while one class is fitted).
    """
    classes, of_row = np.unique(np.array(rows.op_class, dtype=str), return_inverse=True)
    kernels = [kernel_of(calibration, str(c)) for c in classes]
    dtypes, dtype_of_row = np.unique(np.array(rows.dtype, dtype=str), return_inverse=True)

    def parameter(name: str) -> Array:
        if override is not None and name in override:
            return np.full(len(rows), override[name])
        values: Array = np.array([getattr(kernel, name) for kernel in kernels])[of_row]
        return values

    def by_dtype(values: Mapping[str, float]) -> Array:
        found: Array = np.array([values.get(str(d), np.nan) for d in dtypes])[dtype_of_row]
        return found

    is_link = classes[of_row] == "communication"
    return kernel_costs(
        flops=rows.flops,
        executed_flops=rows.executed_flops,
        hbm_bytes=rows.hbm_bytes,
        activation_bytes=rows.activation_bytes,
        link_bytes=rows.link_bytes,
        tiles=rows.tiles,
        splits=splits(
            gemm_rows=rows.gemm_rows,
            gemm_columns=rows.gemm_columns,
            gemm_k=rows.gemm_k,
            tiles=rows.tiles,
            calls=rows.calls,
            is_split_attention=rows.key_blocks > 1,
            sm_count=gpu.sm_count,
        ),
        block_bytes=rows.block_bytes,
        reductions=rows.reductions,
        calls=rows.calls,
        gemm_rows=rows.gemm_rows,
        gemm_columns=rows.gemm_columns,
        flops_per_s=by_dtype(gpu.peak_flops_per_s),
        eight_bit=np.isin(dtypes, EIGHT_BIT)[dtype_of_row],
        bytes_per_s=np.where(is_link, gpu.link_bytes_per_s, gpu.hbm_bytes_per_s),
        joules_per_flop=by_dtype(calibration.joules_per_flop),
        gpu=gpu,
        calibration=calibration,
        parameter=parameter,
    )


_TIME_BOUNDS: Mapping[str, tuple[float, float]] = {
    "compute_efficiency": (0.02, 1.3),
    "memory_efficiency": (0.02, 1.1),
    "call_seconds": (1e-7, 3e-4),
    "sharpness": (1.0, 16.0),
    "wave_exponent": (1e-3, 1.0),
    "tile_seconds": (1e-9, 1e-4),
    "eight_bit_efficiency": (0.1, 1.5),
}
"""Physical ranges; efficiencies may pass 1 a little where boards run above the datasheet clock."""

TIME_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "gemm": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "sharpness",
        "wave_exponent",
        "tile_seconds",
    ),
    "moe": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "sharpness",
        "tile_seconds",
    ),
    "gemm_scaled": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "sharpness",
        "tile_seconds",
    ),
    "gemm_packed": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "sharpness",
        "tile_seconds",
    ),
    "moe_packed": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "tile_seconds",
    ),
    "attention_prefill": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "tile_seconds",
    ),
    "attention_decode": (
        "compute_efficiency",
        "memory_efficiency",
        "call_seconds",
        "tile_seconds",
    ),
    "elementwise": ("memory_efficiency", "call_seconds"),
    "sampling": ("memory_efficiency", "call_seconds"),
    "communication": ("memory_efficiency", "call_seconds", "sharpness"),
}
"""What is fitted for each class from 16-bit rows: no more than its cases can tell apart. Rows of
8-bit products only, `EIGHT_BIT_PARAMETERS`."""
EIGHT_BIT_PARAMETERS = ("eight_bit_efficiency",)


def predicted_seconds(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    override: Mapping[str, float] | None = None,
) -> Array:
    """Seconds of the rows' kernels at the measured clock share (n,).

    Where the clock is not known the power limit decides it, as in a prediction.
    """
    costs = row_costs(rows, gpu, calibration, override)
    at_clock = costs.memory_seconds + costs.compute_seconds / rows.clock
    if np.isfinite(rows.clock).all():
        return np.asarray(at_clock)
    limited, _ = step_seconds_and_joules(row_tables(costs), calibration)
    return np.where(np.isfinite(rows.clock), at_clock, limited)


def row_tables(costs: OperatorCosts) -> Array:
    """Costs of rows (n,) in the form of `roofline.step_seconds_and_joules` (n, 4)."""
    columns = {f.name: getattr(costs, f.name)[:, None] for f in fields(costs)}
    return OperatorCosts(**columns).tables()


def fit_kernel_seconds(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    op_class: str,
    keep: Sequence[str] = (),
) -> KernelCalibration:
    """Time parameters of one class, robust least squares on log seconds.

    The efficiencies are those of the highest clock: see `predicted_seconds`. Parameters in
    `keep` stay as the calibration has them.
    """
    from scipy.optimize import least_squares  # noqa: PLC0415

    rows = rows.of_class(op_class)
    only_eight_bit = all(d in EIGHT_BIT for d in rows.dtype)
    fitted = EIGHT_BIT_PARAMETERS if only_eight_bit else TIME_PARAMETERS[op_class]
    names = [n for n in fitted if n not in keep]
    start = calibration.kernels[op_class]
    low, high = (np.log([_TIME_BOUNDS[n][i] for n in names]) for i in (0, 1))
    measured = np.log(rows.seconds)

    def residuals(theta: Array) -> Array:
        override = dict(zip(names, np.exp(theta), strict=True))
        return np.log(predicted_seconds(rows, gpu, calibration, override)) - measured

    first = np.log([max(getattr(start, n), 2.0 * _TIME_BOUNDS[n][0]) for n in names])
    result = least_squares(
        residuals,
        np.clip(first, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=ROBUST_SCALE,
        x_scale="jac",
    )
    return replace(start, **dict(zip(names, map(float, np.exp(result.x)), strict=True)))


def held_out_seconds(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    op_class: str,
    keep: Sequence[str] = (),
    folds: int = 5,
) -> Array:
    """Seconds of the class's rows, each predicted by a fit without any row of its family (n,)."""
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415

    rows = rows.of_class(op_class)
    families = np.array(rows.family)
    predicted = np.full(len(rows), np.nan)
    split = GroupKFold(min(folds, len(set(rows.family))))
    for train, test in split.split(families, groups=families):
        fitted = fit_kernel_seconds(_at(rows, train), gpu, calibration, op_class, keep)
        kernels = {**calibration.kernels, op_class: fitted}
        predicted[test] = predicted_seconds(
            _at(rows, test), gpu, replace(calibration, kernels=kernels)
        )
    return predicted


def _at(rows: KernelRows, indices: NDArray[np.int64]) -> KernelRows:
    mask = np.zeros(len(rows), dtype=bool)
    mask[indices] = True
    return rows.pick(mask)


ENERGY_CLASSES = (
    *("gemm", "gemm_scaled", "gemm_packed", "moe", "moe_packed"),
    *("attention_prefill", "attention_decode", "elementwise", "sampling"),
)
"""Classes whose busy SMs get a power of their own."""
_FLOP_CLASSES = ("gemm", "gemm_scaled", "gemm_packed", "moe", "moe_packed", "attention_prefill")
_PRIOR_WEIGHT = 0.01
"""Pull towards the start, in log units: decides only what no row tells apart."""
_AT_LIMIT = 0.95
"""Share of the power limit from which on a row counts as held down by it."""


def implied_clock(rows: KernelRows, gpu: GpuSpec, calibration: Calibration) -> Array:
    """Clock shares (n,): the measured ones, else what the seconds say of rows at the limit.

    A row without a measured clock that drew the limit's power ran compute-bound work in the
    measured seconds less its memory-bound ones; below the limit the clock was the highest.
    """
    costs = row_costs(rows, gpu, calibration)
    left = np.maximum(rows.seconds - costs.memory_seconds, 1e-9)
    share = np.clip(costs.compute_seconds / left, 0.4, 1.0)
    limited = rows.watts >= _AT_LIMIT * calibration.power_cap_watts
    return np.where(np.isfinite(rows.clock), rows.clock, np.where(limited, share, 1.0))


def predicted_watts(rows: KernelRows, gpu: GpuSpec, calibration: Calibration) -> Array:
    """Mean power (n,) at the measured seconds and the measured or implied clock."""
    joules, _, start = _watt_terms(rows, gpu, calibration)
    return np.asarray(joules(start))


def fit_watts(
    rows: KernelRows,
    gpu: GpuSpec,
    calibration: Calibration,
    keep: Sequence[str] = (),
) -> Calibration:
    """Energy parameters from measured power, given measured seconds.

    P t = base t + sum of active, FLOP, HBM and on-chip joules, core ones scaled by clock**a.
    Base power is fixed by the caller (it is measured alone, with kernels that do nothing).
    Parameters named in `keep` (`active <class>`, `flop <class> <dtype>`, `hbm`, `onchip`,
    `exponent`), and those that no row tells apart, stay as the calibration has them, FLOPs of a
    class relative to a GEMM's.
    """
    from scipy.optimize import least_squares  # noqa: PLC0415

    rows = rows.pick(np.isfinite(rows.watts))
    watts, names, start = _watt_terms(rows, gpu, calibration)
    limits = {
        "active": (1e-2, 400.0),
        "flop": (1e-14, 5e-12),
        "hbm": (1e-12, 4e-10),
        "onchip": (1e-13, 2e-10),
        "exponent": (0.3, 3.0),
    }
    bounds = np.array([limits[name.split()[0]] for name in names])
    first = np.log(np.clip(start, bounds[:, 0] * 1.01, bounds[:, 1] * 0.99))
    free = np.array([name not in keep for name in names])
    measured = np.log(rows.watts)

    def full(theta: Array) -> Array:
        value = first.copy()
        value[free] = theta
        return np.exp(value)

    def residuals(theta: Array) -> Array:
        pull = _PRIOR_WEIGHT * (theta - first[free])
        return np.concatenate([np.log(watts(full(theta))) - measured, pull])

    result = least_squares(
        residuals,
        first[free],
        bounds=np.log(bounds[free]).T,
        loss="soft_l1",
        f_scale=ROBUST_SCALE,
    )
    fitted = zip(names, map(float, full(result.x)), strict=True)
    return _with_energy(calibration, {n: value for n, value in fitted if n not in keep})


def _watt_terms(
    rows: KernelRows, gpu: GpuSpec, calibration: Calibration
) -> tuple[Callable[[Array], Array], list[str], Array]:
    """Power of the rows as a function of the energy parameters; their names; their values now."""
    clock = implied_clock(rows, gpu, calibration)
    unit = replace(
        calibration,
        joules_per_flop=dict.fromkeys(calibration.joules_per_flop, 1.0),
        joules_per_hbm_byte=1.0,
        joules_per_onchip_byte=1.0,
        kernels={c: replace(k, flop_energy_factor=1.0) for c, k in calibration.kernels.items()},
    )
    work = row_costs(rows, gpu, unit)
    modelled = work.memory_seconds + work.compute_seconds / clock
    classes, pairs = np.array(rows.op_class), list(zip(rows.op_class, rows.dtype, strict=True))
    active = [c for c in ENERGY_CLASSES if c in rows.op_class]
    flops = sorted({p for p in pairs if p[0] in _FLOP_CLASSES})
    columns = [np.where(classes == c, 1.0, 0.0) for c in active]
    columns += [np.where([p == f for p in pairs], work.flop_joules, 0.0) for f in flops]
    columns += [work.hbm_joules, work.onchip_joules]
    names = [f"active {c}" for c in active] + [f"flop {c} {d}" for c, d in flops]
    names += ["hbm", "onchip", "exponent"]
    start = [calibration.kernels[c].active_watts for c in active]
    start += [
        calibration.joules_per_flop[d] * calibration.kernels[c].flop_energy_factor for c, d in flops
    ]
    start += [
        calibration.joules_per_hbm_byte,
        calibration.joules_per_onchip_byte,
        calibration.clock_energy_exponent,
    ]
    terms = np.stack(columns)
    terms[len(active) :] /= rows.seconds

    def watts(value: Array) -> Array:
        slow = clock ** value[-1]
        scale = np.ones_like(terms)
        scale[: len(active)] = (work.memory_seconds + work.compute_seconds * slow) / modelled
        scale[len(active) :] = slow
        scale[len(active) + len(flops)] = 1.0  # device memory keeps its clock
        base = calibration.base_watts + calibration.kernel_watts + rows.board_idle_watts
        return np.asarray(base + value[:-1] @ (terms * scale))

    return watts, names, np.array(start)


def _with_energy(calibration: Calibration, fitted: Mapping[str, float]) -> Calibration:
    """Calibration with the energy parameters of `fit_watts` in their places."""
    joules_per_flop = dict(calibration.joules_per_flop)
    kernels = dict(calibration.kernels)
    measured = {
        which[1]: value
        for name, value in fitted.items()
        for kind, *which in [name.split()]
        if kind == "flop" and which[0] == "gemm"
    }
    if "bf16" in measured:  # dtypes that were not measured keep their ratio to bf16
        ratio = measured["bf16"] / joules_per_flop["bf16"]
        joules_per_flop = {d: joules * ratio for d, joules in joules_per_flop.items()}
    joules_per_flop.update(measured)
    for name, value in fitted.items():
        kind, *which = name.split()
        if kind == "active":
            kernels[which[0]] = replace(kernels[which[0]], active_watts=value)
        elif kind == "flop" and which[1] == "bf16":
            factor = value / joules_per_flop["bf16"]
            kernels[which[0]] = replace(kernels[which[0]], flop_energy_factor=factor)
    return replace(
        calibration,
        joules_per_flop=joules_per_flop,
        joules_per_hbm_byte=fitted.get("hbm", calibration.joules_per_hbm_byte),
        joules_per_onchip_byte=fitted.get("onchip", calibration.joules_per_onchip_byte),
        clock_energy_exponent=fitted.get("exponent", calibration.clock_energy_exponent),
        kernels=kernels,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Relative errors |predicted / measured - 1| and their signed median [-]."""

    n: int
    median: float
    p90: float
    max: float
    bias: float


def summarize(predicted: Array, measured: Array) -> ErrorSummary:
    """Error statistics of predictions against measurements."""
    error = predicted / measured - 1.0
    size = np.abs(error)
    return ErrorSummary(
        n=len(error),
        median=float(np.median(size)),
        p90=float(np.percentile(size, 90)),
        max=float(size.max()),
        bias=float(np.median(error)),
    )
