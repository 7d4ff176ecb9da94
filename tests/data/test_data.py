"""COCO folders: the released targets, both mask routes, odd inputs, and the messages of bad ones."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_rle
from pycocotools.coco import COCO

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.codecs.reconstruct import box_frame_iou
from solq_lab.data.classes import UNUSED, ClassMap
from solq_lab.data.coco import CocoDataset, DataError
from solq_lab.data.folders import Split
from solq_lab.data.images import read_image
from solq_lab.data.transforms import (
    Crop,
    FlipOnly,
    Mirror,
    ReleasedAugmentation,
    Resize,
    Step,
    TestResize,
    apply_to_bitmaps,
)
from solq_lab.masks import decode_rle, runs_of_rle
from solq_lab.workbench.check.checker import check_data

SQUARE = [10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]
RELEASED = ReleasedAugmentation(
    train_scales=range(480, 801, 32), max_size=1333, crop_scales=(400, 500, 600), crop_size=(384, 600)
)


class Planned:
    """A transform whose steps are given."""

    def __init__(self, *steps: Step) -> None:
        self.steps = list(steps)

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        return self.steps


class MirrorOrCrop:
    """Mirrors, crops, does both or nothing, at the original resolution."""

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        height, width = size
        steps: list[Step] = [Mirror(width)] if random.random() < 0.5 else []
        if random.random() < 0.5:
            top, left = int(random.integers(height // 3)), int(random.integers(width // 3))
            steps.append(Crop(top, left, height // 2, width // 2))
        return steps


def annotation(**changes: Any) -> dict[str, Any]:
    entry = {"id": 7, "image_id": 1, "category_id": 3, "bbox": [10, 5, 10, 10], "segmentation": [SQUARE], "iscrowd": 0}
    return entry | changes


def write_folder(root: Path, *annotations: dict[str, Any], **changes: Any) -> dict[str, Path]:
    """A data set of two images of 30 x 40 pixels, the second one without objects; arguments of `CocoDataset`."""
    (root / "images").mkdir()
    document = {
        "images": [
            {"id": 5, "file_name": "empty.png", "height": 30, "width": 40},
            {"id": 1, "file_name": "a.png", "height": 30, "width": 40},
        ],
        "annotations": list(annotations),
        "categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "dog"}],
    } | changes
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in ("empty.png", "a.png"):
        Image.fromarray(pixels).save(root / "images" / name)
    (root / "instances.json").write_text(json.dumps(document))
    return {"images": root / "images", "annotations": root / "instances.json"}


def tiny(root: Path, split: str, **arguments: Any) -> CocoDataset:
    return CocoDataset(root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json", **arguments)


# Against the released implementation


@pytest.mark.golden
def test_targets_are_those_of_the_released_implementation(golden_root, coco_tiny):
    """Image, labels, boxes and bitmaps of the real image in the fixture of the paper's model."""
    record = json.loads((golden_root / "r50_paper" / "fixture.json").read_text())
    with np.load(golden_root / "r50_paper" / "fixture.npz") as arrays:
        images = {name: arrays[name] for name in arrays.files if name.endswith("_uint8")}
    compared = 0
    for number, image in enumerate(record["inputs"]):
        transform = TestResize(image["short_side"], image["max_size"])
        dataset = tiny(
            coco_tiny, image["split"], class_ids="raw", mask_size=128, transform=transform, mask_route="bitmap"
        )
        index = dataset.image_ids.index(image["image_id"])
        pixels, target = dataset[index]
        difference = pixels.permute(1, 2, 0).numpy().astype(int) - images[f"image{number}_uint8"]
        assert np.abs(difference).max() <= 2  # Pillow's fixed-point bilinear weights differ in the last bit
        assert np.abs(difference).mean() < 0.1
        expected = image["targets"]
        assert target.labels.tolist() == expected["labels"]
        assert target.original_size == tuple(image["orig_size"])
        assert target.image_size == tuple(image["resized"])
        torch.testing.assert_close(target.boxes, torch.tensor(expected["boxes_cxcywh"]), rtol=0, atol=1e-6)
        original = dataset.objects(index).masks
        bitmaps = apply_to_bitmaps([Resize(target.original_size, target.image_size)], decode_rle(original))
        assert torch.equal(bitmaps, decode_rle(expected["masks"]))
        compared += 1
    assert compared > 0


# The two mask routes


@pytest.mark.parametrize("split", ["train", "val"])
def test_window_and_bitmap_route_agree_under_mirrors_and_crops(coco_tiny, split):
    routes = [
        tiny(coco_tiny, split, mask_size=64, transform=MirrorOrCrop(), seed=1, mask_route=route)
        for route in ("window", "bitmap")
    ]
    overlaps = []
    for index in range(len(routes[0])):
        (_, window), (_, bitmap) = (route[0, index] for route in routes)
        assert torch.equal(window.labels, bitmap.labels)
        assert torch.equal(window.boxes, bitmap.boxes)
        overlaps.append(box_frame_iou(window.masks, bitmap.masks))
    overlaps = torch.cat(overlaps)
    assert len(overlaps) > 200
    assert overlaps.mean() >= 0.998


def test_routes_differ_by_the_nearest_resizes_under_the_released_augmentation(coco_tiny):
    """Each nearest-neighbour resize moves a bitmap by up to half a pixel; next to a large object that is little."""
    window, bitmap = (
        tiny(coco_tiny, "train", mask_size=64, transform=RELEASED, mask_route=route) for route in ("window", "bitmap")
    )
    overlaps = []
    for index in range(16):
        target = window[0, index][1]
        sides = target.boxes[:, 2:] * torch.tensor(target.original_size).flip(0)
        large = sides.min(dim=1).values >= 128
        overlaps.append(box_frame_iou(target.masks, bitmap[0, index][1].masks)[large])
    overlaps = torch.cat(overlaps)
    assert len(overlaps) > 10
    assert overlaps.mean() > 0.96
    assert overlaps.min() > 0.9


def test_a_resize_does_nothing_to_a_mask_and_a_mirror_mirrors_it(tmp_path):
    files = write_folder(tmp_path, annotation(bbox=[8, 4, 15, 12], segmentation=[[10.0, 5, 20, 5, 12, 15]]))
    plain, resized, turned = (
        CocoDataset(**files, mask_size=16, transform=Planned(*steps))[0][1].masks
        for steps in ((), (Resize((30, 40), (77, 101)),), (Mirror(40), Resize((30, 40), (11, 13))))
    )
    assert plain.any()
    assert not plain.all()
    assert torch.equal(resized, plain)
    assert torch.equal(turned, plain.flip(-1))


def test_a_crop_shrinks_the_window_and_keeps_an_object_whose_mask_is_gone(tmp_path):
    """The box reaches to the image's right edge, its mask lies in the left half only."""
    files = write_folder(tmp_path, annotation(bbox=[10, 5, 30, 10]))
    whole, left, right, outside = (
        CocoDataset(**files, mask_size=8, transform=Planned(*steps))[0][1]
        for steps in ((), (Crop(0, 0, 30, 20),), (Crop(0, 25, 30, 15),), (Crop(16, 0, 10, 40),))
    )
    assert 0 < whole.masks.float().mean() < 0.5
    assert left.masks.all()  # the window 10..20 is filled
    assert left.boxes.tolist() == [pytest.approx([0.75, 10 / 30, 0.5, 10 / 30])]
    assert right.labels.tolist() == [1]
    assert not right.masks.any()
    assert outside.labels.shape == (0,)
    assert outside.boxes.shape == (0, 4)
    assert outside.masks.shape == (0, 8, 8)


# Chance and memory


def test_a_sample_depends_on_seed_epoch_and_index_alone(coco_tiny):
    first, second = (tiny(coco_tiny, "train", mask_size=32, transform=RELEASED, seed=3) for _ in range(2))
    for key in ((1, 2), (0, 4), (0, 0)):
        second[key]  # another history
    (image, target), (again, target_again) = first[1, 2], second[1, 2]
    assert torch.equal(image, again)
    assert torch.equal(target.boxes, target_again.boxes)
    assert torch.equal(target.masks, target_again.masks)
    sizes = {first[epoch, 2][1].image_size for epoch in range(4)}
    assert len(sizes) > 1
    assert first[0, 2][1].image_size == first[2][1].image_size  # a bare index is epoch 0


@pytest.mark.parametrize("transform", [None, FlipOnly(480, 640), RELEASED], ids=["none", "flip", "released"])
def test_a_cached_data_set_gives_the_same_samples(coco_tiny, transform):
    plain, cached = (tiny(coco_tiny, "val", mask_size=33, transform=transform, cache=cache) for cache in (False, True))
    for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        (image, target), (cached_image, cached_target) = plain[key], cached[key]
        assert torch.equal(image, cached_image)
        assert torch.equal(target.boxes, cached_target.boxes)
        assert torch.equal(target.masks, cached_target.masks)


def test_a_sample_cannot_spoil_the_cache(tmp_path):
    dataset = CocoDataset(**write_folder(tmp_path, annotation()), mask_size=8, cache=True)
    image, target = dataset[0]
    before = image.clone(), target.masks.clone()
    image.zero_(), target.masks.zero_(), target.boxes.zero_()
    image, target = dataset[0]
    assert torch.equal(image, before[0])
    assert torch.equal(target.masks, before[1])
    assert target.boxes.any()


# What COCO files hold


def test_images_come_by_rising_id_and_without_objects_too(tmp_path):
    dataset = CocoDataset(**write_folder(tmp_path, annotation()), mask_size=8)
    assert len(dataset) == 2
    assert dataset.image_ids == [1, 5]
    _, target = dataset[1]
    assert target.image_id == 5
    assert target.labels.shape == (0,)
    assert target.boxes.shape == (0, 4)
    assert target.masks.shape == (0, 8, 8)
    with pytest.raises(IndexError, match="index 2 of a data set of 2 images"):
        dataset[2]


@pytest.mark.parametrize("route", ["window", "bitmap"])
def test_every_spelling_of_a_segmentation_gives_the_same_mask(tmp_path, route):
    left, right = [10.0, 5, 15, 5, 15, 15, 10, 15], [15.0, 5, 20, 5, 20, 15, 15, 15]
    bitmap = np.zeros((30, 40), dtype=np.uint8)
    bitmap[5:15, 10:20] = 1
    compressed = coco_rle.encode(np.asfortranarray(bitmap))
    compressed["counts"] = compressed["counts"].decode()
    runs = np.flatnonzero(np.diff(np.concatenate([[0], bitmap.T.ravel(), [0]]))).tolist()
    uncompressed = {"size": [30, 40], "counts": np.diff([0, *runs, 1200]).tolist()}
    spellings = [[SQUARE], [left, right], compressed, uncompressed]
    entries = [annotation(id=number, segmentation=item) for number, item in enumerate(spellings)]
    masks = CocoDataset(**write_folder(tmp_path, *entries), mask_size=10, mask_route=route)[0][1].masks
    assert masks.shape == (4, 10, 10)
    assert masks.all()


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 1000))
def test_the_runs_of_pycocotools_rles_are_those_of_the_mask(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel()]))) if mask.size else []
    runs = np.diff(np.concatenate([[0], edges, [height * width]]))
    assert runs_of_rle(coco_rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]).tolist() == runs.tolist()


def test_a_data_set_without_any_object_is_allowed(tmp_path):
    dataset = CocoDataset(**write_folder(tmp_path), mask_size=8)
    assert [len(target.labels) for _, target in dataset] == [0, 0]


def test_crowds_are_no_targets(tmp_path):
    crowd = {"size": [30, 40], "counts": [0, 1200]}
    files = write_folder(tmp_path, annotation(id=1, iscrowd=1, segmentation=crowd), annotation())
    assert len(CocoDataset(**files, mask_size=8)[0][1].labels) == 1


def test_what_is_learnt_twice_is_counted_before_the_training(tmp_path, caplog):
    same = {"categories": [{"id": 3, "name": "cat"}, {"id": 1, "name": "cat"}]}
    CocoDataset(**write_folder(tmp_path, annotation(), annotation(id=8), annotation(id=9, category_id=1), **same))
    assert "several categories are called cat, and are learnt as different classes" in caplog.text
    assert "1 objects are annotated twice" in caplog.text
    assert "as annotation ids 7: remove them" in caplog.text


ROBOFLOW = [
    {"id": 0, "name": "animals", "supercategory": "none"},
    {"id": 1, "name": "cat", "supercategory": "animals"},
    {"id": 2, "name": "dog", "supercategory": "animals"},
]


@pytest.mark.parametrize(
    ("category_id", "categories", "names"),
    [
        (1, ROBOFLOW, ("cat", "dog")),
        (0, ROBOFLOW, ("animals", "cat", "dog")),  # an object of it: no dummy
        (0, [category | {"supercategory": "none"} for category in ROBOFLOW], ("animals", "cat", "dog")),
        (1, [category | {"supercategory": "none"} for category in ROBOFLOW], ("animals", "cat", "dog")),
    ],
)
def test_the_empty_dummy_class_of_roboflow_is_left_out_and_said(tmp_path, caplog, category_id, categories, names):
    with caplog.at_level(logging.INFO):
        dataset = CocoDataset(**write_folder(tmp_path, annotation(category_id=category_id), categories=categories))
    assert dataset.classes.names == names
    assert ("category 0, animals, has no objects and is left out" in caplog.text) == ("animals" not in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [annotation(id="7")]}, r"id '7' is a text: write 7, in Python int\('7'\), in all entries"),
        ({"annotations": [annotation(category_id=3.0)]}, r"category_id 3.0 is a decimal number: write 3, in Python"),
        ({"annotations": [annotation(image_id="1")]}, "image_id '1' is a text: write 1"),
        ({"annotations": [annotation(iscrowd=None)]}, "iscrowd None; allowed are 0 and 1; write 0, or leave it out"),
        ({"annotations": [annotation(iscrowd="0")]}, "iscrowd '0' is a text: write 0"),
        ({"images": [{"id": 1, "file_name": "a.png", "height": "30", "width": 40}]}, "height '30' is a text: write 30"),
        ({"categories": [{"id": "3", "name": "cat"}]}, "id '3' is a text: write 3"),
    ],
)
def test_numbers_that_are_texts_or_decimals_are_named_with_what_to_write(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        CocoDataset(**write_folder(tmp_path, **changes))


def test_objects_of_coco_are_those_of_pycocotools(coco_tiny, capsys):
    dataset = tiny(coco_tiny, "train", class_ids="raw", mask_size=16)
    coco = COCO(str(dataset.annotations))
    assert dataset.image_ids == sorted(coco.imgs)
    for index, image_id in enumerate(dataset.image_ids):
        entries = [entry for entry in coco.loadAnns(coco.getAnnIds(image_id)) if not entry["iscrowd"]]
        image, target = dataset[index]
        height, width = target.original_size
        assert image.shape == (3, height, width)
        assert target.labels.tolist() == [entry["category_id"] for entry in entries]
        boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
        expected = torch.tensor([entry["bbox"] for entry in entries]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        torch.testing.assert_close(boxes, expected, rtol=0, atol=2e-2)  # some boxes leave the image by a hair


def test_true_objects_are_the_annotations_own_at_the_size_of_the_file(tmp_path):
    folder = write_folder(tmp_path, annotation())
    dataset = CocoDataset(**folder, mask_size=4, transform=Planned(Resize((30, 40), (60, 80)), Mirror(80)))
    found = dataset.objects(dataset.image_ids.index(1))
    assert found.boxes.tolist() == [[10, 5, 20, 15]]
    assert (found.names, found.labels.tolist(), found.scores.tolist()) == (["cat"], [1], [1.0])
    expected = torch.zeros(30, 40, dtype=torch.bool)
    expected[5:15, 10:20] = True
    assert torch.equal(decode_rle(found.masks)[0], expected)
    empty = dataset.objects(dataset.image_ids.index(5))
    assert (len(empty.labels), empty.boxes.shape, empty.masks) == (0, (0, 4), [])
    with pytest.raises(ValueError, match="built without masks; give it a mask_size"):
        CocoDataset(**folder).objects(0)


def test_boxes_are_clamped_and_those_without_area_are_named_in_one_log_line(tmp_path, caplog):
    entries = [
        annotation(id=1, bbox=[-5, -5, 20, 20]),
        annotation(id=2, bbox=[10, 5, 0, 10]),
        annotation(id=3, bbox=[45, 5, 10, 10]),
        annotation(id=4, segmentation=[[10, 5, 20, 5]]),
    ]
    files = write_folder(tmp_path, *entries)
    with caplog.at_level(logging.WARNING):
        dataset = CocoDataset(**files, mask_size=8)
    message, *_ = caplog.messages  # the others are about the box that leaves its image and its mask
    assert "3 of 4 objects cannot be learnt: 3 without area in box or mask, annotation ids 2, 3, 4: bbox is" in message
    boxes = cxcywh_to_xyxy(dataset[0][1].boxes) * torch.tensor([40, 30, 40, 30])
    assert boxes.tolist() == [pytest.approx([0, 0, 15, 15])]


def test_without_mask_size_segmentations_may_be_absent(tmp_path):
    entry = annotation()
    del entry["segmentation"]
    target = CocoDataset(**write_folder(tmp_path, entry))[0][1]
    assert target.masks is None
    assert target.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("LA", "png")]
)
def test_images_of_every_kind_become_rgb(tmp_path, mode, suffix):
    files = write_folder(tmp_path)
    grey = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    data = io.BytesIO()
    Image.fromarray(grey).convert(mode).save(data, "JPEG" if suffix == "jpg" else "PNG")
    (files["images"] / "a.png").write_bytes(data.getvalue())
    pixels, _ = CocoDataset(**files)[0]
    assert pixels.shape == (3, 30, 40)
    assert pixels.dtype == torch.uint8
    assert (pixels.int() - torch.from_numpy(grey).int()).abs().max() <= 12  # JPEG and the colour spaces round


# Bad input


@pytest.mark.parametrize(
    ("annotated", "there"),
    [
        ("sub\\x.png", "sub/x.png"),
        ("\u00fcb.png", "u\u0308b.png"),
        ("X.png", "x.PNG"),
        ("my%20x.png", "my x.png"),
        ("x.jpg", "0a1b2c3d-x.png"),
        ("train/x.png", "x.png"),
    ],
)
def test_a_missing_image_is_named_with_the_file_that_is_meant(tmp_path, annotated, there):
    files = write_folder(tmp_path, images=[{"id": 3, "file_name": annotated, "height": 30, "width": 40}])
    (files["images"] / there).parent.mkdir(exist_ok=True)
    (files["images"] / "a.png").rename(files["images"] / there)
    with pytest.raises(DataError) as caught:
        CocoDataset(**files)
    assert f"{annotated!r}, while there is {there!r} (image id 3)" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "a folder"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, no image: run git"),
        (b"\n<!DOCTYPE html><html>not found</html>", "a web page, no image: fetch it again"),
    ],
)
def test_what_lies_in_the_place_of_an_image_is_named_before_it_is_read(tmp_path, content, what):
    files = write_folder(tmp_path)
    (files["images"] / "a.png").unlink()
    (files["images"] / "a.png").mkdir() if content is None else (files["images"] / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"images are missing: 'a\.png', {what}"):
        CocoDataset(**files)
    found, *_ = check_data([Split("train", **files)], processes=1).findings.failing("refused")
    assert found == ("image-missing" if content is None else "image-damaged")
    with pytest.raises(DataError, match="a folder, no image" if content is None else f"it is {what}"):
        read_image(files["images"] / "a.png", 1, (30, 40))


def test_links_out_of_the_folder_are_allowed_on_demand(tmp_path):
    files = write_folder(tmp_path)
    (files["images"] / "a.png").rename(tmp_path / "stored.png")
    (files["images"] / "a.png").symlink_to(tmp_path / "stored.png")
    with pytest.raises(DataError, match=r"'a\.png' .* is a link that leaves .* set data\.allow_links: true"):
        CocoDataset(**files)
    assert CocoDataset(**files, allow_links=True)[0][0].shape == (3, 30, 40)
    (tmp_path / "stored.png").unlink()
    with pytest.raises(DataError, match=r"images are missing: 'a\.png', a link that leads to no file \(image id 1\)"):
        CocoDataset(**files, allow_links=True)


def test_categories_of_another_id_than_in_the_training_are_rejected_and_other_names_logged(tmp_path, caplog):
    files = write_folder(tmp_path, annotation())
    learnt = ClassMap(("cat", "dog"), (1, 3))
    with pytest.raises(DataError, match=r"1 is 'dog' here and 'cat' there; give every category the same id"):
        CocoDataset(**files, classes=learnt)
    CocoDataset(**files, classes=ClassMap(("dog", "kitten"), (1, 3)))
    assert "categories have other names than in the training: 3 is 'cat' here and 'kitten' there" in caplog.text


def test_missing_folder_and_file_are_named(tmp_path):
    files = write_folder(tmp_path, annotation())
    with pytest.raises(DataError, match=r"nowhere: no such image folder; check data\.root"):
        CocoDataset(tmp_path / "nowhere", files["annotations"])
    with pytest.raises(DataError, match=r"none\.json: no such annotation file; check data\.root"):
        CocoDataset(files["images"], tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", r"instances\.json: not JSON \(Expecting property name"),
        ("\xff\xfe", r"instances\.json: not JSON"),
        ("\x1f\x8b\x08", r"instances\.json: packed by gzip; unpack it"),
        ("[1, 2]", r"not a COCO annotation file: no list 'images' \(found a list\); needed are the lists 'images'"),
        ('{"images": [], "shapes": 3}', r"no list 'annotations' \(found 'images', 'shapes'\)"),
        ('{"images": [], "annotations": []}', r"no list 'categories' \(found 'images', 'annotations'\)"),
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, text, message):
    files = write_folder(tmp_path)
    files["annotations"].write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        CocoDataset(**files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"category_id": 4}, r"category id 4 is not in the class map; it has 2 category ids: 1, 3; add"),
        ({"category_id": "cat"}, r"found .* needed are whole numbers 'id' and 'category_id'"),
        ({"image_id": 9}, r"image_id 9 is not among the 2 ids in 'images'"),
        ({"image_id": [9]}, r"image_id \[9\] is not among the 2 ids in 'images'"),
        ({"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\]; needed are four numbers x, y, width, height"),
        ({"bbox": ["1", 2, 3, 4]}, r"bbox \['1', 2, 3, 4\]; needed are four numbers"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"bbox \[1, 2, nan, 4\] has a value that is not finite"),
        ({"bbox": [1, 2, float("inf"), 4]}, r"bbox \[1, 2, inf, 4\] has a value that is not finite"),
        ({"segmentation": "poly"}, r"segmentation 'poly'; needed is a list of polygons .*codec\.kind=none"),
        (
            {"segmentation": [[10, 5], [20, 5], [20, 15]]},
            r"segmentation \[\[10, 5\], .* is a list of points; needed is one flat list",
        ),
        ({"segmentation": SQUARE}, r"segmentation \[10.0, 5.0.*needed is a list of polygons"),
        ({"segmentation": [SQUARE[:-1]]}, r"a polygon has 7 numbers; x and y come in pairs"),
        ({"segmentation": [["a"] * 6]}, r"segmentation .*; polygons are made of numbers"),
        ({"segmentation": [[float("nan")] * 6]}, r"a polygon has a coordinate that is no finite number"),
        ({"segmentation": {"size": [30, 40]}}, r"segmentation .* an RLE needs 'counts' and the size"),
        (
            {"segmentation": {"size": [30, 40], "counts": [600, 500]}},
            r".*counts 1100 pixels, its image has 30 x 40 = 1200",
        ),
        ({"segmentation": {"size": [30, 40], "counts": "123"}}, r".*the RLE counts 6 pixels"),
        ({"segmentation": {"size": [30, 40], "counts": ""}}, r".*not an RLE"),
        ({"segmentation": {"size": [30, 40], "counts": [-5, 1205]}}, r".*not an RLE"),
        ({"segmentation": {"size": [30, 40], "counts": ["a"]}}, r".*not an RLE"),
        ({"segmentation": {"size": [40, 30], "counts": [1200]}}, r".*of the size \[40, 30\], .* here \[30, 40\]"),
        (
            {"segmentation": [[0, 0, 1e8, 5, 3, 1e8]]},
            r"a polygon .* farther outside its image of \[30, 40\] .* than this is long",
        ),
        ({"segmentation": [[0, 0, 10**400, 5, 3, 1]]}, r".*polygons are made of numbers"),
        ({"segmentation": {"size": [30, 40], "counts": "hRll0dZO"}}, r".*not an RLE"),
        ({"segmentation": {"size": [30, 40], "counts": "0o"}}, r".*break off in the middle of a run"),
        ({"bbox": "abcd"}, r"bbox 'abcd'; needed are four numbers"),
        ({"bbox": [10**400, 1, 1, 1]}, r"bbox .* not finite, or larger than any image"),
        ({"iscrowd": "0"}, r"iscrowd '0'; allowed are 0 and 1"),
        ({"id": 2**63}, r"found .* needed are whole numbers"),
    ],
)
def test_a_bad_annotation_is_named_with_what_is_wrong(tmp_path, changes, message):
    files = write_folder(tmp_path, annotation(id=6), annotation(**changes))
    with pytest.raises(DataError, match=f"annotation id {changes.get('id', 7)}: {message}") as caught:
        CocoDataset(**files, mask_size=8)
    assert str(files["annotations"]) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "copies", "message"),
    [
        ({"id": 2**53}, 1, r"images\[0\]: found .*'id' below 2\^53"),
        ({"width": None}, 1, r"images\[0\]: found .*needed are a whole number 'id'"),
        ({"id": "3"}, 1, r"images\[0\]: found .*needed are a whole number"),
        ({"height": 0}, 1, r"images\[0\]: found .*positive whole numbers"),
        ({"file_name": "b.png"}, 1, r"1 of the 1 annotated images are missing: 'b\.png' \(image id 3\); do folder and"),
        ({}, 2, "image id 3 comes more than once; ids have to be unique"),
    ],
)
def test_a_bad_image_entry_is_named(tmp_path, changes, copies, message):
    image = {"id": 3, "file_name": "a.png", "height": 30, "width": 40} | changes
    with pytest.raises(DataError, match=message):
        CocoDataset(**write_folder(tmp_path, images=[image] * copies))


@pytest.mark.parametrize("second", [{"bbox": [1, 1, 5, 5]}, {"iscrowd": 1}, {"bbox": [1, 1, 0, 5]}])
def test_an_annotation_id_that_comes_twice_is_refused_whatever_becomes_of_its_objects(tmp_path, second):
    files = write_folder(tmp_path, annotation(id=6), annotation(id=7), annotation(id=6, **second))
    message = r"instances\.json: annotation id 6 comes more than once; .* give every entry its own"
    with pytest.raises(DataError, match=message):
        CocoDataset(**files, mask_size=8)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes()[:200]),
            r"not a whole image \(200 bytes; .*fetch the file again",
        ),
        (lambda path: path.write_bytes(b""), r"not a whole image \(0 bytes"),
        (lambda path: path.write_bytes(b"hello"), r"not a whole image \(5 bytes"),
        (lambda path: write_half_a_jpeg(path), "not a whole image"),
        (lambda path: path.unlink(), "cannot be read: No such file"),
        (
            lambda path: Image.new("RGB", (30, 40)).save(path),
            r"40 x 30 pixels \(height x width\), the annotations give 30 x 40; exchange height and width",
        ),
    ],
    ids=["cut", "empty", "text", "half a JPEG", "vanished", "another size"],
)
def test_an_image_that_cannot_be_used_is_named_with_its_id(tmp_path, spoil, message):
    dataset = CocoDataset(**write_folder(tmp_path))
    spoil(tmp_path / "images" / "a.png")
    with pytest.raises(DataError, match=rf"image id 1: .*a\.png.*{message}"):
        dataset[0]


def write_half_a_jpeg(path: Path) -> None:
    Image.effect_noise((40, 30), 99).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Class maps


def categories(*ids: int) -> list[dict[str, Any]]:
    return [{"id": number, "name": f"c{number}"} for number in ids]


def test_contiguous_channels_follow_the_category_ids():
    classes = ClassMap.from_categories(categories(7, 2, 90))
    assert classes.category_ids == (2, 7, 90)
    assert classes.names == ("c2", "c7", "c90")
    assert [classes.channel_of(category_id) for category_id in classes.category_ids] == [0, 1, 2]


def test_raw_channels_are_the_category_ids():
    classes = ClassMap.from_categories(categories(3, 1), "raw", num_classes=6)
    assert classes.names == ("", "c1", "", "c3", "", "")
    assert classes.category_ids == (UNUSED, 1, UNUSED, 3, UNUSED, UNUSED)
    assert classes.channel_of(3) == 3


def test_a_class_map_survives_json():
    classes = ClassMap.from_categories(categories(3, 1), "raw")
    assert ClassMap.from_json(classes.to_json()) == classes


def test_a_category_without_a_name_is_called_by_its_id():
    categories = [{"id": 3, "name": ""}, {"id": 5, "name": None}, {"id": 7}, {"id": 9, "name": "cat"}]
    assert ClassMap.from_categories(categories).names == ("3", "5", "7", "cat")


def test_no_categories_are_no_channels():
    assert len(ClassMap.from_categories(categories(), "raw")) == 0
    assert len(ClassMap.from_categories(categories())) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ClassMap.from_categories(categories(1, 2), num_classes=1),
            r"2 class channels \(contiguous ids\) do not fit num_classes 1; raise data\.num_classes",
        ),
        (
            lambda: ClassMap.from_categories(categories(1, 1)),
            "category id 1 comes more than once; ids have to be unique",
        ),
        (lambda: ClassMap.from_categories(categories(-1)), r"categories\[0\]: found .*needed is an 'id' >= 0"),
        (lambda: ClassMap.from_categories(categories(1)).channel_of(UNUSED), "category id -1 is not in the class map"),
        (lambda: ClassMap(("a",), (1, 2)), "a class map of 1 names has 2 category ids"),
        (lambda: ClassMap(("a", "b"), (1, 1)), "category id 1 has more than one class channel"),
        (lambda: ClassMap.from_json('{"names": []}'), "not a class map: .*category_ids"),
        (lambda: ClassMap.from_json("nonsense"), "not a class map"),
    ],
)
def test_bad_class_maps_say_what_is_wrong(make, message):
    with pytest.raises(DataError, match=message):
        make()
