"""Table 4 of the paper: energy over its "theoretical optimal", and how it moves with its reading.

The paper divides by FLOPs x TDP / peak with 309.7 TFLOP/s for the RTX A6000, which is the peak with
2:4 sparsity; dense BF16 has half. It states neither FLOPs nor batches, so the gap is shown under
one change of the reading at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from energymodel.models import load_model, weight_count
from energymodel.naive import flops_tdp_joules
from energymodel.operators import request_flops
from energymodel.paper_accounting import round_up_lengths
from energymodel.paper_findings import Estimate, Finding, Paper
from energymodel.results import Prediction
from energymodel.specs import ModelSpec
from energymodel.traces import Requests
from energymodel.workload import predict
from energymodel.workloads import load_requests

Array = NDArray[np.float64]

DATASETS = ("burstgpt", "azure_code", "azure_conv")
STACKS = ("transformers", "vllm")
MODEL = "llama-3.1-8b"
_BATCHES = (1, 8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Energy over the ideal, minus 1 [-], under one reading."""

    dataset: str
    stack: str
    reading: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A gap of Table 4 with the sparse peak, as the paper takes it, and with the dense one."""

    dataset: str
    stack: str
    stated: float
    stated_dense: float
    """What the paper's measurement would be over the ideal of the dense peak."""
    predicted: Estimate
    predicted_dense: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Table4:
    """The gaps, the savings that follow from them, and the gaps under other readings."""

    energies: dict[tuple[str, str], Prediction]
    """By dataset and stack, in the paper's accounting."""
    readings: tuple[Reading, ...]
    sensitivity: tuple[Gap, ...]


def table4(paper: Paper) -> Table4:
    """Predict Table 4 and its sensitivity to peak, FLOPs, binning and batch."""
    stated = {finding.id: finding for finding in paper.findings}
    gpu, peak, tdp = paper.ideal.gpu, paper.ideal.peak_flops_per_s, paper.ideal.tdp_watts
    model = load_model(MODEL)
    energies: dict[tuple[str, str], Prediction] = {}
    readings: list[Reading] = []
    gaps: list[Gap] = []
    for dataset in DATASETS:
        requests = load_requests(dataset)
        rounded, _ = round_up_lengths(requests)
        flops = flops_by_convention(model, rounded)
        exact_flops = flops_by_convention(model, requests)["as counted here"]
        for stack in STACKS:
            p = predict(requests, gpu=gpu, model=model, stack=stack, binning="paper")
            energies[dataset, stack] = p
            ideal = float(flops_tdp_joules(1.0, tdp_watts=tdp, peak_flops_per_s=peak))
            dense = float(flops_tdp_joules(1.0, tdp_watts=tdp, peak_flops_per_s=p.peak_flops_per_s))
            base = flops["as counted here"]
            finding = stated[f"gap-{dataset}-{stack}"]
            readings.append(_reading(finding, dataset, stack, p, base * ideal, base * dense))
            others = {"as the paper, FLOPs as counted here": p.energy_joules / (base * ideal)}
            others["dense peak"] = p.energy_joules / (base * dense)
            for convention, count in flops.items():
                if convention != "as counted here":
                    others[f"FLOPs: {convention}"] = p.energy_joules / (count * ideal)
            exact = predict(requests, gpu=gpu, model=model, stack=stack, arrivals="offline")
            others["lengths not rounded, batches as they come"] = exact.energy_joules / (
                exact_flops * ideal
            )
            for batch in _BATCHES:
                small = predict(
                    requests, gpu=gpu, model=model, stack=stack, binning="paper", max_batch=batch
                )
                others[f"batch of at most {batch}"] = small.energy_joules / (base * ideal)
            gaps += [
                Gap(dataset=dataset, stack=stack, reading=reading, value=factor - 1.0)
                for reading, factor in others.items()
            ]
    return Table4(energies=energies, readings=tuple(readings), sensitivity=tuple(gaps))


def flops_by_convention(model: ModelSpec, requests: Requests) -> dict[str, float]:
    """FLOPs of all requests together, under conventions that are in use [FLOP]."""
    inputs = requests.input_tokens.astype(np.float64)
    outputs = requests.output_tokens.astype(np.float64)
    counted = float(request_flops(model, inputs, outputs)[0].sum())
    passed = inputs + outputs - 1.0
    prompt_logits = 2.0 * model.vocab_size * model.hidden_size * (inputs - 1.0)
    return {
        "as counted here": counted,
        "2 x parameters x tokens, no attention": 2.0 * weight_count(model) * float(passed.sum()),
        "logits of every prompt token too": counted + float(prompt_logits.sum()),
        "a multiply-add as one": 0.5 * counted,
    }


def _reading(
    finding: Finding, dataset: str, stack: str, p: Prediction, ideal: float, dense: float
) -> Reading:
    stated = finding.stated
    assert stated is not None
    return Reading(
        dataset=dataset,
        stack=stack,
        stated=stated,
        stated_dense=(1.0 + stated) * ideal / dense - 1.0,
        predicted=_gap(p, ideal),
        predicted_dense=_gap(p, dense),
    )


def _gap(p: Prediction, ideal_joules: float) -> Estimate:
    return Estimate(
        gpu=p.inputs["gpu"],
        setting=f"{MODEL}, {p.inputs['trace']}, {p.inputs['stack']}, paper's bins, batch as fits "
        f"to {p.inputs['max_batch']}",
        value=p.energy_joules / ideal_joules - 1.0,
        low=p.energy_joules_low / ideal_joules - 1.0,
        high=p.energy_joules_high / ideal_joules - 1.0,
    )
