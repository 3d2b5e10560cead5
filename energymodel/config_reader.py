"""Checked access to the fields of a Hugging Face `config.json`.

A `ConfigReader` remembers which keys an architecture's rules read. Keys that nobody read and
that are not known to be harmless mean a feature this package does not model: they are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from energymodel.errors import UnsupportedModelError

_MOST = 2**31 - 1
_MOST_LAYERS = 10_000

# Keys that change neither a shape nor what is computed, whatever the architecture.
_HARMLESS = frozenset(
    {
        *(
            "architectures",
            "model_type",
            "transformers_version",
            "auto_map",
            "task_specific_params",
        ),
        *("torch_dtype", "dtype", "use_cache", "cache_implementation", "attn_implementation"),
        *("tokenizer_class", "prefix", "max_length", "temperature", "top_p", "do_sample"),
        *("initializer_range", "init_std", "initializer_cutoff_factor", "pretraining_tp"),
        *("hidden_act", "hidden_activation", "activation_function", "gradient_checkpointing"),
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
        *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
        *("router_jitter_noise", "norm_topk_prob", "return_dict", "output_attentions"),
        *("output_hidden_states", "id2label", "label2id", "problem_type"),
        *("unsloth_fixed", "unsloth_version"),
    }
)
_HARMLESS_ENDINGS = ("_token_id", "_token_ids", "_pdrop", "dropout", "layerdrop")
_HARMLESS_BEGINNINGS = ("_", "rope_", "rotary_", "partial_rotary_", "summary_", "transformers.")
# Keys that are harmless with these values alone.
_HARMLESS_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (True, False),
    "pruned_heads": ({},),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_QUANTIZED_DTYPES = {("int", 4): "int4", ("int", 8): "int8", ("float", 8): "fp8"}


class ConfigReader:
    """The fields of one config, read with their types checked.

    Every accessor raises UnsupportedModelError, naming the file and the field, when the field
    is missing without a default or its value makes no sense.
    """

    def __init__(self, config: Mapping[str, Any], architecture: str, where: str) -> None:
        self.config = config
        self.architecture = architecture
        self.where = where
        self._read: set[str] = set()

    def error(self, problem: str) -> UnsupportedModelError:
        """An error about this config, for the caller to raise."""
        return UnsupportedModelError(f"{self.where}: {problem}")

    def _get(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """First of the keys (synonyms) that has a value, and the value; null = absent."""
        self._read.update(keys)
        for key in keys:
            if self.config.get(key) is not None:
                return key, self.config[key]
        return keys[0], None

    def optional_count(
        self, *keys: str, least: int = 1, most: int = _MOST, default: int | None = None
    ) -> int | None:
        """A whole number in [least, most]; `default` where it is absent or null."""
        key, value = self._get(keys)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(
                f"{key} must be a whole number from {least} to {most}, not {_short(value)}"
            )
        return value

    def count(
        self, *keys: str, least: int = 1, most: int = _MOST, default: int | None = None
    ) -> int:
        """A whole number in [least, most]; an error where it is absent without a default."""
        value = self.optional_count(*keys, least=least, most=most, default=default)
        if value is None:
            raise self.error(f"{keys[0]} is missing; {self.architecture} needs it")
        return value

    def layer_count(self, *keys: str) -> int:
        """The number of layers."""
        return self.count(*keys, most=_MOST_LAYERS)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        _, value = self._get((key,))
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {_short(value)}")
        return value

    def number(self, *keys: str, default: float) -> float:
        """A finite positive number."""
        key, value = self._get(keys)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _MOST:
            raise self.error(f"{key} must be a positive number, not {_short(value)}")
        return float(value)

    def section(self, key: str) -> Mapping[str, Any] | None:
        """An object inside the config."""
        _, value = self._get((key,))
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(f"{key} must be an object, not {_short(value)}")
        return value

    def list_of(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any] | None:
        """A list whose elements are all of one type."""
        _, value = self._get((key,))
        if value is None:
            return default
        if not isinstance(value, list) or not all(type(v) is kind for v in value):
            raise self.error(f"{key} must be a list of {kind.__name__}, not {_short(value)}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a field whose value is not one that the rules cover; absent and null pass."""
        _, value = self._get((key,))
        if value is not None and value not in allowed:
            raise self.error(
                f"{key} = {_short(value)} is not modelled for {self.architecture} "
                f"(only {' or '.join(repr(a) for a in allowed) or 'null'})"
            )

    def ignore(self, *keys: str) -> None:
        """Accept fields of this architecture that change neither shape nor cost."""
        self._read.update(keys)

    def set_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Values for fields that the config leaves out."""
        self.config = {**defaults, **self.config}

    def inside(self, key: str, architecture: str) -> ConfigReader:
        """A reader of an object inside the config."""
        section = self.section(key)
        if section is None:
            raise self.error(f"{key} is missing; {self.architecture} needs it")
        return ConfigReader(section, architecture, f"{self.where}: {key}")

    def finish(self) -> None:
        """Refuse the config if it holds a key that no rule knows."""
        unknown = sorted(
            str(key) for key, value in self.config.items() if not self._is_known(key, value)
        )
        if unknown:
            raise self.error(
                f"{self.architecture} has unknown field{'s' if len(unknown) > 1 else ''} "
                f"{', '.join(unknown[:10])[:300]}, whose effect on the model is not known here. "
                "Take out what changes neither weights nor computation"
            )

    def _is_known(self, key: str, value: Any) -> bool:
        return (
            key in self._read
            or key in _HARMLESS
            or key.startswith(_HARMLESS_BEGINNINGS)
            or key.endswith(_HARMLESS_ENDINGS)
            or value in _HARMLESS_VALUES.get(key, ())
        )

    def max_model_len(self, position_key: str = "max_position_embeddings") -> int:
        """Longest context [tokens], with the factor of a scaled rotary embedding.

        As vLLM's `_get_and_verify_max_len`: `llama3`, `longrope` and `su` scaling are part of
        the configured length already; `yarn` multiplies the original length, `linear` and
        `dynamic` the configured one.
        """
        length = self.count(position_key)
        scaling = self.section("rope_scaling") or self.section("rope_parameters")
        if not scaling:
            return length
        inner = ConfigReader(scaling, self.architecture, f"{self.where}: rope_scaling")
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "yarn":
            original = inner.count("original_max_position_embeddings", default=length)
            return max(length, round(original * inner.number("factor", default=1.0)))
        if kind in ("linear", "dynamic"):
            return round(length * inner.number("factor", default=1.0))
        return length

    def checkpoint_dtype(self) -> str | None:
        """Dtype the linear weights are stored in; None where the config does not say.

        Knows the `quantization_config` of fp8, GPTQ, AWQ, compressed-tensors and mxfp4.
        """
        quantization = self.section("quantization_config")
        if quantization is None:
            _, name = self._get(("torch_dtype", "dtype"))
            return _DTYPES.get(name) if isinstance(name, str) else None
        method = quantization.get("quant_method")
        if method in ("fp8", "mxfp4"):
            return str(method)
        inner = ConfigReader(quantization, self.architecture, f"{self.where}: quantization_config")
        if method in ("gptq", "awq"):
            kind, bits = "int", inner.count("bits")
        elif method == "compressed-tensors":
            kind, bits = _compressed_weights(inner)
        else:
            raise self.error(
                f"quantization_config.quant_method = {_short(method)} is not understood. "
                "Known: fp8, mxfp4, gptq, awq, compressed-tensors"
            )
        if (kind, bits) not in _QUANTIZED_DTYPES:
            raise self.error(f"quantization_config: {bits}-bit {kind} weights are not modelled")
        return _QUANTIZED_DTYPES[kind, bits]


def _compressed_weights(quantization: ConfigReader) -> tuple[str, int]:
    """Type and bits of the weights, equal in all groups, of compressed-tensors."""
    groups = quantization.section("config_groups") or {}
    found = set()
    for name, group in groups.items():
        where = f"{quantization.where}.config_groups.{name}"
        if not isinstance(group, Mapping):
            raise quantization.error(f"config_groups.{name} must be an object")
        weights = ConfigReader(group, quantization.architecture, where).section("weights") or {}
        inner = ConfigReader(weights, quantization.architecture, f"{where}.weights")
        found.add((str(weights.get("type")), inner.count("num_bits")))
    if len(found) != 1:
        raise quantization.error("config_groups must hold one kind of weights")
    return found.pop()


def _short(value: Any, limit: int = 60) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # e.g. an integer of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "..."
