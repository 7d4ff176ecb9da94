"""What decoder attention lies on: the outline of the object, its extremities, or neither. Paper: figure 4.

The paper shows that SOLQ's queries attend to the outline of objects; a detector, which predicts only a box, is known to
attend to the extremities, the points where an object touches its box. Both are measured object by object and layer by
layer, beside two baselines: points spread evenly over the box, and the points of *another* object's query, stretched
into this object's box. Only what exceeds the second follows the shape of this very object.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_rle
from scipy.ndimage import distance_transform_edt

from solq_lab.bars import progress_bar
from solq_lab.data.coco import CocoDataset
from solq_lab.evaluation.sizes import SIZES, size_of
from solq_lab.inference.attention import ObjectView, object_view, predict_with_attention, query_points
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import decode_rle
from solq_lab.studies.pairing import UNMATCHED, pair_objects

FULL = 0.65  # share of its box that an object covers at most whose outline is far from its box


class AttentionStudy(NamedTuple):
    """Shares, 0..1, of the attention of K found objects' queries; one column per decoder layer.

    band: "near" is within so many pixels.
    sizes: (K,) rows of `SIZES`.
    outline, extremities: (K, layers) share of a query's weight near the outline, and near the extremities.
    even_outline, even_extremities: (K,) the same for points spread evenly over the object's box, grown by the band.
    other_outline, other_extremities: (K, layers) the same for the points of the query before it that found an object of
        this size, stretched from that query's box into this one's; NaN for the first.
    """

    band: float
    sizes: np.ndarray
    outline: np.ndarray
    even_outline: np.ndarray
    other_outline: np.ndarray
    extremities: np.ndarray
    even_extremities: np.ndarray
    other_extremities: np.ndarray

    def mean(self, name: str, size: int) -> np.ndarray:
        """(layers,) mean of a share over the objects of one size; NaN without objects."""
        values = getattr(self, name)[self.sizes == size]
        values = values if values.ndim == 2 else np.repeat(values[:, None], self.outline.shape[1], axis=1)
        known = np.isfinite(values)
        return np.where(known, values, 0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)

    def frame(self) -> pd.DataFrame:
        """Percent of the weight near outline and extremities beside both baselines, a row per size and layer."""
        layers = pd.RangeIndex(1, self.outline.shape[1] + 1, name="layer")
        rows = {}
        for size, word in enumerate(SIZES):
            columns = {
                (near, whose): 100 * self.mean(f"{prefix}{near}", size)
                for near in ("outline", "extremities")
                for whose, prefix in (("own query", ""), ("other query", "other_"), ("uniform", "even_"))
            }
            rows[f"{word}, {(self.sizes == size).sum()} objects"] = pd.DataFrame(columns, index=layers)
        return pd.concat(rows)

    def shape_frame(self) -> pd.DataFrame:
        """Whether the last layer follows each object's own shape: its query against the other object's, in percent.

        Returns:
            A row for outline and extremities: means over the K' objects that have another query to compare with, their
            paired difference, its 95 % interval, and a verdict. The interval is the normal approximation for
            independent objects, infinite below two.
        """
        rows = {}
        for near in ("outline", "extremities"):
            own, other = (100 * getattr(self, name)[:, -1] for name in (near, f"other_{near}"))
            own, other = own[np.isfinite(other)], other[np.isfinite(other)]
            gains = own - other
            mean = gains.mean() if len(gains) else math.nan
            half = 1.96 * gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
            means = [values.mean() if len(values) else math.nan for values in (own, other)]
            verdict = "follows the shape" if mean > half else "below the other" if mean < -half else "may be chance"
            rows[near] = [len(gains), *means, mean, mean - half, mean + half, verdict]
        columns = ["objects", "own query", "other query", "difference", "low", "high", "verdict"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype({"objects": int})


class Zones(NamedTuple):
    """Where "near" is, for one object: bitmaps (h, w) of a window of the image."""

    corner: tuple[int, int]  # (x, y) of the window's first pixel; it may lie outside the image
    # outline, extremities, box: near the outline, near the extremities, in the box
    outline: np.ndarray
    extremities: np.ndarray
    box: np.ndarray


class _QueryAttention(NamedTuple):
    """One query's points (layers, n, 2) in units of its box, from its centre, and their weights (layers, n)."""

    points: np.ndarray
    weights: np.ndarray


def study_attention(
    predictor: Predictor,
    dataset: CocoDataset,
    *,
    band: float,
    area_sides: tuple[float, float],
    score: float = 0.3,
    max_images: int | None = None,
) -> AttentionStudy:
    """Measure the queries of all ground-truth objects that a model finds (same class, box IoU of at least 0.5).

    Args:
        predictor: the model.
        dataset: images with true masks (`build_images`).
        band: pixels of the original images.
        area_sides: sides of the squares below whose areas an object is small, and medium; pixels.
        score: less certain detections are left out.
        max_images: only the first so many images. None: all.

    Raises:
        ValueError: a band that is not positive.
    """
    if not band > 0:
        raise ValueError(f"band {band}: allowed are positive numbers of pixels")
    rows: list[list] = []
    before: dict[int, _QueryAttention] = {}  # the last query that found an object of this size
    for index in progress_bar(range(len(dataset))[:max_images], desc="attention", unit="img"):
        ground_truth, image = dataset.objects(index), dataset[index][0]
        detections, layers = predict_with_attention(predictor, image.permute(1, 2, 0).numpy())
        detections = detections.above(score)
        partners, _ = pair_objects(detections, ground_truth)
        scale = torch.tensor([image.shape[2], image.shape[1]] * 2)

        for mask, partner in zip(decode_rle(ground_truth.masks or []).numpy(), partners.tolist(), strict=True):
            if partner == UNMATCHED or not mask.any():
                continue
            query = int(detections.queries[partner])
            box = (layers[-1].boxes[query] * scale).numpy()
            looked = [query_points(layers, query, layer=layer) for layer in range(len(layers))]
            points = np.stack([one.points.numpy() for one in looked]) * scale[:2].numpy()
            weights = np.stack([one.weights.numpy() for one in looked])
            attention = _QueryAttention((points - box[:2]) / box[2:], weights)
            size = size_of(int(mask.sum()), area_sides)
            rows.append([size, *_measure(near_zones(mask, band), box, attention, before.get(size), mask.shape)])
            before[size] = attention

    # The measured numbers come in the order of the study's fields.
    count = predictor.experiment.model.decoder_layers
    sizes, *shares = (np.array(column, dtype=float) for column in (zip(*rows, strict=True) if rows else [()] * 7))
    shares = [share if place % 3 == 1 else share.reshape(-1, count) for place, share in enumerate(shares)]
    return AttentionStudy(band, sizes.astype(int), *shares)


def _measure(
    zones: Zones, box: np.ndarray, own: _QueryAttention, other: _QueryAttention | None, image_size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """For outline and extremities in turn: (layers,) share of the query, share of the box, (layers,) of the other."""
    for near in (zones.outline, zones.extremities):
        yield _share(near, zones.corner, box, own, image_size)
        yield (near & zones.box).sum() / zones.box.sum()
        if other is None:
            yield np.full(len(own.weights), np.nan)
        else:
            yield _share(near, zones.corner, box, other, image_size)


def _share(
    near: np.ndarray, corner: tuple[int, int], box: np.ndarray, attention: _QueryAttention, image_size: tuple[int, int]
) -> np.ndarray:
    """(layers,) weight of the points that lie on a bitmap, and in the image: outside it they sample zeros."""
    across, down = np.moveaxis(np.floor(attention.points * box[2:] + box[:2]).astype(int), -1, 0)  # (layers, n)
    inside = (across >= 0) & (across < image_size[1]) & (down >= 0) & (down < image_size[0])
    across, down = across - corner[0], down - corner[1]
    inside &= (across >= 0) & (across < near.shape[1]) & (down >= 0) & (down < near.shape[0])
    inside[inside] = near[down[inside], across[inside]]
    return (attention.weights * inside).sum(axis=-1)


def examples_by_size(
    predictors: Sequence[Predictor],
    dataset: CocoDataset,
    *,
    area_sides: tuple[float, float],
    score: float = 0.3,
    max_images: int | None = None,
) -> dict[str, tuple[int, int]]:
    """For each size the object that the models find best: "small" -> (index of its image, row of its true object).

    Best is the object with the largest minimum of the models' box IoUs, among those that leave a good part of their box
    empty where there are any: only there outline and box are different places. A size of which no object is found by
    all models is left out.

    Args:
        predictors: one model or several, for the same images.
        dataset, area_sides, score, max_images: as for `study_attention`.
    """
    best: dict[int, tuple[bool, float, int, int]] = {}
    for index in range(len(dataset))[:max_images]:
        ground_truth, image = dataset.objects(index), dataset[index][0].permute(1, 2, 0).numpy()
        ious = [pair_objects(predictor.predict(image).above(score), ground_truth)[1] for predictor in predictors]
        for row, (rle, iou) in enumerate(zip(ground_truth.masks or [], np.min(ious, axis=0).tolist(), strict=True)):
            area, (_, _, width, height) = int(coco_rle.area(rle)), coco_rle.toBbox(rle)
            candidate = (area < FULL * width * height, iou, index, row)
            size = size_of(area, area_sides)
            if iou > 0:
                best[size] = max(best.get(size, candidate), candidate)
    return {SIZES[size]: best[size][2:] for size in sorted(best)}


def view_of_true_object(
    predictor: Predictor,
    dataset: CocoDataset,
    place: tuple[int, int],
    *,
    layer: int | None = -1,
    head: int | None = None,
    level: int | None = None,
) -> ObjectView:
    """The attention of the query that finds a true object; a plain detector's view shows the true mask.

    Args:
        predictor: the model.
        dataset: images with true masks.
        place: index of the image and row of its true object (`examples_by_size`).
        layer, head, level: as for `query_points`.

    Raises:
        ValueError: the model does not find the object; no such layer, head or level.
    """
    index, row = place
    ground_truth, image = dataset.objects(index), dataset[index][0].permute(1, 2, 0).numpy()
    detections, layers = predict_with_attention(predictor, image)
    partner = int(pair_objects(detections, ground_truth)[0][row])
    if partner == UNMATCHED:
        raise ValueError(f"object {row} of image {dataset.image_ids[index]} is not found; choose another object")
    view = object_view(image, detections, layers, partner, layer=layer, head=head, level=level)
    return view if view.mask is not None else view._replace(mask=decode_rle(ground_truth.masks or [])[row].numpy())


def near_zones(mask: np.ndarray, band: float) -> Zones:
    """Pixels near the outline and the extremities of a mask (H, W) bool that is not empty, and its box.

    The outline runs between pixels, half a pixel from the centres on both sides, and along the image's edge where the
    object is cut there. Extremities are the object's pixels in the outermost rows and columns. The box is grown by the
    band, rounded up.
    """
    margin = math.ceil(band) + 1
    down, across = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    cut = mask[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
    inside = np.pad(cut, margin)
    outermost = np.zeros_like(cut)
    outermost[[0, -1]] = cut[[0, -1]]
    outermost[:, [0, -1]] = cut[:, [0, -1]]

    to_outline = np.where(inside, distance_transform_edt(inside), distance_transform_edt(~inside)) - 0.5
    to_extremities = distance_transform_edt(~np.pad(outermost, margin)) - 0.5
    box = np.zeros_like(inside)
    box[1:-1, 1:-1] = True  # the margin is the band, rounded up, and one more
    corner = (int(across[0]) - margin, int(down[0]) - margin)
    return Zones(corner, to_outline <= band, to_extremities <= band, box)
