"""Rules from Hugging Face configs to `ModelSpec`, one small function per architecture.

A default is given only where published configs leave the field out; it is then the default of
the architecture's config class in transformers. Everything else must be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from energymodel.config_reader import ConfigReader
from energymodel.hf_classic import bloom, falcon, gpt2, opt, phi
from energymodel.hf_parts import (
    Layer,
    Shape,
    assemble,
    checked_moe,
    gated_mlp,
    layer_windows,
    read_shape,
    uniform_layers,
)
from energymodel.specs import AttentionSpec, ModelSpec, MoeSpec


def build_model(config: ConfigReader, name: str, source: str) -> ModelSpec:
    """The model a config describes; its architecture must be in `ARCHITECTURES`.

    Raises
    ------
    UnsupportedModelError
        If a field is missing, makes no sense, or is not known for the architecture.
    """
    checkpoint_dtype = config.checkpoint_dtype()
    model = ARCHITECTURES[config.architecture](config)
    config.finish()
    return replace(
        model,
        name=name,
        source=source,
        checkpoint_dtype=checkpoint_dtype,
        expert_dtype="mxfp4" if checkpoint_dtype == "mxfp4" else None,
    )


def _llama(c: ConfigReader) -> ModelSpec:
    bias = c.flag("attention_bias", False)
    s = read_shape(c, bias=bias)
    mlp = gated_mlp(c, bias=c.flag("mlp_bias", False))
    return assemble(c, s, uniform_layers(s, mlp, 2 * s.hidden, [None] * s.layers), s.hidden)


def _mistral(c: ConfigReader) -> ModelSpec:
    s = read_shape(c)
    windows = layer_windows(c, s.layers, c.optional_count("sliding_window"), lambda i: True)
    return assemble(c, s, uniform_layers(s, gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _mixtral(c: ConfigReader) -> ModelSpec:
    s = read_shape(c)
    moe = checked_moe(
        c,
        MoeSpec(
            num_experts=c.count("num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("intermediate_size"),
        ),
    )
    windows = layer_windows(c, s.layers, c.optional_count("sliding_window"), lambda i: True)
    return assemble(c, s, uniform_layers(s, moe, 2 * s.hidden, windows), s.hidden)


def _qwen_windows(c: ConfigReader, layers: int) -> list[int | None]:
    """Qwen slides from layer `max_window_layers` on, and only with `use_sliding_window`."""
    window = c.optional_count("sliding_window")
    first = c.count("max_window_layers", least=0, default=0)
    in_use = window if c.flag("use_sliding_window", False) else None
    return layer_windows(c, layers, in_use, lambda i: i >= first)


def _qwen2(c: ConfigReader) -> ModelSpec:
    s = read_shape(c, bias=True, o_bias=False)
    windows = _qwen_windows(c, s.layers)
    return assemble(c, s, uniform_layers(s, gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _with_head_norms(s: Shape) -> Shape:
    """Query and key norms over each head (Qwen3, Gemma 3)."""
    return replace(s, attention=replace(s.attention, qk_norm_elements=2 * s.attention.head_dim))


def _with_full_norms(s: Shape) -> Shape:
    """Query and key norms over the full width of all heads (OLMo 2, OLMoE)."""
    a = s.attention
    width = (a.num_heads + a.num_kv_heads) * a.head_dim
    return replace(s, attention=replace(a, qk_norm_elements=width))


def _qwen3(c: ConfigReader) -> ModelSpec:
    s = _with_head_norms(read_shape(c, bias=c.flag("attention_bias", False)))
    windows = _qwen_windows(c, s.layers)
    return assemble(c, s, uniform_layers(s, gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _qwen_moe(c: ConfigReader, s: Shape, shared: int) -> ModelSpec:
    """Layers with experts, except `mlp_only_layers` and those off the `decoder_sparse_step`."""
    moe = checked_moe(
        c,
        MoeSpec(
            num_experts=c.count("num_experts", "num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("moe_intermediate_size"),
            shared_intermediate_size=shared,
            shared_gate=shared > 0,
        ),
    )
    dense = gated_mlp(c)
    only_mlp = set(c.list_of("mlp_only_layers", int, default=[]) or [])
    step = c.count("decoder_sparse_step", default=1)
    layers = [
        Layer(
            attention=replace(s.attention, window_tokens=window),
            feed_forward=dense if i in only_mlp or (i + 1) % step else moe,
            norm_elements=2 * s.hidden,
        )
        for i, window in enumerate(_qwen_windows(c, s.layers))
    ]
    return assemble(c, s, layers, s.hidden)


def _qwen2_moe(c: ConfigReader) -> ModelSpec:
    bias = c.flag("qkv_bias", True)
    shared = c.count("shared_expert_intermediate_size")
    return _qwen_moe(c, read_shape(c, bias=bias, o_bias=False), shared)


def _qwen3_moe(c: ConfigReader) -> ModelSpec:
    return _qwen_moe(c, _with_head_norms(read_shape(c, bias=c.flag("attention_bias", False))), 0)


def _gemma(c: ConfigReader) -> ModelSpec:
    s = read_shape(c, bias=c.flag("attention_bias", False))
    layers = uniform_layers(s, gated_mlp(c), 2 * s.hidden, [None] * s.layers)
    return assemble(c, s, layers, s.hidden, tied_default=True)


def _gemma2(c: ConfigReader) -> ModelSpec:
    """Every other layer slides, from the first; four norms a layer; caps cost next to nothing."""
    c.ignore("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    c.ignore("sliding_window_size")  # the published 9b gives its window twice
    s = read_shape(c, bias=c.flag("attention_bias", False))
    windows = layer_windows(c, s.layers, c.count("sliding_window"), lambda i: i % 2 == 0)
    layers = uniform_layers(s, gated_mlp(c), 4 * s.hidden, windows)
    return assemble(c, s, layers, s.hidden, tied_default=True)


_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
"""Gemma3TextConfig's defaults for the fields that published Gemma 3 configs leave out."""


def _gemma3(c: ConfigReader) -> ModelSpec:
    """Five sliding layers, then a full one (`sliding_window_pattern` 6)."""
    c.set_defaults(_GEMMA3_DEFAULTS)
    c.ignore("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    s = _with_head_norms(read_shape(c, bias=c.flag("attention_bias", False)))
    pattern = c.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    windows = layer_windows(
        c, s.layers, c.count("sliding_window"), lambda i: (i + 1) % pattern != 0
    )
    layers = uniform_layers(s, gated_mlp(c), 4 * s.hidden, windows)
    model = assemble(c, s, layers, s.hidden, tied_default=True)
    # its rotary scaling is part of the configured length already
    return replace(model, max_model_len=c.count("max_position_embeddings"))


def _gemma3_multimodal(c: ConfigReader) -> ModelSpec:
    """The language model of a Gemma 3 checkpoint; the vision tower is left out."""
    c.ignore("vision_config", "mm_tokens_per_image")
    c.ignore("boi_token_index", "eoi_token_index", "image_token_index")
    inner = c.inside("text_config", "Gemma3ForCausalLM")
    inner.set_defaults({"tie_word_embeddings": c.flag("tie_word_embeddings", True)})
    model = _gemma3(inner)
    inner.finish()
    return model


def _olmo(c: ConfigReader) -> ModelSpec:
    """OLMo 1: layer norms without weights."""
    c.ignore("clip_qkv")
    s = read_shape(c, bias=c.flag("attention_bias", False))
    layers = uniform_layers(s, gated_mlp(c), 0, [None] * s.layers)
    return assemble(c, s, layers, 0, layer_norm=True)


def _olmo2(c: ConfigReader) -> ModelSpec:
    s = _with_full_norms(read_shape(c, bias=c.flag("attention_bias", False)))
    layers = uniform_layers(s, gated_mlp(c), 2 * s.hidden, [None] * s.layers)
    return assemble(c, s, layers, s.hidden)


def _olmo3(c: ConfigReader) -> ModelSpec:
    """As OLMo 2, three sliding layers, then a full one."""
    s = _with_full_norms(read_shape(c, bias=c.flag("attention_bias", False)))
    windows = layer_windows(c, s.layers, c.count("sliding_window"), lambda i: (i + 1) % 4 != 0)
    return assemble(c, s, uniform_layers(s, gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _olmoe(c: ConfigReader) -> ModelSpec:
    c.ignore("clip_qkv")
    s = _with_full_norms(read_shape(c, bias=c.flag("attention_bias", False)))
    moe = checked_moe(
        c,
        MoeSpec(
            num_experts=c.count("num_experts", "num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("intermediate_size"),
        ),
    )
    return assemble(c, s, uniform_layers(s, moe, 2 * s.hidden, [None] * s.layers), s.hidden)


def _gpt_oss(c: ConfigReader) -> ModelSpec:
    """Every other layer slides, from the first; one learned sink per head; biases throughout."""
    c.ignore("swiglu_limit", "initial_context_length")
    s = read_shape(c, bias=c.flag("attention_bias", True))
    s = replace(s, attention=replace(s.attention, extra_elements=s.attention.num_heads))
    experts = c.count("num_local_experts")
    moe = checked_moe(
        c,
        MoeSpec(
            num_experts=experts,
            experts_per_token=c.count("num_experts_per_tok", "experts_per_token"),
            expert_intermediate_size=c.count("intermediate_size"),
            bias=True,
            router_bias_elements=experts,
        ),
    )
    windows = layer_windows(c, s.layers, c.count("sliding_window"), lambda i: i % 2 == 0)
    return assemble(c, s, uniform_layers(s, moe, 2 * s.hidden, windows), s.hidden)


def _deepseek(c: ConfigReader, router_bias: bool) -> ModelSpec:
    """Multi-head latent attention; dense layers first, then routed and shared experts.

    DeepSeek-V3's multi-token-prediction module (`num_nextn_predict_layers`) is not part of
    ordinary decoding and is left out.
    """
    c.only("attention_bias", False)
    c.only("moe_layer_freq", 1)
    c.ignore("num_key_value_heads", "head_dim", "num_nextn_predict_layers", "ep_size")
    c.ignore("n_group", "topk_group", "topk_method", "scoring_func", "routed_scaling_factor")
    hidden, layers = c.count("hidden_size"), c.layer_count("num_hidden_layers")
    nope, rope = c.count("qk_nope_head_dim"), c.count("qk_rope_head_dim")
    q_rank, kv_rank = c.optional_count("q_lora_rank"), c.count("kv_lora_rank")
    heads, experts = c.count("num_attention_heads"), c.count("n_routed_experts")
    width = c.count("moe_intermediate_size")
    dense_layers = c.count("first_k_dense_replace", least=0, default=0)
    attention = AttentionSpec(
        kind="mla",
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,
        value_head_dim=c.count("v_head_dim"),
        q_lora_rank=q_rank,
        kv_lora_rank=kv_rank,
        qk_rope_head_dim=rope,
        qk_norm_elements=(q_rank or 0) + kv_rank,
    )
    moe = checked_moe(
        c,
        MoeSpec(
            num_experts=experts,
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=width,
            shared_intermediate_size=c.count("n_shared_experts", least=0, default=0) * width,
            router_bias_elements=experts if router_bias else 0,
            grouped_top_k=not router_bias,
        ),
    )
    dense = gated_mlp(c)
    shape = Shape(hidden=hidden, layers=layers, vocab=c.count("vocab_size"), attention=attention)
    stack = [
        Layer(
            attention=attention,
            feed_forward=dense if i < dense_layers else moe,
            norm_elements=2 * hidden,
        )
        for i in range(layers)
    ]
    return assemble(c, shape, stack, hidden)


def _phi3(c: ConfigReader) -> ModelSpec:
    c.only("attention_bias", False)
    c.ignore("original_max_position_embeddings")
    return _mistral(c)


ARCHITECTURES: dict[str, Callable[[ConfigReader], ModelSpec]] = {
    "BloomForCausalLM": bloom,
    "DeepseekV2ForCausalLM": lambda c: _deepseek(c, router_bias=False),
    "DeepseekV3ForCausalLM": lambda c: _deepseek(c, router_bias=True),
    "FalconForCausalLM": falcon,
    "GPT2LMHeadModel": gpt2,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3_multimodal,
    "GemmaForCausalLM": _gemma,
    "GptOssForCausalLM": _gpt_oss,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "OPTForCausalLM": opt,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo3,
    "OlmoForCausalLM": _olmo,
    "OlmoeForCausalLM": _olmoe,
    "Phi3ForCausalLM": _phi3,
    "PhiForCausalLM": phi,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
"""Rules by Hugging Face architecture class."""
