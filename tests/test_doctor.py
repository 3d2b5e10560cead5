"""`energymodel doctor`: what it finds, and that every finding says what to do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fake_nvml import (
    FakeNvml,
    NVMLError_DriverNotLoaded,
    NVMLError_LibraryNotFound,
    NVMLError_NotSupported,
)
from typer.testing import CliRunner

import energymodel.doctor
from calibration.metering.boards import find_boards
from energymodel.calibrations import list_calibrations, load_calibration
from energymodel.cli import app
from energymodel.doctor import Board, Boards, diagnose, render_diagnosis
from energymodel.gpus import list_gpus, load_gpu

GIB = 2**30


def board(name: str, **changes: object) -> Board:
    plain: dict = {
        "index": 0,
        "memory_bytes": 80 * GIB,
        "power_limit_watts": 700.0,
        "energy_counter": True,
        "split": False,
    }
    return Board(name=name, **(plain | changes))


def with_board(name: str, **changes: object) -> energymodel.doctor.Diagnosis:
    return diagnose(Boards(driver="580.0", boards=(board(name, **changes),), problem=None))


def about_gpu(diagnosis: energymodel.doctor.Diagnosis) -> list[str]:
    return [finding for finding in diagnosis.findings if finding.startswith("GPU")]


def test_the_command_ends_well_whatever_it_finds() -> None:
    outcome = CliRunner().invoke(app, ["doctor"])
    assert outcome.exit_code == 0, outcome.output
    for name in list_calibrations():
        assert f"{name} " in outcome.stdout
        assert load_calibration(name).origin in outcome.stdout
    assert "numpy" in outcome.stdout
    assert "--host-ratio" in outcome.stdout


def test_this_host_is_set_beside_those_behind_a_calibration() -> None:
    behind = load_calibration("h100").provenance["hosts"]["loop_step_seconds"]
    diagnosis = diagnose(Boards(driver=None, boards=(), problem="no GPU"), 1.5 * behind)
    ratios = {c.gpu: c.host_ratio for c in diagnosis.calibrations}
    assert ratios["h100"] == pytest.approx(1.5)
    assert ratios["h200"] is not None and ratios["h200"] > 1.5  # those hosts are faster
    unknown = diagnose(Boards(driver=None, boards=(), problem="no GPU"))
    assert {c.host_ratio for c in unknown.calibrations} == {None}


def test_its_json_holds_the_same() -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--format", "json"])
    found = json.loads(outcome.stdout)
    assert [c["gpu"] for c in found["calibrations"]] == list(list_calibrations())
    known = {c["gpu"] for c in found["calibrations"]} | set(found["without_calibration"])
    assert known == set(list_gpus())


@pytest.mark.parametrize("name", list_gpus())
def test_a_board_is_known_by_its_nvml_name(name: str) -> None:
    diagnosis = with_board(load_gpu(name).aliases[-1])
    assert diagnosis.known_as == (name,)
    if name not in list_calibrations():
        assert "has no calibration" in about_gpu(diagnosis)[0]


def test_an_unknown_board_is_told_how_to_become_known() -> None:
    diagnosis = with_board("NVIDIA X1")
    assert diagnosis.known_as == (None,)
    assert "energymodel schema gpu" in about_gpu(diagnosis)[0]
    assert "unknown" in render_diagnosis(diagnosis)


def test_a_board_that_cannot_be_metered_is_named() -> None:
    name = load_gpu("h100").aliases[-1]
    assert "MIG" in about_gpu(with_board(name, split=True))[-1]
    assert "samples its power" in about_gpu(with_board(name, energy_counter=False))[-1]


def test_what_nvml_does_not_say_is_shown_as_unknown() -> None:
    diagnosis = with_board("NVIDIA X1", memory_bytes=None, power_limit_watts=None)
    line = next(x for x in render_diagnosis(diagnosis).splitlines() if "NVIDIA X1" in x)
    assert line.split()[-3:] == ["-", "-", "unknown"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        energymodel.doctor,
        "requires",
        lambda name: [
            "numpy>=1.26",
            "no-such-package>=2; extra == 'fit'",
            'pytest>=8; extra == "dev"',
        ],
    )
    diagnosis = diagnose(Boards(driver=None, boards=(), problem="no GPU"))
    assert [p.name for p in diagnosis.packages] == ["numpy", "no-such-package"]
    assert diagnosis.findings[0] == (
        "to fit a calibration: no-such-package; pip install 'energymodel[fit]'"
    )


def test_a_checkout_without_an_install_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise energymodel.doctor.PackageNotFoundError

    monkeypatch.setattr(energymodel.doctor, "requires", missing)
    findings = diagnose(Boards(driver=None, boards=(), problem="no GPU")).findings
    assert "pip install -e ." in findings[0]


def test_a_full_disk_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energymodel.doctor, "cache_folder", lambda: None)
    diagnosis = diagnose(Boards(driver=None, boards=(), problem="no GPU"))
    assert any("NUMBA_CACHE_DIR" in finding for finding in diagnosis.findings)
    assert "compiled simulator: nowhere" in render_diagnosis(diagnosis)


class MoreNvml(FakeNvml):
    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB)


def test_the_boards_are_what_nvml_says() -> None:
    found = find_boards(MoreNvml(watts=(100.0, 200.0)))
    assert found.driver == "580.0"
    assert found.problem is None
    assert [b.index for b in found.boards] == [0, 1]
    first = found.boards[0]
    assert (first.name, first.memory_bytes) == ("NVIDIA Fake 1", 80 * GIB)
    assert (first.power_limit_watts, first.energy_counter, first.split) == (700.0, True, False)
    assert find_boards(FakeNvml(mig=True)).boards[0].split
    assert not find_boards(FakeNvml(counter=False)).boards[0].energy_counter
    assert find_boards(FakeNvml()).boards[0].memory_bytes is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (NVMLError_LibraryNotFound("no library"), "no NVIDIA driver is installed"),
        (NVMLError_DriverNotLoaded("not loaded"), "load the NVIDIA driver"),
        (NVMLError_NotSupported("odd"), "check that nvidia-smi works"),
    ],
)
def test_without_a_driver_it_says_what_to_do(error: Exception, remedy: str) -> None:
    found = find_boards(FakeNvml(init_error=error))
    assert found.boards == ()
    assert found.problem is not None
    assert remedy in found.problem
    assert "predictions need none" in diagnose(found).findings[-1]
