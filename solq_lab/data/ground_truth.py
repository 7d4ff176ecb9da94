"""Ground truth of a COCO annotation file, read and checked once and kept as a few flat arrays.

COCO's 860 000 objects as Python lists cost gigabytes, and every forked loader process would copy them by merely
counting references. Flat arrays are shared instead.
"""

import logging
import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as coco_rle
from torch import Tensor

from solq_lab import masks
from solq_lab.data.annotations import (
    DataError,
    check_image_entry,
    checked_area,
    checked_segmentation,
    clamped_box,
    first_few,
    has_segmentation,
    is_crowd,
    is_measure,
    name_of,
    owner_of,
    read_annotations,
    shorten,
    with_box,
)
from solq_lab.data.kinds import ORIENTATIONS, Orientation
from solq_lab.data.readings import REACH, corners_of, iou, other_reading, reach

logger = logging.getLogger(__name__)

CROWDS = "marked as crowds (iscrowd 1)"
WITHOUT_AREA = "without area in box or mask"
WITHOUT_MASK = "without segmentation"
TWICE = "annotated twice, with the class and box of another one of their image, and learnt twice"
BEYOND = "have a box or outline that reaches out of the image, and is cut off"
TINY = "are no wider and higher than a pixel"
APART = "have a box and a mask that lie apart"
IN_PIXELS = "a bbox is [x, y, width, height] in pixels, as are outlines"
MISREAD = f"almost all boxes or outlines seem to be {{}}; {IN_PIXELS}: convert them"
CURES = {
    CROWDS: "write iscrowd 0 for single objects",
    WITHOUT_AREA: "bbox is [x, y, width, height], a polygon has three corners or more",
    WITHOUT_MASK: "a data set without masks trains a plain detector (codec.kind=none)",
}
MANY_CROWDS = 0.3  # share of a class's objects from which crowds are a mistake; COCO has 0.012 of all
MIN_OVERLAP = 0.5  # IoU of a box and the box of its mask, below which one of them is a mistake

__all__ = ["DataError", "GroundTruth"]


class GroundTruth:
    """I images by rising id, and A objects grouped by image, in file order within each.

    Attributes:
        source: the file, for messages.
        categories, info: those of the document, unchecked.
        image_ids: (I,) int64.
        file_names: I names relative to the image folder.
        sizes: (I, 2) int64 height and width, pixels.
        starts: (I + 1,) int64; the objects of image i are rows starts[i] .. starts[i + 1].
        ids: (A,) int64 annotation ids.
        category_ids: (A,) int64.
        boxes: (A, 4) float64 (x0, y0, x1, y1), original image pixels, clamped to the image.
        coco_boxes: (A, 4) float64 (x, y, width, height) as annotated.
        areas: (A,) float64 as annotated, pixels; NaN where the file gives none.
        crowd: (A,) bool.
        learnable: (A,) bool: no crowd, and box and mask have an area.
        has_masks: whether segmentations were read.
        keep: which objects are here.
    """

    def __init__(
        self,
        annotations: str | Path | dict[str, Any],
        *,
        with_masks: bool = True,
        keep: Literal["learnable", "all"] = "learnable",
        source: str | Path = "annotations",
        report: bool = True,
    ) -> None:
        """Read and check a file.

        Args:
            annotations: COCO instances file, or its parsed content.
            with_masks: read the segmentations too.
            keep: "learnable" leaves out crowds, and objects without area or segmentation. "all" leaves out objects
                without segmentation only, and therefore checks the masks of crowds and all areas too. One log line
                counts what is left out or cannot be learnt, but for a few crowds.
            source: name of a parsed document in messages.
            report: log what is left out, and what looks wrong in the objects to learn.

        Raises:
            DataError: an entry that is incomplete, an id that comes twice, an object of an unknown image, a box that is
                not four finite numbers, a crowd mark other than 0 and 1, or, `with_masks`, a segmentation that is
                neither polygons nor an RLE of the image's size; or all objects are left out. The message names the
                entry and the cure.
        """
        document = annotations if isinstance(annotations, dict) else read_annotations(Path(annotations))
        self.source = Path(source if isinstance(annotations, dict) else annotations)
        self.categories: list[Any] = list(document["categories"])
        self.info: Any = document.get("info")
        self.has_masks, self.keep, self._report = with_masks, keep, report
        self._read_images(document["images"])
        self._read_objects(document["annotations"])
        if keep == "learnable" and report:
            self._report_twice()
            self._report_units()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def orientation(self) -> Orientation | None:
        """How the file says that it counts the pixels of turned images; those made of YOLO folders do."""
        return orientation_said(self.info)

    def rows(self, image_ids: Collection[int] | None = None) -> np.ndarray:
        """The learnable objects in these images (None: in all), ascending."""
        if image_ids is None:
            return np.flatnonzero(self.learnable)
        return np.flatnonzero(self.learnable & np.isin(self.image_ids[self.image_rows], list(image_ids)))

    def rows_of(self, image: int) -> slice:
        """The objects of the image in row `image`."""
        return slice(*self.starts[image : image + 2].tolist())

    def size(self, image: int) -> tuple[int, int]:
        """(height, width) of the image in row `image`, pixels."""
        height, width = self.sizes[image].tolist()
        return height, width

    def by_image(self, rows: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Runs of objects of one image: the image's row, and which of `rows` they are."""
        images = self.image_rows[rows]
        cuts = np.flatnonzero(np.diff(images, prepend=-1, append=-1))
        for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            yield int(images[start]), slice(start, stop)

    def segmentations(self, rows: np.ndarray | slice) -> list[masks.Segmentation]:
        """What COCO wrote for objects: polygons in image pixels, or a compressed RLE."""
        return [self._packed[place] for place in self._places[rows].tolist()]

    def rle(self, row: int) -> dict:
        """The mask of an object as a compressed RLE of its image's size."""
        return masks.segmentation_to_rle(self._packed[self._places[row]], self.size(self.image_rows[row]))

    def box_masks(self, rows: Sequence[int] | np.ndarray, mask_size: int) -> Tensor:
        """Masks (K, N, N) bool of objects in their boxes; one too small to fill half a cell is empty."""
        rows = np.asarray(rows, dtype=np.int64)
        drawn = [
            masks.rasterize_in_box(
                self.segmentations(rows[run]), torch.from_numpy(self.boxes[rows[run]]), self.size(image), mask_size
            )
            for image, run in self.by_image(rows)
        ]
        return torch.cat(drawn) if drawn else torch.zeros(0, mask_size, mask_size, dtype=torch.bool)

    def areas_of(self, rows: np.ndarray) -> np.ndarray:
        """(k,) float64 areas of objects, pixels: as annotated, or of the mask where the file gives none."""
        areas = self.areas[rows]
        missing = np.flatnonzero(np.isnan(areas))
        areas[missing] = [coco_rle.area(self.rle(row)) for row in rows[missing].tolist()]
        return areas

    def _read_images(self, entries: Sequence[Any]) -> None:
        for place, entry in enumerate(entries):
            check_image_entry(entry, place, self.source)
        ids = np.array([entry["id"] for entry in entries], dtype=np.int64)
        _check_distinct(ids, f"{self.source}: image id")
        order = np.argsort(ids, kind="stable")
        sizes = np.array([(entry["height"], entry["width"]) for entry in entries], dtype=np.int64).reshape(-1, 2)
        self.image_ids, self.sizes = ids[order], sizes[order]
        self.file_names: list[str] = [entries[place]["file_name"] for place in order.tolist()]

    def _read_objects(self, entries: Sequence[Any]) -> None:
        keep_all = self.keep == "all"
        image_of = {image_id: row for row, image_id in enumerate(self.image_ids.tolist())}
        sizes = [self.size(image) for image in range(len(self.sizes))]
        packed = _PackedSegmentations()
        all_ids, ids, images, category_ids = array("q"), array("q"), array("q"), array("q")
        boxes, coco_boxes, areas = array("d"), array("d"), array("d")
        crowd, learnable = array("b"), array("b")
        crowds: Counter[int] = Counter()
        left_out: dict[str, list[int]] = {reason: [] for reason in CURES}

        for place, entry in enumerate(entries):
            name = f"{self.source}: {name_of(entry, place)}"
            image = owner_of(entry, image_of, name)
            all_ids.append(entry["id"])
            of_many = is_crowd(entry, name)
            if of_many and not keep_all:
                crowds[entry["category_id"]] += 1
                left_out[CROWDS].append(entry["id"])
                continue

            entry = with_box(entry, sizes[image], name)
            box = clamped_box(entry.get("bbox"), sizes[image], name)
            has_area = box[2] > box[0] and box[3] > box[1]
            # What is left out by its box is not looked at further: its mask may be anything.
            if self.has_masks and (has_area or keep_all):
                if not has_segmentation(entry):
                    left_out[WITHOUT_MASK].append(entry["id"])
                    continue
                segmentation = checked_segmentation(entry.get("segmentation"), sizes[image], name)
                has_area = has_area and bool(segmentation)
            if not (has_area or of_many):
                left_out[WITHOUT_AREA].append(entry["id"])
            if not (has_area or keep_all):
                continue

            if self.has_masks:
                packed.append(segmentation)
            ids.append(entry["id"])
            images.append(image)
            category_ids.append(entry["category_id"])
            boxes.extend(box)
            coco_boxes.extend(entry["bbox"])
            # Training needs no areas, so that a wrong one is no reason to stop it.
            areas.append(checked_area(entry, name) if keep_all or is_measure(entry.get("area")) else math.nan)
            crowd.append(of_many)
            learnable.append(has_area and not of_many)

        _check_distinct(np.array(all_ids, dtype=np.int64), f"{self.source}: annotation id")
        few_crowds = not crowded_classes(crowds, Counter(category_ids) + crowds)
        self._report_left_out(left_out, kept=len(ids), total=len(entries), few_crowds=few_crowds)
        packed.freeze()
        owners = np.array(images, dtype=np.int64)
        order = np.argsort(owners, kind="stable")
        self._packed, self._places = packed, order
        self.image_rows = owners[order]
        self.starts = np.searchsorted(self.image_rows, np.arange(len(sizes) + 1))
        self.ids, self.category_ids = (np.array(column, dtype=np.int64)[order] for column in (ids, category_ids))
        self.boxes, self.coco_boxes = (np.array(sides).reshape(-1, 4)[order] for sides in (boxes, coco_boxes))
        self.areas = np.array(areas, dtype=np.float64)[order]
        self.crowd, self.learnable = (np.array(marks, dtype=bool)[order] for marks in (crowd, learnable))

    def other_reading(self) -> str:
        """What the boxes to learn seem to be, where they cannot be x, y, width, height; see `readings`."""
        rows, outlines = self.rows(), self._outlines() if self.has_masks else None
        images = self.image_rows[rows]
        return other_reading(
            self.coco_boxes[rows], images, self.sizes[images], None if outlines is None else outlines[rows]
        )

    def _outlines(self) -> np.ndarray:
        """(A, 4) x0, y0, x1, y1 around the masks; zeros where there is no polygon."""
        return self._packed.bounds()[self._places]

    def _report_twice(self) -> None:
        """Count images with the file, and objects with the image, class and box, of another one: merged exports."""
        if shared := [shorten(name) for name, count in Counter(self.file_names).items() if count > 1]:
            message = "%s: %d images have several ids, each with some of the objects: %s; merge their entries"
            logger.warning(message, self.source, len(shared), first_few(shared))

        columns = [self.image_rows, self.category_ids, *self.coco_boxes.T + 0.0]  # + 0.0: -0.0 is 0.0
        hashes = np.zeros(len(self), dtype=np.uint64)  # of rows: twenty times faster than np.unique over axis 0
        for column in columns:
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.float64).view(np.uint64)
            hashes ^= hashes >> np.uint64(29)
        _, first, count = np.unique(hashes, return_index=True, return_counts=True)
        if number := int((count - 1).sum()):
            ids = first_few(sorted(self.ids[first[count > 1]].tolist()))
            logger.warning("%s: %d objects are %s, as annotation ids %s: remove them", self.source, number, TWICE, ids)

    def _report_units(self) -> None:
        """Count objects in other units or with corners for sides: tiny, beyond their image, or with masks elsewhere."""
        boxes, sizes = corners_of(self.coco_boxes), self.sizes[self.image_rows]
        found = {BEYOND: reach(boxes, sizes) > REACH, TINY: self.coco_boxes[:, 2:].max(axis=1, initial=0) <= REACH}
        if self.has_masks:
            outlines = self._outlines()
            found[BEYOND] |= reach(outlines, sizes) > REACH
            found[APART] = iou(outlines, boxes) < MIN_OVERLAP
        if reading := self.other_reading():
            logger.warning("%s: %s", self.source, MISREAD.format(reading))

        for what, marks in found.items():
            if ids := self.ids[marks].tolist():
                count = (self.source, len(ids), len(self), first_few(ids))
                logger.warning("%s: %d of %d objects (annotation ids %s) %s; %s", *count, what, IN_PIXELS)

    def _report_left_out(self, left_out: dict[str, list[int]], *, kept: int, total: int, few_crowds: bool) -> None:
        reasons = {reason: ids for reason, ids in left_out.items() if ids}
        counts = "; ".join(
            f"{len(ids)} {reason}, annotation ids {first_few(ids)}: {CURES[reason]}" for reason, ids in reasons.items()
        )
        if total and not kept:
            raise DataError(f"{self.source}: none of the {total} objects can be learnt: {counts}")
        if few_crowds:
            reasons.pop(CROWDS, None)
        if reasons and self._report:
            number = sum(map(len, left_out.values()))
            logger.warning("%s: %d of %d objects cannot be learnt: %s", self.source, number, total, counts)


def orientation_said(info: Any) -> Orientation | None:
    """The orientation in the `info` of an annotation file."""
    said = info.get("orientation") if isinstance(info, dict) else None
    return next((way for way in ORIENTATIONS if way == said), None)


def crowded_classes(crowds: Mapping[int, int], objects: Mapping[int, int]) -> list[int]:
    """Category ids of which many objects are marked as crowds, as exports of brush masks do; counts by category id."""
    return [category for category, count in crowds.items() if count > 1 and count >= MANY_CROWDS * objects[category]]


class _PackedSegmentations:
    """Segmentations of many objects: polygon coordinates end to end in one array, the RLEs beside it."""

    def __init__(self) -> None:
        self._coordinates: Any = array("d")
        self._polygon_ends: Any = array("q")  # per polygon, where it ends in `_coordinates`
        self._object_ends: Any = array("q")  # per object, where it ends in `_polygon_ends`
        self._rles: dict[int, dict] = {}

    def __getitem__(self, place: int) -> list[np.ndarray] | dict:
        if place in self._rles:
            return self._rles[place]
        first, last = (self._object_ends[place - 1] if place else 0), self._object_ends[place]
        if first == last:
            return []
        ends = self._polygon_ends[first:last]
        start = self._polygon_ends[first - 1] if first else 0
        return np.split(self._coordinates[start : ends[-1]], ends[:-1] - start)

    def bounds(self) -> np.ndarray:
        """(A, 4) float64 (x0, y0, x1, y1) of the masks, pixels; zeros of those without a polygon."""
        bounds = np.zeros((len(self._object_ends), 4))
        points = self._coordinates.reshape(-1, 2)
        starts = np.append(0, self._polygon_ends)[np.append(0, self._object_ends)] // 2
        drawn = np.flatnonzero(np.diff(starts))
        if len(drawn):
            bounds[drawn, :2] = np.minimum.reduceat(points, starts[drawn])
            bounds[drawn, 2:] = np.maximum.reduceat(points, starts[drawn])
        if self._rles:
            bounds[list(self._rles)] = boxes = coco_rle.toBbox(list(self._rles.values()))
            bounds[list(self._rles), 2:] += boxes[:, :2]
        return bounds

    def append(self, segmentation: list[array] | dict) -> None:
        if isinstance(segmentation, dict):
            self._rles[len(self._object_ends)] = segmentation
        else:
            for polygon in segmentation:
                self._coordinates.extend(polygon)
                self._polygon_ends.append(len(self._coordinates))
        self._object_ends.append(len(self._polygon_ends))

    def freeze(self) -> None:
        """Make the arrays numpy's; nothing can be appended afterwards."""
        self._coordinates = np.frombuffer(self._coordinates, dtype=np.float64)
        self._polygon_ends = np.frombuffer(self._polygon_ends, dtype=np.int64)
        self._object_ends = np.frombuffer(self._object_ends, dtype=np.int64)


def _check_distinct(ids: np.ndarray, name: str) -> None:
    """Raise DataError where an id, int64, comes twice; `name` is what the message calls them."""
    ordered = np.sort(ids)
    repeated = ordered[1:][np.diff(ordered) == 0]
    if len(repeated):
        raise DataError(f"{name} {repeated[0]} comes more than once; ids have to be unique: give every entry its own")
