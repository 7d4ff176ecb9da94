"""A data set's masks as points of code space: a map, neighbours, and the way from one mask to another."""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from solq_lab.codecs.base import MaskCodec
from solq_lab.viz.style import STYLE, new_figure, save_animation

SIDE = 560  # of the map, CSS pixels
SHOWN = 200  # of the mask under the pointer
RADIUS = 4.0  # of a point
ROW = 18  # of the legend


def project(vectors: Tensor) -> tuple[Tensor, float]:
    """The two directions of most variance of mask vectors.

    Args:
        vectors: (K, D), K at least 3.

    Returns:
        (K, 2) coordinates, and the share of the variance that they hold.
    """
    centred = (vectors - vectors.mean(dim=0)).double()
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    total = sizes.square().sum().clamp(min=1e-12)
    return centred @ directions[:2].T, float(sizes[:2].square().sum() / total)


def mask_map(places: Tensor, masks: Tensor, names: Sequence[str], colours: Sequence[str]) -> str:
    """A map that needs no kernel: pointing at an object shows its mask and its name.

    Args:
        places: (K, 2) coordinates of the objects.
        masks: (K, N, N) bool.
        names: of the objects, as plain text.
        colours: one for each object.

    Returns:
        An SVG for `IPython.display.HTML`.
    """
    low, high = places.amin(dim=0), places.amax(dim=0)
    inside = (places - low) / (high - low).clamp(min=1e-9) * (SIDE - 4 * RADIUS) + 2 * RADIUS
    points = []
    for (x, y), mask, name, colour in zip(inside.tolist(), masks, names, colours, strict=True):
        png = io.BytesIO()
        _image(mask).save(png, format="PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"

        # What is shown has its own corner, where no point lies over it.
        shown = (
            f'<image class="mask" x="{SIDE + 20}" y="30" width="{SHOWN}" height="{SHOWN}" href="{url}"/>'
            f'<text class="mask" x="{SIDE + 20}" y="20">{html.escape(name)}</text>'
        )
        circle = f'<circle cx="{x:.1f}" cy="{SIDE - y:.1f}" r="{RADIUS}" fill="{html.escape(colour)}"/>'
        points.append(f'<g class="point">{circle}{shown}</g>')

    # Below it the classes that are most frequent, as many as fit.
    classes = Counter(zip(names, colours, strict=True)).most_common((SIDE - SHOWN - 60) // ROW)
    legend = "".join(
        f'<circle cx="{SIDE + 26}" cy="{SHOWN + 60 + ROW * row}" r="{RADIUS}" fill="{html.escape(colour)}"/>'
        f'<text x="{SIDE + 38}" y="{SHOWN + 64 + ROW * row}">{html.escape(name)}, {count}</text>'
        for row, ((name, colour), count) in enumerate(classes)
    )
    style = (
        ".solq-map .mask {display: none} .solq-map .point:hover .mask {display: block}"
        ".solq-map circle {opacity: .75} .solq-map .point:hover circle {opacity: 1; stroke: black; stroke-width: 2}"
        ".solq-map text {font: 13px sans-serif; fill: currentColor} .solq-map image {image-rendering: pixelated}"
    )
    frame = f'<rect width="{SIDE}" height="{SIDE}" rx="6" fill="none" stroke="#8888"/>'
    size = f'width="{SIDE + SHOWN + 30}" height="{SIDE}"'
    return (
        f'<svg class="solq-map" xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{frame}{legend}'
        f"{''.join(points)}</svg>"
    )


@mpl.rc_context(STYLE)
def neighbours(
    vectors: Tensor, masks: Tensor, names: Sequence[str], chosen: Sequence[int], *, count: int = 7
) -> Figure:
    """Chosen objects, one per row, and the objects whose vectors are nearest, with their distances.

    Args:
        vectors, masks: (K, D) and (K, N, N) bool.
        names: of the objects.
        chosen: indexes of objects.
        count: neighbours of each; fewer where there are not so many.
    """
    count = min(count, len(vectors) - 1)
    figure, axes = new_figure(len(chosen), count + 1, size=(1.35 * (count + 1), 1.6 * len(chosen)))
    for row, index in enumerate(chosen):
        distance = (vectors - vectors[index]).norm(dim=1)
        distance[index] = -1
        for column, place in enumerate(distance.argsort()[: count + 1].tolist()):
            panel = axes[row, column]
            panel.imshow(masks[place], cmap="gray", vmin=-0.2, vmax=1.2)  # no mask is as white as the page
            panel.set_axis_off()
            panel.set_title(names[place] if column == 0 else f"{names[place]}\n{distance[place]:.2g} away", fontsize=7)
    return figure


def save_way(codec: MaskCodec, vectors: Tensor, path: Path, *, frames: int = 24, side: int = 256) -> None:
    """Write a GIF that goes from one mask to another along the straight line between their vectors, and back.

    Args:
        codec: decodes the vectors.
        vectors: (2, D), the start and the end.
        path: the file.
        frames: one way.
        side: of the GIF, pixels.
    """
    share = torch.linspace(0, 1, frames)[:, None]
    with torch.inference_mode():
        masks = codec.decode_masks((1 - share) * vectors[0] + share * vectors[1])  # (frames, N, N)
    images = [_image(mask).resize((side, side), Image.Resampling.NEAREST) for mask in masks.cpu()]
    save_animation(images + images[-2::-1], path, milliseconds=60)


def _image(mask: Tensor) -> Image.Image:
    image = Image.fromarray(mask.numpy().astype(np.uint8), "P")
    image.putpalette([36] * 3 + [219] * 3)  # the greys of `neighbours`: no mask is as white as the page
    return image
