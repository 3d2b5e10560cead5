"""KV-cache blocks: what vLLM itself reported when it started, on one and two GPUs."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.fitting.measured_runs import weights_dtype
from calibration.serving.engine import VLLM_ARGUMENTS
from energymodel.deployment import deploy
from energymodel.gpus import load_gpu
from energymodel.models import model_from_config
from energymodel.specs import DEFAULT_DTYPE

RUNS = sorted((Path(__file__).parents[1] / "calibration/data/serving").glob("*.jsonl.gz"))
HYBRID = {"gpt-oss-20b", "gemma-2-9b", "gemma-2-27b", "gemma-3-27b-text"}
"""Layers with a window give blocks back there, see docs/limits.md."""


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
            if name not in HYBRID and not settings.get("speculative_config"):
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
    blocks = deployment.costs.config[2]
    assert settings["block_size"] == 16
    assert blocks == pytest.approx(settings["num_gpu_blocks"], rel=0.05)
