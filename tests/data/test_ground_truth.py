"""Ground truth of annotation files: filters, order, areas and masks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from solq_lab.data.ground_truth import APART, BEYOND, TINY, DataError, GroundTruth
from solq_lab.data.readings import CORNERS, other_reading

HEIGHT, WIDTH = 30, 40


def document(*boxes: tuple[int, tuple[float, float, float, float]], **changes: Any) -> dict[str, Any]:
    """Rectangles that fill their boxes, given as image id and (x, y, w, h); `changes` are of the last object."""
    annotations = []
    for number, (image_id, (x, y, w, h)) in enumerate(boxes, start=1):
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        entry = {"id": number, "image_id": image_id, "category_id": 1, "bbox": [x, y, w, h], "segmentation": [outline]}
        annotations.append(entry)
    annotations[-1] |= changes
    images = [{"id": key, "file_name": f"{key}.png", "height": HEIGHT, "width": WIDTH} for key in (2, 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}


THREE = ((2, (4, 4, 8, 8)), (1, (0, 0, 20, 10)), (1, (30, 20, 2, 2)))


def test_objects_come_by_image_and_without_crowds():
    truth = GroundTruth(document(*THREE, (1, (9, 9, 5, 5)), iscrowd=1))
    assert truth.image_ids.tolist() == [1, 2]
    assert truth.ids.tolist() == [2, 3, 1]
    assert [truth.rows_of(image) for image in (0, 1)] == [slice(0, 2), slice(2, 3)]
    assert truth.rows([2]).tolist() == [2]
    assert truth.size(0) == (HEIGHT, WIDTH)


def test_all_objects_are_kept_on_demand_and_marked():
    content = document(*THREE, (1, (9, 9, 0, 5)))
    content["annotations"][0]["iscrowd"] = 1
    truth = GroundTruth(content, keep="all")
    assert truth.ids.tolist() == [2, 3, 4, 1]
    assert truth.crowd.tolist() == [False, False, False, True]
    assert truth.learnable.tolist() == [True, True, False, False]
    assert truth.rows().tolist() == [0, 1]
    assert truth.coco_boxes[2].tolist() == [9, 9, 0, 5]


def test_a_polygon_of_two_corners_is_kept_as_an_empty_mask():
    truth = GroundTruth(document(*THREE, segmentation=[[1, 1, 5, 5]]), keep="all")
    assert truth.segmentations(np.array([1])) == [[]]
    assert truth.areas_of(np.array([1])).tolist() == [0]
    assert not truth.box_masks([1], 8).any()


def test_objects_without_segmentation_are_left_out_and_counted_with_many_crowds(caplog):
    content = document(*THREE, (1, (9, 9, 5, 5)), iscrowd=1)
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][1]["segmentation"] = None
    assert GroundTruth(content).ids.tolist() == [3]
    assert "3 of 4 objects cannot be learnt: 2 marked as crowds (iscrowd 1), annotation ids 1, 4: write" in caplog.text
    assert "; 1 without segmentation, annotation ids 2: a data set without masks trains a plain" in caplog.text
    assert GroundTruth(content, with_masks=False).ids.tolist() == [2, 3]


def test_a_few_crowds_need_no_warning_but_many_of_one_class_do(caplog):
    GroundTruth(document(*THREE, (1, (9, 9, 5, 5)), iscrowd=1))
    assert caplog.text == ""
    content = document(*4 * THREE)
    for entry in content["annotations"][:2]:
        entry |= {"category_id": 2, "iscrowd": 1}
    GroundTruth(content)
    assert "2 of 12 objects cannot be learnt: 2 marked as crowds" in caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"iscrowd": 1}, "1 marked as crowds .*: write iscrowd 0"),
        ({"bbox": [0, 0, 0, 0]}, "1 without area in box or mask.*: bbox is"),
        ({"segmentation": [[0, 0, 9, 9]]}, "1 without area in box or mask.*a polygon has three corners or more"),
        ({"segmentation": []}, "1 without segmentation.*trains a plain detector"),
    ],
)
def test_a_file_of_which_nothing_can_be_learnt_is_rejected_with_the_reasons(changes, reason):
    with pytest.raises(DataError, match=rf"none of the 1 objects can be learnt: {reason}"):
        GroundTruth(document((1, (4, 4, 8, 8)), **changes))


RLE = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 30, HEIGHT * 4, HEIGHT * 6]}  # columns 30 to 33


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({}, None),
        ({"bbox": [20, 10, 30, 18]}, APART),  # two corners
        ({"bbox": [0.5, 0.33, 0.25, 0.27]}, APART),  # shares of the image
        ({"bbox": [25, 14, 10, 8]}, APART),  # centre and sides
        ({"segmentation": [[0.5, 0.3, 0.7, 0.3, 0.7, 0.6]]}, APART),
        ({"segmentation": [[20, 10, 25, 10, 30, 10]]}, APART),  # a line
        ({"segmentation": [[20, 10, 25, 10, 25, 18], [25, 10, 30, 10, 30, 18]]}, None),
        ({"segmentation": RLE, "bbox": [30, 0, 4, 30]}, None),
        ({"segmentation": RLE, "bbox": [20, 10, 10, 8]}, APART),
        ({"segmentation": [[0.5, 0.3, 0.9, 0.3, 0.9, 0.6, 0.5, 0.6]], "bbox": [0.5, 0.3, 0.4, 0.3]}, TINY),
        ({"segmentation": [[29, 10, 44, 10, 44, 18, 29, 18]], "bbox": [29, 10, 15, 8]}, BEYOND),
    ],
)
def test_boxes_and_masks_in_other_units_are_counted_on_the_screen(changes, what, caplog):
    GroundTruth(document(*THREE, (2, (20, 10, 10, 8)), **changes))
    assert (what is None) == (caplog.text == "")
    assert (
        what is None or f"1 of 4 objects (annotation ids 4) {what}; a bbox is [x, y, width, height] in" in caplog.text
    )


READINGS = {
    "corners x0, y0, x1, y1": lambda x, y, w, h: [x, y, x + w, y + h],
    "y, x, height, width": lambda x, y, w, h: [y, x, h, w],
    "corners y0, x0, y1, x1": lambda x, y, w, h: [y, x, y + h, x + w],
    "centre x, centre y, width, height": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "shares of their image's sides": lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT],
}


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize(("name", "write"), [(None, None), *READINGS.items()])
def test_boxes_that_are_all_written_otherwise_are_noticed_with_and_without_outlines(name, write, with_masks, caplog):
    random = np.random.default_rng(0)
    sides = random.integers(4, 16, (30, 2))
    places = (random.random((30, 2)) * ([WIDTH, HEIGHT] - sides)).astype(int)
    boxes = np.concatenate([places, sides], axis=1).tolist()
    drawn = document(*((1 + number % 2, box) for number, box in enumerate(boxes)))
    for entry in drawn["annotations"]:
        entry["bbox"] = write(*entry["bbox"]) if write else entry["bbox"]
    GroundTruth(drawn, with_masks=with_masks)
    assert caplog.text.count("almost all boxes or outlines seem to be") == (name is not None)
    assert name is None or f"seem to be {name}; a bbox is" in caplog.text


def test_outlines_of_which_all_are_swapped_are_noticed_without_boxes(caplog):
    drawn = document(*((1, (x, 22, 8, 6)) for x in range(0, 30, 2)))
    for entry in drawn["annotations"]:
        del entry["bbox"]
        entry["segmentation"] = [np.reshape(entry["segmentation"], (-1, 2))[:, ::-1].ravel().tolist()]
    GroundTruth(drawn)
    assert "seem to be y, x, height, width" in caplog.text


def test_corners_that_stay_inside_their_images_are_noticed_where_images_have_several_objects():
    corners = np.array([[x, y, x + 20.0, y + 15.0] for x in (2, 8, 14) for y in (3, 9, 17)])
    rows, sizes = np.arange(len(corners)) // 3, np.full((len(corners), 2), 100)
    corners, rows, sizes = np.tile(corners, (2, 1)), np.concatenate([rows, rows + 3]), np.tile(sizes, (2, 1))
    sides = corners - np.tile(corners[:, :2], 2) * [0, 0, 1, 1]
    assert other_reading(corners, rows, sizes) == CORNERS
    assert other_reading(corners, rows, sizes, corners) == CORNERS
    assert other_reading(sides, rows, sizes, corners) == ""
    assert other_reading(corners, np.arange(len(corners)), sizes) == ""  # one large object in the middle of each
    assert other_reading(corners[:0], rows[:0], sizes[:0]) == ""


def test_images_of_one_file_are_counted_on_the_screen_once(caplog):
    content = document(*THREE)
    content["images"][1]["file_name"] = "2.png"
    GroundTruth(content, keep="all")
    assert not caplog.text
    GroundTruth(content)
    assert "1 images have several ids, each with some of the objects: '2.png'; merge their entries" in caplog.text


def test_masks_of_any_rows_are_those_of_single_ones():
    truth = GroundTruth(document(*THREE))
    drawn = truth.box_masks([2, 0, 1], 12)
    assert torch.equal(drawn, torch.cat([truth.box_masks([row], 12) for row in (2, 0, 1)]))
    assert drawn[:, 3:9, 3:9].all()  # rectangles fill their boxes, but for rounding at the border
    assert truth.box_masks([], 12).shape == (0, 12, 12)


def test_an_object_that_lies_outside_its_box_has_an_empty_mask():
    assert not GroundTruth(document((1, (4, 4, 8, 8)), bbox=[30, 20, 8, 8])).box_masks([0], 12).any()


def test_a_missing_box_is_the_masks():
    content = document(*THREE)
    rows = [GroundTruth(content).boxes]
    for entry in content["annotations"]:
        entry["bbox"] = []  # as some tools write it
    rows.append(GroundTruth(content).boxes)
    for entry in content["annotations"]:
        del entry["bbox"]
    rows.append(GroundTruth(content).boxes)
    assert rows[0].tolist() == rows[1].tolist() == rows[2].tolist()
    del content["annotations"][0]["segmentation"]
    with pytest.raises(DataError, match="annotation id 1: bbox None; needed are four numbers"):
        GroundTruth(content)


def test_a_missing_area_is_the_masks():
    content = document(*THREE, area=7.5)
    truth = GroundTruth(content, keep="all")
    assert math.isnan(truth.areas[0])
    assert truth.areas_of(truth.rows()).tolist() == [200, 7.5, 64]


@pytest.mark.parametrize("area", [math.nan, "12", True])
def test_an_area_is_checked_where_all_objects_count(area):
    content = document(*THREE, area=area)
    assert math.isnan(GroundTruth(content).areas[1])
    with pytest.raises(DataError, match=r"annotation id 3: area .*needed is a finite number of pixels, or none"):
        GroundTruth(content, keep="all")


def test_all_objects_of_coco_are_those_of_pycocotools(coco_tiny, capsys):
    path = coco_tiny / "annotations" / "instances_val2017.json"
    truth, coco = GroundTruth(path, keep="all"), COCO(str(path))
    assert sorted(truth.ids.tolist()) == sorted(coco.getAnnIds())
    for row, key in enumerate(truth.ids.tolist()):
        (entry,) = coco.loadAnns(key)
        assert truth.image_ids[truth.image_rows[row]] == entry["image_id"]
        assert truth.rle(row) == coco.annToRLE(entry)
        assert (truth.areas[row], truth.crowd[row]) == (entry["area"], entry["iscrowd"])
        assert truth.coco_boxes[row].tolist() == entry["bbox"]
