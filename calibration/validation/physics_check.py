"""A written check of the physics: cases that can be worked out by hand, beside public figures.

Where no one published the figure itself, the time of a step is put together from kernels that
others timed one by one (`kernel_seconds`), and the datasheet gives a floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.fitting.public_tables import COMMIT, REPOSITORY, table_path
from calibration.validation.public_runs import ENERGAIZER, SPLITWISE, V3
from calibration.validation.rows import (
    OWN,
    Comparison,
    offline,
)
from calibration.validation.validate import Validation
from energymodel.calibrations import load_calibration
from energymodel.errors import EnergyModelError
from energymodel.gpus import load_gpu
from energymodel.models import active_weight_count, load_model
from energymodel.results import Prediction
from energymodel.specs import AttentionSpec, MlpSpec, ModelSpec
from energymodel.workload import predict

if TYPE_CHECKING:
    import polars as pl

MODEL = "llama-3.1-8b"
DECODE_INPUT, DECODE_OUTPUT = 128, 256
PREFILL_TOKENS = 2048

PAPER = "Fernandez et al., ACL 2025 (arXiv 2504.17674), section 5"
MOE_ENERGY_RATIO = 1.5424  # "up to 54.24 % more"
TENSOR_PARALLEL_RATIOS = {2: (1.0 - 0.4016, 1.293), 4: (1.0 - 0.6134, 1.5523)}
"""(latency, energy) relative to one GPU, Llama-3.1-8B, single batch; same source."""

GPUS = ("a100", "h100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One quantity of one case. Errors are predicted / public - 1."""

    case: str
    quantity: str
    predicted: float
    public: float | None
    source: str
    """Whose figure it is and how it compares; empty where there is none."""


def physics_checks(validation: Validation, public: Path | None) -> list[Check]:
    """All checks; those whose public figures are not there come without them."""
    return [
        *_decode(validation, public),
        *_prefill(validation, public),
        *_moe(validation),
        *_parallel(validation),
    ]


def _decode(validation: Validation, public: Path | None) -> Iterator[Check]:
    requests = offline("one request", [DECODE_INPUT], DECODE_OUTPUT)
    model = load_model(MODEL)
    for gpu in GPUS:
        p = predict(requests, gpu=gpu, model=model)
        case = f"{MODEL}, decode, batch 1, {gpu}"
        joules = p.decode_joules / (p.output_tokens - 1)
        floor = 2.0 * active_weight_count(model) / load_gpu(gpu).hbm_bytes_per_s
        tpot = p.tpot_seconds.p50
        assert tpot is not None
        kernels, source = kernel_seconds(
            public, gpu, model, tokens=1, context=DECODE_INPUT + DECODE_OUTPUT // 2
        )
        yield Check(
            case=case,
            quantity="ms per token",
            predicted=tpot * 1e3,
            public=None if kernels is None else kernels * 1e3,
            source=source and f"{source}; without norms, rotary, sampling and gaps",
        )
        yield Check(
            case=case,
            quantity="ms per token",
            predicted=tpot * 1e3,
            public=floor * 1e3,
            source="floor: weights over the datasheet's bandwidth",
        )
        yield Check(case=case, quantity="W", predicted=joules / tpot, public=None, source="")
        yield Check(case=case, quantity="J per token", predicted=joules, public=None, source="")
    yield from _row_checks(validation, OWN, "llama-3.1-8b i128 o128 b1", "batch 1")
    yield from _row_checks(validation, V3, "llama-3.1-8b tp1 b8", "saturated at batch 8")
    yield from _row_checks(validation, SPLITWISE, "llama-2-70b tp2 i512 o128 b1", "batch 1", "a100")


def _prefill(validation: Validation, public: Path | None) -> Iterator[Check]:
    model = load_model(MODEL)
    for gpu in GPUS:
        p = predict(offline("one prompt", [PREFILL_TOKENS], 1), gpu=gpu, model=model)
        case = f"{MODEL}, prefill of {PREFILL_TOKENS} tokens, {gpu}"
        kernels, source = kernel_seconds(
            public, gpu, model, tokens=PREFILL_TOKENS, context=PREFILL_TOKENS
        )
        yield Check(
            case=case,
            quantity="ms",
            predicted=p.busy_seconds * 1e3,
            public=None if kernels is None else kernels * 1e3,
            source=source and f"{source}; without norms, rotary and gaps",
        )
        yield Check(
            case=case,
            quantity="W",
            predicted=p.active_joules / p.busy_seconds,
            public=None,
            source="",
        )
        yield Check(case=case, quantity="J", predicted=p.active_joules, public=None, source="")
    yield from _row_checks(validation, OWN, "llama-3.1-8b i2048 o1 b8", "prefill of 8 x 2048")
    yield from _row_checks(validation, ENERGAIZER, "opt-1.3b i128 b16", "prefill of 16 x 128")


def _moe(validation: Validation) -> Iterator[Check]:
    requests = offline("batch of 8", [128] * 8, 64)
    moe, dense = (predict(requests, gpu="a100", model=name) for name in ("olmoe-1b-7b", "olmo-1b"))
    yield Check(
        case="olmoe-1b-7b against olmo-1b, batch 8, 128 in, 64 out, a100",
        quantity="ratio of joules",
        predicted=moe.energy_joules / dense.energy_joules,
        public=MOE_ENERGY_RATIO,
        source=f"{PAPER}: 'up to', A6000 to A100 PCIe, batch not stated",
    )
    yield from _ratio_checks(
        validation, OWN, "olmoe-1b-7b i128 o128 b8", "olmo-1b i128 o128 b8", "h100"
    )


def _parallel(validation: Validation) -> Iterator[Check]:
    requests = offline("one request", [512], 64)

    def on(gpus: int) -> Prediction:
        return predict(requests, gpu="a100", model=MODEL, tensor_parallel=gpus)

    one = on(1)
    for gpus, (latency, energy) in TENSOR_PARALLEL_RATIOS.items():
        several = on(gpus)
        case = f"{MODEL}, {gpus} GPUs against 1, batch 1, 512 in, 64 out, a100"
        for quantity, predicted, figure in (
            ("ratio of seconds", several.wall_seconds / one.wall_seconds, latency),
            ("ratio of joules", several.energy_joules / one.energy_joules, energy),
        ):
            yield Check(
                case=case,
                quantity=quantity,
                predicted=predicted,
                public=figure,
                source=f"{PAPER}: single batch, GPU, lengths and link not stated",
            )
    for batch in (8, 32):
        names = (f"qwen3-32b tp2 b{batch}", f"qwen3-32b tp1 b{batch}")
        yield from _ratio_checks(validation, V3, *names, "h100")


def _found(validation: Validation, source: str, name: str, gpu: str) -> list[Comparison]:
    """Comparisons of a row on vLLM with CUDA graphs, or on the only stack its source has."""
    return [
        c
        for c in validation.comparisons
        if (c.row.source, c.row.name, c.row.gpu) == (source, name, gpu)
        and (source != OWN or (c.row.stack == "vllm" and c.row.plain))
    ]


def _ratio_checks(
    validation: Validation, source: str, name: str, against: str, gpu: str
) -> Iterator[Check]:
    """Ratios of time and energy per output token of two rows that were compared anyway."""
    pairs = zip(
        _found(validation, source, name, gpu)[:1],
        _found(validation, source, against, gpu)[:1],
        strict=False,  # nothing to say where one of them is missing
    )
    for a, b in pairs:
        case = f"{name} against {against}, {gpu}"
        yield Check(
            case=case,
            quantity="ratio of seconds",
            predicted=a.seconds_per_output_token / b.seconds_per_output_token,
            public=a.row.seconds_per_output_token / b.row.seconds_per_output_token,
            source=source,
        )
        joules = a.row.joules_per_output_token, b.row.joules_per_output_token
        yield Check(
            case=case,
            quantity="ratio of joules",
            predicted=a.joules_per_output_token / b.joules_per_output_token,
            public=joules[0] / joules[1] if joules[0] and joules[1] else None,
            source=source,
        )


def _row_checks(
    validation: Validation, source: str, name: str, what: str, gpu: str = "h100"
) -> Iterator[Check]:
    """Time, power and energy of a row that was compared anyway."""
    for c in _found(validation, source, name, gpu):
        row = c.row
        case = f"{row.model_name} on {row.tensor_parallel} {gpu}, {what}"
        joules = row.joules_per_output_token
        for quantity, predicted, measured in (
            (
                "ms per step",
                c.seconds_per_output_token * row.batch * 1e3,
                row.seconds_per_output_token * row.batch * 1e3,
            ),
            ("W", c.watts, joules and joules / row.seconds_per_output_token),
            ("J per output token", c.joules_per_output_token, joules),
        ):
            yield Check(
                case=case,
                quantity=quantity,
                predicted=predicted,
                public=measured,
                source=source + (", open to fits" if c.fitted else ""),
            )


# -- a step put together from kernels that others timed -------------------------------


def kernel_seconds(
    public: Path | None, gpu: str, model: ModelSpec, *, tokens: int, context: int
) -> tuple[float | None, str]:
    """Time of one step of one sequence, from public kernel timings, and their source.

    Sums the GEMMs (linear between neighbouring sizes, beyond the largest in proportion) and the
    attention of a dense model; None where the tables are not there.
    """
    import polars as pl  # noqa: PLC0415

    if public is None:
        return None, ""
    folder = public / "data" / "validation" / "aiconfigurator"
    phase = "generation" if tokens == 1 else "context"
    gemm_path = table_path(folder, gpu, "gemm")
    attention_path = table_path(folder, gpu, f"{phase}_attention")
    if gemm_path is None or attention_path is None:
        return None, ""
    gemms, attention = pl.read_parquet(gemm_path), pl.read_parquet(attention_path)
    gemms = gemms.filter(pl.col("gemm_dtype") == "bfloat16")
    (group,) = model.layers
    a, mlp, hidden = group.attention, group.feed_forward, model.hidden_size
    assert isinstance(mlp, MlpSpec)
    shapes = (
        ((a.num_heads + 2 * a.num_kv_heads) * a.head_dim, hidden),
        (hidden, a.num_heads * a.head_dim),
        (2 * mlp.intermediate_size, hidden),
        (hidden, mlp.intermediate_size),
    )
    layer = sum(_gemm_milliseconds(gemms, tokens, n, k) for n, k in shapes)
    layer += _attention_milliseconds(attention, a, context, decode=tokens == 1)
    head = _gemm_milliseconds(gemms, 1, model.vocab_size, hidden)
    source = f"sum of kernels, {REPOSITORY}@{COMMIT}"
    return (layer * model.num_layers + head) * 1e-3, source


def _gemm_milliseconds(gemms: pl.DataFrame, m: int, n: int, k: int) -> float:
    """Time of an m x n x k product, linear along the one side whose size the table lacks."""
    import polars as pl  # noqa: PLC0415

    table = gemms.filter(pl.col("m") == m)
    for side, size, other, fixed in (("n", n, "k", k), ("k", k, "n", n)):
        at = table.filter(pl.col(other) == fixed)
        if at.is_empty():
            continue
        at = at.group_by(side).agg(pl.col("latency").median()).sort(side)
        sizes, milliseconds = at[side].to_numpy(), at["latency"].to_numpy()
        if size > sizes[-1]:
            return float(milliseconds[-1] * size / sizes[-1])
        return float(np.interp(size, sizes, milliseconds))
    raise EnergyModelError(f"the public kernel timings hold no product with n = {n} or k = {k}")


def _attention_milliseconds(
    table: pl.DataFrame, a: AttentionSpec, context: int, *, decode: bool
) -> float:
    """Time of one layer's attention of one sequence, linear in the context."""
    import polars as pl  # noqa: PLC0415

    at = table.filter(
        (pl.col("batch_size") == 1)
        & (pl.col("num_heads") == a.num_heads)
        & (pl.col("num_key_value_heads") == a.num_kv_heads)
        & (pl.col("head_dim") == a.head_dim)
        & (pl.col("kv_cache_dtype") == "bfloat16")
    )
    if "window_size" in at.columns:
        at = at.filter(pl.col("window_size") == 0)
    side = "step" if decode else "isl"
    at = at.group_by(side).agg(pl.col("latency").median()).sort(side)
    return float(np.interp(context, at[side].to_numpy(), at["latency"].to_numpy()))


# -- as Markdown ----------------------------------------------------------------------


def physics_section(validation: Validation, public: Path | None) -> str:
    """Return the page's section on physics."""
    origins = "; ".join(
        f"{gpu}: {c.origin} ({c.intervals['vllm'].basis})"
        for gpu, c in ((gpu, load_calibration(gpu)) for gpu in GPUS)
    )
    lines = [
        "## Check of the physics",
        "",
        'Cases that can be worked out by hand. "-": nobody published the figure; "own": this '
        f"project measured it. Calibrations that answered: {origins}. A sum of kernels "
        "is no test where the calibration was fitted to the same kernels.",
        "",
        "| case | quantity | predicted | measured | error % | by whom |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for c in physics_checks(validation, public):
        error = "-" if c.public is None else f"{100 * (c.predicted / c.public - 1):+.1f}"
        figure = "-" if c.public is None else f"{c.public:.4g}"
        cells = (c.case, c.quantity, f"{c.predicted:.4g}", figure, error, c.source or "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
