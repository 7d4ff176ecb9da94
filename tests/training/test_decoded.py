"""Targets in predicted frames, and mask quality, against pasting and cropping full images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_rle
from scipy import ndimage

from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.masks import crop_and_resize, encode_rle, paste_masks
from solq_lab.training.decoded import MatchedVectors, outline_band, reframe
from solq_lab.training.focal import quality_focal_loss

N, SIDE = 28, 512
BOX = torch.tensor([[96.0, 112.0, 320.0, 336.0]])  # 8 pixels a cell, so that a full image is an exact enough oracle
NEAR = torch.tensor([[110.0, 100.0, 330.0, 350.0]])
FAR = torch.tensor([[200.0, 130.0, 400.0, 500.0]])


def disc(radius: float = 10.0) -> torch.Tensor:
    """(1, N, N) bool, off centre and cut by the upper edge."""
    row, column = torch.meshgrid(torch.arange(N), torch.arange(N), indexing="ij")
    return (((row - 8.3).square() + (column - 15.1).square()).sqrt() < radius)[None]


def matched(box: torch.Tensor, predicted: torch.Tensor, *, in_predicted_frame: bool = True) -> MatchedVectors:
    """One pair of one layer: an object with a disc in `BOX`, a query with the mask `predicted` in `box`."""
    codec, true = FlattenCodec(N), disc()[None]
    boxes, true_boxes = (xyxy_to_cxcywh(values / SIDE)[None] for values in (box, BOX))
    vectors, target = (codec.encode(masks)[None] for masks in (predicted, true[0]))
    options = {"in_predicted_frame": in_predicted_frame}
    return MatchedVectors(codec, vectors, target, boxes.requires_grad_(), true_boxes, true, **options)


@pytest.mark.parametrize("other", [BOX, NEAR, FAR], ids=["the same box", "near", "far"])
def test_a_mask_in_another_frame_is_the_pasted_mask_cut_out_there(other):
    found = reframe(disc(), xyxy_to_cxcywh(BOX), xyxy_to_cxcywh(other))
    expected = crop_and_resize(paste_masks(disc(), BOX, (SIDE, SIDE)), other, N) >= 0.5
    assert found.sum() > 20
    assert (found != expected).sum() <= 0.01 * N * N  # pasting rounds the outline to whole pixels, an eighth of a cell
    if other is BOX:
        assert torch.equal(found, disc())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["plain torch", "compiled"])
def test_a_mask_in_another_frame_equals_its_formula(dtype):
    mask = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    (x0, y0, x1, y1), (left, top, right, bottom) = (0.1, 0.2, 0.5, 0.9), (0.13, 0.1, 0.61, 0.85)
    cells = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    down = ((top + cells * (bottom - top)) - y0) / (y1 - y0) * 6 - 0.5  # in cells of the mask
    across = ((left + cells * (right - left)) - x0) / (x1 - x0) * 6 - 0.5
    weights = [(1 - (place[:, None] - torch.arange(6)).abs()).clamp(min=0) for place in (down, across)]
    sampled = weights[0] @ mask[0].double() @ weights[1].T
    corners = torch.tensor([(x0, y0, x1, y1), (left, top, right, bottom)], dtype=torch.float64)
    box, other = xyxy_to_cxcywh(corners).to(dtype).split(1)
    assert torch.equal(reframe(mask, box, other)[0], sampled >= 0.5)
    flat = torch.tensor([[0.5, 0.5, 0.0, 0.4]], dtype=dtype)
    assert not reframe(mask, box, flat).any()
    assert not reframe(mask, flat, box).any()


def test_only_about_right_boxes_become_frames_and_no_gradient_reaches_them():
    near, far = matched(NEAR, disc()), matched(FAR, disc())
    assert torch.equal(near.masks, near.masks_in_predicted_boxes)
    assert not torch.equal(near.masks, near.true_masks)
    assert torch.equal(near.target[0, 0], near.masks[0, 0].flatten().float())
    assert torch.equal(far.masks, far.true_masks)
    assert not near.target.requires_grad
    assert torch.equal(matched(NEAR, disc(), in_predicted_frame=False).masks, near.true_masks)


@pytest.mark.parametrize("box", [BOX, NEAR, FAR], ids=["the same box", "near", "far"])
def test_quality_is_the_iou_of_pasted_masks(box):
    found, true = (paste_masks(masks, place, (SIDE, SIDE)) for masks, place in ((disc(11.0), box), (disc(), BOX)))
    expected = coco_rle.iou(encode_rle(found), encode_rle(true), [0])[0, 0]
    assert matched(box, disc(11.0)).quality().item() == pytest.approx(
        expected, abs=0.02
    )  # outlines are rounded to cells


@pytest.mark.parametrize("size", [8, 28, 64])
def test_the_band_of_an_outline_is_what_scipys_morphology_finds(size):
    generator = torch.Generator().manual_seed(size)
    masks = F.interpolate(torch.rand(3, 1, 4, 4, generator=generator), size=size, mode="bilinear").squeeze(1) > 0.5
    masks = torch.cat([masks, torch.zeros(1, size, size), torch.ones(1, size, size)]).bool()
    square = np.ones((2 * max(1, size // 16) + 1,) * 2)
    for mask, band in zip(masks.numpy(), outline_band(masks.float()).numpy(), strict=True):
        grown, shrunk = ndimage.binary_dilation(mask, square), ndimage.binary_erosion(mask, square)
        assert np.array_equal(band, grown & ~shrunk)


def test_dice_near_outlines_sees_no_pixel_far_from_them():
    near = matched(BOX, disc(8.0))
    far = matched(BOX, disc(8.0) & ~disc(5.0))  # a hole in the middle
    assert near.dice(near_outlines=True).item() == far.dice(near_outlines=True).item() > near.dice().item()
    assert far.dice().item() > near.dice().item()


def test_the_quality_loss_is_least_at_its_score_and_the_plain_one_at_quality_one():
    logits = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    truth = torch.ones_like(logits)
    losses = quality_focal_loss(logits, truth, 0.8 * truth, gamma=1.5)
    assert logits[losses.argmin()].sigmoid().item() == pytest.approx(0.8**1.5, abs=0.01)
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().sigmoid() - 0.8**1.5)
    torch.testing.assert_close(quality_focal_loss(logits, truth, truth, gamma=1.5), -logits.sigmoid().log())
    absent = quality_focal_loss(logits, 0 * truth, 0 * truth, gamma=1.5)
    torch.testing.assert_close(absent, -(logits.sigmoid() ** 1.5) * (-logits).sigmoid().log())
