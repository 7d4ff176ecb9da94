"""Where a query looks: sampling points of the decoder's cross-attention. Paper: figure 4."""

from __future__ import annotations

from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from solq_lab.models.attention import MultiScaleDeformableAttention
from solq_lab.models.solq import SOLQ
from solq_lab.structures import ImageBatch
from solq_lab.viz.pictures import as_pixels
from solq_lab.viz.style import GREEN, ORANGE, PURPLE, SKY, STYLE, VERMILION, YELLOW, hide_axes, new_figure

LEVEL_COLOURS = (SKY, ORANGE, VERMILION, PURPLE, YELLOW, GREEN)


class SamplingPoints(NamedTuple):
    """Where all queries of one picture look in one decoder layer.

    points: (J, M, L, P, 2) as (x, y), normalised image.
    weights: (J, M, L, P); of each head they sum to 1 over levels and points.
    boxes: (J, 4) boxes (cx, cy, w, h) that the layer predicts, normalised image.
    """

    points: Tensor
    weights: Tensor
    boxes: Tensor


@torch.no_grad()
def record_sampling(model: SOLQ, images: ImageBatch, *, layer: int = -1) -> SamplingPoints:
    """Run the model on one picture and keep where the cross-attention of a decoder layer looked.

    Args:
        model: in evaluation mode.
        images: one normalised picture, B = 1.
        layer: decoder layer, counted as Python counts; -1 is the last.
    """
    heard: list[tuple[Tensor, Tensor]] = []

    def listen(attention: MultiScaleDeformableAttention, arguments: tuple) -> None:
        queries, reference, memory = arguments
        locations, weights = attention.sampling(queries, reference, memory)
        ratios = memory.valid_ratios[:, None, None, :, None, :]  # (B, L, 2) -> (B, 1, 1, L, 1, 2)
        heard.append((locations / ratios, weights))

    hook = model.decoder[layer].cross_attention.register_forward_pre_hook(listen)
    try:
        predictions = model(images)
    finally:
        hook.remove()
    points, weights = heard[0]
    return SamplingPoints(points[0], weights[0], predictions.layers[layer].boxes[0])


@mpl.rc_context(STYLE)
def sampling_points(image: np.ndarray | Tensor, sampling: SamplingPoints, query: int, *, title: str = "") -> Figure:
    """The picture, and over it every point the query looks at: colour is the level, area the attention weight.

    Args:
        image: (H, W, 3) uint8, or a tensor (3, H, W) uint8.
        sampling: what `record_sampling` kept.
        query: which query.
        title: what is shown.
    """
    pixels = as_pixels(image)
    height, width = pixels.shape[:2]
    figure, axes = new_figure(1, 2, size=(8.5, 0.6 + 3.6 * height / width), title=title)
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title("picture")
    axes[0, 1].imshow(pixels, alpha=0.6)
    axes[0, 1].set_title(f"query {query}: box and sampling points")
    center_x, center_y, box_width, box_height = (sampling.boxes[query] * torch.tensor([width, height] * 2)).tolist()
    corner = (center_x - box_width / 2 - 0.5, center_y - box_height / 2 - 0.5)
    axes[0, 1].add_patch(Rectangle(corner, box_width, box_height, fill=False, edgecolor="black", linewidth=1.5))
    points, weights = sampling.points[query], sampling.weights[query]  # (M, L, P, 2), (M, L, P)
    for level in range(points.shape[1]):
        place = points[:, level].reshape(-1, 2) * torch.tensor([width, height]) - 0.5
        area = 250 * weights[:, level].flatten()
        label = f"level {level + 1}" + (" (finest)" if level == 0 else "")
        look = {"color": LEVEL_COLOURS[level], "edgecolor": "black", "linewidth": 0.4, "alpha": 0.85, "label": label}
        axes[0, 1].scatter(*place.T.tolist(), s=area.tolist(), **look)
    for place in axes.flat:
        place.set_xlim(-0.5, width - 0.5)
        place.set_ylim(height - 0.5, -0.5)
        hide_axes(place)
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
