"""`energymodel calibrate` as a user runs it, on a fake GPU: what it prints, leaves and refuses."""

from __future__ import annotations

import errno
import sys
import types
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import fake_nvml as fake
import pytest
from fake_nvml import FakeNvml
from test_collect import FakeRig, kernels
from typer.testing import CliRunner, Result

from calibration import calibrate_cli
from calibration.kernels import collect
from calibration.kernels.suite import build_suite
from calibration.metering import recording
from calibration.metering.windows import read_jsonl
from energymodel.cli import app


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *(str(a) for a in arguments)])


def refused(outcome: Result) -> str:
    """The one message of a run that ended before measuring."""
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit), "a traceback"
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with a fake driver, torch and GPU; `nvml` and `rig` may be replaced."""
    made: dict[str, Any] = {"nvml": FakeNvml(), "rig": FakeRig(), "cases": kernels(3)}
    torch = types.ModuleType("torch")
    torch.__spec__ = ModuleSpec("torch", None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    binding = types.ModuleType("pynvml")
    binding.__getattr__ = lambda name: getattr(made["nvml"], name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", binding)
    monkeypatch.setattr(collect, "cuda_rig", lambda *_, **__: made["rig"].open())
    monkeypatch.setattr(collect, "build_suite", lambda *_, **__: made["cases"])
    return made


def quick(out: Path, *options: object) -> Result:
    short = ("--window-seconds", 0.12, "--preheat-seconds", 0)
    return calibrate("--suite", "quick", "--out", out, *short, *options)


def test_it_measures_sums_up_and_says_what_comes_next(
    machine: dict[str, Any], tmp_path: Path
) -> None:
    outcome = quick(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.startswith("# Calibration of NVIDIA Fake 1")
    assert "3 valid windows, 0 invalid" in outcome.stderr
    assert "[  1/3]" in outcome.stderr
    assert f"energymodel fit {tmp_path / 'windows.jsonl'}" in outcome.stderr
    assert (tmp_path / "windows.summary.md").read_text().strip() == outcome.stdout.strip()


def test_the_same_command_goes_on(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = machine["cases"][2]
    with monkeypatch.context() as patch:
        patch.setattr(collect, "estimated_seconds", lambda case, _: 1e6 if case == long else 1.0)
        outcome = quick(tmp_path)
    assert "2 valid windows" in outcome.stderr
    assert "1 case(s) are left: run the same command again" in outcome.stderr
    assert "1 valid windows" in quick(tmp_path).stderr
    cases = [r for r in read_jsonl(tmp_path / "windows.jsonl") if r["kind"] == "case"]
    assert sorted(r["case"] for r in cases) == sorted(c.name for c in machine["cases"])


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (FakeNvml(watts=()), "there is no GPU 0; NVML sees 0 GPU(s)"),
        (FakeNvml(init_error=fake.NVMLError_LibraryNotFound("x")), "no NVIDIA driver is installed"),
        (FakeNvml(init_error=fake.NVMLError_DriverNotLoaded("x")), "load the NVIDIA driver"),
        (FakeNvml(init_error=fake.NVMLError_NoPermission("x")), "ask for access to /dev/nvidia*"),
        (FakeNvml(mig=True), "GPU 0 is split by MIG"),
        (FakeNvml(virtualization=2), "GPU 0 is a virtual GPU"),
        (FakeNvml(counter=False, instant=False), "neither an energy counter nor its power"),
        (FakeNvml(pids=(4242, 4243)), "2 process(es) of others use GPU 0"),
    ],
)
def test_a_gpu_that_would_give_wrong_numbers_is_refused(
    machine: dict[str, Any], tmp_path: Path, nvml: FakeNvml, words: str
) -> None:
    machine["nvml"] = nvml
    assert words in refused(quick(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_without_the_binding_or_torch_it_says_what_to_install(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install 'energymodel[calibrate]'" in refused(quick(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "NVML binding is missing" in refused(quick(tmp_path))


def test_without_a_counter_power_is_polled_and_the_page_says_so(
    machine: dict[str, Any], tmp_path: Path
) -> None:
    machine["nvml"] = FakeNvml(counter=False)
    outcome = quick(tmp_path, "--window-seconds", 0.4)
    assert outcome.exit_code == 0, outcome.output
    assert "energy by polled" in outcome.stdout


def test_windows_that_all_went_wrong_end_with_the_reason(
    machine: dict[str, Any], tmp_path: Path
) -> None:
    machine["nvml"] = FakeNvml(reasons=0x40)
    outcome = quick(tmp_path)
    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert "no valid window" in outcome.stderr
    assert "3 of 3 say 'clocks held down: hw_thermal" in outcome.stderr


def test_a_full_disk_ends_with_a_message_and_keeps_what_was_written(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = recording.os.write, []

    def full(descriptor: int, data: bytes) -> int:
        written.append(data)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(recording.os, "write", full)
        outcome = quick(tmp_path)
    assert outcome.exit_code == 2
    assert "No space left on device; make room" in outcome.stderr
    assert "2 valid windows" in quick(tmp_path).stderr


def test_a_lost_context_starts_the_command_again(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def execv(_: str, arguments: list[str]) -> None:
        started.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(calibrate_cli.os, "execv", execv)
    rig = machine["rig"]
    rig.faults = {c.name: RuntimeError("CUDA error") for c in machine["cases"]}
    rig.lost = True
    outcome = quick(tmp_path)
    assert "the CUDA context is lost" in outcome.stderr
    assert started[0][1:4] == ["-m", "energymodel", "calibrate"]
    rig.lost, rig.faults = False, {}
    again = CliRunner().invoke(app, started[0][3:])
    assert again.exit_code == 0, again.output
    assert "2 valid windows" in again.stderr


def test_ctrl_c_keeps_what_was_measured(machine: dict[str, Any], tmp_path: Path) -> None:
    case = machine["cases"][1]
    machine["rig"].faults = {case.name: KeyboardInterrupt()}  # type: ignore[dict-item]
    outcome = quick(tmp_path)
    assert outcome.exit_code == 130
    assert "the same command goes on" in outcome.stderr


def test_the_dry_run_needs_no_gpu() -> None:
    outcome = calibrate("--suite", "quick", "--dry-run")
    assert outcome.exit_code == 0, outcome.output
    assert "gemm.bf16.llama-3.1-8b.gate_up.m16" in outcome.stdout
    assert f"{len(build_suite('quick'))} cases" in outcome.stdout


def test_idle_states_come_first_and_a_case_that_fails_is_on_the_page(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_IDLE_WINDOW_SECONDS", 0.1)
    cold = next(c for c in build_suite("quick") if c.name == "idle.cold")
    machine["cases"] = [*machine["cases"], replace(cold, warmup_seconds=0.01)]
    machine["rig"].faults = {machine["cases"][0].name: RuntimeError("ptxas fatal")}
    outcome = quick(tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "3 valid windows, 0 invalid, 1 failed" in outcome.stderr
    assert "ptxas fatal" in outcome.stdout
    assert "| idle.cold |" in outcome.stdout
