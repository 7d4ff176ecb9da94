"""One-to-one pairs of detections and ground-truth objects of an image, to compare runs object by object.

Unlike COCO's matching, which goes by falling score, this maximises the total overlap.
"""

from typing import Literal

import numpy as np
from pycocotools import mask as coco_rle
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from solq_lab.structures import Detections
from solq_lab.studies.rules import UNMATCHED

MIN_IOU = 0.5  # of a pair


def pair_objects(detections: Detections, ground_truth: Detections) -> tuple[np.ndarray, np.ndarray]:
    """The detection, of its class, of each ground-truth object (`CocoDataset.objects`) of an image, and their box IoUs.

    Returns:
        Rows of `detections` (K,) int64, `UNMATCHED` where an object is not found; and the IoU (K,) of the pairs, 0
        there.
    """
    overlap = overlaps(detections, ground_truth, by="box")
    overlap *= (detections.labels[:, None] == ground_truth.labels).numpy()
    overlap[overlap < MIN_IOU] = 0.0

    rows, columns = linear_sum_assignment(overlap, maximize=True)
    real = overlap[rows, columns] > 0  # the assignment also pairs what does not overlap
    partners, ious = np.full(len(ground_truth), UNMATCHED), np.zeros(len(ground_truth))
    partners[columns[real]], ious[columns[real]] = rows[real], overlap[rows[real], columns[real]]
    return partners, ious


def overlaps(detections: Detections, ground_truth: Detections, *, by: Literal["box", "mask"]) -> np.ndarray:
    """(F, K) IoU of all detections with all objects of an image; 0 by masks where a detection has none."""
    if by == "box":
        return box_iou(detections.boxes.double(), ground_truth.boxes.double()).numpy()
    shape = len(detections), len(ground_truth)
    if 0 in shape or detections.masks is None:
        return np.zeros(shape)
    return np.asarray(coco_rle.iou(detections.masks, ground_truth.masks, [0] * shape[1])).reshape(shape)
