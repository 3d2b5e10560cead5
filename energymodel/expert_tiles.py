"""Launches of the fused expert kernel that vLLM tuned for a GPU (`profiles/expert_tiles.json`)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

from energymodel.datafiles import data_path
from energymodel.errors import ProfileError
from energymodel.specs import GpuSpec, LayerGroup, ModelSpec, MoeSpec, ServingConfig


def with_tuned_tiles(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> ModelSpec:
    """The model, its experts with the tiles that vLLM was tuned to take on this GPU.

    As it is where vLLM has no tuned launch for the shape of the experts: its rule counts then
    (`experts.moe_tile_rows`).

    Raises
    ------
    ProfileError
        If the data file is missing or malformed.
    """
    if not serving.stack.startswith("vllm"):
        return model
    dtype = model.expert_dtype or serving.weight_dtype

    def tuned(group: LayerGroup) -> LayerGroup:
        moe = group.feed_forward
        if not isinstance(moe, MoeSpec):
            return group
        width = moe.expert_intermediate_size // serving.tensor_parallel
        tiles = _tiles(gpu.name, f"{moe.num_experts}x{width}", dtype)
        return replace(group, feed_forward=replace(moe, tiles=tiles))

    return replace(model, layers=tuple(tuned(group) for group in model.layers))


def _tiles(gpu: str, shape: str, dtype: str) -> tuple[tuple[float, int, int], ...]:
    try:
        entries = _tables().get(gpu, {}).get(shape, {}).get(dtype, [])
        return tuple(
            (float("inf") if last is None else last, int(rows), int(columns))
            for last, rows, columns in entries
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ProfileError(f"expert_tiles.json, {gpu}, {shape}, {dtype}: {error}") from error


@cache
def _tables() -> dict[str, Any]:
    path = data_path("expert_tiles.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as JSON ({error})") from error
