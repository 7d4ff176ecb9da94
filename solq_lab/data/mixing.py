"""Training samples made of several images: mosaic, and copy-paste. Box-frame masks move with their boxes unchanged.

Sources: YOLOv4's mosaic (Bochkovskiy et al., 2020), Simple Copy-Paste (Ghiasi et al., CVPR 2021).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from solq_lab.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from solq_lab.data.coco import CocoDataset
from solq_lab.masks import crop_and_resize, paste_masks
from solq_lab.structures import Target

Sample = tuple[Tensor, Target]
SHARE = 0.5  # of the samples that are mixed, and of the objects that are copied
MIN_VISIBLE = 0.1  # share of an object's mask that must stay visible


class MosaicDataset(CocoDataset):
    """About half of the samples are four images in a two by two grid, at half their size."""

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        random, epoch = _generator(self, key)
        if random.random() >= SHARE:
            return super().__getitem__(key)
        others = [(epoch, int(index)) for index in random.integers(len(self), size=3)]
        return mosaic([super(MosaicDataset, self).__getitem__(each) for each in (key, *others)])


class CopyPasteDataset(CocoDataset):
    """About half of the samples get about half of the objects of another image."""

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        random, epoch = _generator(self, key)
        sample = super().__getitem__(key)
        if random.random() >= SHARE:
            return sample
        donor = super().__getitem__((epoch, int(random.integers(len(self)))))
        return paste_objects(sample, donor, torch.from_numpy(random.random(len(donor[1].labels)) < SHARE))


def _generator(dataset: CocoDataset, key: int | tuple[int, int]) -> tuple[np.random.Generator, int]:
    """A generator of (seed, epoch, index) alone, not that of the image's own transform; and the epoch."""
    epoch, index = key if isinstance(key, tuple) else (0, key)
    return np.random.default_rng((dataset.seed, epoch, index, 1)), epoch


def mosaic(samples: Sequence[Sample]) -> Sample:
    """Four samples around a common corner, each at half its size; what they leave of the canvas is black."""
    halves = torch.tensor([target.image_size for _, target in samples]).div(2, rounding_mode="floor").clamp(min=1)
    (up, down), (left, right) = halves[:, 0].view(2, 2).amax(1).tolist(), halves[:, 1].view(2, 2).amax(0).tolist()

    canvas, boxes = samples[0][0].new_zeros(3, up + down, left + right), []
    for place, ((image, target), (h, w)) in enumerate(zip(samples, halves.tolist(), strict=True)):
        y, x = (up if place >= 2 else up - h), (left if place % 2 else left - w)
        canvas[:, y : y + h, x : x + w] = TF.resize(image, [h, w], antialias=True)
        boxes.append(target.boxes * torch.tensor([w, h, w, h]) + torch.tensor([x, y, 0, 0]))
    relative = torch.cat(boxes) / torch.tensor([left + right, up + down]).repeat(2)
    return canvas, _joined([target for _, target in samples], relative, (up + down, left + right))


def paste_objects(sample: Sample, donor: Sample, chosen: Tensor) -> Sample:
    """The chosen objects (K,) bool of a donor at their places in another image, where they lie inside it.

    What they cover is cut from the masks and boxes of the objects there. An object of which less than `MIN_VISIBLE` is
    left is dropped. Both targets have masks.
    """
    (image, target), (other, given) = sample, donor
    assert target.masks is not None
    assert given.masks is not None
    height, width = (min(sides) for sides in zip(target.image_size, given.image_size, strict=True))
    corners = cxcywh_to_xyxy(given.boxes) * torch.tensor(given.image_size).flip(0).repeat(2)  # pixels
    kept = chosen & (corners[:, 2:] <= torch.tensor([width, height])).all(1)
    masks = given.masks[kept]
    given = given._replace(labels=given.labels[kept], masks=masks)

    pasted = torch.zeros(target.image_size, dtype=torch.bool)
    pasted[:height, :width] = paste_masks(masks, corners[kept], (height, width)).any(0)
    image = image.clone()
    image[:, pasted] = other[:, :height, :width][:, pasted[:height, :width]]

    scale = torch.tensor(target.image_size).flip(0).repeat(2)
    cells = crop_and_resize(
        pasted.expand(len(target.boxes), -1, -1), cxcywh_to_xyxy(target.boxes) * scale, target.masks.shape[-1]
    )
    visible = target.masks & (cells < 0.5)
    seen = visible.sum((1, 2)) >= MIN_VISIBLE * target.masks.sum((1, 2))
    boxes, masks = _around_what_is_seen(target.boxes[seen], target.masks[seen], visible[seen])
    boxes = torch.cat([boxes, xyxy_to_cxcywh(corners[kept] / scale)])
    return image, _joined([target._replace(labels=target.labels[seen], masks=masks), given], boxes, target.image_size)


def _around_what_is_seen(boxes: Tensor, masks: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The box (K, 4) cxcywh around the visible part of each mask (K, N, N) bool, and that part in this box."""
    side = masks.shape[-1]
    before, after = _extent(masks), _extent(visible)
    moved = before != after
    cells = torch.where(moved, after, torch.tensor([0, 0, side, side]))  # an edge still seen stays as exact as it was

    corners = cxcywh_to_xyxy(boxes)
    start, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    smaller = xyxy_to_cxcywh(start.repeat(1, 2) + cells / side * sides.repeat(1, 2))
    cut = moved.any(1)
    visible[cut] = crop_and_resize(visible[cut], cells[cut], side) >= 0.5
    return torch.where(cut[:, None], smaller, boxes), visible


def _extent(masks: Tensor) -> Tensor:
    """(K, N, N) bool -> (K, 4) first and last cell plus one, (x0, y0, x1, y1); of an empty mask the whole."""
    filled = torch.stack([masks.any(1), masks.any(2)], dim=1).int()  # (K, x and y, N)
    return torch.cat([filled.argmax(-1), masks.shape[-1] - filled.flip(-1).argmax(-1)], dim=1)


def _joined(targets: Sequence[Target], boxes: Tensor, size: tuple[int, int]) -> Target:
    """The first target with the labels and masks of all, at boxes of an image of another size."""
    masks = torch.cat([target.masks for target in targets if target.masks is not None])
    labels = torch.cat([target.labels for target in targets])
    return targets[0]._replace(labels=labels, boxes=boxes, masks=masks, image_size=size)
