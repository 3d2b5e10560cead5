"""The runner with a fake rig and meter: what it writes, and how it survives faults."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeNvml, NVMLError_GpuIsLost

from calibration.kernels import collect
from calibration.kernels.cases import Case
from calibration.kernels.collect import ContextLostError, Outcome, run_suite
from calibration.kernels.pump import Launchable, Work
from calibration.kernels.rig import Rig
from calibration.kernels.suite import build_suite
from calibration.kernels.summary import write_summary
from calibration.metering import recording
from calibration.metering.meter import MeterError, NvmlMeter, ReplayMeter
from calibration.metering.windows import read_jsonl
from energymodel.errors import ConfigurationError, EnergyModelError

QUICK = build_suite("quick")


def kernels(count: int) -> list[Case]:
    cases = [c for c in QUICK if c.op_class == "gemm"][:count]
    return [replace(c, warmup_seconds=0.01) for c in cases]


def work_of(case: Case) -> Work:
    return Work(
        call=lambda i: time.sleep(0.001),
        backend="fake",
        details={"distinct_experts": 4.0, "expert_rows": 32.0, "dispatched_ops": 10},
        counts={"executed_flops": 7.0},
    )


class FakeRig:
    """A rig whose kernel takes a millisecond; faults by case name."""

    def __init__(self, faults: dict[str, Exception] | None = None) -> None:
        self.faults = faults or {}
        self.built: list[str] = []
        self.lost = False

    def build(self, case: Case) -> tuple[Work, Launchable]:
        self.built.append(case.name)
        if case.name in self.faults:
            raise self.faults[case.name]
        work = work_of(case)
        launch = Launchable(launch=lambda: work.call(0), iterations=4, graph=True)
        return work, launch

    def release(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def open(self) -> Rig:
        return Rig(
            device="cpu",
            build=self.build,
            release=self.release,
            idler=lambda case: lambda: time.sleep(0.001),
            software={"torch": "fake"},
        )


def run(
    path: Path, cases: list[Case], rig: FakeRig | None = None, **options: Any
) -> tuple[Outcome, list[dict[str, Any]]]:
    meter = options.pop("meter", None) or NvmlMeter(nvml=FakeNvml())
    defaults: dict[str, Any] = {"window_seconds": 0.12, "preheat_seconds": 0.0}
    opener: Callable[[], Rig] = options.pop("open_rig", (rig or FakeRig()).open)
    outcome = run_suite(meter, cases, path, open_rig=opener, **{**defaults, **options})
    return outcome, read_jsonl(path)


def cases_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in records if r["kind"] == "case"]


def test_a_kernel_is_recorded_with_all_it_takes(tmp_path: Path) -> None:
    case = kernels(1)[0]
    outcome, records = run(tmp_path / "w.jsonl", [case])
    assert outcome.measured == 1
    header, record, software = records
    assert header["kind"] == "header"
    assert header["identity"]["gpus"][0]["name"] == "NVIDIA Fake 1"
    assert software["software"] == {"torch": "fake"}
    assert record["case"] == case.name
    assert record["valid"], record["invalid_reason"]
    assert record["flops"] == case.flops
    assert record["shape"] == dict(case.shape)
    assert record["executed_flops"] == 7.0  # the launcher's count replaces the estimate
    assert record["iterations_per_launch"] == 4
    assert record["iteration_seconds"] >= 0.001 / 4
    assert record["energy_per_iteration_joules"] == pytest.approx(
        record["power_watts"] * record["iteration_seconds"]
    )
    assert record["window"]["energy_method"] == "counter"


def test_power_is_that_of_the_gpus_that_a_case_runs_on(tmp_path: Path) -> None:
    one = kernels(1)[0]
    two = replace(one, name="two", gpus=2)
    meter = NvmlMeter((0, 1), nvml=FakeNvml(watts=(500.0, 70.0)))
    _, records = run(tmp_path / "w.jsonl", [one, two], meter=meter)
    watts = {r["case"]: r["power_watts"] for r in cases_of(records)}
    assert watts[one.name] == pytest.approx(500.0, rel=0.05)
    assert watts["two"] == pytest.approx(570.0, rel=0.05)


def test_idle_states_are_windows_without_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_IDLE_WINDOW_SECONDS", 0.1)
    rig = FakeRig()
    idle = [replace(c, warmup_seconds=0.01) for c in QUICK if c.op_class == "idle"]
    opened: list[float] = []

    def opener() -> Rig:
        opened.append(time.monotonic())
        return rig.open()

    _, records = run(tmp_path / "w.jsonl", idle, open_rig=opener)
    found = cases_of(records)
    assert found[0]["launcher"] == "idle_cold"
    assert found[0]["window"]["end_seconds"] <= opened[0]  # no context before the cold window
    assert all(r["power_watts"] > 0 and "iteration_seconds" not in r for r in found)


def test_the_same_command_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(3)
    run(path, cases[:2])
    outcome, records = run(path, cases)
    assert outcome.measured == 1
    assert [r["case"] for r in cases_of(records)].count(cases[0].name) == 1
    assert len(cases_of(records)) == 3
    outcome, again = run(path, cases)
    assert outcome.measured == 0
    assert again == records  # nothing to do: not even a header


def test_invalid_windows_stay_and_are_measured_again(tmp_path: Path) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(1)
    outcome, _ = run(path, cases, meter=NvmlMeter(nvml=FakeNvml(reasons=0x40)))
    assert outcome.invalid == 1
    outcome, records = run(path, cases)
    assert outcome.measured == 1
    assert [r["valid"] for r in cases_of(records)] == [False, True]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (type("OutOfMemoryError", (RuntimeError,), {})("tried 9 GiB"), "failed", "out of GPU mem"),
        (RuntimeError("ptxas fatal"), "failed", "ptxas fatal"),
        (type("UnavailableError", (EnergyModelError,), {})("needs vLLM"), "skipped", "needs vLLM"),
    ],
)
def test_a_failing_case_is_recorded_and_passed_over(
    tmp_path: Path, error: Exception, status: str, words: str
) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(3)
    outcome, records = run(path, cases, FakeRig({cases[1].name: error}))
    assert outcome.measured == 2
    assert outcome.failed + outcome.skipped == 1
    record = next(r for r in cases_of(records) if r["case"] == cases[1].name)
    assert record["status"] == status
    assert words in record["error"]
    assert not record["valid"]
    rig = FakeRig()
    run(path, cases, rig)
    # what failed is not tried again; what lacked software may have it by now
    assert rig.built == ([cases[1].name] if status == "skipped" else [])


def test_a_lost_context_stops_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(3)
    rig = FakeRig({c.name: RuntimeError("CUDA error") for c in cases})
    rig.lost = True
    with pytest.raises(ContextLostError, match="run the same command again"):
        run(path, cases, rig)
    assert len(cases_of(read_jsonl(path))) == 1
    outcome, _ = run(path, cases)
    assert outcome.measured == 2


def test_a_lost_gpu_stops_the_run_and_blames_no_case(tmp_path: Path) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(2)
    nvml = FakeNvml()
    rig = FakeRig()
    build = rig.build

    def breaking(case: Case) -> tuple[Work, Launchable]:
        nvml.counter_error = NVMLError_GpuIsLost("lost")
        return build(case)

    rig.build = breaking  # type: ignore[method-assign]
    with pytest.raises(MeterError, match="fell off the bus"):
        run(path, cases, rig, meter=NvmlMeter(nvml=nvml))
    outcome, _ = run(path, cases)
    assert outcome.measured == 2


def test_software_that_cannot_start_blames_no_case(tmp_path: Path) -> None:
    def broken() -> Rig:
        raise EnergyModelError("torch sees no CUDA device")

    with pytest.raises(EnergyModelError, match="sees no CUDA device"):
        run(tmp_path / "w.jsonl", kernels(1), open_rig=broken)
    assert cases_of(read_jsonl(tmp_path / "w.jsonl")) == []


def test_the_time_limit_leaves_cases_out(tmp_path: Path) -> None:
    outcome, records = run(tmp_path / "w.jsonl", kernels(3), time_limit_seconds=0.1)
    assert outcome.left == 3
    assert records == []


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(2)
    run(path, cases[:1])
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:50])
    outcome, records = run(path, cases)
    assert outcome.measured == 1
    assert path.read_bytes().startswith(whole)
    assert len(cases_of(records)) == 2


def test_a_run_killed_at_any_moment_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    script = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
        from test_collect import kernels, run
        run(Path({str(path)!r}), kernels(6) , window_seconds=0.12)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    while not path.exists() or path.read_bytes().count(b'"kind":"case"') < 2:
        time.sleep(0.01)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(cases_of(read_jsonl(path)))
    assert kept >= 2
    outcome, records = run(path, kernels(6))
    assert outcome.measured == 6 - kept
    assert len({r["case"] for r in cases_of(records)}) == 6


def test_a_full_disk_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cases = tmp_path / "w.jsonl", kernels(3)
    real, written = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        written.append(data)
        if len(written) == 4:  # header, case, software, then half of the second case
            real(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(recording.os, "write", full)
    with pytest.raises(recording.RecordingError, match="No space left on device; make room"):
        run(path, cases)
    monkeypatch.undo()
    assert path.read_bytes().endswith(b"\n")
    assert len(cases_of(read_jsonl(path))) == 1
    assert run(path, cases)[0].measured == 2


def test_one_writer_at_a_time_and_one_gpu_model_per_file(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    with (
        recording.WindowFile(path) as file,
        pytest.raises(recording.RecordingError, match="another run"),
        recording.WindowFile(path),
    ):
        pass
    with recording.WindowFile(path) as file:
        file.append({"kind": "header", "identity": {"gpus": [{"name": "Other GPU"}]}})
    with pytest.raises(ConfigurationError, match="holds windows of"):
        run(path, kernels(1))


def test_an_unwritable_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(recording.RecordingError, match="cannot write"):
        run(tmp_path / "file" / "w.jsonl", kernels(1))


def test_the_runner_replays_a_recording(tmp_path: Path) -> None:
    cases = kernels(3)
    _, first = run(tmp_path / "a.jsonl", cases)
    replay = ReplayMeter(tmp_path / "a.jsonl")
    _, second = run(tmp_path / "b.jsonl", cases, meter=replay)
    windows = [{r["case"]: r["window"] for r in cases_of(records)} for records in (first, second)]
    assert windows[0] == windows[1]


def test_order_and_progress_are_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str, float]] = []
    run(tmp_path / "w.jsonl", kernels(2), progress=lambda *told: seen.append(told))
    assert [(d, t) for d, t, _, _ in seen] == [(0, 2), (1, 2)]
    assert seen[0][3] > seen[1][3] > 0


def test_records_are_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    run(tmp_path / "w.jsonl", kernels(1))
    for line in (tmp_path / "w.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_the_summary_tells_it_on_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "_IDLE_WINDOW_SECONDS", 0.1)
    wanted = (
        *("idle.cold", "base.tiny.e32", "copy.copy.hbm.1024mib"),
        *("stack.llama-3.2-1b.b1.graph", "stack.llama-3.2-1b.b1.eager"),
        *("moe.fused.olmoe-1b-7b.t8", "moe.dense.olmoe-1b-7b.t8", "moe.fused.olmoe-1b-7b.t8.r2"),
        *("gemm.bf16.llama-3.1-8b.gate_up.m16", "gemm.bf16.llama-3.1-8b.gate_up.m128"),
    )
    cases = [replace(c, warmup_seconds=0.01) for c in QUICK if c.name in wanted]
    assert len(cases) == len(wanted)
    bad = "gemm.bf16.llama-3.1-8b.gate_up.m128"
    path = tmp_path / "w.jsonl"
    run(path, cases, FakeRig({bad: RuntimeError("ptxas fatal")}))
    page = write_summary(path).read_text()
    for words in (
        *("# Calibration of NVIDIA Fake 1", "| idle.cold |", "| copy hbm |", "ptxas fatal"),
        *("| llama-3.2-1b.b1 |", "| olmoe-1b-7b | 8 |", "repeat of a case, energy"),
    ):
        assert words in page
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(EnergyModelError, match="no valid window"):
        write_summary(empty)
