"""The page on measured kernels: from a few windows whose figures follow by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.fitting.measurements import read_measurements
from calibration.kernels.comparisons import ExpertWork, expert_kernels, valid_cases
from calibration.kernels.suite import build_suite
from calibration.validation import kernel_page, kernel_tables
from calibration.validation.kernel_boards import (
    Repeat,
    idle_offset_watts,
    read_boards,
    repeats,
    twice,
    without_offset,
)
from calibration.validation.kernel_errors import (
    by_family,
    held_out,
    held_out_by_rows,
    of_class,
    start_of,
)
from calibration.validation.kernel_plots import figures
from calibration.validation.rows import DATA
from energymodel.errors import EnergyModelError

SUITE = {case.name: case for case in build_suite("full", gpus=2)}
Record = dict[str, Any]


def header(serials: Iterable[str]) -> Record:
    gpus = [
        {"name": "NVIDIA H100 80GB HBM3", "uuid_sha256": s, "power_limit_watts": 700.0}
        for s in serials
    ]
    identity = {"driver_version": "580.1", "gpus": gpus}
    return {"kind": "header", "identity": identity, "started_unix_seconds": 1.79e9}


def record(
    name: str,
    watts: float,
    seconds: float | None = None,
    *,
    mhz: float = 1980.0,
    capped: bool = False,
    host_seconds: float = 1e-6,
    **details: Any,
) -> Record:
    """A valid window of a case of the suite."""
    case = SUITE[name.removesuffix(".r2")]
    state = {"temperature_celsius": 50.0}
    found: Record = {
        **{f: getattr(case, f) for f in ("op_class", "launcher", "family", "dtype", "flops")},
        **{f: getattr(case, f) for f in ("hbm_bytes", "activation_bytes", "link_bytes")},
        **{f: getattr(case, f) for f in ("graph", "gpus")},
        "kind": "case",
        "case": name,
        "shape": dict(case.shape),
        "repeat": 2 if name.endswith(".r2") else 1,
        "executed_flops": case.flops,
        "details": details,
        "valid": True,
        "power_watts": watts,
        "window": {
            "sm_clock_hz": mhz * 1e6,
            "power_capped": capped,
            "throttle_shares": {"sw_power_cap": 1.0} if capped else {},
            "states_before": [state],
            "states_after": [state],
        },
    }
    if seconds is not None:
        found |= {
            "iteration_seconds": seconds,
            "energy_per_iteration_joules": watts * seconds,
            "host_seconds_per_iteration": host_seconds,
        }
    return found


ONE = [
    record("idle.context", 100.0),
    record("base.tiny.e32", 120.0, 1e-6),
    record("copy.read.hbm.1024mib", 400.0, 4e-4),
    record("copy.read.hbm.1024mib.r2", 402.0, 4e-4),
    record("gemm.bf16.llama-3.1-8b.gate_up.m8192", 690.0, 3e-3, mhz=1300, capped=True),
    record("moe.dense.olmoe-1b-7b.t8", 500.0, 100e-6),
    record("moe.fused.olmoe-1b-7b.t8", 600.0, 450e-6, distinct_experts=40.0, expert_rows=640.0),
    record("moe.loop.olmoe-1b-7b.t8", 150.0, 20e-3, distinct_experts=40.0),
    record("stack.llama-3.2-1b.b1.graph", 300.0, 2e-3),
    record("stack.llama-3.2-1b.b1.eager", 150.0, 10e-3, host_seconds=9e-3, dispatched_ops=900),
]
TWO = [
    record("idle.context", 108.0),
    record("base.tiny.e32", 128.0, 1e-6),
    record("copy.read.hbm.1024mib", 408.0, 4e-4),
    record("gemm.bf16.llama-3.1-8b.gate_up.m8192", 697.0, 2.94e-3, mhz=1330, capped=True),
    record("stack.llama-3.2-1b.b1.eager", 150.0, 12e-3, host_seconds=11.7e-3, dispatched_ops=900),
    record("moe.fused.olmoe-1b-7b.t8", 600.0, 450e-6, mhz=1900, distinct_experts=40.0,
           expert_rows=640.0),
]  # fmt: skip


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    folder = tmp_path / "windows"
    folder.mkdir()
    for name, serials, records in (
        ("h100-card-x", ["aa"], ONE),
        ("h100-card-y", ["bb"], TWO),
        ("h100-pair-xy", ["aa", "bb"], [record("all_reduce.g2.1024kib", 400.0, 20e-6)]),
    ):
        lines = [json.dumps(r) + "\n" for r in (header(serials), *records)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def row_of(page: str, first: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_command_writes_the_page_and_its_figures(windows: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    assert kernel_page.main([str(windows), str(docs)]) == 0
    page = (docs / "kernels.md").read_text(encoding="utf-8")
    figures_shown = {line.split("](")[1].rstrip(")") for line in page.splitlines() if "![" in line}
    drawn = {str(p.relative_to(docs)) for p in (docs / "img").iterdir()}
    assert drawn == figures_shown
    assert row_of(page, "H100, GEMM")[1:3] == ["1", "2"]  # both boards
    assert row_of(page, "h100-card-x")[2:5] == ["10", "0", "700"]


def test_experts_over_the_gemm_by_hand(windows: Path) -> None:
    page = kernel_page.page(read_boards(windows), {}, {})
    stated = row_of(page, "Fused expert kernel against dense GEMMs, batch 8")
    # 450 us / 100 us = 4.5; 600 W x 450 us / (500 W x 100 us) = 5.4; 64 (1 - 0.875^8) experts of 8
    assert stated[1:] == ["+63.0", "+350.0", "+440.0", "5.25"]
    row = row_of(page, "olmoe-1b-7b")
    assert row[1:5] == ["8", "balanced", "100.0", "50.00"]
    assert row[5:7] == ["4.5", "5.4"]
    assert row[9:11] == ["200", "60"]  # 20 ms / 100 us; 3 J / 50 mJ
    assert row[11] == "40.0"
    assert row[13:] == ["10.00", "1/2"]  # 640 rows of 8 x 8


def test_a_skewed_batch_stands_beside_the_same_gemm() -> None:
    cases = valid_cases(
        [
            record("moe.dense.olmoe-1b-7b.t16", 500.0, 1e-4),
            record("moe.fused.olmoe-1b-7b.t16.skewed", 600.0, 4e-4),
        ]
    )
    work = ExpertWork(model="olmoe-1b-7b", tokens=16, skewed=True)
    assert set(expert_kernels(cases)[work]) == {"GEMM", "fused"}
    first = expert_kernels(cases)[work]["GEMM"]
    assert first["case"] == "moe.dense.olmoe-1b-7b.t16"


def test_a_graph_against_eager_by_hand(windows: Path) -> None:
    row = row_of(kernel_page.page(read_boards(windows), {}, {}), "H100, llama-3.2-1b")
    assert row[1:4] == ["1", "2.00", "10.00 to 12.00"]
    assert row[4] == "-81.8"  # 2 ms over the median of 10 and 12 ms
    assert row[5:8] == ["0.600", "1.500 to 1.800", "-63.6"]
    assert row[10:] == ["10.0 to 13.0", "1/2"]  # us a launch: 9 ms and 11.7 ms over 900


def test_rates_and_links_by_hand(windows: Path) -> None:
    page = kernel_page.page(read_boards(windows), {}, {})
    read = row_of(page, "H100, read hbm")
    # 2^30 B in 400 us: 2684 GB/s of 3350; 400 W over it: 149.0 pJ/B, 280 W: 104.3
    assert read[2:] == ["2684 GB/s", "80", "1980", "400", "149.01", "104.31"]
    link = row_of(page, "h100-pair-xy, 2 GPUs")
    # 1 MiB in 20 us: 52.4 GB/s of 450; 200 W a GPU, median base of the kind 124 W
    assert link[1:6] == ["1024", "20.0", "52.4", "11.7", "200"]
    assert link[7] == f"{76 * 20e-6 / 2**20 * 1e12:.0f}"


def repeats_by_case(windows: Path) -> dict[str, Repeat]:
    (pair,) = repeats(read_boards(windows))  # not with the file of both boards
    assert pair[0].boards == ("h100-card-x", "h100-card-y")
    return {r.case: r for r in pair}


def test_two_boards_differ_as_recorded(windows: Path) -> None:
    found = repeats_by_case(windows)
    read = found["copy.read.hbm.1024mib"]
    assert (read.seconds, read.watts) == pytest.approx((0.0, 0.02))
    assert read.joules == pytest.approx(0.02)
    assert read.cause == "draw"
    assert found["idle.context"].seconds is None
    assert found["gemm.bf16.llama-3.1-8b.gate_up.m8192"].cause == "power limit"
    assert found["stack.llama-3.2-1b.b1.eager"].cause == "host"
    assert found["moe.fused.olmoe-1b-7b.t8"].cause == "clock"
    offset = idle_offset_watts(list(found.values()))
    assert offset == pytest.approx(8.0)
    assert without_offset(read, 8.0) == pytest.approx(0.0)
    ((again,),) = twice(read_boards(windows))
    assert again.watts == pytest.approx(0.005)


def test_a_board_is_not_another_one(windows: Path) -> None:
    other = windows / "h100-card-y.jsonl"
    other.write_text(other.read_text().replace('"bb"', '"aa"'))
    assert list(repeats(read_boards(windows))) == []
    assert "No case was measured on two boards" in kernel_page.page(read_boards(windows), {}, {})


def test_misses_are_listed_once_with_their_cause(windows: Path) -> None:
    page = kernel_page.page(read_boards(windows), {}, {})
    boards = "(h100-card-x, h100-card-y)"
    gemm = row_of(page, f"gemm.bf16.llama-3.1-8b.gate_up.m8192 {boards}")
    assert gemm[1:4] == ["1/1", "-2.0", "+1.0"]
    assert gemm[5:7] == ["690 → 697", "1300 → 1330"]
    assert (gemm[8], gemm[-1]) == ("100 %", "power limit")
    assert row_of(page, f"stack.llama-3.2-1b.b1.eager {boards}")[-2:] == ["9000 → 11700", "host"]
    assert f"| moe.fused.olmoe-1b-7b.t8 {boards} |" not in page  # the same but for the clock


def test_held_out_errors_of_a_slice_of_the_windows(tmp_path: Path) -> None:
    measured = read_measurements([DATA / "kernels" / "h100-card-b.jsonl.gz"])
    kept = ("gemm", "idle", "base")
    some = tuple(r for r in measured.records if r["kind"] != "case" or r["op_class"] in kept)
    found = held_out(replace(measured, records=some), start_of("h100"))
    gemms = [r for r in some if r["kind"] == "case" and r["op_class"] == "gemm"]
    assert len(found.rows) == len(gemms)
    assert np.isfinite(found.seconds).all() and np.isfinite(found.watts).all()
    assert len(of_class(found, "MoE").rows) == 0
    exact = replace(found, seconds=1.1 * found.rows.seconds, watts=0.9 * found.rows.watts)
    summary = exact.summaries()
    assert summary["seconds"].median == pytest.approx(0.1)
    assert summary["joules"].bias == pytest.approx(-0.01)
    sizes = [abs(np.median(h.errors()["joules"])) for h in by_family(exact).values()]
    assert sum(len(h.rows) for h in by_family(exact).values()) == len(found.rows)
    assert sizes == pytest.approx([0.01] * len(sizes))
    page = kernel_page.page([], {"h100": exact}, {"h100": exact})
    row = row_of(page, "H100, GEMM")
    assert row[2] == str(len(gemms))
    assert (row[3], row[7], row[11], row[-1]) == ("10.0", "10.0", "1.0", "missed")
    assert row_of(page, "H100, memory-bound, by rows")[2] == str(len(gemms))
    assert set(figures([], {"h100": exact})) == {"img/kernels-errors.png"}


def test_memory_bound_windows_are_held_out_by_rows() -> None:
    measured = read_measurements([DATA / "kernels" / "h100-card-h.jsonl.gz"])
    kept = ("elementwise", "idle", "base")
    some = tuple(r for r in measured.records if r["kind"] != "case" or r["op_class"] in kept)
    found = held_out_by_rows(replace(measured, records=some), start_of("h100"))
    cases = {n: f for n, f in zip(found.rows.name, found.rows.family, strict=True)}
    assert cases["elementwise.rms_norm.t8"] == "8 rows"
    assert cases["elementwise.silu_and_mul.t8192"] == "8192 rows"
    assert np.isfinite(found.seconds).all() and np.isfinite(found.watts).all()
    # what a fold leaves out does not move its prediction
    slower = [
        {**r, "iteration_seconds": 3 * r["iteration_seconds"]}
        if r["kind"] == "case" and r["case"].endswith(".t8")
        else r
        for r in some
    ]
    again = held_out_by_rows(replace(measured, records=tuple(slower)), start_of("h100"))
    eight = np.array([f == "8 rows" for f in found.rows.family])
    assert again.seconds[eight] == pytest.approx(found.seconds[eight], rel=1e-6)


def test_what_was_not_measured_is_left_out(windows: Path, tmp_path: Path) -> None:
    for path in windows.iterdir():
        if path.stem != "h100-pair-xy":
            path.unlink()
    page = kernel_page.write_page(windows, tmp_path).read_text(encoding="utf-8")
    assert "![" not in page
    assert "## GEMM against fused" not in page
    assert "No GPU has windows of at least 3 families yet." in page
    assert row_of(page, "h100-pair-xy, 2 GPUs")[-1] == "-"  # no base power of its kind


def test_a_folder_without_windows_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnergyModelError, match=r"no \.jsonl"):
        read_boards(tmp_path)
    assert kernel_page.main([str(tmp_path), str(tmp_path / "docs")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "docs").exists()
    assert kernel_page.main(["a", "b", "c"]) == 2


def test_the_paper_states_what_the_page_quotes() -> None:
    known = kernel_tables.findings()
    stated = [known[name].stated for name in kernel_tables.STATED_BATCHES]
    assert stated == [0.197, 0.63]
    assert [known[name].stated for name in kernel_tables.GRAPH_FINDINGS] == [-0.2547, -0.0297]
