"""What `energymodel doctor` finds: packages, GPUs and calibrations here, what is missing, the way.

Nothing here asks the hardware: the command passes in what NVML saw
(`calibration/metering/boards.py`).
"""

from __future__ import annotations

import io
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from energymodel import __version__
from energymodel.calibrations import list_calibrations, load_calibration
from energymodel.compiled import cache_folder
from energymodel.datafiles import data_path
from energymodel.errors import ProfileError
from energymodel.gpus import list_gpus, load_gpu
from energymodel.units import GIB

_PURPOSES = {
    "calibrate": "measure a GPU",
    "vllm": "measure serving with vLLM",
    "fit": "fit a calibration",
    "report": "figures",
    "dask": "sweeps on a cluster",
}
"""Extras a user may want, and what for; those for development are left out."""

_MEASURE = "measure it (`energymodel calibrate`, then `energymodel fit`)"
_REQUIREMENT = re.compile(r"([\w.-]+)[^;]*(?:;.*extra\s*==\s*[\"']([\w-]+)[\"'])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A GPU that NVML sees; None where it does not say."""

    index: int
    name: str
    memory_bytes: int | None
    power_limit_watts: float | None
    energy_counter: bool
    """Whether it counts its energy; otherwise its power is sampled."""
    split: bool
    """Whether MIG splits it: it cannot be metered then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boards:
    """All GPUs of this machine."""

    driver: str | None
    boards: tuple[Board, ...]
    problem: str | None
    """Why there are none, and what to do; None if NVML answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A library that energymodel uses."""

    name: str
    extra: str | None
    """The extra it comes with; None if it is always needed."""
    version: str | None
    """None if it is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCalibration:
    """A calibration that ships, and what it rests on."""

    gpu: str
    origin: str
    interval_low: float
    """Lower end of the interval of `vllm` predictions, as a share of them."""
    interval_high: float
    interval_basis: str
    host_ratio: float | None
    """Time of a Python loop here over that on the hosts behind its host times, about what
    `--host-ratio` takes [-]; None where either is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that `doctor` prints."""

    energymodel_version: str
    python_version: str
    data_folder: str
    compiled_folder: str | None
    """Where the compiled simulator is kept; None if there is no room for it."""
    driver: str | None
    boards: tuple[Board, ...]
    known_as: tuple[str | None, ...]
    """The name that `--gpu` takes for each board; None if it is not known."""
    calibrations: tuple[KnownCalibration, ...]
    without_calibration: tuple[str, ...]
    """GPUs known by their datasheet only."""
    packages: tuple[Package, ...]
    findings: tuple[str, ...]
    """What is missing, and how to get it, one line each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as in the JSON output."""
        return asdict(self)


def diagnose(found: Boards, python_step_seconds: float | None = None) -> Diagnosis:
    """Look at the installation.

    `found` is what NVML says of the machine, `python_step_seconds` the time of a step of the loop
    by which hosts are compared (`calibration/metering/host_speed.py`).
    """
    packages = _packages()
    known_as = tuple(_known_as(board.name) for board in found.boards)
    calibrations = tuple(
        _known_calibration(name, python_step_seconds) for name in list_calibrations()
    )
    calibrated = {c.gpu for c in calibrations}
    compiled_folder = cache_folder()
    findings = _package_findings(packages)
    if compiled_folder is None:
        findings.append(
            "the simulator is compiled again by every command, which takes seconds: make room on "
            "the disk, or name a folder that has some in NUMBA_CACHE_DIR"
        )
    if found.problem is not None:
        findings.append(f"GPU: {found.problem}; predictions need none, measuring does")
    for board, name in zip(found.boards, known_as, strict=True):
        findings += _board_findings(board, name, calibrated)
    return Diagnosis(
        energymodel_version=__version__,
        python_version=platform.python_version(),
        data_folder=str(data_path()),
        compiled_folder=compiled_folder,
        driver=found.driver,
        boards=found.boards,
        known_as=known_as,
        calibrations=calibrations,
        without_calibration=tuple(name for name in list_gpus() if name not in calibrated),
        packages=packages,
        findings=tuple(findings),
    )


def render_diagnosis(d: Diagnosis, *, color: bool = False) -> str:
    """Tables for people."""
    from rich.console import Console  # noqa: PLC0415 (slow to import)
    from rich.table import Table  # noqa: PLC0415

    def table(title: str, *headings: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in headings:
            made.add_column(heading, overflow="fold")
        return made

    gpus = table(
        f"GPUs here (driver {d.driver or 'none'})", "", "board", "memory", "limit", "--gpu"
    )
    for board, name in zip(d.boards, d.known_as, strict=True):
        memory = "-" if board.memory_bytes is None else f"{board.memory_bytes / GIB:.0f} GiB"
        limit = "-" if board.power_limit_watts is None else f"{board.power_limit_watts:.0f} W"
        gpus.add_row(str(board.index), board.name, memory, limit, name or "unknown")
    known = table(
        "Calibrations", "--gpu", "rests on", "interval (vllm)", "--host-ratio here", "from"
    )
    for c in d.calibrations:
        interval = f"{c.interval_low - 1.0:+.0%} to {c.interval_high - 1.0:+.0%}"
        host = "-" if c.host_ratio is None else f"{c.host_ratio:.2f}"
        known.add_row(c.gpu, c.origin, interval, host, c.interval_basis)
    packages = table("Packages", "for", "installed", "missing")
    for extra in (None, *_PURPOSES):
        group = [p for p in d.packages if p.extra == extra]
        packages.add_row(
            "predicting" if extra is None else _PURPOSES[extra],
            ", ".join(f"{p.name} {p.version}" for p in group if p.version) or "-",
            ", ".join(p.name for p in group if not p.version) or "-",
        )
    console = Console(
        file=io.StringIO(), force_terminal=color, width=100, highlight=False, force_jupyter=False
    )
    console.print(f"energymodel {d.energymodel_version}, Python {d.python_version}", markup=False)
    console.print(f"data files: {d.data_folder}", markup=False, soft_wrap=True)
    kept = d.compiled_folder or "nowhere"
    console.print(f"compiled simulator: {kept}", markup=False, soft_wrap=True)
    for part in (gpus, known, packages) if d.boards else ("GPUs here: none", known, packages):
        console.print()
        console.print(part)
    console.print(f"\nGPUs without a calibration: {', '.join(d.without_calibration) or 'none'}")
    console.print("\nFindings" if d.findings else "\nNothing is missing.")
    for finding in d.findings:
        console.print(f"- {finding}", markup=False, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _packages() -> tuple[Package, ...]:
    """What the distribution's metadata ask for, users' extras included, and what is installed."""
    try:
        wanted = requires("energymodel") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return ()
    packages = []
    for requirement in wanted:
        match = _REQUIREMENT.match(requirement)
        name, extra = match.groups() if match else (requirement, None)
        if extra is None or extra in _PURPOSES:
            packages.append(Package(name=name, extra=extra, version=_installed(name)))
    return tuple(packages)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _package_findings(packages: tuple[Package, ...]) -> list[str]:
    if not packages:
        return ["energymodel is not installed, only on the path: pip install -e ."]
    findings = []
    for extra in (None, *_PURPOSES):
        missing = [p.name for p in packages if p.extra == extra and p.version is None]
        if missing and extra is None:
            findings.append(f"needed: {', '.join(missing)}; pip install energymodel")
        elif missing:
            findings.append(
                f"to {_verb(extra)}: {', '.join(missing)}; pip install 'energymodel[{extra}]'"
            )
    return findings


def _verb(extra: str | None) -> str:
    purpose = _PURPOSES[extra or ""]
    return {"report": "draw figures", "dask": "run sweeps on a cluster"}.get(extra or "", purpose)


def _board_findings(board: Board, name: str | None, calibrated: set[str]) -> list[str]:
    where = f"GPU {board.index} ({board.name})"
    findings = []
    if name is None:
        findings.append(
            f"{where} is not known: describe it in a JSON file and pass that as --gpu "
            "(`energymodel schema gpu`)"
        )
    elif name not in calibrated:
        findings.append(f"{where} has no calibration: {_MEASURE}, or pass one with --calibration")
    elif load_calibration(name).origin != "measured":
        findings.append(
            f"{where}: the calibration of {name} rests on {load_calibration(name).origin}; for a "
            f"narrower interval {_MEASURE}"
        )
    if board.split:
        findings.append(f"{where} is split by MIG: it cannot be metered; use a whole GPU")
    elif not board.energy_counter:
        findings.append(f"{where} has no energy counter: measuring samples its power instead")
    return findings


def _known_as(name: str) -> str | None:
    try:
        return load_gpu(name).name
    except ProfileError:
        return None


def _known_calibration(name: str, python_step_seconds: float | None) -> KnownCalibration:
    calibration = load_calibration(name)
    interval = calibration.intervals["vllm"]
    behind = (calibration.provenance.get("hosts") or {}).get("loop_step_seconds")
    ratio = None
    if python_step_seconds is not None and behind is not None:
        ratio = python_step_seconds / behind
    return KnownCalibration(
        gpu=name,
        origin=calibration.origin,
        interval_low=interval.low,
        interval_high=interval.high,
        interval_basis=interval.basis,
        host_ratio=ratio,
    )
