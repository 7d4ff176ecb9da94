"""How far the detections of two versions of one model differ: an exported file, or weights in half precision."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from solq_lab.masks import rle_iou
from solq_lab.structures import Detections

UNMATCHED_COST = 10.0  # of a pair beyond the tolerance; larger than any cost within it


class Tolerance(NamedTuple):
    """Largest differences of two detections of one object."""

    score: float  # of the scores
    box: float  # of a box edge, in the unit of the comparison
    mask_iou: float  # least mean IoU of the masks


class Difference(NamedTuple):
    """The difference of two versions of a model on some images."""

    # images, detections: number of images, and of detections of the first version
    images: int
    detections: int
    matched: int  # detections with a partner: same class, score and box within the tolerance
    # detections without a partner whose score is that of the last one kept; which of equals is kept is chance
    excused: int
    score: float  # largest difference of matched scores
    box: float  # largest difference of matched box edges, in the unit of the comparison
    # mask_iou, least_mask_iou: mean and smallest IoU of matched masks, pasted into the image; None without masks
    mask_iou: float | None
    least_mask_iou: float | None
    unit: str  # of the comparison, "of the image" or "pixels"

    def agrees(self, tolerance: Tolerance) -> bool:
        """Whether every detection has its partner, and the masks are the same but for single pixels."""
        same_masks = self.mask_iou is None or self.mask_iou >= tolerance.mask_iou
        return self.matched + self.excused == self.detections and same_masks

    def __str__(self) -> str:
        masks = ""
        if self.mask_iou is not None:
            masks = f", mask IoU {self.mask_iou:.5f} on average and {self.least_mask_iou:.5f} at least"
        return (
            f"{self.matched} of {self.detections} detections in {self.images} images matched ({self.excused} more "
            f"at the cut-off); scores within {self.score:.1e}, boxes within {self.box:.1e} {self.unit}{masks}"
        )


def compare_detections(
    expected: Sequence[Detections],
    found: Sequence[Detections],
    sizes: Sequence[tuple[float, float]] | None,
    tolerance: Tolerance,
) -> Difference:
    """The difference of the detections in images from those expected there.

    Args:
        expected, found: of the same images, in the same order.
        sizes: (height, width) of each image, for boxes as shares of it; None: in pixels.
        tolerance: within which two detections match.
    """
    matched = excused = detections = 0
    scores, boxes, ious = [0.0], [0.0], []
    for ours, theirs, (height, width) in zip(expected, found, sizes or [(1, 1)] * len(found), strict=True):
        unit = torch.tensor([width, height, width, height])
        score = (ours.scores[:, None] - theirs.scores).abs()  # (K, K')
        box = ((ours.boxes / unit)[:, None] - theirs.boxes / unit).abs().amax(-1)
        same = (ours.labels[:, None] == theirs.labels) & (score <= tolerance.score) & (box <= tolerance.box)

        # The best one-to-one partners; queries need not agree, near ties of two-stage proposals change their order.
        cost = torch.where(same, score / tolerance.score + box / tolerance.box, UNMATCHED_COST)
        rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(cost.numpy()))
        paired = same[rows, columns]
        rows, columns = rows[paired], columns[paired]

        alone = np.setdiff1d(np.arange(len(ours.scores)), rows.numpy())
        detections, matched = detections + len(ours.scores), matched + len(rows)
        if len(alone):
            excused += int((ours.scores[alone] <= ours.scores[-1] + tolerance.score).sum())
        scores += score[rows, columns].tolist()
        boxes += box[rows, columns].tolist()
        if ours.masks is not None and theirs.masks is not None:
            ious += rle_iou([ours.masks[row] for row in rows], [theirs.masks[column] for column in columns]).tolist()

    mean, least = (float(np.mean(ious)), min(ious)) if ious else (None, None)
    named = "pixels" if sizes is None else "of the image"
    return Difference(len(expected), detections, matched, excused, max(scores), max(boxes), mean, least, named)
