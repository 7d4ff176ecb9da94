"""COCO annotation files: read, checked once, and kept as a few flat arrays.

COCO's 860 000 objects as Python lists cost gigabytes, and every forked loader process would copy them by merely
counting references. Flat arrays are shared instead.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solq_lab import masks

logger = logging.getLogger(__name__)

FIRST_FEW = 5  # ids named in a message that concerns many


class DataError(ValueError):
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

    def objects_with_infinite_coordinates(self) -> list[int]:
        """Rows of the objects with a coordinate that is infinite or not a number."""
        places = np.flatnonzero(~np.isfinite(self._coordinates))
        polygons = np.searchsorted(self._polygon_ends, places, side="right")
        return np.unique(np.searchsorted(self._object_ends, polygons, side="right")).tolist()


class Pictures(NamedTuple):
    """The pictures of an annotation file, by rising id.

    ids: (I,) int64.
    names: I file names relative to the image folder.
    sizes: (I, 2) int64 height and width, pixels.
    """

    ids: np.ndarray
    names: list[str]
    sizes: np.ndarray


class Objects(NamedTuple):
    """The objects to learn, grouped by picture in the order of `Pictures`, in file order within each.

    starts: (I + 1,) int64; the objects of picture i are rows starts[i] .. starts[i + 1].
    ids: (A,) int64 annotation ids.
    categories: (A,) int64 category ids.
    boxes: (A, 4) float64 (x0, y0, x1, y1), original image pixels, clamped to the picture, area > 0.
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
    """The document in a COCO annotation file.

    Raises:
        DataError: no such file, not JSON, or not a mapping with lists of images, annotations and categories.
    """
    try:
        document = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file; check data.root and the names in the data section") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); an annotation file in COCO format is needed") from None
    found = ", ".join(map(repr, list(document)[:8])) if isinstance(document, dict) else f"a {type(document).__name__}"
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(
                f"{path}: not a COCO annotation file: no list {key!r} (found {found or 'nothing'}); "
                "needed are the lists 'images', 'annotations' and 'categories'"
            )
    return document


def tabulate_pictures(document: dict[str, Any], path: Path) -> Pictures:
    """The pictures of a document read from `path`.

    Raises:
        DataError: an entry without id, file_name, height or width, an id that comes twice, or a file name that leaves
            the image folder.
    """
    entries = document["images"]
    for place, entry in enumerate(entries):
        check_picture_entry(entry, place, path)
    ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
    order = np.argsort(ids, kind="stable")
    repeated = ids[order][1:][np.diff(ids[order]) == 0]
    if len(repeated):
        raise DataError(f"{path}: image id {repeated[0]} comes more than once; ids have to be unique")
    names = [entries[place]["file_name"] for place in order.tolist()]
    sizes = np.array([(entry["height"], entry["width"]) for entry in entries], dtype=np.int64).reshape(-1, 2)
    return Pictures(ids[order], names, sizes[order])


def check_picture_entry(entry: Any, place: int, path: Path) -> None:
    """Refuse an entry of `images`, the one at `place`, that is of no use.

    Raises:
        DataError: no id, file_name, height or width, or a file name that leaves the image folder.
    """
    if not isinstance(entry, dict) or not _is_picture(entry):
        raise DataError(
            f"{path}: images[{place}]: found {_shorten(entry)}; needed are a whole number 'id', a text 'file_name' "
            "and positive whole numbers 'height' and 'width'"
        )
    if os.path.isabs(entry["file_name"]) or os.path.normpath(entry["file_name"]).split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{path}: image id {entry['id']}: file_name {entry['file_name']!r} leaves the image folder; "
            "allowed are names relative to it, without '..'"
        )


def tabulate_objects(document: dict[str, Any], path: Path, pictures: Pictures, *, with_masks: bool) -> Objects:
    """The objects of a document read from `path`, without crowds, and without objects that have no area (one log line).

    Raises:
        DataError: an object of an unknown picture, a box that is not four finite numbers, or, `with_masks`, a
            segmentation that is neither polygons nor an RLE of the picture's size.
    """
    rows = {image_id: row for row, image_id in enumerate(pictures.ids.tolist())}
    sizes = pictures.sizes.tolist()
    segmentations = PackedSegmentations() if with_masks else None
    ids, owners, categories, boxes, without_area = array("q"), array("q"), array("q"), array("d"), []
    for place, entry in enumerate(document["annotations"]):
        name = f"{path}: {name_of(entry, place)}"
        owner = owner_of(entry, rows, name)
        if entry.get("iscrowd", 0):
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
    if without_area:
        count = f"{len(without_area)} of {len(document['annotations'])}"
        first = ", ".join(map(str, without_area[:FIRST_FEW])) + (", ..." if len(without_area) > FIRST_FEW else "")
        logger.warning("%s: %s objects have no area and are left out: annotation ids %s", path, count, first)
    if segmentations is not None:
        segmentations.freeze()
        for row in segmentations.objects_with_infinite_coordinates()[:1]:
            raise DataError(f"{path}: annotation id {ids[row]}: a polygon has an infinite or missing coordinate")
    owner_rows = np.array(owners, dtype=np.int64)
    order = np.argsort(owner_rows, kind="stable")
    return Objects(
        starts=np.searchsorted(owner_rows[order], np.arange(len(sizes) + 1)),
        ids=np.array(ids, dtype=np.int64)[order],
        categories=np.array(categories, dtype=np.int64)[order],
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4)[order],
        segmentations=segmentations,
        order=order,
    )


def _is_picture(entry: dict[str, Any]) -> bool:
    sides = (entry.get("height"), entry.get("width"))
    return (
        isinstance(entry.get("id"), int)
        and isinstance(entry.get("file_name"), str)
        and all(isinstance(side, int) and side > 0 for side in sides)
    )


def name_of(entry: Any, place: int) -> str:
    """What messages call an entry of `annotations`, the one at `place`."""
    return f"annotation id {entry['id']}" if isinstance(entry, dict) and "id" in entry else f"annotations[{place}]"


def owner_of(entry: Any, rows: dict[int, int], name: str) -> int:
    """The row of the picture that an entry of `annotations` belongs to.

    Raises:
        DataError: an id is missing or no whole number, or there is no such picture.
    """
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), int) for key in ("id", "category_id")):
        raise DataError(f"{name}: found {_shorten(entry)}; needed are whole numbers 'id' and 'category_id'")
    image_id = entry.get("image_id")
    owner = rows.get(image_id) if isinstance(image_id, int) else None
    if owner is None:
        raise DataError(f"{name}: image_id {image_id!r} is not among the {len(rows)} ids in 'images'")
    return owner


def clamped_box(box: Any, height: int, width: int, name: str) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) inside the picture of a COCO box (x, y, w, h).

    Raises:
        DataError: not four finite numbers.
    """
    try:
        x, y, w, h = box
        total = x + y + w + h
    except (TypeError, ValueError):
        raise DataError(f"{name}: bbox {_shorten(box)}; needed are four numbers x, y, width, height") from None
    if not abs(total) < float("inf"):  # also false for nan
        raise DataError(f"{name}: bbox {box} has a value that is not finite; correct or remove the object")
    return min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height)


def pack_segmentation(segmentation: Any, packed: PackedSegmentations, size: tuple[int, int], name: str) -> bool:
    """Add a checked segmentation; False where its polygons have fewer than three corners, so that it has no area.

    Raises:
        DataError: neither polygons nor an RLE of the picture's size.
    """
    if isinstance(segmentation, dict):
        counts, rle_size = segmentation.get("counts"), segmentation.get("size")
        if not isinstance(counts, str | bytes | list) or not isinstance(rle_size, list) or tuple(rle_size) != size:
            raise DataError(
                f"{name}: segmentation {_shorten(segmentation)}; an RLE needs 'counts' and the size [height, width] of "
                f"its picture, here {list(size)}"
            )
        try:
            rle = masks.segmentation_to_rle(segmentation, size)
            covered = _pixels_of_rle(rle["counts"])
        except (ValueError, OverflowError, TypeError, IndexError) as error:
            raise DataError(f"{name}: segmentation {_shorten(segmentation)}: not an RLE ({error})") from None
        if covered != size[0] * size[1]:
            raise DataError(
                f"{name}: segmentation {_shorten(segmentation)}: the RLE counts {covered} pixels, its picture has "
                f"{size[0]} x {size[1]} = {size[0] * size[1]}; correct or remove the object"
            )
        packed.append_rle(rle)
        return True
    if not isinstance(segmentation, list) or not segmentation or not all(isinstance(p, list) for p in segmentation):
        raise DataError(
            f"{name}: segmentation {_shorten(segmentation)}; needed is a list of polygons [[x0, y0, x1, y1, ...], ...] "
            "or an RLE; a data set without masks trains a plain detector (codec.kind=none)"
        )
    for polygon in segmentation:
        if len(polygon) % 2:
            raise DataError(f"{name}: a polygon has {len(polygon)} numbers; x and y come in pairs")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if polygons:
        try:
            packed.append_polygons(polygons)
        except TypeError:
            raise DataError(f"{name}: segmentation {_shorten(segmentation)}; polygons are made of numbers") from None
    return bool(polygons)


def _pixels_of_rle(counts: bytes) -> int:
    """How many pixels the runs of a compressed RLE cover: pycocotools would leave the rest of a mask uninitialised.

    A run is written in groups of five bits, lowest first, one character each from "0" on; the sixth bit says that more
    follow, the fifth of the last one is the sign. From the fourth run on it is the difference to the last but one.
    """
    characters = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - ord("0")
    last = np.flatnonzero((characters & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    group = np.arange(len(characters)) - np.repeat(first, last - first + 1)
    runs = np.add.reduceat((characters & 31) << (5 * group), first)
    runs -= np.where(characters[last] & 16, 1 << (5 * (group[last] + 1)), 0)
    return int(runs[0] + np.cumsum(runs[1::2]).sum() + np.cumsum(runs[2::2]).sum())


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
