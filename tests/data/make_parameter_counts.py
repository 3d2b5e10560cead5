"""Writes parameter_counts.json: [parameters, sliding layers] of each model in transformers.

An independent check of `energymodel.models`. Needs torch and transformers (5.23 was
used), allocates nothing (meta device). Run from the repository root:

    python tests/data/make_parameter_counts.py
"""

import json
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def parameters_and_sliding_layers(config):
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    config = config.get("text_config", config)
    for key in ("auto_map", "quantization_config"):
        config.pop(key, None)
    config = CONFIG_MAPPING[config["model_type"]](**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    layers = config.num_hidden_layers
    sliding = kinds.count("sliding_attention") if kinds else layers if window else 0
    # checkpoints hold DeepSeek-V3's routing bias; transformers keeps it as a buffer
    bias = sum(b.numel() for n, b in model.named_buffers() if "e_score_correction_bias" in n)
    return [model.num_parameters() + bias, sliding]


def main():
    bundled = {p.stem: json.loads(p.read_text()) for p in (ROOT / "profiles/models").glob("*.json")}
    variants = json.loads((HERE / "variant_configs.json").read_text())
    counts = {
        "bundled": {n: parameters_and_sliding_layers(bundled[n]) for n in sorted(bundled)},
        "variants": {n: parameters_and_sliding_layers(c) for n, c in variants.items()},
    }
    (HERE / "parameter_counts.json").write_text(json.dumps(counts).replace("], ", "],\n ") + "\n")


main()
