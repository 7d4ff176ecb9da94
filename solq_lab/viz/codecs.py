"""Reconstructions of a mask from its first coefficients. Paper: section 3.2, table 3(d) and (e)."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from torch import Tensor

from solq_lab.codecs.dct import DCTCodec, zigzag
from solq_lab.codecs.reconstruct import box_frame_iou, reconstruct
from solq_lab.viz.style import STYLE, VERMILION, new_figure


@mpl.rc_context(STYLE)
def reconstructions(mask: Tensor, vector_dims: Sequence[int] = (9, 36, 100, 256), *, title: str = "") -> Figure:
    """A mask, its cosine spectrum, and its reconstructions from the first n_k coefficients.

    Args:
        mask: (N, N) bool, box frame.
        vector_dims: numbers n_k of kept coefficients, rising.
        title: what the mask shows.
    """
    size = mask.shape[-1]
    largest = DCTCodec(size, min(max(vector_dims), size**2))
    ratios = [1.0, 1.5] + [1.0] * len(vector_dims)
    heading = f"{title} (line: binarised reconstruction)".strip()
    figure, axes = new_figure(1, len(ratios), size=(11.0, 2.5), title=heading, width_ratios=ratios)
    _show(axes[0, 0], mask.numpy(), f"mask, {size} x {size} pixels")
    _show_spectrum(figure, axes[0, 1], largest.encode(mask[None])[0], size)

    for place, kept in zip(axes[0, 2:], vector_dims, strict=True):
        _, (decoded,), (back,) = reconstruct(DCTCodec(size, min(kept, size**2)), mask[None])
        (overlap,) = box_frame_iou(back[None], mask[None])
        _show(place, decoded.numpy(), f"n_k = {kept}, IoU {overlap:.3f}")
        if back.any() and not back.all():
            place.contour(back.numpy().astype(float), levels=[0.5], colors=[VERMILION], linewidths=1.2)
    return figure


def _show(axes: Axes, mask: np.ndarray, title: str) -> None:
    axes.imshow(mask, cmap="gray", vmin=-0.2, vmax=1.2)
    axes.set_title(title)
    axes.set_axis_off()


def _show_spectrum(figure: Figure, axes: Axes, vector: Tensor, size: int) -> None:
    """The kept coefficients in their places: columns count waves across, rows waves down."""
    places = zigzag(size)[: len(vector)]
    spectrum = torch.full((size * size,), float("nan"))
    spectrum[places] = vector
    corner = int((places // size).max()) + 1

    norm = SymLogNorm(linthresh=1.0, vmin=-size, vmax=size)  # a full mask's first coefficient is N
    image = axes.imshow(spectrum.view(size, size)[:corner, :corner].numpy(), cmap="PuOr", norm=norm)
    axes.set_title(f"first {len(vector)} coefficients")
    axes.set_xlabel("waves across")
    axes.set_ylabel("waves down")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, ticks=[-size, -10, -1, 0, 1, 10, size], format="%g")
