"""Rules from Hugging Face configs to `ModelSpec`, one small function per architecture.

A default is given here only where published configs leave the field out; it is then the
default of the architecture's config class in transformers 4.5x. Everything else must be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from energymodel.config_reader import ConfigReader
from energymodel.specs import AttentionSpec, LayerGroup, MlpSpec, ModelSpec, MoeSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    attention: AttentionSpec
    feed_forward: MlpSpec | MoeSpec
    norm_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What nearly all configs state under the same names."""

    hidden: int
    layers: int
    vocab: int
    attention: AttentionSpec


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


def _model(
    c: ConfigReader,
    shape: _Shape,
    layers: list[_Layer],
    final_norm_elements: int,
    *,
    tied_default: bool = False,
    positions: str = "max_position_embeddings",
    lm_head_bias: bool = False,
    learned_position_elements: int = 0,
    parallel_block: bool = False,
) -> ModelSpec:
    """Put a model together; identical layers become one group, in order of first appearance."""
    counts: dict[_Layer, int] = {}
    for layer in layers:
        counts[layer] = counts.get(layer, 0) + 1
    return ModelSpec(
        name="",
        architecture=c.architecture,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        tied_embeddings=c.flag("tie_word_embeddings", tied_default),
        max_model_len=c.max_model_len(positions),
        layers=tuple(
            LayerGroup(
                count=count,
                attention=layer.attention,
                feed_forward=layer.feed_forward,
                norm_elements=layer.norm_elements,
            )
            for layer, count in counts.items()
        ),
        final_norm_elements=final_norm_elements,
        lm_head_bias=lm_head_bias,
        learned_position_elements=learned_position_elements,
        parallel_block=parallel_block,
    )


def _shape(c: ConfigReader, *, bias: bool = False, o_bias: bool | None = None) -> _Shape:
    """Sizes under the names Llama's config gives them, grouped-query attention.

    head_dim defaults to hidden_size / num_attention_heads and num_key_value_heads to
    num_attention_heads, as in transformers.
    """
    hidden, heads = c.count("hidden_size"), c.count("num_attention_heads")
    kv_heads = c.count("num_key_value_heads", default=heads)
    head_dim = c.optional_count("head_dim")
    if head_dim is None:
        head_dim = _divide(c, hidden, heads, "hidden_size", "num_attention_heads")
    _divide(c, heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    return _Shape(
        hidden=hidden,
        layers=c.layer_count("num_hidden_layers"),
        vocab=c.count("vocab_size"),
        attention=AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            value_head_dim=head_dim,
            q_bias=bias,
            kv_bias=bias,
            o_bias=bias if o_bias is None else o_bias,
        ),
    )


def _divide(c: ConfigReader, whole: int, parts: int, whole_key: str, parts_key: str) -> int:
    if whole % parts:
        raise c.error(f"{whole_key} {whole} is not divisible by {parts_key} {parts}")
    return whole // parts


def _uniform(
    shape: _Shape, feed_forward: MlpSpec | MoeSpec, norms: int, windows: list[int | None]
) -> list[_Layer]:
    """Layers that differ in their window alone; `norms` weights per layer."""
    return [
        _Layer(
            attention=replace(shape.attention, window_tokens=window),
            feed_forward=feed_forward,
            norm_elements=norms,
        )
        for window in windows
    ]


def _windows(
    c: ConfigReader, layers: int, window: int | None, slides: Callable[[int], bool]
) -> list[int | None]:
    """Sliding window of each layer: from `layer_types` where given, else `slides(index)`."""
    kinds = c.list_of("layer_types", str)
    if kinds is None:
        return [window if slides(i) else None for i in range(layers)]
    if len(kinds) != layers:
        raise c.error(f"layer_types has {len(kinds)} entries for {layers} layers")
    if unknown := sorted(set(kinds) - {_FULL, _SLIDING}):
        raise c.error(f"layer_types {', '.join(unknown)[:60]} are not modelled")
    if _SLIDING in kinds and window is None:
        raise c.error("layer_types has sliding layers but sliding_window is missing")
    return [window if kind == _SLIDING else None for kind in kinds]


def _gated_mlp(c: ConfigReader, *, bias: bool = False) -> MlpSpec:
    return MlpSpec(intermediate_size=c.count("intermediate_size"), gated=True, bias=bias)


def _moe(c: ConfigReader, moe: MoeSpec) -> MoeSpec:
    if moe.experts_per_token > moe.num_experts:
        raise c.error(f"{moe.experts_per_token} experts per token of only {moe.num_experts}")
    return moe


def _llama(c: ConfigReader) -> ModelSpec:
    bias = c.flag("attention_bias", False)
    s = _shape(c, bias=bias)
    mlp = _gated_mlp(c, bias=c.flag("mlp_bias", False))
    return _model(c, s, _uniform(s, mlp, 2 * s.hidden, [None] * s.layers), s.hidden)


def _mistral(c: ConfigReader) -> ModelSpec:
    s = _shape(c)
    windows = _windows(c, s.layers, c.optional_count("sliding_window"), lambda i: True)
    return _model(c, s, _uniform(s, _gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _mixtral(c: ConfigReader) -> ModelSpec:
    s = _shape(c)
    moe = _moe(
        c,
        MoeSpec(
            num_experts=c.count("num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("intermediate_size"),
        ),
    )
    windows = _windows(c, s.layers, c.optional_count("sliding_window"), lambda i: True)
    return _model(c, s, _uniform(s, moe, 2 * s.hidden, windows), s.hidden)


def _qwen_windows(c: ConfigReader, layers: int) -> list[int | None]:
    """Qwen slides from layer `max_window_layers` on, and only with `use_sliding_window`."""
    window = c.optional_count("sliding_window")
    first = c.count("max_window_layers", least=0, default=0)
    in_use = window if c.flag("use_sliding_window", False) else None
    return _windows(c, layers, in_use, lambda i: i >= first)


def _qwen2(c: ConfigReader) -> ModelSpec:
    s = _shape(c, bias=True, o_bias=False)
    windows = _qwen_windows(c, s.layers)
    return _model(c, s, _uniform(s, _gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _with_head_norms(s: _Shape) -> _Shape:
    """Query and key norms over each head (Qwen3, Gemma 3)."""
    return replace(s, attention=replace(s.attention, qk_norm_elements=2 * s.attention.head_dim))


def _with_full_norms(s: _Shape) -> _Shape:
    """Query and key norms over the full width of all heads (OLMo 2, OLMoE)."""
    a = s.attention
    width = (a.num_heads + a.num_kv_heads) * a.head_dim
    return replace(s, attention=replace(a, qk_norm_elements=width))


def _qwen3(c: ConfigReader) -> ModelSpec:
    s = _with_head_norms(_shape(c, bias=c.flag("attention_bias", False)))
    windows = _qwen_windows(c, s.layers)
    return _model(c, s, _uniform(s, _gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _qwen_moe(c: ConfigReader, s: _Shape, shared: int) -> ModelSpec:
    """Layers with experts, except `mlp_only_layers` and those off the `decoder_sparse_step`."""
    moe = _moe(
        c,
        MoeSpec(
            num_experts=c.count("num_experts", "num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("moe_intermediate_size"),
            shared_intermediate_size=shared,
            shared_gate=shared > 0,
        ),
    )
    dense = _gated_mlp(c)
    only_mlp = set(c.list_of("mlp_only_layers", int, default=[]) or [])
    step = c.count("decoder_sparse_step", default=1)
    layers = [
        _Layer(
            attention=replace(s.attention, window_tokens=window),
            feed_forward=dense if i in only_mlp or (i + 1) % step else moe,
            norm_elements=2 * s.hidden,
        )
        for i, window in enumerate(_qwen_windows(c, s.layers))
    ]
    return _model(c, s, layers, s.hidden)


def _qwen2_moe(c: ConfigReader) -> ModelSpec:
    bias = c.flag("qkv_bias", True)
    shared = c.count("shared_expert_intermediate_size")
    return _qwen_moe(c, _shape(c, bias=bias, o_bias=False), shared)


def _qwen3_moe(c: ConfigReader) -> ModelSpec:
    return _qwen_moe(c, _with_head_norms(_shape(c, bias=c.flag("attention_bias", False))), 0)


def _gemma(c: ConfigReader) -> ModelSpec:
    s = _shape(c, bias=c.flag("attention_bias", False))
    layers = _uniform(s, _gated_mlp(c), 2 * s.hidden, [None] * s.layers)
    return _model(c, s, layers, s.hidden, tied_default=True)


def _gemma2(c: ConfigReader) -> ModelSpec:
    """Every other layer slides, from the first; four norms a layer; caps cost next to nothing."""
    c.ignore("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
    c.ignore("sliding_window_size")  # the published 9b gives its window twice
    s = _shape(c, bias=c.flag("attention_bias", False))
    windows = _windows(c, s.layers, c.count("sliding_window"), lambda i: i % 2 == 0)
    layers = _uniform(s, _gated_mlp(c), 4 * s.hidden, windows)
    return _model(c, s, layers, s.hidden, tied_default=True)


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
    s = _with_head_norms(_shape(c, bias=c.flag("attention_bias", False)))
    pattern = c.count("sliding_window_pattern", "_sliding_window_pattern", default=6)
    windows = _windows(c, s.layers, c.count("sliding_window"), lambda i: (i + 1) % pattern != 0)
    layers = _uniform(s, _gated_mlp(c), 4 * s.hidden, windows)
    model = _model(c, s, layers, s.hidden, tied_default=True)
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
    s = _shape(c, bias=c.flag("attention_bias", False))
    return _model(c, s, _uniform(s, _gated_mlp(c), 0, [None] * s.layers), 0)


def _olmo2(c: ConfigReader) -> ModelSpec:
    s = _with_full_norms(_shape(c, bias=c.flag("attention_bias", False)))
    layers = _uniform(s, _gated_mlp(c), 2 * s.hidden, [None] * s.layers)
    return _model(c, s, layers, s.hidden)


def _olmo3(c: ConfigReader) -> ModelSpec:
    """As OLMo 2, three sliding layers, then a full one."""
    s = _with_full_norms(_shape(c, bias=c.flag("attention_bias", False)))
    windows = _windows(c, s.layers, c.count("sliding_window"), lambda i: (i + 1) % 4 != 0)
    return _model(c, s, _uniform(s, _gated_mlp(c), 2 * s.hidden, windows), s.hidden)


def _olmoe(c: ConfigReader) -> ModelSpec:
    c.ignore("clip_qkv")
    s = _with_full_norms(_shape(c, bias=c.flag("attention_bias", False)))
    moe = _moe(
        c,
        MoeSpec(
            num_experts=c.count("num_experts", "num_local_experts"),
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=c.count("intermediate_size"),
        ),
    )
    return _model(c, s, _uniform(s, moe, 2 * s.hidden, [None] * s.layers), s.hidden)


def _gpt_oss(c: ConfigReader) -> ModelSpec:
    """Every other layer slides, from the first; one learned sink per head; biases throughout."""
    c.ignore("swiglu_limit", "initial_context_length")
    s = _shape(c, bias=c.flag("attention_bias", True))
    s = replace(s, attention=replace(s.attention, extra_elements=s.attention.num_heads))
    experts = c.count("num_local_experts")
    moe = _moe(
        c,
        MoeSpec(
            num_experts=experts,
            experts_per_token=c.count("num_experts_per_tok", "experts_per_token"),
            expert_intermediate_size=c.count("intermediate_size"),
            bias=True,
            router_bias_elements=experts,
        ),
    )
    windows = _windows(c, s.layers, c.count("sliding_window"), lambda i: i % 2 == 0)
    return _model(c, s, _uniform(s, moe, 2 * s.hidden, windows), s.hidden)


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
    moe = _moe(
        c,
        MoeSpec(
            num_experts=experts,
            experts_per_token=c.count("num_experts_per_tok"),
            expert_intermediate_size=width,
            shared_intermediate_size=c.count("n_shared_experts", least=0, default=0) * width,
            router_bias_elements=experts if router_bias else 0,
        ),
    )
    dense = _gated_mlp(c)
    shape = _Shape(hidden=hidden, layers=layers, vocab=c.count("vocab_size"), attention=attention)
    stack = [
        _Layer(
            attention=attention,
            feed_forward=dense if i < dense_layers else moe,
            norm_elements=2 * hidden,
        )
        for i in range(layers)
    ]
    return _model(c, shape, stack, hidden)


def _phi(c: ConfigReader) -> ModelSpec:
    """Phi-1 to Phi-2: parallel block, one layer norm with bias, biases throughout."""
    c.only("qk_layernorm", False)
    s = _shape(c, bias=True)
    mlp = MlpSpec(intermediate_size=c.count("intermediate_size"), gated=False, bias=True)
    layers = _uniform(s, mlp, 2 * s.hidden, [None] * s.layers)
    return _model(c, s, layers, 2 * s.hidden, lm_head_bias=True, parallel_block=True)


def _phi3(c: ConfigReader) -> ModelSpec:
    c.only("attention_bias", False)
    c.ignore("original_max_position_embeddings")
    return _mistral(c)


def _classic(
    c: ConfigReader, *, hidden: int, heads: int, kv_heads: int, layers: int, bias: bool
) -> _Shape:
    """Shape of the older architectures, whose heads split the hidden size."""
    head_dim = _divide(c, hidden, heads, "hidden size", "attention heads")
    _divide(c, heads, kv_heads, "attention heads", "KV heads")
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        q_bias=bias,
        kv_bias=bias,
        o_bias=bias,
    )
    return _Shape(hidden=hidden, layers=layers, vocab=c.count("vocab_size"), attention=attention)


def _falcon(c: ConfigReader) -> ModelSpec:
    """Falcon's three forms: 7B (one KV head), 40B and 180B (new decoder), RW (alibi)."""
    c.set_defaults({"max_position_embeddings": 2048})  # left out of the published configs
    c.ignore("apply_residual_connection_post_layernorm", "activation", "alibi")
    new = c.flag("new_decoder_architecture", False)
    parallel = c.flag("parallel_attn", True) or new
    bias = c.flag("bias", False)
    hidden, heads = c.count("hidden_size"), c.count("num_attention_heads", "n_head")
    grouped = c.count("num_kv_heads", "n_head_kv", default=heads)
    classic = 1 if c.flag("multi_query", True) else heads
    s = _classic(
        c,
        hidden=hidden,
        heads=heads,
        kv_heads=grouped if new else classic,
        layers=c.layer_count("num_hidden_layers", "n_layer"),
        bias=bias,
    )
    c.only("head_dim", s.attention.head_dim)
    wide = c.count("ffn_hidden_size", default=4 * hidden)
    mlp = MlpSpec(intermediate_size=wide, gated=False, bias=bias)
    parallel_norms = c.count("num_ln_in_parallel_attn", most=2, default=2 if new else 1)
    norms = (parallel_norms if parallel else 2) * 2 * hidden
    layers = _uniform(s, mlp, norms, [None] * s.layers)
    return _model(c, s, layers, 2 * hidden, tied_default=True, parallel_block=parallel)


def _opt(c: ConfigReader) -> ModelSpec:
    """OPT; its position table has two rows more than positions."""
    hidden = c.count("hidden_size")
    c.only("word_embed_proj_dim", hidden)
    c.only("do_layer_norm_before", True)
    c.only("_remove_final_layer_norm", False)
    c.only("enable_bias", True)
    c.only("layer_norm_elementwise_affine", True)
    heads = c.count("num_attention_heads")
    layers = c.layer_count("num_hidden_layers")
    s = _classic(c, hidden=hidden, heads=heads, kv_heads=heads, layers=layers, bias=True)
    mlp = MlpSpec(intermediate_size=c.count("ffn_dim"), gated=False, bias=True)
    stack = _uniform(s, mlp, 4 * hidden, [None] * layers)
    positions = (c.count("max_position_embeddings") + 2) * hidden
    return _model(c, s, stack, 2 * hidden, tied_default=True, learned_position_elements=positions)


def _gpt2(c: ConfigReader) -> ModelSpec:
    c.ignore("n_ctx", "scale_attn_weights", "reorder_and_upcast_attn")
    c.ignore("scale_attn_by_inverse_layer_idx")
    hidden, heads = c.count("n_embd"), c.count("n_head")
    layers = c.layer_count("n_layer")
    s = _classic(c, hidden=hidden, heads=heads, kv_heads=heads, layers=layers, bias=True)
    wide = c.count("n_inner", default=4 * hidden)
    mlp = MlpSpec(intermediate_size=wide, gated=False, bias=True)
    stack = _uniform(s, mlp, 4 * hidden, [None] * layers)
    return _model(
        c,
        s,
        stack,
        2 * hidden,
        tied_default=True,
        positions="n_positions",
        learned_position_elements=c.count("n_positions") * hidden,
    )


def _bloom(c: ConfigReader) -> ModelSpec:
    """BLOOM: alibi, and a norm after the embedding (counted with the final norm)."""
    c.set_defaults({"seq_length": 2048})  # the length it was trained with
    c.ignore("apply_residual_connection_post_layernorm", "attention_softmax_in_fp32")
    c.ignore("bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi", "slow_but_exact")
    c.ignore("skip_bias_add", "skip_bias_add_qkv", "unk_token_id")
    hidden = c.count("hidden_size", "n_embed")
    heads = c.count("n_head", "num_attention_heads")
    layers = c.layer_count("n_layer", "num_hidden_layers")
    s = _classic(c, hidden=hidden, heads=heads, kv_heads=heads, layers=layers, bias=True)
    mlp = MlpSpec(intermediate_size=4 * hidden, gated=False, bias=True)
    stack = _uniform(s, mlp, 4 * hidden, [None] * layers)
    return _model(c, s, stack, 4 * hidden, tied_default=True, positions="seq_length")


ARCHITECTURES: dict[str, Callable[[ConfigReader], ModelSpec]] = {
    "BloomForCausalLM": _bloom,
    "DeepseekV2ForCausalLM": lambda c: _deepseek(c, router_bias=False),
    "DeepseekV3ForCausalLM": lambda c: _deepseek(c, router_bias=True),
    "FalconForCausalLM": _falcon,
    "GPT2LMHeadModel": _gpt2,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Gemma3ForConditionalGeneration": _gemma3_multimodal,
    "GemmaForCausalLM": _gemma,
    "GptOssForCausalLM": _gpt_oss,
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "OPTForCausalLM": _opt,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo3,
    "OlmoForCausalLM": _olmo,
    "OlmoeForCausalLM": _olmoe,
    "Phi3ForCausalLM": _phi3,
    "PhiForCausalLM": _phi,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
"""Rules by Hugging Face architecture class."""
