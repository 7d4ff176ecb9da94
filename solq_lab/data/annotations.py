"""COCO annotation files: reading them, and checking their entries one by one."""

import json
import logging
import math
import os
import re
from array import array
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pycocotools import mask as coco_rle

from solq_lab import masks
from solq_lab.data.entries import Entries, parse_document
from solq_lab.errors import FIRST_FEW, DataError, first_few, shorten
from solq_lab.files import require_file

__all__ = ["FIRST_FEW", "DataError", "first_few", "shorten"]

logger = logging.getLogger(__name__)

SIDES = ("height", "width")
MAX_SIDE = 2**16 - 1  # pixels: of a JPEG; and RLEs count the pixels of an image in 32 bits


def read_annotations(path: Path) -> dict[str, Any]:
    """The document in a COCO annotation file; its images and annotations are `Entries`, lists that stay text.

    Raises:
        DataError: no such file, not JSON, or not a mapping with lists of images, annotations and categories.
    """
    require_file(path, "annotation file")
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file; check data.root and the names in the data section") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None

    if content.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: packed by gzip; unpack it, and name the unpacked file")
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")  # as `json.loads` does
    except ValueError as error:
        raise _no_json(path, error) from None
    del content

    document = parse_document(text, ("images", "annotations"), make_error=partial(_no_json, path))
    found = (
        ", ".join(map(shorten, list(document)[:8])) if isinstance(document, dict) else f"a {type(document).__name__}"
    )
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list | Entries):
            raise DataError(
                f"{path}: not a COCO annotation file: no list {key!r} (found {found or 'nothing'}); "
                "needed are the lists 'images', 'annotations' and 'categories'"
            )
    return _without_dummy(document, path)


def _without_dummy(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The document without the category that Roboflow writes before the real ones: id 0, above all, of no object."""
    first = next(iter(document["categories"]), None)
    if not (isinstance(first, dict) and first.get("id") == 0 and first.get("supercategory") == "none"):
        return document
    others = [category for category in document["categories"] if category is not first]
    below = [category for category in others if isinstance(category, dict) and category.get("supercategory") != "none"]
    used = (isinstance(entry, dict) and entry.get("category_id") == 0 for entry in document["annotations"])
    if not below or any(used):
        return document
    logger.info("%s: category 0, %s, has no objects and is left out, as a dummy of Roboflow's", path, first.get("name"))
    return document | {"categories": others}


def _no_json(path: Path, error: Exception) -> DataError:
    """The error of a file that json cannot read: no JSON, no UTF-8, thousands of digits, or thousands of brackets."""
    return DataError(f"{path}: not JSON ({error}); an annotation file in COCO format is needed")


def check_image_entry(entry: Any, place: int, path: Path) -> None:
    """Check the entry at `place` of `images`.

    Raises:
        DataError: no id, file_name, height or width, or a file name that leaves the image folder.
    """
    if not isinstance(entry, dict) or not is_image_entry(entry):
        raise DataError(
            f"{path}: images[{place}]: found {shorten(entry)}; needed are a whole number 'id' below 2^53, a text "
            f"'file_name' and positive whole numbers 'height' and 'width' up to {MAX_SIDE}"
            f"{conversion_of(entry, 'id', *SIDES)}"
        )
    if os.path.isabs(entry["file_name"]) or os.path.normpath(entry["file_name"]).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{path}: image id {entry['id']}: file_name {shorten(entry['file_name'])} leaves the image folder; "
            "allowed are names relative to it, without '..'"
        )


def is_image_entry(entry: dict[str, Any]) -> bool:
    """Whether an entry of `images` has all that it needs, of the right kind."""
    sides = [entry.get(key) for key in SIDES]
    return (
        is_id(entry.get("id"))
        and abs(entry["id"]) < 2**53  # the evaluation holds it as a float
        and isinstance(entry.get("file_name"), str)
        and all(is_id(side) and 0 < side <= MAX_SIDE for side in sides)
    )


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number of 64 bits; JSON's true and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def conversion_of(entry: Any, *keys: str) -> str:
    """How to write the first of the values that is a whole number as a text or decimal; empty where none is."""
    for key in keys if isinstance(entry, dict) else ():
        value = entry.get(key)
        if isinstance(value, str | float) and re.fullmatch(r"-?\d{1,18}(\.0+)?", str(value)):
            kind = "a text" if isinstance(value, str) else "a decimal number"
            return f"; {key} {value!r} is {kind}: write {int(float(value))}, in Python int({value!r}), in all entries"
    return ""


def is_measure(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number that can be a length or an area, in pixels; true and "1" are none."""
    return type(value) in (int, float) and abs(value) <= MAX_SIDE**3  # false for nan


def name_of(entry: Any, place: int) -> str:
    """Name of the entry at `place` of `annotations` in messages."""
    if isinstance(entry, dict) and "id" in entry:
        return f"annotation id {shorten(entry['id'])}"
    return f"annotations[{place}]"


def owner_of(entry: Any, rows: dict[int, int], name: str) -> int:
    """The row of the image that an entry of `annotations` belongs to.

    Raises:
        DataError: an id is missing or no whole number, or there is no such image.
    """
    if not isinstance(entry, dict) or not all(is_id(entry.get(key)) for key in ("id", "category_id")):
        conversion = conversion_of(entry, "id", "category_id")
        raise DataError(f"{name}: found {shorten(entry)}; needed are whole numbers 'id' and 'category_id'{conversion}")
    image_id = entry.get("image_id")
    owner = rows.get(image_id) if is_id(image_id) else None
    if owner is None:
        known = f"is not among the {len(rows)} ids in 'images'{conversion_of(entry, 'image_id')}"
        raise DataError(f"{name}: image_id {shorten(image_id)} {known}")
    return owner


def is_crowd(entry: dict[str, Any], name: str) -> bool:
    """Whether an entry of `annotations` marks a region of many objects.

    Raises:
        DataError: `iscrowd` is neither 0 nor 1; the text "0" would count as true.
    """
    mark = entry.get("iscrowd", 0)
    if not isinstance(mark, int) or mark not in (0, 1):
        cure = "; write 0, or leave it out" if mark is None else conversion_of(entry, "iscrowd")
        raise DataError(f"{name}: iscrowd {shorten(mark)}; allowed are 0 and 1{cure}")
    return bool(mark)


def clamped_box(box: Any, size: tuple[int, int], name: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) of the part of a COCO box (x, y, w, h) inside an image of `size` (height, width).

    Raises:
        DataError: not four finite numbers.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
        raise DataError(f"{name}: bbox {shorten(box)}; needed are four numbers x, y, width, height")
    x, y, w, h = box
    if not all(map(is_measure, box)):
        raise DataError(
            f"{name}: bbox {shorten(box)} has a value that is not finite, or larger than any image; correct or "
            "remove the object"
        )
    (height, width), x1, y1 = size, x + max(w, 0), y + max(h, 0)
    return min(max(x, 0), width), min(max(y, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)


def with_box(entry: dict[str, Any], size: tuple[int, int], name: str) -> dict[str, Any]:
    """An entry of `annotations` with the `bbox` of its mask where it has a mask and no box.

    Raises:
        DataError: as `checked_segmentation`.
    """
    if entry.get("bbox") not in (None, []) or not has_segmentation(entry):
        return entry
    rle = masks.segmentation_to_rle(checked_segmentation(entry["segmentation"], size, name), size)
    return entry | {"bbox": coco_rle.toBbox(rle).tolist()}


def checked_area(entry: dict[str, Any], name: str) -> float:
    """The `area` of an entry of `annotations`, pixels; NaN where it has none.

    Raises:
        DataError: no finite number.
    """
    area = entry.get("area")
    if area is None:
        return math.nan
    if not is_measure(area):
        raise DataError(f"{name}: area {shorten(area)}; needed is a finite number of pixels, or none")
    return float(area)


def has_segmentation(entry: dict[str, Any]) -> bool:
    """Whether an entry of `annotations` has more than a box."""
    return entry.get("segmentation") not in (None, [], {})


def checked_segmentation(segmentation: Any, size: tuple[int, int], name: str) -> list[array] | dict:
    """The polygons of three corners and more, possibly none, or the compressed RLE of an object.

    Raises:
        DataError: neither polygons near an image of `size` (height, width) nor an RLE of it.
    """
    if isinstance(segmentation, dict):
        return checked_rle(segmentation, size, name)
    if not isinstance(segmentation, list) or not segmentation or not all(isinstance(p, list) for p in segmentation):
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)}; needed is a list of polygons [[x0, y0, x1, y1, ...], ...] "
            "or an RLE; a data set without masks trains a plain detector (codec.kind=none)"
        )
    if len(segmentation) > 2 and all(len(point) == 2 for point in segmentation):
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)} is a list of points; needed is one flat list "
            "[[x0, y0, x1, y1, ...]] for each polygon"
        )
    try:
        polygons = [array("d", polygon) for polygon in segmentation]
    except (TypeError, OverflowError):
        raise DataError(f"{name}: segmentation {shorten(segmentation)}; polygons are made of numbers") from None
    for polygon in polygons:
        if len(polygon) % 2:
            raise DataError(f"{name}: a polygon has {len(polygon)} numbers; x and y come in pairs")
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]

    # Rasterising walks along every edge, pixel by pixel: a wild coordinate would take all memory, or for ever.
    longer = max(size)
    for polygon in polygons:
        if not (min(polygon) >= -longer and max(polygon) <= 2 * longer and math.isfinite(sum(polygon))):  # sum: NaN
            raise DataError(
                f"{name}: a polygon has a coordinate that is no finite number, or lies farther outside its image of "
                f"{list(size)} (height, width) than this is long; correct or remove the object"
            )
    return polygons


def checked_rle(segmentation: dict, size: tuple[int, int], name: str) -> dict:
    """The compressed RLE of a compressed or uncompressed one.

    Raises:
        DataError: not runs that cover an image of `size` (height, width); C code reads them unchecked.
    """
    counts, rle_size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(counts, str | bytes | list) or not isinstance(rle_size, list) or tuple(rle_size) != size:
        raise DataError(
            f"{name}: segmentation of the size {shorten(rle_size)}, keys {shorten(list(segmentation))}; an RLE needs "
            f"'counts' and the size [height, width] of its image, here {list(size)}"
        )

    try:
        runs = np.array(counts) if isinstance(counts, list) else masks.runs_of_rle(counts)
    except ValueError as error:
        raise DataError(f"{name}: segmentation {shorten(segmentation)}: not an RLE ({error})") from None
    if runs.dtype.kind != "i" or runs.ndim != 1 or (runs < 0).any():
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)}: not an RLE (counts are whole numbers from 0 on)"
        )
    covered = sum(runs.tolist())  # of Python, which does not overflow
    if covered != size[0] * size[1]:
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)}: the RLE counts {covered} pixels, its image has "
            f"{size[0]} x {size[1]} = {size[0] * size[1]}; correct or remove the object"
        )
    return masks.segmentation_to_rle({"size": list(size), "counts": counts}, size)
