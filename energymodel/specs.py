"""The frozen dataclasses that carry parameters: what a model, a GPU and a serving setup are.

No IO and no maths beyond counting. SI units; the unit is the last part of each name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Origin = Literal["measured", "public-data", "datasheet"]
Stack = Literal["vllm", "vllm-eager", "transformers", "transformers-compile"]
Decoding = Literal["greedy", "sampling", "sampling-sorted", "beam"]

STATIC_STACKS: tuple[Stack, ...] = ("transformers", "transformers-compile")
"""Stacks whose batches start and end together; the others batch continuously."""

DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_STACK: Stack = "vllm"
DEFAULT_DTYPE = "bf16"
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9
DEFAULT_MAX_BATCH = 256
"""What is served, and how, where nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """What a GPU is by its datasheet. Peaks are dense (never 2:4 sparse), links one direction."""

    name: str
    """Canonical short name, as `--gpu` takes it (`a100`)."""
    title: str
    """The vendor's name of the board."""
    aliases: tuple[str, ...]
    """Other accepted names, the NVML name among them."""
    architecture: str
    """Vendor's architecture name, lower case (`ampere`, `hopper`)."""
    peak_flops_per_s: Mapping[str, float]
    """Dense peak [FLOP/s] by dtype (`bf16`, `fp16`, `fp8`, `int8`, `fp32`, `mxfp4`)."""
    hbm_bytes: float
    """Device memory [B]."""
    hbm_bytes_per_s: float
    """Device memory bandwidth [B/s]."""
    l2_bytes: float
    """Last-level on-chip cache [B]."""
    link_bytes_per_s: float
    """GPU-to-GPU bandwidth in one direction [B/s] (NVLink, or PCIe where there is none)."""
    tdp_watts: float
    """Board power limit [W]."""
    sm_count: int
    """Streaming multiprocessors (compute units)."""
    boost_clock_hz: float
    """Highest SM clock [Hz]."""
    idle_watts: float | None
    """Published idle board power [W]; None where nobody published one."""
    sources: Mapping[str, str]
    """Where each field comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Attention of one kind of layer."""

    kind: Literal["gqa", "mla"] = "gqa"
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Query/key width of a head (MLA: qk_nope_head_dim + qk_rope_head_dim)."""
    value_head_dim: int
    """Value width of a head (equal to head_dim except for MLA)."""
    window_tokens: int | None = None
    """Sliding window [tokens]; None = the whole context."""
    q_bias: bool = False
    kv_bias: bool = False
    o_bias: bool = False
    qk_norm_elements: int = 0
    """Weights of the query and key norms of one layer together."""
    extra_elements: int = 0
    """Other weights of one layer's attention (gpt-oss: one sink per head)."""
    q_lora_rank: int | None = None
    """MLA: rank of the query compression; None = none."""
    kv_lora_rank: int = 0
    """MLA: rank of the compressed KV that is cached."""
    qk_rope_head_dim: int = 0
    """MLA: width of the shared rotary key that is cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Dense feed-forward block."""

    intermediate_size: int
    gated: bool = True
    """True: gate and up projections (SwiGLU, GeGLU); False: one up projection."""
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Mixture-of-experts feed-forward block."""

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int = 0
    """Width of the always-active shared expert(s) together; 0 = none."""
    shared_gate: bool = False
    """A hidden_size x 1 gate on the shared expert."""
    gated: bool = True
    bias: bool = False
    """Biases on the experts' projections."""
    router_bias_elements: int = 0
    grouped_top_k: bool = False
    """Experts are chosen within groups, by their scores alone (DeepSeek-V2)."""
    tiles: tuple[tuple[float, int, int], ...] = ()
    """(tokens of a step up to which it counts, rows of a tile, its columns) of launches tuned for
    the GPU that serves the model; empty = the engine's rule (`experts.moe_tile_rows`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """`count` identical transformer layers."""

    count: int
    attention: AttentionSpec
    feed_forward: MlpSpec | MoeSpec
    norm_elements: int
    """Norm weights (and biases) of one layer, query/key norms left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a decoder-only transformer."""

    name: str
    architecture: str
    """Hugging Face architecture class (`LlamaForCausalLM`)."""
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    max_model_len: int
    """Longest context the config allows [tokens]."""
    layers: tuple[LayerGroup, ...]
    final_norm_elements: int
    lm_head_bias: bool = False
    expert_dtype: str | None = None
    """Stored dtype of the experts where the checkpoint fixes it (gpt-oss: `mxfp4`)."""
    checkpoint_dtype: str | None = None
    """Dtype of the checkpoint's linear weights (`quantization_config`, else `torch_dtype`);
    None where the config does not say."""
    learned_position_elements: int = 0
    """Weights of a learned position table (OPT, GPT-2); 0 for rotary models."""
    parallel_block: bool = False
    """Attention and MLP read the same normalised input (Falcon, Phi, GPT-J)."""
    layer_norm: bool = False
    """Layer norms in place of RMS norms."""
    source: str = ""

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return sum(group.count for group in self.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A small model that proposes tokens, which the served model checks (vLLM `draft_model`)."""

    model: ModelSpec
    tokens: int
    """Tokens it proposes a round (vLLM `num_speculative_tokens`)."""
    acceptance: float
    """Probability that a proposed token is accepted, those before it being so [-]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """How the model is served. Defaults are vLLM V1's own for its offline `LLM` class."""

    stack: Stack = DEFAULT_STACK
    weight_dtype: str = DEFAULT_DTYPE
    kv_dtype: str = "bf16"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    max_batch: int = DEFAULT_MAX_BATCH
    """Sequences in flight at once (vLLM `max_num_seqs`)."""
    max_step_tokens: int = 8192
    """Token budget of a step (vLLM `max_num_batched_tokens`)."""
    max_model_len: int | None = None
    """Longest context served; None = the model's own."""
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    """Share of a GPU's memory that the engine may use [-]; vLLM 0.22's own default is 0.92."""
    block_tokens: int = 16
    """Tokens per KV block."""
    graph_batch_sizes: tuple[int, ...] = field(
        default=(1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))
    )
    """Token counts with a captured CUDA graph; steps are padded up to the next one."""
    decoding: Decoding = "greedy"
    """How a token is chosen: the likeliest, drawn (temperature and top-p), or by beam search."""
    beams: int = 1
    """Hypotheses kept of each request; more than 1 with beam search only."""
    draft: Draft | None = None
    decode_queries: int = 1
    """Tokens of each decoding sequence in a step: 1 + draft tokens where drafts are checked."""
