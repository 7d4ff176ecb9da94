"""What can be wrong with one annotated object: its box, its mask, and whether they fit together.

What the loader refuses or leaves out is asked of the loader's own functions; the rest is what it cannot notice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pycocotools import mask as coco_rle

from solq_lab import masks
from solq_lab.data.annotations import (
    DataError,
    checked_segmentation,
    clamped_box,
    is_crowd,
    is_measure,
    name_of,
    shorten,
)
from solq_lab.data.classes import ClassMap
from solq_lab.workbench.check.findings import Finding

# Annotators draw by hand: COCO's own polygons leave their boxes by up to a pixel, and stay up to 7 pixels inside.
REACH = 1.0  # pixels that a box may reach out of its image, or a mask out of its box
LOOSE = (8.0, 0.2)  # pixels, and share of the box's side, that a box may be wider than its mask
STRAY = (16, 0.05)  # pixels, and share of the mask, that may lie farther outside the box
AREA = (64.0, 2.0)  # pixels, and ratio, that the area may be off


def check_object(
    entry: dict[str, Any], place: int, size: tuple[int, int], classes: ClassMap | None, *, with_masks: bool
) -> tuple[list[Finding], bool]:
    """All that is wrong with one entry of `annotations` whose ids are usable.

    Args:
        entry: the entry, the one at `place`.
        size: (height, width) of its image, pixels.
        classes: classes that can be learnt; None where they cannot be told.
        with_masks: look at the mask too.

    Returns:
        The findings, and whether the object is one to learn: no crowd, not refused, not left out.
    """
    name = name_of(entry, place)
    found: list[Finding] = []
    crowd = False

    def add(rule: str, message: str, weight: float = 0.0) -> None:
        rule = "crowd" if crowd else rule
        found.append(Finding(rule, f"{name}: {message.removeprefix(f'{name}: ')}", None, None, entry["id"], weight))

    try:
        crowd = is_crowd(entry, name)
    except DataError as error:
        add("object-entry", str(error))
        return found, False
    try:
        box = clamped_box(entry.get("bbox"), *size, name)
    except DataError as error:
        add("box", str(error))
        return found, False
    for rule, message, weight in _box_faults(entry["bbox"], box, size):
        add(rule, message, weight)
    if not (box[2] > box[0] and box[3] > box[1]):
        return found, False
    learnt = True
    if with_masks:
        faults, learnt = _mask_faults(entry, size, name)
        for rule, message, weight in faults:
            add(rule, message, weight)
    if learnt and classes is not None:
        try:
            classes.channel_of(entry["category_id"])
        except DataError as error:
            add("unknown-category", str(error))
            learnt = False
    return found, learnt and not crowd


Fault = tuple[str, str, float]  # rule, message, weight


def _box_faults(raw: list[float], box: tuple[float, float, float, float], size: tuple[int, int]) -> Iterator[Fault]:
    """What is wrong with a finite COCO box whose part inside the image is `box`, xyxy."""
    x, y, w, h = raw
    height, width = size
    shown = f"bbox {raw} in an image of {width} x {height} pixels (width x height)"
    if w > 0 and h > 0 and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
        yield "box-outside", f"{shown} lies outside", max(x - width, y - height, -x - w, -y - h)
    elif not (box[2] > box[0] and box[3] > box[1]):
        yield "box-without-area", f"{shown} has no area", 0.0
    else:
        beyond = max(-x, -y, x + w - width, y + h - height)
        if beyond > REACH:
            yield "box-beyond-image", f"{shown} reaches {beyond:.1f} pixels out of it", beyond


def read_mask(entry: dict[str, Any], size: tuple[int, int], name: str) -> dict | None:
    """The compressed RLE of an object's mask, or None where the loader would leave the object out.

    Raises:
        DataError: the loader would refuse it.
    """
    segmentation = checked_segmentation(entry.get("segmentation"), size, name)
    return masks.segmentation_to_rle(segmentation, size) if segmentation else None


def _mask_faults(entry: dict[str, Any], size: tuple[int, int], name: str) -> tuple[list[Fault], bool]:
    """What is wrong with the mask of an object whose box has an area, and whether the loader keeps the object."""
    try:
        rle = read_mask(entry, size, name)
    except DataError as error:
        return [("mask", str(error), 0.0)], False
    if rle is None:
        return [("mask-without-area", "no polygon has three points", 0.0)], False
    segmentation = entry["segmentation"]
    faults = [*_shape_faults(entry["bbox"], rle, size), *_area_faults(entry.get("area"), int(coco_rle.area(rle)))]
    if isinstance(segmentation, list) and any(len(polygon) < 6 for polygon in segmentation):
        faults.append(("short-polygon", "one of its polygons has fewer than three points", 0.0))
    return faults, True


def _shape_faults(raw: list[float], rle: dict, size: tuple[int, int]) -> Iterator[Fault]:
    """Whether a mask and a COCO box (x, y, w, h) are about the same place."""
    pixels = int(coco_rle.area(rle))
    if not pixels:
        yield "mask-empty", f"the mask has no pixel in an image of {size[1]} x {size[0]}", 0.0
        return
    x, y, w, h = raw
    tight_x, tight_y, tight_w, tight_h = coco_rle.toBbox(rle).tolist()
    inwards = (tight_x - x, tight_y - y, x + w - tight_x - tight_w, y + h - tight_y - tight_h)
    if min(inwards) < -REACH:
        stray = pixels - _pixels_inside(rle, (x - REACH, y - REACH, x + w + REACH, y + h + REACH), size)
        if stray > max(STRAY[0], STRAY[1] * pixels):
            yield "mask-outside-box", f"{stray} of the mask's {pixels} pixels lie outside bbox {raw}", stray / pixels
    sides = (w, h, w, h)
    # what of a box lies outside the image cannot be masked, so only edges inside it are compared
    inside = (x >= 0, y >= 0, x + w <= size[1], y + h <= size[0])
    loose = [gap for gap, side, seen in zip(inwards, sides, inside, strict=True) if seen and gap > _slack(side)]
    if loose:
        tight = [tight_x, tight_y, tight_w, tight_h]
        yield "mask-smaller-than-box", f"the mask fills {tight} of bbox {raw}", 1 - tight_w * tight_h / (w * h)


def _slack(side: float) -> float:
    return max(LOOSE[0], LOOSE[1] * side)


def _pixels_inside(rle: dict, window: tuple[float, float, float, float], size: tuple[int, int]) -> int:
    """How many pixels of a mask touch a window (x0, y0, x1, y1)."""
    left, top = max(math.floor(window[0]), 0), max(math.floor(window[1]), 0)
    return int(coco_rle.decode(rle)[top : math.ceil(window[3]), left : math.ceil(window[2])].sum())


def _area_faults(area: Any, pixels: int) -> Iterator[Fault]:
    """Whether the given area, by which evaluation tells small from large, is that of the mask; none is allowed."""
    if area is None:
        return
    if not is_measure(area):  # a whole number of JSON's may even be too large for a float
        yield "area", f"area {shorten(area)} is no finite number of pixels", math.inf
    elif abs(area - pixels) > AREA[0] and not pixels / AREA[1] <= area <= pixels * AREA[1]:
        yield "area", f"area {area} of a mask of {pixels} pixels", abs(area - pixels)
