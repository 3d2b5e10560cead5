"""What a person measured: which files hold what, of which GPU, on which machine, at which watts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from calibration.fitting.measured_runs import read_idle
from calibration.metering.windows import read_jsonl
from energymodel.errors import ConfigurationError, EnergyModelError, ProfileError
from energymodel.gpus import load_gpu
from energymodel.specs import GpuSpec

_SERVING_KINDS = {
    "engine",
    "run",
    "steady",
    "idle",
    "experts",
    "kernels",
    "done",
    "skipped",
    "error",
    "exit",
}
_TINY, _LEAST_KERNEL = "tiny", "base.tiny.e32"
"""State of kernels that do next to nothing, one after another, and the case that measures it."""
_KERNEL_KINDS = {"header", "case", "software"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What the given files hold, all of one GPU model."""

    board: str
    """Name as the driver gives it."""
    gpu: GpuSpec
    kernel_files: tuple[Path, ...]
    serving_files: tuple[Path, ...]
    records: tuple[Mapping[str, Any], ...]
    """Of the kernel files, in order."""

    @property
    def windows(self) -> list[dict[str, Any]]:
        """Valid kernel windows and idle states."""
        return [dict(r) for r in self.records if r.get("kind") == "case" and r.get("valid")]


def read_measurements(paths: Sequence[Path], gpu: str | None = None) -> Measurements:
    """Sort files into kernel windows and serving records, and find out which GPU they are of.

    Parameters
    ----------
    paths : files (`.jsonl`, `.jsonl.gz`), or folders with such files anywhere inside
    gpu : name of the GPU, needed where the driver's name for the board is not known

    Raises
    ------
    EnergyModelError
        If a file is neither, the files are of several GPU models or power limits, the GPU is
        unknown, or there is no valid kernel window.
    """
    kernel_files, serving_files = [], []
    records: list[dict[str, Any]] = []
    boards: dict[str, Path] = {}
    for path in _files(paths):
        found = read_jsonl(path)
        kinds = {r.get("kind") for r in found}
        if kinds and kinds <= _KERNEL_KINDS:
            kernel_files.append(path)
            records += found
        elif kinds and kinds <= _SERVING_KINDS:
            serving_files.append(path)
        else:
            raise ConfigurationError(
                f"{path}: holds neither kernel windows (of `energymodel calibrate`) nor serving "
                "records (of `energymodel measure`); leave it out"
            )
        board = path.name
        for record in found:
            if "identity" in record:
                first = record["identity"]["gpus"][0]
                boards[str(first["name"])] = path
                board = str(first.get("uuid_sha256") or path.name)
            elif record.get("kind") == "case":
                record["board"] = board  # windows of a file follow the header of their board
    known = _known(boards, gpu)
    if not any(r.get("kind") == "case" and r.get("valid") for r in records):
        raise EnergyModelError(
            f"no valid kernel window in {', '.join(map(str, paths))}; measure some with "
            "`energymodel calibrate`"
        )
    return Measurements(
        board=next(iter(boards)),
        gpu=known,
        kernel_files=tuple(kernel_files),
        serving_files=tuple(serving_files),
        records=tuple(records),
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
            if not inside:
                raise ConfigurationError(f"{path}: no .jsonl or .jsonl.gz file in this folder")
            files += inside
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _known(boards: Mapping[str, Path], gpu: str | None) -> GpuSpec:
    """GPU that all boards are; `gpu` names it where the driver's name is not known."""
    if not boards:
        raise EnergyModelError("no file says which GPU was measured (no header); measure again")
    asked = None if gpu is None else load_gpu(gpu)
    found: dict[str, Path] = {}
    for board, path in boards.items():
        try:
            spec = load_gpu(board)
        except ProfileError as error:
            if asked is None:
                raise ProfileError(
                    f"{path}: the driver calls this GPU '{board}', which is not known by that "
                    "name; say which it is with --gpu (`energymodel known` lists all)"
                ) from error
            spec = asked
        found[spec.name] = path
        if asked is not None and spec.name != asked.name:
            raise ConfigurationError(
                f"--gpu {gpu}: {path} was measured on a {spec.title}; leave --gpu out"
            )
    if len(found) > 1:
        each = ", ".join(f"{name} ({path})" for name, path in found.items())
        raise ConfigurationError(f"the files are of several GPUs: {each}; fit them apart")
    return load_gpu(next(iter(found))) if asked is None else asked


def measured_watts(measured: Measurements) -> dict[str, float]:
    """Idle states, base power and power limit [W], under the names of the calibration.

    The base is what a GPU draws that waits with its context open; where nobody measured that, what
    kernels that do nothing drew, which is more. No fit moves either: windows, whose kernels draw
    more than they are modelled to, would have every run that waits pay for that.
    """
    states = idle_watts(measured)[0]
    tiny = states.pop(_TINY, None)
    values = {f"{state}_idle_watts": watts for state, watts in states.items()}
    if "context" in states:
        values["base_watts"] = states["context"]
        if tiny is not None:
            values["kernel_watts"] = max(0.0, tiny - states["context"])
    elif tiny is not None:
        values |= {"base_watts": tiny, "kernel_watts": 0.0}  # the base holds them
    limits = {
        float(watts)
        for r in measured.records
        if r.get("kind") == "header"
        and (watts := r["identity"]["gpus"][0].get("power_limit_watts")) is not None
    }
    if len(limits) > 1:
        raise ConfigurationError(
            "the windows were measured under several power limits "
            f"({', '.join(f'{w:.0f} W' for w in sorted(limits))}); fit them apart"
        )
    if limits:
        values["power_cap_watts"] = limits.pop()
    return values


def idle_watts(measured: Measurements) -> tuple[dict[str, float], dict[str, float]]:
    """Power of the idle states on the mean board, and by board how much more it idles at [W].

    Boards of one kind idle up to 15 W apart, and not every state was measured on each. The states
    with the clocks up, tiny kernels back to back among them (`tiny`), are taken as board + state,
    which least squares find; boards count alike.
    """
    cells: dict[tuple[str, str], list[float]] = {}
    idle = [
        (str(r.get("board", "")), r["case"].removeprefix("idle."), r["power_watts"])
        for r in measured.windows
        if r["op_class"] == "idle"
    ]
    idle += [
        (str(r.get("board", "")), _TINY, r["power_watts"])
        for r in measured.windows
        if r["case"] == _LEAST_KERNEL
    ]
    for board, state, watts in [*idle, *read_idle(measured.serving_files, measured.gpu.name)]:
        cells.setdefault((board, state), []).append(watts)
    median = {cell: float(np.median(watts)) for cell, watts in cells.items()}
    cold = [watts for (_, state), watts in median.items() if state == "cold"]
    states = {"cold": float(np.mean(cold))} if cold else {}
    up = {cell: watts for cell, watts in median.items() if cell[1] in ("context", "polling", _TINY)}
    if not up:
        return states, {}
    boards, kinds = sorted({b for b, _ in up}), sorted({s for _, s in up})
    terms = np.array(
        [
            *([float(x == b) for x in boards] + [float(x == s) for x in kinds] for b, s in up),
            [1.0] * len(boards) + [0.0] * len(kinds),  # the boards' mean is 0
        ]
    )
    found = np.linalg.lstsq(terms, np.array([*up.values(), 0.0]), rcond=None)[0].tolist()
    states |= dict(zip(kinds, found[len(boards) :], strict=True))
    return states, dict(zip(boards, found, strict=False))


def machine_of(measured: Measurements) -> dict[str, Any]:
    """Boards (hashed), driver, software and days of measurement, from the files alone."""
    headers = [r for r in measured.records if r.get("kind") == "header"]
    engines = [
        r for path in measured.serving_files for r in read_jsonl(path) if r.get("kind") == "engine"
    ]
    software: dict[str, set[str]] = {}
    for record in measured.records:
        for name, version in record.get("software", {}).items():
            software.setdefault(name, set()).add(str(version)[:60])
    for engine in engines:
        for name in ("torch", "cuda", "vllm", "transformers"):
            if version := engine["settings"].get(f"{name}_version"):
                software.setdefault(name, set()).add(str(version))
    times = [r["started_unix_seconds"] for r in headers] + [r["unix_seconds"] for r in engines]
    days = sorted({datetime.fromtimestamp(t, UTC).date().isoformat() for t in times})
    identities = [r["identity"] for r in (*headers, *engines)]
    return {
        "boards_sha256": sorted({str(i["gpus"][0].get("uuid_sha256")) for i in identities}),
        "driver": sorted({str(i.get("driver_version")) for i in identities}),
        "software": {name: sorted(versions) for name, versions in sorted(software.items())},
        "measured_on": days,
    }
