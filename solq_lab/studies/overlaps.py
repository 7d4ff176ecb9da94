"""How every detection overlaps the objects of its image, measured once: the input of error typing.

Overlaps are of masks, in pixels of the original image. Crowd regions are kept: a detection on one is no error.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle_api
from pycocotools import mask as coco_rle
from torch import Tensor
from torchvision.ops import box_iou

from solq_lab import masks
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.reconstruct import paste_and_compare, reconstruct
from solq_lab.data.classes import ClassMap
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.coco import DEFAULTS
from solq_lab.schema import EvaluationSection
from solq_lab.studies.rules import THRESHOLDS, UNMATCHED

SAME_OBJECT = 0.1  # box IoU from which a detection is about an object of its class
SAME_PLACE = 0.5  # box IoU from which it is about an object of another class
_MASKS_AT_ONCE = 256  # decoded together; bounds the memory at N = 256


class ObjectTable(NamedTuple):
    """The objects, A of them, grouped by image."""

    ids: np.ndarray  # (A,) annotation ids
    image_ids: np.ndarray  # (A,) their images
    classes: np.ndarray  # (A,) rows of the file's categories, by rising category id
    areas: np.ndarray  # (A,) pixels, as annotated; the mask's where the file gives none
    crowd: np.ndarray  # (A,) bool
    # (A,) share of the object's box that lies on other objects (those whose boxes meet its own), 0..1
    occlusion: np.ndarray
    ceiling: np.ndarray  # (A,) IoU of the object's mask with itself after the codec; 1 without a codec


class DetectionTable(NamedTuple):
    """The detections that count, F of them, best score first (equal scores: by image id, then as given)."""

    results: np.ndarray  # (F,) places in the list of results
    image_ids: np.ndarray  # (F,) their images
    classes: np.ndarray  # (F,) rows of the file's categories
    scores: np.ndarray  # (F,)
    areas: np.ndarray  # (F,) pixels of the mask
    occlusion: np.ndarray  # (F,) share of the box that lies on other objects than the one the detection is about
    # (F,) row of the object that the detection is about, or `UNMATCHED`: the object of its class that its box overlaps
    # most, from `SAME_OBJECT` on, or one of another class that it overlaps more, from `SAME_PLACE` on
    about: np.ndarray
    overlap: np.ndarray  # (F,) mask IoU with that object, 0 for none
    leak: np.ndarray  # (F,) share of the detection's mask on other objects than that one, whose boxes meet its box
    # (F,) mask IoU with that object if only the box were the detection's: the object's own vector, decoded and pasted
    # into the predicted box. Without a codec a box confines no mask, and the IoU of the boxes stands here
    reach: np.ndarray


class Pairs(NamedTuple):
    """Detections and objects of one class and image that may match, P of them."""

    detections: np.ndarray  # (P,) rows of the detections, ascending
    objects: np.ndarray  # (P,) rows of the objects
    # (P,) mask IoU, the lowest threshold or more; the covered share of the detection for crowd objects
    overlap: np.ndarray


class Overlaps(NamedTuple):
    """All tables of a data set; `class_names` belong to the class rows."""

    objects: ObjectTable
    detections: DetectionTable
    pairs: Pairs
    class_names: list[str]


def measure_overlaps(
    annotations: str | Path | dict | GroundTruth,
    results: Sequence[dict],
    codec: MaskCodec | None,
    settings: EvaluationSection = DEFAULTS,
) -> Overlaps:
    """Overlaps of results with ground truth, and the ones that the codec and the predicted boxes would have allowed.

    Args:
        annotations: COCO instances file, its parsed content, or its `GroundTruth` with all objects, that
            `evaluate_results` accepts.
        results: COCO results with "bbox" and "segmentation", that it accepts too.
        codec: the codec of the model, on any device; None for a model without one.
        settings: how many images (`max_images`), and detections of a class in an image, the best ones (`top_k`), count.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth(annotations, keep="all")
    classes = ClassMap.from_categories(truth.categories, source=str(truth.source))
    places_of = defaultdict(list)
    for place, result in enumerate(results):
        places_of[result["image_id"]].append(place)

    parts = [_measure_image(truth, np.arange(0), 0, (1, 1), [], results, classes, codec)]  # types of empty columns
    for image, image_id in enumerate(truth.image_ids.tolist()[: settings.max_images]):
        places = _best_of_each_class(results, places_of[image_id], settings.top_k)
        rows, size = np.arange(*truth.starts[image : image + 2]), truth.size(image)
        parts.append(_measure_image(truth, rows, image_id, size, places, results, classes, codec))
    return Overlaps(*_join(parts), list(classes.names))


def _best_of_each_class(results: Sequence[dict], places: list[int], max_detections: int) -> list[int]:
    """Places of one image's detections, best score first, at most so many of each class."""
    kept: list[int] = []
    counts: dict[int, int] = defaultdict(int)
    for place in sorted(places, key=lambda place: -results[place]["score"]):
        category_id = results[place]["category_id"]
        counts[category_id] += 1
        if counts[category_id] <= max_detections:
            kept.append(place)
    return kept


@torch.inference_mode()
def _measure_image(
    truth: GroundTruth,
    rows: np.ndarray,
    image_id: int,
    size: tuple[int, int],
    places: Sequence[int],
    results: Sequence[dict],
    classes: ClassMap,
    codec: MaskCodec | None,
) -> tuple[ObjectTable, DetectionTable, Pairs]:
    """The tables of one image of `size` (height, width): objects at `rows`, detections at `places`, counted from 0."""
    detections = [results[place] for place in places]
    rles = [masks.segmentation_to_rle(result["segmentation"], size) for result in detections]
    boxes = corners(detections)
    own_classes = np.array([classes.channel_of(result["category_id"]) for result in detections], dtype=np.int64)

    crowd, object_boxes = truth.crowd[rows], torch.from_numpy(truth.boxes[rows])
    object_rles = [truth.rle(row) for row in rows.tolist()]
    object_classes = np.array([classes.channel_of(key) for key in truth.category_ids[rows].tolist()], dtype=np.int64)

    overlap = _iou(rles, object_rles, crowd)  # (F, A)
    box_overlap = np.where(crowd, 0.0, box_iou(boxes, object_boxes).numpy())  # (F, A)
    same_class = own_classes[:, None] == object_classes
    about = _choose_objects(box_overlap, same_class)
    known = np.flatnonzero(about != UNMATCHED)
    its_overlap, reach, ceiling = np.zeros(len(detections)), np.zeros(len(detections)), np.ones(len(rows))
    its_overlap[known], reach[known] = overlap[known, about[known]], box_overlap[known, about[known]]

    if codec is not None and len(rows):
        pieces = truth.box_masks(rows, codec.mask_size).split(_MASKS_AT_ONCE)
        decoded = torch.cat([reconstruct(codec, some).masks.cpu() for some in pieces])
        _, ceiling = paste_and_compare(decoded, object_boxes, size, object_rles, both_empty=0.0)
        its_rles = [object_rles[row] for row in about[known].tolist()]
        _, reach[known] = paste_and_compare(decoded[about[known]], boxes[known], size, its_rles, both_empty=0.0)

    neighbours = _neighbours(object_rles, object_boxes, crowd, size)  # A + 1: the last, row UNMATCHED, for no object
    rows_of_pairs, columns_of_pairs = np.nonzero(same_class & (overlap >= THRESHOLDS[0]))
    return (
        ObjectTable(
            ids=truth.ids[rows],
            image_ids=np.full(len(rows), image_id),
            classes=object_classes,
            areas=truth.areas_of(rows),
            crowd=crowd,
            occlusion=_share_on(_box_rles(object_boxes, size), neighbours, np.arange(len(rows))),
            ceiling=ceiling,
        ),
        DetectionTable(
            results=np.array(places, dtype=np.int64),
            image_ids=np.full(len(detections), image_id),
            classes=own_classes,
            scores=np.array([result["score"] for result in detections], dtype=np.float64),
            areas=np.asarray(rle_api.area(rles), dtype=np.float64) if rles else np.zeros(0),
            occlusion=_share_on(_box_rles(boxes, size), neighbours, about),
            about=about,
            overlap=its_overlap,
            leak=_share_on(rles, neighbours, about),
            reach=reach,
        ),
        Pairs(rows_of_pairs, columns_of_pairs, overlap[rows_of_pairs, columns_of_pairs]),
    )


def _choose_objects(box_overlap: np.ndarray, same_class: np.ndarray) -> np.ndarray:
    """(F,) the object that each detection is about: see `DetectionTable.about`. Both arguments are (F, A)."""
    count, objects = box_overlap.shape
    if objects == 0:
        return np.full(count, UNMATCHED)
    row = np.arange(count)
    own, other = np.where(same_class, box_overlap, 0.0), np.where(same_class, 0.0, box_overlap)
    best_own, best_other = own.argmax(axis=1), other.argmax(axis=1)
    own, other = own[row, best_own], other[row, best_other]
    of_own_class = np.where(own >= SAME_OBJECT, best_own, UNMATCHED)
    return np.where((other >= SAME_PLACE) & (other > own), best_other, of_own_class)


def _neighbours(rles: Sequence[dict], boxes: Tensor, crowd: np.ndarray, size: tuple[int, int]) -> list[dict]:
    """RLEs of the pixels of an object's neighbours without its own, A of them; last, those of all objects.

    Neighbours are the other objects of the image, crowds apart, whose boxes share pixels with the object's.
    """
    bitmaps = masks.decode_rle(rles) if rles else torch.zeros(0, *size, dtype=torch.bool)
    single = torch.from_numpy(~crowd)
    meet = (box_iou(boxes, boxes) > 0) & single
    meet.fill_diagonal_(False)
    around = [bitmaps[beside].any(dim=0) & ~own for beside, own in zip(meet, bitmaps, strict=True)]
    return masks.encode_rle(torch.stack([*around, bitmaps[single].any(dim=0)]))


def corners(entries: Sequence[dict]) -> Tensor:
    """(K, 4) float64 xyxy of COCO boxes (x, y, w, h), image pixels."""
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float64).reshape(-1, 4)
    return torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].clamp(min=0)], dim=1)


def _box_rles(boxes: Tensor, size: tuple[int, int]) -> list[dict]:
    """RLEs of the pixels of boxes (K, 4) xyxy that lie in an image of `size` (height, width)."""
    height, width = size
    inside = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    corner_and_sides = torch.cat([inside[:, :2], inside[:, 2:] - inside[:, :2]], dim=1)
    return coco_rle.frPyObjects(corner_and_sides.numpy(), height, width) if len(boxes) else []


def _iou(rles: Sequence[dict], others: Sequence[dict], crowd: np.ndarray) -> np.ndarray:
    """(K, A) IoU of masks; the covered share of the first where the second is a crowd."""
    if not rles or not others:
        return np.zeros((len(rles), len(others)))
    return np.asarray(rle_api.iou(list(rles), list(others), crowd.astype(int).tolist()))


def _share_on(rles: Sequence[dict], regions: Sequence[dict], which: np.ndarray) -> np.ndarray:
    """(K,) share of mask k that lies in `regions[which[k]]`, 0 for an empty mask."""
    return _iou(rles, regions, np.ones(len(regions)))[np.arange(len(rles)), which]


def _join(parts: Sequence[tuple[ObjectTable, DetectionTable, Pairs]]) -> tuple[ObjectTable, DetectionTable, Pairs]:
    """One table of all images' tables, with rows counted over all of them; detections are ordered by score."""
    first_object = np.cumsum([0, *(len(objects.ids) for objects, _, _ in parts)])
    first_detection = np.cumsum([0, *(len(detections.results) for _, detections, _ in parts)])
    for part, (_, detections, pairs) in enumerate(parts):
        detections.about[detections.about != UNMATCHED] += first_object[part]
        pairs.detections[:] += first_detection[part]
        pairs.objects[:] += first_object[part]
    objects, detections, pairs = (
        type(tables[0])(*map(np.concatenate, zip(*tables, strict=True))) for tables in zip(*parts, strict=True)
    )

    by_score = np.argsort(-detections.scores, kind="stable")
    rank = np.empty_like(by_score)
    rank[by_score] = np.arange(len(by_score))
    by_rank = np.argsort(rank[pairs.detections], kind="stable")
    pairs = Pairs(rank[pairs.detections][by_rank], pairs.objects[by_rank], pairs.overlap[by_rank])
    return objects, DetectionTable(*(column[by_score] for column in detections)), pairs
