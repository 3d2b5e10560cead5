"""`energymodel fit` as a user runs it: a small slice of the committed windows fitted again."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from calibration.fitting.machine_fit import window_folds
from calibration.fitting.measurements import measured_watts, read_measurements
from calibration.validation.rows import DATA
from energymodel.calibrations import load_calibration
from energymodel.cli import app
from energymodel.datafiles import data_path
from energymodel.gpus import load_gpu

KERNELS = DATA / "kernels" / "h100-card-b.jsonl.gz"
SERVING = DATA / "serving" / "h100-card-a.jsonl.gz"
FAMILIES = ("llama-3.1-8b.gate_up", "llama-3.1-8b.qkv", "llama-3.2-1b.o", "qwen3-14b.down")

Record = dict[str, Any]


def records_of(path: Path) -> list[Record]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def some_kernels(change: Callable[[Record], Record] = lambda r: r) -> list[Record]:
    """Header, software, idle and base windows, and GEMMs of four shape families."""
    return [
        change(r)
        for r in records_of(KERNELS)
        if r["kind"] != "case" or r["op_class"] in ("idle", "base") or r["family"] in FAMILIES
    ]


def write(path: Path, records: list[Record]) -> Path:
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def fit(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["fit", *(str(a) for a in arguments)])


def refused(outcome: Result) -> str:
    assert outcome.exit_code == 2, outcome.output
    assert isinstance(outcome.exception, SystemExit), "a traceback"
    assert outcome.stdout == ""
    (message,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    return message


def test_windows_become_a_calibration_that_predict_takes(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.jsonl.gz", some_kernels())
    out = tmp_path / "mine.json"
    outcome = fit(windows, "--start", "h100-pcie", "--out", out)
    assert outcome.exit_code == 0, outcome.output
    fitted, start = load_calibration(str(out)), load_calibration("h100-pcie")
    assert fitted.gpu == "h100"
    assert fitted.origin == "measured"
    assert fitted.kernels["gemm"] != start.kernels["gemm"]
    assert "not measured, as before the fit: moe" in outcome.stdout
    assert fitted.cold_idle_watts == pytest.approx(96.86, abs=0.01)  # metered, not the start's
    assert fitted.power_cap_watts == 700.0
    known = fitted.provenance
    assert known["files"] == {hashlib.sha256(windows.read_bytes()).hexdigest(): "w.jsonl.gz"}
    assert known["board"] == "NVIDIA H100 80GB HBM3"
    assert known["boards_sha256"] == ["a48de78b98b32643"]
    assert known["driver"] == ["580.159.04"]
    assert known["software"]["vllm"] == ["0.22.0"]
    assert known["measured_on"] == ["2026-11-25"]
    assert known["shape_families"] == {"gemm": 4}
    assert "attention_decode" in known["classes_not_measured"]
    gemm = known["held_out_errors"]["gemm"]
    assert gemm["seconds"]["n"] == known["kernel_windows"]["gemm"]
    assert gemm["seconds"]["median"] < 0.12
    assert gemm["watts"]["median"] < 0.12
    assert "fewer than 3 held-out runs" in fitted.intervals["vllm"].basis
    predicted = CliRunner().invoke(
        app, ["predict", "--trace", "summarization", "--gpu", "h100", "--calibration", str(out)]
    )
    assert predicted.exit_code == 0, predicted.output
    assert "measured calibration of h100" in predicted.stdout


def test_the_same_windows_give_the_same_bytes_in_any_wrapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path / "a" / "w.jsonl", some_kernels())
    assert fit(first, "--out", tmp_path / "1.json").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert fit(tmp_path / "a").exit_code == 0  # a folder; the name is the GPU's
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "h100.json").read_bytes()
    with first.open("a") as file:
        file.write('{"kind":"case","torn')  # a killed run
    assert fit(first, "--out", tmp_path / "2.json").exit_code == 0
    one, two = (load_calibration(str(tmp_path / n)) for n in ("1.json", "2.json"))
    assert one.kernels == two.kernels


def test_serving_runs_tell_the_host_times_and_the_interval(tmp_path: Path) -> None:
    chosen = ("static-i128-o128-b1", "static-i128-o128-b32", "static-i2048-o1-b8")
    runs = [
        r
        for r in records_of(SERVING)
        if (r["model"], r["stack"]) == ("llama-3.2-1b", "vllm")
        and (r["kind"] in ("engine", "idle") or r.get("case_name") in chosen)
    ]
    for record in runs:
        record.pop("steps", None)
    folder = tmp_path / "data"
    write(folder / "kernels.jsonl", some_kernels())
    write(folder / "serving.jsonl.gz", runs)
    out = tmp_path / "mine.json"
    outcome = fit(folder, "--out", out, "--start", "h100-pcie")
    assert outcome.exit_code == 0, outcome.output
    fitted, start = load_calibration(str(out)), load_calibration("h100-pcie")
    assert fitted.stacks["vllm"] != start.stacks["vllm"]
    unmoved = fitted.stacks["transformers"].launch_seconds
    assert unmoved == pytest.approx(start.stacks["transformers"].launch_seconds, rel=1e-5)
    assert fitted.provenance["serving_runs"]["fitted"] == 3
    assert fitted.provenance["held_out_runs"]["vllm"]["joules"]["n"] == 3
    basis = fitted.intervals["vllm"].basis
    assert basis.startswith("2 x 1.25 x the largest error of 3 held-out serving runs")
    assert "no other model was measured" in basis
    assert "fewer than 3 held-out runs" in fitted.intervals["transformers"].basis
    assert "runs, vllm" in outcome.stdout


def test_eight_bit_products_get_their_own_efficiency_and_energy(tmp_path: Path) -> None:
    def halved(record: Record) -> Record:
        record = {**record, "case": record["case"].replace("bf16", "fp8"), "dtype": "fp8"}
        record["iteration_seconds"] *= 0.6
        record["hbm_bytes"] *= 0.5
        record["power_watts"] *= 1.1
        return record

    gemms = [r for r in some_kernels() if r.get("op_class") == "gemm"]
    windows = write(tmp_path / "w.jsonl", some_kernels() + [halved(r) for r in gemms])
    assert fit(windows, "--out", tmp_path / "8.json").exit_code == 0
    assert fit(write(tmp_path / "16.jsonl", some_kernels()), "--out", tmp_path / "16.json")
    both, only = (load_calibration(str(tmp_path / n)) for n in ("8.json", "16.json"))
    assert both.kernels["gemm"].eight_bit_efficiency != only.kernels["gemm"].eight_bit_efficiency
    # what was not measured keeps its ratio to bf16
    start = load_calibration("h100").joules_per_flop
    ratio = only.joules_per_flop["fp8"] / only.joules_per_flop["bf16"]
    assert ratio == pytest.approx(start["fp8"] / start["bf16"], rel=1e-4)
    ratio = both.joules_per_flop["fp8"] / both.joules_per_flop["bf16"]
    assert ratio != pytest.approx(start["fp8"] / start["bf16"], rel=1e-3)


def test_all_reduces_tell_the_link(tmp_path: Path) -> None:
    """Made up: 300 GB/s, 120 pJ/B and 25 W above a board whose kernels do nothing, on each of two.

    The time of small messages stays the start's: a serving engine sends them another way.
    """
    some = next(r for r in some_kernels() if r.get("op_class") == "gemm")
    alone = read_measurements([write(tmp_path / "alone.jsonl", some_kernels())])
    own = measured_watts(alone)
    running = own["base_watts"] + own["kernel_watts"]
    reduces = []
    for size in (2.0**14, 2.0**17, 2.0**20, 2.0**23, 2.0**26, 2.0**29):
        seconds = 9e-6 + size / 300e9
        reduces.append(
            {
                **some,
                **{"case": f"all_reduce.{size:.0f}", "op_class": "communication", "gpus": 2},
                **{"launcher": "all_reduce", "family": "all_reduce", "shape": {"bytes": size}},
                **{"flops": 0.0, "hbm_bytes": 0.0, "activation_bytes": 2 * size},
                **{"link_bytes": size, "iteration_seconds": seconds},
                "power_watts": 2 * (running + 25.0 + 120e-12 * size / seconds),
            }
        )
    windows = write(tmp_path / "w.jsonl", some_kernels() + reduces)
    outcome = fit(windows, "--out", tmp_path / "o.json")
    assert outcome.exit_code == 0, outcome.output
    fitted = load_calibration(str(tmp_path / "o.json"))
    link = load_gpu("h100").link_bytes_per_s
    kernel = fitted.kernels["communication"]
    assert kernel.memory_efficiency * link == pytest.approx(300e9, rel=0.02)
    start = load_calibration("h100").kernels["communication"]
    assert kernel.call_seconds == pytest.approx(start.call_seconds, rel=1e-5)
    assert fitted.joules_per_link_byte == pytest.approx(120e-12, rel=0.02)
    assert kernel.active_watts == pytest.approx(25.0, abs=0.5)  # what awake links draw
    assert fitted.provenance["kernel_windows"]["communication"] == 6
    assert "communication" not in fitted.provenance["classes_not_measured"]


def test_a_start_that_has_seen_the_windows_is_pointed_out(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.jsonl", some_kernels())
    first = fit(windows, "--out", tmp_path / "1.json")
    assert "fitted to" not in first.stdout
    again = fit(windows, "--start", tmp_path / "1.json", "--out", tmp_path / "2.json")
    assert again.exit_code == 0, again.output
    assert "fitted to w.jsonl too" in again.stdout


def named(name: str) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        if record["kind"] != "header":
            return record
        board = {**record["identity"]["gpus"][0], "name": name}
        return {**record, "identity": {**record["identity"], "gpus": [board]}}

    return change


def limited(record: Record) -> Record:
    record = named("NVIDIA H100 80GB HBM3")(record)
    if record["kind"] == "header":
        record["identity"]["gpus"][0]["power_limit_watts"] = 500.0
    return record


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.jsonl", some_kernels())
    out = ("--out", tmp_path / "o.json")
    assert "cannot read" in refused(fit(tmp_path / "none.jsonl", *out))
    (tmp_path / "empty").mkdir()
    assert "no .jsonl" in refused(fit(tmp_path / "empty", *out))
    trace = write(tmp_path / "trace.jsonl", [{"timestamp": 0, "input_length": 3}])
    assert "neither kernel windows" in refused(fit(windows, trace, *out))
    a100 = write(tmp_path / "a.jsonl", some_kernels(named("NVIDIA A100-SXM4-80GB")))
    assert "several GPUs" in refused(fit(windows, a100, *out))
    assert "was measured on a" in refused(fit(windows, "--gpu", "a100", *out))
    low = write(tmp_path / "low.jsonl", some_kernels(limited))
    assert "several power limits (500 W, 700 W)" in refused(fit(windows, low, *out))
    few = [r for r in some_kernels() if r["kind"] != "case" or r["family"] == FAMILIES[0]]
    assert "too few to fit" in refused(fit(write(tmp_path / "few.jsonl", few), *out))
    headers = [r for r in some_kernels() if r["kind"] == "header"]
    assert "no valid kernel window" in refused(fit(write(tmp_path / "h.jsonl", headers), *out))
    before = windows.read_bytes()
    assert "would overwrite" in refused(fit(windows, "--out", windows))
    assert windows.read_bytes() == before
    assert not (tmp_path / "o.json").exists()


def test_steady_states_are_serving_records_too(tmp_path: Path) -> None:
    engine = {"kind": "engine", "identity": {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]}}
    files = [
        write(tmp_path / "w.jsonl", some_kernels()),
        write(tmp_path / "s.jsonl", [engine, {"kind": "steady"}, {"kind": "done"}]),
    ]
    measured = read_measurements(files)
    assert measured.serving_files == (files[1],)
    assert measured.gpu.name == "h100"


def test_an_unknown_board_is_named_by_the_user(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.jsonl", some_kernels(named("NVIDIA H100 Mystery")))
    assert "say which it is with --gpu" in refused(fit(windows, "--out", tmp_path / "o.json"))
    outcome = fit(windows, "--gpu", "h100", "--out", tmp_path / "o.json")
    assert outcome.exit_code == 0, outcome.output
    assert load_calibration(str(tmp_path / "o.json")).provenance["board"] == "NVIDIA H100 Mystery"


def test_a_gpu_of_the_user_s_own_starts_from_one_like_it(tmp_path: Path) -> None:
    windows = write(tmp_path / "w.jsonl", some_kernels(named("NVIDIA H300")))
    mine = tmp_path / "my-gpu.json"
    mine.write_bytes(data_path("gpus", "h100.json").read_bytes().replace(b"H100", b"H300"))
    out = ("--gpu", mine, "--out", tmp_path / "o.json")
    assert "start from with --start. Known: a100" in refused(fit(windows, *out))
    outcome = fit(windows, *out, "--start", "h100")
    assert outcome.exit_code == 0, outcome.output
    assert load_calibration(str(tmp_path / "o.json")).gpu == "my-gpu"
    predicted = CliRunner().invoke(
        app,
        [
            *("predict", "--trace", "summarization", "--gpu", str(mine)),
            *("--calibration", str(tmp_path / "o.json")),
        ],
    )
    assert predicted.exit_code == 0, predicted.output


def test_folds_hold_whole_families_and_one_of_a_small_class() -> None:
    families = [*(f"gemm {i}" for i in range(19)), *("moe a", "moe b", "moe c"), "gemm 3", "moe a"]
    classes = [name.split()[0] for name in families]
    fold = window_folds(classes, families)
    assert len({*zip(families, fold.tolist(), strict=True)}) == 22  # a family has one fold
    of_moe = {f: number for f, number in zip(families, fold.tolist(), strict=True) if f[0] == "m"}
    assert len(set(of_moe.values())) == 3
    sizes = np.bincount(fold[:19])
    assert sizes.max() - sizes.min() <= 1
