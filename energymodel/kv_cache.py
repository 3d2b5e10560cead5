"""How many blocks of KV cache fit beside the weights, and how many of them a sequence holds.

Blocks are those of vLLM 0.22 (`v1/core/kv_cache_utils.py`, `single_type_kv_cache_manager.py`).
Where layers with a sliding window lie between others, layers of one kind form groups of equally
many. A block holds `block_tokens` tokens of one group; groups with a window give back the blocks
that it has left behind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from energymodel.compiled import compiled
from energymodel.errors import CapacityError
from energymodel.operators import kv_bytes_per_token, weight_bytes
from energymodel.specs import GpuSpec, ModelSpec, MoeSpec, ServingConfig
from energymodel.units import ACTIVATION_BYTES, BYTES_PER_ELEMENT, GIB

_ENGINE_BYTES = 0.19 * GIB
_GRAPH_BYTES_PER_LAYER = 0.0111 * GIB
_HIDDEN, _MLP, _EXPERTS, _LOGITS = 3.4, 0.97, 1.58, 1.3
"""What vLLM 0.22 keeps free beside weights and KV cache, by least squares over 71 engines on one
H100 or H200 that told their blocks (`calibration/data/serving`): within 0.27 GiB (standard
deviation), 1.1 GiB at most, which is what the engine estimates its graphs to take. Vectors of each
kind that a token of a step keeps alive at once, those of the logits in 32 bit."""
_PACKED_SIDE = 256
_ALIKE = 1.5  # kinds of layers whose numbers differ by less form one group each, padded


class KvCache(NamedTuple):
    """KV cache of one GPU; read by the compiled schedulers."""

    blocks: int
    block_tokens: int
    full_groups: int = 1
    """Groups of layers that keep the whole context."""
    window_groups: int = 0
    window: int = 0
    """Tokens that a group with a window keeps."""
    window_blocks: int = 0
    """Most blocks of a sequence that such a group asks for (`max_admission_blocks_per_request`)."""

    @property
    def longest_tokens(self) -> int | None:
        """Tokens of the longest sequence that fits alone; None where any does."""
        held = self.window_groups * self.window_blocks
        together = self.full_groups + self.window_groups
        if self.window_groups == 0 or self.blocks // together <= self.window_blocks:
            return self.blocks // together * self.block_tokens
        if self.full_groups == 0:
            return None
        return (self.blocks - held) // self.full_groups * self.block_tokens

    def sequences(self, tokens: float) -> int:
        """Sequences of so many tokens that fit together while they decode, at least 1."""
        each = self.full_groups * tokens
        each += self.window_groups * min(tokens, float(self.window + self.block_tokens))
        return max(1, int(self.blocks * self.block_tokens / each))


@compiled
def held_blocks(computed, tokens, kv):  # type: ignore[no-untyped-def]
    """Blocks of a sequence of `tokens`, of which `computed` were there when its step began."""
    blocks = (tokens + kv.block_tokens - 1) // kv.block_tokens
    return (kv.full_groups + kv.window_groups) * blocks - left_behind(computed, kv)


@compiled
def left_behind(computed, kv):  # type: ignore[no-untyped-def]
    """Blocks that its groups with a window have given back by a step that begins so."""
    return kv.window_groups * (max(0, computed - kv.window + 1) // kv.block_tokens)


@compiled
def asked_blocks(tokens, cached, chunk, kv):  # type: ignore[no-untyped-def]
    """Blocks that must be free for a request of `tokens` to be admitted with a first `chunk`.

    The whole request must fit (`full_sequence_must_fit`), what a window leaves behind apart.
    """
    blocks = (tokens + kv.block_tokens - 1) // kv.block_tokens
    windowed = kv.window_groups * min(blocks, kv.window_blocks) - left_behind(cached, kv)
    whole = kv.full_groups * blocks + max(0, windowed)
    return max(whole, held_blocks(cached, cached + chunk, kv))


def kv_cache(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> KvCache:
    """KV cache that fits beside the weights.

    Raises
    ------
    CapacityError
        If the weights leave no room; says how many GPUs would do.
    """
    room = _room_bytes(model, serving, gpu)
    per_token = kv_bytes_per_token(model, serving)
    if serving.draft is not None:  # a block holds the tokens of both models
        per_token += kv_bytes_per_token(serving.draft.model, serving)
    layers, full_groups, window_groups, window = _groups(model, serving)
    per_token *= layers / model.num_layers
    blocks = int(room // (per_token * serving.block_tokens))
    if blocks < 1:
        raise CapacityError(_no_room(model, serving, gpu))
    longest = serving.max_model_len or model.max_model_len
    most = min(max(window - 1, 0) + serving.max_step_tokens, longest)
    return KvCache(
        blocks=blocks,
        block_tokens=serving.block_tokens,
        full_groups=full_groups,
        window_groups=window_groups,
        window=window,
        window_blocks=-(-most // serving.block_tokens) + 1 if window_groups else 0,
    )


def _groups(model: ModelSpec, serving: ServingConfig) -> tuple[int, int, int, int]:
    """Layers in a group, groups that keep all, groups with a window, the window [tokens].

    One group of all layers where the engine is not vLLM, a draft model's tokens lie in the same
    blocks, several windows are in use, or tokens of some layers take more room than of others.
    """
    whole = model.num_layers, 1, 0, 0
    windows = {g.attention.window_tokens for g in model.layers} - {None}
    shapes = {replace(g.attention, window_tokens=None) for g in model.layers}
    hybrid = serving.stack.startswith("vllm") and serving.draft is None
    if not hybrid or len(windows) != 1 or len(shapes) != 1:
        return whole
    (window,) = windows
    assert window is not None
    full = sum(g.count for g in model.layers if g.attention.window_tokens is None)
    windowed = model.num_layers - full
    if full == 0:
        return model.num_layers, 0, 1, window
    fewer, more = sorted((full, windowed))
    layers = more if more < _ALIKE * fewer else fewer
    return layers, -(-full // layers), -(-windowed // layers), window


def _no_room(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> str:
    have = serving.tensor_parallel * serving.pipeline_parallel
    enough = _enough_tensor_parallel(model, serving, gpu)
    hint = ""
    if enough is not None:
        gpus = enough * serving.pipeline_parallel
        hint = f"; {gpus} GPUs (--tensor-parallel {enough}) would do"
    usable = serving.gpu_memory_utilization * gpu.hbm_bytes
    share = (
        f" (--gpu-memory-utilization {serving.gpu_memory_utilization:g} "
        f"of {gpu.hbm_bytes / GIB:.1f} GiB)"
    )
    drafting = "" if serving.draft is None else f" with draft model {serving.draft.model.name}"
    return (
        f"{model.name}{drafting} needs {_weight_bytes(model, serving) / GIB:.1f} GiB of "
        "weights and "
        f"{_activation_bytes(model, serving) / GIB:.1f} GiB of activations per GPU on {have} x "
        f"{gpu.title}, which leaves no room for KV cache in {usable / GIB:.1f} GiB{share}{hint}"
    )


def _activation_bytes(model: ModelSpec, serving: ServingConfig) -> float:
    """What a full step passes from kernel to kernel on one GPU [B].

    Beside hidden vectors these are what an MLP makes of a token (both halves of the up-projection
    and their product), or of a mixture the rows of as many experts as a token has, up-projection
    and output (`fused_moe`, workspaces 13 and 2).
    """
    widest = 0.0
    for part in (group.feed_forward for group in model.layers):
        halves = 2.0 if part.gated else 1.0
        if isinstance(part, MoeSpec):
            row = halves * part.expert_intermediate_size / serving.tensor_parallel
            vectors = _EXPERTS * part.experts_per_token * (row + model.hidden_size)
        else:
            width = part.intermediate_size / serving.tensor_parallel
            vectors = _MLP * (halves + 1.0) * width
        widest = max(widest, vectors)
    step = serving.max_step_tokens * (_HIDDEN * model.hidden_size + widest)
    logits = serving.max_batch * serving.beams * _LOGITS * model.vocab_size
    return step * ACTIVATION_BYTES + logits * BYTES_PER_ELEMENT["fp32"]


def _room_bytes(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> float:
    """Memory of one GPU beside weights, activations and the engine; negative if there is none."""
    usable = serving.gpu_memory_utilization * gpu.hbm_bytes - _ENGINE_BYTES
    if serving.stack == "vllm":
        usable -= _GRAPH_BYTES_PER_LAYER * model.num_layers / serving.pipeline_parallel
    return usable - _activation_bytes(model, serving) - _weight_bytes(model, serving)


def _weight_bytes(model: ModelSpec, serving: ServingConfig) -> float:
    """Weights held by one GPU [B], a draft model's among them."""
    drafts = 0.0 if serving.draft is None else weight_bytes(serving.draft.model, serving)
    return weight_bytes(model, serving) + drafts + _padding_bytes(model, serving)


def _padding_bytes(model: ModelSpec, serving: ServingConfig) -> float:
    """What vLLM's kernels for packed experts add to these [B]: one side is a multiple of 256.

    gpt-oss-120b takes 64.7 GiB as loaded where its weights are 60.7, the 20b 13.6 for 12.8.
    """
    if model.expert_dtype != "mxfp4" or not serving.stack.startswith("vllm"):
        return 0.0
    side = model.hidden_size
    experts = sum(
        3.0 * g.count * g.feed_forward.num_experts * g.feed_forward.expert_intermediate_size
        for g in model.layers
        if isinstance(g.feed_forward, MoeSpec)
    )
    added = experts * (-side % _PACKED_SIDE) * BYTES_PER_ELEMENT["mxfp4"]
    return added / serving.tensor_parallel / serving.pipeline_parallel


def _enough_tensor_parallel(model: ModelSpec, serving: ServingConfig, gpu: GpuSpec) -> int | None:
    """Fewest GPUs a stage could be split over to leave a twentieth of the memory for KV cache."""
    for parts in (2, 4, 8, 16, 32, 64):
        divides = all(group.attention.num_heads % parts == 0 for group in model.layers)
        if parts > serving.tensor_parallel and divides:
            room = _room_bytes(model, replace(serving, tensor_parallel=parts), gpu)
            if room > 0.05 * gpu.hbm_bytes:
                return parts
    return None
