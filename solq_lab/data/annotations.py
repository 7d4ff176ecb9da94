"""COCO annotation files: read, checked once, and kept as a few flat arrays.

COCO's 860 000 objects as Python lists cost gigabytes, and every forked loader process would copy them by merely
counting references. Flat arrays are shared instead.
"""

from __future__ import annotations

import json
import logging
import os
import reprlib
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solq_lab import masks
from solq_lab.data.entries import Entries, parse_document
from solq_lab.errors import UserError

logger = logging.getLogger(__name__)

FIRST_FEW = 5  # ids named in a message that concerns many
MAX_SIDE = 2**16 - 1  # pixels: of a JPEG; and RLEs count the pixels of an image in 32 bits


class DataError(UserError):
    """A data set that cannot be used: the message names the file, the id, what was found, what is allowed, the cure."""


class PackedSegmentations:
    """Segmentations of many objects: polygon coordinates end to end in one array, the RLEs beside it.

    Item k is what COCO wrote for object k: a list of polygons (each a float64 array x0, y0, x1, y1, ...), or a
    compressed RLE.
    """

    def __init__(self) -> None:
        self._coordinates: array | np.ndarray = array("d")
        self._polygon_ends: array | np.ndarray = array("q")  # per polygon, where it ends in `_coordinates`
        self._object_ends: array | np.ndarray = array("q")  # per object, where it ends in `_polygon_ends`
        self._rles: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._object_ends)

    def __getitem__(self, row: int) -> list[np.ndarray] | dict:
        if row in self._rles:
            return self._rles[row]
        first = self._object_ends[row - 1] if row else 0
        ends = self._polygon_ends[first : self._object_ends[row]]
        start = self._polygon_ends[first - 1] if first else 0
        return np.split(self._coordinates[start : ends[-1]], ends[:-1] - start)

    def append_polygons(self, polygons: Sequence[Sequence[float]]) -> None:
        """Add an object of at least one polygon. Raises TypeError where a coordinate is no number."""
        for polygon in polygons:
            self._coordinates.extend(polygon)
            self._polygon_ends.append(len(self._coordinates))
        self._object_ends.append(len(self._polygon_ends))

    def append_rle(self, rle: dict) -> None:
        """Add an object by its compressed RLE."""
        self._rles[len(self)] = rle
        self._object_ends.append(len(self._polygon_ends))

    def freeze(self) -> None:
        """End of the adding: from here on the arrays are read only."""
        self._coordinates = np.frombuffer(self._coordinates, dtype=np.float64)
        self._polygon_ends = np.frombuffer(self._polygon_ends, dtype=np.int64)
        self._object_ends = np.frombuffer(self._object_ends, dtype=np.int64)

    def objects_far_outside(self, sides: np.ndarray) -> list[int]:
        """Rows of the objects with a coordinate that is no number, or farther outside its image than this is long.

        Rasterising walks along every edge, pixel by pixel: a wild coordinate would take all memory, or for ever.

        Args:
            sides: (A,) the longer side of each object's image, pixels.
        """
        polygons = np.diff(self._object_ends, prepend=0)
        rows = np.flatnonzero(polygons)  # the others are RLEs
        if len(rows) == 0:
            return []
        polygon_starts = np.concatenate([[0], self._polygon_ends[:-1]])
        starts = polygon_starts[self._object_ends[rows] - polygons[rows]]
        lowest, highest = (extreme.reduceat(self._coordinates, starts) for extreme in (np.minimum, np.maximum))
        inside = (lowest >= -sides[rows]) & (highest <= 2 * sides[rows])  # false for nan
        return rows[~inside].tolist()


class Images(NamedTuple):
    """The images of an annotation file, by rising id.

    ids: (I,) int64.
    names: I file names relative to the image folder.
    sizes: (I, 2) int64 height and width, pixels.
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray


class Objects(NamedTuple):
    """The objects to learn, grouped by image in the order of `Images`, in file order within each.

    starts: (I + 1,) int64; the objects of image i are rows starts[i] .. starts[i + 1].
    ids: (A,) int64 annotation ids.
    categories: (A,) int64 category ids.
    boxes: (A, 4) float64 (x0, y0, x1, y1), original image pixels, clamped to the image, area > 0.
    segmentations: A segmentations, or None where no masks are wanted.
    order: (A,) int64; row k of the other fields has segmentation `segmentations[order[k]]`.
    """

    starts: np.ndarray
    ids: np.ndarray
    categories: np.ndarray
    boxes: np.ndarray
    segmentations: PackedSegmentations | None
    order: np.ndarray


def read_annotations(path: Path) -> dict[str, Any]:
    """The document in a COCO annotation file; its images and annotations are `Entries`, lists that stay text.

    Raises:
        DataError: no such file, not JSON, or not a mapping with lists of images, annotations and categories.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file; check data.root and the names in the data section") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")  # as `json.loads` does
    except ValueError as error:
        raise _no_json(path, error) from None
    del content
    document = parse_document(text, ("images", "annotations"), refuse=partial(_no_json, path))
    found = (
        ", ".join(map(shorten, list(document)[:8])) if isinstance(document, dict) else f"a {type(document).__name__}"
    )
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list | Entries):
            raise DataError(
                f"{path}: not a COCO annotation file: no list {key!r} (found {found or 'nothing'}); "
                "needed are the lists 'images', 'annotations' and 'categories'"
            )
    return document


def _no_json(path: Path, error: Exception) -> DataError:
    """The refusal of a file that json cannot read: no JSON, no UTF-8, thousands of digits, or thousands of brackets."""
    return DataError(f"{path}: not JSON ({error}); an annotation file in COCO format is needed")


def tabulate_images(document: dict[str, Any], path: Path) -> Images:
    """The images of a document read from `path`.

    Raises:
        DataError: an entry without id, file_name, height or width, an id that comes twice, or a file name that leaves
            the image folder.
    """
    entries = document["images"]
    for place, entry in enumerate(entries):
        check_image_entry(entry, place, path)
    ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
    _refuse_repeated(ids, f"{path}: image id")
    order = np.argsort(ids, kind="stable")
    names = [entries[place]["file_name"] for place in order.tolist()]
    sizes = np.array([(entry["height"], entry["width"]) for entry in entries], dtype=np.int64).reshape(-1, 2)
    return Images(ids[order], names, sizes[order])


def check_image_entry(entry: Any, place: int, path: Path) -> None:
    """Refuse an entry of `images`, the one at `place`, that is of no use.

    Raises:
        DataError: no id, file_name, height or width, or a file name that leaves the image folder.
    """
    if not isinstance(entry, dict) or not is_image_entry(entry):
        raise DataError(
            f"{path}: images[{place}]: found {shorten(entry)}; needed are a whole number 'id', a text 'file_name' "
            f"and positive whole numbers 'height' and 'width' up to {MAX_SIDE}"
        )
    if os.path.isabs(entry["file_name"]) or os.path.normpath(entry["file_name"]).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{path}: image id {entry['id']}: file_name {shorten(entry['file_name'])} leaves the image folder; "
            "allowed are names relative to it, without '..'"
        )


def tabulate_objects(document: dict[str, Any], path: Path, images: Images, *, with_masks: bool) -> Objects:
    """The objects of a document read from `path`, without crowds, and without objects that have no area (one log line).

    Raises:
        DataError: an object of an unknown image, an id that comes twice, a box that is not four finite numbers, a
            crowd mark that is none, or, `with_masks`, a segmentation that is neither polygons nor an RLE of the
            image's size.
    """
    rows = {image_id: row for row, image_id in enumerate(images.ids.tolist())}
    sizes = images.sizes.tolist()
    segmentations = PackedSegmentations() if with_masks else None
    ids, owners, categories, boxes, without_area = array("q"), array("q"), array("q"), array("d"), []
    all_ids = array("q")  # of crowds, and of what is left out, too
    for place, entry in enumerate(document["annotations"]):
        name = f"{path}: {name_of(entry, place)}"
        owner = owner_of(entry, rows, name)
        all_ids.append(entry["id"])
        if is_crowd(entry, name):
            continue
        height, width = sizes[owner]
        box = clamped_box(entry.get("bbox"), height, width, name)
        area = box[2] > box[0] and box[3] > box[1]
        if area and segmentations is not None:
            area = pack_segmentation(entry.get("segmentation"), segmentations, (height, width), name)
        if not area:
            without_area.append(entry["id"])
            continue
        ids.append(entry["id"])
        owners.append(owner)
        categories.append(entry["category_id"])
        boxes.extend(box)
    _refuse_repeated(np.array(all_ids, dtype=np.int64), f"{path}: annotation id")
    if without_area:
        count = f"{len(without_area)} of {len(document['annotations'])}"
        first = ", ".join(map(str, without_area[:FIRST_FEW])) + (", ..." if len(without_area) > FIRST_FEW else "")
        logger.warning("%s: %s objects have no area and are left out: annotation ids %s", path, count, first)
    owner_rows = np.array(owners, dtype=np.int64)
    if segmentations is not None:
        segmentations.freeze()
        for row in segmentations.objects_far_outside(images.sizes[owner_rows].max(axis=1, initial=0))[:1]:
            raise DataError(_describe_wild(f"{path}: annotation id {ids[row]}", sizes[owners[row]]))
    order = np.argsort(owner_rows, kind="stable")
    return Objects(
        starts=np.searchsorted(owner_rows[order], np.arange(len(sizes) + 1)),
        ids=np.array(ids, dtype=np.int64)[order],
        categories=np.array(categories, dtype=np.int64)[order],
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4)[order],
        segmentations=segmentations,
        order=order,
    )


def _refuse_repeated(ids: np.ndarray, name: str) -> None:
    """Refuse ids, int64, of which one comes twice; `name` is what the message calls them."""
    ordered = np.sort(ids)
    repeated = ordered[1:][np.diff(ordered) == 0]
    if len(repeated):
        raise DataError(f"{name} {repeated[0]} comes more than once; ids have to be unique: give every entry its own")


def is_image_entry(entry: dict[str, Any]) -> bool:
    """Whether an entry of `images` has all that it needs, of the right kind."""
    sides = (entry.get("height"), entry.get("width"))
    return (
        is_id(entry.get("id"))
        and isinstance(entry.get("file_name"), str)
        and all(is_id(side) and 0 < side <= MAX_SIDE for side in sides)
    )


def is_id(value: Any) -> bool:
    """Whether a value is a whole number of 64 bits; JSON's true and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def is_measure(value: Any) -> bool:
    """Whether a value is a finite number that can be a length or an area, in pixels; true and "1" are none."""
    return type(value) in (int, float) and abs(value) <= MAX_SIDE**3  # false for nan


def name_of(entry: Any, place: int) -> str:
    """What messages call an entry of `annotations`, the one at `place`."""
    if isinstance(entry, dict) and "id" in entry:
        return f"annotation id {shorten(entry['id'])}"
    return f"annotations[{place}]"


def owner_of(entry: Any, rows: dict[int, int], name: str) -> int:
    """The row of the image that an entry of `annotations` belongs to.

    Raises:
        DataError: an id is missing or no whole number, or there is no such image.
    """
    if not isinstance(entry, dict) or not all(is_id(entry.get(key)) for key in ("id", "category_id")):
        raise DataError(f"{name}: found {shorten(entry)}; needed are whole numbers 'id' and 'category_id'")
    image_id = entry.get("image_id")
    owner = rows.get(image_id) if is_id(image_id) else None
    if owner is None:
        raise DataError(f"{name}: image_id {shorten(image_id)} is not among the {len(rows)} ids in 'images'")
    return owner


def is_crowd(entry: dict[str, Any], name: str) -> bool:
    """Whether an entry of `annotations` marks a region of many objects.

    Raises:
        DataError: `iscrowd` is neither 0 nor 1; the text "0" would count as true.
    """
    mark = entry.get("iscrowd", 0)
    if not isinstance(mark, int) or mark not in (0, 1):
        raise DataError(f"{name}: iscrowd {shorten(mark)}; allowed are 0 and 1")
    return bool(mark)


def clamped_box(box: Any, height: int, width: int, name: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) inside the image of a COCO box (x, y, w, h).

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
    return min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)


def pack_segmentation(segmentation: Any, packed: PackedSegmentations, size: tuple[int, int], name: str) -> bool:
    """Add a checked segmentation; False where its polygons have fewer than three corners, so that it has no area.

    Raises:
        DataError: neither polygons nor an RLE of the image's size.
    """
    if isinstance(segmentation, dict):
        packed.append_rle(checked_rle(segmentation, size, name))
        return True
    if not isinstance(segmentation, list) or not segmentation or not all(isinstance(p, list) for p in segmentation):
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)}; needed is a list of polygons [[x0, y0, x1, y1, ...], ...] "
            "or an RLE; a data set without masks trains a plain detector (codec.kind=none)"
        )
    for polygon in segmentation:
        if len(polygon) % 2:
            raise DataError(f"{name}: a polygon has {len(polygon)} numbers; x and y come in pairs")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if polygons:
        try:
            packed.append_polygons(polygons)
        except (TypeError, OverflowError):
            raise DataError(f"{name}: segmentation {shorten(segmentation)}; polygons are made of numbers") from None
    return bool(polygons)


def checked_segmentation(segmentation: Any, size: tuple[int, int], name: str) -> masks.Segmentation:
    """The polygons of three corners and more, possibly none, or the compressed RLE of an object by itself.

    Raises:
        DataError: neither polygons near an image of `size` (height, width) nor an RLE of it.
    """
    packed = PackedSegmentations()
    if not pack_segmentation(segmentation, packed, size, name):
        return []
    packed.freeze()
    if packed.objects_far_outside(np.array([max(size)])):
        raise DataError(_describe_wild(name, list(size)))
    return packed[0] if isinstance(segmentation, dict) else [polygon for polygon in segmentation if len(polygon) >= 6]


def checked_rle(segmentation: dict, size: tuple[int, int], name: str) -> dict:
    """The compressed RLE of a compressed or uncompressed one.

    Raises:
        DataError: not runs that cover an image of `size` (height, width); C code reads them, and takes them as given.
    """
    counts, rle_size = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(counts, str | bytes | list) or not isinstance(rle_size, list) or tuple(rle_size) != size:
        raise DataError(
            f"{name}: segmentation {shorten(segmentation)}; an RLE needs 'counts' and the size [height, width] of "
            f"its image, here {list(size)}"
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


def _describe_wild(name: str, size: list[int]) -> str:
    return (
        f"{name}: a polygon has a coordinate that is no finite number, or lies farther outside its image of {size} "
        "(height, width) than this is long; correct or remove the object"
    )


_repr = reprlib.Repr()  # of a nest of thousands of brackets too
_repr.maxlist = _repr.maxdict = _repr.maxstring = _repr.maxother = _repr.maxlong = 80


def shorten(value: Any) -> str:
    """A value from an annotation file, in a few words, on one line."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
