"""Work counted by operator: published counts, vLLM's tile rule, and what must add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.fitting.kernel_windows import read_windows
from energymodel.calibrations import load_calibration
from energymodel.expert_tiles import with_tuned_tiles
from energymodel.experts import (
    distinct_experts,
    expert_rows,
    moe_tile_rows,
    packed_tile_rows,
    wide_tile_saving,
)
from energymodel.gpus import load_gpu
from energymodel.models import load_model
from energymodel.operator_parts import QUANTISE_BYTES
from energymodel.operators import (
    STATS,
    moe_spec,
    operator_table,
    query_tile_tokens,
    step_stats,
)
from energymodel.specs import MoeSpec, ServingConfig
from energymodel.step_costs import pairs
from energymodel.tiles import (
    decode_head_width,
    decode_key_block,
    decode_query_rows,
    prompt_tile_tokens,
)
from tests.shapes import llama_8b, tiny

WINDOWS = sorted((Path(__file__).parents[1] / "calibration/data/kernels").glob("h200-*"))


def test_flops_of_a_token_are_two_per_weight() -> None:
    table = operator_table(llama_8b(), ServingConfig())
    per_token = table.flops[:, STATS.index("tokens")].sum()
    weights = 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert per_token == pytest.approx(2.0 * weights)


def test_executed_flops_hold_the_useful_ones() -> None:
    for model in (llama_8b(), tiny(experts=8), load_model("deepseek-v2-lite")):
        table = operator_table(model, ServingConfig())
        stats = step_stats(model, tokens=300.0, rows=3.0, decode_kv_tokens=1e3, prefill_pairs=1e5)
        assert (stats @ table.executed_flops.T >= stats @ table.flops.T * (1 - 1e-12)).all()


def test_tile_rows_are_vllm_0_22s() -> None:
    # fused_moe.get_default_config, 16-bit weights
    tokens = np.array([1, 32, 33, 96, 97, 512, 513, 8192])
    assert moe_tile_rows(tokens).tolist() == [16, 16, 32, 32, 64, 64, 128, 128]


def test_tile_rows_are_those_of_the_measured_launches() -> None:
    # a window holds the launch that vLLM chose on that board, tuned for it or by the rule
    found = tuned = 0
    for path in sorted(WINDOWS[0].parent.glob("h?00-card-*")):
        gpu = load_gpu(path.name.partition("-")[0])
        for window in read_windows(path):
            if window["launcher"] != "moe_fused":
                continue
            shape = {k: int(v) for k, v in window["shape"].items()}
            spec = MoeSpec(
                num_experts=shape["experts"],
                experts_per_token=shape["top_k"],
                expert_intermediate_size=shape["width"],
            )
            group = replace(tiny().layers[0], feed_forward=spec)
            model = with_tuned_tiles(replace(tiny(), layers=(group,)), ServingConfig(), gpu)
            tiles = model.layers[0].feed_forward.tiles  # type: ignore[union-attr]
            found, tuned = found + 1, tuned + bool(tiles)
            tokens, config = np.array([float(shape["tokens"])]), window["details"]["config"]
            assert moe_tile_rows(tokens, tiles)[0] == config["BLOCK_SIZE_M"], window["case"]
            is_wide = config["BLOCK_SIZE_N"] == 256
            assert (wide_tile_saving(tokens, tiles)[0] > 0.0) == is_wide, window["case"]
    assert found > 100
    assert tuned >= 10


def test_tuned_tiles_are_vllms_on_the_gpu_they_were_tuned_for() -> None:
    model, serving = load_model("qwen3-30b-a3b"), ServingConfig()

    def tiles(gpu: str, serving: ServingConfig) -> tuple[tuple[float, int, int], ...]:
        moe = moe_spec(with_tuned_tiles(model, serving, load_gpu(gpu)))
        assert moe is not None
        return moe.tiles

    # E=128,N=768,device_name=NVIDIA_H200.json: 16 rows for 128 tokens, 32 for 256, 64 for 512
    found, tokens = tiles("h200", serving), np.array([128.0, 256.0, 512.0, 1024.0])
    assert moe_tile_rows(tokens, found).tolist() == [16, 32, 64, 128]
    assert (wide_tile_saving(tokens, found) > 0.0).tolist() == [False, True, False, True]
    assert tiles("h100", serving) == ()
    assert tiles("h100", replace(serving, tensor_parallel=2)) != ()  # 128 experts of width 384
    assert tiles("h200", replace(serving, weight_dtype="fp8")) == ()
    assert tiles("h200", replace(serving, stack="transformers")) == ()


def test_a_prompt_fills_tiles_with_the_query_heads_of_a_kv_head() -> None:
    # four heads: 32 tokens a tile of 128 rows; eight of 64: 24 tokens a tile of 192
    assert float(prompt_tile_tokens(4.0, 128)) == 32.0
    assert float(prompt_tile_tokens(8.0, 64)) == 24.0
    llama, serving = llama_8b(), ServingConfig()
    assert query_tile_tokens(llama, serving) == 32.0
    assert query_tile_tokens(llama, replace(serving, tensor_parallel=8)) == 32.0
    assert query_tile_tokens(llama, replace(serving, tensor_parallel=16)) == 64.0  # KV heads twice
    assert query_tile_tokens(llama, replace(serving, stack="transformers")) == 128.0


def test_pairs_of_a_prompt_by_hand() -> None:
    # 64 rows see one block of 128 keys; 160: 128 see one, 32 see two; each sees all keys before
    assert pairs(0.0, 64.0, 0.0, 32.0)[0] == 64 * 128
    assert pairs(0.0, 160.0, 0.0, 32.0)[0] == 128 * 128 + 32 * 256
    assert pairs(1000.0, 160.0, 0.0, 32.0)[0] == 160 * 1000 + 128 * 128 + 32 * 256
    # 160 tokens in tiles of 128 are 256 rows
    assert pairs(0.0, 160.0, 0.0, 128.0)[0] == 128 * 128 + 128 * 256
    for count, tile in ((64, 32.0), (200, 32.0), (5, 128 / 7), (4096, 128.0)):
        full, _ = pairs(300.0, float(count), 0.0, tile)
        assert pairs(300.0, float(count), 1e6, tile) == (full, full)
        assert pairs(300.0, float(count), 100.0, tile)[1] < full


def test_decode_attention_multiplies_whole_tiles_of_queries() -> None:
    # 32 heads on 8 KV heads fill 4 of 128 rows; with 33 queries a sequence 132 rows, two tiles
    assert decode_query_rows(np.array([1.0, 4.0, 128.0, 132.0])).tolist() == [128, 128, 128, 256]
    # heads of 64: 192 keys at a time (FlashAttention 3, tile_size_fwd_sm90)
    assert decode_key_block(np.array([64.0, 96.0, 128.0])).tolist() == [192, 128, 128]
    table = operator_table(llama_8b(), ServingConfig())
    at = table.names.index("attention_decode")
    executed = dict(zip(STATS, table.executed_flops[at], strict=True))
    useful = dict(zip(STATS, table.flops[at], strict=True))
    assert executed["decode_kv_tokens"] == 32 * useful["decode_kv_tokens"]
    # the last block of 128 keys is half empty on average
    assert executed["decode_sequences"] == 64 * executed["decode_kv_tokens"]


@given(
    tokens=st.integers(1, 20000),
    experts=st.sampled_from([8, 64, 128, 256]),
    top_k=st.sampled_from([1, 2, 8]),
)
def test_expert_rows_lie_between_exact_and_full_padding(
    tokens: int, experts: int, top_k: int
) -> None:
    sizes = np.array([float(tokens)])
    rows = expert_rows(sizes, experts, top_k)[0]
    distinct = distinct_experts(sizes, experts, top_k)[0]
    tile = moe_tile_rows(sizes)[0]
    assert rows >= tokens * top_k
    assert rows <= tokens * top_k + 1.05 * distinct * tile


def test_expert_rows_against_random_routing() -> None:
    generator = np.random.default_rng(0)
    for tokens in (4, 60, 300, 2000):
        drawn = []
        for _ in range(50):
            chosen = np.argsort(generator.random((tokens, 64)), axis=1)[:, :8]
            counts = np.bincount(chosen.ravel(), minlength=64)
            tile = moe_tile_rows(np.float64(tokens))
            drawn.append((np.ceil(counts / tile) * tile).sum())
        expected = expert_rows(np.array([float(tokens)]), 64, 8)[0]
        assert expected == pytest.approx(np.mean(drawn), rel=0.03)


def test_tile_rows_of_packed_experts_are_triton_kernels() -> None:
    # opt_flags of triton_kernels: tokens of an expert on average, up to a power of two, 16 to 128
    tokens = np.array([1, 64, 128, 136, 200, 256, 300, 1024, 4096])
    assert packed_tile_rows(tokens, 32, 4).tolist() == [16, 16, 16, 32, 32, 32, 64, 128, 128]


def test_rows_of_packed_experts_are_those_of_the_measured_routings() -> None:
    # eight routings are drawn for a window: their means scatter by some per cent
    found = [w for f in WINDOWS for w in read_windows(f) if w["op_class"] == "moe_packed"]
    assert len(found) >= 12
    for window in found:
        shape = window["shape"]
        size = np.array([float(shape["tokens"])])
        chosen = int(shape["experts"]), int(shape["top_k"])
        counted = window["details"]
        assert distinct_experts(size, *chosen)[0] == pytest.approx(
            counted["distinct_experts"], rel=0.08
        )
        rows = expert_rows(size, *chosen, packed=True)[0]
        assert rows == pytest.approx(counted["expert_rows"], rel=0.08)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int4"])
def test_products_by_the_format_of_their_weights(dtype: str) -> None:
    table = operator_table(llama_8b(), ServingConfig(weight_dtype=dtype))
    at = table.names.index("up_proj")
    classes = {"bf16": "gemm", "fp8": "gemm_scaled", "int4": "gemm_packed"}
    assert table.op_class[at] == classes[dtype]
    assert table.op_class[table.names.index("logits")] == "gemm"  # stays in 16 bit
    quantised = [n for n in table.names if n.endswith("_quantise")]
    assert quantised == (["attention_quantise", "mlp_quantise"] if dtype == "fp8" else [])
    if quantised:  # inputs of qkv and o, of up and down: read twice, written once in 8 bit
        per_token = table.activation_bytes[:, STATS.index("tokens")]
        passed = [per_token[table.names.index(n)] for n in quantised]
        assert passed == pytest.approx([32 * 2 * 4096 * 5.0, 32 * (4096 + 14336) * 5.0])


def test_packed_experts_route_themselves() -> None:
    model = replace(tiny(experts=8), expert_dtype="mxfp4")
    table = operator_table(model, ServingConfig())
    assert table.op_class[table.names.index("experts")] == "moe_packed"
    assert "routing" not in table.names
    assert "routing" in operator_table(tiny(experts=8), ServingConfig()).names


@pytest.mark.parametrize("tokens", [1024, 8192])
def test_making_8_bit_activations_takes_what_it_took_on_an_h200(tokens: int) -> None:
    case = f"elementwise.fp8_quant.t{tokens}"
    windows = [w for f in WINDOWS for w in read_windows(f) if w["case"] == case]
    h200, calibration = load_gpu("h200"), load_calibration("h200")
    kernel = calibration.kernels["elementwise"]
    rate = kernel.memory_efficiency * h200.hbm_bytes_per_s
    passed = QUANTISE_BYTES * windows[0]["shape"]["hidden"] * tokens
    predicted = kernel.call_seconds + kernel.hbm_latency_seconds + passed / rate
    # 1 % short at 1,024 rows, 19 % long at 8,192, where the second pass finds rows in the L2 (22 %
    # on the one of three boards that did not meet its power limit there)
    assert len(windows) >= 2  # boards
    seconds = float(np.median([w["iteration_seconds"] for w in windows]))
    assert predicted == pytest.approx(seconds, rel=0.2)


def test_tiles_of_a_gemm_cover_its_output() -> None:
    table = operator_table(llama_8b(), ServingConfig())
    at = table.names.index("up_proj")
    tiles = table.tiles[at, STATS.index("tokens")] * 128
    assert tiles == pytest.approx(32 * 2 * 14336 / 128)


@pytest.mark.parametrize(
    ("width", "as_wide_as"),
    # heads of 80 take the kernel for 96, which is 3.2 times as slow; those of 112 that for 128
    [(32, 64), (64, 64), (80, 307.2), (96, 307.2), (112, 128), (128, 128), (256, 256), (300, 300)],
)
def test_decode_attention_has_kernels_for_some_widths_of_a_head(
    width: int, as_wide_as: float
) -> None:
    assert float(decode_head_width(width)) == pytest.approx(as_wide_as)


@pytest.mark.parametrize(
    ("model", "norms", "beside_attention"),
    [
        ("llama-3.1-8b", 2, 1),
        ("falcon-7b", 1, 1),  # attention and MLP read the same layer norm
        ("opt-1.3b", 2, 1),
        ("olmo-1b", 2, 1),  # without weights
        ("deepseek-v2-lite", 2, 1),
        ("gemma-2-9b", 4, 2),  # outputs are normed too; every other layer has a window
        ("gemma-3-27b", 4, 2),
        ("gpt-oss-20b", 2, 2),
        ("phi-3-mini", 2, 1),  # all layers have the same window
    ],
)
def test_small_kernels_of_a_layer_follow_its_architecture(
    model: str, norms: int, beside_attention: int
) -> None:
    spec = load_model(model)
    table = operator_table(spec, ServingConfig())
    calls = {
        name: sum(c for n, c in zip(table.names, table.calls, strict=True) if n == name)
        for name in ("norm", "attention_combine")
    }
    assert calls["norm"] == norms * spec.num_layers
    # what adds up the parts lasts as long as 1.45 small kernels
    assert calls["attention_combine"] == pytest.approx((0.45 + beside_attention) * spec.num_layers)


def test_tensor_parallelism_divides_the_work() -> None:
    stats = step_stats(llama_8b(), tokens=64.0, decode_kv_tokens=1e4, decode_sequences=64.0)
    one = operator_table(llama_8b(), ServingConfig())
    four = operator_table(llama_8b(), ServingConfig(tensor_parallel=4))
    layers = [i for i, n in enumerate(one.names) if n != "logits"]
    same = [four.names.index(one.names[i]) for i in layers]
    assert (stats @ four.flops[same].T).sum() == pytest.approx(
        (stats @ one.flops[layers].T).sum() / 4
    )
    # a row-parallel GEMM keeps its columns and tiles; heads are divided
    at = one.names.index("attention_decode")
    assert (stats @ four.tiles[at]) == pytest.approx((stats @ one.tiles[at]) / 4)


def test_wide_tiles_of_experts_save_time_and_no_work() -> None:
    model, serving = load_model("mixtral-8x7b"), ServingConfig()
    tuned = with_tuned_tiles(model, serving, load_gpu("h200"))  # 256 columns from 192 tokens on
    at = operator_table(tuned, serving).names.index("experts")
    for tokens, over in ((64.0, 1.0), (1024.0, 1.08)):
        stats = step_stats(tuned, tokens=tokens, rows=1.0)
        table = operator_table(tuned, serving)
        executed = float((stats @ table.executed_flops.T)[0, at])
        rows = float(stats[0, STATS.index("expert_rows")])
        assert executed == pytest.approx(rows * 6 * 4096 * 14336 * 32 / over)
        useful = float((stats @ table.flops.T)[0, at])
        assert useful == pytest.approx(tokens * 2 * 6 * 4096 * 14336 * 32)


def test_transformers_runs_a_layer_norm_in_fewer_kernels_than_an_rms_norm() -> None:
    serving = ServingConfig(stack="transformers")
    tables = {name: operator_table(load_model(name), serving) for name in ("olmo-1b", "qwen3-4b")}

    def each(model: str, column: str) -> float:
        table, layers = tables[model], {"olmo-1b": 16, "qwen3-4b": 36}[model]
        at = table.names.index("norm")
        return float(np.sum(getattr(table, column)[at])) / layers / 2

    assert each("olmo-1b", "calls") == 4  # to 32 bit, the norm, back; the residual
    assert each("qwen3-4b", "calls") == 9
    assert each("olmo-1b", "activation_bytes") == 26 * 2048
    assert each("qwen3-4b", "activation_bytes") == 42 * 2560
