"""Images with objects drawn into them: translucent masks, outlines, labels. Paper: figures 3, 5 and 6."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from contourpy import contour_generator
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco_rle
from torch import Tensor

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.data.coco import CocoDataset
from solq_lab.inference.predictor import ImageSource, Predictor, as_pixels
from solq_lab.masks import encode_rle, paste_to_rle, runs_of_rle
from solq_lab.structures import Detections, Target
from solq_lab.viz.labels import Label, Labels, label_of
from solq_lab.viz.style import FIGURE_WIDTH, STYLE, colours_of, new_figure

MASK_OPACITY = 0.35
PAINTED_SIDE = 8.0  # inches that the longer side of a large image counts as, beside lines and labels in points
BAND = 256  # rows of an image that masks and lines are laid over at once
Window = tuple[float, float, float, float]  # left, top, right, bottom, pixels
Outline = list[np.ndarray]  # lines (n, 2) as (x, y), pixels
MAX_OUTLINE = 1000  # pixels of a mask's longer side that its outline is found in; larger masks are thinned out


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
    draw_objects(axes[0, 0], pixels, detections, font_size=9)
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
    images = [
        (as_pixels(image), {"image": truth.above(math.inf), "ground truth": truth, "prediction": prediction})
        for image, truth, prediction in examples
    ]
    return draw_grid(images, across=examples_per_row, title=title)[0]


def draw_grid(
    images: Sequence[tuple[np.ndarray, Mapping[str, Detections]]], *, across: int, title: str
) -> tuple[Figure, np.ndarray]:
    """Each image (H, W, 3) once for each of several sets of objects, whose names are above.

    Args:
        images: with as many sets of objects each, by name.
        across: images beside each other.
        title: of all.

    Returns:
        The figure, and its axes (images or more, sets).
    """
    across, columns = min(across, max(len(images), 1)), len(images[0][1]) if images else 1
    aspects = [pixels.shape[0] / pixels.shape[1] for pixels, _ in images] or [0.3]
    heights = [max(aspects[first : first + across]) for first in range(0, len(aspects), across)]
    side = FIGURE_WIDTH / max(columns * across, 4)
    size = side * columns * across, 0.6 + sum(side * height + 0.25 for height in heights)
    figure, axes = new_figure(
        len(heights), columns * across, size=size, title=title, height_ratios=heights, of_images=True
    )

    places = axes.reshape(-1, columns)
    for row, (pixels, panels) in zip(places, images, strict=False):
        for place, (name, objects) in zip(row, panels.items(), strict=True):
            draw_objects(place, pixels, objects, font_size=6.5)
            place.set_title(name, fontsize=9)
            place.set_anchor("N")
    return figure, places


def draw_objects(
    axes: Axes,
    pixels: np.ndarray,
    detections: Detections,
    colours: Sequence[str] | None = None,
    *,
    font_size: float,
    filled: bool = True,
) -> None:
    """An image and its best objects, the best on top; an object without a mask is drawn as its box.

    Args:
        colours: one per object; None: those of the classes.
        font_size: of the labels, points; 0 draws none.
        filled: False draws outlines only.
    """
    painted = Image.fromarray(pixels)
    axes.add_artist(Backdrop(painted))
    _add_objects(axes, painted, detections, colours, font_size=font_size, filled=filled)
    show_window(axes, (0.0, 0.0, float(painted.width), float(painted.height)))
    axes.set_axis_off()


@mpl.rc_context(STYLE)
def paint_detections(image: ImageSource, detections: Detections) -> Image.Image:
    """An image with its objects, each in its colour, of the image's own size; lines and labels grow with it."""
    pixels = as_pixels(image)
    height, width = pixels.shape[:2]
    dpi = max(100.0, max(height, width) / PAINTED_SIDE)
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="none")
    painted = Image.fromarray(pixels)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_axis_off()
    fine = int(dpi / 120)  # half the width of an outline, pixels
    _add_objects(axes, painted, detections, colours_of(range(len(detections))), font_size=9, step=fine)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    lines = np.asarray(canvas.buffer_rgba())
    for top in range(0, height, BAND):  # as a whole, they would need the memory of the image twice again
        band = Image.fromarray(lines[top : top + BAND])
        painted.paste(band, (0, top), band)
    del canvas.renderer  # figure and canvas hold each other: its pixels would stay until they are collected
    return painted


def _add_objects(
    axes: Axes,
    painted: Image.Image,
    detections: Detections,
    colours: Sequence[str] | None = None,
    *,
    font_size: float,
    filled: bool = True,
    step: int = 1,
) -> None:
    """Lay the masks over an image, in place, and draw their outlines and labels into axes."""
    colours = colours_of(detections.labels.tolist()) if colours is None else colours
    labels, outlines = list[Label](), list[tuple[Outline, str]]()
    for row, colour in reversed(list(enumerate(colours))):
        x0, y0, x1, y1 = detections.boxes[row].tolist()
        anchor = (x0 + x1) / 2, y0
        outline = box_outline((x0, y0, x1, y1))
        # One mask at a time, and only its window: bitmaps of the whole image would fill the memory.
        window = None if detections.masks is None else MaskWindow.of_rle(detections.masks[row])
        if window is not None and window.bitmap.size:
            if filled:
                window.paint(painted, colour)
            outline = window.outline(step)
            anchor = float(window.left + window.bitmap[0].nonzero()[0].mean()), float(window.top)
        outlines.append((outline, colour))
        labels.append((label_of(detections, row), anchor, colour))
    draw_outlines(axes, outlines)
    if font_size:
        axes.add_artist(Labels(font_size, labels[::-1]))  # the best one chooses its place first


class Backdrop(Artist):
    """An image, or a window of it, that fills its axes, below all else; resized to their pixels when it is drawn.

    matplotlib resamples all of an image as floats: half a redraw, and a gigabyte for a photograph.
    """

    zorder = -1

    def __init__(
        self,
        image: Image.Image,
        window: Window | None = None,
        *,
        resample: Image.Resampling = Image.Resampling.BOX,
        finish: Callable[[Image.Image], Image.Image] = lambda resized: resized,
    ) -> None:
        """Keep the image; `finish` changes it once it has the size of the axes."""
        super().__init__()
        self.image, self._window, self._resample, self._finish = image, window, resample, finish

    def draw(self, renderer: RendererBase) -> None:
        assert self.axes is not None  # it is always drawn into axes
        scale, (left, bottom), (right, top) = renderer.get_image_magnification(), *self.axes.bbox.get_points().round()
        size = max(round((right - left) * scale), 1), max(round((top - bottom) * scale), 1)
        resized = self._finish(self.image.resize(size, self._resample, self._window))
        rows = np.asarray(resized.convert("RGBA"))[::-1]  # the lowest first
        renderer.draw_image(renderer.new_gc(), left, bottom, np.ascontiguousarray(rows))


def show_window(axes: Axes, window: Window) -> None:
    """Limit axes to a window, the pixels square."""
    left, top, right, bottom = window
    axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5), aspect="equal")


def square_around(box: Sequence[float], size: tuple[int, int], *, sides: float) -> Window:
    """A square around a box xyxy, `sides` of its longer side wide, moved into an image (H, W) as far as that goes."""
    (x0, y0, x1, y1), (height, width) = box, size
    side = sides * max(x1 - x0, y1 - y0, 1.0)
    across, down = min(side, width), min(side, height)
    left = min(max((x0 + x1 - across) / 2, 0.0), width - across)
    top = min(max((y0 + y1 - down) / 2, 0.0), height - down)
    return left, top, left + across, top + down


class MaskWindow(NamedTuple):
    """A mask inside its tight box."""

    bitmap: np.ndarray  # (h, w) bool; (0, 0) or so for an empty mask
    # left, top: the image pixel of its first entry
    left: int
    top: int

    @classmethod
    def of_rle(cls, rle: dict) -> MaskWindow:
        """Decode a compressed COCO RLE inside its box only."""
        left, top, width, height = map(int, coco_rle.toBbox(rle))
        image_height = rle["size"][0]
        # RLEs run down the columns: keep the runs of the columns in the box, then cut its rows.
        ends = np.clip(np.cumsum(runs_of_rle(rle["counts"])) - left * image_height, 0, width * image_height)
        runs = np.diff(ends, prepend=0)
        columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, image_height)
        return cls(np.ascontiguousarray(columns[:, top : top + height].T), left, top)

    def paint(self, image: Image.Image, colour: str) -> None:
        """Lay the mask over an RGB image, in place, translucent."""
        before, over = np.arange(256), 255 * np.array(to_rgb(colour))[:, None]
        mixed = (before + MASK_OPACITY * (over - before)).round().astype(int).ravel().tolist()  # by channel
        height, width = self.bitmap.shape
        for first in range(0, height, BAND):
            some, top = self.bitmap[first : first + BAND], self.top + first
            box = (self.left, top, self.left + width, top + len(some))
            image.paste(image.crop(box).point(mixed), box, Image.fromarray(some))

    def outline(self, step: int = 1) -> Outline:
        """The closed lines around the mask, in pixels of the image; they close at its border too.

        They are found in every `step`-th pixel: a line that is several pixels wide hides the difference.
        """
        sides = self.bitmap.shape
        step = max(1, min(step, min(sides) // 8), math.ceil(max(sides) / MAX_OUTLINE))
        top, left = (min(step // 2, side - 1) for side in sides)  # in the middle of the pixels that one stands for
        padded = np.pad(self.bitmap[top::step, left::step], 1).astype(np.float32)
        # Not `axes.contour`, which keeps its grids as long as the figure lives.
        lines: Any = contour_generator(z=padded).lines(0.5)
        return [step * (line - 1) + (self.left + left, self.top + top) for line in lines]


def draw_outlines(
    axes: Axes, outlines: Iterable[tuple[Outline, str]], *, edge: str = "white", style: Any = "-"
) -> None:
    """Draw outlines in their colours, edged in another one, the first at the bottom.

    All are one artist: of a hundred, each would take longer to be made than to be drawn.
    """
    strokes = [
        (line, *look) for outline, colour in outlines for look in ((edge, 2.2), (colour, 1.2)) for line in outline
    ]
    if strokes:
        lines, colours, widths = zip(*strokes, strict=True)
        drawn = LineCollection(lines, colors=colours, linewidths=widths, linestyles=[style])
        axes.add_collection(drawn, autolim=False)


def box_outline(box: Sequence[float] | np.ndarray) -> Outline:
    """The outline of a box, xyxy in pixels."""
    x0, y0, x1, y1 = box
    return [np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]) - 0.5]  # over its first corner


def frame_box(axes: Axes, box: Sequence[float] | np.ndarray, *, style: Any = "-") -> None:
    """Draw a box, xyxy in pixels, black on white, below labels."""
    draw_outlines(axes, [(box_outline(box), "black")], style=style)
