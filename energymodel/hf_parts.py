"""Parts shared by the rules of all architectures: sizes, windows, putting a model together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from energymodel.config_reader import ConfigReader
from energymodel.specs import AttentionSpec, LayerGroup, MlpSpec, ModelSpec, MoeSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer, as a group of identical ones will hold it."""

    attention: AttentionSpec
    feed_forward: MlpSpec | MoeSpec
    norm_elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What nearly all configs state under the same names."""

    hidden: int
    layers: int
    vocab: int
    attention: AttentionSpec


def assemble(
    c: ConfigReader,
    shape: Shape,
    layers: list[Layer],
    final_norm_elements: int,
    *,
    tied_default: bool = False,
    positions: str = "max_position_embeddings",
    lm_head_bias: bool = False,
    learned_position_elements: int = 0,
    parallel_block: bool = False,
    layer_norm: bool = False,
) -> ModelSpec:
    """Put a model together; identical layers become one group, in order of first appearance."""
    counts: dict[Layer, int] = {}
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
        layer_norm=layer_norm,
    )


def read_shape(c: ConfigReader, *, bias: bool = False, o_bias: bool | None = None) -> Shape:
    """Sizes under the names Llama's config gives them, grouped-query attention.

    head_dim defaults to hidden_size / num_attention_heads and num_key_value_heads to
    num_attention_heads, as in transformers.
    """
    hidden, heads = c.count("hidden_size"), c.count("num_attention_heads")
    kv_heads = c.count("num_key_value_heads", default=heads)
    head_dim = c.optional_count("head_dim")
    if head_dim is None:
        head_dim = divide(c, hidden, heads, "hidden_size", "num_attention_heads")
    divide(c, heads, kv_heads, "num_attention_heads", "num_key_value_heads")
    return Shape(
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


def divide(c: ConfigReader, whole: int, parts: int, whole_key: str, parts_key: str) -> int:
    """`whole / parts`, an error where that is no whole number."""
    if whole % parts:
        raise c.error(f"{whole_key} {whole} is not divisible by {parts_key} {parts}")
    return whole // parts


def uniform_layers(
    shape: Shape, feed_forward: MlpSpec | MoeSpec, norms: int, windows: list[int | None]
) -> list[Layer]:
    """Layers that differ in their window alone; `norms` weights per layer."""
    return [
        Layer(
            attention=replace(shape.attention, window_tokens=window),
            feed_forward=feed_forward,
            norm_elements=norms,
        )
        for window in windows
    ]


def layer_windows(
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


def gated_mlp(c: ConfigReader, *, bias: bool = False) -> MlpSpec:
    """SwiGLU or GeGLU of `intermediate_size`."""
    return MlpSpec(intermediate_size=c.count("intermediate_size"), gated=True, bias=bias)


def checked_moe(c: ConfigReader, moe: MoeSpec) -> MoeSpec:
    """The experts, an error where a token chooses more than there are."""
    if moe.experts_per_token > moe.num_experts:
        raise c.error(f"{moe.experts_per_token} experts per token of only {moe.num_experts}")
    return moe
