"""Images with objects drawn into them: translucent masks, outlines, labels. Paper: figures 3, 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.data.coco import CocoDataset
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import decode_rle, encode_rle, paste_to_rle
from solq_lab.structures import Detections, Target
from solq_lab.viz.style import FIGURE_WIDTH, STYLE, class_colours, hide_axes, new_figure, text_colour

MASK_OPACITY = 0.45
LABEL_PAD = 0.6  # around a label's text, points
MAX_OBJECTS = 40  # drawn in one image, the best ones; more would hide it


def ground_truth(target: Target, class_names: Sequence[str]) -> Detections:
    """The objects of a target as detections of score 1, in pixels of the network input."""
    height, width = target.image_size
    boxes = cxcywh_to_xyxy(target.boxes) * torch.tensor([width, height, width, height])
    masks = None if target.bitmaps is None else encode_rle(target.bitmaps)
    if target.masks is not None:
        masks = paste_to_rle(target.masks, boxes, target.image_size)
    count = len(target.labels)
    names = [class_names[label] for label in target.labels.tolist()]
    return Detections(torch.ones(count), target.labels, boxes, torch.arange(count), masks, names)


def predicted_examples(
    predictor: Predictor, dataset: CocoDataset, indices: Iterable[int], *, score: float = 0.3
) -> list[tuple[Tensor, Detections, Detections]]:
    """Images (3, H, W) uint8 of a data set, their ground truth, and what a model finds in them with at least `score`.

    Boxes and masks are in pixels of the image as the data set's transform leaves it. A data set whose targets carry
    no masks shows boxes as ground truth.
    """
    examples = []
    for index in indices:
        image, target = dataset[index]
        found = predictor.predict(image.permute(1, 2, 0).numpy()).above(score)
        examples.append((image, ground_truth(target, dataset.classes.names), found))
    return examples


@mpl.rc_context(STYLE)
def draw_detections(image: np.ndarray | Tensor, detections: Detections, *, title: str = "") -> Figure:
    """One image with its objects.

    Args:
        image: (H, W, 3) uint8, or a tensor (3, H, W) uint8.
        detections: the objects to draw, boxes and masks in pixels of `image`; `detections.above(0.3)` leaves out the
            doubtful ones.
        title: what is shown.
    """
    pixels = as_pixels(image)
    height, width = pixels.shape[:2]
    side = FIGURE_WIDTH / 2
    figure, axes = new_figure(1, 1, size=(side, 0.3 + side * height / width))
    draw_objects(axes[0, 0], pixels, detections, class_colours(detections.labels.tolist()), font_size=9)
    axes[0, 0].set_title(title)
    return figure


@mpl.rc_context(STYLE)
def prediction_grid(
    examples: Sequence[tuple[np.ndarray | Tensor, Detections, Detections]],
    *,
    examples_per_row: int = 2,
    title: str = "",
) -> Figure:
    """Image, ground truth and prediction side by side.

    Args:
        examples: image ((H, W, 3) or (3, H, W), uint8), ground truth and prediction in its pixels.
        examples_per_row: so many times three columns.
        title: what is shown.
    """
    across = min(examples_per_row, max(len(examples), 1))
    images = [as_pixels(image) for image, _, _ in examples]
    aspects = [height / width for height, width, _ in (pixels.shape for pixels in images)] or [1.0]
    heights = [max(aspects[first : first + across]) for first in range(0, len(aspects), across)]
    size = (FIGURE_WIDTH, 0.7 + FIGURE_WIDTH / (3 * across) * sum(heights))
    figure, axes = new_figure(len(heights), 3 * across, size=size, title=title, height_ratios=heights)
    for place in axes.flat:
        hide_axes(place)
    for number, (pixels, (_, truth, prediction)) in enumerate(zip(images, examples, strict=True)):
        row, first = number // across, 3 * (number % across)
        colours = class_colours(truth.labels.tolist() + prediction.labels.tolist())
        columns = (("image", truth.above(math.inf)), ("ground truth", truth), ("prediction", prediction))
        for place, (name, objects) in zip(axes[row, first:], columns, strict=False):
            draw_objects(place, pixels, objects, colours, font_size=6.5)
            place.set_anchor("N")
            if row == 0:
                place.set_title(name)
    return figure


def draw_objects(
    axes: Axes, pixels: np.ndarray, detections: Detections, colours: Mapping[int, str], *, font_size: float
) -> None:
    """An image and its best objects, the best on top; an object without a mask is drawn as its box."""
    height, width = pixels.shape[:2]
    masks = None if detections.masks is None else decode_rle(detections.masks).numpy()
    objects = list(enumerate(detections.labels.tolist()))[MAX_OBJECTS - 1 :: -1]
    axes.imshow(_blend(pixels, masks, [(row, colours[label]) for row, label in objects]))
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    hide_axes(axes)
    for row, label in objects:
        x0, y0, x1, y1 = detections.boxes[row].tolist()
        anchor = (x0 + x1) / 2, y0
        if masks is not None and masks[row].any():
            outline_mask(axes, masks[row], colours[label])
            top = masks[row].any(axis=1).argmax()
            anchor = float(masks[row][top].nonzero()[0].mean()), float(top)
        else:
            outline = {"fill": False, "edgecolor": colours[label], "linewidth": 1.5}
            axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, **outline))
        score = float(detections.scores[row])
        text = detections.names[row] + ("" if score == 1 else f" {score:.2f}")
        axes.add_artist(_Label(text, anchor, colours[label], font_size))


def outline_mask(axes: Axes, mask: np.ndarray, colour: str, *, edge: str = "white") -> None:
    """Draw the outline of a mask (H, W) bool, edged in another colour; it closes at the image's border too."""
    padded = np.pad(mask, 1).astype(float)
    across, down = np.arange(-1, mask.shape[1] + 1), np.arange(-1, mask.shape[0] + 1)
    for line, width in ((edge, 2.2), (colour, 1.2)):
        axes.contour(across, down, padded, levels=[0.5], colors=[line], linewidths=width)


class _Label(Text):
    """A text above a point (x, y) in pixels that moves into its axes where it would reach out of them.

    How large a text is, and how large its axes are, is known only when it is drawn.
    """

    def __init__(self, text: str, anchor: tuple[float, float], colour: str, font_size: float) -> None:
        super().__init__(
            *anchor,
            text,
            fontsize=font_size,
            color=text_colour(colour),
            horizontalalignment="center",
            verticalalignment="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.8, "pad": LABEL_PAD},
            clip_on=True,
        )

    def draw(self, renderer: RendererBase) -> None:
        inside, extent = self.axes.bbox, self.get_window_extent(renderer)
        pad = renderer.points_to_pixels(LABEL_PAD)
        over = np.minimum(inside.max - extent.max - pad, 0)  # to the right and to the top
        over += np.maximum(inside.min - extent.min - over + pad, 0)  # what is too long begins inside
        if over.any():
            to_display = self.get_transform()
            place = to_display.inverted().transform(to_display.transform(self.get_position()) + over)
            self.set_position(tuple(place))
        super().draw(renderer)


def _blend(pixels: np.ndarray, masks: np.ndarray | None, objects: Sequence[tuple[int, str]]) -> np.ndarray:
    """The image (H, W, 3) in 0..1 with masks (K, H, W) laid over it, given as (row, colour), the last on top."""
    blended = pixels.astype(np.float32) / 255
    if masks is not None:
        for row, colour in objects:
            paint = MASK_OPACITY * np.array(to_rgb(colour), dtype=np.float32)
            blended[masks[row]] = (1 - MASK_OPACITY) * blended[masks[row]] + paint
    return blended


def as_pixels(image: np.ndarray | Tensor) -> np.ndarray:
    """(H, W, 3) uint8 of an image.

    Raises:
        ValueError: neither an array (H, W, 3) nor a tensor (3, H, W) of uint8.
    """
    pixels = (
        image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    )
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            f"an image is an array (H, W, 3) or a tensor (3, H, W) of uint8, found {tuple(image.shape)} {image.dtype}"
        )
    return pixels
