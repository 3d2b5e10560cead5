"""One choice of everything that `whatif` and `plan` may vary, and grids of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from energymodel.deployment import STACKS, check_memory
from energymodel.errors import ConfigurationError, unknown_name
from energymodel.gpus import load_gpu
from energymodel.grids import load_grid_intensity
from energymodel.models import load_model
from energymodel.specs import (
    DEFAULT_DTYPE,
    DEFAULT_MAX_BATCH,
    DEFAULT_MODEL,
    DEFAULT_STACK,
    STATIC_STACKS,
)
from energymodel.units import BYTES_PER_ELEMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One choice of everything; fields as in `workload.predict`, None = its default."""

    gpu: str
    model: str = DEFAULT_MODEL
    stack: str = DEFAULT_STACK
    dtype: str = DEFAULT_DTYPE
    kv_dtype: str | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    replicas: int | str = "auto"
    prefill_replicas: int = 0
    """Replicas for prompts alone, beside `replicas` that decode; 0 = each does both."""
    prefill_gpu: str | None = None
    """GPU of those replicas; None = `gpu`, as of those that decode."""
    max_batch: int = DEFAULT_MAX_BATCH
    max_step_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    power_limit_watts: float | None = None
    """Board power limit; None = the calibration's."""
    arrival_scale: float = 1.0
    """Arrivals come this many times faster."""
    prefix_hit: float | str = 0.0
    """Share of prompt tokens found in the prefix cache; `trace` = as the trace's block ids say."""
    pue: float = 1.0
    grid: str | None = None


AXES = tuple(f.name for f in fields(Setting))
"""Names over which a grid can span."""


SHORT_NAMES: Mapping[str, str] = {
    "tensor_parallel": "TP",
    "pipeline_parallel": "PP",
    "max_batch": "batch",
    "max_step_tokens": "step tokens",
    "gpu_memory_utilization": "memory",
    "power_limit_watts": "limit W",
    "arrival_scale": "load x",
    "kv_dtype": "KV",
    "prefix_hit": "cached",
    "prefill_replicas": "prefill",
    "prefill_gpu": "prefill GPU",
    "pue": "PUE",
}
"""Axes in tables and figures; the others have their own name."""
_SAY_IT_ALONE = ("gpu", "model", "stack", "dtype")


def in_words(setting: Setting, axes: Sequence[str]) -> str:
    """The values of some axes: `h100, TP 2, batch 64`; what is left to its default is left out."""
    return ", ".join(
        str(value) if name in _SAY_IT_ALONE else f"{SHORT_NAMES.get(name, name)} {value}"
        for name in axes
        if (value := getattr(setting, name)) is not None
    )


def grid_of(axes: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of the values given by axis, the last axis changing fastest.

    Raises
    ------
    ConfigurationError
        If an axis is unknown, empty or names a value twice, or there is no GPU.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise ConfigurationError(f"unknown axis '{name}'. Known: {', '.join(AXES)}.")
        if len(values) == 0:
            raise ConfigurationError(f"axis {name} has no values; leave it out or give one")
        if len(set(values)) < len(values):
            raise ConfigurationError(f"axis {name} names a value twice")
    if "gpu" not in axes:
        raise ConfigurationError("no GPU given; name at least one")
    names = [name for name in AXES if name in axes]
    return [
        Setting(**dict(zip(names, values, strict=True)))
        for values in itertools.product(*(axes[name] for name in names))
    ]


def check_names(settings: Sequence[Setting]) -> None:
    """Refuse unknown names before a sweep starts, and shares of memory that are none.

    Raises
    ------
    EnergyModelError
        If a GPU, model, stack, dtype or grid is unknown, which lists the known ones, or a share of
        memory is not above 0 and at most 1.
    """
    for gpu in dict.fromkeys(gpu for s in settings for gpu in (s.gpu, s.prefill_gpu)):
        if gpu is not None:
            load_gpu(gpu)
    for setting in settings:
        if setting.gpu_memory_utilization is not None:
            check_memory(setting.gpu_memory_utilization)
    for model in dict.fromkeys(setting.model for setting in settings):
        load_model(model)
    for grid in dict.fromkeys(setting.grid for setting in settings):
        if grid is not None:
            load_grid_intensity(grid)
    for kind, values, known in (
        ("stack", {setting.stack for setting in settings}, STACKS),
        ("dtype", {setting.dtype for setting in settings}, tuple(BYTES_PER_ELEMENT)),
    ):
        for value in sorted(values - set(known)):
            raise ConfigurationError(unknown_name(kind, value, known))


def deployment_key(setting: Setting) -> Setting:
    """The setting with load and site left out: equal keys share their cost tables."""
    return replace(
        setting,
        replicas=1,
        prefill_replicas=0,
        prefill_gpu=None,
        arrival_scale=1.0,
        prefix_hit=0.0,
        pue=1.0,
        grid=None,
    )


def only_exact(setting: Setting) -> bool:
    """Whether there is no estimate: static batches, and pools for prefill and decode."""
    return setting.stack in STATIC_STACKS or setting.prefill_replicas > 0
