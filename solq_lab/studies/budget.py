"""The oracle budget of a run: its mask AP if scores, boxes, mask vectors or the codec were perfect, alone and together.

Where error typing (`studies.errors`) counts what is wrong with single detections, this changes a part of all of them
and scores them again. "Its object" is the one that the detection's box lies on (`DetectionTable.about`); a detection
on none, or of another class than its object, keeps its class, so that a perfect model of a part still has errors.

    score    the detection that covers an object best, of the object's class, scores the IoU of their masks; every other
             detection scores less than all of these
    box      the detection's mask, cut out of its own box and pasted into the object's
    vector   the object's own mask vector, decoded and pasted into the detection's box
    frame    the object's mask cut out by the detection's box, encoded, decoded and pasted there: a perfect vector for a
             box as it is, which `vector` is for a perfect box only. It replaces box and vector
    code     pixels of the box frame that the codec loses of the object's own mask are put right in the detection's

With box, vector and code, or frame and code, a detection has its object's mask as an N x N bitmap.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from solq_lab.bars import progress_bar
from solq_lab.build import build_codec
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.reconstruct import paste_and_compare, reconstruct
from solq_lab.data.folders import Split
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.data_folder import annotations_of
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.evaluation.evaluator import file_of_split
from solq_lab.evaluation.results import read_results
from solq_lab.evaluation.summary import Evaluation
from solq_lab.masks import rasterize_in_box
from solq_lab.models.weights import read_weights
from solq_lab.runs import Run
from solq_lab.schema import EvaluationSection
from solq_lab.studies.overlaps import Overlaps, corners, measure_overlaps
from solq_lab.studies.rules import UNMATCHED

PARTS = ("score", "box", "vector", "frame", "code")
_APART = {"box", "vector"}  # what a perfect frame leaves no room for
MASK_SIZE = 128  # of the box frame of a model without a codec
_COLUMNS = ("segm.AP", "segm.AP50", "segm.AP75", "segm.APs", "segm.APm", "segm.APl", "boundary.AP")


class Budget(NamedTuple):
    """Evaluations by the parts that are perfect: () as it is, ("score",), ..., all of them last."""

    evaluations: dict[tuple[str, ...], Evaluation]

    def frame(self) -> pd.DataFrame:
        """Percent; one row per combination of perfect parts."""
        rows = {
            " + ".join(parts) or "as it is": [100 * evaluation.metrics[name] for name in _COLUMNS]
            for parts, evaluation in self.evaluations.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(_COLUMNS)).rename_axis(columns="perfect")

    def class_frame(self) -> pd.DataFrame:
        """Mask AP of each class, percent, as it is and with each part perfect alone; one row per class."""
        alone = {" + ".join(parts) or "as it is": parts for parts in self.evaluations if len(parts) < 2}
        return pd.DataFrame(
            {title: self.evaluations[parts].class_frame()["AP"] for title, parts in alone.items()}
        ).sort_values("as it is", ascending=False, kind="stable")


def oracle_budget(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    codec: MaskCodec | None,
    settings: EvaluationSection = DEFAULTS,
) -> Budget:
    """Scores results with each combination of their parts made perfect.

    Args:
        annotations: COCO instances file, its parsed content, or its `GroundTruth` with all objects.
        results: COCO results with boxes and masks; may be empty. They are all the method sees of the model: a mask is
            read back out of its image, at the image's resolution.
        codec: the codec of the model; None for one whose masks do not come from vectors: then no part is "code" or
            "frame", and a perfect "vector" is the object's own mask in the detection's box.
        settings: what is small and what a boundary, detections of a class in an image that are scored, and images.

    Raises:
        DataError: annotations or results cannot be used.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth(annotations, keep="all")

    def score(changed: Sequence[dict]) -> Evaluation:
        return evaluate_results(truth, changed, settings, kinds=("segm", "boundary"))

    # The first one checks both, before the overlaps are measured.
    evaluations: dict[tuple[str, ...], Evaluation] = {(): score(results)}
    overlaps = measure_overlaps(truth, results, codec, settings)
    counted = [results[place] for place in overlaps.detections.results.tolist()]
    parts = PARTS if codec is not None else PARTS[:3]
    subsets = [perfect for count in range(1, len(parts) + 1) for perfect in combinations(parts, count)]
    chosen = [perfect for perfect in subsets if "frame" not in perfect or not _APART & set(perfect)]
    by_shape: dict[tuple[str, ...], tuple[list[dict], np.ndarray]] = {(): (counted, overlaps.detections.overlap)}

    for perfect in progress_bar(chosen, desc="budget"):
        shape = tuple(part for part in perfect if part != "score")
        if shape not in by_shape:
            by_shape[shape] = _with_perfect_masks(truth, overlaps, counted, codec, shape)
        changed, ious = by_shape[shape]
        evaluations[perfect] = score(_with_perfect_scores(overlaps, changed, ious) if "score" in perfect else changed)
    return Budget(evaluations)


def _with_perfect_scores(overlaps: Overlaps, results: Sequence[dict], ious: np.ndarray) -> list[dict]:
    """The results with the scores of the "score" part, from mask IoUs (F,) with their objects."""
    objects, detections = overlaps.objects, overlaps.detections
    scores = ious - 1  # below all that find an object
    right_class = np.append(objects.classes, UNMATCHED)[detections.about] == detections.classes
    found, first = np.unique(detections.about[by_iou := np.argsort(-ious - 2 * right_class)], return_index=True)
    best = by_iou[first][found != UNMATCHED]
    best = best[right_class[best]]
    scores[best] = ious[best]
    return [result | {"score": score} for result, score in zip(results, scores.tolist(), strict=True)]


def _with_perfect_masks(
    truth: GroundTruth, overlaps: Overlaps, results: Sequence[dict], codec: MaskCodec | None, perfect: Sequence[str]
) -> tuple[list[dict], np.ndarray]:
    """The results with other masks where they have an object, and the IoU (F,) of these with the objects'."""
    about, images = overlaps.detections.about, overlaps.detections.image_ids
    changed, ious = list(results), np.zeros(len(results))
    row_of = {object_id: row for row, object_id in enumerate(truth.ids.tolist())}
    image_of = {image_id: image for image, image_id in enumerate(truth.image_ids.tolist())}

    for image_id in np.unique(images[about != UNMATCHED]).tolist():
        places = np.flatnonzero((images == image_id) & (about != UNMATCHED))
        rows = np.array([row_of[object_id] for object_id in overlaps.objects.ids[about[places]].tolist()])
        size, own = truth.size(image_of[image_id]), [results[place] for place in places.tolist()]
        boxes = corners(own)
        masks = _frame_masks(truth, rows, own, boxes, size, codec, perfect)
        if "box" in perfect:
            boxes = torch.from_numpy(truth.boxes[rows])

        rles, ious[places] = paste_and_compare(masks, boxes, size, [truth.rle(row) for row in rows.tolist()])
        for place, rle in zip(places.tolist(), rles, strict=True):
            changed[place] = results[place] | {"segmentation": rle}
    return changed, ious


def _frame_masks(
    truth: GroundTruth,
    rows: np.ndarray,
    results: Sequence[dict],
    boxes: Tensor,
    size: tuple[int, int],
    codec: MaskCodec | None,
    perfect: Sequence[str],
) -> Tensor:
    """Masks (k, N, N) bool of detections of one image in the box frame, objects at `rows`, boxes (k, 4) xyxy."""
    mask_size = MASK_SIZE if codec is None else codec.mask_size
    if "frame" in perfect:
        true = rasterize_in_box(truth.segmentations(rows), boxes, size, mask_size)
    else:
        true = truth.box_masks(rows, mask_size)
    kept = true if codec is None else reconstruct(codec, true).masks.cpu()
    if "vector" in perfect or "frame" in perfect:
        masks = kept
    else:
        masks = rasterize_in_box([result["segmentation"] for result in results], boxes, size, mask_size)
    return torch.where(true != kept, true, masks) if "code" in perfect else masks


def run_budget(run: Run, *, split: Literal["val", "train"] | Split = "val") -> Budget:
    """The oracle budget of an evaluated run on a split, with the settings of its experiment.

    Raises:
        DataError: the run has no results, or they have no masks.
    """
    experiment = run.experiment.evaluated_on(split)
    if experiment.codec.kind == "none" and experiment.model.mask_branch == "none":
        raise DataError(f"{run.folder}: a plain detector has no masks, and so no oracle budget; choose another run")
    results = read_results(file_of_split(run.detections, split))
    codec = build_codec(experiment, tables=read_weights(run.weights).codec)
    return oracle_budget(annotations_of(experiment, "val"), results, codec, experiment.evaluation)
