"""COCO evaluation of boxes, masks and mask boundaries. Paper: section 4.1 and table 4.

Matching and precision-recall curves are faster-coco-eval's (pycocotools' numbers, in C++). A segmentation result is
scored without its box, so that its area, which decides between small, medium and large, is the mask's.
Boundary AP replaces the IoU of a pair by min(mask IoU, boundary IoU); the boundary of a mask is the mask minus its
erosion by a 3 x 3 square, repeated round(ratio * diagonal) times but at least once, the outside of the image counting
as background. Against a crowd region a pair keeps its mask IoU.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_api

from solq_lab.data.annotations import DataError
from solq_lab.data.classes import ClassMap
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.evaluation.sizes import area_ranges
from solq_lab.evaluation.summary import AP_COLUMNS, Evaluation
from solq_lab.schema import EvaluationSection

logger = logging.getLogger(__name__)

KINDS = ("box", "segm", "boundary")
DEFAULTS = EvaluationSection()
DETECTIONS_AT_ONCE = 50_000  # matched at once, or one class where it has more: about 150 MB of tables

_IOU_TYPE = {"box": "bbox", "segm": "segm", "boundary": "boundary"}
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # area ranges, in the order of faster-coco-eval's arrays
_AP50, _AP75 = 0, 5  # rows of the ten IoU thresholds 0.50, 0.55, ... 0.95


def evaluate_results(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    *,
    kinds: Collection[str] = KINDS,
    area_sides: tuple[float, float] = DEFAULTS.area_sides,
    boundary_ratio: float = DEFAULTS.boundary_ratio,
    image_ids: Collection[int] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Scores results in COCO's format against ground truth.

    Args:
        annotations: COCO instances file, its parsed content (left unchanged), or its `GroundTruth` with all objects.
        results: one dictionary per detection: "image_id", "category_id", "score", "bbox" (x, y, w, h) in image pixels
            where boxes are scored, "segmentation" (compressed RLE at image size) where masks are. May be empty; left
            unchanged.
        kinds: which of "box", "segm", "boundary".
        area_sides: square roots of the areas, pixels, that part small from medium and medium from large objects.
        boundary_ratio: boundary width over the image's diagonal.
        image_ids: images to look at; results elsewhere are left out. None: all images of the file.
        should_stop: asked every few classes. None: never.

    Returns:
        The twelve COCO numbers of each kind and the six APs per class. Without results they are 0; where nothing could
        have been found (no ground truth of that class or size) they are NaN.

    Raises:
        DataError: the annotations or a result cannot be used; the message names the entry and the cure.
        ValueError: an unknown kind, or sizes that do not ascend.
        EvaluationStopped: `should_stop` said so.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"evaluation kinds {unknown or list(kinds)}: allowed are {', '.join(KINDS)}")
    if not 0 < area_sides[0] < area_sides[1]:
        raise ValueError(f"area_sides {area_sides}: allowed are two ascending positive sides in pixels")
    masks_wanted = any(kind != "box" for kind in kinds)
    truth = _ScoredTruth(annotations, image_ids, masks_wanted=masks_wanted)
    shares = truth.shares(results)
    ranges = {size: list(bounds) for size, bounds in area_ranges(area_sides).items()}
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {name: {} for name in truth.class_names}
    for kind in (kind for kind in KINDS if kind in kinds):
        precisions, recalls = [], []
        for share in shares:
            if should_stop is not None and should_stop():
                raise EvaluationStopped("the scoring was asked to stop")
            part = truth.of_classes(share.category_ids)
            found = part.detections(share.numbered, masks=kind != "box")
            evaluator = _evaluate(part, found, kind, boundary_ratio, ranges=ranges)
            evaluator.accumulate()
            precisions.append(evaluator.eval["precision"])
            recalls.append(evaluator.eval["recall"])

        precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)
        metrics |= {f"{kind}.{name}": value for name, value in _summarise(precision, recall).items()}
        for channel, name in enumerate(truth.class_names):
            numbers = _average_precisions(precision[:, :, channel : channel + 1])
            per_class[name] |= {f"{kind}.{number}": value for number, value in numbers.items()}
    return Evaluation(metrics, per_class, tuple(area_sides), boundary_ratio, len(truth.images))


class _Share(NamedTuple):
    """Some of the classes, and what was found of them: classes are scored one by one, so their curves can be joined.

    category_ids: ascending.
    numbered: results, each with its place in the list.
    """

    category_ids: list[int]
    numbered: list[tuple[int, dict]]


def _evaluate(truth: _ScoredTruth, found: COCO, kind: str, boundary_ratio: float, **ranges: object) -> COCOeval_faster:
    """faster-coco-eval after its matching."""
    evaluator = COCOeval_faster(
        truth.index(),
        found,
        _IOU_TYPE[kind],
        boundary_dilation_ratio=boundary_ratio,
        print_function=logger.debug,
        **ranges,
    )
    evaluator.evaluate()
    return evaluator


class Candidates(NamedTuple):
    """Which detections may match which objects: F detections by falling score, A objects, P pairs, I images.

    Of an image's detections of one class, only the 100 best are here, as COCO counts.

    image_ids: (I,) images, ascending.
    class_names: S names, by rising category id.
    detection_images, object_images: (F,), (A,) rows of `image_ids`.
    detection_classes, object_classes: (F,), (A,) rows of `class_names`.
    crowd: (A,) bool.
    detections, objects, overlap: (P,) rows of a detection and of an object of its class in its image, and their IoU.
    """

    image_ids: np.ndarray
    class_names: list[str]
    detection_images: np.ndarray
    detection_classes: np.ndarray
    object_images: np.ndarray
    object_classes: np.ndarray
    crowd: np.ndarray
    detections: np.ndarray
    objects: np.ndarray
    overlap: np.ndarray


def measure_candidates(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    *,
    kind: str,
    boundary_ratio: float = DEFAULTS.boundary_ratio,
    image_ids: Collection[int] | None = None,
) -> Candidates:
    """The overlaps that `evaluate_results` matches by, for analyses that match or count in another way.

    Args:
        annotations, results, boundary_ratio, image_ids: as in `evaluate_results`.
        kind: "box", "segm" or "boundary".

    Raises:
        DataError: the annotations or a result cannot be used; the message names the entry and the cure.
    """
    truth = _ScoredTruth(annotations, image_ids, masks_wanted=kind != "box")
    found = truth.detections(truth.counted(results), masks=kind != "box")
    evaluator = _evaluate(truth, found, kind, boundary_ratio)
    images = np.array(sorted(truth.images), dtype=np.int64)
    image_rows = {key: row for row, key in enumerate(images.tolist())}
    class_rows = {category_id: row for row, category_id in enumerate(truth.category_ids)}
    detections = _best_detections(found.dataset["annotations"], evaluator.params.maxDets[-1])
    detection_places, object_places = _places(detections), _places(truth.objects)
    pairs = [np.zeros((0, 3))]
    for key, places in detection_places.items():
        others = object_places.get(key)
        if others:
            overlap = np.asarray(evaluator.ious[key])  # (detections by falling score, objects)
            rows, columns = np.meshgrid(places, others, indexing="ij")
            pairs.append(np.stack([rows.ravel(), columns.ravel(), overlap.ravel()], axis=1))
    joined = np.concatenate(pairs)
    joined = joined[np.argsort(joined[:, 0], kind="stable")]
    return Candidates(
        images,
        truth.class_names,
        *_rows(detections, image_rows, class_rows),
        *_rows(truth.objects, image_rows, class_rows),
        crowd=np.array([entry["iscrowd"] for entry in truth.objects], dtype=bool),
        detections=joined[:, 0].astype(np.int64),
        objects=joined[:, 1].astype(np.int64),
        overlap=joined[:, 2],
    )


class _ScoredTruth:
    """The images, classes and objects that count, in the form faster-coco-eval reads."""

    def __init__(
        self, annotations: str | Path | dict | GroundTruth, image_ids: Collection[int] | None, *, masks_wanted: bool
    ) -> None:
        truth = annotations
        if not isinstance(truth, GroundTruth):
            truth = GroundTruth(truth, with_masks=masks_wanted, keep="all")
        if truth.keep != "all" or (masks_wanted and not truth.has_masks):
            raise ValueError('scoring needs GroundTruth(..., keep="all"), with masks where masks are scored')
        self.source = truth.source
        classes = ClassMap.from_categories(truth.categories, source=str(self.source))
        self.class_names = _distinct_names(classes)
        self.category_ids: Collection[int] = classes.category_ids

        self.sizes = {
            key: tuple(size) for key, size in zip(truth.image_ids.tolist(), truth.sizes.tolist(), strict=True)
        }
        self.images = set(self.sizes if image_ids is None else image_ids)
        unknown = sorted(self.images - self.sizes.keys())
        if unknown:
            raise DataError(f"{self.source}: no image of id {unknown[0]}; image_ids are those of this file")
        rows = np.flatnonzero(np.isin(truth.image_ids[truth.image_rows], list(self.images)))
        self.objects = [self._object(truth, row, masks_wanted) for row in rows.tolist()]
        for number, entry in enumerate(self.objects, start=1):
            entry["id"] = number  # faster-coco-eval takes id 0 for "not matched"

    def index(self) -> COCO:
        """The ground truth, indexed; a fresh copy, because an evaluation writes into it."""
        return self._indexed([dict(entry) for entry in self.objects])

    def of_classes(self, category_ids: Collection[int]) -> _ScoredTruth:
        """The same images with some of the classes."""
        part = copy.copy(self)
        part.category_ids = category_ids
        part.objects = [entry for entry in self.objects if entry["category_id"] in category_ids]
        return part

    def counted(self, results: Sequence[dict]) -> Iterator[tuple[int, dict]]:
        """The results that count, checked but for their shapes, each with its place in the list."""
        for number, result in enumerate(results):
            self._check(number, result)
            if result["image_id"] in self.images:
                yield number, result

    def shares(self, results: Sequence[dict]) -> list[_Share]:
        """The results that count by class, in shares of about `DETECTIONS_AT_ONCE`; at least one share."""
        by_class: dict[int, list[tuple[int, dict]]] = {category_id: [] for category_id in self.category_ids}
        for number, result in self.counted(results):
            by_class[result["category_id"]].append((number, result))
        shares = [_Share([], [])]
        for category_id, numbered in by_class.items():
            if shares[-1].numbered and len(shares[-1].numbered) + len(numbered) > DETECTIONS_AT_ONCE:
                shares.append(_Share([], []))
            shares[-1].category_ids.append(category_id)
            shares[-1].numbered.extend(numbered)
        return shares

    def detections(self, numbered: Iterable[tuple[int, dict]], *, masks: bool) -> COCO:
        """Counted results, indexed, without box where `masks` are scored and without mask where they are not."""
        entries = [self._detection(number, result, masks) for number, result in numbered]
        if masks and entries:
            areas = rle_api.area([entry["segmentation"] for entry in entries])
            for entry, area in zip(entries, areas.tolist(), strict=True):
                entry["area"] = area
        return self._indexed(entries)

    def _indexed(self, entries: list[dict]) -> COCO:
        index = COCO()
        images = [{"id": key, "height": self.sizes[key][0], "width": self.sizes[key][1]} for key in sorted(self.images)]
        categories = [{"id": category_id} for category_id in self.category_ids]
        index.dataset = {"images": images, "categories": categories, "annotations": entries}
        index.createIndex()
        return index

    def _object(self, truth: GroundTruth, row: int, masks_wanted: bool) -> dict:
        category_id, area = int(truth.category_ids[row]), float(truth.areas[row])
        if category_id not in self.category_ids:
            raise DataError(
                f"{self.source}: annotation id {truth.ids[row]}: category_id {category_id} is not in 'categories'; "
                "add or correct it"
            )
        entry = {"image_id": int(truth.image_ids[truth.image_rows[row]]), "category_id": category_id}
        entry |= {"bbox": truth.coco_boxes[row].tolist(), "iscrowd": int(truth.crowd[row])}
        if masks_wanted:
            entry["segmentation"] = truth.rle(row)
        if math.isnan(area):
            area = float(rle_api.area(entry["segmentation"])) if masks_wanted else math.prod(entry["bbox"][2:])
        return entry | {"area": area}

    def _check(self, number: int, result: dict) -> None:
        """Refuse a result whose image, class or score cannot be used; `number` is its place in the list, from 0."""
        try:
            image_id, category_id, score = result["image_id"], result["category_id"], result["score"]
        except (KeyError, TypeError) as error:
            raise _incomplete(number, result, error) from None
        if image_id not in self.sizes:
            raise DataError(f"result {number}: image {image_id!r} is not in {self.source}; score it with its file")
        if category_id not in self.category_ids:
            raise DataError(
                f"result {number}: category_id {category_id!r} is not in {self.source}; allowed are "
                f"{_shortened(sorted(self.category_ids))}. Were class channels written instead of category ids?"
            )
        if not math.isfinite(score):
            raise DataError(f"result {number}: score {score} (image {image_id}); allowed are finite numbers")

    def _detection(self, number: int, result: dict, masks: bool) -> dict:
        """One checked result: result `number` of the list becomes detection `number` + 1."""
        try:
            shape = result["segmentation"] if masks else result["bbox"]
        except KeyError as error:
            raise _incomplete(number, result, error) from None
        image_id = result["image_id"]
        entry = {"id": number + 1, "image_id": image_id, "category_id": result["category_id"]}
        entry |= {"score": result["score"], "iscrowd": 0}
        if not masks:
            return entry | {"bbox": shape, "area": shape[2] * shape[3]}
        if not isinstance(shape, dict) or not isinstance(shape.get("counts"), str | bytes):
            raise DataError(f"result {number}: segmentation {_shortened(shape)}; allowed is a compressed RLE")
        height, width = self.sizes[image_id]
        if list(shape["size"]) != [height, width]:
            raise DataError(
                f"result {number}: a mask of size {list(shape['size'])}, but image {image_id} has height and width "
                f"{height}, {width}; masks are scored at the original size"
            )
        return entry | {"segmentation": shape}


def _incomplete(number: int, result: object, error: Exception) -> DataError:
    return DataError(
        f"result {number}: no {error} ({_shortened(result)}); scoring boxes needs 'bbox', scoring masks "
        "'segmentation', both 'image_id', 'category_id' and 'score'. Leave out kinds that were not predicted"
    )


def _distinct_names(classes: ClassMap) -> list[str]:
    """Names of the categories; where one comes more than once, its id is added."""
    counts = Counter(classes.names)
    return [
        name if counts[name] == 1 else f"{name} ({category_id})"
        for name, category_id in zip(classes.names, classes.category_ids, strict=True)
    ]


def _best_detections(entries: list[dict], most: int) -> list[dict]:
    """Detections by falling score (equal ones by image), at most so many of a class in an image."""
    counts: Counter = Counter()
    best = []
    for entry in sorted(entries, key=lambda entry: (-entry["score"], entry["image_id"])):
        key = entry["image_id"], entry["category_id"]
        counts[key] += 1
        if counts[key] <= most:
            best.append(entry)
    return best


def _places(entries: list[dict]) -> dict[tuple[int, int], list[int]]:
    """Image and category -> places of its entries in the list."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, entry in enumerate(entries):
        places[entry["image_id"], entry["category_id"]].append(place)
    return places


def _rows(entries: list[dict], images: dict[int, int], classes: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Image row and class row of every entry."""
    rows = [images[entry["image_id"]] for entry in entries]
    return np.array(rows, dtype=np.int64), np.array([classes[e["category_id"]] for e in entries], dtype=np.int64)


def _summarise(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """COCO's twelve numbers.

    Args:
        precision: (thresholds, recalls, classes, areas, detections per image 1 / 10 / 100), -1 without ground truth.
        recall: (thresholds, classes, areas, detections per image), likewise.
    """
    recalls = {f"AR{count}": _mean(recall[:, :, _ALL, index]) for index, count in enumerate((1, 10, 100))}
    sizes = {"ARs": _SMALL, "ARm": _MEDIUM, "ARl": _LARGE}
    recalls |= {name: _mean(recall[:, :, size, -1]) for name, size in sizes.items()}
    return _average_precisions(precision) | recalls


def _average_precisions(precision: np.ndarray) -> dict[str, float]:
    best = precision[..., -1]  # all detections of an image: (thresholds, recalls, classes, areas)
    parts = (best[..., _ALL], best[_AP50, ..., _ALL], best[_AP75, ..., _ALL], best[..., _SMALL], best[..., _MEDIUM])
    return dict(zip(AP_COLUMNS, map(_mean, (*parts, best[..., _LARGE])), strict=True))


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _shortened(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
