"""Transforms: sizes against the released implementation, pixels against Pillow, boxes against moved rectangles."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from solq_lab.data.transforms import (
    Crop,
    FlipOnly,
    LargeScaleJitter,
    Mirror,
    ReleasedAugmentation,
    Resize,
    TestResize,
    apply_to_bitmaps,
    apply_to_boxes,
    apply_to_image,
    boxes_before,
    mirrored,
    resized_size,
    size_after,
)

PAPER = ReleasedAugmentation(
    train_scales=range(480, 801, 32), max_size=1333, crop_scales=(400, 500, 600), crop_size=(384, 600)
)
SIZES = st.tuples(st.integers(40, 700), st.integers(40, 700))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.golden
def test_resized_sizes_are_those_of_the_released_implementation(golden_root):
    table = json.loads((golden_root / "parts_misc" / "fixture.json").read_text())["resize_wh_short_max_to_wh"]
    assert len(table) > 0
    for width, height, short, longest, new_width, new_height in table:
        assert resized_size((height, width), short, longest) == (new_height, new_width)


def test_an_image_of_extreme_shape_keeps_at_least_one_pixel():
    assert min(resized_size((1, 10_000), 800, 1333)) == 1


@settings(max_examples=50, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32))
def test_released_plan_mirrors_resizes_then_resizes_again_or_crops_between_resizes(size, seed):
    steps = PAPER.plan(size, random(seed))
    # a resize to the size that is there already is no step
    assert re.fullmatch("M?R?(R?|R?CR?)", "".join(type(step).__name__[0] for step in steps))
    for crop in (step for step in steps if isinstance(step, Crop)):
        assert 384 <= crop.height <= 600
        assert 384 <= crop.width <= 600
    before = steps[-1].before if steps and isinstance(steps[-1], Resize) else size_after(steps, size)
    assert size_after(steps, size) in [resized_size(before, scale, 1333) for scale in PAPER.train_scales]


def test_released_plan_takes_every_branch_as_often_as_released():
    plans = [PAPER.plan((480, 640), random(seed)) for seed in range(600)]
    share_mirrored = np.mean([mirrored(plan) for plan in plans])
    share_cropped = np.mean([any(isinstance(step, Crop) for step in plan) for plan in plans])
    deviation = 4 * 0.5 / len(plans) ** 0.5
    assert abs(share_mirrored - 0.5) < deviation
    assert abs(share_cropped - 0.5) < deviation


def test_the_same_generator_state_gives_the_same_plan():
    assert PAPER.plan((480, 640), random(7)) == PAPER.plan((480, 640), random(7))


def test_a_crop_larger_than_the_image_shrinks_to_it():
    transform = ReleasedAugmentation(train_scales=[64], max_size=200, crop_scales=[50], crop_size=(100, 150))
    crops = [step for seed in range(20) for step in transform.plan((60, 70), random(seed)) if isinstance(step, Crop)]
    assert crops
    assert all((crop.height, crop.width) == (50, 57) for crop in crops)  # 60 x 70, resized to 64 x 74, to 50 x 57


def test_test_resize_draws_nothing():
    generator = random()
    before = generator.bit_generator.state
    assert TestResize(800, 1333).plan((480, 640), generator) == [Resize((480, 640), (800, 1066))]
    assert generator.bit_generator.state == before


def test_flip_only_leaves_an_image_of_the_test_size_but_for_the_mirror():
    plans = {tuple(FlipOnly(96, 96).plan((96, 96), random(seed))) for seed in range(20)}
    assert plans == {(), (Mirror(96),)}


@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32))
def test_large_scale_jitter_keeps_proportions_and_never_exceeds_the_largest_size(size, seed):
    *_, resize, crop = steps = LargeScaleJitter(512).plan(size, random(seed))
    assert 0.1 * 512 - 1 <= max(resize.after) <= 2 * 512 + 1
    scales = np.array(resize.after) / resize.before
    assert abs(scales[0] - scales[1]) <= 1 / min(size)  # sides are rounded
    assert size_after(steps, size) == tuple(min(side, 512) for side in resize.after)
    assert 0 <= crop.top <= resize.after[0] - crop.height
    assert 0 <= crop.left <= resize.after[1] - crop.width


@settings(max_examples=60, deadline=None)
@given(size=SIZES, seed=st.integers(0, 2**32), augment=st.sampled_from([PAPER, LargeScaleJitter(512)]))
def test_boxes_that_no_crop_touches_come_home(size, seed, augment):
    steps = augment.plan(size, random(seed))
    height, width = size
    corners = random(seed).uniform(0, 1, (5, 2, 2)) * (width, height)
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    moved = apply_to_boxes(steps, boxes)
    unclipped = apply_to_boxes([step for step in steps if not isinstance(step, Crop)], boxes)
    home = boxes_before(steps, moved)
    if not any(isinstance(step, Crop) for step in steps):
        np.testing.assert_array_equal(moved, unclipped)
        np.testing.assert_allclose(home, boxes, atol=1e-9)
    kept = (moved[:, 2:] > moved[:, :2]).all(axis=1)
    assert (home[kept, :2] >= boxes[kept, :2] - 1e-9).all()  # a crop shrinks a window, it never widens it
    assert (home[kept, 2:] <= boxes[kept, 2:] + 1e-9).all()


def test_no_boxes_stay_no_boxes():
    steps = [Mirror(50), Resize((40, 50), (80, 100)), Crop(3, 4, 20, 30)]
    assert apply_to_boxes(steps, np.zeros((0, 4))).shape == (0, 4)
    assert boxes_before(steps, np.zeros((0, 4))).shape == (0, 4)
    assert apply_to_bitmaps(steps, torch.zeros(0, 40, 50, dtype=torch.bool)).shape == (0, 20, 30)


def test_a_box_outside_the_crop_has_no_area_left():
    moved = apply_to_boxes(
        [Crop(0, 0, 10, 10), Resize((10, 10), (20, 20))], np.array([[12.0, 2, 18, 8], [8, 2, 18, 8]])
    )
    np.testing.assert_array_equal(moved, [[20, 4, 20, 16], [16, 4, 20, 16]])


def test_boxes_and_bitmaps_travel_together():
    """The box of a filled rectangle stays the box of its bitmap; whole-number scales make it exact."""
    bitmap = torch.zeros(1, 40, 60, dtype=torch.bool)
    bitmap[0, 8:20, 10:33] = True
    steps = [Mirror(60), Resize((40, 60), (80, 120)), Crop(10, 20, 60, 64), Resize((60, 64), (180, 192))]
    ((x0, y0, x1, y1),) = apply_to_boxes(steps, np.array([[10.0, 8, 33, 20]])).astype(int).tolist()
    expected = torch.zeros(1, 180, 192, dtype=torch.bool)
    expected[0, y0:y1, x0:x1] = True
    assert expected.any()
    assert torch.equal(apply_to_bitmaps(steps, bitmap), expected)


def test_image_steps_are_those_of_pillow_but_for_rounding():
    pixels = random().integers(0, 256, (60, 80, 3), dtype=np.uint8)
    steps = [Mirror(80), Resize((60, 80), (90, 120)), Crop(5, 7, 70, 90), Resize((70, 90), (40, 51))]
    ours = apply_to_image(steps, torch.from_numpy(pixels).permute(2, 0, 1)).permute(1, 2, 0)
    image = Image.fromarray(pixels).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((120, 90), Image.BILINEAR)
    theirs = image.crop((7, 5, 97, 75)).resize((51, 40), Image.BILINEAR)
    difference = np.abs(ours.numpy().astype(int) - np.asarray(theirs).astype(int))
    assert difference.max() <= 2  # both round to uint8 between the two passes of both resizes
    assert ours.dtype == torch.uint8


def test_two_mirrors_are_none():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    assert not mirrored([Mirror(4), Mirror(4)])
    assert torch.equal(apply_to_image([Mirror(4), Mirror(4)], image), image)
