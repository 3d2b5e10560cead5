"""The reader of the public kernel tables, and that the shipped calibrations fit them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from calibration.fitting.fit_kernels import predicted_seconds, summarize
from calibration.fitting.public_tables import (
    _expert_load,
    read_all_reduce,
    read_context_attention,
    read_gemm,
    read_generation_attention,
    read_moe,
    read_rows,
)
from calibration.validation.rows import DATA
from energymodel.calibrations import Calibration, load_calibration
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.tiles import SOFTMAX_WIDTH, TILE

TABLES = Path(__file__).parents[2] / "shared/data/validation/aiconfigurator"
needs_tables = pytest.mark.skipif(
    not TABLES.is_dir(), reason="the public kernel tables lie beside the checkout, not in it"
)
H200 = load_gpu("h200")


def write(folder: Path, kind: str, **columns: object) -> Path:
    path = folder / f"h200_sxm_x_vllm_0.22.0_{kind}_perf.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


def test_gemm_units_and_cold_weights(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "gemm",
        gemm_dtype=["bfloat16", "bfloat16", "fp8_block"],
        m=[16, 16, 16],
        n=[8192, 128, 8192],
        k=[4096, 128, 4096],
        latency=[0.02, 0.0025, 0.08],
        power=[500.0, 130.0, 130.0],
    )
    rows = read_gemm(path, H200)
    # six copies of the 128 x 128 weights stay in the L2, fp8_block times the host
    assert rows.family == ("8192x4096",)
    assert rows.seconds == pytest.approx([20e-6])
    assert rows.executed_flops == pytest.approx([2 * 16 * 8192 * 4096])
    assert rows.hbm_bytes == pytest.approx([2 * 8192 * 4096])
    # 3,000 replays of six calls of 20 us are 0.36 s: too short for the power to rise
    assert np.isnan(rows.watts).all()
    assert np.isnan(rows.clock).all()


def attention(**columns: object) -> dict[str, object]:
    base = {
        "batch_size": [64, 64, 64],
        "isl": [1, 1, 1],
        "step": [4095, 4095, 1],
        "num_heads": [32, 4, 32],
        "num_key_value_heads": [8, 4, 8],
        "head_dim": [128, 128, 128],
        "kv_cache_dtype": ["bfloat16"] * 3,
        "window_size": [0, 0, 0],
        "latency": [0.4, 0.4, 0.01],
        "version": ["0.22.0"] * 3,
    }
    return base | columns


def test_decode_attention_reads_caches_from_device_memory(tmp_path: Path) -> None:
    rows = read_generation_attention(write(tmp_path, "generation_attention", **attention()), H200)
    assert rows.family == ("32x8x128",)
    assert rows.hbm_bytes == pytest.approx([64 * 4096 * 8 * 2 * 128 * 2])
    # the four query heads of a KV head in a tile of 128 rows
    assert rows.executed_flops == pytest.approx([4 * 64 * 4096 * 8 * 128 * 128])
    assert rows.tiles == pytest.approx([64 * 8])
    assert rows.clock == pytest.approx([1.0])  # no power column: too short for the limit


def test_prefill_attention_fills_tiles_like_the_simulator(tmp_path: Path) -> None:
    columns = attention(isl=[200, 200, 64], step=[0, 0, 0])
    rows = read_context_attention(write(tmp_path, "context_attention", **columns), H200)
    pairs = 256 * (256 + TILE) / 2
    assert rows.executed_flops == pytest.approx([64 * 32 * 4 * (128 + SOFTMAX_WIDTH) * pairs])
    assert rows.tiles == pytest.approx([64 * 2 * 32])
    # queries and outputs, keys and values once each
    assert rows.activation_bytes == pytest.approx([64 * 256 * (2 * 32 + 2 * 8) * 128 * 2])
    columns["version"] = ["0.24.0"] * 3
    writing = read_context_attention(write(tmp_path, "context_attention", **columns), H200)
    assert writing.activation_bytes == pytest.approx([64 * 256 * (2 * 32 + 6 * 8) * 128 * 2])


def test_experts_of_a_balanced_batch(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "moe",
        moe_dtype=["bfloat16"],
        version=["0.22.0"],
        num_tokens=[64],
        hidden_size=[4096],
        inter_size=[14336],
        topk=[2],
        num_experts=[8],
        moe_tp_size=[2],
        moe_ep_size=[1],
        distribution=["balanced"],
        latency=[0.7],
    )
    rows = read_moe(path, H200)
    # 16 rows for each of 8 experts in tiles of 32
    assert rows.family == ("8x2x7168x4096",)
    assert rows.executed_flops == pytest.approx([2 * 8 * 32 * 3 * 7168 * 4096])
    assert rows.hbm_bytes == pytest.approx([2 * 8 * 3 * 7168 * 4096])


@pytest.mark.parametrize("law", ["power_law_1.01", "power_law_1.2"])
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_expert_loads_hold_every_token(law: str, tokens: int) -> None:
    distinct, rows = _expert_load(tokens, 64, 8, law, 16.0, np.random.default_rng(1))
    assert 8 <= distinct <= 64
    assert rows >= 8 * tokens
    assert rows <= 8 * tokens + 15 * distinct
    # a skewed law touches no more experts than a balanced one
    balanced, _ = _expert_load(tokens, 64, 8, "balanced", 16.0, np.random.default_rng(1))
    assert distinct <= balanced


def test_all_reduce_counts_sixteen_bit_elements(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "custom_allreduce",
        backend=["vllm_graph", "vllm_eager"],
        num_gpus=[4, 4],
        message_size=[1024, 1024],
        latency=[0.005, 0.02],
    )
    rows = read_all_reduce(path, H200)
    assert rows.link_bytes == pytest.approx([2 * 3 / 4 * 2048])


def test_a_folder_without_tables_and_a_broken_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EnergyModelError, match="no table of h200"):
        read_rows(tmp_path, H200)
    path = write(tmp_path, "gemm", gemm_dtype=["bfloat16"], m=[1])
    with pytest.raises(EnergyModelError, match=path.name):
        read_rows(tmp_path, H200)


def public_fit_of(name: str) -> Calibration:
    return load_calibration(str(DATA / "public" / f"{name}.json"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "calibration.fitting.public_fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    unknown = run("b300", "--tables", str(tmp_path))
    assert unknown.returncode == 2
    assert "h100" in unknown.stderr
    empty = run("a100", "--tables", str(tmp_path))
    assert empty.returncode == 2
    assert "no table of a100" in empty.stderr
    nowhere = run("a100", "--tables", str(tmp_path), "--out", str(tmp_path / "no" / "a100.json"))
    assert nowhere.returncode == 2
    assert "Traceback" not in unknown.stderr + empty.stderr + nowhere.stderr


@needs_tables
def test_command_writes_a_calibration_again(tmp_path: Path) -> None:
    out = tmp_path / "a100.json"
    result = run("a100", "--tables", str(TABLES), "--out", str(out))
    assert result.returncode == 0, result.stderr
    written, committed = load_calibration(str(out)), public_fit_of("a100")
    assert written.stacks == committed.stacks
    for name, kernel in committed.kernels.items():
        again = written.kernels[name]
        assert again.memory_efficiency == pytest.approx(kernel.memory_efficiency, rel=0.01)


@needs_tables
@pytest.mark.parametrize("name", ["a100", "h100", "h200"])
def test_committed_fits_predict_the_tables(name: str) -> None:
    """Medians over all rows stay within a point of the held-out ones in the provenance."""
    gpu, calibration = load_gpu(name), public_fit_of(name)
    rows = read_rows(TABLES, gpu)
    held_out = calibration.provenance["held_out_errors"]
    for op_class in dict.fromkeys(rows.op_class):
        picked = rows.of_class(op_class)
        error = summarize(predicted_seconds(picked, gpu, calibration), picked.seconds)
        assert error.n == held_out[op_class]["n"]
        assert error.median <= held_out[op_class]["median"] + 0.01
