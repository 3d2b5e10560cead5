"""Held-out errors of kernel windows: each predicted by a fit without its shape family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibration.fitting.fit_kernels import ErrorSummary, KernelRows, summarize
from calibration.fitting.kernel_windows import kernel_rows, link_rows
from calibration.fitting.machine_fit import fit_link, held_out_windows
from calibration.fitting.measurements import Measurements, idle_watts, measured_watts
from calibration.fitting.transfer import start_from
from calibration.validation.rows import DATA
from energymodel.calibrations import Calibration, load_calibration

Array = NDArray[np.float64]

MEDIAN_BAR, P90_BAR = 0.04, 0.10
CLASSES: Mapping[str, tuple[str, ...]] = {
    "GEMM": ("gemm", "gemm_int8"),
    "attention": ("attention_prefill", "attention_decode"),
    "- prefill": ("attention_prefill",),
    "- decode": ("attention_decode",),
    "MoE": ("moe",),
    "quantised": ("gemm_scaled", "gemm_packed", "moe_packed"),
    "memory-bound": ("elementwise",),
    "sampling": ("sampling",),
}
"""Operator classes by the name they have here; those with a dash are parts of the one above."""
MODELLED = frozenset(c for members in CLASSES.values() for c in members)
CLOCK = "at the clock that the power limit leaves, as `predict` does"
"""Where `held_out_windows` predicts seconds and watts."""
WITHOUT_BAR = ("- prefill", "- decode", "quantised", "sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Windows of a GPU and what was predicted of them; arrays (n,)."""

    rows: KernelRows
    seconds: Array
    watts: Array

    def pick(self, mask: NDArray[np.bool_]) -> HeldOut:
        """Windows where `mask` is true."""
        return HeldOut(
            rows=self.rows.pick(mask), seconds=self.seconds[mask], watts=self.watts[mask]
        )

    def errors(self) -> dict[str, Array]:
        """Predicted / measured - 1 of seconds, watts and joules; each (n,)."""
        seconds, watts = self.seconds / self.rows.seconds, self.watts / self.rows.watts
        return {"seconds": seconds - 1.0, "watts": watts - 1.0, "joules": seconds * watts - 1.0}

    def summaries(self) -> dict[str, ErrorSummary]:
        """Statistics of the errors."""
        errors = self.errors()
        return {name: summarize(e + 1.0, np.ones_like(e)) for name, e in errors.items()}


def start_of(gpu: str) -> Calibration:
    """Calibration that the shipped fit starts from; has seen no window of this GPU."""
    own = DATA / "start" / f"{gpu}.json"
    return load_calibration(str(own)) if own.is_file() else start_from("h100", gpu)


def held_out(measured: Measurements, start: Calibration) -> HeldOut:
    """Each kernel window by a fit, from `start`, to windows of other shape families."""
    rows, start = _prepared(measured, start)
    seconds, watts = held_out_windows(rows, measured.gpu, start)
    return HeldOut(rows=rows, seconds=seconds, watts=watts)


def held_out_by_rows(measured: Measurements, start: Calibration) -> HeldOut:
    """Memory-bound windows, each by a fit without any memory-bound window of as many rows.

    A family of this class is a kernel. Their times for few rows are their own, so that a kernel of
    which nothing was measured says less about the model than a size of a kernel that was.
    """
    rows, start = _prepared(measured, start)
    mine = np.isin(rows.op_class, CLASSES["memory-bound"])
    counts = np.array([_row_count(n) if m else -1 for n, m in zip(rows.name, mine, strict=True)])
    sizes = np.unique(counts[mine])
    fold = np.where(mine, np.searchsorted(sizes, counts), -1)
    seconds, watts = held_out_windows(rows, measured.gpu, start, fold)
    held = HeldOut(rows=rows, seconds=seconds, watts=watts).pick(mine)
    return replace(held, rows=replace(held.rows, family=tuple(f"{c} rows" for c in counts[mine])))


def _row_count(case: str) -> int:
    """Rows of a memory-bound case, `elementwise.rms_norm.t64.r2`."""
    return int(case.split(".")[2].removeprefix("t"))


def _prepared(measured: Measurements, start: Calibration) -> tuple[KernelRows, Calibration]:
    """Windows that the model knows, and the start with what is measured apart."""
    gpu = measured.gpu
    start = replace(start, gpu=gpu.name, **measured_watts(measured))
    board_idle = idle_watts(measured)[1]
    start = fit_link(link_rows(measured.windows, gpu, board_idle), gpu, start)
    rows = kernel_rows(measured.windows, gpu, board_idle)
    return rows.pick([d in gpu.peak_flops_per_s for d in rows.dtype]), start


def of_class(found: HeldOut, name: str) -> HeldOut:
    """Windows of a class of `CLASSES`."""
    return found.pick(np.isin(found.rows.op_class, CLASSES[name]))


def meets_bar(errors: Sequence[ErrorSummary]) -> bool:
    """Whether medians and 90th percentiles are within the bars."""
    return all(e.median <= MEDIAN_BAR and e.p90 <= P90_BAR for e in errors)


def by_family(found: HeldOut) -> dict[str, HeldOut]:
    """Windows by shape family, the one with the largest median error of joules first."""
    families = {f: found.pick(np.array(found.rows.family) == f) for f in set(found.rows.family)}
    size = {f: float(np.median(np.abs(h.errors()["joules"]))) for f, h in families.items()}
    return {f: families[f] for f in sorted(families, key=lambda f: (-size[f], f))}
