"""A paired bootstrap over images: is one run better than another, or only on these images?

Images are drawn with replacement, as many as there are, the same ones for both runs; on every draw both APs are
computed anew, with the precision-recall curve of that draw. An interval of the difference that excludes 0 means that
the sign would be the same on other images of the same kind. It does not cover the variation between training seeds.

Matching happens inside an image, so it is done once; a draw only changes how often each image counts.
"""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data_folder import annotations_of
from solq_lab.evaluation.coco import DEFAULTS, ClassShare, ScoringData
from solq_lab.evaluation.results import read_results
from solq_lab.files import read_json
from solq_lab.runs import Run, RunError
from solq_lab.schema import EvaluationSection
from solq_lab.studies.rules import RECALLS, THRESHOLDS, UNMATCHED, match_detections

NUMBERS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}  # thresholds that are averaged
_DRAWS_AT_ONCE = 250  # bounds the memory on COCO


class BootstrapComparison(NamedTuple):
    """Two sets of results on the same images."""

    names: tuple[str, str]  # of the two
    # a row per number, for example "segm.AP", in 0..1. "first" and "second" are on all images; "change" is the second
    # less the first, "low" to "high" its interval, "clear" whether that excludes 0; "better" is the share of draws on
    # which the second is better
    differences: pd.DataFrame
    images: int  # how many images were evaluated
    draws: int  # of the bootstrap
    confidence: float  # of the intervals

    @property
    def changes(self) -> dict[str, tuple[float, float, float]]:
        """Number -> change, low and high end of its interval, in 0..1."""
        return {row.Index: (row.change, row.low, row.high) for row in self.differences.itertuples()}

    def frame(self) -> pd.DataFrame:
        """The numbers in percent, one row each, with the interval of the change and whether it excludes 0."""
        frame = 100 * self.differences[["first", "second", "change", "low", "high"]]
        frame.columns = pd.Index([*self.names, "change", "low", "high"])
        frame["verdict"] = np.where(self.differences["clear"], "clear", "may be chance")
        return frame.rename_axis(columns=f"{100 * self.confidence:g} % interval")


def compare_runs(
    first: Run, second: Run, *, draws: int = 1000, confidence: float = 0.95, seed: int = 0
) -> BootstrapComparison:
    """Compare two finished runs on the images that both were evaluated on; the change is the second's.

    Raises:
        RunError: a run has no results, or they are of different images or settings.
        DataError: the annotations or detections cannot be read.
    """
    settings = [_scored_on(run) for run in (first, second)]
    for what in settings[0]:
        if settings[0][what] != settings[1][what]:
            raise RunError(
                f"{first.folder} and {second.folder} were scored on different {what}: {settings[0][what]} and "
                f"{settings[1][what]}; only runs on the same images can be compared"
            )

    metrics = [read_json(run.results)["metrics"] for run in (first, second)]
    kinds = [kind for kind in ("box", "segm") if all(f"{kind}.AP" in numbers for numbers in metrics)]
    truth = GroundTruth(annotations_of(first.experiment, "val"), with_masks="segm" in kinds, keep="all")
    return compare_results(
        truth,
        read_results(first.detections),
        read_results(second.detections),
        first.experiment.evaluation,
        names=(first.name, second.name),
        kinds=kinds,
        draws=draws,
        confidence=confidence,
        seed=seed,
    )


def compare_results(
    annotations: str | Path | dict | GroundTruth,
    first: Sequence[dict],
    second: Sequence[dict],
    settings: EvaluationSection = DEFAULTS,
    *,
    names: tuple[str, str] = ("first", "second"),
    kinds: Collection[str] = ("box", "segm"),
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapComparison:
    """Compare two lists of COCO results on the same ground truth.

    Args:
        annotations: COCO instances file, its parsed content, or its `GroundTruth` with all objects.
        first, second: results, as `evaluate_results` takes them.
        settings: what is a boundary, how many images, and how many detections of a class in an image count.
        names: of both, for tables.
        kinds: which of "box", "segm", "boundary".
        draws: number of draws.
        confidence: of the interval, for example 0.95.
        seed: of the draws.

    Raises:
        DataError: the annotations or a result cannot be used.
        ValueError: draws or confidence out of range.
    """
    if draws < 1 or not 0 < confidence < 1:
        raise ValueError(f"draws {draws}, confidence {confidence}: allowed are 1 or more, and a share between 0 and 1")
    tail = (1 - confidence) / 2
    rows, images = {}, 0
    for kind in kinds:
        matches = [match_results(annotations, results, settings, kind=kind) for results in (first, second)]
        images = matches[0].objects.shape[1]
        counts = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / max(images, 1)), size=draws)
        everything = [precision_on_draws(one, np.ones((1, images))) for one in matches]
        drawn = [precision_on_draws(one, counts) for one in matches]  # 2 x (draws, 10)

        for name, thresholds in NUMBERS.items():
            before, after = (float(one[0, thresholds].mean()) for one in everything)
            change = (drawn[1] - drawn[0])[:, thresholds].mean(axis=1)
            low, high = np.nanquantile(change, [tail, 1 - tail]) if not np.isnan(change).all() else (np.nan, np.nan)
            better = float((change > 0).mean())
            rows[f"{kind}.{name}"] = [before, after, after - before, low, high, low > 0 or high < 0, better]
    columns = ["first", "second", "change", "low", "high", "clear", "better"]
    differences = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return BootstrapComparison(names, differences, images, draws, confidence)


class Matches(NamedTuple):
    """True and false positives: F detections by falling score, S classes, I images."""

    # images, classes: (F,) rows of the detection's image and class
    images: np.ndarray
    classes: np.ndarray
    # true_positive, false_positive: (10, F) bool at each threshold; neither for a detection on a crowd region
    true_positive: np.ndarray
    false_positive: np.ndarray
    objects: np.ndarray  # (S, I) objects to find


def match_results(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    settings: EvaluationSection = DEFAULTS,
    *,
    kind: str,
) -> Matches:
    """Match results with ground truth at COCO's ten thresholds.

    Args:
        annotations, results, settings: as in `compare_results`.
        kind: "box", "segm" or "boundary".
    """
    data = ScoringData(annotations, settings, with_masks=kind != "box")
    image_rows, class_rows = np.array(sorted(data.images), dtype=np.int64), np.array(data.category_ids, dtype=np.int64)
    evaluator = data.match(ClassShare(data.category_ids, list(data.counted(results))), kind)

    # Detections by falling score, equal ones by image; of each image and class as many as are scored.
    key = ["image_id", "category_id"]
    objects = pd.DataFrame(data.objects, columns=[*key, "iscrowd"])
    detections = pd.DataFrame(evaluator.cocoDt.dataset["annotations"], columns=[*key, "score"])
    detections = detections.sort_values(["score", "image_id"], ascending=[False, True])  # by two keys it is stable
    detections = detections[detections.groupby(key).cumcount() < evaluator.params.maxDets[-1]].reset_index(drop=True)

    # faster-coco-eval's table of an image and a class: (detections by falling score, objects).
    columns_of = objects.groupby(key).indices
    pairs = [np.zeros((0, 3))]
    for place, rows in detections.groupby(key).indices.items():
        columns = columns_of.get(place, ())
        if len(columns):
            overlap = np.asarray(evaluator.ious[place])
            pairs.append(np.column_stack([np.repeat(rows, len(columns)), np.tile(columns, len(rows)), overlap.ravel()]))
    joined = np.concatenate(pairs)
    joined = joined[joined[:, 2] >= THRESHOLDS[0]]
    joined = joined[np.argsort(joined[:, 0], kind="stable")]

    crowd = objects["iscrowd"].to_numpy(dtype=bool)
    matched = match_detections(
        joined[:, 0].astype(np.int64),
        joined[:, 1].astype(np.int64),
        joined[:, 2],
        count=len(detections),
        crowd=crowd,
        ignored=crowd,
        thresholds=THRESHOLDS,
    )
    to_find = np.zeros((len(class_rows), len(image_rows)))
    single = objects[~crowd]
    places = np.searchsorted(class_rows, single["category_id"]), np.searchsorted(image_rows, single["image_id"])
    np.add.at(to_find, places, 1.0)
    return Matches(
        images=np.searchsorted(image_rows, detections["image_id"]),
        classes=np.searchsorted(class_rows, detections["category_id"]),
        true_positive=~np.append(crowd, True)[matched],  # UNMATCHED, -1, reads the appended place
        false_positive=matched == UNMATCHED,
        objects=to_find,
    )


def precision_on_draws(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """AP at each threshold, mean over the classes that have objects, for every draw of images.

    Args:
        matches: of all images.
        counts: (B, I) how often each image counts in each of B draws.

    Returns:
        (B, 10) in 0..1, NaN for a draw without any object.
    """
    parts = np.array_split(counts.astype(np.float64), max(-(-len(counts) // _DRAWS_AT_ONCE), 1))
    return np.concatenate([_precision(matches, part) for part in parts])


def _precision(matches: Matches, counts: np.ndarray) -> np.ndarray:
    total, classes = np.zeros((len(counts), len(THRESHOLDS))), np.zeros((len(counts), 1))
    for row, objects in enumerate(matches.objects):
        to_find = counts @ objects  # (B,)
        own, present = matches.classes == row, to_find > 0
        if not present.any():
            continue
        classes[present] += 1
        both = zip(matches.true_positive[:, own], matches.false_positive[:, own], strict=True)
        for column, positives in enumerate(both):
            total[present, column] += _class_precision(
                matches.images[own], *positives, counts[present], to_find[present]
            )
    return np.divide(total, classes, out=np.full_like(total, np.nan), where=classes > 0)


def _class_precision(
    images: np.ndarray, true_positive: np.ndarray, false_positive: np.ndarray, counts: np.ndarray, to_find: np.ndarray
) -> np.ndarray:
    """(B,) AP of one class at one threshold; the first three (F,) are of its detections by falling score.

    The curve only has to be known at true positives: between two of them precision falls and recall stays.
    """
    places = np.flatnonzero(true_positive)  # (R,)
    before = np.zeros((counts.shape[1], len(places) + 1))  # (I, R + 1) false positives of an image after each true one
    np.add.at(before, (images[false_positive], np.searchsorted(places, np.flatnonzero(false_positive))), 1.0)
    false_so_far = counts @ np.cumsum(before, axis=1)[:, :-1]  # (B, R)
    true_so_far = np.cumsum(counts[:, images[places]], axis=1)
    seen = true_so_far + false_so_far
    precision = np.divide(true_so_far, seen, out=np.zeros_like(seen), where=seen > 0)

    best_after = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = true_so_far / to_find[:, None]
    reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)  # recalls read so far
    return (best_after * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(RECALLS)


def _scored_on(run: Run) -> dict[str, object]:
    """Properties that have to be equal for two runs to be compared, by name.

    Raises:
        RunError: the run has no results yet.
    """
    if not (run.results.is_file() and run.detections.is_file()):
        raise RunError(f"{run.folder}: no results yet; `solq-lab evaluate {shlex.quote(str(run.folder))}` makes them")
    stored = read_json(run.results)
    settings = stored.get("settings", {})
    return {
        "annotations (SHA-256)": stored.get("annotations"),
        "number of images": stored.get("images"),
        "detections per image": settings.get("top_k"),
    }
