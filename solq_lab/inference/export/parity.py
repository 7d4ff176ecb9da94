"""Whether an ONNX file finds what the model itself finds: the same images through onnxruntime and through torch.

The model answers on its own way, `Predictor`'s network with its compiled kernels and `postprocess`, so that a mistake
in the exported graph cannot hide by being made twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from solq_lab.data.transforms import TestResize
from solq_lab.inference.export.session import Session, batches
from solq_lab.inference.postprocess import cut_out_masks, postprocess
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import paste_to_rle, rle_iou
from solq_lab.structures import Detections, ImageBatch, ImageMasks

TOLERANCE = {"score": 1e-3, "box": 1e-3, "mask_iou": 0.99}  # score; share of the image's sides; least mean IoU
FAR = 10.0  # of a pair that cannot be one detection


class Parity(NamedTuple):
    """How far two versions of a model differ.

    images, detections: how many were compared.
    matched: detections that both found: same class, score and box within `TOLERANCE`.
    excused: detections without a partner whose score is that of the last one kept; which of equals is kept is chance.
    score: largest difference of matched scores.
    box: largest difference of matched box edges, shares of the image's sides.
    mask_iou, least_mask_iou: mean and smallest IoU of matched masks, pasted into the image; None without masks.
    """

    images: int
    detections: int
    matched: int
    excused: int
    score: float
    box: float
    mask_iou: float | None
    least_mask_iou: float | None

    @property
    def agrees(self) -> bool:
        """Whether every detection has its partner, and the masks are the same but for single cells."""
        enough = self.mask_iou is None or self.mask_iou >= TOLERANCE["mask_iou"]
        return self.matched + self.excused == self.detections and enough

    def __str__(self) -> str:
        masks = ""
        if self.mask_iou is not None:
            masks = f", mask IoU {self.mask_iou:.5f} on average and {self.least_mask_iou:.5f} at least"
        return (
            f"{self.matched} of {self.detections} detections in {self.images} images matched ({self.excused} more "
            f"at the cut-off); scores within {self.score:.1e}, boxes within {self.box:.1e} of the image{masks}"
        )


def measure_parity(predictor: Predictor, path: Path, images: Sequence[np.ndarray]) -> Parity:
    """How far an ONNX file is from its model on RGB images (H, W, 3) uint8, each at its test size or in the file's.

    The file keeps `top_k` detections; the model is asked for as many.
    """
    session = Session(path)
    expected, found, sizes = [], [], []
    data = predictor.experiment.data
    for batch in batches(session, images, TestResize(data.test_scale, data.max_size)):
        theirs = detect_in_onnx(session, batch, predictor.classes.names)
        expected += detect_in_torch(predictor, batch, len(theirs[0].scores))
        found += theirs
        sizes += [tuple(size) for size in batch.sizes.tolist()]
    given = slice(len(images))  # a last batch may repeat an image
    return compare_detections(expected[given], found[given], sizes[given])


def compare_detections(
    expected: Sequence[Detections], found: Sequence[Detections], sizes: Sequence[tuple[int, int]]
) -> Parity:
    """How far the detections found in images are from those expected there.

    Args:
        expected, found: of the same images, in the same order.
        sizes: (height, width) of each image, pixels.
    """
    matched = excused = detections = 0
    scores, boxes, overlaps = [0.0], [0.0], []
    for ours, theirs, (height, width) in zip(expected, found, sizes, strict=True):
        score = (ours.scores[:, None] - theirs.scores).abs()
        scale = torch.tensor([width, height, width, height])
        box = ((ours.boxes / scale)[:, None] - theirs.boxes / scale).abs().amax(-1)
        same = (ours.labels[:, None] == theirs.labels) & (score <= TOLERANCE["score"]) & (box <= TOLERANCE["box"])
        rows, columns = linear_sum_assignment(torch.where(same, score + box, FAR).numpy())
        pairs = [
            (row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True) if same[row, column]
        ]
        alone = np.setdiff1d(np.arange(len(ours.scores)), [row for row, _ in pairs])
        detections, matched = detections + len(ours.scores), matched + len(pairs)
        if len(alone):
            excused += int((ours.scores[alone] <= ours.scores[-1] + TOLERANCE["score"]).sum())
        scores += [float(score[pair]) for pair in pairs]
        boxes += [float(box[pair]) for pair in pairs]
        if ours.masks is not None and theirs.masks is not None:
            matched_masks = [ours.masks[row] for row, _ in pairs], [theirs.masks[column] for _, column in pairs]
            overlaps += rle_iou(*matched_masks).tolist()
    mean, least = (float(np.mean(overlaps)), min(overlaps)) if overlaps else (None, None)
    return Parity(len(expected), detections, matched, excused, max(scores), max(boxes), mean, least)


def detect_in_torch(predictor: Predictor, images: ImageBatch, top_k: int) -> list[Detections]:
    """What the model finds in uint8 images, in their own pixels."""
    sizes = [tuple(size) for size in images.sizes.tolist()]
    with torch.inference_mode():
        last = predictor.model(images.normalised()).layers[-1]
        return postprocess(last, sizes, predictor.codec, top_k=top_k, class_names=predictor.classes.names)


def detect_in_onnx(session: Session, images: ImageBatch, names: Sequence[str]) -> list[Detections]:
    """What an ONNX file finds in uint8 images, in their own pixels; `names` are those of the class channels."""
    answer = session.run(images)
    detections = []
    for row, (height, width) in enumerate(images.sizes.tolist()):
        boxes = answer["boxes"][row] * torch.tensor([width, height, width, height])
        masks = None
        if "masks" in answer:
            masks = paste_to_rle(answer["masks"][row], boxes, (height, width))
        elif "mask_logits" in answer:
            drawn = ImageMasks(answer["mask_logits"], images.padding)
            masks = cut_out_masks(drawn, row, torch.arange(len(boxes)), (height, width))
        scores, labels, queries = (answer[name][row] for name in ("scores", "labels", "queries"))
        called = [names[label] for label in labels.tolist()]
        detections.append(Detections(scores, labels, boxes, queries, masks, called))
    return detections
