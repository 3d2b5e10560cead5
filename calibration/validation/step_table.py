"""Kernels of an engine's steps (`calibration/serving/step_kernels.py`) beside what is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.fitting.measured_runs import weights_dtype
from calibration.metering.windows import read_jsonl
from calibration.validation.report import markdown_table
from energymodel.deployment import Deployment, deploy
from energymodel.gpus import load_gpu
from energymodel.models import model_from_config
from energymodel.operators import STATS, operator_table, step_stats
from energymodel.roofline import operator_costs
from energymodel.specs import DEFAULT_DTYPE
from energymodel.tiles import decode_key_block

_STACK = "vllm"
"""The other stacks launch kernel by kernel: their steps take what the host does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A decode step: as it ran, and the kernels in it."""

    gpu: str
    model: str
    batch: int
    context_tokens: float
    """Of a sequence, on average over the steps."""
    seconds: float
    """Median of the steps, not profiled [s]."""
    kernel_seconds: float
    """Sum of its kernels' durations [s]."""
    kernels: float
    predicted_seconds: float
    """The GPU's part of the step at the full clock, gaps between kernels included [s]."""

    @property
    def gap_seconds(self) -> float:
        """Time of the step beyond that of its kernels, over their number [s]."""
        return (self.seconds - self.kernel_seconds) / self.kernels


def steps_of(records: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    """Decode steps of vLLM's batches whose prompts took one step, by a file's records."""
    engines: dict[tuple[str, int], Mapping[str, Any]] = {}
    for record in records:
        run = record["plan"], record["run"]
        if record["kind"] == "engine":
            engines[run] = record
        elif record["kind"] == "kernels" and record["stack"] == _STACK:
            engine, case = engines[run], record["case"]
            gpu = load_gpu(engine["identity"]["gpus"][0]["name"]).name
            name = Path(record["model"]).name.removesuffix(".json")
            dtype = weights_dtype(engine)
            model = model_from_config(engine["config"], name=name)
            deployment = deploy(gpu=gpu, model=model, dtype=dtype or DEFAULT_DTYPE)
            for found in record["kernels"]:
                if found["steps"] != case["output_tokens"]:
                    continue  # prompts came in several steps, some beside decoding sequences
                decode = found["decode_step"]
                context = case["input_tokens"] + case["output_tokens"] / 2.0
                yield Step(
                    gpu=gpu,
                    model=f"{name} {dtype}" if dtype == "fp8" else name,
                    batch=found["batch"],
                    context_tokens=context,
                    seconds=found["decode_step_seconds"]["p50"],
                    kernel_seconds=sum(k["seconds"] for k in decode),
                    kernels=sum(k["calls"] for k in decode),
                    predicted_seconds=decode_step_seconds(deployment, found["batch"], context),
                )


def decode_step_seconds(deployment: Deployment, batch: int, context_tokens: float) -> float:
    """The GPU's part of a decode step of equal sequences, at the highest clock [s].

    Their last blocks of keys are as full as they are, not half full as on average.
    """
    model = deployment.model
    keys = float(batch) * context_tokens
    stats = step_stats(
        model,
        tokens=float(batch),
        rows=float(batch),
        decode_kv_tokens=keys,
        decode_window_kv_tokens=keys,
        decode_sequences=float(batch),
    )
    table = operator_table(model, deployment.serving)
    flops, at = table.executed_flops.copy(), table.names.index("attention_decode")
    block = float(decode_key_block(model.layers[0].attention.head_dim))
    empty = np.ceil(context_tokens / block) * block - context_tokens
    flops[at, STATS.index("decode_sequences")] *= empty / (block / 2.0)
    table = replace(table, executed_flops=flops)
    costs = operator_costs(table, stats, deployment.gpu, deployment.calibration)
    return float((costs.memory_seconds + costs.compute_seconds).sum())


def step_table(paths: Sequence[Path]) -> str:
    """Steps, their kernels and what is predicted, by GPU, model and batch; empty without records.

    Raises
    ------
    EnergyModelError
        If a file cannot be read, or the model refuses what ran.
    """
    rows = [
        [
            f"{step.gpu}, {step.model}, batch {step.batch}",
            f"{step.context_tokens:.0f}",
            f"{1e3 * step.seconds:.2f}",
            f"{1e3 * step.kernel_seconds:.2f}",
            f"{step.kernels:.0f}",
            f"{1e6 * step.gap_seconds:.2f}",
            f"{1e3 * step.predicted_seconds:.2f}",
            f"{100 * (step.predicted_seconds / step.seconds - 1.0):+.1f}",
        ]
        for path in paths
        for step in steps_of(read_jsonl(path))
    ]
    head = (
        *("step", "context", "ms", "its kernels ms", "kernels", "us between"),
        *("predicted ms", "error %"),
    )
    return markdown_table(head, rows) if rows else ""
