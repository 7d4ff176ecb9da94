"""One table each for what a researcher adds: a codec, a backbone, an augmentation, a loss is one object, one entry."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import SIDE, tiny_experiment, write_tiny_dataset
from torch import Tensor, nn

from solq_lab.build import build_dataset
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.kinds import CODECS, CodecSpec
from solq_lab.data.kinds import AUGMENTATIONS
from solq_lab.data.transforms import Crop, Resize, Step
from solq_lab.inference.predictor import Predictor
from solq_lab.models.kinds import BACKBONES, BackboneSpec
from solq_lab.runs import create_run
from solq_lab.training.losses import MatchedLayers, SetCriterion
from solq_lab.training.trainer import train_run


class RowSums(MaskCodec):
    """A toy codec: the mask as the product of its row and column profiles."""

    def encode(self, masks: Tensor) -> Tensor:
        self.check_masks(masks)
        pixels = masks.float()
        return torch.cat([pixels.mean(2), pixels.mean(1)], dim=1)

    def decode(self, vectors: Tensor) -> Tensor:
        self.check_vectors(vectors)
        rows, columns = vectors.split(self.mask_size, dim=1)
        return rows.unsqueeze(2) * columns.unsqueeze(1)


class Patches(nn.Module):
    """A toy backbone: strided convolutions."""

    strides, channels = (8, 16, 32), (8, 8, 8)

    def __init__(self, *, c5_only: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, kernel_size=8, stride=8)
        self.halve = nn.Conv2d(8, 8, kernel_size=2, stride=2)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = [self.stem(F.pad(pixels, (0, -pixels.shape[3] % 32, 0, -pixels.shape[2] % 32)))]
        for _ in range(2):
            maps.append(self.halve(maps[-1]))
        return maps


@dataclasses.dataclass(frozen=True)
class LeftHalf:
    """A toy augmentation: the left half, at the test scale."""

    test_scale: int

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        height, width = size
        return [Crop(0, 0, height, width // 2), Resize((height, width // 2), (self.test_scale, self.test_scale // 2))]


def center_loss(layers: MatchedLayers) -> Tensor:
    """A toy loss: squared distance (Z,) of matched centres."""
    return (layers.boxes[..., :2] - layers.true_boxes[..., :2]).square().sum((1, 2)) / layers.divisor


@pytest.fixture
def toys(monkeypatch):
    build = SetCriterion.__init__

    def build_with_center_loss(self: SetCriterion, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        self.terms["center"], self.weights["center"] = center_loss, 2.0

    monkeypatch.setattr(SetCriterion, "__init__", build_with_center_loss)
    monkeypatch.setitem(AUGMENTATIONS, "toy", f"{__name__}:LeftHalf")
    monkeypatch.setitem(CODECS, "toy", CodecSpec(f"{__name__}:RowSums"))
    monkeypatch.setitem(BACKBONES, "toy", BackboneSpec(f"{__name__}:Patches"))


def test_a_codec_a_backbone_an_augmentation_and_a_loss_of_ones_own_train_and_predict(toys, tmp_path):
    experiment = tiny_experiment(
        write_tiny_dataset(tmp_path / "data"),
        model={"backbone": "toy"},
        codec={"kind": "toy", "mask_size": 16, "vector_dim": 32},
        data={"augment": "toy"},
        train={"steps": 3},
    )
    assert build_dataset(experiment, "train")[0][0].shape == (3, SIDE, SIDE // 2)
    run = create_run(experiment, tmp_path / "runs")
    assert train_run(run) == "finished"
    lines = list(run.metrics("train"))
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"center", "center/0"} <= set(line["losses"]) for line in lines)
    predictor = Predictor(run)
    assert isinstance(predictor.codec, RowSums)
    assert len(predictor.predict(tmp_path / "data" / "val" / "1.png").masks) > 0
