"""The worst errors of a model with their images, for a gallery of failures. Paper: appendix A.5, fig. 6."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from solq_lab.build import build_codec
from solq_lab.data.classes import ClassMap
from solq_lab.data.coco import CocoDataset
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data.images import read_image
from solq_lab.data_folder import annotations_of
from solq_lab.evaluation.evaluator import evaluate_run
from solq_lab.evaluation.results import read_results
from solq_lab.masks import segmentation_to_rle
from solq_lab.runs import Run
from solq_lab.structures import Detections
from solq_lab.studies.errors import ERRORS, ErrorAnalysis, analyse_errors
from solq_lab.studies.rules import UNMATCHED


class FailureCase(NamedTuple):
    """One error: the image (3, H, W) uint8 as in its file, the object it is about (none for background) and the
    detection (none for a missed object), in pixels of the file; and the ids of image and object."""

    image: Tensor
    true: Detections
    found: Detections
    image_id: int
    object_id: int | None


def worst_cases(
    analysis: ErrorAnalysis, results: Sequence[dict], dataset: CocoDataset, *, count: int = 5
) -> dict[str, list[FailureCase]]:
    """The worst cases of every type of error.

    Args:
        analysis: of these results.
        results: the COCO results that were analysed.
        dataset: the data set they were found in.
        count: cases per type, at most.

    Returns:
        type -> cases, the worst first.

    Raises:
        DataError: an image cannot be read.
    """
    truth = GroundTruth(dataset.annotations, keep="all")
    image_rows = {image_id: row for row, image_id in enumerate(truth.image_ids.tolist())}
    object_rows = {object_id: row for row, object_id in enumerate(truth.ids.tolist())}
    cases: dict[str, list[FailureCase]] = {error: [] for error in ERRORS}
    for case in (case for error in ERRORS for case in analysis.worst(error, count)):
        row = image_rows[case.image_id]
        size = truth.size(row)
        image = read_image(dataset.images / truth.file_names[row], case.image_id, size, dataset.orientation)

        objects = []
        if case.object_id is not None:
            row = object_rows[case.object_id]
            box, category_id = truth.coco_boxes[row].tolist(), int(truth.category_ids[row])
            objects = [{"bbox": box, "category_id": category_id, "score": 1.0, "segmentation": truth.rle(row)}]
        detections = [] if case.result is None else [results[case.result]]
        first, second = (_as_detections(entries, size, dataset.classes) for entries in (objects, detections))
        cases[case.error].append(FailureCase(image, first, second, case.image_id, case.object_id))
    return cases


def run_errors(run: Run) -> ErrorAnalysis:
    """The errors of a finished run on its validation images, which are evaluated where that has not been done.

    Raises:
        RunError, DataError: as `evaluate_run` and `analyse_errors`, a plain detector for example.
    """
    evaluate_run(run)
    annotations, results = annotations_of(run.experiment, "val"), read_results(run.detections)
    return analyse_errors(annotations, results, build_codec(run.experiment), run.experiment.evaluation)


def object_errors(analysis: ErrorAnalysis) -> pd.DataFrame:
    """How a model does on each object, by annotation id, to filter and sort images by.

    Returns:
        Columns "score" and "IoU" of the best detection about the object: the one that is right at most thresholds, then
        the most certain (NaN and 0 without one); "error", its type at the lowest threshold where it is wrong, "missed"
        without a detection, else "none"; and "lost", the share of the ten thresholds at which no detection is right.
    """
    objects, detections = analysis.overlaps.objects, analysis.overlaps.detections
    wrong = analysis.types >= 0  # (10, F)
    columns = {"object": detections.about, "right": (~wrong).sum(axis=0), "score": detections.scores}
    about = pd.DataFrame(columns | {"IoU": detections.overlap, "detection": np.arange(len(detections.about))})
    about = about[about["object"] != UNMATCHED].sort_values(["right", "score"], kind="stable")
    best = about.groupby("object").last()

    frame = best[["score", "IoU"]].reindex(range(len(objects.ids))).fillna({"IoU": 0.0})
    rows = best["detection"].to_numpy(dtype=int)
    first = analysis.types[wrong[:, rows].argmax(axis=0), rows]  # -1 where it is right at all thresholds
    frame["error"], frame["lost"] = "missed", 1.0
    frame.loc[best.index, "error"] = np.array([*ERRORS, "none"], dtype=object)[first]
    frame.loc[best.index, "lost"] = 1 - best["right"] / len(wrong)
    return frame.set_index(objects.ids)


def _as_detections(entries: Sequence[dict], size: tuple[int, int], classes: ClassMap) -> Detections:
    """COCO entries with a score, of one image of `size` (height, width), as detections."""
    labels = [classes.channel_of(entry["category_id"]) for entry in entries]
    corners = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]  # (x, y, w, h) to (x0, y0, x1, y1)
    return Detections(
        scores=torch.tensor([entry["score"] for entry in entries], dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes=corners,
        queries=torch.full((len(entries),), -1),  # results do not name the query
        masks=[segmentation_to_rle(entry["segmentation"], size) for entry in entries],
        names=[classes.names[label] for label in labels],
    )
