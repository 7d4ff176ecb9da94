"""From a file to a training sample: uint8 tensors and box windows against PIL, floats and full bitmaps."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solq_lab.bench.scenes import write_coco_folder
from solq_lab.bench.targets import MASK_SIZE, MAX_SIDE, SHORT, crop_full_bitmaps
from solq_lab.bench.timing import Row, compare
from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.codecs.reconstruct import box_frame_iou
from solq_lab.data.coco import CocoDataset
from solq_lab.data.transforms import TestResize, resized_size
from solq_lab.structures import PIXEL_MEAN, PIXEL_STD, Target

NUM_IMAGES = 12
MEAN_IOU = 0.95  # the baseline resizes its bitmaps to nearest neighbours, which frays outlines of small objects


def rows(split: tuple[Path, Path] | None = None, *, num_images: int = NUM_IMAGES) -> Iterator[Row]:
    """Read, resize, rasterise; one thread, so that the inverse of a time is images per second and core.

    Args:
        split: a COCO-format image folder and its annotation file. None: generated images.
        num_images: how many; the first ones of the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        images, annotations = split or write_coco_folder(Path(folder), seed=0, num_images=num_images)
        dataset = CocoDataset(images, annotations, mask_size=MASK_SIZE, transform=TestResize(SHORT, MAX_SIDE))
        plain, chosen = PlainLoader(images, annotations), dataset.image_ids[:num_images]

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            row = compare(
                "loader",
                f"one image of {len(chosen)} images at {SHORT}/{MAX_SIDE} with masks, one thread",
                lambda: [plain.load(image_id) for image_id in chosen],
                lambda: [dataset[index] for index in range(len(chosen))],
                _same_samples,
            )
        finally:
            torch.set_num_threads(threads)
    yield row._replace(baseline=row.baseline / len(chosen), ours=row.ours / len(chosen))


class PlainLoader:
    """The plain way: PIL reads and resizes, the image is normalised in floats, every object is a full bitmap."""

    def __init__(self, images: Path, annotations: Path) -> None:
        document = json.loads(annotations.read_text())
        self.files = {image["id"]: images / image["file_name"] for image in document["images"]}
        self.objects: dict[int, list[dict]] = {image["id"]: [] for image in document["images"]}
        for entry in document["annotations"]:
            if not entry.get("iscrowd", 0):
                self.objects[entry["image_id"]].append(entry)

    def load(self, image_id: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image (3, H, W) float32, boxes (K, 4) xyxy of the original image, masks (K, N, N) bool."""
        opened = Image.open(self.files[image_id]).convert("RGB")
        size = opened.height, opened.width
        height, width = resized_size(size, SHORT, MAX_SIDE)
        resized = np.asarray(opened.resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(resized.copy()).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)
        boxes = torch.tensor([entry["bbox"] for entry in self.objects[image_id]]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if len(boxes) == 0:
            return pixels, boxes, torch.zeros(0, MASK_SIZE, MASK_SIZE, dtype=torch.bool)
        segmentations = [entry["segmentation"] for entry in self.objects[image_id]]
        return pixels, boxes, crop_full_bitmaps(segmentations, boxes, size)


def _same_samples(expected: list[tuple[Tensor, Tensor, Tensor]], found: list[tuple[Tensor, Target]]) -> bool:
    """Pixels to one step of 256, boxes to a hundredth of a pixel, all masks to a mean IoU of 0.95."""
    mean, std = torch.tensor(PIXEL_MEAN).view(3, 1, 1), torch.tensor(PIXEL_STD).view(3, 1, 1)
    for (pixels, boxes, _), (image, target) in zip(expected, found, strict=True):
        height, width = target.original_size
        ours = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
        steps = (pixels * std + mean) * 255
        if (steps - image).abs().max() >= 1.01 or not torch.allclose(ours, boxes, rtol=0, atol=0.01):
            return False

    masks = (
        torch.cat([masks for _, _, masks in expected]),
        torch.cat([target.masks for _, target in found if target.masks is not None]),
    )
    return len(masks[0]) == 0 or box_frame_iou(*masks).mean().item() >= MEAN_IOU
