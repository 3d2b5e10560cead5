"""KV-cache blocks: as vLLM itself reported when it started, and its rules where windows differ."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served_triples import serve, with_blocks
from shapes import calibration, gpu, tiny

from calibration.fitting.measured_runs import read_own, weights_dtype
from calibration.serving.engine import VLLM_ARGUMENTS
from calibration.validation.rows import MeasuredRow
from energymodel.deployment import deploy
from energymodel.gpus import load_gpu
from energymodel.kv_cache import KvCache, asked_blocks, held_blocks, kv_cache, left_behind
from energymodel.models import model_from_config
from energymodel.simulator import simulate
from energymodel.specs import DEFAULT_DTYPE, ModelSpec, ServingConfig

RUNS = sorted((Path(__file__).parents[1] / "calibration/data/serving").glob("*.jsonl.gz"))


def engines() -> list[Any]:
    """One record of each model, GPU and number of GPUs, engines with drafts left out."""
    found: dict[tuple[Any, ...], Any] = {}
    for path in RUNS:
        for line in gzip.decompress(path.read_bytes()).splitlines():
            record = json.loads(line)
            settings = record.get("settings", {})
            if record["kind"] != "engine" or not settings.get("num_gpu_blocks"):
                continue
            name = Path(record["run_plan"]["model"]).name.removesuffix(".json")
            gpu = load_gpu(record["identity"]["gpus"][0]["name"]).name
            if not settings.get("speculative_config"):
                case = f"{name} on {settings['tensor_parallel_size']} x {gpu}"
                found.setdefault((case, settings["enforce_eager"]), (case, gpu, record))
    return [pytest.param(gpu, r, id=case) for case, gpu, r in found.values()]


@pytest.mark.parametrize(("gpu", "record"), engines())
def test_blocks_as_vllm_reports_them(gpu: str, record: Any) -> None:
    settings, asked = record["settings"], record["run_plan"]["engine"]
    share = asked.get("gpu_memory_utilization", VLLM_ARGUMENTS["gpu_memory_utilization"])
    deployment = deploy(
        gpu=gpu,
        model=model_from_config(record["config"], name="measured"),
        stack="vllm-eager" if settings["enforce_eager"] else "vllm",
        tensor_parallel=settings["tensor_parallel_size"],
        max_step_tokens=settings["max_num_batched_tokens"],
        gpu_memory_utilization=share,
        dtype=weights_dtype(record) or DEFAULT_DTYPE,
    )
    kv, reported = deployment.costs.scheduler.kv, settings["num_gpu_blocks"]
    assert kv.block_tokens == settings["block_size"]
    # 1.2 GiB of a cache of 50 to 120 GiB; next to nothing is left of a GPU used by half
    assert kv.blocks == pytest.approx(reported, rel=0.02 if share > 0.5 else 0.08)


def model_of(full: int, windowed: int, window: int = 64) -> ModelSpec:
    """The small model with so many layers of either kind."""
    kinds = zip(tiny(window=window).layers, (full, windowed), strict=True)
    return replace(tiny(), layers=tuple(replace(g, count=n) for g, n in kinds if n))


@pytest.mark.parametrize(
    ("full", "windowed", "layers", "full_groups", "window_groups"),
    [
        (24, 0, 24, 1, 0),
        (0, 24, 24, 0, 1),
        (10, 20, 10, 1, 2),  # the example of vLLM's `_get_kv_cache_groups_uniform_page_size`
        (10, 52, 10, 1, 6),  # Gemma-3-27B: eight layers of padding
        (13, 12, 13, 1, 1),  # gpt-oss-20b with EAGLE, named there too: not (12 sw, 24 full)
        (21, 21, 21, 1, 1),
    ],
)
def test_layers_form_groups_as_in_vllm(
    full: int, windowed: int, layers: int, full_groups: int, window_groups: int
) -> None:
    model = model_of(full, windowed)
    kv = kv_cache(model, ServingConfig(stack="vllm-eager"), gpu())
    assert (kv.full_groups, kv.window_groups) == (full_groups, window_groups)
    assert kv.window == (64 if windowed else 0)
    whole = kv_cache(model, ServingConfig(stack="transformers"), gpu())
    assert kv.blocks == pytest.approx(whole.blocks * (full + windowed) / layers, rel=1e-3)


def test_groups_with_a_window_keep_what_it_reaches() -> None:
    """Window 64, blocks of 16: for token 101, tokens 37 to 100 matter, blocks 2 to 6 of 0 to 6."""
    kv = KvCache(blocks=100, block_tokens=16, full_groups=1, window_groups=2, window=64)
    assert held_blocks(100, 101, kv) == 7 + 2 * 5
    assert held_blocks(0, 101, kv) == 7 + 2 * 7  # all of a prompt while it is computed
    assert left_behind(78, kv) == 0
    assert left_behind(79, kv) == 2  # tokens 16 to 79 are the next one's window


def test_the_longest_sequence_fits_and_one_block_more_does_not() -> None:
    serving = ServingConfig(max_model_len=4096, max_step_tokens=256)
    for full, windowed in ((2, 0), (1, 1), (1, 5), (3, 2)):
        kv = kv_cache(model_of(full, windowed), serving, gpu())._replace(blocks=301)
        longest = kv.longest_tokens
        assert longest is not None
        assert longest % 16 == 0
        assert asked_blocks(longest, 0, 256, kv) <= 301
        assert asked_blocks(longest + 16, 0, 256, kv) > 301
    windows_alone = kv_cache(model_of(0, 2), serving, gpu())
    assert windows_alone._replace(blocks=301).longest_tokens is None
    # 63 of the window and 256 of the step are 20 blocks, one more where they begin within a block
    assert windows_alone.window_blocks == 21
    assert windows_alone._replace(blocks=20).longest_tokens == 320


def test_blocks_given_back_serve_others() -> None:
    """Eight prompts of 1,000 tokens: four at a time fit, or all where windows give blocks back."""
    steps = {}
    for window in (None, 64):
        model = tiny(window=window)
        requests = [(0.0, 1000, 60)] * 8
        serving = ServingConfig(max_step_tokens=1024)
        groups = 1 if window is None else 2
        result, _ = serve(requests, model, serving, calibration(), blocks=310 * groups)
        steps[window] = result.totals["steps"]
    assert steps[None] > 2 * 60
    assert steps[64] < 80


def records(kind: str) -> list[Any]:
    """Records of the engines that were left too little KV cache for their batch."""
    path = RUNS[0].parent / "h200-card-p.jsonl.gz"
    found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    return [r for r in found if r["kind"] == kind and r["plan"].startswith("h200_full_cache")]


def full_caches() -> list[Any]:
    """Their cases, of engines whose cache was full, with the blocks that these reported."""
    blocks = {
        (r["plan"], r["run"]): r["settings"]["num_gpu_blocks"]
        for r in records("engine")
        if r["run_plan"]["engine"].get("gpu_memory_utilization", 1.0) < 0.5
    }
    cases = [r for r in records("run") if (r["plan"], r["run"]) in blocks]
    names = {"llama-3.1-8b", "gemma-2-9b", "gemma-3-27b-text"}
    rows = [
        row
        for row in read_own([RUNS[0].parent / "h200-card-p.jsonl.gz"])[0]
        if "h200_full_cache" in row.note and row.model_name in names
    ]
    return [
        pytest.param(row, blocks[r["plan"], r["run"]], r["steps_per_repeat"], id=row.name)
        for row, r in zip(rows, cases, strict=True)
    ]


@pytest.mark.parametrize(("row", "blocks", "steps"), full_caches())
def test_requests_queue_and_are_preempted_as_in_vllm(
    row: MeasuredRow, blocks: int, steps: float
) -> None:
    """With as many blocks as the engine had, its number of steps, to the step."""
    costs = with_blocks(deploy(gpu=row.gpu, model=row.model, **row.options).costs, blocks)
    r = row.requests
    run = simulate(r.arrival_seconds, r.input_tokens, r.output_tokens, costs)
    assert run is not None
    assert run.totals["steps"] == steps


@pytest.mark.parametrize(("gpu", "record"), engines())
def test_graphs_are_captured_for_the_sizes_that_vllm_reports(gpu: str, record: Any) -> None:
    settings = record["settings"]
    deployment = deploy(
        gpu=gpu,
        model=model_from_config(record["config"], name="measured"),
        tensor_parallel=settings["tensor_parallel_size"],
        max_batch=settings["max_num_seqs"],
        max_step_tokens=settings["max_num_batched_tokens"],
        dtype=weights_dtype(record) or DEFAULT_DTYPE,
    )
    if settings["cudagraph_capture_sizes"]:  # eager engines have none
        assert list(deployment.serving.graph_batch_sizes) == settings["cudagraph_capture_sizes"]
