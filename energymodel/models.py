"""Loads language models: bundled by name, from a `config.json`, or from the Hugging Face cache.

Nothing here touches the network; weights are never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from energymodel.config_reader import ConfigReader
from energymodel.datafiles import data_path
from energymodel.errors import UnsupportedModelError, unknown_name
from energymodel.hf_configs import ARCHITECTURES, build_model
from energymodel.specs import AttentionSpec, LayerGroup, MlpSpec, ModelSpec

_MAX_CONFIG_BYTES = 16 * 2**20
_SOURCE, _ALIASES = "_source", "_aliases"


def load_model(name_or_path: str) -> ModelSpec:
    """Model by bundled name, Hugging Face id, or path of a `config.json` or its folder.

    Tried in this order: bundled name or id (case-insensitive), path, id in the local Hugging
    Face cache (`HF_HUB_CACHE`, `HF_HOME`, `~/.cache/huggingface`).

    Raises
    ------
    UnsupportedModelError
        If nothing of that name is found, the file is not a config, its architecture is not
        modelled, or a field is missing, senseless or not understood.
    """
    wanted = name_or_path.strip()
    if path := _bundled(wanted):
        config = _read_config(path)
        return model_from_config(config, name=path.stem, source=str(config.get(_SOURCE, "")))
    try:
        path = Path(wanted).expanduser()
        exists = bool(wanted) and path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, null byte, no home
        raise UnsupportedModelError(f"model {name_or_path!r} is no usable path: {error}") from None
    if exists:
        return _from_path(path)
    if (cached := _cached(wanted)) is not None:
        return model_from_config(_read_config(cached), name=wanted, source=wanted)
    if wanted.count("/") == 1 and not wanted.startswith((".", "/", "~")):
        raise UnsupportedModelError(
            f"model '{wanted}' is not bundled, not a path here and not in the Hugging Face cache "
            f"({_hub_cache()}); fetch it with `hf download {wanted} config.json`. "
            + unknown_name("model", wanted, list_models())
        )
    if os.sep in wanted or wanted.endswith(".json"):
        raise UnsupportedModelError(
            f"{wanted}: no such file or folder. Give a config.json, its folder, or one of "
            f"{', '.join(list_models())}"
        )
    raise UnsupportedModelError(unknown_name("model", wanted, list_models()))


def list_models() -> tuple[str, ...]:
    """Names of the bundled models."""
    return tuple(sorted(path.stem for path in data_path("models").glob("*.json")))


def model_from_config(config: Mapping[str, Any], *, name: str, source: str = "") -> ModelSpec:
    """Model that a parsed Hugging Face config describes.

    Raises
    ------
    UnsupportedModelError
        If the architecture is not modelled, or a field is missing, senseless or not understood.
    """
    where = source or name or "config"
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(
            f"{where}: a config is a JSON object, not a {type(config).__name__}"
        )
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise UnsupportedModelError(
            f"{where}: architectures must be a list with the model's class, such as "
            f'["LlamaForCausalLM"]; found {str(architectures)[:60]}'
        )
    architecture = architectures[0]
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: {unknown_name('architecture', str(architecture)[:60], ARCHITECTURES)} "
            "Another one cannot be modelled yet"
        )
    return build_model(ConfigReader(config, architecture, where), name, source)


def weight_count(model: ModelSpec) -> int:
    """All parameters, as a published checkpoint holds them (a tied embedding once)."""
    embedding = model.vocab_size * model.hidden_size
    return (
        sum(g.count * _layer_weights(g, model.hidden_size, every=True) for g in model.layers)
        + embedding * (1 if model.tied_embeddings else 2)
        + _outer_weights(model)
    )


def active_weight_count(model: ModelSpec) -> int:
    """Parameters one token passes through: its top-k experts and the shared ones alone.

    The vocabulary counts once, as the output projection; of an input embedding of its own a
    token reads a single row.
    """
    return (
        sum(g.count * _layer_weights(g, model.hidden_size, every=False) for g in model.layers)
        + model.vocab_size * model.hidden_size
        + _outer_weights(model)
    )


def kv_elements_per_token(model: ModelSpec) -> int:
    """Elements of the KV cache per token, all layers together.

    Keys and values of every KV head; for MLA the compressed vector and the shared rotary key
    (DeepSeek-V2, section 2.1.4). Sliding windows bound how many tokens stay, not this.
    """
    return sum(g.count * _kv_elements(g.attention) for g in model.layers)


def _kv_elements(a: AttentionSpec) -> int:
    if a.kind == "mla":
        return a.kv_lora_rank + a.qk_rope_head_dim
    return a.num_kv_heads * (a.head_dim + a.value_head_dim)


def _outer_weights(model: ModelSpec) -> int:
    head_bias = model.vocab_size if model.lm_head_bias else 0
    return model.final_norm_elements + head_bias + model.learned_position_elements


def _layer_weights(group: LayerGroup, hidden: int, *, every: bool) -> int:
    """Weights of one layer; with `every` False only the experts one token chooses."""
    attention = _attention_weights(group.attention, hidden) + group.norm_elements
    ff = group.feed_forward
    if isinstance(ff, MlpSpec):
        return attention + _mlp_weights(hidden, ff.intermediate_size, ff.gated, ff.bias)
    experts = ff.num_experts if every else ff.experts_per_token
    return (
        attention
        + experts * _mlp_weights(hidden, ff.expert_intermediate_size, ff.gated, ff.bias)
        + _mlp_weights(hidden, ff.shared_intermediate_size, ff.gated, bias=False)
        + (hidden if ff.shared_gate else 0)
        + hidden * ff.num_experts
        + ff.router_bias_elements
    )


def _mlp_weights(hidden: int, width: int, gated: bool, bias: bool) -> int:
    ups = 2 if gated else 1
    return (ups + 1) * hidden * width + (ups * width + hidden if bias else 0)


def _attention_weights(a: AttentionSpec, hidden: int) -> int:
    extra = a.qk_norm_elements + a.extra_elements
    query, output = a.num_heads * a.head_dim, a.num_heads * a.value_head_dim
    if a.kind == "mla":
        rank = a.q_lora_rank
        q = hidden * query if rank is None else rank * (hidden + query)
        nope = a.head_dim - a.qk_rope_head_dim
        down = hidden * (a.kv_lora_rank + a.qk_rope_head_dim)
        up = a.kv_lora_rank * a.num_heads * (nope + a.value_head_dim)
        return q + down + up + output * hidden + extra
    kv = a.num_kv_heads * (a.head_dim + a.value_head_dim)
    biases = a.q_bias * query + a.kv_bias * kv + a.o_bias * hidden
    return hidden * (query + kv + output) + biases + extra


def _bundled(wanted: str) -> Path | None:
    """File of a bundled model by name, repository id or alias."""
    name = wanted.lower()
    if name in list_models():
        return data_path("models", f"{name}.json")
    if "/" not in name:
        return None
    for path in sorted(data_path("models").glob("*.json")):
        config = _read_config(path)
        ids = [config.get(_SOURCE, ""), *config.get(_ALIASES, [])]
        if name in (i.lower() for i in ids):
            return path
    return None


def _from_path(path: Path) -> ModelSpec:
    """Model of a config.json or of the folder that holds it, named after the folder."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UnsupportedModelError(f"{path}: the folder holds no config.json")
    folder = file.resolve().parent.name
    name = (folder or "model") if file.name == "config.json" else file.stem
    return model_from_config(_read_config(file), name=name, source=str(file))


def _hub_cache() -> Path:
    """Folder of the Hugging Face cache, found as huggingface_hub does."""
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _cached(repository: str) -> Path | None:
    """The config of the snapshot that `main` points to, else of the newest one."""
    folder = _hub_cache() / f"models--{repository.replace('/', '--')}"
    if os.sep in repository.replace("/", "", 1) or not folder.is_dir():
        return None
    main = folder / "refs" / "main"
    if main.is_file():
        config = folder / "snapshots" / main.read_text(encoding="utf-8").strip() / "config.json"
        if config.is_file():
            return config
    found = sorted(folder.glob("snapshots/*/config.json"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise UnsupportedModelError(
                f"{path}: too large for a config ({path.stat().st_size} bytes); give the "
                "config.json, not the weights"
            )
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(
            f"{path}: a config is a JSON object, this is a {type(config).__name__}"
        )
    return config
