"""Work counted by operator: published counts, vLLM's tile rule, and what must add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energymodel.experts import distinct_experts, expert_rows, moe_tile_rows
from energymodel.models import load_model
from energymodel.operators import STATS, operator_table, step_stats
from energymodel.specs import ServingConfig
from tests.shapes import llama_8b, tiny


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


def test_tiles_of_a_gemm_cover_its_output() -> None:
    table = operator_table(llama_8b(), ServingConfig())
    at = table.names.index("up_proj")
    tiles = table.tiles[at, STATS.index("tokens")] * 128
    assert tiles == pytest.approx(32 * 2 * 14336 / 128)


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
