"""Where mask AP is lost: every false positive typed, and the AP gained by repairing each type.

After "TIDE" (Bolya et al., ECCV 2020), with types of SOLQ's own. Paper: appendix A.5, fig. 6.

COCO's matching is done first, at each of its ten thresholds t of mask IoU. A detection that then is neither a true
positive nor ignored has one type, the first of these that fits; "its object" is the one that the detection's box lies
on (`DetectionTable.about`):

    background   its box lies on no object
    class        its object is of another class
    duplicate    its object is found by a better scored detection
    siamese      at least `SIAMESE_LEAK` of its mask lies on neighbours of its object (`DetectionTable.leak`): it covers
                 two objects, or it is the neighbour's. Where two neighbours get one and the same mask, half or more of
                 what it has on the two lies, for one of them, on the wrong one
    codec        codec truncation: even the object's own mask, encoded and decoded, has an IoU below t
    box          the object's own vector, decoded and pasted into the predicted box, has an IoU below t
    vector       vector regression: all that is left; box and codec would do, but the vector is off

and an object that is not found, and that no detection of the types class, siamese, codec, box and vector is about, is

    missed

Repairing a type removes its detections, but where one of them is about an object that is not found, the best scored one
becomes a true positive, in its object's class and with its own score. Repairing the missed ones removes them from the
objects to find; a class without objects then counts 1 where no false positive is left in it, otherwise 0.

Repaired alone, gains do not add up: two faults can hide each other. Repaired in turn, in the order of `ERRORS`, each on
top of the ones before, they do: the AP that was there and the eight gains are exactly 1.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from solq_lab.codecs.base import MaskCodec
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.evaluation.sizes import area_ranges, describe_sizes
from solq_lab.schema import EvaluationSection
from solq_lab.studies.overlaps import Overlaps, measure_overlaps
from solq_lab.studies.rules import THRESHOLDS, UNMATCHED, average_precision, match_detections

ERRORS = ("missed", "background", "class", "duplicate", "box", "siamese", "codec", "vector")  # repaired in this order
SIAMESE_LEAK = 0.2
OCCLUSIONS = (0.05, 0.2)  # bounds between free, touched and crowded objects: share of the box on other objects

_ROW = {error: row for row, error in enumerate(ERRORS)}
_ABOUT_OBJECTS = ("class", "box", "siamese", "codec", "vector")  # a repaired one can find its object


class GroupErrors(NamedTuple):
    """What one group of objects loses."""

    objects: int  # how many count
    ap: float  # mask AP as it is, 0..1; NaN without objects
    alone: dict[str, float]  # error -> AP gained when this type alone is repaired
    # error -> AP gained when it is repaired after those before it in `ERRORS`; with `ap` they sum to 1
    in_turn: dict[str, float]


class ErrorCase(NamedTuple):
    """One error, for a gallery."""

    error: str  # type
    threshold: float  # the lowest threshold at which it is one
    image_id: int
    result: int | None  # place of the detection in the list of results; None for a missed object
    object_id: int | None  # annotation id of the object it is about; None for background
    score: float  # of the detection; NaN for a missed object
    overlap: float  # mask IoU with the object


@dataclass(frozen=True)
class ErrorAnalysis:
    """Where mask AP is lost."""

    # name -> losses: "all", by size "small", "medium", "large", by occlusion "free", "touched", "crowded"
    groups: dict[str, GroupErrors]
    legend: str  # what the groups are, one line
    overlaps: Overlaps  # what the types were made from
    # (10, F) at each threshold the row of `ERRORS` of each detection, -1 for true positives and ignored ones
    types: np.ndarray
    missed: np.ndarray  # (10, A) bool, at each threshold the missed objects

    def worst(self, error: str, count: int) -> list[ErrorCase]:
        """The worst cases of a type: first those that are wrong at the lowest threshold, then by falling score, or for
        missed objects by falling area. An object or detection comes once.

        Raises:
            ValueError: an unknown type.
        """
        if error not in ERRORS:
            raise ValueError(f"error type {error!r}: allowed are {', '.join(ERRORS)}")
        objects, detections = self.overlaps.objects, self.overlaps.detections
        wrong = self.missed if error == "missed" else self.types == _ROW[error]
        rows = np.flatnonzero(wrong.any(axis=0))
        first = wrong[:, rows].argmax(axis=0)
        better = objects.areas[rows] if error == "missed" else detections.scores[rows]

        cases = []
        for place in np.lexsort((-better, first))[:count]:
            row, threshold = rows[place], THRESHOLDS[first[place]]
            if error == "missed":
                image_id, object_id = int(objects.image_ids[row]), int(objects.ids[row])
                cases.append(ErrorCase(error, threshold, image_id, None, object_id, math.nan, 0.0))
                continue
            about = detections.about[row]
            its_object = None if about == UNMATCHED else int(objects.ids[about])
            score, overlap = float(detections.scores[row]), float(detections.overlap[row])
            image_id, result = int(detections.image_ids[row]), int(detections.results[row])
            cases.append(ErrorCase(error, threshold, image_id, result, its_object, score, overlap))
        return cases

    def rank_correlation(self) -> float:
        """Spearman's rank correlation of score and mask IoU, over the best detection of every object that has one of
        IoU 0.5 or more; NaN for fewer than two."""
        detections = self.overlaps.detections
        found = np.flatnonzero((detections.about != UNMATCHED) & (detections.overlap >= THRESHOLDS[0]))
        best_first = found[np.argsort(-detections.overlap[found], kind="stable")]
        _, first = np.unique(detections.about[best_first], return_index=True)
        best = best_first[first]
        if len(best) < 2:
            return math.nan
        return float(spearmanr(detections.scores[best], detections.overlap[best]).statistic)

    def frame(self) -> pd.DataFrame:
        """AP of every group, percent, and the points that repairing each type in turn gains; they add up to 100."""
        rows = {
            name: [group.objects, 100 * group.ap, *(100 * group.in_turn[error] for error in ERRORS)]
            for name, group in self.groups.items()
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["objects", "AP", *ERRORS])
        return frame.astype({"objects": int})


def analyse_errors(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    codec: MaskCodec | None,
    settings: EvaluationSection = DEFAULTS,
) -> ErrorAnalysis:
    """Types every error of a model's results, and measures how much mask AP each type costs.

    Args:
        annotations: COCO instances file, its parsed content, or its `GroundTruth` with all objects.
        results: COCO results with boxes and masks; may be empty.
        codec: the codec of the model; None for one whose masks do not come from vectors (SQR): then no error is
            "codec", and "box" ones are those whose boxes have an IoU below t.
        settings: bounds of small and medium objects, detections of a class in an image that are scored, and images.

    Raises:
        DataError: annotations or results cannot be used, or a result has no box or no mask.
    """
    for number, result in enumerate(results):
        if "bbox" not in result or "segmentation" not in result:
            lacking = "box" if "segmentation" in result else "mask"
            raise DataError(
                f"result {number} has no {lacking}; the analysis of errors needs 'bbox' and 'segmentation' in every "
                "result. A plain detector has no masks to analyse"
            )
    if not isinstance(annotations, GroundTruth):
        annotations = GroundTruth(annotations, keep="all")
    evaluate_results(annotations, results, settings, kinds=("segm",))  # checks both
    overlaps, sides = measure_overlaps(annotations, results, codec, settings), settings.area_sides

    objects, detections, (low, high) = overlaps.objects, overlaps.detections, OCCLUSIONS
    outcomes = {"all": _Outcome(overlaps, np.full(len(objects.ids), True), np.full(len(detections.scores), True))}
    for measured, ranges in (
        ("areas", area_ranges(sides)),
        ("occlusion", {"free": (0, low), "touched": (low, high), "crowded": (high, math.inf)}),
    ):
        for name, (least, most) in ranges.items():
            both = (getattr(objects, measured), getattr(detections, measured))
            outcomes[name] = _Outcome(overlaps, *((least <= values) & (values <= most) for values in both))
    legend = (
        f"{describe_sizes(sides)}\nfree: at most {100 * low:g} % of the box on other objects, "
        f"touched: at most {100 * high:g} %"
    )
    groups = {name: outcome.losses() for name, outcome in outcomes.items()}
    return ErrorAnalysis(groups, legend, overlaps, outcomes["all"].types, outcomes["all"].missed)


class _Outcome:
    """COCO's matching as far as a group of objects is concerned.

    Objects outside the group are ignored, and so are detections that match one, or match none and lie outside too.
    """

    def __init__(self, overlaps: Overlaps, objects_inside: np.ndarray, detections_inside: np.ndarray) -> None:
        self.objects, self.detections = overlaps.objects, overlaps.detections
        self.classes = len(overlaps.class_names)
        self.counts = objects_inside & ~self.objects.crowd  # (A,) bool, objects to find
        count = len(self.detections.scores)
        matched = match_detections(
            *overlaps.pairs, count=count, crowd=self.objects.crowd, ignored=~self.counts, thresholds=THRESHOLDS
        )
        # (10, F) bool at each threshold; neither where a detection is ignored. UNMATCHED, -1, reads the False.
        self.true_positive = np.append(self.counts, False)[matched]
        self.false_positive = (matched == UNMATCHED) & detections_inside
        # (10, A + 1) the detection that finds each object, F for none; the last column is for `UNMATCHED`.
        self.found_by = np.full((len(THRESHOLDS), len(self.counts) + 1), count)
        row, detection = np.nonzero(self.true_positive)
        self.found_by[row, matched[row, detection]] = detection
        self.types = np.where(matched == UNMATCHED, self._type_of_each(), UNMATCHED)  # (10, F), -1 where one matches

        # An object is not missed where a false positive would find it once it is repaired.
        claimed = np.zeros((len(THRESHOLDS), len(self.counts)), dtype=bool)
        row, detection = np.nonzero(_among(self.types, _ABOUT_OBJECTS))
        claimed[row, self.detections.about[detection]] = True
        self.missed = self.counts & (self.found_by[:, :-1] == count) & ~claimed  # (10, A) bool
        self.to_find = self._per_class(self.counts)

    def losses(self) -> GroupErrors:
        """The AP of the group and the gains of all repairs."""
        ap = self._ap(())
        alone = {error: self._ap((error,)) - ap for error in ERRORS}
        steps = [ap, *(self._ap(ERRORS[: last + 1]) for last in range(len(ERRORS)))]
        in_turn = dict(zip(ERRORS, np.diff(steps).tolist(), strict=True))
        return GroupErrors(int(self.counts.sum()), ap, alone, in_turn)

    def _type_of_each(self) -> np.ndarray:
        """(10, F) rows of `ERRORS`, as if every detection were a false positive."""
        about, threshold = self.detections.about, THRESHOLDS[:, None]
        fits = {
            "background": about == UNMATCHED,
            "class": np.append(self.objects.classes, UNMATCHED)[about] != self.detections.classes,
            "duplicate": self.found_by[:, about] < np.arange(len(about)),
            "siamese": self.detections.leak >= SIAMESE_LEAK,
            "codec": np.append(self.objects.ceiling, 0.0)[about] < threshold,
            "box": self.detections.reach < threshold,
        }
        conditions = [np.broadcast_to(fit, self.true_positive.shape) for fit in fits.values()]
        return np.select(conditions, [_ROW[error] for error in fits], default=_ROW["vector"])

    def _ap(self, repaired: Collection[str]) -> float:
        """Mean over thresholds and classes with these types repaired."""
        if not self.counts.any():
            return math.nan
        values = [np.nanmean(self._class_aps(row, repaired)) for row in range(len(THRESHOLDS))]
        return float(np.mean(values))

    def _class_aps(self, row: int, repaired: Collection[str]) -> np.ndarray:
        """(S,) at one threshold; NaN for classes without objects."""
        types, to_find, classes = self.types[row], self.to_find, self.detections.classes
        gone = _among(types, repaired)
        true_positive, false_positive = self.true_positive[row], self.false_positive[row] & ~gone

        # Of the repaired detections about an object that nothing finds, the best scored one finds it.
        finders = np.flatnonzero(gone & _among(types, _ABOUT_OBJECTS))
        about = self.detections.about[finders]
        needed = self.counts[about] & (self.found_by[row, about] == len(types))
        sought, first = np.unique(about[needed], return_index=True)
        if len(sought):
            winners = finders[needed][first]
            true_positive, classes = true_positive.copy(), classes.copy()
            true_positive[winners], classes[winners] = True, self.objects.classes[sought]

        if "missed" in repaired:
            to_find = to_find - self._per_class(self.missed[row])
        aps = average_precision(true_positive, false_positive, classes, to_find)
        emptied = (self.to_find > 0) & (to_find == 0)
        clean = np.bincount(classes[false_positive], minlength=len(to_find)) == 0
        return np.where(emptied, clean, aps)

    def _per_class(self, objects: np.ndarray) -> np.ndarray:
        """(S,) how many of these objects, (A,) bool, each class has."""
        return np.bincount(self.objects.classes[objects], minlength=self.classes)


def _among(types: np.ndarray, errors: Collection[str]) -> np.ndarray:
    """Whether each of these rows of `ERRORS`, -1 for no error, is one of `errors`."""
    return np.isin(types, [_ROW[error] for error in errors])
