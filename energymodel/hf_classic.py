"""Rules for architectures with ungated MLPs: Phi-1 to Phi-2, Falcon, OPT, GPT-2, BLOOM."""

from __future__ import annotations

from energymodel.config_reader import ConfigReader
from energymodel.hf_parts import Shape, assemble, divide, read_shape, uniform_layers
from energymodel.specs import AttentionSpec, MlpSpec, ModelSpec


def phi(c: ConfigReader) -> ModelSpec:
    """Phi-1 to Phi-2: parallel block, one layer norm with bias, biases throughout."""
    c.only("qk_layernorm", False)
    s = read_shape(c, bias=True)
    mlp = MlpSpec(intermediate_size=c.count("intermediate_size"), gated=False, bias=True)
    layers = uniform_layers(s, mlp, 2 * s.hidden, [None] * s.layers)
    return assemble(
        c, s, layers, 2 * s.hidden, lm_head_bias=True, parallel_block=True, layer_norm=True
    )


def _classic(
    c: ConfigReader, *, hidden: int, heads: int, kv_heads: int, layers: int, bias: bool
) -> Shape:
    """Shape of the older architectures, whose heads split the hidden size."""
    head_dim = divide(c, hidden, heads, "hidden size", "attention heads")
    divide(c, heads, kv_heads, "attention heads", "KV heads")
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=head_dim,
        q_bias=bias,
        kv_bias=bias,
        o_bias=bias,
    )
    return Shape(hidden=hidden, layers=layers, vocab=c.count("vocab_size"), attention=attention)


def falcon(c: ConfigReader) -> ModelSpec:
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
    layers = uniform_layers(s, mlp, norms, [None] * s.layers)
    return assemble(
        c, s, layers, 2 * hidden, tied_default=True, parallel_block=parallel, layer_norm=True
    )


def opt(c: ConfigReader) -> ModelSpec:
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
    stack = uniform_layers(s, mlp, 4 * hidden, [None] * layers)
    positions = (c.count("max_position_embeddings") + 2) * hidden
    return assemble(
        c,
        s,
        stack,
        2 * hidden,
        tied_default=True,
        learned_position_elements=positions,
        layer_norm=True,
    )


def gpt2(c: ConfigReader) -> ModelSpec:
    """GPT-2: learned positions, biases throughout."""
    c.ignore("n_ctx", "scale_attn_weights", "reorder_and_upcast_attn")
    c.ignore("scale_attn_by_inverse_layer_idx")
    hidden, heads = c.count("n_embd"), c.count("n_head")
    layers = c.layer_count("n_layer")
    s = _classic(c, hidden=hidden, heads=heads, kv_heads=heads, layers=layers, bias=True)
    wide = c.count("n_inner", default=4 * hidden)
    mlp = MlpSpec(intermediate_size=wide, gated=False, bias=True)
    stack = uniform_layers(s, mlp, 4 * hidden, [None] * layers)
    return assemble(
        c,
        s,
        stack,
        2 * hidden,
        tied_default=True,
        positions="n_positions",
        learned_position_elements=c.count("n_positions") * hidden,
        layer_norm=True,
    )


def bloom(c: ConfigReader) -> ModelSpec:
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
    stack = uniform_layers(s, mlp, 4 * hidden, [None] * layers)
    return assemble(
        c, s, stack, 4 * hidden, tied_default=True, positions="seq_length", layer_norm=True
    )
