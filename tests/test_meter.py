"""The meter against a fake NVML: exact between ticks, and loud about every fault."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import fake_nvml as fake
import pytest
from fake_nvml import FakeNvml

from calibration.metering import meter as meter_module
from calibration.metering import nvml as nvml_module
from calibration.metering.meter import MeterError, NvmlMeter, ReplayMeter, Window
from calibration.metering.windows import read_jsonl, window_from_json, window_to_json


def measured(meter: NvmlMeter, seconds: float = 0.12, name: str = "w") -> Window:
    meter.begin(name)
    time.sleep(seconds)
    return meter.end()


def test_the_power_between_two_ticks_is_exact() -> None:
    meter = NvmlMeter(nvml=FakeNvml(watts=(500.0,)))
    assert meter.tick_seconds is not None  # measured, not assumed
    window = measured(meter, 0.25)
    assert window.valid, window.invalid_reason
    assert window.energy_method == "counter"
    assert window.edge_uncertainty_seconds is not None
    # whole ticks: energy is a multiple of tick x power, duration as many ticks
    assert window.total_joules == pytest.approx(round(window.total_joules / 5.0) * 5.0)
    tolerance = (2 * window.edge_uncertainty_seconds + 0.004) / window.duration_seconds
    assert window.mean_watts == pytest.approx(500.0, rel=tolerance)
    assert window.instant_mean_watts == pytest.approx(500.0)
    assert window.sm_clock_hz == 1980e6
    assert window.states_before[0].memory_power_watts == pytest.approx(100.0)
    assert window.states_after[0].temperature_celsius == 45.0
    assert window.states_before[0].memory_temperature_celsius is None


def test_the_gpu_is_kept_busy_while_ticks_are_awaited() -> None:
    meter = NvmlMeter(nvml=FakeNvml(tick_seconds=0.02))
    calls = []
    meter.begin("w", keep_busy=lambda: calls.append(time.sleep(0.001)))
    at_begin = len(calls)
    time.sleep(0.1)
    meter.end(keep_busy=lambda: calls.append(time.sleep(0.001)))
    assert at_begin > 0
    assert len(calls) > at_begin


def test_several_gpus_are_read_together() -> None:
    meter = NvmlMeter((0, 1), nvml=FakeNvml(watts=(300.0, 100.0)))
    window = measured(meter)
    assert len(window.energy_joules) == 2
    assert window.energy_joules[0] == pytest.approx(3 * window.energy_joules[1], rel=0.3)
    assert window.instant_mean_watts == pytest.approx(400.0)


def test_identity_hashes_the_uuid() -> None:
    identity = NvmlMeter(nvml=FakeNvml()).identity()
    gpu = identity["gpus"][0]
    assert gpu["name"] == "NVIDIA Fake 1"
    assert gpu["ecc"] == 1
    assert gpu["mig"] == 0
    assert gpu["vbios"] is None  # the fake has no such call: unknown, not a guess
    assert "GPU-0000" not in json.dumps(identity)
    assert len(gpu["uuid_sha256"]) == 16


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (FakeNvml(init_error=fake.NVMLError_LibraryNotFound("no lib")), "no NVIDIA driver"),
        (FakeNvml(init_error=fake.NVMLError_DriverNotLoaded("x")), "load the NVIDIA driver"),
        (FakeNvml(init_error=fake.NVMLError_NoPermission("x")), "ask for access"),
        (FakeNvml(watts=()), "sees 0 GPU"),
        (FakeNvml(mig=True), "MIG"),
        (FakeNvml(virtualization=2), "virtual GPU"),
        (FakeNvml(counter=False, instant=False), "neither an energy counter nor its power"),
    ],
)
def test_a_gpu_that_cannot_be_metered_is_refused(nvml: FakeNvml, words: str) -> None:
    with pytest.raises(MeterError, match=words):
        NvmlMeter(nvml=nvml)


def test_no_gpu_index_and_no_binding_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeterError, match="at least one"):
        NvmlMeter((), nvml=FakeNvml())

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(nvml_module.importlib, "import_module", missing)
    with pytest.raises(MeterError, match="pip install"):
        NvmlMeter()


def test_passthrough_is_not_a_virtual_gpu() -> None:
    assert NvmlMeter(nvml=FakeNvml(virtualization=1)).energy_method == "counter"


def test_without_a_counter_power_is_polled_and_integrated() -> None:
    meter = NvmlMeter(nvml=FakeNvml(counter=False, watts=(250.0,)))
    assert meter.energy_method == "polled"
    assert meter.tick_seconds is None
    window = measured(meter, 0.2)
    assert window.valid, window.invalid_reason
    assert window.energy_method == "polled"
    assert window.mean_watts == pytest.approx(250.0)


def test_too_few_polled_samples_are_not_a_zero() -> None:
    meter = NvmlMeter(nvml=FakeNvml(counter=False))
    meter.begin("w")
    window = meter.end()
    assert not window.valid
    assert math.isnan(window.energy_joules[0])


def test_a_counter_that_goes_backwards_marks_the_window() -> None:
    nvml = FakeNvml()
    meter = NvmlMeter(nvml=nvml)
    meter.begin("w")
    time.sleep(0.1)
    nvml.counter_offset_joules = -5e5
    window = meter.end()
    assert not window.valid
    assert "backwards" in window.invalid_reason
    assert math.isnan(window.energy_joules[0])
    again = window_from_json(json.loads(json.dumps(window_to_json(window), allow_nan=False)))
    assert math.isnan(again.energy_joules[0])


def test_a_stuck_counter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter_module, "_TICK_TIMEOUT_SECONDS", 0.05)
    nvml = FakeNvml()
    meter = NvmlMeter(nvml=nvml)
    nvml.stuck = True
    with pytest.raises(MeterError, match="has not moved"):
        meter.begin("w")
    nvml.stuck = False
    assert measured(meter).valid  # the failed begin left nothing open


def test_a_stuck_counter_of_a_second_gpu_marks_the_window() -> None:
    meter = NvmlMeter((0, 1), nvml=FakeNvml(watts=(100.0, 0.0)))
    window = measured(meter)
    assert "did not move" in window.invalid_reason


def test_a_lost_gpu_is_an_error() -> None:
    nvml = FakeNvml()
    meter = NvmlMeter(nvml=nvml)
    meter.begin("w")
    nvml.counter_error = fake.NVMLError_GpuIsLost("GPU is lost")
    with pytest.raises(MeterError, match="fell off the bus"):
        meter.end()


@pytest.mark.parametrize(
    ("reasons", "valid", "capped"),
    [(0x0, True, False), (0x1, True, False), (0x4, True, True), (0x20, False, False),
     (0x44, False, True), (0x80, False, False)],
)  # fmt: skip
def test_throttling_is_marked(reasons: int, valid: bool, capped: bool) -> None:
    window = measured(NvmlMeter(nvml=FakeNvml(reasons=reasons)))
    assert window.valid is valid
    assert window.power_capped is capped
    assert valid or "clocks held down" in window.invalid_reason


def test_other_processes_mark_the_window() -> None:
    window = measured(NvmlMeter(nvml=FakeNvml(pids=(999_999_999,))))
    assert not window.valid
    assert window.other_processes == 1


def test_our_own_process_is_not_another_one() -> None:
    nvml = FakeNvml()
    meter = NvmlMeter(nvml=nvml)
    nvml.pids = (os.getpid(),)
    assert measured(meter).valid
    nvml.pids = (os.getpid(), 999_999_999)
    assert measured(meter).other_processes == 1


def test_in_a_container_our_process_has_a_foreign_id() -> None:
    nvml = FakeNvml()
    meter = NvmlMeter(nvml=nvml)
    nvml.pids = (999_999_998,)  # appeared after the meter: ours, seen from the host
    assert measured(meter).valid
    nvml.pids = (999_999_998, 999_999_999)
    assert measured(meter).other_processes == 1


def test_an_implausible_power_marks_the_window() -> None:
    assert "implausible" in measured(NvmlMeter(nvml=FakeNvml(watts=(5000.0,)))).invalid_reason


def test_a_short_window_is_marked() -> None:
    meter = NvmlMeter(nvml=FakeNvml(tick_seconds=0.02))
    assert meter.tick_seconds is not None
    meter.begin("w")
    assert "shorter than" in meter.end().invalid_reason


def test_a_step_of_the_wall_clock_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = NvmlMeter(nvml=FakeNvml())
    meter.begin("w")
    time.sleep(0.1)
    real = time.time
    monkeypatch.setattr(meter_module.time, "time", lambda: real() - 3600.0)
    window = meter.end()
    assert window.valid
    assert "wall clock stepped" in window.notes[0]
    assert window.duration_seconds < 10


def test_windows_do_not_nest() -> None:
    meter = NvmlMeter(nvml=FakeNvml())
    with pytest.raises(MeterError, match="no window is open"):
        meter.end()
    meter.begin("w")
    with pytest.raises(MeterError, match="still open"):
        meter.begin("v")
    meter.abandon()
    assert measured(meter).valid


def test_replay_plays_windows_by_name_and_order(tmp_path: Path) -> None:
    meter = NvmlMeter(nvml=FakeNvml())
    windows = [measured(meter, 0.05, name) for name in ("a", "b", "a")]
    path = tmp_path / "w.jsonl"
    lines = [json.dumps({"kind": "header", "identity": meter.identity()})]
    lines += [json.dumps({"kind": "case", "window": window_to_json(w)}) for w in windows]
    path.write_text("\n".join(lines) + '\n{"torn')
    replay = ReplayMeter(path)
    assert replay.names == ("a", "b")
    assert replay.identity() == json.loads(json.dumps(meter.identity()))
    for window in (windows[0], windows[2]):
        replay.begin("a")
        assert replay.end() == window
    with pytest.raises(MeterError, match="no more"):
        replay.begin("a")
    with pytest.raises(MeterError, match="Known: a, b"):
        replay.begin("c")


def test_broken_recordings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.jsonl"
    with pytest.raises(MeterError, match="cannot read"):
        ReplayMeter(path)
    path.write_text("")
    with pytest.raises(MeterError, match="no recorded window"):
        ReplayMeter(path)
    path.write_text('{"a": 1}\n{"torn\n{"b": 2}\n')
    with pytest.raises(MeterError, match="line 2"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(MeterError, match="not a JSON object"):
        read_jsonl(path)
    path.write_text('{"window": {"name": "a"}}\n')
    with pytest.raises(MeterError, match="missing or unknown fields"):
        ReplayMeter(path)
