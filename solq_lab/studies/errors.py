"""Where mask AP is lost: every wrong detection typed, and the AP that repairing each type gives back.

After "TIDE" (Bolya et al., ECCV 2020), with types of SOLQ's own. Paper: appendix A.5, fig. 6.

COCO's matching is done first, at each of its ten thresholds t of mask IoU. What then is neither right nor ignored has
one type, the first of these that fits; "its object" is the one that the detection's box lies on (`Found.about`):

    background   its box lies on no object
    class        its object is of another class
    duplicate    its object is found by a better scored detection
    siamese      at least `SIAMESE_LEAK` of its mask lies on neighbours of its object (`Found.leak`): it covers two
                 objects, or it is the neighbour's. Where two neighbours get one and the same mask, half or more of what
                 it has on the two lies, for one of them, on the wrong one
    codec        codec truncation: even the object itself, sent through the mask code, has an IoU below t
    box          the object's own vector, decoded and pasted into the predicted box, has an IoU below t
    vector       vector regression: all that is left; the box would do and the code too, but the vector is off

and an object that is not found, and that no detection of the types class, siamese, codec, box and vector is about, is

    missed

Repairing a type takes its detections away, but where one of them is about an object that is not found, the best scored
one becomes right, in its object's class and with its own score. Repairing the missed ones takes them out of the count;
a class that has no objects left then counts 1 where nothing wrong is left in it, otherwise 0.

Repaired alone, gains do not add up: two faults can hide each other. Repaired in turn, in the order of `ERRORS`, each on
top of the ones before, they do: the AP that was there and the eight gains are exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from solq_lab.codecs.base import MaskCodec
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.studies.overlaps import Overlaps, measure_overlaps
from solq_lab.studies.rules import THRESHOLDS, UNMATCHED, average_precision, match_detections

ERRORS = ("missed", "background", "class", "duplicate", "box", "siamese", "codec", "vector")  # repaired in this order
SIAMESE_LEAK = 0.2
OCCLUSIONS = (0.05, 0.2)  # bounds between free, touched and crowded objects: share of the box on other objects

_ROW = {error: row for row, error in enumerate(ERRORS)}
_MADE_RIGHT = ("class", "box", "siamese", "codec", "vector")  # their detections are about an object, and can find it


class GroupErrors(NamedTuple):
    """What one group of objects loses.

    objects: how many count.
    ap: mask AP as it is, 0..1; NaN without objects.
    alone: error -> AP gained when this type alone is repaired.
    in_turn: error -> AP gained when it is repaired after those before it in `ERRORS`; with `ap` they sum to 1.
    """

    objects: int
    ap: float
    alone: dict[str, float]
    in_turn: dict[str, float]


class ErrorCase(NamedTuple):
    """One error, for a gallery.

    error: its type.
    threshold: the lowest threshold at which it is one.
    image_id: its image.
    result: place of the detection in the list of results; None for a missed object.
    object_id: annotation id of the object it is about; None for background.
    score: of the detection; NaN for a missed object.
    overlap: mask IoU with the object.
    """

    error: str
    threshold: float
    image_id: int
    result: int | None
    object_id: int | None
    score: float
    overlap: float


@dataclass(frozen=True)
class ErrorAnalysis:
    """Where mask AP is lost.

    groups: name -> losses: "all", by size "small", "medium", "large", by occlusion "free", "touched", "crowded".
    legend: what the groups are, one line.
    overlaps: what the types were made from.
    types: (10, F) at each threshold the row of `ERRORS` of each detection, -1 where it is right or ignored.
    missed: (10, A) bool, at each threshold the missed objects.
    """

    groups: dict[str, GroupErrors]
    legend: str
    overlaps: Overlaps
    types: np.ndarray
    missed: np.ndarray

    def worst(self, error: str, count: int) -> list[ErrorCase]:
        """The worst cases of a type: first those that are wrong at the lowest threshold, then the surest, then (for
        missed objects) the largest. An object or detection comes once.

        Raises:
            ValueError: an unknown type.
        """
        if error not in ERRORS:
            raise ValueError(f"error type {error!r}: allowed are {', '.join(ERRORS)}")
        truth, found = self.overlaps.truth, self.overlaps.found
        wrong = self.missed if error == "missed" else self.types == _ROW[error]
        rows = np.flatnonzero(wrong.any(axis=0))
        first = wrong[:, rows].argmax(axis=0)
        better = truth.areas[rows] if error == "missed" else found.scores[rows]
        chosen = np.lexsort((-better, first))[:count]
        if error == "missed":
            return [
                ErrorCase(error, THRESHOLDS[at], int(truth.image_ids[row]), None, int(truth.ids[row]), math.nan, 0.0)
                for row, at in zip(rows[chosen], first[chosen], strict=True)
            ]
        return [self._case(error, row, THRESHOLDS[at]) for row, at in zip(rows[chosen], first[chosen], strict=True)]

    def _case(self, error: str, row: int, threshold: float) -> ErrorCase:
        truth, found = self.overlaps.truth, self.overlaps.found
        about = found.about[row]
        object_id = None if about == UNMATCHED else int(truth.ids[about])
        image_id, place = int(found.image_ids[row]), int(found.results[row])
        return ErrorCase(
            error, threshold, image_id, place, object_id, float(found.scores[row]), float(found.overlap[row])
        )

    def table(self) -> str:
        """AP of every group and the AP points that each type gives back in turn, as aligned text; a row sums to 100."""
        head = f"{'':<9}{'objects':>8}{'AP':>7}" + "".join(f"{error:>12}" for error in ERRORS)
        rows = [
            f"{name:<9}{group.objects:>8}{_points(group.ap):>7}"
            + "".join(f"{_points(group.in_turn[error], sign='+'):>12}" for error in ERRORS)
            for name, group in self.groups.items()
        ]
        return "\n".join([head, *rows, self.legend])


def analyse_errors(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    codec: MaskCodec | None,
    *,
    area_sides: tuple[float, float] = DEFAULTS.area_sides,
    occlusions: tuple[float, float] = OCCLUSIONS,
    image_ids: Collection[int] | None = None,
) -> ErrorAnalysis:
    """Types every error of a model's results, and says how much mask AP each type costs.

    Args:
        annotations: COCO instances file, its parsed content, or its `GroundTruth` with all objects.
        results: COCO results with boxes and masks; may be empty.
        codec: the mask code of the model; None for one whose masks do not come from codes (SQR): then no error is
            "codec", and "box" ones are those whose boxes have an IoU below t.
        area_sides: square roots of the areas, pixels, that part small from medium and medium from large objects.
        occlusions: shares of an object's box on other objects that part free from touched, and touched from crowded.
        image_ids: images to look at. None: all.

    Raises:
        DataError: annotations or results cannot be used, or a result has no box or no mask.
    """
    _check_shapes(results)
    if not isinstance(annotations, GroundTruth):
        annotations = GroundTruth(annotations, keep="all")
    evaluate_results(annotations, results, kinds=("segm",), area_sides=area_sides, image_ids=image_ids)  # checks both
    overlaps = measure_overlaps(annotations, results, codec, image_ids=image_ids)
    truth, found = overlaps.truth, overlaps.found
    small, medium = (side**2 for side in area_sides)
    low, high = occlusions
    outcomes = {"all": _Outcome(overlaps, np.full(len(truth.ids), True), np.full(len(found.scores), True))}
    for measured, ranges in (
        ("areas", {"small": (0, small), "medium": (small, medium), "large": (medium, math.inf)}),
        ("occlusion", {"free": (0, low), "touched": (low, high), "crowded": (high, math.inf)}),
    ):
        for name, (least, most) in ranges.items():
            inside = [
                (least <= values) & (values <= most) for values in (getattr(truth, measured), getattr(found, measured))
            ]
            outcomes[name] = _Outcome(overlaps, *inside)
    legend = (
        f"small: below {area_sides[0]:g}x{area_sides[0]:g} pixels, medium: below {area_sides[1]:g}x{area_sides[1]:g}; "
        f"free: at most {100 * low:g} % of the box on other objects, touched: at most {100 * high:g} %"
    )
    groups = {name: outcome.losses() for name, outcome in outcomes.items()}
    return ErrorAnalysis(groups, legend, overlaps, outcomes["all"].types, outcomes["all"].missed)


class _Outcome:
    """What COCO's matching makes of the detections, as far as a group of objects is concerned.

    Objects outside the group are ignored, and so are detections that match one, or match none and lie outside too.

    right, wrong: (10, F) bool at each threshold; neither where a detection is ignored.
    types: (10, F) rows of `ERRORS`, -1 where a detection matches.
    missed: (10, A) bool.
    """

    def __init__(self, overlaps: Overlaps, objects_inside: np.ndarray, found_inside: np.ndarray) -> None:
        self.truth, self.found, self.classes = overlaps.truth, overlaps.found, len(overlaps.class_names)
        self.counts = objects_inside & ~self.truth.crowd  # (A,)
        matched = match_detections(
            *overlaps.pairs,
            count=len(self.found.scores),
            crowd=self.truth.crowd,
            ignored=~self.counts,
            thresholds=THRESHOLDS,
        )
        self.right = np.append(self.counts, False)[matched]  # -1, nobody, reads the False
        self.wrong = (matched == UNMATCHED) & found_inside
        self.found_by = np.full((len(THRESHOLDS), len(self.counts) + 1), len(self.found.scores))  # the last is nobody
        row, detection = np.nonzero(self.right)
        self.found_by[row, matched[row, detection]] = detection
        self.types = np.where(matched == UNMATCHED, self._type_of_each(), UNMATCHED)
        self.missed = self.counts & (self.found_by[:, :-1] == len(self.found.scores)) & ~self._claimed()
        self.objects = self._per_class(self.counts)

    def losses(self) -> GroupErrors:
        """The AP of the group and what repairs give back."""
        ap = self._ap(())
        alone = {error: self._ap((error,)) - ap for error in ERRORS}
        steps = [ap, *(self._ap(ERRORS[: last + 1]) for last in range(len(ERRORS)))]
        in_turn = dict(zip(ERRORS, np.diff(steps).tolist(), strict=True))
        return GroupErrors(int(self.counts.sum()), ap, alone, in_turn)

    def _type_of_each(self) -> np.ndarray:
        """(10, F) rows of `ERRORS`, as if every detection were wrong."""
        about, threshold = self.found.about, THRESHOLDS[:, None]
        fits = {
            "background": about == UNMATCHED,
            "class": np.append(self.truth.classes, UNMATCHED)[about] != self.found.classes,
            "duplicate": self.found_by[:, about] < np.arange(len(about)),
            "siamese": self.found.leak >= SIAMESE_LEAK,
            "codec": np.append(self.truth.ceiling, 0.0)[about] < threshold,
            "box": self.found.reach < threshold,
        }
        shape = self.right.shape
        conditions = [np.broadcast_to(fit, shape) for fit in fits.values()]
        return np.select(conditions, [_ROW[error] for error in fits], default=_ROW["vector"])

    def _claimed(self) -> np.ndarray:
        """(10, A) whether a wrong detection would find the object once it is repaired."""
        claimed = np.zeros((len(THRESHOLDS), len(self.counts)), dtype=bool)
        row, detection = np.nonzero(_among(self.types, _MADE_RIGHT))
        claimed[row, self.found.about[detection]] = True
        return claimed

    def _ap(self, repaired: Collection[str]) -> float:
        """Mean over thresholds and classes with these types repaired."""
        if not self.counts.any():
            return math.nan
        values = [np.nanmean(self._class_aps(row, repaired)) for row in range(len(THRESHOLDS))]
        return float(np.mean(values))

    def _class_aps(self, row: int, repaired: Collection[str]) -> np.ndarray:
        """(S,) at one threshold; NaN for classes without objects."""
        types, objects, classes = self.types[row], self.objects, self.found.classes
        gone = _among(types, repaired)
        right, wrong = self.right[row], self.wrong[row] & ~gone
        finders = np.flatnonzero(gone & _among(types, _MADE_RIGHT))
        about = self.found.about[finders]
        needed = self.counts[about] & (self.found_by[row, about] == len(types))  # objects that count and lack a finder
        sought, first = np.unique(about[needed], return_index=True)  # the first one has the best score
        if len(sought):
            winners = finders[needed][first]
            right, classes = right.copy(), classes.copy()
            right[winners], classes[winners] = True, self.truth.classes[sought]
        if "missed" in repaired:
            objects = objects - self._per_class(self.missed[row])
        aps = average_precision(right, wrong, classes, objects)
        emptied = (self.objects > 0) & (objects == 0)
        clean = np.bincount(classes[wrong], minlength=len(objects)) == 0
        return np.where(emptied, clean, aps)

    def _per_class(self, objects: np.ndarray) -> np.ndarray:
        """(S,) how many of these objects, (A,) bool, each class has."""
        return np.bincount(self.truth.classes[objects], minlength=self.classes)


def _check_shapes(results: Sequence[dict]) -> None:
    for number, result in enumerate(results):
        if "bbox" not in result or "segmentation" not in result:
            lacking = "box" if "segmentation" in result else "mask"
            raise DataError(
                f"result {number} has no {lacking}; the analysis of errors needs 'bbox' and 'segmentation' in every "
                "result. A plain detector has no masks to look at"
            )


def _among(types: np.ndarray, errors: Collection[str]) -> np.ndarray:
    """Whether each of these rows of `ERRORS`, -1 for no error, is one of `errors`."""
    chosen = np.zeros(len(ERRORS) + 1, dtype=bool)  # the last is for -1
    chosen[[_ROW[error] for error in errors]] = True
    return chosen[types]


def _points(share: float, *, sign: str = "") -> str:
    return "-" if math.isnan(share) else f"{100 * share:{sign}.1f}"
