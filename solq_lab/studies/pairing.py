"""Which detection is about which true object of an image, one to one: for comparing runs object by object.

Not COCO's rule, which gives the best scored detection the first choice and counts; here the total overlap is largest.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pycocotools import mask as coco_rle
from scipy.optimize import linear_sum_assignment

from solq_lab.structures import Detections
from solq_lab.studies.rules import UNMATCHED


def pair_objects(
    found: Detections, truth: Detections, *, by: Literal["box", "mask"] = "box", least: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """The detection that is about each true object, of its class, and their IoU.

    Args:
        found: detections of one image.
        truth: its objects, as `CocoDataset.objects` gives them.
        by: what overlaps. A plain detector, which has no masks, is paired by boxes.
        least: pairs of a smaller IoU are no pairs.

    Returns:
        Rows of `found` (K,) int64, `UNMATCHED` where an object is not found, and the IoU (K,) of the pairs, 0 there.
    """
    overlap = overlaps(found, truth, by=by)
    overlap *= found.labels.numpy()[:, None] == truth.labels.numpy()[None]
    overlap[overlap < least] = 0.0
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    real = overlap[rows, columns] > 0
    partners, ious = np.full(len(truth.labels), UNMATCHED), np.zeros(len(truth.labels))
    partners[columns[real]], ious[columns[real]] = rows[real], overlap[rows[real], columns[real]]
    return partners, ious


def overlaps(found: Detections, truth: Detections, *, by: Literal["box", "mask"]) -> np.ndarray:
    """(F, K) IoU of all detections with all objects of an image; 0 by masks where a detection has none."""
    shape = len(found.labels), len(truth.labels)
    if 0 in shape or (by == "mask" and found.masks is None):
        return np.zeros(shape)
    first, second = (found.masks, truth.masks) if by == "mask" else (_as_xywh(found), _as_xywh(truth))
    return np.asarray(coco_rle.iou(first, second, [0] * shape[1])).reshape(shape)


def _as_xywh(detections: Detections) -> np.ndarray:
    boxes = detections.boxes.double().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
