"""The rules about one object, and those about the images and classes of a split or of two.

What the loader rejects or leaves out is decided by the loader's own functions; the rest is what it cannot notice.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_rle

from solq_lab import masks
from solq_lab.data.annotations import (
    DataError,
    checked_segmentation,
    clamped_box,
    has_segmentation,
    is_crowd,
    is_measure,
    name_of,
    shorten,
    with_box,
)
from solq_lab.data.classes import ClassMap
from solq_lab.data.ground_truth import crowded_classes
from solq_lab.data.orientation import Reading
from solq_lab.data.readings import REACH, reach
from solq_lab.workbench.check.duplicates import lookalikes
from solq_lab.workbench.check.findings import Finding
from solq_lab.workbench.check.report import CheckedSplit

# Annotators draw by hand: COCO's own polygons leave their boxes by up to REACH, and stay up to 7 pixels inside.
LOOSE = (8.0, 0.2)  # pixels, and share of the box's side, that a box may be wider than its mask
STRAY = (16, 0.05)  # pixels, and share of the mask, that may lie farther outside the box
SMALL = 8.0  # pixels of an object's side, where the finest feature map has one cell
SEEN = 16.0  # pixels that most objects should have
FEW, FEW_OF_LARGEST = 10, 0.01  # objects of a class; share of the largest one's
SIZES: dict[Reading, str] = {
    "stored": "that of the stored image",
    "upright": "that of the upright image",
    "undecided": "the same either way",
}
AREA = (64.0, 2.0)  # pixels, and ratio, that the area may be off


def check_object(
    entry: dict[str, Any], place: int, size: tuple[int, int], classes: ClassMap | None, *, with_masks: bool
) -> tuple[list[Finding], float]:
    """All that is wrong with one entry of `annotations` whose ids are usable.

    Args:
        entry: the entry, the one at `place`.
        size: (height, width) of its image, pixels.
        classes: classes that can be learnt; None where the categories cannot be used.
        with_masks: look at the mask too.

    Returns:
        The findings, and the square root of the box's area in pixels, 0 where the object is not one to learn: a crowd,
        rejected, or left out.
    """
    name = name_of(entry, place)
    faults: list[Fault] = []
    crowd, side, reading = False, 0.0, "object-entry"

    # In the loader's order; what it rejects ends the check of the object.
    try:
        crowd = is_crowd(entry, name)
        reading = "box"
        entry = with_box(entry, size, name)
        x0, y0, x1, y1 = box = clamped_box(entry.get("bbox"), size, name)
        faults += _box_faults(entry["bbox"], box, size)
        learnt = x1 > x0 and y1 > y0
        if learnt and with_masks and not has_segmentation(entry):
            learnt = False
            faults.append(("mask-missing", "no segmentation", 0.0))
        elif learnt and with_masks:
            reading = "mask"
            rle = read_mask(entry, size, name)
            faults += _mask_faults(entry, rle, size)
            learnt = rle is not None
        if learnt and classes is not None:
            reading = "unknown-category"
            classes.channel_of(entry["category_id"])
        if learnt and not crowd:
            side = math.sqrt((x1 - x0) * (y1 - y0))
    except DataError as error:
        faults.append((reading, str(error).removeprefix(f"{name}: "), 0.0))
    found = [
        Finding("crowd" if crowd else rule, f"{name}: {message}", annotation_id=entry["id"], weight=weight)
        for rule, message, weight in faults
    ]
    return found, side


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


def _mask_faults(entry: dict[str, Any], rle: dict | None, size: tuple[int, int]) -> Iterator[Fault]:
    """What is wrong with the mask of an object whose COCO box (x, y, w, h) has an area; None: it is left out."""
    if rle is None:
        yield "mask-without-area", "no polygon has three points", 0.0
        return

    (x, y, w, h), pixels = entry["bbox"], int(coco_rle.area(rle))
    left, top, width, height = tight = coco_rle.toBbox(rle).tolist()
    if not pixels:
        yield "mask-empty", f"the mask has no pixel in an image of {size[1]} x {size[0]}", 0.0
    else:
        gaps = (left - x, top - y, x + w - left - width, y + h - top - height)  # negative: the mask leaves the box
        if min(gaps) < -REACH:
            x0, y0 = max(math.floor(x - REACH), 0), max(math.floor(y - REACH), 0)
            inside = coco_rle.decode(rle)[y0 : math.ceil(y + h + REACH), x0 : math.ceil(x + w + REACH)]
            stray = pixels - int(inside.sum())
            if stray > max(STRAY[0], STRAY[1] * pixels):
                message = f"{stray} of the mask's {pixels} pixels lie outside bbox {entry['bbox']}"
                yield "mask-outside-box", message, stray / pixels

        # What of a box lies outside the image cannot be masked, so only edges inside it are compared.
        edges = zip(gaps, (w, h, w, h), (x >= 0, y >= 0, x + w <= size[1], y + h <= size[0]), strict=True)
        if any(inside and gap > max(LOOSE[0], LOOSE[1] * side) for gap, side, inside in edges):
            message = f"the mask fills {tight} of bbox {entry['bbox']}"
            yield "mask-smaller-than-box", message, 1 - width / w * (height / h)

    # Evaluation tells small from large by the annotated area; none is allowed.
    area = entry.get("area")
    if area is not None and not is_measure(area):  # JSON allows whole numbers that are too large for a float
        yield "area", f"area {shorten(area)} is no finite number of pixels", math.inf
    elif area is not None and abs(area - pixels) > AREA[0] and not pixels / AREA[1] <= area <= pixels * AREA[1]:
        yield "area", f"area {area} of a mask of {pixels} pixels", abs(area - pixels)

    segmentation = entry["segmentation"]
    if isinstance(segmentation, list):
        if any(len(polygon) < 6 for polygon in segmentation):
            yield "short-polygon", "one of its polygons has fewer than three points", 0.0
        points = np.reshape([number for polygon in segmentation if len(polygon) >= 6 for number in polygon], (-1, 2))
        corners = np.array([[*points.min(axis=0), *points.max(axis=0)], [x, y, x + w, y + h]])
        outside, of_box = reach(corners, np.array(size)).tolist()
        if pixels and outside > REACH >= of_box:  # others have been found already
            yield "box-beyond-image", f"its outline reaches {outside:.1f} pixels out of the image", outside


def read_mask(entry: dict[str, Any], size: tuple[int, int], name: str) -> dict | None:
    """The compressed RLE of an object's mask; None where the loader leaves the object out.

    Raises:
        DataError: the loader rejects it.
    """
    segmentation = checked_segmentation(entry.get("segmentation"), size, name)
    return masks.segmentation_to_rle(segmentation, size) if segmentation else None


def faults_of_split(checked: CheckedSplit) -> Iterator[Finding]:
    """Equal files, and what the counts of a split reveal; a test split may have no objects."""
    first: dict[bytes, str] = {}
    for path, image in checked.by_path.items():
        before = first.setdefault(image.digest, path) if image.digest else path
        if before != path:
            message = f"{shorten(before)} and {shorten(path)} have the same bytes"
            yield Finding("image-twice", message, path, image.image_id)

    summary, entries, name = checked.summary, checked.count, checked.split.name
    objects, crowds, per_class = summary["objects"], summary["crowds"], summary["per_class"]
    if name == "val" and not entries:
        yield Finding("nothing-to-measure", "no objects, so that no evaluation can find the best weights")
    elif (entries or name == "train") and not objects:
        message = f"none of the {entries} objects can be learnt, {crowds} are crowds"
        yield Finding("nothing-to-learn", f"{message}; see the findings of its objects")
    else:
        of_class = Counter(category for image in checked.images for category in image.crowds)
        all_of = of_class + Counter(category for image in checked.images for category, _ in image.objects)
        for category in crowded_classes(of_class, all_of):
            count = f"{of_class[category]} of {all_of[category]} objects of category {checked.names.get(category)!r}"
            yield Finding("many-crowds", f"{count} are marked as crowds (iscrowd 1) and not learnt")

    most = max(per_class.values(), default=0)
    for name, count in per_class.items():
        if not count:
            yield Finding("class-without-objects", f"category {shorten(name)}")
        elif count < FEW or FEW_OF_LARGEST * most > count:
            message = f"category {shorten(name)}: {count} objects, the largest has {most}"
            yield Finding("class-few-objects", message, weight=-count)


def queries_for(most: int) -> int:
    """model.queries for at most so many objects in an image: half as many to spare, in tens, at least 20."""
    return max(10 * math.ceil(1.5 * most / 10), 20)


def what_it_asks_for(checked: CheckedSplit) -> Iterator[str]:
    """Settings that a split asks for."""
    sides, most = checked.sides(), checked.summary["most"]
    if not len(sides):
        return
    yield f"  model.queries={queries_for(most)}: at most {most} objects in an image, and half as many to spare"

    # The short side at which 9 of 10 objects are wide enough; an image larger than the file shows nothing more.
    size = np.median([image.size for image in checked.images], axis=0).tolist()
    wanted = min(size) * SEEN / max(float(np.quantile(sides, 0.1)), 1.0)
    short = int(min(max(32 * math.ceil(wanted / 32), 128), max(32 * round(min(size) / 32), 128)))
    long = 32 * math.ceil(short * max(size) / min(size) / 32)
    seen = 100 * float((sides * short / min(size) >= SEEN).mean())
    yield f"  data.test_scale={short} data.max_size={long}: {seen:.0f} % of the objects are {SEEN:.0f} pixels or wider"


def turned_images(splits: Sequence[CheckedSplit]) -> Iterator[tuple[str, Finding]]:
    """Images with an EXIF orientation, with the names of their splits.

    What the size of one says holds for all splits that do not say it themselves, in experiment or annotation file.
    """
    unsaid = [checked for checked in splits if checked.split.orientation is None]
    evidence = {image.reading for checked in unsaid for image in checked.images} - {None}
    for checked in splits:
        said = checked.split.orientation is not None
        for path, image in checked.by_path.items():
            if image.reading is None:
                continue
            rule = "orientation-mixed" if not said and {"stored", "upright"} <= evidence else "orientation"
            if not said and evidence == {"undecided"}:
                rule = "orientation-undecided"
            where = f"image id {image.image_id}: {shorten(path)}"
            message = f"{where}: turned by EXIF; its annotated size is {SIZES[image.reading]}"
            yield checked.split.name, Finding(rule, message, path, image.image_id)


def faults_between(train: CheckedSplit, val: CheckedSplit) -> Iterator[Finding]:
    """Images and categories that do not fit together.

    Images are equal by their bytes where they were read, otherwise by name.
    """
    known, others = train.by_path, val.by_path
    by_digest = {image.digest: path for path, image in known.items() if image.digest}
    for path, image in others.items():
        if image.digest in by_digest:
            message = f"{shorten(path)} of val has the bytes of {shorten(by_digest[image.digest])} of train"
            yield Finding("image-in-both", message, path)
        elif path in known:
            compared = "other bytes" if image.digest and known[path].digest else "the bytes were not compared"
            yield Finding("name-in-both", f"{shorten(path)}: {compared}", path)

    looks = ({path: image.look for path, image in some.items()} for some in (known, others))
    for path, other in lookalikes(*looks):
        if others[path].digest not in by_digest:
            message = f"{shorten(path)} of val looks like {shorten(other)} of train"
            yield Finding("lookalike-in-both", message, path)

    for category in sorted(train.names.keys() & val.names.keys()):
        here, there = train.names[category], val.names[category]
        if here != there:
            message = f"category id {category}: {shorten(here)} in train, {shorten(there)} in val"
            yield Finding("categories-swapped" if there in train.names.values() else "categories-differ", message)

    learnt = train.summary["per_class"]
    for name, count in val.summary["per_class"].items():
        if count and not learnt.get(name):
            yield Finding("class-not-trained", f"{shorten(name)}: {count} objects in val, none in train", weight=count)
