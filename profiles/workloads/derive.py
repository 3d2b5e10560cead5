"""Derives the built-in workloads of this folder from public data.

    python profiles/workloads/derive.py FOLDER_OF_TRACES [FOLDER_TO_WRITE]

FOLDER_OF_TRACES holds azure_llm_2023_code.csv and azure_llm_2023_conv.csv
(github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_{code,conv}.csv) and
burstgpt_1_head.csv, the first 379 rows of BurstGPT_1.csv (github.com/HPMLL/BurstGPT).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import lognorm, norm, spearmanr

from energymodel.bins import BinGrid, bin_requests
from energymodel.traces import Requests, read_trace

Floats = NDArray[np.float64]

BINS_PER_OCTAVE = 6
PAPER = "Fernandez et al., ACL 2025, arXiv 2504.17674"
AZURE = (
    "Azure LLM inference trace 2023, github.com/Azure/AzurePublicDataset commit b469a113, "
    "AzureLLMInferenceTrace_{}.csv (Patel et al., Splitwise, ISCA 2024)"
)
BURSTGPT = (
    f"lengths fitted to the statistics in tables 1 and 2 of {PAPER}, not to the trace itself; "
    "their rank correlation and all arrivals from the published sample of 379 rows (15 of them "
    "failed) at the head of BurstGPT_1.csv, github.com/HPMLL/BurstGPT (Wang et al., KDD 2025, "
    "arXiv 2401.17644)"
)
# Mean, standard deviation, median, 99th percentile: BurstGPT in tables 1 and 2 of PAPER.
BURSTGPT_INPUT = (256.80, 242.27, 215, 1038)
BURSTGPT_OUTPUT = (35.10, 108.59, 7, 478)
# Data set, input mean, standard deviation, longest input, output: table 3 of PAPER.
TASKS = {
    "translation": ("WMT-14", 49.96, 39.39, 550, 64),
    "generation": ("Wikitext-2", 136.89, 93.13, 547, 64),
    "classification": ("IMDB", 292.48, 239.94, 3112, 1),
    "summarization": ("CNN-DM", 838.49, 400.70, 2386, 64),
}
TASK_REQUESTS = 1024  # section 4 of PAPER


def edges(longest: int) -> NDArray[np.int64]:
    """Upper edges of log-spaced bins; the last is the longest length itself."""
    powers = np.round(2.0 ** (np.arange(32 * BINS_PER_OCTAVE) / BINS_PER_OCTAVE)).astype(np.int64)
    return np.unique(np.append(powers[powers < longest], longest))


def arrivals(requests: Requests) -> dict[str, Any]:
    """Requests in each second that has any."""
    seconds, counts = np.unique(
        np.floor(requests.arrival_seconds).astype(np.int64), return_counts=True
    )
    return {"bin_seconds": 1.0, "second": seconds.tolist(), "requests": counts.tolist()}


def histogram(requests: Requests) -> dict[str, Any]:
    """Joint histogram of input and output lengths."""
    grid = BinGrid(
        name="fine",
        input_edges=edges(int(requests.input_tokens.max())),
        output_edges=edges(int(requests.output_tokens.max())),
    )
    binned = bin_requests(requests.input_tokens, requests.output_tokens, grid)
    return lengths(
        grid,
        np.searchsorted(grid.input_edges, binned.input_high),
        np.searchsorted(grid.output_edges, binned.output_high),
        binned.requests,
        binned.mean_input,
        binned.mean_output,
    )


def lengths(
    grid: BinGrid,
    input_bin: NDArray[np.int64],
    output_bin: NDArray[np.int64],
    requests: NDArray[Any],
    mean_input: Floats,
    mean_output: Floats,
) -> dict[str, Any]:
    """Columns of the file; by output, inputs up and down, so that neighbours are alike."""
    serpentine = np.where(output_bin % 2 == 0, input_bin, -input_bin)
    order = np.lexsort((serpentine, output_bin))
    return {
        "input_edges": grid.input_edges.tolist(),
        "output_edges": grid.output_edges.tolist(),
        "input_bin": input_bin[order].tolist(),
        "output_bin": output_bin[order].tolist(),
        "requests": np.round(requests[order], 7).tolist(),
        "mean_input": np.round(mean_input[order], 2).tolist(),
        "mean_output": np.round(mean_output[order], 2).tolist(),
    }


def statistics(requests: Requests) -> dict[str, float]:
    """What a drawn trace should show again."""
    gaps = np.diff(requests.arrival_seconds)
    result: dict[str, float] = {
        "duration_seconds": round(float(requests.arrival_seconds[-1]), 3),
        "gap_cv": round(float(gaps.std() / gaps.mean()), 3),
    }
    for name, tokens in (("input", requests.input_tokens), ("output", requests.output_tokens)):
        result |= {
            f"{name}_mean": round(float(tokens.mean()), 2),
            f"{name}_std": round(float(tokens.std()), 2),
            f"{name}_median": float(np.median(tokens)),
            f"{name}_p99": float(np.percentile(tokens, 99)),
        }
    return result


def bin_masses(upper: NDArray[np.int64], mass: Floats) -> tuple[Floats, Floats]:
    """Mass and mean in each bin of a distribution over the lengths 1, 2, ..., upper[-1]."""
    values = np.arange(1, upper[-1] + 1)
    index = np.searchsorted(upper, values)
    total = np.bincount(index, mass, upper.size)
    mean = np.bincount(index, mass * values, upper.size)
    return total, np.divide(mean, total, out=upper.astype(np.float64), where=total > 0)


def truncated_lognormal(longest: int, mu: float, sigma: float) -> Floats:
    """Mass of the lengths 1..longest under a lognormal cut to them."""
    cdf = lognorm.cdf(np.arange(longest + 1) + 0.5, sigma, scale=np.exp(mu))
    return np.diff(cdf) / (cdf[-1] - cdf[0])


def moments(mass: Floats) -> tuple[float, float]:
    """Mean and standard deviation."""
    values = np.arange(1, mass.size + 1)
    mean = float(mass @ values)
    return mean, float(np.sqrt(mass @ (values - mean) ** 2))


def fit_task(mean: float, std: float, longest: int) -> Floats:
    """Truncated lognormal with a given mean and standard deviation."""

    def residuals(x: Floats) -> list[float]:
        found = moments(truncated_lognormal(longest, x[0], np.exp(x[1])))
        return [found[0] / mean - 1, found[1] / std - 1]

    fit = least_squares(residuals, [np.log(mean), np.log(0.7)], xtol=1e-12)
    if np.abs(fit.fun).max() > 1e-6:
        raise SystemExit(f"no truncated lognormal has mean {mean} and deviation {std}: {fit.fun}")
    return truncated_lognormal(longest, fit.x[0], np.exp(fit.x[1]))


def fit_mixture(target: tuple[float, float, int, int], longest: int) -> Floats:
    """Mixture of two truncated lognormals with a given mean, deviation, median and p99."""
    mean, std, median, p99 = target

    def mass(x: Floats) -> Floats:
        weight = 1 / (1 + np.exp(-x[0]))
        return weight * truncated_lognormal(longest, x[1], np.exp(x[2])) + (
            1 - weight
        ) * truncated_lognormal(longest, x[3], np.exp(x[4]))

    def residuals(x: Floats) -> list[float]:
        found = mass(x)
        cdf = np.concatenate([[0.0], np.cumsum(found)])
        middle = (cdf[1:] + cdf[:-1]) / 2
        return [
            moments(found)[0] / mean - 1,
            moments(found)[1] / std - 1,
            2 * middle[median - 1] - 1,
            100 * (middle[p99 - 1] - 0.99),
            *(1e-4 * np.asarray(x)),  # of all that fit, the least extreme
        ]

    starts = ([1.0, np.log(median), 0.0, np.log(p99 / w), -0.5] for w in (1.0, 2.0, 4.0))
    fit = min((least_squares(residuals, start) for start in starts), key=lambda f: f.cost)
    if np.abs(fit.fun[:4]).max() > 0.02:
        raise SystemExit(f"the mixture misses {target}: {fit.fun[:4]}")
    return mass(fit.x)


def joint_masses(
    input_masses: Floats, output_masses: Floats, rank_correlation: float, points: int = 200
) -> Floats:
    """Masses of the cells of two binned variables joined by a Gaussian copula."""
    rho = 2 * np.sin(np.pi * rank_correlation / 6)
    upper = norm.ppf(np.minimum(np.cumsum(output_masses), 1.0))
    upper[-1] = np.inf
    start = np.cumsum(input_masses) - input_masses
    inside = start[:, None] + input_masses[:, None] * (np.arange(points) + 0.5) / points
    z = norm.ppf(np.clip(inside, 1e-12, 1 - 1e-12))
    below = norm.cdf((upper - rho * z[..., None]) / np.sqrt(1 - rho**2)).mean(axis=1)
    cells = input_masses[:, None] * np.diff(below, axis=1, prepend=0.0)
    for _ in range(50):  # proportional fitting: restores both marginals exactly
        cells *= (output_masses / np.maximum(cells.sum(axis=0), 1e-300))[None, :]
        cells *= (input_masses / np.maximum(cells.sum(axis=1), 1e-300))[:, None]
    return cells


def burstgpt(sample: Requests) -> dict[str, Any]:
    """Lengths after the paper's tables, arrivals and rank correlation after the sample."""
    grid = BinGrid(
        name="fine",
        input_edges=edges(int(sample.input_tokens.max())),
        output_edges=edges(int(sample.output_tokens.max())),
    )
    input_mass = fit_mixture(BURSTGPT_INPUT, int(grid.input_edges[-1]))
    output_mass = fit_mixture(BURSTGPT_OUTPUT, int(grid.output_edges[-1]))
    inputs, mean_input = bin_masses(grid.input_edges, input_mass)
    outputs, mean_output = bin_masses(grid.output_edges, output_mass)
    rank_correlation = float(spearmanr(sample.input_tokens, sample.output_tokens).statistic)
    cells = joint_masses(inputs, outputs, rank_correlation)
    rows, columns = np.nonzero(cells > 1e-9)
    found = {}
    for name, mass in (("input", input_mass), ("output", output_mass)):
        mean, std = moments(mass)
        cdf = np.cumsum(mass)
        found |= {
            f"{name}_mean": round(mean, 2),
            f"{name}_std": round(std, 2),
            f"{name}_median": float(np.searchsorted(cdf, 0.5) + 1),
            f"{name}_p99": float(np.searchsorted(cdf, 0.99) + 1),
        }
    return {
        "description": "Requests to ChatGPT and GPT-4 (BurstGPT): partly synthetic, see source",
        "source": BURSTGPT,
        "license": "CC-BY 4.0",
        "requests": int(sample.input_tokens.size),
        "statistics": statistics(sample) | found,
        "arrivals": arrivals(sample),
        "lengths": lengths(
            grid,
            rows,
            columns,
            cells[rows, columns] * sample.input_tokens.size,
            mean_input[rows],
            mean_output[columns],
        ),
    }


def task(name: str) -> dict[str, Any]:
    """A classic task of the paper: all requests at time 0, one output length."""
    data_set, mean, std, longest, output = TASKS[name]
    grid = BinGrid(name="fine", input_edges=edges(longest), output_edges=np.array([output]))
    mass, mean_input = bin_masses(grid.input_edges, fit_task(mean, std, longest))
    rows = np.flatnonzero(mass > 0)
    return {
        "description": f"{name.capitalize()} ({data_set}), all requests at time 0",
        "source": (
            f"table 3 of {PAPER}: mean, standard deviation and longest input, and the fixed output;"
            " inputs from a lognormal cut at the longest, unpadded (the paper pads them)"
        ),
        "license": "figures quoted from the paper",
        "requests": TASK_REQUESTS,
        "statistics": {"input_mean": mean, "input_std": std, "input_max": longest},
        "arrivals": {"bin_seconds": 0.0, "second": [0], "requests": [TASK_REQUESTS]},
        "lengths": lengths(
            grid,
            rows,
            np.zeros_like(rows),
            mass[rows] * TASK_REQUESTS,
            mean_input[rows],
            np.full(rows.size, float(output)),
        ),
    }


def azure(requests: Requests, kind: str, description: str) -> dict[str, Any]:
    """A trace of Azure 2023."""
    return {
        "description": description,
        "source": AZURE.format(kind),
        "license": "CC-BY 4.0",
        "requests": int(requests.input_tokens.size),
        "statistics": statistics(requests),
        "arrivals": arrivals(requests),
        "lengths": histogram(requests),
    }


def main(traces: Path, target: Path) -> None:
    """Write one JSON file for each workload."""
    code = read_trace(str(traces / "azure_llm_2023_code.csv"), strict=True)
    conv = read_trace(str(traces / "azure_llm_2023_conv.csv"), strict=True)
    sample = read_trace(str(traces / "burstgpt_1_head.csv"))
    workloads = {
        "azure_code": azure(code, "code", "An hour of a code completion service at Azure"),
        "azure_conv": azure(conv, "conv", "An hour of a conversation service at Azure"),
        "burstgpt": burstgpt(sample),
    } | {name: task(name) for name in TASKS}
    for name, workload in workloads.items():
        text = json.dumps({"schema_version": 1, "name": name, **workload}, separators=(",", ":"))
        (target / f"{name}.json").write_text(text.replace(',"', ',\n"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else Path(__file__).parent)
