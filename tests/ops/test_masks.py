"""Masks between the frames: against pycocotools, grid_sample, full bitmaps and the released tensors."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_rle
from torch.nn import functional as F

from solq_lab import masks as mask_module
from solq_lab.codecs.reconstruct import box_frame_iou
from solq_lab.masks import (
    crop_and_resize,
    decode_rle,
    encode_rle,
    paste_masks,
    paste_to_rle,
    rasterize_in_box,
    segmentation_to_rle,
)
from solq_lab.ops import extension
from solq_lab.ops.extension import ExtensionBuildError, load_extension

L_SHAPE = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 20.0, 20.0, 20.0, 40.0, 10.0, 40.0]


@pytest.fixture(params=["compiled", "torch"])
def paste_route(request, monkeypatch) -> str:
    """Both implementations of `paste_to_rle`, one after the other."""
    if request.param == "torch":
        monkeypatch.setattr(mask_module, "cpu_operator", lambda name: None)
    else:
        compiled_or_skip()
    return request.param


def compiled_or_skip() -> None:
    try:
        load_extension("cpu")
    except ExtensionBuildError as error:
        pytest.skip(f"no compiled operators here: {error.reason}")


def bitmaps(segmentations: list, image_size: tuple[int, int]) -> torch.Tensor:
    """(K, H, W) bool by pycocotools, the way its own API does it."""
    height, width = image_size
    rles = []
    for segmentation in segmentations:
        if isinstance(segmentation, list):
            rles.append(coco_rle.merge(coco_rle.frPyObjects(segmentation, height, width)))
        else:
            rles.append(coco_rle.frPyObjects(segmentation, height, width))
    return torch.from_numpy(coco_rle.decode(rles)).permute(2, 0, 1).bool()


# Box frame -> image frame

boxes_around_an_image = st.one_of(
    st.tuples(*[st.integers(-20, 60)] * 4),  # sides on pixel borders
    st.tuples(*[st.integers(-40, 120).map(lambda half: half / 2)] * 4),  # sides on pixel centres: ties at one half
    st.tuples(*[st.floats(-30, 80, width=32)] * 4),
    st.tuples(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 4),  # huge
    st.tuples(*[st.integers(0, 64).map(lambda step: 4 + step / 2**16)] * 4),  # tiny
)


@st.composite
def paste_cases(draw) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    count, size = draw(st.integers(0, 4)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    masks = torch.rand(count, size, size, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    rows = [draw(boxes_around_an_image) for _ in range(count)]
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows]).float().reshape(-1, 4)
    return masks, boxes, (draw(st.integers(1, 40)), draw(st.integers(1, 40)))


@pytest.mark.parametrize("route", ["compiled", "torch"])
@settings(max_examples=250, deadline=None)
@given(case=paste_cases())
def test_pasting_to_rle_is_byte_for_byte_pycocotools_encoding_of_the_pasted_image(route, case):
    masks, boxes, image_size = case
    if route == "compiled":
        compiled_or_skip()
        found = paste_to_rle(masks, boxes, image_size)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mask_module, "cpu_operator", lambda name: None)
            found = paste_to_rle(masks, boxes, image_size)
    images = paste_masks(masks, boxes, image_size).numpy().astype(np.uint8)
    assert found == [coco_rle.encode(np.asfortranarray(image)) for image in images]


@settings(max_examples=60, deadline=None)
@given(case=paste_cases())
def test_pasting_samples_like_grid_sample_at_every_pixel_centre(case):
    masks, boxes, (height, width) = case
    pasted = paste_masks(masks, boxes, (height, width))
    for mask, box, image in zip(masks, boxes, pasted, strict=True):
        side = box[2:] - box[:2]
        if not (side > 0.1).all() or box.abs().max() > 1000:
            continue  # grid_sample's own arithmetic is at its limits there
        x = (torch.arange(width) + 0.5 - box[0]) / side[0] * 2 - 1
        y = (torch.arange(height) + 0.5 - box[1]) / side[1] * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        value = F.grid_sample(mask.float()[None, None], grid[None], align_corners=False)[0, 0]
        away_from_ties = (value - 0.5).abs() > 1e-4
        assert torch.equal(image[away_from_ties], (value >= 0.5)[away_from_ties])


def test_boxes_without_area_or_outside_the_image_paste_nothing(paste_route):
    boxes = torch.tensor(
        [
            [5, 5, 5, 9],
            [5, 5, 9, 5],
            [9, 9, 5, 5],
            [-9, -9, -2, -2],
            [50, 2, 60, 9],
            [0, 0, np.nan, 4],
            [0, 0, np.inf, 4],
        ]
    )
    masks = torch.ones(len(boxes), 6, 6, dtype=torch.bool)
    assert not paste_masks(masks, boxes, (12, 13)).any()
    assert not decode_rle(paste_to_rle(masks, boxes, (12, 13))).any()


def test_compiled_pasting_does_not_depend_on_the_number_of_threads():
    compiled_or_skip()
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(50, 32, 32, generator=generator) < 0.5
    corners = torch.rand(50, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 5 + torch.rand(50, 2, generator=generator) * 80], dim=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = paste_to_rle(masks, boxes, (120, 130))
        torch.set_num_threads(4)
        assert paste_to_rle(masks, boxes, (120, 130)) == alone
    finally:
        torch.set_num_threads(before)


def test_a_failed_build_pastes_in_torch_and_says_so(monkeypatch, caplog):
    def fail(kind: str) -> None:
        raise ExtensionBuildError("no C++ compiler")

    monkeypatch.setattr(extension, "load_extension", fail)
    monkeypatch.delenv("SOLQ_OPS", raising=False)
    extension.cpu_operator.cache_clear()
    try:
        rles = paste_to_rle(torch.ones(1, 4, 4, dtype=torch.bool), torch.tensor([[0.0, 0.0, 4.0, 4.0]]), (4, 4))
    finally:
        extension.cpu_operator.cache_clear()
    assert decode_rle(rles).all()
    assert "paste_to_rle runs in plain torch, slower: no C++ compiler" in caplog.text


def test_real_valued_masks_are_not_pasted_to_rle():
    with pytest.raises(ValueError, match=r"masks are torch\.float32, expected bool; binarize"):
        paste_to_rle(torch.zeros(1, 4, 4), torch.zeros(1, 4), (4, 4))


@pytest.mark.golden
def test_golden_parts_paste_pixels_are_those_of_the_released_implementation(golden_root: Path, paste_route):
    folder = golden_root / "parts_paste"
    facts, arrays = json.loads((folder / "fixture.json").read_text()), np.load(folder / "fixture.npz")
    image_size = tuple(facts["image_hw"])
    for index, case in enumerate(facts["cases"]):
        mask = torch.from_numpy(np.unpackbits(arrays[f"mask_{index}"], axis=-1)[None, :, : case["size"]]).bool()
        [rle] = paste_to_rle(mask, torch.tensor([case["box"]]), image_size)
        assert rle == {"size": case["rle"]["size"], "counts": case["rle"]["counts"].encode()}, case
        assert coco_rle.area(rle) == case["area"]


# Image frame -> box frame


def test_a_crop_on_pixel_borders_at_its_own_size_is_the_bitmap_itself():
    masks = torch.rand(2, 20, 30) < 0.5
    boxes = torch.tensor([[4.0, 3.0, 12.0, 11.0]] * 2)
    assert torch.equal(crop_and_resize(masks, boxes, 8) >= 0.5, masks[:, 3:11, 4:12])


def test_crops_do_not_depend_on_how_many_there_are():
    masks = torch.rand(37, 20, 30) < 0.5  # more than one chunk
    boxes = torch.tensor([[2.5, 3.25, 17.0, 18.5]]).expand(37, 4)
    alone = torch.cat([crop_and_resize(masks[k : k + 1], boxes[k : k + 1], 7) for k in range(37)])
    assert torch.equal(crop_and_resize(masks, boxes, 7), alone)
    assert crop_and_resize(masks[:0], boxes[:0], 7).shape == (0, 7, 7)


@pytest.mark.golden
def test_golden_parts_crop_and_resize_cells_are_those_of_the_released_implementation(golden_root: Path):
    folder = golden_root / "parts_crop_and_resize"
    facts, arrays = json.loads((folder / "fixture.json").read_text()), np.load(folder / "fixture.npz")
    for index, case in enumerate(facts["cases"]):
        bitmap = decode_rle([facts["masks"][str(case["annotation_id"])]])
        cells = crop_and_resize(bitmap, torch.tensor([case["box"]]), case["size"])[0]
        if f"raw_{index}" in arrays:
            torch.testing.assert_close(cells, torch.from_numpy(arrays[f"raw_{index}"]), rtol=0, atol=1e-6)
        expected = torch.from_numpy(np.unpackbits(arrays[f"out_{index}"], axis=-1)[:, : case["size"]]).bool()
        decided = (cells - 0.5).abs() > 1e-6  # rounding may differ between processors on the others
        assert torch.equal((cells >= 0.5)[decided], expected[decided]), case


def coco_images(root: Path) -> dict[tuple[int, int, int], list[dict]]:
    """Annotations of all images, keyed (image id, height, width)."""
    images = defaultdict(list)
    for split in ("train2017", "val2017"):
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        for annotation in content["annotations"]:
            images[(annotation["image_id"], *sizes[annotation["image_id"]])].append(annotation)
    return images


def test_objects_drawn_in_their_boxes_match_crops_of_full_bitmaps_under_flips_and_crops(coco_tiny: Path):
    agreement = defaultdict(list)
    generator = np.random.default_rng(0)
    for (_, height, width), objects in coco_images(coco_tiny).items():
        segmentations = [entry["segmentation"] for entry in objects]
        boxes = torch.tensor([entry["bbox"] for entry in objects])
        boxes[:, 2:] += boxes[:, :2]
        full = bitmaps(segmentations, (height, width))

        drawn = rasterize_in_box(segmentations, boxes, (height, width), 128)
        agreement["plain"].append(box_frame_iou(drawn, crop_and_resize(full, boxes, 128) >= 0.5))

        mirrored = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        agreement["flip"].append(box_frame_iou(drawn.flip(2), crop_and_resize(full.flip(2), mirrored, 128) >= 0.5))

        left, top = generator.integers(0, width // 2), generator.integers(0, height // 2)
        right, bottom = generator.integers(left + width // 3, width), generator.integers(top + height // 3, height)
        corner, window = torch.tensor([left, top] * 2), torch.tensor([left, top, right, bottom])
        clipped = torch.cat([boxes[:, :2].maximum(window[:2]), boxes[:, 2:].minimum(window[2:])], dim=1).float()
        kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        clipped, inside = clipped[kept], full[kept][:, top:bottom, left:right]
        drawn = rasterize_in_box(
            [s for s, k in zip(segmentations, kept, strict=True) if k], clipped, (height, width), 128
        )
        agreement["crop"].append(box_frame_iou(drawn, crop_and_resize(inside, clipped - corner, 128) >= 0.5))

    means = {name: torch.cat(values).mean().item() for name, values in agreement.items()}
    assert sum(map(len, agreement["plain"])) > 800
    assert min(means.values()) >= 0.998, means


vertices = st.one_of(
    st.integers(-200, 600).map(lambda tenth: tenth / 10),  # one decimal: ties of the rasteriser's fifths of a pixel
    st.floats(-20, 60),
)


@settings(max_examples=150, deadline=None)
@given(
    polygons=st.lists(
        st.lists(vertices, min_size=6, max_size=12).map(lambda p: p[: len(p) // 2 * 2]), min_size=1, max_size=3
    ),
    corner=st.tuples(st.integers(0, 38), st.integers(0, 28)),
    side=st.tuples(st.integers(1, 40), st.integers(1, 30)),
)
def test_a_window_fills_exactly_the_pixels_that_cocos_rasteriser_fills_in_the_image(polygons, corner, side):
    height, width = 30, 40
    (left, top), (right, bottom) = corner, (min(corner[0] + side[0], width), min(corner[1] + side[1], height))
    window = mask_module._window_bitmap(polygons, (top, left, bottom, right), (height, width))
    assert torch.equal(window.bool(), bitmaps([polygons], (height, width))[0, top:bottom, left:right])


def test_compiled_drawing_is_plain_torchs(coco_tiny: Path, monkeypatch):
    compiled_or_skip()
    different = cells = 0
    for (_, height, width), objects in list(coco_images(coco_tiny).items())[:40]:
        segmentations = [entry["segmentation"] for entry in objects]
        boxes = torch.tensor([entry["bbox"] for entry in objects])
        boxes = torch.cat([boxes[:, :2] - 3, boxes[:, :2] + boxes[:, 2:] * 1.1], dim=1)  # some beyond the image
        drawn = rasterize_in_box(segmentations, boxes, (height, width), 48)
        with monkeypatch.context() as patch:
            patch.setattr(mask_module, "cpu_operator", lambda name: None)
            plain = rasterize_in_box(segmentations, boxes, (height, width), 48)
        different += (drawn != plain).sum().item()
        cells += plain.sum().item()
    assert cells > 10_000
    assert different <= 1e-4 * cells  # exact ties, rounded either way


def test_polygons_compressed_and_uncompressed_rles_draw_the_same_mask():
    polygons = [L_SHAPE, [40.0, 5.0, 55.0, 5.0, 48.0, 30.0]]
    boxes = torch.tensor([[9.5, 4.25, 56.0, 41.0]] * 4)
    compressed = segmentation_to_rle(polygons, (50, 60))
    text = {**compressed, "counts": compressed["counts"].decode()}
    runs = np.flatnonzero(np.diff(decode_rle([compressed])[0].numpy().T.ravel().astype(np.int8), prepend=0))
    uncompressed = {"size": [50, 60], "counts": np.diff(runs, prepend=0, append=50 * 60).tolist()}
    drawn = rasterize_in_box([polygons, compressed, text, uncompressed], boxes, (50, 60), 32)
    assert drawn[0].any()
    assert torch.equal(drawn, drawn[:1].expand_as(drawn))
    assert [segmentation_to_rle(form, (50, 60)) for form in (text, uncompressed)] == [compressed] * 2


def test_objects_without_pixels_and_boxes_without_area_draw_empty_masks():
    boxes = torch.tensor(
        [[10, 10, 10, 40], [30, 40, 10, 10], [-40, -40, -10, -10], [70, 0, 90, 20], [0, 0, 50, 50], [0, 0, 50, 50]]
    )
    segmentations = [[L_SHAPE]] * 4 + [[], [[1.0, 1.0, 9.0, 9.0]]]  # no polygon; two points, which are not a polygon
    assert not rasterize_in_box(segmentations, boxes, (50, 60), 16).any()
    assert rasterize_in_box([], boxes[:0], (50, 60), 16).shape == (0, 16, 16)
    assert coco_rle.area(segmentation_to_rle([], (50, 60))) == 0


def test_bad_segmentations_are_refused_with_what_is_wrong():
    box = torch.tensor([[0.0, 0.0, 5.0, 5.0]])
    with pytest.raises(ValueError, match="a polygon has 7 coordinates, expected pairs x, y"):
        rasterize_in_box([[[1.0] * 7]], box, (10, 10), 8)
    with pytest.raises(ValueError, match=r"an RLE of size \[9, 9\] does not fit its image of \[10, 10\]"):
        rasterize_in_box([{"size": [9, 9], "counts": [81]}], box, (10, 10), 8)
    with pytest.raises(ValueError, match=r"2 segmentations cannot have boxes \(1, 4\)"):
        rasterize_in_box([[L_SHAPE]] * 2, box, (10, 10), 8)


def test_masks_and_boxes_that_do_not_pair_are_refused_with_their_shapes():
    masks, boxes = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(3, 4)
    for call in (crop_and_resize, paste_masks, paste_to_rle):
        with pytest.raises(ValueError, match=r"masks \(2, 4, 4\) and boxes \(3, 4\)"):
            call(masks, boxes, (5, 5) if call is not crop_and_resize else 5)


# Run-length codes


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 3), height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_rles_are_pycocotools_and_decode_to_the_masks(count, height, width, seed):
    masks = torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    rles = encode_rle(masks)
    assert rles == [coco_rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    assert torch.equal(decode_rle(rles), masks if count else torch.zeros(0, 0, 0, dtype=torch.bool))


def test_rles_of_different_images_are_not_decoded_together():
    rles = encode_rle(torch.zeros(1, 3, 4, dtype=torch.bool)) + encode_rle(torch.zeros(1, 4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must share one size, found \[\(3, 4\), \(4, 3\)\]"):
        decode_rle(rles)
