"""Objects of several models side by side. Paper: figures 3 and 5."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from solq_lab.studies.comparison import ComparedImage
from solq_lab.viz.images import draw_grid
from solq_lab.viz.style import STYLE


@mpl.rc_context(STYLE)
def comparison_grid(images: Sequence[ComparedImage], *, images_per_row: int = 2, title: str = "") -> Figure:
    """Ground truth and every model's objects side by side, with the mean IoU over the true objects.

    Args:
        images: with the same models in all of them.
        images_per_row: so many groups of columns.
        title: what is compared.
    """
    shown = []
    for image in images:
        found = {f"{name}: IoU {100 * image.mean_iou(name):.0f} %": one for name, one in image.detections.items()}
        shown.append((image.pixels, {"ground truth": image.ground_truth} | found))
    figure, places = draw_grid(shown, across=images_per_row, title=title)

    for row, image in zip(places, images, strict=False):
        for place in row:
            place.set_gid(str(image.image_id))  # `link_figure` opens it
    return figure
