"""The best a mask code allows: ground truth sent through the code. Paper: section 3.2, table 3."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval.core import mask as rle_api
from torch import Tensor

from solq_lab import masks
from solq_lab.codecs.base import MaskCodec
from solq_lab.data.annotations import read_annotations, tabulate_objects, tabulate_pictures
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.evaluation.summary import Evaluation

_MASKS_AT_ONCE = 256  # keeps a crowded picture from holding hundreds of megabytes at N = 256


def codec_ceiling(
    annotations: str | Path | dict,
    codec: MaskCodec,
    *,
    area_sides: tuple[float, float] = DEFAULTS.area_sides,
    boundary_ratio: float = DEFAULTS.boundary_ratio,
    image_ids: Collection[int] | None = None,
    max_images: int | None = None,
) -> Evaluation:
    """Mask and boundary AP of a network that finds every object, its box and its vector without fault.

    Every object that is no crowd is rasterised in its box, encoded, decoded, binarised and pasted back into the box
    with score 1, on the codec's device.

    Args:
        annotations: COCO instances file, or its parsed content.
        codec: the mask code.
        area_sides: square roots of the areas, pixels, that part small from medium and medium from large objects.
        boundary_ratio: boundary width over the picture's diagonal.
        image_ids: pictures to look at. None: all.
        max_images: only the first so many of them, by rising id. None: all.

    Returns:
        "segm" and "boundary" numbers, and "segm.IoU", the mean IoU of an object's mask with its ground truth (NaN where
        there is no object).

    Raises:
        DataError: the annotations cannot be used.
    """
    source = Path("annotations") if isinstance(annotations, dict) else Path(annotations)
    document = annotations if isinstance(annotations, dict) else read_annotations(source)
    pictures = tabulate_pictures(document, source)
    objects = tabulate_objects(document, source, pictures, with_masks=True)
    chosen = sorted(pictures.ids.tolist() if image_ids is None else image_ids)[:max_images]
    results: list[dict] = []
    overlaps: list[float] = []
    for picture in np.flatnonzero(np.isin(pictures.ids, chosen)).tolist():
        image_id, size = int(pictures.ids[picture]), tuple(pictures.sizes[picture].tolist())
        first, last = objects.starts[picture : picture + 2].tolist()
        for start in range(first, last, _MASKS_AT_ONCE):
            rows = slice(start, min(start + _MASKS_AT_ONCE, last))
            sent = [objects.segmentations[row] for row in objects.order[rows]]
            received = _send_through(codec, sent, torch.from_numpy(objects.boxes[rows]), size)
            overlaps += [
                _iou(masks.segmentation_to_rle(one, size), rle) for one, rle in zip(sent, received, strict=True)
            ]
            results += [
                {"image_id": image_id, "category_id": category_id, "score": 1.0, "segmentation": rle}
                for category_id, rle in zip(objects.categories[rows].tolist(), received, strict=True)
            ]
    evaluation = evaluate_results(
        document,
        results,
        kinds=("segm", "boundary"),
        area_sides=area_sides,
        boundary_ratio=boundary_ratio,
        image_ids=chosen,
    )
    mean_iou = float(np.mean(overlaps)) if overlaps else math.nan
    return dataclasses.replace(evaluation, metrics=evaluation.metrics | {"segm.IoU": mean_iou})


@torch.inference_mode()
def _send_through(codec: MaskCodec, segmentations: list, boxes: Tensor, size: tuple[int, int]) -> list[dict]:
    """RLEs of objects of one picture after encoding and decoding; boxes (K, 4) xyxy in its pixels."""
    bits = masks.rasterize_in_box(segmentations, boxes, size, codec.mask_size)  # (K, N, N)
    table = next(codec.buffers(), None)
    decoded = codec.decode(codec.encode(bits if table is None else bits.to(table.device)))
    return masks.paste_to_rle(codec.binarize(decoded), boxes, size)


def _iou(one: dict, other: dict) -> float:
    return float(rle_api.iou([one], [other], [0])[0][0])
