"""Samples of several images, against the same done with full-image masks."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.build import build_dataset
from solq_lab.data.coco import CocoDataset
from solq_lab.data.mixing import mosaic, paste_objects
from solq_lab.masks import paste_masks
from solq_lab.structures import Target

N = 32


def sample(seed: int, height: int, width: int, count: int = 3) -> tuple[torch.Tensor, Target]:
    """A random image with discs that fill their boxes."""
    random = torch.Generator().manual_seed(seed)
    cells = (torch.arange(N) + 0.5) / N - 0.5
    masks = (cells[:, None].square() + cells.square() < 0.25).expand(count, N, N)
    boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2, generator=random), 0.5 * torch.ones(count, 2)], dim=1)
    pixels = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
    return pixels, Target(seed, torch.arange(count) + seed, boxes, masks, (height, width), (height, width))


def drawn(target: Target, size: tuple[int, int] | None = None) -> torch.Tensor:
    """(K, H, W) bool."""
    height, width = size or target.image_size
    boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
    return paste_masks(target.masks, boxes, (height, width))


def test_a_mosaic_has_every_image_and_its_masks_at_half_size_in_its_corner():
    samples = [sample(0, 80, 100), sample(1, 60, 80), sample(2, 100, 64, count=0), sample(3, 40, 90)]
    image, target = mosaic(samples)
    assert (image.shape, target.image_size) == ((3, 90, 95), (90, 95))
    assert target.labels.tolist() == [0, 1, 2, 1, 2, 3, 3, 4, 5]
    corners = [(0, 0, 40, 50), (10, 50, 30, 40), (40, 18, 50, 32), (40, 50, 20, 45)]  # top, left, height, width
    masks = drawn(target)
    for (top, left, height, width), (pixels, part) in zip(corners, samples, strict=True):
        tile = image[:, top : top + height, left : left + width].permute(1, 2, 0).int()
        small = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
        assert (tile - torch.from_numpy(np.array(small)).int()).abs().max() <= 1
        own, masks = masks[: len(part.labels)], masks[len(part.labels) :]
        expected = torch.zeros_like(own)
        expected[:, top : top + height, left : left + width] = drawn(part, (height, width))
        assert (own != expected).sum() <= 0.002 * own.numel()


def test_pasted_objects_cover_the_image_and_are_cut_from_what_lies_below():
    below, (pixels, given) = sample(0, 96, 96), sample(7, 96, 128)
    boxes = torch.tensor([[0.35, 0.5, 0.375, 0.5], [0.8, 0.5, 0.3, 0.5], [0.3, 0.3, 0.2, 0.2]])  # the second is outside
    above = pixels, given._replace(boxes=boxes)
    smaller = boxes[:1] * torch.tensor([4 / 3, 1, 0.8 * 4 / 3, 0.8])
    hidden = below[1]._replace(boxes=torch.cat([below[1].boxes[:2], smaller]))
    image, target = paste_objects((below[0], hidden), above, torch.tensor([True, True, False]))
    assert target.labels.tolist() == [0, 1, 7]  # the third lies below the pasted one
    pasted = drawn(above[1])[0, :, :96]
    assert torch.equal(image, torch.where(pasted, above[0][:, :, :96], below[0]))
    expected = torch.cat([drawn(hidden)[:2] & ~pasted, pasted[None]])
    assert (drawn(target) != expected).float().mean() < 0.01
    assert torch.equal(paste_objects(below, above, torch.zeros(3, dtype=torch.bool))[0], below[0])


def test_a_half_hidden_object_gets_the_box_of_what_is_seen_and_others_keep_theirs():
    pixels, target = sample(0, 128, 128)
    square = torch.ones_like(target.masks)
    boxes = torch.tensor([[0.5, 0.25, 0.5, 0.25], [0.5, 0.75, 0.5, 0.25], [0.1, 0.1, 0.1, 0.1]])
    over = torch.tensor([[0.625, 0.25, 0.25, 0.5]])  # the right half of the first
    above = pixels, target._replace(boxes=over, masks=square[:1], labels=target.labels[:1])
    _, found = paste_objects(
        (pixels, target._replace(boxes=boxes, masks=square)), above, torch.ones(1, dtype=torch.bool)
    )
    torch.testing.assert_close(found.boxes[0], torch.tensor([0.375, 0.25, 0.25, 0.25]))
    assert torch.equal(found.boxes[1:], torch.cat([boxes[1:], over]))
    assert found.masks.all()


@pytest.mark.parametrize(("augment", "fewest"), [("mosaic", 20), ("copy_paste", 4)])  # pasted objects may lie outside
def test_a_sample_depends_on_seed_epoch_and_index_alone_and_about_half_are_mixed(tmp_path, augment, fewest):
    data = {"augment": augment, "train_scales": [48], "crop_scales": [40], "crop_size": [24, 40]}
    dataset = build_dataset(tiny_experiment(write_tiny_dataset(tmp_path / "data"), data=data), "train")
    mixed = 0
    for key in [(epoch, index) for epoch in range(6) for index in range(len(dataset))]:
        (image, target), (again, same) = dataset[key], dataset[key]
        assert torch.equal(image, again)
        assert torch.equal(target.boxes, same.boxes)
        assert len(target.masks) == len(target.boxes) == len(target.labels)
        assert tuple(image.shape[1:]) == target.image_size
        mixed += not torch.equal(image, CocoDataset.__getitem__(dataset, key)[0])
    assert fewest < mixed < 52
