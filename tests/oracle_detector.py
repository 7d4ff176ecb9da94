"""A few images and a detector that predicts their ground truth, for tests of evaluations."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rectangles import rectangle, rle_of, truth_of
from torch import nn

from solq_lab.codecs.dct import DCTCodec
from solq_lab.data.coco import CocoDataset
from solq_lab.data.transforms import TestResize
from solq_lab.structures import PIXEL_MEAN, PIXEL_STD, ImageBatch, LayerPrediction, Predictions

NUM_IMAGES = 5  # the last one without objects
MASK_SIZE, VECTOR_DIM = 16, 5
SHADE_STEP = 40


class OracleDetector(nn.Module):
    """Predicts the ground truth of an image, identified by its shade of grey, with one query per object."""

    QUERIES = 4

    def __init__(self, dataset: CocoDataset, codec: DCTCodec | None) -> None:
        super().__init__()
        self.targets = [dataset[index][1] for index in range(len(dataset))]
        self.channels, self.codec = len(dataset.classes), codec
        self.modes: list[bool] = []

    def forward(self, images: ImageBatch) -> Predictions:
        self.modes.append(self.training)
        red = (images.pixels[:, 0, 0, 0] * PIXEL_STD[0] + PIXEL_MEAN[0]) * 255
        batch = len(red)
        logits = torch.full((batch, self.QUERIES, self.channels), -9.0)
        boxes = torch.full((batch, self.QUERIES, 4), 0.5)
        vectors = torch.zeros(batch, self.QUERIES, self.codec.vector_dim) if self.codec else None
        for row, index in enumerate((red / SHADE_STEP).round().int().tolist()):
            target, count = self.targets[index], len(self.targets[index].labels)
            logits[row, range(count), target.labels] = 9.0
            boxes[row, :count] = target.boxes
            if self.codec:
                vectors[row, :count] = self.codec.encode(target.masks)
        return Predictions([LayerPrediction(logits, boxes, vectors)], None)


def write_coco_folder(root: Path) -> Path:
    """Images of one shade each, with up to two objects that miss their upper left quarter."""
    (root / "images").mkdir()
    boxes = [(1, 1, (4, 4, 32, 32)), (1, 2, (40, 8, 16, 24)), (2, 1, (8, 8, 24, 16)), (3, 2, (0, 0, 40, 40))]
    document = truth_of([*boxes, (4, 1, (30, 10, 20, 30))], images=NUM_IMAGES)
    for entry in document["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = rle_of(rectangle(x, y, w, h) & ~rectangle(x, y, w // 2, h // 2))
        entry["bbox"] = [x + 0.13, y + 0.19, w - 0.31, h - 0.37]  # no pixel centre halfway between two mask cells
    for index, image in enumerate(document["images"]):
        shade = np.full((image["height"], image["width"], 3), index * SHADE_STEP, dtype=np.uint8)
        Image.fromarray(shade).save(root / "images" / image["file_name"])
    (root / "instances.json").write_text(json.dumps(document))
    return root


def open_dataset(root: Path) -> CocoDataset:
    """The images of `write_coco_folder`, ready to be predicted."""
    transform = TestResize(32, max_size=60)
    return CocoDataset(root / "images", root / "instances.json", mask_size=MASK_SIZE, transform=transform)
