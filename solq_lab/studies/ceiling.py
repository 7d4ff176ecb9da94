"""The upper bound a codec sets: ground truth encoded, decoded and scored. Paper: section 3.2, table 3.

Noise adds normal errors to every box or mask vector, as a network would make them.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from solq_lab import masks
from solq_lab.bars import progress_bar
from solq_lab.build import build_codec
from solq_lab.codecs.base import MaskCodec, describe_codec
from solq_lab.codecs.reconstruct import device_of, paste_and_compare, reconstruct
from solq_lab.data.folders import Split
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data_folder import annotations_of
from solq_lab.evaluation.coco import DEFAULTS, evaluate_results
from solq_lab.evaluation.evaluator import file_of_split, inputs_of_scoring, stored_evaluation
from solq_lab.evaluation.sizes import select_by_size
from solq_lab.evaluation.summary import MAX_DETECTIONS, Evaluation
from solq_lab.files import write_json
from solq_lab.models.weights import read_weights
from solq_lab.runs import Run
from solq_lab.schema import EvaluationSection
from solq_lab.workers import in_processes

_KINDS = ("segm", "boundary")
_MASKS_AT_ONCE = 64  # a piece of work; at N = 256 its reconstructions are 16 MB


class Noise(NamedTuple):
    """Errors of a network that otherwise makes none."""

    box: float = 0.0  # standard deviation of the error of each edge, over the side of the box
    # standard deviation of the error of each entry, over that entry's standard deviation among the objects of the data
    # set: 1 is about the error of always predicting the mean vector
    vector: float = 0.0
    seed: int = 0  # of the errors. An object's errors depend on this and its annotation id only, and grow in proportion
    # of a quantiser that rounds all entries, over the root mean square of their standard deviations; 0: none
    step: float = 0.0


class Reconstructions(NamedTuple):
    """Objects of a data set after encoding and decoding, in the order of their images."""

    ids: np.ndarray  # (A,) int64 annotation ids
    areas: np.ndarray  # (A,) float64 areas as annotated, pixels; the mask's where the file gives none
    ious: np.ndarray  # (A,) float64 IoU of each mask with its ground truth; two empty masks have 1
    results: list[dict]  # A COCO results, score 1
    bits: float  # of a stored mask on average (`bits_per_mask`)


def codec_ceiling(
    annotations: str | Path | dict | GroundTruth,
    codec: MaskCodec,
    settings: EvaluationSection = DEFAULTS,
    *,
    noise: Noise = Noise(),  # noqa: B008 - a constant
    processes: int = 1,
) -> Evaluation:
    """Mask and boundary AP of a network that predicts every object, its box and its vector without error.

    Every object that is no crowd is rasterised in its box, encoded, decoded, binarised and pasted back into the box
    with score 1, on the codec's device.

    Args:
        annotations: COCO instances file, its parsed content, or a `GroundTruth` with masks that kept all objects.
        codec: the codec.
        settings: what is small and what a boundary, and how many images count, the first ones by rising id.
        noise: errors of boxes and vectors.
        processes: how many work on the images; the numbers do not depend on it.

    Returns:
        "segm" and "boundary" numbers, and the mean IoU of an object's mask with its ground truth: "segm.IoU", and
        "segm.IoUs", "segm.IoUm", "segm.IoUl" by object size (NaN where there is no object). "segm.bits": of a stored
        mask.

    Raises:
        DataError: the annotations cannot be used.
        ValueError: negative noise, or several processes for a codec on a GPU.
    """
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth(annotations, keep="all")
    rows = truth.rows(truth.image_ids[: settings.max_images].tolist())
    found = reconstruct_objects(truth, codec, max_images=settings.max_images, noise=noise, processes=processes)
    # All objects count: the bound is the codec's, not that of a limit on detections.
    limit = max(MAX_DETECTIONS, max_objects_of_a_class(truth, rows))
    scoring = partial(evaluate_results, truth, found.results, settings.model_copy(update={"top_k": limit}))
    segm, boundary = in_processes(_score, scoring, _KINDS, min(processes, len(_KINDS)))

    chosen = {"": np.ones(len(found.ious), dtype=bool)} | select_by_size(found.areas, settings.area_sides)
    ious = {
        f"segm.IoU{size[:1]}": float(found.ious[which].mean()) if which.any() else math.nan
        for size, which in chosen.items()
    }
    return dataclasses.replace(
        segm,
        metrics=segm.metrics | boundary.metrics | ious | {"segm.bits": found.bits},
        per_class={name: row | boundary.per_class[name] for name, row in segm.per_class.items()},
    )


def run_ceiling(run: Run, *, split: Literal["val", "train"] | Split = "val") -> Evaluation | None:
    """The upper bound of the run's codec on the images of a split (`codec_ceiling`); None for a plain detector.

    Stored as `ceiling.json` in the run folder (`ceiling_train.json`), and read from there while codec, annotations and
    settings are the same: training, notebooks and command line share one measurement.
    """
    experiment = run.experiment.evaluated_on(split)
    codec = build_codec(experiment, tables=read_weights(run.weights).codec if run.weights.exists() else None)
    if codec is None:
        return None

    ceiling_file = file_of_split(run.folder / "ceiling.json", split)
    inputs = inputs_of_scoring(experiment) | {"codec": describe_codec(codec)}
    ceiling = stored_evaluation(ceiling_file, inputs)
    if ceiling is None:
        ceiling = codec_ceiling(annotations_of(experiment, "val"), codec, experiment.evaluation)
        write_json(ceiling_file, ceiling.to_dict() | inputs)
    return ceiling


def reconstruct_objects(
    annotations: str | Path | dict | GroundTruth,
    codec: MaskCodec,
    *,
    max_images: int | None = None,
    noise: Noise = Noise(),  # noqa: B008 - a constant
    processes: int = 1,
) -> Reconstructions:
    """Every object that is no crowd, encoded and decoded; arguments and errors as in `codec_ceiling`."""
    if not (all(0 <= size < math.inf for size in (noise.box, noise.vector, noise.step)) and noise.seed >= 0):
        raise ValueError(f"{noise}: allowed are finite standard deviations and steps from 0 on and seeds from 0 on")
    device = device_of(codec)
    if processes > 1 and device.type != "cpu":
        raise ValueError(f"{processes} processes cannot share a codec on {device}; use one, or a codec on the cpu")
    truth = annotations if isinstance(annotations, GroundTruth) else GroundTruth(annotations, keep="all")
    rows = truth.rows(truth.image_ids[:max_images].tolist())
    pieces = [rows[start : start + _MASKS_AT_ONCE] for start in range(0, len(rows), _MASKS_AT_ONCE)]

    scene = _Scene(truth, codec, noise, None)
    if (noise.vector > 0 or noise.step > 0) and pieces:
        counts, firsts, seconds = zip(*in_processes(_vector_sums, scene, pieces, processes), strict=True)
        mean = sum(firsts) / sum(counts)
        scene = scene._replace(std=np.sqrt(np.maximum(sum(seconds) / sum(counts) - mean**2, 0.0)))

    masks.paste_to_rle(torch.zeros(0, 1, 1, dtype=torch.bool), torch.zeros(0, 4), (1, 1))  # compile once, before a fork
    ious, results, symbols = [np.zeros(0)], [], []
    work = in_processes(_reconstruct_piece, scene, pieces, processes)
    progress = progress_bar(work, total=len(pieces), desc="ceiling", unit="piece")
    for piece_ious, piece_results, piece_symbols in progress:
        ious.append(piece_ious)
        results += piece_results
        symbols.append(piece_symbols)
    bits = bits_per_mask(codec, symbols)
    return Reconstructions(truth.ids[rows], truth.areas_of(rows), np.concatenate(ious), results, bits)


class _Scene(NamedTuple):
    """What all pieces of work share; std: (D,) float64 of the vectors, or None where they get no error."""

    truth: GroundTruth
    codec: MaskCodec
    noise: Noise
    std: np.ndarray | None


def max_objects_of_a_class(truth: GroundTruth, rows: np.ndarray) -> int:
    """The most objects of one class in one image among those at `rows`; 0 where there are none."""
    pairs = np.column_stack([truth.image_rows[rows], truth.category_ids[rows]])
    return int(np.unique(pairs, axis=0, return_counts=True)[1].max(initial=0))


def bits_per_mask(codec: MaskCodec, symbols: list[np.ndarray | None]) -> float:
    """Bits of a stored mask: of its tokens, of its quantised entries (k, D) int64, or 32 for each entry.

    Quantised entries cost what an ideal entropy coder with a table per entry needs, the table not counted.
    """
    if codec.token_bits is not None:
        return float(codec.token_bits)
    known = [some for some in symbols if some is not None]
    if not known:
        return 32.0 * codec.vector_dim
    bits = 0.0
    for entry in np.concatenate(known).T:
        shares = np.unique(entry, return_counts=True)[1] / len(entry)
        bits -= float((shares * np.log2(shares)).sum())
    return bits


def _reconstruct_piece(scene: _Scene, rows: np.ndarray) -> tuple[np.ndarray, list[dict], np.ndarray | None]:
    """IoU (k,) and COCO results of the objects at `rows` (k,); their quantised entries (k, D) behind a quantiser."""
    truth, codec, noise, std = scene
    boxes = truth.boxes[rows].copy()  # (k, 4)
    errors = np.zeros((len(boxes), codec.vector_dim))
    for place, key in enumerate(truth.ids[rows].tolist()):
        random = np.random.default_rng((noise.seed, key % 2**64))
        # Edges that cross are swapped.
        sides = np.tile(boxes[place, 2:] - boxes[place, :2], 2)
        corners = (boxes[place] + noise.box * random.standard_normal(4) * sides).reshape(2, 2)
        boxes[place] = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
        if noise.vector > 0 and std is not None:
            errors[place] = noise.vector * std * random.standard_normal(codec.vector_dim)

    true_masks = truth.box_masks(rows, codec.mask_size)
    step = 0.0 if std is None else noise.step * math.sqrt(float(np.square(std).mean()))
    decoded = reconstruct(codec, true_masks, vector_error=torch.from_numpy(errors) if noise.vector else None, step=step)
    symbols = (decoded.vectors.double().cpu().numpy() / step).round().astype(np.int64) if step > 0 else None

    ious, results = [np.zeros(0)], []
    for image, places in truth.by_image(rows):
        true_rles = [truth.rle(row) for row in rows[places].tolist()]
        rles, image_ious = paste_and_compare(
            decoded.masks[places], torch.from_numpy(boxes[places]), truth.size(image), true_rles
        )
        ious.append(image_ious)
        results += [
            {"image_id": int(truth.image_ids[image]), "category_id": category_id, "score": 1.0, "segmentation": rle}
            for category_id, rle in zip(truth.category_ids[rows[places]].tolist(), rles, strict=True)
        ]
    return np.concatenate(ious), results, symbols


@torch.inference_mode()
def _vector_sums(scene: _Scene, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """How many vectors, their sum (D,) and the sum of their squares (D,)."""
    true_masks = scene.truth.box_masks(rows, scene.codec.mask_size).to(device_of(scene.codec))
    vectors = scene.codec.encode(true_masks).double().cpu().numpy()
    return len(vectors), vectors.sum(axis=0), (vectors**2).sum(axis=0)


def _score(scoring: Callable[..., Evaluation], kind: str) -> Evaluation:
    return scoring(kinds=(kind,))
