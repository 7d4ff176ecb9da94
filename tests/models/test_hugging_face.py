"""Hugging Face's Deformable DETR under our names: by name always, by number where transformers is installed."""

import json
import re
from pathlib import Path

import pytest
import torch
from made_up_weights import made_up
from torch import Tensor

from solq_lab.build import build_model
from solq_lab.config import validate_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.models.official import Layout, infer_architecture, released_names
from solq_lab.models.weights import WeightMismatch, read_official, read_weights
from solq_lab.structures import ImageBatch
from solq_lab.workbench.released import import_released

NAMES = {  # module of the released decoder -> Hugging Face's, where they differ
    "decoder": {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm", "norm3": "final_layer_norm"},
    "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
}
PLAIN = Layout("resnet50", 4, 1, 2, False, False, False)
LAYOUTS = [PLAIN, PLAIN._replace(refine_boxes=True), PLAIN._replace(refine_boxes=True, two_stage=True)]


def released(layout: Layout) -> dict[str, Tensor]:
    """A made-up released state dict whose query, key and value projections can be taken apart."""
    return {name: t.repeat(3) if "in_proj" in name else t for name, t in made_up(layout).items()}


def theirs(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict as `save_pretrained` writes it: heads that layers share are stored once."""
    state = {}
    shared = "transformer.decoder.bbox_embed.0.layers.0.bias" not in official
    for name, tensor in official.items():
        if shared and re.match(r"(class|bbox)_embed\.[1-9]", name):
            continue
        name = name.replace("backbone.0.body.", "model.backbone.conv_encoder.model.")
        name = re.sub(r"^query_embed\.", "model.query_position_embeddings.", name)
        name = re.sub(r"^(transformer\.|(?=input_proj))", "model.", name)
        name = re.sub(r"linear([12])", r"fc\1", name).replace("cross_attn", "encoder_attn")
        stack = next((stack for stack in NAMES if f".{stack}.layers" in name), "")
        for ours, other in NAMES.get(stack, {}).items():
            name = name.replace(f".{ours}.", f".{other}.")
        if "in_proj_" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize("layout", LAYOUTS, ids=["plain", "refined", "two-stage"])
def test_every_name_becomes_the_released_one(layout: Layout):
    official = released(layout)
    found = released_names(theirs(official))
    assert found.keys() == official.keys()
    assert all(torch.equal(tensor, official[name]) for name, tensor in found.items())


def test_what_tensors_do_not_tell_comes_from_config_json(tmp_path: Path):
    config = {"encoder_attention_heads": 4, "activation_function": "gelu", "dilation": True, "dropout": 0.0}
    labels = ["N/A", *(f"thing {channel}" for channel in range(1, 91))]
    config |= {"two_stage": True, "two_stage_num_proposals": 25}
    config["id2label"] = {str(channel): labels[channel] for channel in reversed(range(91))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(theirs(released(LAYOUTS[2])), tmp_path / "pytorch_model.bin")

    read = read_official(tmp_path)
    model = infer_architecture(read.state, read.args)["model"]
    assert {key: model[key] for key in ("heads", "activation", "dilation", "queries", "two_stage", "dropout")} == {
        "heads": 4, "activation": "gelu", "dilation": True, "queries": 25, "two_stage": True, "dropout": 0.0
    }  # fmt: skip
    import_released(tmp_path, tmp_path / "ours.safetensors")
    assert ClassMap.from_json(read_weights(tmp_path / "ours.safetensors").classes).names == ("", *labels[1:])


def test_a_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(WeightMismatch, match=r"model\.safetensors: no such weights file"):
        read_official(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"with_box_refine": True},
        {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 25, "d_model": 256},
        {"num_feature_levels": 1, "dilation": True, "with_box_refine": True},
    ],
    ids=["plain", "refined", "two-stage", "single scale"],
)
def test_the_network_computes_what_theirs_does(tmp_path: Path, changes: dict):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"use_timm_backbone": True, "backbone": "resnet50", "use_pretrained_backbone": False, "num_labels": 7}
    sizes |= {
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_queries": 20,
        "disable_custom_kernels": True,
    }
    reference = transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**sizes | changes))
    reference.eval().save_pretrained(tmp_path)
    import_released(tmp_path, tmp_path / "ours.safetensors")

    weights = read_weights(tmp_path / "ours.safetensors")
    sections = infer_architecture(*read_official(tmp_path))
    model = build_model(validate_experiment({"name": "x"} | sections, source="x"), 7).eval()
    model.load_state_dict(weights.state)
    images = [
        torch.randint(0, 255, (3, 96, 128), dtype=torch.uint8),
        torch.randint(0, 255, (3, 80, 120), dtype=torch.uint8),
    ]
    batch = ImageBatch.from_list(images).normalised()
    mask = torch.zeros(2, 96, 128, dtype=torch.long)
    mask[0], mask[1, :80, :120] = 1, 1
    with torch.no_grad():
        expected = reference(pixel_values=batch.pixels, pixel_mask=mask)
        found = model(batch).layers[-1]
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)  # float32 sums in another order
    torch.testing.assert_close(found.boxes, expected.pred_boxes, atol=1e-5, rtol=0)
