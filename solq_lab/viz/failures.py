"""AP lost to each type of error, as bars, and the worst errors, as images. Paper: appendix A.5, fig. 6."""

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from solq_lab.inference.predictor import as_pixels
from solq_lab.masks import rle_iou
from solq_lab.structures import Detections
from solq_lab.studies.cases import FailureCase
from solq_lab.studies.errors import ERRORS, GroupErrors
from solq_lab.viz.images import Backdrop, MaskWindow, draw_outlines, show_window, square_around
from solq_lab.viz.style import (
    BLACK,
    GREEN,
    GREY,
    METHOD_COLOURS,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    YELLOW,
    new_figure,
    text_colour,
)

ERROR_COLOURS = {
    "missed": GREY,
    "background": BLACK,
    "class": VERMILION,
    "duplicate": YELLOW,
    "box": GREEN,
    "siamese": ORANGE,
    "codec": SKY,
    "vector": PURPLE,
}
ERROR_TITLES = {error: error for error in ERRORS}
ERROR_TITLES |= {"siamese": "siamese mask", "codec": "codec truncation", "vector": "vector regression"}
_MIN_LABELLED = 4.5  # AP points: a shorter piece of a bar has no room for its number
_SURROUNDINGS = 1.7  # side of the square around the boxes of a case, over their longer side
_GALLERY_WIDTH = 9.6  # inches, without the names of the types


@mpl.rc_context(STYLE)
def lost_ap(groups: Mapping[str, GroupErrors], *, title: str = "") -> Figure:
    """Mask AP lost to each type, repaired alone and in turn, and in turn by object size and by occlusion.

    Args:
        groups: of an error analysis: "all", then three by size, then three by occlusion.
        title: which model.
    """
    figure, axes = new_figure(1, 2, size=(11.0, 4.2), title=title, width_ratios=(1.0, 1.75))
    _draw_types(axes[0, 0], groups["all"])
    _draw_groups(axes[0, 1], groups)
    return figure


@mpl.rc_context(STYLE)
def failure_gallery(cases: Mapping[str, Sequence[FailureCase]], *, title: str = "") -> Figure:
    """One row per type of error: the detection's mask and box in the type's colour, the true outline in white.

    Args:
        cases: type -> its errors.
        title: which model.
    """
    across = max(1, *map(len, cases.values()))
    side = _GALLERY_WIDTH / across
    heights = [side + 0.25 if worst else 0.4 for worst in cases.values()]
    size = (1.2 + _GALLERY_WIDTH, 0.5 + sum(heights))
    figure, axes = new_figure(len(cases), across, size=size, title=title, height_ratios=heights, of_images=True)

    for row, (error, worst) in zip(axes, cases.items(), strict=True):
        name = ERROR_TITLES[error].replace(" ", "\n")
        row[0].text(-0.06, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=10)
        if not worst:
            row[0].text(0.0, 0.5, "none", transform=row[0].transAxes, va="center", color=GREY)
        for place, case in zip(row, worst, strict=False):
            _draw_case(place, as_pixels(case.image), case.true, case.found, ERROR_COLOURS[error])
            ids = (case.image_id, case.object_id)
            place.set_gid(" ".join(str(one) for one in ids if one is not None))  # `link_figure` opens it
    return figure


def _draw_types(axes: Axes, group: GroupErrors) -> None:
    """Two bars per type: what it gives back in turn, and alone."""
    rows = np.arange(len(ERROR_COLOURS))
    in_turn, alone = (
        100 * np.nan_to_num([gains[error] for error in ERROR_COLOURS]) for gains in (group.in_turn, group.alone)
    )
    for offset, values, opacity, ink in ((-0.2, in_turn, 1.0, BLACK), (0.2, alone, 0.4, GREY)):
        colours = [(colour, opacity) for colour in ERROR_COLOURS.values()]
        bars = axes.barh(rows + offset, values, height=0.4, color=colours)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2, color=ink)

    axes.set_yticks(rows, ERROR_TITLES.values())
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.2 * max(1.0, alone.max(), in_turn.max()))
    axes.set_xlabel("mask AP points gained")
    axes.set_title("repaired in turn (full colour), alone (pale)")


def _draw_groups(axes: Axes, groups: Mapping[str, GroupErrors]) -> None:
    """One bar per group from 0 to 100: the AP that is there, and the pieces that repairs in turn give back."""
    names = list(groups)
    # Half a bar of room before the groups by size and before those by occlusion.
    places = np.arange(len(names)) + 0.5 * np.searchsorted([1, 4], np.arange(len(names)), side="right")
    pieces = {"AP": [group.ap for group in groups.values()]}
    pieces |= {error: [group.in_turn[error] for group in groups.values()] for error in ERROR_COLOURS}
    titles = {"AP": "AP without repair"} | ERROR_TITLES

    start = np.zeros(len(names))
    for piece, shares in pieces.items():
        width = 100 * np.nan_to_num(shares)
        colour = METHOD_COLOURS["SOLQ"] if piece == "AP" else ERROR_COLOURS[piece]
        bars = axes.barh(places, width, left=start, height=0.75, color=colour, label=titles[piece])
        labels = [f"{value:.0f}" if value >= _MIN_LABELLED else "" for value in width]
        axes.bar_label(bars, labels=labels, label_type="center", fontsize=8, color=text_colour(colour))
        start += width

    for place, group in zip(places, groups.values(), strict=True):
        if math.isnan(group.ap):
            axes.text(1, place, "no objects", verticalalignment="center", fontsize=8, color=GREY)
    labels = [f"{name} ({group.objects})" for name, group in groups.items()]
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("mask AP, percent")
    axes.set_title("repaired in turn, by size and by occlusion (objects)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.46, -0.14), ncols=5, fontsize=8, handlelength=1.2)


def _draw_case(axes: Axes, pixels: np.ndarray, true: Detections, found: Detections, colour: str) -> None:
    """The surroundings of an error, titled with class, score and the IoU of the masks."""
    true_window, found_window = (
        MaskWindow.of_rle(objects.masks[0]) if objects.masks else None for objects in (true, found)
    )
    painted = Image.fromarray(pixels)
    if found_window:
        found_window.paint(painted, colour)
    boxes = torch.cat([true.boxes, found.boxes])
    around = [*boxes[:, :2].amin(dim=0).tolist(), *boxes[:, 2:].amax(dim=0).tolist()]
    window = square_around(around, pixels.shape[:2], sides=_SURROUNDINGS)
    axes.add_artist(Backdrop(painted, window))
    show_window(axes, window)

    for x0, y0, x1, y1 in found.boxes.tolist():
        box = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=":")
        axes.add_patch(box)
    masks = (true_window, "white"), (found_window, colour)
    draw_outlines(axes, [(mask.outline(), line) for mask, line in masks if mask and mask.bitmap.size])

    words = [*(found.names or true.names), *(f"{score:.2f}" for score in found.scores.tolist())]
    if found.names and true.names and found.names != true.names:
        words += [f"({true.names[0]})"]
    if found.masks and true.masks:
        words += [f"IoU {rle_iou(found.masks, true.masks)[0]:.2f}"]
    axes.set_title(" ".join(words), fontsize=7.5, pad=3)
