"""Hands detections to faster-coco-eval: overlaps of all pairs at once, and straight to its C++ functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import faster_coco_eval.faster_eval_api_cpp as faster
import numpy as np
import torch
from faster_coco_eval.core import mask as rle_api
from faster_coco_eval.core.cocoeval import Params

from solq_lab.masks import join_codes
from solq_lab.ops.extension import cpu_operator


class Curves(NamedTuple):
    """What the matching gives; -1 where there is no ground truth.

    precision: (thresholds, recalls, classes, areas, detections per image 1 / 10 / 100).
    recall: (thresholds, classes, areas, detections per image).
    """

    precision: np.ndarray
    recall: np.ndarray


def match(
    objects: Sequence[dict],
    detections: Sequence[dict],
    images: Mapping[int, dict],
    category_ids: Sequence[int],
    *,
    kind: Literal["box", "segm"],
    area_ranges: dict[str, list[float]],
) -> Curves:
    """Matches detections to objects of their class and image, as pycocotools does.

    Args:
        objects: ground truth: "id" from 1, "image_id", "category_id", "area", "iscrowd", and "bbox" or "segmentation".
            They gain the key "ignore".
        detections: "id" from 1, "image_id", "category_id", "score", "iscrowd", and "bbox" with "area", or
            "segmentation" (compressed RLE), in which case they gain their "area".
        images: id -> image with "height" and "width".
        category_ids: classes, ascending.
        kind: what overlaps are of.
        area_ranges: name -> smallest and largest area, pixels.
    """
    params = Params("bbox" if kind == "box" else "segm", ranges=area_ranges)
    params.imgIds, params.catIds = sorted(images), list(category_ids)
    pairs = _pair_up(objects, detections, params)
    measure = _box_overlaps if kind == "box" else _mask_overlaps
    overlaps = measure(objects, detections, images, pairs)
    truth, found = faster.Dataset(), faster.Dataset()
    for entry in objects:
        entry["ignore"] = entry["iscrowd"]
        truth.append_ref(entry["image_id"], entry["category_id"], entry)
    for entry in detections:
        found.append_ref(entry["image_id"], entry["category_id"], entry)
    tables: list[list[list]] = [[[] for _ in params.catIds] for _ in params.imgIds]
    for block in pairs.blocks:
        table = overlaps[block.start : block.start + block.detections * block.objects]
        tables[block.image][block.category] = table.reshape(block.detections, block.objects).tolist()
    curves = faster.COCOevalEvaluateAccumulate(params, tables, truth, found, params.imgIds, params.catIds, True)
    return Curves(curves["precision"], curves["recall"])


class _Block(NamedTuple):
    """The pairs of one class in one image: detections by falling score, each with all objects.

    image, category: rows in the ascending ids.
    start: the first pair's row.
    detections, objects: how many.
    """

    image: int
    category: int
    start: int
    detections: int
    objects: int


class _Pairs(NamedTuple):
    """All pairs that may match, block after block: rows (P,) of a detection and of an object."""

    detections: np.ndarray
    objects: np.ndarray
    blocks: list[_Block]


def _pair_up(objects: Sequence[dict], detections: Sequence[dict], params: Params) -> _Pairs:
    """Pairs of the best detections, as many per image and class as are ever counted, with all objects."""
    image_rows = {key: row for row, key in enumerate(params.imgIds)}
    category_rows = {key: row for row, key in enumerate(params.catIds)}
    classes = len(params.catIds)

    def places(entries: Sequence[dict]) -> np.ndarray:
        rows = (image_rows[entry["image_id"]] * classes + category_rows[entry["category_id"]] for entry in entries)
        return np.fromiter(rows, dtype=np.int64, count=len(entries))

    object_places, detection_places = places(objects), places(detections)
    scores = np.fromiter((entry["score"] for entry in detections), dtype=np.float64, count=len(detections))
    object_order = np.argsort(object_places, kind="stable")
    detection_order = np.lexsort((-scores, detection_places))  # stable: equal scores stay in the order of the results
    present, object_starts, object_counts = np.unique(
        object_places[object_order], return_index=True, return_counts=True
    )
    ordered = detection_places[detection_order]
    starts = np.searchsorted(ordered, present, side="left")
    counts = np.minimum(np.searchsorted(ordered, present, side="right") - starts, params.maxDets[-1])
    sizes = counts * object_counts
    block = np.repeat(np.arange(len(present)), sizes)  # (P,)
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    rows, columns = within // object_counts[block], within % object_counts[block]
    blocks = np.stack([present // max(classes, 1), present % max(classes, 1), sizes.cumsum() - sizes, counts], axis=1)
    blocks = np.column_stack([blocks, object_counts])[sizes > 0]
    return _Pairs(
        detection_order[starts[block] + rows],
        object_order[object_starts[block] + columns],
        [_Block(*row) for row in blocks.tolist()],
    )


def _box_overlaps(
    objects: Sequence[dict], detections: Sequence[dict], images: Mapping[int, dict], pairs: _Pairs
) -> np.ndarray:
    """(P,) IoU of the pairs' boxes; with a crowd, the share of the detection that lies in it."""
    truth = np.array([entry["bbox"] for entry in objects], dtype=np.float64).reshape(-1, 4)[pairs.objects]
    found = np.array([entry["bbox"] for entry in detections], dtype=np.float64).reshape(-1, 4)[pairs.detections]
    corner = np.maximum(truth[:, :2], found[:, :2])
    sides = np.minimum(truth[:, :2] + truth[:, 2:], found[:, :2] + found[:, 2:]) - corner
    common = np.where((sides > 0).all(axis=1), sides.prod(axis=1), 0)
    area = found[:, 2] * found[:, 3]
    whole = np.where(_crowds(objects)[pairs.objects], area, area + truth[:, 2] * truth[:, 3] - common)
    return np.divide(common, whole, out=np.zeros_like(common), where=common > 0)


def _mask_overlaps(
    objects: Sequence[dict], detections: Sequence[dict], images: Mapping[int, dict], pairs: _Pairs
) -> np.ndarray:
    """(P,) IoU of the pairs' masks, likewise; writes the detections' areas."""
    truth = [_rle(entry["segmentation"], images[entry["image_id"]]) for entry in objects]
    found = [entry["segmentation"] for entry in detections]
    compiled = cpu_operator("rle_overlap")
    if compiled is None:
        areas = rle_api.area(found) if found else np.zeros(0)
        overlaps = [_plain_overlaps(objects, truth, found, pairs, block) for block in pairs.blocks]
        overlaps = np.concatenate([np.zeros(0), *overlaps])
    else:
        areas, overlaps = compiled(
            *join_codes([_code(rle) for rle in (*found, *truth)]),
            torch.from_numpy(pairs.detections),
            torch.from_numpy(pairs.objects + len(found)),
            torch.from_numpy(_crowds(objects)[pairs.objects]),
        )
        overlaps = overlaps.numpy()
    for entry, area in zip(detections, areas.tolist(), strict=False):
        entry["area"] = area
    return overlaps


def _plain_overlaps(
    objects: Sequence[dict], truth: Sequence[dict], found: Sequence[dict], pairs: _Pairs, block: _Block
) -> np.ndarray:
    """The overlaps of one block, in faster-coco-eval's own code."""
    rows = pairs.detections[block.start : block.start + block.detections * block.objects : block.objects]
    columns = pairs.objects[block.start : block.start + block.objects]
    crowds = [objects[column]["iscrowd"] for column in columns]
    return np.asarray(rle_api.iou([found[row] for row in rows], [truth[column] for column in columns], crowds)).ravel()


def _crowds(objects: Sequence[dict]) -> np.ndarray:
    return np.fromiter((entry["iscrowd"] for entry in objects), dtype=bool, count=len(objects))


def _rle(segmentation: list | dict, image: dict) -> dict:
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str | bytes):
        return segmentation
    return rle_api.segmToRle(segmentation, image["width"], image["height"])


def _code(rle: dict) -> bytes:
    counts = rle["counts"]
    return counts.encode() if isinstance(counts, str) else counts
