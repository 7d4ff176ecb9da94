"""The hand-over to faster-coco-eval: overlaps are pycocotools', pair by pair, by every route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faster_coco_eval.core.cocoeval import Params
from pycocotools import mask as coco_rle

from solq_lab.evaluation import matching
from solq_lab.masks import encode_rle, join_codes
from solq_lab.ops.extension import cpu_operator

HEIGHT, WIDTH = 40, 50
IMAGES = {7: {"height": HEIGHT, "width": WIDTH}, 3: {"height": HEIGHT, "width": WIDTH}}
MEASURES = {"box": matching._box_overlaps, "segm": matching._mask_overlaps}


def random_entries(count: int, seed: int) -> list[dict]:
    """Boxes and masks of them with holes, in two images and two classes."""
    random = np.random.default_rng(seed)
    entries = []
    for number in range(count):
        x, y = random.integers(0, WIDTH - 6), random.integers(0, HEIGHT - 6)
        w, h = random.integers(1, WIDTH - x + 1), random.integers(1, HEIGHT - y + 1)
        mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
        mask[0, y : y + h, x : x + w] = torch.from_numpy(random.random((h, w)) < 0.8)
        entries.append(
            {
                "id": number + 1,
                "image_id": int(random.choice([3, 7])),
                "category_id": int(random.choice([1, 4])),
                "score": float(random.integers(0, 4)) / 4,  # many equal ones
                "iscrowd": int(random.random() < 0.3),
                "bbox": [float(x), float(y), float(w), float(h)],
                "segmentation": encode_rle(mask)[0],
            }
        )
    return entries


def pair_up(objects: list[dict], detections: list[dict], most: int = 100) -> matching._Pairs:
    params = Params("segm")
    params.imgIds, params.catIds, params.maxDets = sorted(IMAGES), [1, 4], [1, 10, most]
    return matching._pair_up(objects, detections, params)


@pytest.mark.parametrize("kind", ["box", "segm"])
@pytest.mark.parametrize("route", ["compiled", "plain"])
def test_overlaps_are_pycocotools(kind, route, monkeypatch):
    if route == "plain":
        monkeypatch.setattr(matching, "cpu_operator", lambda name: None)
    objects, detections = random_entries(40, seed=0), random_entries(90, seed=1)
    pairs = pair_up(objects, detections)
    found = MEASURES[kind](objects, detections, IMAGES, pairs)
    shape = {"box": "bbox", "segm": "segmentation"}[kind]
    expected = [
        coco_rle.iou([detections[row][shape]], [objects[column][shape]], [objects[column]["iscrowd"]])[0, 0]
        for row, column in zip(pairs.detections, pairs.objects, strict=True)
    ]
    assert len(expected) > 500
    assert found.tolist() == expected
    if kind == "segm":
        assert [entry["area"] for entry in detections] == [coco_rle.area(entry["segmentation"]) for entry in detections]


def test_the_best_detections_of_a_class_in_an_image_meet_all_its_objects():
    objects, detections = random_entries(12, seed=2), random_entries(30, seed=3)
    pairs = pair_up(objects, detections, most=5)
    found = set(zip(pairs.detections.tolist(), pairs.objects.tolist(), strict=True))
    expected = set()
    for image_id in IMAGES:
        for category_id in (1, 4):
            key = {"image_id": image_id, "category_id": category_id}
            rows = [row for row, entry in enumerate(detections) if key.items() <= entry.items()]
            best = sorted(rows, key=lambda row: -detections[row]["score"])[:5]
            columns = [column for column, entry in enumerate(objects) if key.items() <= entry.items()]
            expected |= {(row, column) for row in best for column in columns}
    assert found == expected
    assert len(found) == len(pairs.detections) == sum(block.detections * block.objects for block in pairs.blocks)


@pytest.mark.parametrize("kind", ["box", "segm"])
@pytest.mark.parametrize(("objects", "detections"), [(0, 0), (0, 3), (3, 0)])
def test_without_objects_or_detections_there_are_no_overlaps(kind, objects, detections):
    truth, found = random_entries(objects, seed=0), random_entries(detections, seed=1)
    pairs = pair_up(truth, found)
    assert pairs.blocks == []
    assert MEASURES[kind](truth, found, IMAGES, pairs).shape == (0,)


def test_the_compiled_operator_refuses_pairs_of_masks_that_are_not_there():
    overlap = cpu_operator("rle_overlap")
    if overlap is None:
        pytest.skip("no compiled operators here")
    codes = join_codes([entry["segmentation"]["counts"] for entry in random_entries(2, seed=0)])
    with pytest.raises(ValueError, match="a pair names a mask that is not among the 2"):
        overlap(*codes, torch.tensor([0]), torch.tensor([2]), torch.tensor([False]))
