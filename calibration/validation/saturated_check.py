"""What the rows of ML.ENERGY v3 leave open: how long the prompts were, and what steps hold.

Both are read from what was published beside energy and time, or from what the prediction lacks;
nothing here is fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from calibration.validation.public_runs import V3, V3_INPUT_TOKENS
from calibration.validation.rows import (
    OUTPUT_GAMMA_SHAPE,
    Comparison,
    MeasuredRow,
    compare,
    load_split,
    steady_state,
)
from calibration.validation.validate import Validation, error_stats
from energymodel.gpus import load_gpu
from energymodel.kv_cache import kv_cache
from energymodel.models import load_model
from energymodel.specs import ModelSpec, ServingConfig

SENSITIVITY_INPUT_TOKENS = (V3_INPUT_TOKENS / 2, V3_INPUT_TOKENS * 2)
FULL_CACHE_SHARE = 0.97
"""A server whose batch stays below this share of its limit waits for KV blocks."""
LEAST_CACHE_SEQUENCES = 100
"""With fewer sequences in the cache, the memory that the engine keeps free decides, not they."""
_BATCHES = (32, 64, 128, 256)


def input_sensitivity(validation: Validation) -> dict[float, list[Comparison]]:
    """Rows of ML.ENERGY v3 predicted again with other mean prompts; keys are the means."""
    split = load_split()
    rows = [c.row for c in validation.comparisons if c.row.source == V3]
    found: dict[float, list[Comparison]] = {}
    for mean in SENSITIVITY_INPUT_TOKENS:
        found[mean] = []
        for row in rows:
            whole, ramp = steady_state(
                row.name,
                batch=row.batch,
                mean_input_tokens=mean,
                mean_output_tokens=_mean_output_tokens(row),
            )
            found[mean].append(compare(replace(row, requests=whole, ramp=ramp), split))
    return found


def implied_input_tokens(validation: Validation) -> list[tuple[Comparison, float]]:
    """Mean prompts that ML.ENERGY v3's published average batches imply.

    Where the batch stays below `max_num_seqs` the KV cache is full: its tokens / the average
    batch is the mean context, input + output * (1 + CV**2) / 2 with the CV of the outputs that
    `steady_state` draws. Neither energy nor time enters.
    """
    found = []
    for c in validation.comparisons:
        row = c.row
        if row.source != V3 or row.mean_batch is None or row.ramp is None:
            continue
        if row.mean_batch > FULL_CACHE_SHARE * row.batch or row.mean_batch < LEAST_CACHE_SEQUENCES:
            continue
        serving = ServingConfig(tensor_parallel=row.tensor_parallel, max_batch=row.batch)
        model = row.model if isinstance(row.model, ModelSpec) else load_model(row.model)
        kv = kv_cache(model, serving, load_gpu(row.gpu))
        cache = kv.blocks * kv.block_tokens  # its models have no windows
        outputs = _mean_output_tokens(row)
        context = cache / row.mean_batch
        found.append((c, context - outputs * (1.0 + 1.0 / OUTPUT_GAMMA_SHAPE) / 2.0))
    return found


def _mean_output_tokens(row: MeasuredRow) -> float:
    """Mean output of the steady part of a saturated row."""
    assert row.ramp is not None
    tokens = row.requests.output_tokens.sum() - row.ramp.output_tokens.sum()
    return float(tokens / (len(row.requests.output_tokens) - len(row.ramp.output_tokens)))


# -- as Markdown ----------------------------------------------------------------------


def saturated_sections(validation: Validation) -> list[str]:
    """Return the page's sections on these rows; none where they are not there."""
    known = [c for c in validation.comparisons if c.row.source == V3]
    if not known:
        return []
    return [
        _input_section(known, input_sensitivity(validation), implied_input_tokens(validation)),
        _sampling_section(known),
    ]


def _input_section(
    known: Sequence[Comparison],
    others: dict[float, list[Comparison]],
    implied: Sequence[tuple[Comparison, float]],
) -> str:
    lines = [
        f"## The assumed prompt length of {V3}",
        "",
        "Prompt lengths are not published, but average batches are. Where the batch stays below "
        "its limit, the KV cache is full, and its tokens over the average batch are the mean "
        "context; less the output's part, the mean prompt. Neither joules nor seconds enter.",
        "",
        "| row | average batch | implied mean prompt |",
        "| --- | ---: | ---: |",
        *(f"| {c.row.name} | {c.row.mean_batch:.1f} | {tokens:.0f} |" for c, tokens in implied),
        "",
        f"The assumption is {V3_INPUT_TOKENS:.0f}: the engine keeps more memory free than is "
        "assumed here, so the figures are upper ends. Errors of the same rows with other means:",
        "",
        "| mean prompt | J: median \\|e\\| % | sign | s: median \\|e\\| % | sign |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for mean, rows in sorted({V3_INPUT_TOKENS: list(known), **others}.items()):
        joules = error_stats(c.joules_error for c in rows)
        seconds = error_stats(c.seconds_error for c in rows)
        assert joules is not None and seconds is not None
        numbers = (joules.median_abs, joules.median, seconds.median_abs, seconds.median)
        cells = (f"{100 * v:+.1f}" if i % 2 else f"{100 * v:.1f}" for i, v in enumerate(numbers))
        lines.append(f"| {mean:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _sampling_section(known: Sequence[Comparison]) -> str:
    lines = [
        f"## What the steps of {V3} hold beside the model's operators",
        "",
        "Measured less predicted time of a step, over the sequences in it [microseconds]. Time "
        "that grows with the sequences alone, not with the model or the GPUs it is split over, "
        "points to the drawing of tokens: these servers draw with top-p 0.95, which sorts the "
        "vocabulary of every sequence on every GPU; what such a sort took on an H100 of this "
        "project is in the prediction.",
        "",
        "| model | GPUs | vocabulary | " + " | ".join(f"batch {b}" for b in _BATCHES) + " |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    excess: dict[tuple[str, int], dict[int, float]] = {}
    for c in known:
        # a step takes batch x seconds per output token, so batch cancels out
        seconds = c.row.seconds_per_output_token - c.seconds_per_output_token
        excess.setdefault((c.row.model_name, c.row.tensor_parallel), {})[c.row.batch] = seconds
    for (model, gpus), by_batch in excess.items():
        cells = [f"{by_batch[batch] * 1e6:.0f}" if batch in by_batch else "-" for batch in _BATCHES]
        vocabulary = load_model(model).vocab_size
        lines.append(f"| {model} | {gpus} | {vocabulary} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
