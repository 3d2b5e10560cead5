"""How fast hosts are, and host times carried from the machines of one GPU to those of another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from calibration.fitting.hosts import FEWEST_MACHINES, Hosts, ratio_of_hosts, read_hosts
from calibration.validation.rows import DATA
from energymodel.calibrations import load_calibration
from energymodel.calibrations import with_host_times as scaled


def engine(board: str, step_seconds: float | None) -> str:
    host = None if step_seconds is None else {"python_step_seconds": step_seconds}
    identity = {"gpus": [{"uuid_sha256": board}]}
    return json.dumps({"kind": "engine", "host": host, "identity": identity})


def test_each_machine_counts_once_by_the_mean_of_its_two_speeds(tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    lines = [engine("a", s) for s in (0.6e-7, 0.6e-7, 1.8e-7)]
    one.write_text("\n".join([*lines, '{"kind": "run"}', engine("c", None)]) + "\n")
    other.write_text(engine("b", 4e-7) + "\n")
    hosts = read_hosts([one, other])
    assert hosts is not None and hosts.machines == 2
    assert hosts.loop_step_seconds == pytest.approx(2e-7)  # of 1e-7 and 4e-7
    other.write_text(engine("b", None) + "\n")
    assert read_hosts([other]) is None


def test_one_machine_or_an_untimed_start_scales_nothing() -> None:
    start = load_calibration("h100")
    known = start.provenance["hosts"]["loop_step_seconds"]
    many = Hosts(machines=FEWEST_MACHINES, loop_step_seconds=known / 2)
    assert ratio_of_hosts(many, start) == pytest.approx(0.5)
    assert ratio_of_hosts(replace(many, machines=FEWEST_MACHINES - 1), start) == 1.0
    assert ratio_of_hosts(many, replace(start, provenance={})) == 1.0
    assert ratio_of_hosts(None, start) == 1.0


def test_every_host_time_follows_and_nothing_else() -> None:
    before = load_calibration("h100")
    after = scaled(before, 0.5)
    for name, stack in before.stacks.items():
        half = after.stacks[name]
        assert half.step_host_seconds == stack.step_host_seconds / 2
        assert half.launch_seconds == stack.launch_seconds / 2
        assert half.request_host_seconds == stack.request_host_seconds / 2
        assert half.kernels_per_layer == stack.kernels_per_layer
        assert half.parallel_sequence_share == stack.parallel_sequence_share
    assert replace(after, stacks=before.stacks) == before


def test_host_times_of_the_h200_are_the_h100s_by_the_ratio_of_their_loops() -> None:
    shipped = {name: load_calibration(name) for name in ("h100", "h200")}
    loops = {
        name: read_hosts(sorted((DATA / "serving").glob(f"{name}-*.jsonl.gz"))) for name in shipped
    }
    assert loops["h100"] is not None and loops["h200"] is not None
    ratio = loops["h200"].loop_step_seconds / loops["h100"].loop_step_seconds
    assert shipped["h100"].provenance["hosts"]["host_times_scaled_by"] == 1.0  # its own runs tell
    assert shipped["h200"].provenance["hosts"]["host_times_scaled_by"] == pytest.approx(
        ratio, abs=1e-4
    )
    for stack, times in shipped["h100"].stacks.items():
        for name in ("step_host_seconds", "sequence_host_seconds", "launch_seconds"):
            found = getattr(shipped["h200"].stacks[stack], name)
            assert found == pytest.approx(getattr(times, name) * ratio, rel=1e-4)
