"""The best a mask code allows: ground truth sent through the code. Paper: section 3.2, table 3.

And what errors cost: the same with a normal error added to every box, or to every vector, as a network would make it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval.core import mask as rle_api
from torch import Tensor
from tqdm.auto import tqdm

from solq_lab import masks
from solq_lab.codecs.base import MaskCodec
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.evaluation.summary import Evaluation
from solq_lab.workers import in_processes

_KINDS = ("segm", "boundary")
_MASKS_AT_ONCE = 64  # a piece of work; at N = 256 its reconstructions are 16 MB


class Noise(NamedTuple):
    """Errors given to a network that makes none.

    box: standard deviation of the error of each edge, over the side of the box.
    vector: standard deviation of the error of each entry, over that entry's spread (standard deviation) among the
        objects of the data set: 1 is about as wrong as always giving the mean vector.
    seed: of the errors. An object's errors depend on this and its annotation id only, and grow in proportion.
    """

    box: float = 0.0
    vector: float = 0.0
    seed: int = 0


class Reconstructions(NamedTuple):
    """Objects of a data set after the way through a code, in the order of their images.

    ids: (A,) int64 annotation ids.
    areas: (A,) float64 areas as annotated, pixels; the mask's where the file gives none.
    ious: (A,) float64 IoU of each mask with its ground truth; two empty masks have 1.
    results: A COCO results, score 1.
    """

    ids: np.ndarray
    areas: np.ndarray
    ious: np.ndarray
    results: list[dict]


def codec_ceiling(
    annotations: str | Path | dict | GroundTruth,
    codec: MaskCodec,
    *,
    area_sides: tuple[float, float] = DEFAULTS.area_sides,
    boundary_ratio: float = DEFAULTS.boundary_ratio,
    image_ids: Collection[int] | None = None,
    max_images: int | None = None,
    noise: Noise = Noise(),  # noqa: B008 - a constant
    processes: int = 1,
) -> Evaluation:
    """Mask and boundary AP of a network that finds every object, its box and its vector without fault.

    Every object that is no crowd is rasterised in its box, encoded, decoded, binarised and pasted back into the box
    with score 1, on the codec's device.

    Args:
        annotations: COCO instances file, its parsed content, or `GroundTruth` with all of its objects.
        codec: the mask code.
        area_sides: square roots of the areas, pixels, that part small from medium and medium from large objects.
        boundary_ratio: boundary width over the image's diagonal.
        image_ids: images to look at. None: all.
        max_images: only the first so many of them, by rising id. None: all.
        noise: errors of boxes and vectors.
        processes: how many work on the images; the numbers do not depend on it.

    Returns:
        "segm" and "boundary" numbers, and the mean IoU of an object's mask with its ground truth: "segm.IoU", and
        "segm.IoUs", "segm.IoUm", "segm.IoUl" by object size (NaN where there is no object).

    Raises:
        DataError: the annotations cannot be used.
        ValueError: negative noise, or several processes for a codec on a GPU.
    """
    scene = _read_scene(annotations, codec, image_ids, max_images, noise)
    found = _reconstruct(scene, processes)
    scoring = _Scoring(scene, found.results, area_sides, boundary_ratio)
    scores = list(in_processes(_score, scoring, _KINDS, min(processes, len(_KINDS))))
    return dataclasses.replace(
        scores[0],
        metrics=_joined(score.metrics for score in scores) | _mean_ious(found, area_sides),
        per_class={name: _joined(score.per_class[name] for score in scores) for name in scores[0].per_class},
    )


def reconstruct_objects(
    annotations: str | Path | dict | GroundTruth,
    codec: MaskCodec,
    *,
    image_ids: Collection[int] | None = None,
    max_images: int | None = None,
    noise: Noise = Noise(),  # noqa: B008 - a constant
    processes: int = 1,
) -> Reconstructions:
    """Every object that is no crowd after the way through the code; arguments and errors as in `codec_ceiling`."""
    return _reconstruct(_read_scene(annotations, codec, image_ids, max_images, noise), processes)


def of_size(areas: np.ndarray, area_sides: tuple[float, float]) -> dict[str, np.ndarray]:
    """Which of the areas (A,), pixels, are small "s", medium "m" and large "l": (A,) bool each.

    As in COCO's numbers, an area on a bound belongs to both sizes that it parts.
    """
    bounds = (0.0, area_sides[0] ** 2, area_sides[1] ** 2, math.inf)
    return {size: (areas >= low) & (areas <= high) for size, (low, high) in zip("sml", pairwise(bounds), strict=True)}


class _Scene(NamedTuple):
    """What all pieces of work share; `rows` are the objects in the chosen images."""

    truth: GroundTruth
    rows: np.ndarray
    image_ids: list[int]
    codec: MaskCodec
    noise: Noise


class _Scoring(NamedTuple):
    scene: _Scene
    results: list[dict]
    area_sides: tuple[float, float]
    boundary_ratio: float


def _read_scene(
    annotations: str | Path | dict | GroundTruth,
    codec: MaskCodec,
    image_ids: Collection[int] | None,
    max_images: int | None,
    noise: Noise,
) -> _Scene:
    if not (0 <= noise.box < math.inf and 0 <= noise.vector < math.inf and noise.seed >= 0):
        raise ValueError(f"{noise}: allowed are finite standard deviations from 0 on and seeds from 0 on")
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth(annotations, keep="all")
    chosen = sorted(truth.image_ids.tolist() if image_ids is None else image_ids)[:max_images]
    return _Scene(truth, truth.rows(chosen), chosen, codec, noise)


def _reconstruct(scene: _Scene, processes: int) -> Reconstructions:
    device = _device(scene.codec)
    if processes > 1 and device.type != "cpu":
        raise ValueError(f"{processes} processes cannot share a codec on {device}; use one, or a codec on the cpu")
    pieces = [scene.rows[start : start + _MASKS_AT_ONCE] for start in range(0, len(scene.rows), _MASKS_AT_ONCE)]
    spread = None
    if scene.noise.vector > 0 and pieces:
        spread = _spread(list(in_processes(_vector_sums, scene, pieces, processes)))
    masks.paste_to_rle(torch.zeros(0, 1, 1, dtype=torch.bool), torch.zeros(0, 4), (1, 1))  # compile once, before a fork
    ious, results = [], []
    work = in_processes(_send_through, scene, [_Piece(rows, spread) for rows in pieces], processes)
    for received in tqdm(work, total=len(pieces), desc="ceiling", unit="piece", delay=5, leave=False):
        ious += received.ious
        results += received.results
    ids, areas = scene.truth.ids[scene.rows], scene.truth.areas_of(scene.rows)
    return Reconstructions(ids, areas, np.array(ious, dtype=np.float64), results)


class _Piece(NamedTuple):
    """rows: (k,) of the scene's objects. spread: (D,) float64 of the vectors, or None where they get no error."""

    rows: np.ndarray
    spread: np.ndarray | None


class _Received(NamedTuple):
    """What comes out of one piece, object by object."""

    ious: list[float]
    results: list[dict]


@torch.inference_mode()
def _send_through(scene: _Scene, piece: _Piece) -> _Received:
    codec, objects, noise = scene.codec, scene.truth, scene.noise
    vectors = _encode(scene, piece.rows)  # (k, D)
    boxes = objects.boxes[piece.rows].copy()  # (k, 4)
    for place, key in enumerate(objects.ids[piece.rows].tolist()):
        random = np.random.default_rng((noise.seed, key % 2**64))
        boxes[place] = _moved(boxes[place], noise.box * random.standard_normal(4))
        if piece.spread is not None:
            error = torch.from_numpy(noise.vector * piece.spread * random.standard_normal(codec.vector_dim))
            vectors[place] += error.to(vectors)
    bits = codec.binarize(codec.decode(vectors))  # (k, N, N)
    ious, results = [], []
    for image, places in objects.by_image(piece.rows):
        image_id, size = int(objects.image_ids[image]), objects.size(image)
        rows = piece.rows[places]
        truth = [objects.rle(row) for row in rows.tolist()]
        found = masks.paste_to_rle(bits[places], torch.from_numpy(boxes[places]), size)
        ious += [_iou(one, other) for one, other in zip(truth, found, strict=True)]
        results += [
            {"image_id": image_id, "category_id": category_id, "score": 1.0, "segmentation": rle}
            for category_id, rle in zip(objects.category_ids[rows].tolist(), found, strict=True)
        ]
    return _Received(ious, results)


@torch.inference_mode()
def _vector_sums(scene: _Scene, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many vectors, their sum (D,) and the sum of their squares (D,)."""
    vectors = _encode(scene, rows).double().cpu().numpy()
    return len(vectors), vectors.sum(axis=0), (vectors**2).sum(axis=0)


def _spread(sums: list[tuple[int, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The standard deviation (D,) of each entry of all vectors."""
    counts, firsts, seconds = zip(*sums, strict=True)
    mean = sum(firsts) / sum(counts)
    return np.sqrt(np.maximum(sum(seconds) / sum(counts) - mean**2, 0.0))


def _encode(scene: _Scene, rows: np.ndarray) -> Tensor:
    """Vectors (k, D) of objects, on the codec's device."""
    return scene.codec.encode(scene.truth.box_masks(rows, scene.codec.mask_size).to(_device(scene.codec)))


def _moved(box: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A box (x0, y0, x1, y1) whose edges are wrong by shares of its sides; edges that pass each other change places."""
    sides = np.tile(box[2:] - box[:2], 2)
    corners = (box + error * sides).reshape(2, 2)
    return np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def _iou(one: dict, other: dict) -> float:
    if not rle_api.area([one, other]).any():
        return 1.0
    return float(rle_api.iou([one], [other], [0])[0][0])


def _device(codec: MaskCodec) -> torch.device:
    table = next(codec.buffers(), None)
    return torch.device("cpu") if table is None else table.device


def _score(scoring: _Scoring, kind: str) -> Evaluation:
    return evaluate_results(
        scoring.scene.truth,
        scoring.results,
        kinds=(kind,),
        area_sides=scoring.area_sides,
        boundary_ratio=scoring.boundary_ratio,
        image_ids=scoring.scene.image_ids,
    )


def _joined(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


def _mean_ious(found: Reconstructions, area_sides: tuple[float, float]) -> dict[str, float]:
    chosen = {"": np.ones(len(found.ious), dtype=bool)} | of_size(found.areas, area_sides)
    return {
        f"segm.IoU{size}": float(found.ious[which].mean()) if which.any() else math.nan
        for size, which in chosen.items()
    }
