"""Fits the kernel part of a GPU's calibration to public tables and writes it.

    python -m calibration.fitting.public_fit h100 --tables FOLDER \
        --out calibration/data/public/h100.json

Seconds are fitted class by class; the error written into the provenance is of rows predicted by
a fit without any row of their shape family (`fit.held_out_seconds`). Stacks, intervals, idle and
limit watts stay as the file has them.

The H200 has the H100's chip, and its tables ran under the power limit at a clock nobody recorded.
What depends on the chip alone is therefore taken from the H100's file (fit that one first), and
the limit decides the clock of the rows, seconds and watts in turns. Power readings can only be
too low (see `public_tables`): rows far below the fit are dropped and the fit repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from calibration.fitting.fit_kernels import (
    ENERGY_CLASSES,
    TIME_PARAMETERS,
    ErrorSummary,
    KernelRows,
    fit_kernel_seconds,
    fit_watts,
    held_out_seconds,
    predicted_seconds,
    predicted_watts,
    summarize,
)
from calibration.fitting.public_tables import (
    COMMIT,
    REPOSITORY,
    read_eight_bit_gemm,
    read_rows,
    used_files,
)
from calibration.validation.rows import DATA
from energymodel.calibrations import Calibration, load_calibration, save_calibration
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.specs import GpuSpec

SAME_CHIP: Mapping[str, str] = {"h200": "h100", "h100": "h200"}
"""GPUs with the same chip. The H100's tables ran at the highest clock and hold no power; the
H200's ran under the limit, with power and with fused experts."""
_HIGHEST_CLOCK = "h100"
_CHIP_PARAMETERS = (
    "compute_efficiency",
    "tile_seconds",
    "wave_exponent",
    "eight_bit_efficiency",
)
_CHIP_CLASSES = ("gemm", "attention_prefill")
_ADDITIVE = ("attention_prefill",)
"""Classes whose compute and memory times add: their step statistics are tabulated one by one."""
_KEPT_WATTS = (
    *(f"active {c}" for c in ENERGY_CLASSES),
    "onchip",
    "exponent",
    "flop moe bf16",
    "flop attention_prefill bf16",
)
"""Energies the tables cannot tell apart: every row of theirs with power is bound by the memory's
bandwidth or by the power limit, and there the power of busy SMs, of bytes and of FLOPs add up,
and a class at the limit may be slow by its efficiency or by its FLOPs' energy."""
_RISEN = 0.9
"""Readings below this share of the fit were taken before the power had risen."""
_ROUNDS = 4


def fit_kernels(
    rows: KernelRows, gpu: GpuSpec, calibration: Calibration, chip: Calibration | None = None
) -> tuple[Calibration, dict[str, ErrorSummary]]:
    """Calibration with the fitted kernel part; held-out errors by class and of watts.

    `chip` is the calibration of a GPU with the same chip whose rows ran at the highest clock.
    """
    kernels = dict(calibration.kernels)
    for name in _ADDITIVE:
        kernels[name] = replace(kernels[name], sharpness=1.0)
    keep: dict[str, tuple[str, ...]] = {}
    if chip is not None:
        for name in _CHIP_CLASSES:
            known = {p: getattr(chip.kernels[name], p) for p in _CHIP_PARAMETERS}
            kernels[name] = replace(kernels[name], **known)
            keep[name] = _CHIP_PARAMETERS
    fitted = replace(calibration, kernels=kernels)
    classes = [c for c in TIME_PARAMETERS if c in rows.op_class]
    metered = rows.pick(np.isfinite(rows.watts))
    for _ in range(_ROUNDS if len(metered) else 1):
        new = {c: fit_kernel_seconds(rows, gpu, fitted, c, keep.get(c, ())) for c in classes}
        fitted = replace(fitted, kernels={**fitted.kernels, **new})
        if len(metered):
            fitted = fit_risen_watts(metered, gpu, fitted)
    errors = {
        c: summarize(
            held_out_seconds(rows, gpu, fitted, c, keep.get(c, ())), rows.of_class(c).seconds
        )
        for c in classes
    }
    if len(metered):
        errors |= _held_out_watts(metered, gpu, fitted)
    return fitted, errors


def fit_risen_watts(rows: KernelRows, gpu: GpuSpec, calibration: Calibration) -> Calibration:
    """Energies fitted to the rows whose power had risen, chosen anew after each fit."""
    for _ in range(_ROUNDS):
        share = rows.watts / predicted_watts(rows, gpu, calibration)
        calibration = fit_watts(rows.pick(share >= _RISEN), gpu, calibration, _KEPT_WATTS)
    return calibration


def _held_out_watts(
    rows: KernelRows, gpu: GpuSpec, calibration: Calibration
) -> dict[str, ErrorSummary]:
    """Errors of watts by class, of risen rows predicted by a fit without their family."""
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415

    families = np.array([f"{c} {f}" for c, f in zip(rows.op_class, rows.family, strict=True)])
    predicted = np.full(len(rows), np.nan)
    for _, test in GroupKFold(5).split(families, groups=families):
        held = np.isin(np.arange(len(rows)), test)
        fitted = fit_risen_watts(rows.pick(~held), gpu, calibration)
        predicted[held] = predicted_watts(rows.pick(held), gpu, fitted)
    risen = rows.watts >= _RISEN * predicted
    classes = np.array(rows.op_class)
    return {
        f"watts {c}": summarize(
            predicted[risen & (classes == c)], rows.watts[risen & (classes == c)]
        )
        for c in dict.fromkeys(rows.op_class)
    }


def fit_eight_bit(
    rows: KernelRows, gpu: GpuSpec, calibration: Calibration
) -> tuple[Calibration, ErrorSummary]:
    """Calibration with the efficiency of 8-bit products fitted; its held-out error.

    The rows hold the kernel that quantises the activations (16 bits read, 8 written); its time
    is taken off. In a served model the compiler fuses it with the kernel before.
    """
    inner = rows.executed_flops / (2.0 * rows.gemm_rows * rows.gemm_columns)
    none = np.zeros(len(rows))
    quantise = replace(
        rows,
        op_class=("elementwise",) * len(rows),
        flops=none,
        executed_flops=none,
        hbm_bytes=none,
        activation_bytes=3.0 * rows.gemm_rows * inner,
        tiles=none,
        gemm_rows=none,
        gemm_columns=none,
        gemm_k=none,
    )
    seconds = rows.seconds - predicted_seconds(quantise, gpu, calibration)
    rows = replace(rows, seconds=np.maximum(seconds, 0.1 * rows.seconds))
    error = summarize(held_out_seconds(rows, gpu, calibration, "gemm"), rows.seconds)
    gemm = fit_kernel_seconds(rows, gpu, calibration, "gemm")
    return replace(calibration, kernels={**calibration.kernels, "gemm": gemm}), error


def fit_public(name: str, tables: Path) -> Calibration:
    """Calibration of GPU `name` with its kernel part fitted to the tables in a folder.

    Raises
    ------
    EnergyModelError
        If there are no tables of the GPU, or of the one with the same chip, or one cannot be read.
    """
    gpu, before = load_gpu(name), _start(name)
    rows = read_rows(tables, gpu)
    twin = SAME_CHIP.get(name)
    chip = None
    if twin == _HIGHEST_CLOCK:
        chip = _fit_own(twin, tables)
    fitted, errors = fit_kernels(rows, gpu, before, chip)
    eight_bit = read_eight_bit_gemm(tables, gpu)
    if eight_bit is not None:
        fitted, errors["gemm 8-bit"] = fit_eight_bit(eight_bit, gpu, fitted)
    counts = {c: rows.op_class.count(c) for c in dict.fromkeys(rows.op_class)}
    provenance: dict[str, Any] = {
        "source": f"{REPOSITORY}@{COMMIT}, Apache-2.0",
        "files": used_files(tables, gpu),
        "command": f"python -m calibration.fitting.public_fit {name}",
        "rows": counts,
        "families": {c: len(set(rows.of_class(c).family)) for c in counts},
        "held_out": "each row predicted by a fit without any row of its shape family, 5 folds",
        "held_out_errors": {c: _rounded(e) for c, e in errors.items()},
        "not_fitted": [c for c in before.kernels if c not in counts],
        "watts": "not measured: as the file had them before",
    }
    if np.isfinite(rows.watts).any():
        provenance["watts"] = (
            "J/FLOP of GEMMs and J/HBM byte fitted; power of busy SMs, J/on-chip byte, the clock's "
            "exponent and FLOPs of other classes relative to a GEMM's (prefill attention 2/3: a "
            "third of what it executes at head width 128 stands for exponentials) are not told "
            "apart by these rows and stay as the file had them; errors are of the rows above "
            f"{_RISEN:.0%} of the prediction, the others had not risen"
        )
    if chip is not None:
        provenance["same_chip"] = f"{', '.join(_CHIP_CLASSES)}: compute parameters of the {twin}"
    elif twin is not None:
        fitted = _borrowed(fitted, fit_public(twin, tables), list(provenance["not_fitted"]))
        provenance["same_chip"] = f"moe and watts: fitted to the {twin}"
        provenance["not_fitted"] = [c for c in provenance["not_fitted"] if c != "moe"]
        provenance["watts"] = f"as the {twin}'s"
    return replace(fitted, origin="public-data", provenance=provenance)


def _start(name: str) -> Calibration:
    """Present fit to public tables; where there is none, the GPU's shipped calibration."""
    path = DATA / "public" / f"{name}.json"
    return load_calibration(str(path) if path.exists() else name)


def _fit_own(name: str, tables: Path) -> Calibration:
    gpu = load_gpu(name)
    fitted, _ = fit_kernels(read_rows(tables, gpu), gpu, _start(name))
    eight_bit = read_eight_bit_gemm(tables, gpu)
    return fitted if eight_bit is None else fit_eight_bit(eight_bit, gpu, fitted)[0]


def _borrowed(fitted: Calibration, twin: Calibration, missing: list[str]) -> Calibration:
    """`fitted` with the energies of its twin, and the twin's fused experts if it lacks them."""
    kernels = {
        c: replace(
            k,
            active_watts=twin.kernels[c].active_watts,
            flop_energy_factor=twin.kernels[c].flop_energy_factor,
        )
        for c, k in fitted.kernels.items()
    }
    if "moe" in missing:
        kernels["moe"] = twin.kernels["moe"]
    return replace(
        fitted,
        kernels=kernels,
        joules_per_flop=twin.joules_per_flop,
        joules_per_hbm_byte=twin.joules_per_hbm_byte,
        joules_per_onchip_byte=twin.joules_per_onchip_byte,
        clock_energy_exponent=twin.clock_energy_exponent,
    )


def _rounded(error: ErrorSummary) -> dict[str, float]:
    return {k: v if k == "n" else round(v, 4) for k, v in asdict(error).items()}


def _main(
    gpu: Annotated[str, typer.Argument(help="a100, h100 or h200")],
    tables: Annotated[Path, typer.Option(help="folder of the parquet files")],
    out: Annotated[Path | None, typer.Option(help="file to write; without it, only errors")] = None,
) -> None:
    """Fit the kernel part of a calibration to public tables."""
    if out is not None and not out.parent.is_dir():
        raise typer.BadParameter(f"{out.parent} is not a folder", param_hint="--out")
    try:
        fitted = fit_public(gpu, tables)
    except EnergyModelError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{'class':28}{'n':>7}{'median':>9}{'p90':>9}{'max':>9}{'bias':>9}")
    for name, e in fitted.provenance["held_out_errors"].items():
        shares = "".join(f"{100 * e[k]:8.1f}%" for k in ("median", "p90", "max", "bias"))
        typer.echo(f"{name:28}{e['n']:7d}{shares}")
    if out is not None:
        save_calibration(fitted, out)


if __name__ == "__main__":
    typer.run(_main)
