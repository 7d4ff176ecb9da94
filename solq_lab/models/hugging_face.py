"""Weights of Hugging Face's `DeformableDetrForObjectDetection`, renamed as in the released implementation.

The network is the same; only names differ, and the projections of queries, keys and values are stored one by one.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solq_lab.files import read_json

FILES = ("model.safetensors", "pytorch_model.bin")  # of a saved model's folder, beside its config.json
RULES = (  # pattern and replacement, applied in this order; `mlp` and `o_proj` are names of a live model since 5.0
    (r"^model\.backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.", "transformer."),
    (r"(\.mlp)?\.fc([12])\.", r".linear\2."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."),
    (r"(\.encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(\.encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    (r"\.self_attn_layer_norm\.", ".norm2."),
    (r"\.final_layer_norm\.", ".norm3."),
)
SETTINGS = {  # of config.json -> of the released configuration, which tensors do not determine
    "encoder_attention_heads": "nheads",
    "activation_function": "activation",
    "dropout": "dropout",
    "dilation": "dilation",
}


def is_hugging_face(names: Mapping[str, Tensor]) -> bool:
    """Whether these are Hugging Face's names of a whole detector."""
    return "model.level_embed" in names


def to_released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in Hugging Face's naming under the released names."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor

    for name in [name for name in renamed if ".q_proj." in name]:
        parts = [renamed.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        renamed[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)

    # A head that all layers share is stored once, under the first layer's name.
    layers = {found[1] for name in renamed if (found := re.match(r"transformer\.decoder\.layers\.(\d+)\.", name))}
    for first in [name for name in renamed if re.match(r"(class|bbox)_embed\.0\.", name)]:
        for name in (first.replace(".0.", f".{layer}.", 1) for layer in layers):
            if f"transformer.decoder.{name}" not in renamed:
                renamed.setdefault(name, renamed[first])
    return renamed


def read_settings(path: Path) -> dict[str, Any]:
    """What a model's config.json holds of the released configuration, and `labels`, its class names by channel."""
    if not path.is_file():
        return {}
    config = read_json(path)
    args = {ours: config[theirs] for theirs, ours in SETTINGS.items() if theirs in config}
    args["num_queries"] = config.get("two_stage_num_proposals" if config.get("two_stage") else "num_queries", 300)
    labels = config.get("id2label", {})
    args["labels"] = [labels[key] for key in sorted(labels, key=int)]
    return args
