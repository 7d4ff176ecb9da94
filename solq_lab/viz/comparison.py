"""Pictures as several models see them, side by side. Paper: figures 3 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from solq_lab.structures import Detections
from solq_lab.viz.pictures import draw_objects
from solq_lab.viz.style import FIGURE_WIDTH, STYLE, class_colours, new_figure


class Compared(Protocol):
    """A picture, its true objects, and what each model finds (`evaluation.comparison.compare_pictures`)."""

    pixels: np.ndarray
    truth: Detections
    found: Mapping[str, Detections]

    def mean_iou(self, name: str) -> float: ...


@mpl.rc_context(STYLE)
def comparison_grid(pictures: Sequence[Compared], *, pictures_per_row: int = 2, title: str = "") -> Figure:
    """Ground truth and every model's objects side by side, with the mean IoU over the true objects.

    Args:
        pictures: with the same models in all of them.
        pictures_per_row: so many groups of columns.
        title: what is compared.
    """
    across = min(pictures_per_row, max(len(pictures), 1))
    names = list(pictures[0].found) if pictures else []
    columns = (1 + len(names)) * across
    panel = FIGURE_WIDTH / max(columns, 4)
    aspects = [picture.pixels.shape[0] / picture.pixels.shape[1] for picture in pictures] or [0.3]
    heights = [max(aspects[first : first + across]) for first in range(0, len(aspects), across)]
    size = (panel * columns, 0.6 + sum(panel * height + 0.25 for height in heights))
    figure, axes = new_figure(len(heights), columns, size=size, title=title, height_ratios=heights)
    for place in axes.flat:
        place.set_axis_off()
    for number, picture in enumerate(pictures):
        row, first = number // across, (1 + len(names)) * (number % across)
        everything = [picture.truth, *picture.found.values()]
        colours = class_colours(label for objects in everything for label in objects.labels.tolist())
        headings = ["ground truth", *(f"{name}: IoU {100 * picture.mean_iou(name):.0f} %" for name in names)]
        for place, objects, heading in zip(axes[row, first:], everything, headings, strict=False):
            draw_objects(place, picture.pixels, objects, colours, font_size=6.5)
            place.set_title(heading, fontsize=9)
            place.set_anchor("N")
    return figure
