"""The worst errors of a model with their images, for a gallery of failures. Paper: appendix A.5, fig. 6."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from solq_lab.data.classes import ClassMap
from solq_lab.data.coco import CocoDataset
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data.images import read_image
from solq_lab.masks import segmentation_to_rle
from solq_lab.structures import Detections
from solq_lab.studies.errors import ERRORS, ErrorAnalysis


def worst_cases(
    analysis: ErrorAnalysis, results: Sequence[dict], dataset: CocoDataset, *, count: int = 5
) -> dict[str, list[tuple[Tensor, Detections, Detections]]]:
    """The worst cases of every type of error.

    Args:
        analysis: of these results.
        results: the COCO results that were analysed.
        dataset: the data set they were found in.
        count: cases per type, at most.

    Returns:
        type -> cases, the worst first: the image (3, H, W) uint8 as in its file, the object it is about (none for
        background) and the detection (none for a missed object), in pixels of the file.

    Raises:
        DataError: an image cannot be read.
    """
    truth = GroundTruth(dataset.annotations, keep="all")
    image_rows = {image_id: row for row, image_id in enumerate(truth.image_ids.tolist())}
    object_rows = {object_id: row for row, object_id in enumerate(truth.ids.tolist())}
    cases: dict[str, list[tuple[Tensor, Detections, Detections]]] = {error: [] for error in ERRORS}
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
        cases[case.error].append((image, first, second))
    return cases


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
