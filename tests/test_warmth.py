"""What is said of boards that warm and cool, and of hosts whose cores are shared."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from calibration.kernels.warmth import PHASES, run_phase, sampler
from calibration.metering.host_cores import core_seconds, main
from calibration.metering.nvml import NvmlGpus
from calibration.metering.windows import read_jsonl
from tests.fake_nvml import FakeNvml

DATA = Path(__file__).parents[1] / "calibration" / "data"


def test_a_board_leaks_half_a_watt_a_kelvin_and_cools_within_seconds() -> None:
    """docs/residuals.md, "A board warms": idle and tiny kernels after products at the limit."""
    phases = [r for r in read_jsonl(DATA / "warmth/h200-card-l.jsonl.gz") if r["kind"] == "warmth"]
    assert [(p["load"], p["seconds"]) for p in phases] == list(PHASES)
    light = [p for before, p in itertools.pairwise(phases) if before["load"] == "heat"]
    assert [p["load"] for p in light] == ["idle", "tiny", "onchip"]
    for phase in light[:2]:
        rows = np.array(phase["samples"], dtype=float)
        seconds, watts, celsius = rows[:, 0] - rows[0, 0], rows[:, 2], rows[:, 4]
        cooling = seconds > 0.3  # the driver's power and clock have followed by then
        slope = np.polyfit(celsius[cooling], watts[cooling], 1)[0]
        assert 0.5 < slope < 0.7
        assert celsius[0] >= 58.0
        assert celsius[seconds > 2.0].max() - celsius[-1] <= 2.0


def test_a_phase_keeps_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    cuda = SimpleNamespace(Event=lambda: event, synchronize=lambda: None)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    made: list[int] = []
    calls = run_phase("heat", 0.05, lambda: made.append(1) or time.sleep(0.001))
    assert calls == len(made) >= 8
    assert run_phase("idle", 0.01, None) == 0


def test_the_sampler_notes_energy_power_temperature_and_clock() -> None:
    with sampler(NvmlGpus((0,), FakeNvml(watts=(300.0,)))) as polled:
        time.sleep(0.25)
    times, joules, watts, *_, clocks = zip(*polled.rows, strict=True)
    assert len(times) >= 2
    assert joules[-1] > joules[0]
    assert set(watts) == {300.0}
    assert set(clocks) == {1980.0}


def test_cores_of_a_shared_host_are_fast_and_slow_at_the_same_moment() -> None:
    """docs/residuals.md, "Hosts differ": two speeds, and which cores have which changes."""
    rounds = [
        np.array(r["loop_step_seconds"]) for r in read_jsonl(DATA / "hosts/h200-card-l.jsonl.gz")
    ]
    slow = np.array([r > 1.35 * min(map(np.min, rounds)) for r in rounds])
    times = np.array(rounds)
    assert slow.shape == (12, 16)
    assert all(5 < s.sum() < 14 for s in slow)
    assert np.median(times[slow]) / np.median(times[~slow]) == pytest.approx(1.6, abs=0.05)
    assert (slow[:-1] != slow[1:]).mean() > 0.2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux's CPU affinity")
def test_every_core_is_timed_and_the_process_goes_on_where_it_was(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:2]
    assert all(0.0 < s < 1e-5 for s in core_seconds(cores))
    assert os.sched_getaffinity(0) == before
    out = tmp_path / "cores.jsonl"
    assert main(["--out", str(out)]) == 0
    (first, *_) = read_jsonl(out)
    assert first["cores"] == sorted(before)
    assert len(first["loop_step_seconds"]) == len(before)
