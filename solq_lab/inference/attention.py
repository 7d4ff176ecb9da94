"""Sampling points of the decoder's cross-attention, and of a pixel in the encoder. Paper: section 4, figure 4.

Nothing is injected into the network: forward hooks on its layers record the points that the attention uses
(`MultiScaleDeformableAttention.sampling`).
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import decode_rle, paste_to_rle
from solq_lab.models.attention import Memory, MultiScaleDeformableAttention
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import EncoderLayer
from solq_lab.models.heads import UnifiedQueryHead
from solq_lab.models.look import View
from solq_lab.models.solq import SOLQ
from solq_lab.structures import Detections, ImageBatch, LayerPrediction


class LayerAttention(NamedTuple):
    """Sampling points of all queries of one image in one decoder layer, in the normalised image."""

    points: Tensor  # (J, M, L, P, 2) as (x, y); a point outside 0..1 contributes nothing
    weights: Tensor  # (J, M, L, P); of each query and head they sum to 1 over levels and points
    reference: Tensor  # (J, 2) points or (J, 4) boxes (cx, cy, w, h) that the points are placed around
    boxes: Tensor  # (J, 4) boxes (cx, cy, w, h) that the layer predicts
    scores: Tensor  # (J,) of its best class
    vectors: Tensor | None  # (J, D) mask vectors that it predicts, or None


class QueryPoints(NamedTuple):
    """Selected points of one query, as one list."""

    points: Tensor  # (K, 2) as (x, y), normalised image
    weights: Tensor  # (K,); 1 in sum over all heads and levels
    levels: Tensor  # (K,) int64, 0 is the finest


class EncoderRecord(NamedTuple):
    """One encoder layer's attention and its input for one image: the points of any token follow from them."""

    attention: MultiScaleDeformableAttention
    memory: Memory


class ObjectView(NamedTuple):
    """One object of an image and the sampling points of its query, to be drawn."""

    pixels: np.ndarray  # (H, W, 3) uint8
    mask: np.ndarray | None  # (H, W) bool, or None where a plain detector found it
    box: np.ndarray  # (4,) x0, y0, x1, y1, pixels
    # (2,) or (4,) as the points were placed around it, normalised image; of the first layer that is shown
    reference: np.ndarray
    looked: QueryPoints
    caption: str  # class and score


def record_attention(model: SOLQ, images: ImageBatch) -> list[LayerAttention]:
    """Sampling points of every decoder layer, first to last, for one normalised image. The model is in eval mode."""
    with recording(model) as layers, torch.no_grad():
        model(images)
    return layers


def predict_with_attention(
    predictor: Predictor, image: str | Path | Image.Image | np.ndarray
) -> tuple[Detections, list[LayerAttention]]:
    """The objects in one image, and the sampling points of all queries in every decoder layer, on the CPU.

    Raises:
        ValueError: a predictor that replays CUDA graphs, which call no hooks.
        DataError: no image.
    """
    if predictor.bucket is not None:
        raise ValueError(f"a predictor with bucket={predictor.bucket} calls no hooks; build it with bucket=None")
    with recording(predictor.model) as layers:
        detections = predictor.predict(image)
    return detections, layers


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[list[LayerAttention]]:
    """Record a single run of the model, on one image, within the block; the list is filled when the block ends.

    The model is any network with decoder layers and query heads, SOLQ and the SQR baseline alike.
    """
    sampled: list[tuple[Tensor, Tensor, Tensor]] = []
    predicted: list[tuple[Tensor, Tensor, Tensor]] = []
    views: list[View] = []

    def record_points(attention: MultiScaleDeformableAttention, arguments: tuple) -> None:
        queries, reference, memory = arguments
        points, weights = attention.sampling(queries, reference, memory)
        ratios = memory.valid_ratios[:, None, None, :, None, :]  # (B, L, 2) -> (B, 1, 1, L, 1, 2)
        whole = reference[0, :, 0] / memory.valid_ratios[0, 0].repeat(reference.shape[-1] // 2)  # (J, 2 or 4)
        sampled.append(((points / ratios)[0].cpu(), weights[0].cpu(), whole.cpu()))

    def record_prediction(head: UnifiedQueryHead, arguments: tuple, prediction: LayerPrediction) -> None:
        scores = prediction.logits[0].float().sigmoid().amax(dim=1).cpu()
        predicted.append((prediction.boxes, scores, arguments[0]))

    decoder = [part for part in model.modules() if isinstance(part, DecoderLayer)]
    heads = [part for part in model.modules() if isinstance(part, UnifiedQueryHead)]
    layers: list[LayerAttention] = []
    with contextlib.ExitStack() as hooks:
        for layer in decoder:
            hooks.callback(layer.cross_attention.register_forward_pre_hook(record_points).remove)
        for head in heads:
            hooks.callback(head.register_forward_hook(record_prediction).remove)
        look = next((head.look for head in heads if head.look is not None), None)  # all layers share it
        if look is not None:
            hooks.callback(look.register_forward_pre_hook(lambda _, arguments: views.append(arguments[2])).remove)
        yield layers
    # Inference computes the vectors of the last layer alone, with the network that all layers share.
    reader = next((head for head in reversed(heads) if head.vector is not None), None)
    of_layers = predicted[len(predicted) - len(sampled) :]  # two-stage: without the proposals
    view = views[-1] if views else None
    for place, (boxes, scores, queries) in zip(sampled, of_layers, strict=True):
        with torch.inference_mode():
            vectors = None if reader is None else reader.vectors(queries, boxes, view)[0].float().cpu()
        layers.append(LayerAttention(*place, boxes[0].cpu(), scores, vectors))


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
        layers: as returned by `record_attention`.
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
        _check_index("layer", layer if layer >= 0 else layer + len(layers), len(layers), shown=layer)
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
    """An object and the sampling points of its query.

    Args:
        pixels: (H, W, 3) uint8, the image.
        detections: its objects, in its pixels.
        layers: as returned by `predict_with_attention`.
        row: which object.
        layer, head, level: as for `query_points`.

    Raises:
        ValueError: no such object, layer, head or level.
    """
    _check_index("object", row, len(detections))
    query = int(detections.queries[row])
    looked = query_points(layers, query, layer=layer, head=head, level=level)
    reference = layers[0 if layer is None else layer].reference[query].numpy()
    mask = None if detections.masks is None else decode_rle([detections.masks[row]])[0].numpy()
    caption = f"{detections.names[row]} {float(detections.scores[row]):.2f}"
    return ObjectView(pixels, mask, detections.boxes[row].numpy(), reference, looked, caption)


def layer_views(
    predictor: Predictor,
    pixels: np.ndarray,
    detections: Detections,
    layers: Sequence[LayerAttention],
    row: int,
    *,
    head: int | None = None,
    level: int | None = None,
) -> list[ObjectView]:
    """An object in every decoder layer, first to last: its query's points, and the box and mask the layer predicts.

    The mask is the layer's vector, decoded and pasted into the layer's box; None for a model without vectors.

    Args:
        predictor: the model that found the objects.
        pixels, detections, layers, row, head, level: as for `object_view`.

    Raises:
        ValueError: no such object, head or level.
    """
    height, width = pixels.shape[:2]
    views = []
    for number, layer in enumerate(layers):
        view = object_view(pixels, detections, layers, row, layer=number, head=head, level=level)
        query = int(detections.queries[row])
        box = cxcywh_to_xyxy(layer.boxes[query][None]).float() * torch.tensor([width, height, width, height])
        mask = None
        if predictor.codec is not None and layer.vectors is not None:
            binary = predictor.codec.decode_masks(layer.vectors[query][None].to(predictor.device)).cpu()
            mask = decode_rle(paste_to_rle(binary, box, (height, width)))[0].numpy()
        caption = f"score {float(layer.scores[query]):.2f}"
        views.append(view._replace(mask=mask, box=box[0].numpy(), caption=caption))
    return views


def record_encoder(predictor: Predictor, image: np.ndarray) -> list[EncoderRecord]:
    """The encoder layers of a run on one image (H, W, 3) uint8, first to last.

    Raises:
        ValueError: the model has no encoder layers.
    """
    records: list[EncoderRecord] = []
    with contextlib.ExitStack() as hooks:
        for layer in predictor.model.modules():
            if isinstance(layer, EncoderLayer):
                hook = layer.register_forward_pre_hook(
                    lambda layer, inputs: records.append(EncoderRecord(layer.attention, inputs[0]))
                )
                hooks.callback(hook.remove)
        predictor.predict(image)
    if not records:
        raise ValueError("the model has no encoder layers, so no pixel attends to others before the decoder")
    return records


@torch.inference_mode()
def pixel_views(
    pixels: np.ndarray,
    encoder: Sequence[EncoderRecord],
    place: tuple[float, float],
    *,
    level: int,
    head: int | None = None,
) -> list[ObjectView]:
    """The token under a pixel in every encoder layer, to be drawn: its cell as mask, and its sampling points.

    The box holds the points within 1.5 standard deviations, by their weights.

    Args:
        pixels: (H, W, 3) uint8, the image.
        encoder: as returned by `record_encoder`.
        place: (x, y) in 0..1 of the image.
        level: of the token, 0 is the finest.
        head: attention head; None: all.

    Raises:
        ValueError: no such head or level.
    """
    height, width = pixels.shape[:2]
    size, views = torch.tensor([width, height]), list[ObjectView]()
    for attention, memory in encoder:
        shapes = memory.spatial_shapes
        _check_index("level", level, len(shapes))
        rows, columns = shapes[level]
        sides = memory.valid_ratios[0, level].cpu() * torch.tensor([columns, rows])  # cells that are not padding
        cell = torch.minimum((torch.tensor(place) * sides).floor(), sides.ceil() - 1).clamp(min=0)
        x0, y0, x1, y1 = (torch.cat([cell, cell + 1]) / (sides / size).repeat(2)).round().int().tolist()
        mask = np.zeros((height, width), dtype=bool)
        mask[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True

        column, row = cell.int().tolist()
        token = [sum(h * w for h, w in shapes[:level]) + row * columns + column]
        queries = (memory.tokens + memory.positions)[:, token]
        points, weights = attention.sampling(queries, memory.to_levels(memory.centers[:, token]), memory)
        points = points / memory.valid_ratios[:, None, None, :, None]
        nothing = torch.zeros(0)
        layer = LayerAttention(points[0].cpu(), weights[0].cpu(), nothing, nothing, nothing, None)
        looked = query_points([layer], 0, head=head)

        share = looked.weights[:, None] / looked.weights.sum()
        middle = (share * looked.points).sum(dim=0)
        std = (share * (looked.points - middle).square()).sum(dim=0).sqrt()
        box = torch.cat([(middle - 1.5 * std) * size, (middle + 1.5 * std) * size]).numpy()
        views.append(ObjectView(pixels, mask, box, np.array(place), looked, f"encoder layer {len(views) + 1}"))
    return views


def heat_map(looked: QueryPoints, size: tuple[int, int], *, std: float | None = None) -> np.ndarray:
    """(H, W) float64: attention weight per pixel, every point blurred by a Gaussian.

    Args:
        looked: as returned by `query_points`.
        size: (H, W) of the map, pixels of whatever frame.
        std: of the Gaussian, pixels; None: 2 % of the diagonal.

    Returns:
        A map that sums to the weight of the points in the image; a Gaussian is mirrored at the edges.
    """
    height, width = size
    x, y = (looked.points.double() * torch.tensor([width, height])).T.numpy()
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = y[inside].astype(int) * width + x[inside].astype(int)
    weights = looked.weights.double().numpy()[inside]
    heat = np.bincount(pixel, weights=weights, minlength=height * width).astype(float).reshape(height, width)
    return gaussian_filter(heat, 0.02 * np.hypot(height, width) if std is None else std, mode="reflect")


def _check_index(name: str, index: int, count: int, *, shown: int | None = None) -> None:
    if count == 0:
        raise ValueError(f"{name} {index} does not exist: there is none")
    if not 0 <= index < count:
        raise ValueError(f"{name} {index if shown is None else shown} does not exist; allowed are 0 to {count - 1}")
