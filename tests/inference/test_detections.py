"""The objects of an image as a sequence, and in the formats of other tools."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_rle

from solq_lab.masks import encode_rle
from solq_lab.structures import Detection, Detections


def objects(count: int = 3, *, masks: bool = True) -> Detections:
    """Object k is a square of side k + 2 at (k, k) in an image of 12 x 16."""
    bitmaps = torch.zeros(count, 12, 16, dtype=torch.bool)
    for k in range(count):
        bitmaps[k, k : 2 * k + 2, k : 2 * k + 2] = True
    rows = torch.arange(count)
    boxes = torch.stack([rows, rows, 2 * rows + 2, 2 * rows + 2], dim=1).float()
    names = ["cat", "dog", "cat", "cat"][:count]
    found = Detections(0.9 - 0.25 * rows, rows % 2, boxes, rows + 7, encode_rle(bitmaps) if masks else None, names)
    return dataclasses.replace(found, image_size=(12, 16), category_ids=(10 + rows % 2).tolist())


def test_detections_are_a_sequence_of_objects():
    found = objects()
    first, *_, last = found
    assert (len(found), found[1].name, found[-1]) == (3, "dog", last)
    assert first == Detection("cat", pytest.approx(0.9), (0, 0, 2, 2), 0, 7, found.masks[0])
    for rows in (slice(0, 3, 2), [0, 2], torch.tensor([True, False, True]), np.array([0, 2])):
        some = found[rows]
        assert (some.names, some.queries.tolist(), some.category_ids) == (["cat", "cat"], [7, 9], [10, 10])
        assert some.masks == [found.masks[0], found.masks[2]]
    assert len(found[[]]) == 0
    assert list(found[3:]) == []
    with pytest.raises(IndexError):
        found[3]


def test_detections_say_what_they_hold():
    assert repr(objects()) == "<Detections: 2 cat, 1 dog, scores 0.40 to 0.90, with masks, image 16 x 12>"
    assert repr(objects(0, masks=False)) == "<Detections: no objects, image 16 x 12>"


def test_masks_and_polygons_are_the_run_lengths():
    found = objects()
    expected = np.stack([coco_rle.decode(rle).astype(bool) for rle in found.masks])
    np.testing.assert_array_equal(found.masks_array(), expected)
    assert [polygon.tolist() for (polygon,) in found[:2].polygons()] == [
        [[0, 0], [0, 2], [2, 2], [2, 0]],
        [[1, 1], [1, 4], [4, 4], [4, 1]],
    ]
    assert objects(0).masks_array().shape == (0, 12, 16)
    with pytest.raises(ValueError, match="boxes, but no masks"):
        objects(masks=False).masks_array()


def test_boxes_are_cut_at_the_borders_of_the_image():
    found = dataclasses.replace(objects(1), boxes=torch.tensor([[-3.0, 2.0, 20.0, 15.0]]))
    assert found.clipped().boxes.tolist() == [[0, 2, 16, 12]]


def test_a_table_has_a_row_per_object():
    frame = objects().frame()
    assert frame.columns.tolist() == ["name", "score", "x0", "y0", "x1", "y1", "area", "label", "query"]
    assert frame.loc[1, ["name", "x0", "y1", "area"]].tolist() == ["dog", 1, 4, 9]
    assert objects(0).frame().shape == (0, 9)


def test_results_need_category_ids():
    assert [result["category_id"] for result in objects().to_coco(5)] == [10, 11, 10]
    with pytest.raises(ValueError, match="category_ids"):
        dataclasses.replace(objects(), category_ids=None).to_coco()


@pytest.mark.filterwarnings("ignore:OpenCV")
@pytest.mark.parametrize("count", [3, 0])
def test_supervision_gets_boxes_masks_and_names(count):
    pytest.importorskip("supervision")
    theirs = objects(count).to_supervision()
    assert len(theirs) == count
    np.testing.assert_array_equal(theirs.xyxy, objects(count).boxes)
    np.testing.assert_array_equal(theirs.mask, objects(count).masks_array())
    assert theirs.data["class_name"].tolist() == objects(count).names


@pytest.mark.parametrize("size", [(16, 12), (160, 40), (7, 300)])
def test_a_plot_has_the_size_of_its_image_and_each_object_its_colour(size):
    grey = Image.new("RGB", size, (90, 90, 90))
    assert objects(0).plot(grey).size == size
    plotted = np.asarray(objects(4).plot(grey))
    assert plotted.shape == (*size[::-1], 3)
    assert plotted.std() > 0
    with pytest.raises(ValueError, match=r"plot\(image\)"):
        objects().plot()
