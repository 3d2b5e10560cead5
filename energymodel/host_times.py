"""What the host takes for a step: fixed times, and launches of kernels that no graph replays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from energymodel.calibrations import StackCalibration
from energymodel.operator_parts import WEIGHTS_ONLY
from energymodel.operators import has_gemma_norms
from energymodel.specs import ModelSpec, MoeSpec, ServingConfig

Array = NDArray[np.float64]

_LAYER_NORM_KERNELS = 3.0
"""A layer norm run op by op converts to 32 bit, normalises and converts back."""
_OP_BY_OP_NORM_KERNELS = 5.0
"""What a norm of Gemma takes the host where nothing is compiled: its weight is 1 + w, which is no
kernel of vLLM's. A layer of Gemma-2-9B then takes 0.83 ms where Llama's take 0.41 (one host)."""
_HEAD_NORM_COPIES = 1.0
"""Copies before a norm of queries or keys in eager vLLM (`attention_operators._after_copies`). With
them a layer of Qwen3 launches 20 kernels where Llama's launch 16; eager steps of one sequence take
1.14 to 1.45 times as long a layer on six hosts."""
_EXPERT_KERNELS = 13.0
"""What fused experts take the host beyond a dense MLP's kernels, in launches: vLLM looks up tiles,
aligns rows to them and launches Triton's kernels from Python. First steps of 1,024 tokens, outside
graphs, of OLMoE and Qwen3-30B-A3B take 0.9 to 1.9 ms a layer, dense ones 0.5 to 0.6: 7 to 18
launches more on seven hosts, 13 their median; eager steps of OLMoE take 0.91 ms a layer where
Llama's take 0.41. Packed experts (gpt-oss) are one call."""


_BEAM_KERNELS, _BEAM_LAYER_KERNELS = 83.0, 2.0
"""Launches of beam search beyond a greedy step's: choosing beams, and putting keys and values of
each layer into their order (steps of OLMo-1B and Llama-3.1-8B, calibration/data/beams)."""


def host_seconds(
    model: ModelSpec,
    stack: StackCalibration,
    serving: ServingConfig,
    reorder_seconds: float = 0.0,
) -> Array:
    """Host and gap seconds of a step, in the order of `CostTables.host`.

    0 of a step in a captured graph, 1 of one with prompts (attention left out of the graph), 2 of
    one that launches every kernel; 3 per sequence; 4 gap, 5 gap per token of KV cache attended to
    (`costs.reorder_seconds`), 6 gap before a first step, 7 per new prompt; 8 of a draft model's
    pass, which launches every kernel; 9 of a round with drafts, 10 the same per sequence.
    """
    step, sequence = stack.step_host_seconds, stack.sequence_host_seconds
    if serving.tensor_parallel > 1:
        step += stack.parallel_host_seconds
        sequence *= stack.parallel_sequence_share
    of_model = _kernels(model, stack, serving.stack)
    if serving.beams > 1:
        of_model += _BEAM_KERNELS + _BEAM_LAYER_KERNELS * model.num_layers
    of_draft = 0.0 if serving.draft is None else _kernels(serving.draft.model, stack, serving.stack)
    return np.array(
        [
            step,
            step + stack.piecewise_kernels * model.num_layers * stack.launch_seconds,
            step + of_model * stack.launch_seconds,
            sequence,
            stack.step_gap_seconds + stack.layer_gap_seconds * model.num_layers,
            reorder_seconds,
            stack.start_gap_seconds,
            stack.request_host_seconds,
            stack.draft_host_seconds + of_draft * stack.launch_seconds,
            stack.round_host_seconds,
            stack.round_sequence_host_seconds,
        ]
    )


def _kernels(model: ModelSpec, stack: StackCalibration, name: str) -> float:
    """Kernels that the layers launch where no graph replays them, in the stack of that name."""
    rms = stack.norm_kernels
    each = min(_LAYER_NORM_KERNELS, rms) if model.layer_norm else rms
    usual = 1 if model.parallel_block else 2
    is_vllm = name.startswith("vllm")
    fused_experts = is_vllm and model.expert_dtype not in WEIGHTS_ONLY
    count = 0.0
    for group in model.layers:
        is_gemma = has_gemma_norms(model, group)
        own = max(each, _OP_BY_OP_NORM_KERNELS) if is_gemma and name == "vllm-eager" else each
        of_heads = 2 if group.attention.qk_norm_elements else 0
        of_head = rms + (_HEAD_NORM_COPIES if name == "vllm-eager" else 0.0)
        kernels = stack.kernels_per_layer - 2.0 * rms
        kernels += (2 * usual if is_gemma else usual) * own + of_heads * of_head
        if fused_experts and isinstance(group.feed_forward, MoeSpec):
            kernels += _EXPERT_KERNELS
        count += group.count * kernels
    return count
