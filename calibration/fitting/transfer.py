"""Calibrations of GPUs that were not measured, from one that was.

    python -m calibration.fitting.transfer l4 b200 --measured h100 --out profiles/calibrations

A GPU with kernels fitted to public tables (`data/public`) keeps them; with the same chip, each is
changed by the factor by which measurement changed the measured GPU's public fit. Any other GPU
takes the measured one's shares of its own datasheet. Stacks (times of the host) are the measured
ones.

Energies: with the same chip, as measured. Otherwise

    J/FLOP, J/on-chip byte, W of busy SMs  x factor of the architecture (and of the SM count)
    J/HBM byte                             + what the kind of memory adds
    J/HBM byte, J/on-chip byte             x factor of the memory, where power was published
    base and idle watts                    x ratio of the power limits

with the factors and their sources in `data/transfer.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from calibration.fitting.parameters import PARAMETERS, value_at, with_values
from calibration.validation.rows import DATA
from energymodel.calibrations import (
    Calibration,
    IntervalCalibration,
    KernelCalibration,
    load_calibration,
    save_calibration,
)
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.specs import GpuSpec

RULES_FILE = DATA / "transfer.json"
_LEVEL = 0.9
_SAME_CHIP = {("h100", "h200")}
_GA102 = ("a6000",)
"""GPUs of the Ampere generation that do not have the A100's chip."""
_ENERGIES = ("active_watts", "block_joules_per_byte", "flop_energy_factor")  # of a class


def transfer(name: str, measured: Calibration) -> Calibration:
    """Calibration of GPU `name` from a measured one.

    Raises
    ------
    EnergyModelError
        If the GPU is unknown, or no rule covers its architecture or memory.
    """
    rules = json.loads(RULES_FILE.read_text(encoding="utf-8"))
    here, there = load_gpu(name), load_gpu(measured.gpu)
    same_chip = (measured.gpu, name) in _SAME_CHIP
    public = DATA / "public" / f"{name}.json"
    if public.exists():
        start = _with_measured_factors(load_calibration(str(public)), measured, same_chip)
        origin = "public-data"
    else:
        start = _shares_of_datasheet(measured, here, there)
        origin = "datasheet"
    start = replace(start, gpu=name, stacks=measured.stacks, power_cap_watts=here.tdp_watts)
    if same_chip:  # the L2 is as fast, whatever memory lies behind it
        slower = there.hbm_bytes_per_s / here.hbm_bytes_per_s
        start = replace(start, onchip_speedup=measured.onchip_speedup * slower)
        result, kind = _energies_of(start, measured), "same_chip"
    else:
        result, kind = _scaled_energies(start, measured, here, there, rules), "datasheet"
    rule = rules["interval"][kind]
    size = float(rule["size"])
    interval = IntervalCalibration(
        level=_LEVEL, low=1.0 / (1.0 + size), high=1.0 + size, basis=rule["basis"]
    )
    provenance: dict[str, Any] = {
        "command": f"python -m calibration.fitting.transfer {name} --measured {measured.gpu}",
        "from": f"calibration of the {there.title}, origin {measured.origin}",
        "kernels": (
            f"calibration/data/public/{name}.json, {start.provenance.get('source')}"
            if public.exists()
            else "shares of the datasheet as on the measured GPU"
        ),
        "energies": "as measured on the same chip"
        if same_chip
        else "calibration/data/transfer.json",
    }
    return replace(
        result,
        origin=origin,  # type: ignore[arg-type]
        intervals=dict.fromkeys(measured.intervals, interval),
        provenance=provenance,
    )


def start_from(name_or_path: str, gpu: str) -> Calibration:
    """Calibration to start a fit of `gpu` from; that of another GPU is transferred by the rules.

    Where no rule covers the GPU, the other one's numbers are the start as they are.
    """
    found = load_calibration(name_or_path)
    if found.gpu == gpu or found.origin != "measured":
        return found
    try:
        moved = transfer(gpu, found)
    except EnergyModelError:
        return found
    # named after the GPU that was measured, with its intervals and the hosts behind its host times
    return replace(
        moved,
        gpu=found.gpu,
        origin=found.origin,
        intervals=found.intervals,
        provenance={**moved.provenance, "hosts": found.provenance.get("hosts")},
    )


def _with_measured_factors(
    public: Calibration, measured: Calibration, same_chip: bool
) -> Calibration:
    """Kernel times of the public fit, changed as measurement changed the measured GPU's.

    On another chip, operator classes that the public tables hold keep their own times: how far one
    GPU's tables are from what it sustains says nothing of another's (the A100's reach 96 % of the
    datasheet's peak, the H100's correction would take them above it). Classes that no public table
    holds are those of the measured GPU.
    """
    before = load_calibration(str(DATA / "public" / f"{measured.gpu}.json"))
    told = set() if same_chip else set(public.provenance["rows"])
    told |= measured.kernels.keys() - before.kernels.keys()
    values = {}
    for parameter in PARAMETERS:
        path = parameter.paths[0]
        is_time = path.startswith("kernels.") and not path.endswith(_ENERGIES)
        if is_time and path.split(".")[1] not in told:
            new, old = value_at(measured, path), value_at(before, path)
            values[path] = value_at(public, path) * new / old if old > 0 else new
    changed = with_values(public, values)
    return replace(
        changed,
        kernels={**measured.kernels, **changed.kernels},
        kernel_gap_seconds=measured.kernel_gap_seconds,
    )


def _shares_of_datasheet(measured: Calibration, here: GpuSpec, there: GpuSpec) -> Calibration:
    """Kernel times as shares of the datasheet, at each board's own clock."""
    above_datasheet = _clock_above_datasheet(there)
    slower = there.boost_clock_hz / here.boost_clock_hz

    def moved(kernel: KernelCalibration) -> KernelCalibration:
        return replace(
            kernel,
            compute_efficiency=kernel.compute_efficiency / above_datasheet,
            tile_seconds=kernel.tile_seconds * slower,
        )

    return replace(measured, kernels={c: moved(k) for c, k in measured.kernels.items()})


def _clock_above_datasheet(gpu: GpuSpec) -> float:
    """Highest clock over the clock at which the datasheet states the dense 16-bit peak [-]."""
    products = {"hopper": 4096.0}  # dense 16-bit FLOPs a clock and SM (H100 whitepaper, table 2)
    per_clock = products[gpu.architecture] * gpu.sm_count
    return gpu.boost_clock_hz * per_clock / gpu.peak_flops_per_s["bf16"]


def _energies_of(start: Calibration, measured: Calibration) -> Calibration:
    """`start` with all energies and idle powers of the measured GPU."""
    kernels = {
        c: replace(
            k,
            active_watts=measured.kernels[c].active_watts,
            block_joules_per_byte=measured.kernels[c].block_joules_per_byte,
            flop_energy_factor=measured.kernels[c].flop_energy_factor,
        )
        for c, k in start.kernels.items()
    }
    return replace(
        start,
        kernels=kernels,
        cold_idle_watts=measured.cold_idle_watts,
        context_idle_watts=measured.context_idle_watts,
        polling_idle_watts=measured.polling_idle_watts,
        base_watts=measured.base_watts,
        kernel_watts=measured.kernel_watts,
        joules_per_flop=measured.joules_per_flop,
        joules_per_hbm_byte=measured.joules_per_hbm_byte,
        joules_per_onchip_byte=measured.joules_per_onchip_byte,
        joules_per_link_byte=measured.joules_per_link_byte,
        clock_energy_exponent=measured.clock_energy_exponent,
    )


def _scaled_energies(
    start: Calibration,
    measured: Calibration,
    here: GpuSpec,
    there: GpuSpec,
    rules: Mapping[str, Any],
) -> Calibration:
    """Energies of the measured GPU, scaled to another chip, memory and board.

    What busy SMs draw follows their number, but no more than what the board may draw, where no
    published power says otherwise (the A100's does).
    """
    chip = "ampere-ga102" if here.name in _GA102 else here.architecture
    try:
        core = float(rules["core_energy"][chip]["factor"])
        memory = next(m for m in rules["memory_energy"]["kinds"] if here.name in m["gpus"])
    except (KeyError, StopIteration) as error:
        raise EnergyModelError(
            f"{RULES_FILE}: no rule for {here.title} (chip {chip}, its memory); add one"
        ) from error
    own = _energies_of(start, measured)
    joules_per_flop = {dtype: joules * core for dtype, joules in own.joules_per_flop.items()}
    if "mxfp4" in here.peak_flops_per_s:
        joules_per_flop["mxfp4"] = joules_per_flop["fp8"] * float(rules["mxfp4_over_fp8"]["value"])
    board = here.tdp_watts / there.tdp_watts
    units = core * here.sm_count / there.sm_count
    busy = units if "factor" in memory else min(units, core * board)  # an L4's SMs share 72 W
    kernels = {
        c: replace(
            k,
            active_watts=k.active_watts * busy,
            block_joules_per_byte=k.block_joules_per_byte * core,
        )
        for c, k in own.kernels.items()
    }
    idle = own.cold_idle_watts * board if here.idle_watts is None else here.idle_watts
    hbm = own.joules_per_hbm_byte + float(memory["added_joules_per_byte"])
    onchip, bytes_factor = own.joules_per_onchip_byte * core, float(memory.get("factor", 1.0))
    return replace(
        own,
        kernels=kernels,
        cold_idle_watts=idle,
        context_idle_watts=max(own.context_idle_watts * board, idle),
        polling_idle_watts=max(own.polling_idle_watts * board, idle),
        base_watts=own.base_watts * board,
        kernel_watts=own.kernel_watts * busy,
        joules_per_flop=joules_per_flop,
        joules_per_hbm_byte=hbm * bytes_factor,
        joules_per_onchip_byte=onchip * bytes_factor,
    )


def _command(
    gpus: Annotated[list[str], typer.Argument(help="GPUs, as in profiles/gpus.")],
    measured: Annotated[str, typer.Option(help="Measured GPU, or its calibration file.")] = "h100",
    out: Annotated[
        Path, typer.Option(help="Folder of the calibration files.", exists=True, file_okay=False)
    ] = Path("profiles/calibrations"),
) -> None:
    """Write calibrations of GPUs that were not measured."""
    try:
        for gpu in gpus:
            save_calibration(transfer(gpu, load_calibration(measured)), out / f"{gpu}.json")
    except EnergyModelError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(_command)
