"""Models: counts against published checkpoints and against transformers; every refusal."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from energymodel.datafiles import data_path
from energymodel.errors import EnergyModelError, UnsupportedModelError
from energymodel.hf_configs import ARCHITECTURES
from energymodel.models import (
    active_weight_count,
    kv_elements_per_token,
    list_models,
    load_model,
    model_from_config,
    weight_count,
)
from energymodel.specs import MoeSpec

DATA = Path(__file__).parent / "data"
# from transformers, see tests/data/make_parameter_counts.py
COUNTS = json.loads((DATA / "parameter_counts.json").read_text())
VARIANTS = json.loads((DATA / "variant_configs.json").read_text())


def bundled_config(name):
    return json.loads(data_path("models", f"{name}.json").read_text())


def small_config(**changes):
    """A Llama config small enough to read; None as a value takes the key out."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "max_position_embeddings": 256,
        **changes,
    }
    return {k: v for k, v in config.items() if v is not None}


def sliding_layers(model):
    return sum(g.count for g in model.layers if g.attention.window_tokens)


def test_at_least_24_models_are_bundled():
    assert len(list_models()) >= 24
    assert {"llama-3.1-8b", "olmoe-1b-7b", "gpt-oss-120b", "deepseek-v3"} <= set(list_models())


@pytest.mark.parametrize("name", list_models())
def test_bundled_model_has_the_published_parameters(name):
    published = bundled_config(name)["_published_parameters"]
    assert published["from"]
    assert weight_count(load_model(name)) == published["value"]


@pytest.mark.parametrize("name", list_models())
def test_bundled_model_is_what_transformers_builds(name):
    model = load_model(name)
    assert [weight_count(model), sliding_layers(model)] == COUNTS["bundled"][name]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_what_transformers_builds(name):
    model = model_from_config(VARIANTS[name], name=name)
    assert [weight_count(model), sliding_layers(model)] == COUNTS["variants"][name]


def test_every_architecture_is_compared_with_transformers():
    tested = {c["architectures"][0] for c in VARIANTS.values()}
    tested |= {bundled_config(name)["architectures"][0] for name in list_models()}
    assert tested == set(ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # DeepSeek-AI 2025, "Insights into DeepSeek-V3", table 1: KB per token in bf16
        ("deepseek-v3", 70_272),
        ("llama-3.1-405b", 516_096),
        # 2 bytes x 2 x layers x KV heads x head width, the usual worked examples
        ("llama-3.1-8b", 128 * 1024),
        ("llama-3.1-70b", 320 * 1024),
        ("llama-2-7b", 512 * 1024),
        ("mistral-7b", 128 * 1024),
        ("gpt2", 36 * 1024),
        ("falcon-7b", 8 * 1024),  # one KV head of 64, 32 layers
        ("qwen2.5-7b", 56 * 1024),
    ],
)
def test_kv_bytes_per_token_in_bf16(name, expected):
    assert 2 * kv_elements_per_token(load_model(name)) == expected


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("gpt-oss-20b", 3.61, 0.002),  # model card, table 1 (unembedding counted, embedding not)
        ("gpt-oss-120b", 5.13, 0.002),
        ("deepseek-v3", 37.0, 0.02),  # technical report: 37B, rounded
        ("deepseek-v2-lite", 2.4, 0.03),  # model card: 2.4B, rounded
        ("mixtral-8x7b", 12.9, 0.02),  # paper: 13B; 12.9B with the input embedding
    ],
)
def test_active_parameters(name, billions, tolerance):
    count = active_weight_count(load_model(name))
    assert count / 1e9 == pytest.approx(billions, rel=tolerance)


def test_active_parameters_of_a_dense_model_leave_out_the_input_embedding_alone():
    tied, untied = load_model("llama-3.2-1b"), load_model("llama-3.1-8b")
    assert active_weight_count(tied) == weight_count(tied)
    assert weight_count(untied) - active_weight_count(untied) == 128256 * 4096


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "gpt-oss-20b", "qwen3-30b-a3b"])
def test_all_experts_active_is_all_parameters(name):
    model = load_model(name)
    layers = []
    for group in model.layers:
        moe = group.feed_forward
        assert isinstance(moe, MoeSpec)
        every = replace(moe, experts_per_token=moe.num_experts)
        layers.append(replace(group, feed_forward=every))
    dense = replace(model, layers=tuple(layers))
    embedding = model.vocab_size * model.hidden_size
    assert active_weight_count(dense) + embedding == weight_count(model)


def test_experts_of_gpt_oss_are_mxfp4():
    model = load_model("gpt-oss-20b")
    assert (model.expert_dtype, model.checkpoint_dtype) == ("mxfp4", "mxfp4")
    assert load_model("olmoe-1b-7b").expert_dtype is None


def test_gemma_windows_alternate():
    gemma2, gemma3 = load_model("gemma-2-9b"), load_model("gemma-3-27b")
    assert [(g.count, g.attention.window_tokens) for g in gemma2.layers] == [(21, 4096), (21, None)]
    assert [(g.count, g.attention.window_tokens) for g in gemma3.layers] == [(52, 1024), (10, None)]
    assert gemma3.max_model_len == 131072


def test_deepseek_starts_with_dense_layers_and_caches_the_latent():
    model = load_model("deepseek-v3")
    assert [g.count for g in model.layers] == [3, 58]
    attention = model.layers[0].attention
    assert (attention.kind, attention.kv_lora_rank, attention.qk_rope_head_dim) == ("mla", 512, 64)
    assert kv_elements_per_token(model) == 61 * (512 + 64)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 256),
        ({"rope_type": "llama3", "factor": 8.0}, 256),
        ({"type": "longrope", "short_factor": [1.0]}, 256),
        ({"type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
    ],
)
def test_longest_context_with_scaled_rotary_embedding(scaling, expected):
    config = small_config(rope_scaling=scaling)
    assert model_from_config(config, name="m").max_model_len == expected


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "fp8", "fmt": "e4m3"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "awq", "bits": 8}, "int8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
            },
            "fp8",
        ),
    ],
)
def test_dtype_of_quantized_checkpoints(quantization, expected):
    config = small_config(quantization_config=quantization, torch_dtype="bfloat16")
    assert model_from_config(config, name="m").checkpoint_dtype == expected


# --- finding a model ---


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b",
        "Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B",
        "META-LLAMA/meta-llama-3.1-8b-instruct",
    ],
)
def test_bundled_model_by_name_and_hub_id(name):
    model = load_model(name)
    assert model.name == "llama-3.1-8b"
    assert model.source == "meta-llama/Llama-3.1-8B"


def test_names_and_ids_of_bundled_models_are_unique():
    ids = []
    for name in list_models():
        config = bundled_config(name)
        ids += [name, config["_source"], *config.get("_aliases", [])]
    assert len({i.lower() for i in ids}) == len(ids)


@pytest.mark.parametrize("as_folder", [True, False])
def test_model_from_a_folder_with_nothing_but_a_config(tmp_path, as_folder):
    folder = tmp_path / "my-model"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(small_config()))
    model = load_model(str(folder if as_folder else file))
    assert (model.name, model.num_layers) == ("my-model", 2)
    assert model.source == str(file)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_model_from_the_hugging_face_cache(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    folder = tmp_path / below[variable] / "models--org--thing"
    for age, (revision, layers) in enumerate([("new", 2), ("old", 3)]):
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        config = snapshot / "config.json"
        config.write_text(json.dumps(small_config(num_hidden_layers=layers)))
        os.utime(config, (1e9 - age, 1e9 - age))
    assert load_model("org/thing").num_layers == 2  # the newest, without a ref
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("old\n")
    model = load_model("org/thing")
    assert (model.name, model.num_layers) == ("org/thing", 3)


def test_uncached_hub_id_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnsupportedModelError, match=r"hf download org/none config.json"):
        load_model("org/none")


# --- refusals: each names the file or model and the field ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "unknown architecture 'MambaForCausalLM'.*Qwen2"),
        ({"architectures": None}, "architectures must be a list"),
        ({"architectures": []}, "architectures must be a list"),
        ({"architectures": [["LlamaForCausalLM"]]}, "unknown architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -64}, "hidden_size must be a whole number"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 10**400}, "hidden_size must be a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size must be a whole number"),
        ({"hidden_size": 65}, "hidden_size 65 is not divisible by num_attention_heads 8"),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not divisible by num_key_value"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling: factor must be"),
        ({"sliding_window": 4096}, "LlamaForCausalLM has unknown field sliding_window"),
        ({"mixture": 1, "vision": {}}, "unknown fields mixture, vision"),
        ({"add_cross_attention": True}, "unknown field add_cross_attention"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method = 'hqq'.*Known: fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3-bit int weights"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups"),
    ],
)
def test_refused_llama_configs(tmp_path, changes, message):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small_config(**changes)))
    with pytest.raises(UnsupportedModelError, match=message) as error:
        load_model(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "5 experts per token of only 4"),
        ("gemma2", {"sliding_window": None}, "sliding_window is missing"),
        ("gpt-oss", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 6 layers"),
        ("gpt-oss", {"layer_types": ["chunked"] * 6}, "layer_types chunked are not modelled"),
        ("qwen3-bias", {"layer_types": ["sliding_attention"] * 6}, "sliding_window is missing"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not modelled"),
        ("deepseek-v3", {"attention_bias": True}, "attention_bias = True is not modelled"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm = True is not modelled"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False is not modelled"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim = 32 is not modelled"),
        ("falcon-rw", {"num_attention_heads": 7}, "not divisible"),
        ("qwen3-moe-every-other-layer", {"mlp_only_layers": 1}, "mlp_only_layers must be a list"),
    ],
)
def test_refused_configs_of_other_architectures(variant, changes, message):
    config = {**VARIANTS[variant], **changes}
    with pytest.raises(UnsupportedModelError, match=message):
        model_from_config(config, name="m")


def test_multimodal_gemma_needs_its_text_config():
    config = bundled_config("gemma-3-27b")
    del config["text_config"]
    with pytest.raises(UnsupportedModelError, match="text_config is missing"):
        model_from_config(config, name="m")
    config["text_config"] = {**bundled_config("gemma-3-27b")["text_config"], "audio": 1}
    with pytest.raises(UnsupportedModelError, match=r"text_config: .*unknown field audio"):
        model_from_config(config, name="m")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe\x00binary", "cannot be read as JSON"),
        (b"[1, 2]", "a config is a JSON object, this is a list"),
        (b"null", "a config is a JSON object, this is a NoneType"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(str(file))


def test_weights_given_as_config_are_not_read(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.truncate(2**25)  # a hole, no disk space
    with pytest.raises(UnsupportedModelError, match="too large for a config"):
        load_model(str(file))


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"Did you mean llama-3.1-8b"):
        load_model("lama-3.1-8b")
    with pytest.raises(UnsupportedModelError, match="no such file or folder"):
        load_model(str(tmp_path / "none" / "config.json"))
    with pytest.raises(UnsupportedModelError, match=r"holds no config.json"):
        load_model(str(tmp_path))
    for name in ("", " ", "\0", "x" * 10_000, "~nobody-here/x"):
        with pytest.raises(UnsupportedModelError):
            load_model(name)


# --- properties ---

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
KNOWN = [*VARIANTS.values(), bundled_config("gemma-3-27b"), bundled_config("gpt-oss-20b")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KNOWN), st.data())
def test_junk_never_raises_anything_but_our_error(config, data):
    keys = st.sampled_from([*config, "head_dim", "layer_types", "rope_scaling", "sliding_window"])
    keys |= st.just("quantization_config")
    config = {**config, **data.draw(st.dictionaries(keys, JUNK, max_size=3))}
    try:
        model = model_from_config(config, name="junk")
    except EnergyModelError as error:
        assert str(error).startswith("junk")
    else:
        assert 0 < active_weight_count(model) <= weight_count(model)
        assert kv_elements_per_token(model) > 0


@given(JUNK)
def test_whole_junk_is_refused(junk):
    with pytest.raises(UnsupportedModelError):
        model_from_config(junk, name="junk")


@settings(max_examples=50)
@given(st.sampled_from(sorted(VARIANTS)), st.text(min_size=1, max_size=12))
@example("bloom", "_token_id")
def test_a_key_nobody_knows_is_refused(name, key):
    key = "x" + key
    if key.endswith(("_token_id", "_token_ids", "_pdrop", "dropout", "layerdrop")):
        model = model_from_config({**VARIANTS[name], key: 1}, name="m")
        assert model == model_from_config(VARIANTS[name], name="m"), "says nothing about the shape"
        return
    with pytest.raises(UnsupportedModelError, match="unknown field"):
        model_from_config({**VARIANTS[name], key: 1}, name="m")
