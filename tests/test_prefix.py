"""Prefix caching: what traces say of it, and what it saves."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from energymodel.cli import app
from energymodel.errors import ConfigurationError, TraceError
from energymodel.prefix import cached_share, with_given_share, with_traced_prefixes
from energymodel.report import render
from energymodel.settings import Setting
from energymodel.steady_state import summarise
from energymodel.sweep import Workload, evaluate
from energymodel.traces import Requests, read_trace
from energymodel.workload import predict
from energymodel.workloads import load_requests

MOONCAKE = Path(__file__).parents[2] / "shared" / "data" / "traces" / "mooncake_conversation.csv"


def test_a_given_share_is_cached_in_whole_blocks() -> None:
    requests = load_requests("azure_conv", num_requests=500)
    found = with_given_share(requests, 0.5, block_tokens=16)
    assert found.cached_tokens is not None
    assert (found.cached_tokens % 16 == 0).all()
    assert (found.cached_tokens < found.input_tokens).all()
    assert 0.45 < cached_share(found) <= 0.5
    assert with_given_share(requests, 0.0, block_tokens=16).cached_tokens is None
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="share"):
            with_given_share(requests, share, block_tokens=16)


def test_block_ids_tell_what_was_seen_before(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    ids = [[1, 2, 3], [1, 2, 4], [5, 2, 3], [1, 2, 4]]
    rows = [
        {"timestamp": 1000 * i, "input_length": 1400, "output_length": 5, "hash_ids": blocks}
        for i, blocks in enumerate(ids)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = with_traced_prefixes(read_trace(str(path)), str(path))
    assert found.cached_tokens is not None
    assert found.cached_tokens.tolist() == [0, 1024, 0, 1399]
    assert found.take(np.array([False, True, True, False])).cached_tokens.tolist() == [1024, 0]


@pytest.mark.skipif(not MOONCAKE.is_file(), reason="the published trace is not here")
def test_the_mooncake_trace_repeats_a_third_of_its_prompts() -> None:
    requests = with_traced_prefixes(read_trace(str(MOONCAKE)), str(MOONCAKE))
    assert cached_share(requests) == pytest.approx(0.366, abs=0.02)


def test_traces_without_block_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_seconds,input_tokens,output_tokens\n0,10,1\n")
    with pytest.raises(TraceError, match="no block ids"):
        with_traced_prefixes(read_trace(str(path)), str(path))
    header = "timestamp,input_length,output_length,prefix_blocks_seen_before\n"
    path.write_text(header + "0,10,1,0\n5,0,1,0\n")
    with pytest.raises(TraceError, match="cannot be matched"):
        with_traced_prefixes(read_trace(str(path)), str(path))
    with pytest.raises(TraceError, match="is no file"):
        with_traced_prefixes(read_trace(str(path)), str(tmp_path / "none"))


def test_the_cache_saves_prefill_and_time_in_both_modes() -> None:
    requests = load_requests("azure_code", num_requests=2000)
    workload = Workload(
        binned=summarise(requests),
        requests=requests,
        output_tokens=int(requests.output_tokens.sum()),
        prices={},
    )
    for mode in ("binned", "exact"):
        points = [
            evaluate(Setting(gpu="a100", replicas=4, prefix_hit=share), workload, mode)
            for share in (0.0, 0.4, 0.8)
        ]
        joules = [point.active_joules or 0.0 for point in points]
        assert joules[0] > joules[1] > joules[2] > 0.0
        ttft = [point.ttft_seconds["p50"] for point in points]
        assert ttft[0] > ttft[2]
    static = Setting(gpu="a100", stack="transformers", prefix_hit=0.5)
    assert "no prefix cache" in evaluate(static, workload, "exact").reason
    untraced = Setting(gpu="a100", prefix_hit="trace")
    assert "no block ids" in evaluate(untraced, workload, "exact").reason
    cached = replace(requests, cached_tokens=requests.input_tokens // 2)
    traced = evaluate(untraced, replace(workload, requests=cached), "exact")
    assert traced.served


def test_the_command_takes_shares() -> None:
    options = ("whatif", "--trace", "azure_code", "--gpu", "a100", "--replicas", "4")
    options += ("--backend", "sequential", "--prefix-hit")
    result = CliRunner().invoke(app, [*options, "0,0.5"])
    assert result.exit_code == 0, result.output
    assert "cached" in result.output
    result = CliRunner().invoke(app, [*options, "trace"])
    assert result.exit_code == 2
    assert "block ids" in result.output


# -- predict


def spaced(n: int = 40) -> Requests:
    """Requests of which each is served alone, so that no step holds prefill and decode both."""
    rng = np.random.default_rng(1)
    return Requests(
        name="spaced",
        arrival_seconds=np.arange(n) * 60.0,
        input_tokens=rng.integers(100, 3000, n),
        output_tokens=rng.integers(1, 200, n),
    )


def test_more_hits_take_less_prefill_and_leave_decode_alone() -> None:
    requests = spaced()
    before = predict(requests, gpu="a100")
    found = [predict(requests, gpu="a100", prefix_hit=share) for share in (0.0, 0.2, 0.5, 0.9)]
    assert found[0] == before
    prefill = [one.prefill_joules for one in found]
    assert sorted(prefill, reverse=True) == prefill
    assert prefill[-1] < 0.5 * prefill[0]
    for one in found[1:]:
        assert one.decode_joules == pytest.approx(before.decode_joules, rel=1e-9)
        assert one.ttft_seconds.p50 < before.ttft_seconds.p50  # type: ignore[operator]
        assert one.naive["flops_tdp_joules"] == before.naive["flops_tdp_joules"]
    assert before.inputs["prefix_hit"] == 0.0
    assert before.inputs["cached_input_tokens"] == 0
    share = found[2].inputs["cached_input_tokens"] / found[2].input_tokens
    assert 0.48 < share <= 0.5
    assert "prefix cache" not in render(before, "table")
    assert f"prefix cache holds {share:.1%}" in " ".join(render(found[2], "table").split())


def test_what_requests_carry_counts_when_asked_for_and_is_checked() -> None:
    requests = spaced()
    half = replace(requests, cached_tokens=requests.input_tokens // 2)
    assert predict(half, gpu="a100") == predict(requests, gpu="a100")
    traced = predict(half, gpu="a100", prefix_hit="trace")
    assert traced.inputs["prefix_hit"] == "trace"
    assert traced.inputs["cached_input_tokens"] == (requests.input_tokens // 2).sum()
    backwards = replace(
        half,
        arrival_seconds=half.arrival_seconds[::-1],
        input_tokens=half.input_tokens,
    )
    again = predict(backwards, gpu="a100", prefix_hit="trace")
    assert again.prefill_joules == pytest.approx(traced.prefill_joules, rel=1e-6)
    for cached in (requests.input_tokens, -requests.input_tokens, np.array([1])):
        with pytest.raises(TraceError, match="cached_tokens"):
            predict(replace(requests, cached_tokens=cached), gpu="a100", prefix_hit="trace")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_hit": "half"}, "neither a share"),
        ({"prefix_hit": 1.0}, "from 0 to below 1"),
        ({"prefix_hit": "nan"}, "from 0 to below 1"),
        ({"prefix_hit": "trace"}, "no block ids"),
        ({"prefix_hit": 0.5, "stack": "transformers"}, "no prefix cache"),
        ({"prefix_hit": 0.5, "binning": "paper"}, "knows no prefix cache"),
    ],
)
def test_senseless_shares_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        predict(spaced(), gpu="a100", **options)


def test_predict_reads_block_ids(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 1000 * i, "input_length": 1400, "output_length": 5, "hash_ids": blocks}
        for i, blocks in enumerate([[1, 2, 3], [1, 2, 4], [5, 2, 3], [1, 2, 4]])
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    options = ["predict", "--gpu", "a100", "--format", "json", "--trace", str(path)]
    found = json.loads(CliRunner().invoke(app, [*options, "--prefix-hit", "trace"]).output)
    assert found["inputs"]["cached_input_tokens"] == 1024 + 1399
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    again = with_traced_prefixes(read_trace(str(packed)), str(packed))
    assert again.cached_tokens is not None
    assert again.cached_tokens.tolist() == [0, 1024, 0, 1399]
    plain = json.loads(CliRunner().invoke(app, options).output)
    assert plain["prefill_joules"] > found["prefill_joules"]
    for other in ("azure_code", "-"):
        result = CliRunner().invoke(
            app,
            ["predict", "--gpu", "a100", "--prefix-hit", "trace", "--trace", other],
            input=path.read_text(),
        )
        assert result.exit_code == 2
        assert "no file whose block ids can be read" in result.output
