"""COCO evaluation of boxes, masks and mask boundaries. Paper: section 4.1 and table 4.

Matching and precision-recall curves are faster-coco-eval's (pycocotools' numbers, in C++). A segmentation result is
scored without its box, so that its area, which decides between small, medium and large, is the mask's.
Boundary AP replaces the IoU of a pair by min(mask IoU, boundary IoU); the boundary of a mask is the mask minus its
erosion by a 3 x 3 square, repeated round(ratio * diagonal) times but at least once, the outside of the image counting
as background. Against a crowd region a pair keeps its mask IoU.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle_api

from solq_lab.allocation import collecting_no_garbage
from solq_lab.data.annotations import DataError, shorten
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

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # area ranges, in the order of faster-coco-eval's arrays
_AR_LIMITS = (1, 10, 100)  # detections of a class in an image
_AP50, _AP75 = 0, 5  # rows of the ten IoU thresholds 0.50, 0.55, ... 0.95


@collecting_no_garbage()  # it makes dictionaries by the hundred thousand, in no cycle
def evaluate_results(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    settings: EvaluationSection = DEFAULTS,
    *,
    kinds: Collection[str] = KINDS,
    image_ids: Collection[int] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Scores results in COCO's format against ground truth.

    Args:
        annotations: COCO instances file, its parsed content (left unchanged), or a `GroundTruth` that kept all objects.
        results: one dictionary per detection: "image_id", "category_id", "score", "bbox" (x, y, w, h) in image pixels
            where boxes are scored, "segmentation" (compressed RLE at image size) where masks are. May be empty; left
            unchanged.
        settings: what is small and what a boundary (`area_sides`, `boundary_ratio`), how many images (`max_images`),
            and how many detections of a class in an image are scored, the best ones (`top_k`). AR1, AR10 and AR100 are
            at most at 1, 10 and 100 of them; all other numbers are of all of them.
        kinds: which of "box", "segm", "boundary".
        image_ids: images to evaluate; results elsewhere are left out. None: those of `settings`.
        should_stop: called every few classes. None: never.

    Returns:
        The twelve COCO numbers of each kind and the six APs per class. Without results they are 0; where nothing could
        have been found (no ground truth of that class or size) they are NaN.

    Raises:
        DataError: the annotations or a result cannot be used; the message names the entry and the cure.
        ValueError: an unknown kind.
        EvaluationStopped: `should_stop` returned True.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"evaluation kinds {unknown or list(kinds)}: allowed are {', '.join(KINDS)}")
    data = ScoringData(annotations, settings, image_ids, with_masks=any(kind != "box" for kind in kinds))
    shares = data.shares(results)
    metrics: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {name: {} for name in data.class_names}

    for kind in (kind for kind in KINDS if kind in kinds):
        # Classes are independent, so a few of them at a time bound the memory.
        precisions, recalls = [], []
        for share in shares:
            if should_stop is not None and should_stop():
                raise EvaluationStopped("the scoring was asked to stop")
            evaluator = data.match(share, kind)
            evaluator.accumulate()
            precisions.append(evaluator.eval["precision"])
            recalls.append(evaluator.eval["recall"])

        precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)
        metrics |= {f"{kind}.{name}": value for name, value in _summarise(precision, recall, settings.top_k).items()}
        for channel, name in enumerate(data.class_names):
            numbers = _average_precisions(precision[:, :, channel : channel + 1])
            per_class[name] |= {f"{kind}.{number}": value for number, value in numbers.items()}
    sizes, boundary, limit = settings.area_sides, settings.boundary_ratio, settings.top_k
    return Evaluation(metrics, per_class, sizes, boundary, len(data.images), limit)


class ClassShare(NamedTuple):
    """Some of the classes, by rising category id, and their results, each with its place in the list."""

    category_ids: list[int]
    numbered: list[tuple[int, dict]]


class _MaskEvaluator(COCOeval_faster):
    """Compares masks as they are, and boundaries of those that overlap enough to match.

    faster-coco-eval would first decode each mask and encode it again, and make every boundary.
    """

    with_boundaries = False

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray:
        """(F, K) overlaps of the best detections, by falling score, with the objects of a class in an image."""
        objects, detections = (
            [entry for entry in index.imgToAnns[imgId] if entry["category_id"] == catId]
            for index in (self.cocoGt, self.cocoDt)
        )
        detections = sorted(detections, key=lambda entry: -entry["score"])[: self.params.maxDets[-1]]
        found, true = ([entry["segmentation"] for entry in entries] for entries in (detections, objects))
        crowd = [entry["iscrowd"] for entry in objects]
        overlaps = rle_api.iou(found, true, crowd)  # pycocotools takes ten times as long to look at its arguments
        if not (self.with_boundaries and len(overlaps)):
            return overlaps

        # The smaller of both IoUs counts: below the lowest threshold the other one changes nothing.
        close = (overlaps >= self.params.iouThrs[0]) & ~np.array(crowd, dtype=bool)
        rows, columns = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
        pairs = np.ix_(rows, columns)
        if len(rows):
            detected, annotated = (
                [rle_api.rleToBoundary(masks[place], self.boundary_dilation_ratio) for place in places.tolist()]
                for masks, places in ((found, rows), (true, columns))
            )
            overlaps[pairs] = np.minimum(overlaps[pairs], rle_api.iou(detected, annotated, [0] * len(columns)))
        return overlaps


class ScoringData:
    """The images, classes and objects that count, in the form faster-coco-eval reads."""

    def __init__(
        self,
        annotations: str | Path | dict | GroundTruth,
        settings: EvaluationSection,
        image_ids: Collection[int] | None = None,
        *,
        with_masks: bool,
    ) -> None:
        """Arguments as for `evaluate_results`."""
        self.settings, truth = settings, annotations
        if not isinstance(truth, GroundTruth):
            truth = GroundTruth(truth, with_masks=with_masks, keep="all")
        if truth.keep != "all" or (with_masks and not truth.has_masks):
            raise ValueError('scoring needs GroundTruth(..., keep="all"), with masks where masks are scored')
        self.source = str(truth.source)
        # Image id -> (height, width), pixels, of all images of the file.
        self.sizes = dict(zip(truth.image_ids.tolist(), map(tuple, truth.sizes.tolist()), strict=True))
        if image_ids is None:
            image_ids = list(self.sizes)[: settings.max_images]
        try:
            chosen = {key: self.sizes[key] for key in image_ids}
        except KeyError as error:
            raise DataError(f"{self.source}: no image of id {error}; image_ids are those of this file") from None
        self.images = {key: {"id": key, "height": size[0], "width": size[1]} for key, size in chosen.items()}

        # Of all classes, by rising id.
        classes = ClassMap.from_categories(truth.categories, source=self.source)
        self.category_ids = list(classes.category_ids)
        self._known = set(self.category_ids)
        counts = Counter(classes.names)
        self.class_names = [
            name if counts[name] == 1 else f"{name} ({category_id})"
            for name, category_id in zip(classes.names, classes.category_ids, strict=True)
        ]
        self.objects = self._read_objects(truth, with_masks)

    def _read_objects(self, truth: GroundTruth, with_masks: bool) -> list[dict]:
        """Entries of the images to evaluate, numbered from 1: faster-coco-eval takes id 0 for "not matched"."""
        objects: list[dict] = []
        columns = (truth.image_ids[truth.image_rows], truth.ids, truth.category_ids, truth.coco_boxes, truth.crowd)
        for row, (image_id, key, category_id, box, crowd) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True)
        ):
            if image_id not in self.images:
                continue
            if category_id not in self._known:
                raise DataError(
                    f"{self.source}: annotation id {key}: category_id {category_id} is not in 'categories'; "
                    "add or correct it"
                )

            entry = {"id": len(objects) + 1, "image_id": image_id, "category_id": category_id, "bbox": box}
            if with_masks:
                entry["segmentation"] = truth.rle(row)
            area = float(truth.areas[row])
            if math.isnan(area):
                area = float(rle_api.area(entry["segmentation"])) if with_masks else box[2] * box[3]
            objects.append(entry | {"area": area, "iscrowd": int(crowd)})
        return objects

    def counted(self, results: Sequence[dict]) -> Iterator[tuple[int, dict]]:
        """The results that count, checked but for their shapes, each with its place in the list."""
        for number, result in enumerate(results):
            self._check(number, result)
            if result["image_id"] in self.images:
                yield number, result

    def shares(self, results: Sequence[dict]) -> list[ClassShare]:
        """The results that count by class, in shares of about `DETECTIONS_AT_ONCE`; at least one share."""
        by_class: dict[int, list[tuple[int, dict]]] = {category_id: [] for category_id in self.category_ids}
        for number, result in self.counted(results):
            by_class[result["category_id"]].append((number, result))
        shares = [ClassShare([], [])]
        for category_id, numbered in by_class.items():
            if shares[-1].numbered and len(shares[-1].numbered) + len(numbered) > DETECTIONS_AT_ONCE:
                shares.append(ClassShare([], []))
            shares[-1].category_ids.append(category_id)
            shares[-1].numbered.extend(numbered)
        return shares

    def match(self, share: ClassShare, kind: str) -> COCOeval_faster:
        """faster-coco-eval after matching the results of some classes."""
        category_ids = set(share.category_ids)
        # Copies, because an evaluation writes into the entries.
        objects = [dict(entry) for entry in self.objects if entry["category_id"] in category_ids]
        detections = [self._detection(number, result, masks=kind != "box") for number, result in share.numbered]
        if kind != "box" and detections:
            areas = rle_api.area([entry["segmentation"] for entry in detections])
            for entry, area in zip(detections, areas.tolist(), strict=True):
                entry["area"] = area

        evaluator = (COCOeval_faster if kind == "box" else _MaskEvaluator)(
            self._index(objects, share.category_ids),
            self._index(detections, share.category_ids),
            "bbox",
            boundary_dilation_ratio=self.settings.boundary_ratio,
            print_function=logger.debug,
            ranges={size: list(bounds) for size, bounds in area_ranges(self.settings.area_sides).items()},
        )
        evaluator.with_boundaries = kind == "boundary"
        evaluator.params.maxDets = _limits(self.settings.top_k)
        evaluator.evaluate()
        return evaluator

    def _index(self, entries: list[dict], category_ids: list[int]) -> COCO:
        index = COCO()
        categories = [{"id": category_id} for category_id in category_ids]
        index.dataset = {"images": list(self.images.values()), "categories": categories, "annotations": entries}
        index.createIndex()
        return index

    def _check(self, number: int, result: dict) -> None:
        """Reject a result whose image, class or score cannot be used; `number` is its place in the list, from 0."""
        try:
            image_id, category_id, score = result["image_id"], result["category_id"], result["score"]
        except (KeyError, TypeError) as error:
            raise _incomplete(number, result, error) from None
        if image_id not in self.sizes:
            raise DataError(f"result {number}: image {image_id!r} is not in {self.source}; score it with its file")
        if category_id not in self._known:
            raise DataError(
                f"result {number}: category_id {category_id!r} is not in {self.source}; allowed are "
                f"{shorten(self.category_ids)}. Were class channels written instead of category ids?"
            )
        if not math.isfinite(score):
            raise DataError(f"result {number}: score {score} (image {image_id}); allowed are finite numbers")

    def _detection(self, number: int, result: dict, *, masks: bool) -> dict[str, Any]:
        """One checked result with its box or its mask; result `number` of the list becomes detection `number` + 1."""
        try:
            shape = result["segmentation"] if masks else result["bbox"]
        except KeyError as error:
            raise _incomplete(number, result, error) from None
        image_id = result["image_id"]
        entry = {
            "id": number + 1,
            "image_id": image_id,
            "category_id": result["category_id"],
            "score": result["score"],
            "iscrowd": 0,
            "segmentation" if masks else "bbox": shape,
        }
        if not masks:
            entry["area"] = shape[2] * shape[3]
            return entry

        if not isinstance(shape, dict) or not isinstance(shape.get("counts"), str | bytes):
            raise DataError(f"result {number}: segmentation {shorten(shape)}; allowed is a compressed RLE")
        height, width = self.sizes[image_id]
        if list(shape["size"]) != [height, width]:
            raise DataError(
                f"result {number}: a mask of size {list(shape['size'])}, but image {image_id} has height and width "
                f"{height}, {width}; masks are scored at the original size"
            )
        return entry


def _incomplete(number: int, result: object, error: Exception) -> DataError:
    return DataError(
        f"result {number}: no {error} ({shorten(result)}); scoring boxes needs 'bbox', scoring masks "
        "'segmentation', both 'image_id', 'category_id' and 'score'. Leave out kinds that were not predicted"
    )


def _limits(max_detections: int) -> list[int]:
    """Numbers of detections per class and image that recall is measured at; the last one is of all that are scored."""
    return sorted({min(count, max_detections) for count in (*_AR_LIMITS, max_detections)})


def _summarise(precision: np.ndarray, recall: np.ndarray, max_detections: int) -> dict[str, float]:
    """COCO's twelve numbers.

    Args:
        precision: (thresholds, recalls, classes, areas, `_limits`), -1 without ground truth.
        recall: (thresholds, classes, areas, `_limits`), likewise.
        max_detections: of a class in an image that are scored.
    """
    place = {count: _limits(max_detections).index(min(count, max_detections)) for count in _AR_LIMITS}
    recalls = {f"AR{count}": _mean(recall[:, :, _ALL, place[count]]) for count in _AR_LIMITS}
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
