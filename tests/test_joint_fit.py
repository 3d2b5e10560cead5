"""The joint fit of serving runs and kernel windows, and the transfer to unmeasured GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shapes import calibration, gpu, tiny

from calibration.fitting.joint_fit import joint_fit, predicted_windows
from calibration.fitting.kernel_windows import kernel_rows, read_windows, reread_bytes
from calibration.fitting.measured_runs import read_idle, read_own
from calibration.fitting.measurements import idle_watts, measured_watts, read_measurements
from calibration.fitting.parameters import (
    PARAMETERS,
    Parameter,
    parameters_for,
    value_at,
    with_values,
)
from calibration.fitting.serving_runs import Run, simulated
from calibration.fitting.transfer import start_from, transfer
from calibration.validation.rows import DATA, MeasuredRow, offline
from energymodel.calibrations import Calibration, load_calibration, save_calibration
from energymodel.costs import cost_tables
from energymodel.datafiles import data_path
from energymodel.deployment import Deployment
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.specs import ServingConfig

WINDOWS = DATA / "kernels" / "h100-card-b.jsonl.gz"


def test_parameters_are_read_and_replaced_by_their_paths() -> None:
    before = load_calibration("h100")
    for parameter in PARAMETERS:
        for path in parameter.paths:
            after = with_values(before, {path: 0.123})
            assert value_at(after, path) == 0.123
            assert with_values(after, {path: value_at(before, path)}) == before


def run(truth: Calibration, stack: str, inputs: int, outputs: int, batch: int) -> Run:
    serving = ServingConfig(stack=stack, max_batch=64, max_step_tokens=2048)  # type: ignore[arg-type]
    deployment = Deployment(
        gpu=gpu(),
        model=tiny(),
        serving=serving,
        calibration=truth,
        costs=cost_tables(tiny(), serving, gpu(), truth),
    )
    row = MeasuredRow(
        source="made up",
        name="row",
        gpu="round",
        model=tiny(),
        model_name="tiny",
        stack=stack,
        phase="batch",
        batch=batch,
        requests=offline("row", [inputs] * batch, outputs),
        joules_per_output_token=None,
        seconds_per_output_token=1.0,
    )
    made = Run(row=row, deployment=deployment, joules=0.0, seconds=0.0)
    joules, seconds, *_ = simulated([made], truth)
    return replace(made, joules=float(joules[0]), seconds=float(seconds[0]))


def test_the_fit_finds_the_parameters_that_made_the_runs() -> None:
    truth = calibration()
    shapes = [(8, 40, 1), (64, 40, 8), (128, 2, 32), (500, 1, 4), (1000, 30, 2), (16, 60, 64)]
    runs = [run(truth, stack, *shape) for stack in ("vllm", "vllm-eager") for shape in shapes]
    windows = kernel_rows(read_windows(WINDOWS)[:20], gpu())
    windows = replace(windows, seconds=predicted_windows(windows, gpu(), truth)[0])
    windows = replace(windows, watts=predicted_windows(windows, gpu(), truth)[1])
    wanted = {
        "stacks.vllm.step_host_seconds": 1e-4,
        "stacks.vllm-eager.launch_seconds": 9e-6,
        "base_watts": 100.0,
        "joules_per_hbm_byte": 1.2e-10,
    }
    parameters = [Parameter(paths=(path,), prior=3.0) for path in wanted]
    fit = joint_fit(runs, windows, gpu(), with_values(truth, wanted), parameters)
    for path in wanted:
        assert value_at(fit.calibration, path) == pytest.approx(value_at(truth, path), rel=0.02)
        assert 0.0 < fit.log_std[path] < 0.5


def test_boards_that_draw_differently_get_levels_of_their_own() -> None:
    truth = replace(calibration(), power_cap_watts=5000.0)
    windows = kernel_rows(read_windows(WINDOWS), gpu())
    boards = tuple("even" if i % 2 else "hungry" for i in range(len(windows)))
    levels = {"even": 0.97, "hungry": 1.03}
    windows = replace(windows, board=boards)
    seconds, watts = predicted_windows(windows, gpu(), truth, levels)
    windows = replace(windows, seconds=seconds, watts=watts)
    parameters = [Parameter(paths=("joules_per_hbm_byte",), prior=3.0)]
    start = with_values(truth, {"joules_per_hbm_byte": 1.2e-10})
    fit = joint_fit([], windows, gpu(), start, parameters)
    apart = np.log(fit.board_levels["hungry"] / fit.board_levels["even"]) / np.log(1.03 / 0.97)
    assert 0.75 < apart < 1.0  # the prior holds it back
    assert value_at(fit.calibration, "joules_per_hbm_byte") == pytest.approx(
        truth.joules_per_hbm_byte, rel=0.02
    )
    alone = replace(windows, board=("one",) * len(windows))
    assert joint_fit([], alone, gpu(), start, parameters).board_levels == {}


def test_idle_states_of_serving_runs_are_those_of_a_gpu_with_its_clocks_up() -> None:
    states = read_idle(DATA / "serving", "h100")
    assert {state for _, state, _ in states} == {"context", "polling"}
    assert all(105.0 < watts < 140.0 for *_, watts in states)
    assert len({board for board, *_ in states}) > 3
    assert read_idle(DATA / "serving", "a100") == []


def test_each_board_counts_alike_in_the_idle_states(tmp_path: Path) -> None:
    # board a idles 10 W above board b, polling takes 2 W more than a context; b never polled and
    # was measured three times
    header = {"kind": "header", "identity": {"gpus": [{"name": "NVIDIA H200"}]}}

    def file(board: str, *idle: tuple[str, float]) -> Path:
        records = [header | {"identity": {"gpus": [{"name": "NVIDIA H200", "uuid_sha256": board}]}}]
        for state, watts in idle:
            window = {"kind": "case", "case": f"idle.{state}", "op_class": "idle", "valid": True}
            records.append(window | {"power_watts": watts})
        path = tmp_path / f"{board}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    a = file("a", ("cold", 80.0), ("context", 130.0), ("polling", 132.0))
    b = file("b", ("cold", 90.0), *[("context", 120.0)] * 3)
    states, boards = idle_watts(read_measurements([a, b]))
    assert states == pytest.approx({"cold": 85.0, "context": 125.0, "polling": 127.0})
    assert boards == pytest.approx({"a": 5.0, "b": -5.0})
    assert measured_watts(read_measurements([a, b]))["base_watts"] == pytest.approx(125.0)


def test_windows_of_a_board_start_from_what_it_idles_at() -> None:
    windows = read_windows(WINDOWS)[:20]
    for window in windows:
        window["board"] = "warm"
    plain = kernel_rows(windows, gpu())
    warm = kernel_rows(windows, gpu(), {"warm": 6.0})
    more = predicted_windows(warm, gpu(), calibration())[1]
    np.testing.assert_allclose(more, predicted_windows(plain, gpu(), calibration())[1] + 6.0)


@pytest.mark.parametrize(
    "name",
    sorted(
        p.stem for p in data_path("calibrations").glob("*.json") if p.stem not in ("h100", "h200")
    ),
)
def test_transferred_calibrations_are_made_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    again = tmp_path / f"{name}.json"
    save_calibration(transfer(name, load_calibration("h100")), again)
    assert again.read_bytes() == data_path("calibrations", f"{name}.json").read_bytes()


def test_every_gpu_has_a_calibration_with_an_interval_as_wide_as_its_origin() -> None:
    widths = {}
    for path in data_path("gpus").glob("*.json"):
        own = load_calibration(path.stem)
        interval = own.intervals["vllm"]
        widths.setdefault(own.origin, []).append(interval.high / interval.low)
        assert own.base_watts < own.power_cap_watts
        # two of them are measured apart, to within a few watts
        assert own.cold_idle_watts <= own.polling_idle_watts <= 1.03 * own.base_watts
    assert max(widths["measured"]) < min(widths["datasheet"])


def test_another_chip_keeps_the_kernel_times_of_its_own_tables() -> None:
    # the H100's correction took the A100's products to 336 TFLOP/s, of 312 in its datasheet
    own = load_calibration(str(DATA / "public" / "a100.json"))
    moved = transfer("a100", load_calibration("h100"))
    for told in own.provenance["rows"]:
        assert moved.kernels[told].compute_efficiency == own.kernels[told].compute_efficiency
        assert moved.kernels[told].call_seconds == own.kernels[told].call_seconds
    assert moved.kernels["elementwise"].call_seconds != own.kernels["elementwise"].call_seconds


def test_transfer_refuses_what_no_rule_covers() -> None:
    with pytest.raises(EnergyModelError, match="Known"):
        transfer("b300", load_calibration("h100"))


def test_experts_larger_than_the_l2_are_read_for_each_block_of_rows() -> None:
    windows = read_windows(DATA / "kernels" / "h100-card-h.jsonl.gz")
    rows = kernel_rows(windows, load_gpu("h100"))
    counted = {w["case"]: w["hbm_bytes"] for w in windows if w["hbm_bytes"]}
    read = {
        name: moved / counted[name]
        for name, moved in zip(rows.name, rows.hbm_bytes, strict=True)
        if name in counted
    }
    # 1,024 (token, expert) pairs of 256 tokens on 8 experts, blocks of 64 rows, launched in order
    window = next(w for w in windows if w["case"] == "moe.fused.mixtral-8x7b.t256")
    assert window["details"]["config"]["GROUP_SIZE_M"] == 1
    blocks = window["details"]["expert_rows"] / window["details"]["config"]["BLOCK_SIZE_M"]
    # two thirds of the weights are the up-projection, of 224 blocks of columns; the down-projection
    # has 32, so that four blocks of rows run at a time and share what they read
    assert read["moe.fused.mixtral-8x7b.t256"] == pytest.approx((2 * blocks / 8 + 1) / 3)
    assert read["moe.fused.qwen3-30b-a3b.t256"] == 1.0  # experts of 9 MB stay in the L2


def reread(**changes: float) -> float:
    # 10 blocks of rows on 4 experts of 100 MB, 200 blocks of columns; the round GPU's L2 holds 50
    work = {
        "row_blocks": 10.0,
        "distinct_experts": 4.0,
        "matrix_bytes": 1e8,
        "column_blocks": 200.0,
    }
    arrays = {k: np.array(v) for k, v in (work | changes).items()}
    return float(reread_bytes(**arrays, gpu=gpu()))


def test_experts_are_read_again_by_hand() -> None:
    assert reread() == 6e8
    assert reread(row_blocks=3.0) == 0.0
    assert reread(matrix_bytes=1e6) == 0.0  # stays in the L2
    assert reread(column_blocks=100.0) == 0.0  # 132 SMs take two blocks of rows at a time


def test_other_kernels_than_the_classes_are_no_rows() -> None:
    windows = read_windows(DATA / "kernels" / "h100-card-j.jsonl.gz")
    rows = kernel_rows(windows, load_gpu("h100"))
    kinds = {name.split(".")[1] for name in rows.name if name.startswith("elementwise")}
    assert kinds == {"residual_add"}
    assert not [name for name in rows.name if name.startswith(("copy", "sampling.random"))]


def test_experts_that_were_not_counted_leave_a_run_out() -> None:
    rows, left_out = read_own([DATA / "serving" / "h100-card-i.jsonl.gz"])
    assert {row.model_name for row in rows} == {"llama-3.1-8b"}
    reasons = {entry.reason: entry.rows for entry in left_out}
    assert reasons["mixture of experts whose chosen experts were not counted"] == 10


def test_experts_that_every_token_shares_leave_a_run_out() -> None:
    rows, left_out = read_own([DATA / "serving" / "h100-card-m.jsonl.gz"])
    assert "gpt-oss-20b" not in {row.model_name for row in rows}
    assert [e.rows for e in left_out if "every token chose the same" in e.reason] == [6]


def test_only_what_was_measured_is_fitted() -> None:
    start = load_calibration("h100")

    def names(**changes: object) -> set[str]:
        told = {"classes": {"gemm"}, "dtypes": {"bf16"}, "stacks": set(), "tensor_parallel": False}
        return {p.paths[0] for p in parameters_for(start, **(told | changes))}  # type: ignore[arg-type]

    alone = names()
    assert {"kernels.gemm.split_seconds", "joules_per_flop.bf16"} <= alone
    assert "base_watts" not in alone | names(stacks={"vllm"})  # measured alone
    assert not [n for n in alone if n.startswith("stacks") or "moe" in n or "link" in n]
    assert "kernel_gap_seconds" not in alone
    assert "joules_per_flop.fp8" in names(dtypes={"bf16", "fp8"})
    runs = names(stacks={"vllm"})
    assert {"stacks.vllm.step_host_seconds", "kernel_gap_seconds"} <= runs
    assert "stacks.transformers.launch_seconds" not in runs
    assert "joules_per_link_byte" in names(stacks={"vllm"}, tensor_parallel=True)


def test_a_start_of_another_gpu_is_transferred_where_rules_know_both() -> None:
    h100 = load_calibration("h100")
    moved = start_from("h100", "h200")
    assert moved.gpu == "h100"  # says where it is from
    assert moved.kernels == transfer("h200", h100).kernels
    assert moved.joules_per_hbm_byte == h100.joules_per_hbm_byte
    # the L2 is as fast on both, the memory behind it is not
    memory = load_gpu("h100").hbm_bytes_per_s / load_gpu("h200").hbm_bytes_per_s
    assert moved.onchip_speedup == pytest.approx(h100.onchip_speedup * memory)
    assert start_from("h100", "h100") == h100
    assert start_from("l4", "h200") == load_calibration("l4")  # never measured itself


@pytest.mark.parametrize("name", ["l4", "l40s", "a6000", "rtx-6000-ada", "b200", "a100"])
def test_no_kernel_of_a_transferred_gpu_draws_more_than_its_board_may(name: str) -> None:
    made, board = load_calibration(name), load_gpu(name).tdp_watts
    assert max(k.active_watts for k in made.kernels.values()) + made.base_watts < board
