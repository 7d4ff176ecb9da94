"""Where queries look: the sampling points of the decoder's cross-attention. Paper: section 4, figure 4.

Nothing is injected into the network: hooks on its decoder layers listen while it predicts, and ask the attention for
the points it uses (`MultiScaleDeformableAttention.sampling`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from solq_lab.inference.predictor import Predictor
from solq_lab.masks import decode_rle
from solq_lab.models.attention import MultiScaleDeformableAttention
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.heads import UnifiedQueryHead
from solq_lab.models.solq import SOLQ
from solq_lab.structures import Detections, ImageBatch, LayerPrediction


class LayerAttention(NamedTuple):
    """Where all queries of one image look in one decoder layer, in the normalised image.

    points: (J, M, L, P, 2) as (x, y); a point may lie outside 0..1, where it finds nothing.
    weights: (J, M, L, P); of each query and head they sum to 1 over levels and points.
    reference: (J, 2) points or (J, 4) boxes (cx, cy, w, h) that the points are placed around.
    boxes: (J, 4) boxes (cx, cy, w, h) that the layer answers.
    """

    points: Tensor
    weights: Tensor
    reference: Tensor
    boxes: Tensor


class QueryPoints(NamedTuple):
    """The points of one query that were asked for, as one list.

    points: (K, 2) as (x, y), normalised image.
    weights: (K,); 1 in sum where every head and level was asked for.
    levels: (K,) int64, 0 is the finest.
    """

    points: Tensor
    weights: Tensor
    levels: Tensor


class ObjectView(NamedTuple):
    """One object of an image and where its query looks: what a drawing needs.

    pixels: (H, W, 3) uint8.
    mask: (H, W) bool, or None where a plain detector found it.
    box: (4,) x0, y0, x1, y1, pixels.
    reference: (2,) or (4,) as the points were placed around it, normalised image; of the first layer that is shown.
    looked: the points.
    caption: class and score.
    """

    pixels: np.ndarray
    mask: np.ndarray | None
    box: np.ndarray
    reference: np.ndarray
    looked: QueryPoints
    caption: str


def record_attention(model: SOLQ, images: ImageBatch) -> list[LayerAttention]:
    """Run the model on one image; where its queries look in every decoder layer, first to last.

    Args:
        model: in evaluation mode.
        images: one normalised image, B = 1.
    """
    with listening(model) as layers, torch.no_grad():
        model(images)
    return layers


def predict_with_attention(
    predictor: Predictor, image: str | Path | Image.Image | np.ndarray
) -> tuple[Detections, list[LayerAttention]]:
    """The objects in one image, and where all queries look on the way to them, on the CPU.

    Args:
        predictor: built without `bucket`.
        image: as `Predictor.predict` takes it.

    Raises:
        ValueError: a predictor that replays CUDA graphs, which no hook can hear.
        DataError: no image.
    """
    if predictor.bucket is not None:
        raise ValueError(f"a predictor with bucket={predictor.bucket} cannot be listened to; build it with bucket=None")
    with listening(predictor.model) as layers:
        detections = predictor.predict(image)
    return detections, layers


@contextlib.contextmanager
def listening(model: nn.Module) -> Iterator[list[LayerAttention]]:
    """Within the block the model runs once, on one image; the list is filled when the block ends.

    Args:
        model: any network with decoder layers and query heads, SOLQ and the SQR baseline alike.
    """
    looked: list[tuple[Tensor, Tensor, Tensor]] = []
    answered: list[Tensor] = []

    def look(attention: MultiScaleDeformableAttention, arguments: tuple) -> None:
        queries, reference, memory = arguments
        points, weights = attention.sampling(queries, reference, memory)
        ratios = memory.valid_ratios[:, None, None, :, None, :]  # (B, L, 2) -> (B, 1, 1, L, 1, 2)
        whole = reference[0, :, 0] / memory.valid_ratios[0, 0].repeat(reference.shape[-1] // 2)  # (J, 2 or 4)
        looked.append(((points / ratios)[0].cpu(), weights[0].cpu(), whole.cpu()))

    def answer(head: UnifiedQueryHead, arguments: tuple, prediction: LayerPrediction) -> None:
        answered.append(prediction.boxes[0].cpu())

    decoder = [part for part in model.modules() if isinstance(part, DecoderLayer)]
    heads = [part for part in model.modules() if isinstance(part, UnifiedQueryHead)]
    layers: list[LayerAttention] = []
    with contextlib.ExitStack() as hooks:
        for layer in decoder:
            hooks.callback(layer.cross_attention.register_forward_pre_hook(look).remove)
        for head in heads:
            hooks.callback(head.register_forward_hook(answer).remove)
        yield layers
    boxes = answered[len(answered) - len(looked) :]  # two-stage: the proposals' head has answered before
    layers += [LayerAttention(*place, box) for place, box in zip(looked, boxes, strict=True)]


def query_points(
    layers: Sequence[LayerAttention],
    query: int,
    *,
    layer: int | None = -1,
    head: int | None = None,
    level: int | None = None,
) -> QueryPoints:
    """Points and weights of one query; the weights count each head, and each layer, alike.

    Args:
        layers: what `record_attention` gives.
        query: which one, 0..J-1.
        layer: decoder layer, counted as Python counts: -1 is the last; None: all.
        head: attention head, 0..M-1; None: all.
        level: feature level, 0..L-1, 0 is the finest; None: all.

    Returns:
        The points; with `head` given the weights are those of that head, and sum to 1 over the levels.

    Raises:
        ValueError: no such query, layer, head or level.
    """
    count, heads, levels, _ = layers[0].weights.shape
    _check_index("query", query, count)
    chosen = list(layers)
    if layer is not None:
        _check_index("layer", layer if layer >= 0 else layer + len(layers), len(layers), asked=layer)
        chosen = [layers[layer]]
    head_range, level_range = slice(None), slice(None)
    if head is not None:
        _check_index("head", head, heads)
        head_range = slice(head, head + 1)
    if level is not None:
        _check_index("level", level, levels)
        level_range = slice(level, level + 1)
    weights = torch.stack([one.weights[query, head_range, level_range] for one in chosen])  # (layers, M, L, P)
    places = torch.stack([one.points[query, head_range, level_range] for one in chosen])  # (layers, M, L, P, 2)
    number = torch.arange(levels)[level_range].view(1, 1, -1, 1).expand_as(weights)
    return QueryPoints(places.reshape(-1, 2), weights.flatten() / weights[:, :, 0, 0].numel(), number.flatten())


def object_view(
    pixels: np.ndarray,
    detections: Detections,
    layers: Sequence[LayerAttention],
    row: int,
    *,
    layer: int | None = -1,
    head: int | None = None,
    level: int | None = None,
) -> ObjectView:
    """An object and where its query looks.

    Args:
        pixels: (H, W, 3) uint8, the image.
        detections: its objects, in its pixels.
        layers: where the queries look (`predict_with_attention`).
        row: which object.
        layer, head, level: as for `query_points`.

    Raises:
        ValueError: no such object, layer, head or level.
    """
    _check_index("object", row, len(detections.labels))
    query = int(detections.queries[row])
    looked = query_points(layers, query, layer=layer, head=head, level=level)
    reference = layers[0 if layer is None else layer].reference[query].numpy()
    mask = None if detections.masks is None else decode_rle([detections.masks[row]])[0].numpy()
    caption = f"{detections.names[row]} {float(detections.scores[row]):.2f}"
    return ObjectView(pixels, mask, detections.boxes[row].numpy(), reference, looked, caption)


def heat_map(looked: QueryPoints, size: tuple[int, int], *, spread: float | None = None) -> np.ndarray:
    """(H, W) float64: attention weight per pixel, every point spread as a Gaussian.

    Args:
        looked: what `query_points` gives.
        size: (H, W) of the map, pixels of whatever frame.
        spread: standard deviation, pixels; None: 2 % of the diagonal.

    Returns:
        A map that sums to the weight of the points in the image; what a Gaussian loses at an edge is mirrored.
    """
    height, width = size
    x, y = (looked.points.double() * torch.tensor([width, height])).T.numpy()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = y[inside].astype(int) * width + x[inside].astype(int)
    weights = looked.weights.double().numpy()[inside]
    heat = np.bincount(pixel, weights=weights, minlength=height * width).astype(float).reshape(height, width)
    return gaussian_filter(heat, 0.02 * np.hypot(height, width) if spread is None else spread, mode="reflect")


def _check_index(name: str, index: int, count: int, *, asked: Any = None) -> None:
    if count == 0:
        raise ValueError(f"{name} {index} does not exist: there is none")
    if not 0 <= index < count:
        raise ValueError(f"{name} {index if asked is None else asked} does not exist; allowed are 0 to {count - 1}")
