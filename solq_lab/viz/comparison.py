"""Objects of several models side by side. Paper: figures 3 and 5."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from solq_lab.studies.comparison import ComparedImage
from solq_lab.viz.images import draw_objects
from solq_lab.viz.style import FIGURE_WIDTH, STYLE, new_figure


@mpl.rc_context(STYLE)
def comparison_grid(images: Sequence[ComparedImage], *, images_per_row: int = 2, title: str = "") -> Figure:
    """Ground truth and every model's objects side by side, with the mean IoU over the true objects.

    Args:
        images: with the same models in all of them.
        images_per_row: so many groups of columns.
        title: what is compared.
    """
    across = min(images_per_row, max(len(images), 1))
    names = list(images[0].detections) if images else []
    columns = (1 + len(names)) * across
    panel = FIGURE_WIDTH / max(columns, 4)
    aspects = [image.pixels.shape[0] / image.pixels.shape[1] for image in images] or [0.3]
    heights = [max(aspects[first : first + across]) for first in range(0, len(aspects), across)]
    size = (panel * columns, 0.6 + sum(panel * height + 0.25 for height in heights))
    figure, axes = new_figure(len(heights), columns, size=size, title=title, height_ratios=heights)
    for place in axes.flat:
        place.set_axis_off()

    for number, image in enumerate(images):
        row, first = number // across, (1 + len(names)) * (number % across)
        everything = [image.ground_truth, *image.detections.values()]
        headings = ["ground truth", *(f"{name}: IoU {100 * image.mean_iou(name):.0f} %" for name in names)]
        for place, objects, heading in zip(axes[row, first:], everything, headings, strict=False):
            draw_objects(place, image.pixels, objects, font_size=6.5)
            place.set_title(heading, fontsize=9)
            place.set_anchor("N")
            place.set_gid(str(image.image_id))  # `link_figure` opens it
    return figure
