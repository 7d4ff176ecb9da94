"""Whether all boxes of a data set are something else than [x, y, width, height], as outlines and images tell."""

from __future__ import annotations

import numpy as np

REACH = 1.0  # pixels that a drawn box may reach out of its image
FITTING = 0.9  # IoU with the box around its outline, from which a box is read right
SLACK = 0.01  # share of a side that a box in shares may leave its image by, for roundings
FEW, ENOUGH, ALMOST_ALL = 3, 10, 0.98  # boxes that are evidence, and the share of them that has to agree
CORNERS, SWAPPED, SHARES = "corners x0, y0, x1, y1", "y, x, height, width", "shares of their image's sides"


def other_reading(
    boxes: np.ndarray, image_rows: np.ndarray, sizes: np.ndarray, outlines: np.ndarray | None = None
) -> str:
    """What almost all boxes, or outlines, must be where they cannot be x, y, width, height; else empty.

    Args:
        boxes: (A, 4) as annotated, pixels.
        image_rows: (A,) the image of each.
        sizes: (A, 2) height and width of these images, pixels.
        outlines: (A, 4) x0, y0, x1, y1 around their masks, where there are masks.
    """
    (a, b, c, d), usual = boxes.T, corners_of(boxes)
    for corners in (usual,) if outlines is None else (usual, outlines):
        if len(corners) >= ENOUGH and (reach(corners, np.ones(2)) <= SLACK).mean() >= ALMOST_ALL:
            return SHARES
    beyond = reach(usual, sizes) > REACH
    before = np.zeros(len(boxes)) if outlines is None else iou(usual, outlines)
    readings = {
        CORNERS: boxes,
        SWAPPED: usual[:, [1, 0, 3, 2]],
        "corners y0, x0, y1, x1": boxes[:, [1, 0, 3, 2]],
        "centre x, centre y, width, height": usual - np.tile(boxes[:, 2:] / 2, 2),
    }
    if outlines is not None and _explains(outlines[:, [1, 0, 3, 2]], reach(outlines, sizes) > REACH, sizes):
        return SWAPPED
    for name, corners in readings.items():
        if _explains(corners, beyond, sizes):
            return name
        if outlines is not None:
            after = iou(corners, outlines)
            telling = np.abs(after - before) > 1 - FITTING
            if telling.sum() >= FEW and (after > np.maximum(before, FITTING))[telling].mean() >= ALMOST_ALL:
                return name

    # Of several objects in an image, some lie farther right than they are wide, or farther down than they are high.
    telling = (np.maximum(a, b) > REACH) & (np.bincount(image_rows, minlength=1)[image_rows] > 1)
    low = outlines is None and telling.sum() >= ENOUGH and ((c > a) & (d > b))[telling].mean() >= ALMOST_ALL
    return CORNERS if low else ""


def _explains(corners: np.ndarray, beyond: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes that leave their images lie inside with all the others, if these are their corners."""
    inside = (reach(corners, sizes) <= REACH) & (corners[:, 2:] > corners[:, :2]).all(axis=1)
    return bool(len(inside) >= ENOUGH and beyond.sum() >= FEW and inside.mean() >= ALMOST_ALL)


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """(A, 4) x0, y0, x1, y1 of x, y, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def reach(corners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(A,) how far corners (A, 4) lie outside images of sizes (A, 2) or (2,), height and width; negative inside."""
    return np.maximum(-corners[:, :2], corners[:, 2:] - sizes[..., ::-1]).max(axis=1)


def iou(corners: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(A,) IoU of boxes with others (A, 4) x0, y0, x1, y1, row by row; 0 where both have no area."""
    low, high = np.maximum(corners, others)[:, :2], np.minimum(corners, others)[:, 2:]
    common = (high - low).clip(0).prod(axis=1)
    both = sum((some[:, 2:] - some[:, :2]).prod(axis=1) for some in (corners, others)) - common
    return np.divide(common, both, out=np.zeros(len(both)), where=both > 0)
