"""Networks of timm as backbones: maps, gradients, weights of files, a whole training, and what is rejected."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.build import build_model
from solq_lab.config import ConfigError
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.models.timm_backbone import TimmBackbone
from solq_lab.models.weights import WeightMismatch
from solq_lab.runs import create_run
from solq_lab.structures import ImageBatch
from solq_lab.training.trainer import train_run

NAMES = ("convnext_atto", "resnet18", "vit_tiny_patch16_224")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("options", "first"), [({}, 1), ({"c5_only": True}, 3), ({"c2": True}, 0)])
def test_maps_cover_the_image_and_every_weight_learns(name: str, options: dict[str, bool], first: int):
    backbone = TimmBackbone(name, **options).train()
    maps = backbone(torch.randn(2, 3, 100, 70))
    sizes = [(25, 18), (13, 9), (7, 5), (4, 3)][first:]  # of strides 4, 8, 16 and 32, rounded up
    assert [tuple(one.shape) for one in maps] == [
        (2, c, *size) for c, size in zip(backbone.channels, sizes, strict=True)
    ]
    sum(one.square().sum() for one in maps).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_weights_come_from_a_file_of_timm_with_its_head(tmp_path):
    torch.manual_seed(0)
    full = timm.create_model("convnext_atto")
    save_file(full.state_dict(), tmp_path / "atto.safetensors")
    network, other = (
        tiny_experiment(".", model={"backbone": name, "pretrained": str(tmp_path / "atto.safetensors")})
        for name in ("timm:convnext_atto", "timm:resnet18")
    )
    state, started = full.state_dict(), build_model(network, 2, pretrained=True).backbone.body.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in started.items())
    with pytest.raises(WeightMismatch, match=r"atto\.safetensors: .*no such tensor"):
        build_model(other, 2, pretrained=True)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("convnext_typo", "none", r"timm:convnext_typo: timm .* has no network of this name"),
        ("vit_small_patch14_dinov2", "none", r"maps of strides \[14\]; allowed are networks with strides 8"),
        ("convnext_atto", "imagenet", r"no ImageNet weights are fetched for it; name their file"),
    ],
)
def test_what_cannot_be_a_backbone_is_rejected_with_the_cure(name, pretrained, message):
    experiment = tiny_experiment(".", model={"backbone": f"timm:{name}", "pretrained": pretrained})
    with pytest.raises(ConfigError, match=message):
        build_model(experiment, 2, pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_on_it_trains_and_predicts_the_same_when_prepared(name: str, tmp_path):
    root = write_tiny_dataset(tmp_path / "data")
    experiment = tiny_experiment(root, model={"backbone": f"timm:{name}"}, train={"steps": 1})
    if name == "convnext_atto":
        assert train_run(create_run(experiment, tmp_path / "runs")) == "finished"
    torch.manual_seed(0)
    model, images = build_model(experiment, 2).eval(), torch.randn(2, 3, 48, 64)
    batch = ImageBatch(images, torch.zeros(2, 48, 64, dtype=torch.bool))
    for ours, theirs in zip(
        prepare_for_inference(model)(batch).layers[-1][:3], model(batch).layers[-1][:3], strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
