"""The panels of the codec explorer: a mask on its way through a codec, and what the way costs. Paper: section 3.2."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm, to_rgb
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image
from torch import Tensor

from solq_lab.codecs.dct import zigzag
from solq_lab.masks import decode_rle
from solq_lab.viz.style import ADDED, BLUE, CODEC_COLOURS, CODEC_NAMES, GREY, MISSED
from solq_lab.viz.widgets.live_panel import Cell, ImagePanel, Panel
from solq_lab.viz.widgets.objects import BoxedObject
from solq_lab.viz.widgets.reconstruction import Reconstruction, Rule

SIDE = 226  # of the square images, pixels of the screen
MARGIN = 0.12  # around an object, as a share of its larger side
MAX_BARS = (400, 800)  # ends of the axis of coefficients
TICKS = np.array([-100, -10, -1, 0, 1, 10, 100])  # of entries, in their unit
SMALL_VECTOR = 5.0  # vectors without a larger entry, such as those of contours, are shown in hundredths
PALE = "#D9D9D9"
LEAST_ERROR = 1e-3  # 1 - IoU at the lower end of its axis; what is better lies on it
SMALL = 0.25  # share of the image's longer side: objects that are smaller are shown in a crop
CONTEXT = 1.5  # around them, as a share of the larger side of their box


class Setting(NamedTuple):
    """The values of the controls; `data_set` and `row` name the object."""

    data_set: str
    row: int
    method: str
    mask_size: int
    vector_dim: int
    terms: int
    rule: Rule
    error: float  # noise on each entry, in its standard deviations over the data set
    step: float  # of a quantiser of all entries, in their root mean square standard deviation; 0: none


class Curve(NamedTuple):
    """IoU of one object by vector length, without noise."""

    vector_dims: list[int]
    ious: list[float]


class View(NamedTuple):
    """What the panels show: an object, its image (H, W, 3) uint8, and its way through a codec."""

    setting: Setting
    item: BoxedObject
    pixels: np.ndarray
    reconstruction: Reconstruction
    # (>= D,) the vector and the entries that follow where the codec were longer, for codecs where they exist
    continued: Tensor
    order: Tensor  # (D,) the vector's entries by importance; the first `setting.terms` are kept
    curves: Mapping[str, Curve]
    bits: float  # of a mask on average, as stored by an ideal entropy coder where entries are rounded (`bits_per_mask`)


class Original(ImagePanel):
    """The image with the object tinted; the surroundings of an object that would be tiny in it."""

    def depends_on(self, view: View) -> Hashable:
        return view.setting.data_set, view.setting.row

    def show(self, view: View) -> None:
        pixels = tinted(view.pixels, decode_rle([view.item.rle])[0].numpy())
        x0, y0, x1, y1 = view.item.box.tolist()
        title = f"{view.item.name}, {x1 - x0:.0f} x {y1 - y0:.0f} pixels"
        if max(x1 - x0, y1 - y0) < SMALL * max(view.item.size):
            pixels, title = pixels[surroundings(view.item, CONTEXT)], f"{title}, cut out"
        self.set(fit_square(pixels), title)


class Target(ImagePanel):
    """The mask in its box: what is encoded."""

    def depends_on(self, view: View) -> Hashable:
        return view.setting.data_set, view.setting.row, view.setting.mask_size

    def show(self, view: View) -> None:
        self.set(
            grey(view.reconstruction.target.numpy()),
            f"in its box: {view.setting.mask_size} x {view.setting.mask_size} pixels",
        )


class Decoded(ImagePanel):
    """The reconstruction as real numbers."""

    def show(self, view: View) -> None:
        terms, count = view.setting.terms, view.setting.vector_dim
        kept = f"{terms} of {count}" if terms < count else f"{count} number{'s' if count > 1 else ''}"
        self.set(grey(view.reconstruction.decoded.numpy()), f"decoded from {kept}")


class Binary(ImagePanel):
    """The reconstruction as a mask."""

    def show(self, view: View) -> None:
        self.set(grey(view.reconstruction.binary.numpy()), f"above the threshold, {view.reconstruction.threshold:.2f}")


class Errors(ImagePanel):
    """The reconstruction in the image: pixels missed and pixels added."""

    def show(self, view: View) -> None:
        pixels, missed, added = error_image(view.pixels, view.item, view.reconstruction.rle)
        self.set(fit_square(pixels, sharp=True), f"missed {missed}, added {added} pixels")


class Vector(Panel):
    """The coefficients in their order: kept, left out of the sum, and cut off by the codec's length."""

    columns = 2
    place = (0.085, 0.175, 0.885, 0.715)

    def __init__(self, axes: Axes) -> None:
        super().__init__(axes)
        axes.set(xlabel="coefficient", title=" ")
        self._bars = axes.vlines([], [], [], linewidth=1.1)
        self.moving = [self._bars, axes.title]

    def background(self) -> Hashable:
        return self.axes.get_xlim(), self.axes.get_ylim()

    def show(self, view: View) -> None:
        setting, values = view.setting, view.continued.numpy()
        self.axes.set_xlim(-4, next(end for end in MAX_BARS if len(values) <= end) + 4)
        unit = unit_of(view)
        if self.axes.get_ylim() != (-200 * unit, 200 * unit):
            self.axes.set_yscale("symlog", linthresh=unit)
            self.axes.set_ylim(-200 * unit, 200 * unit)
            self.axes.yaxis.set_major_locator(FixedLocator((unit * TICKS).tolist()))
            self.axes.yaxis.set_minor_locator(NullLocator())
            self.axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        kept = np.full(len(values), PALE)
        kept[: setting.vector_dim] = GREY
        kept[view.order[: setting.terms].numpy()] = CODEC_COLOURS[setting.method]

        heights = values.copy()
        heights[: setting.vector_dim] = np.where(
            kept[: setting.vector_dim] == GREY, heights[: setting.vector_dim], view.reconstruction.received.numpy()
        )
        bars = np.zeros((len(heights), 2, 2))  # each from (place, 0) to (place, height)
        bars[:, :, 0] = np.arange(1, len(heights) + 1)[:, None]
        bars[:, 1, 1] = heights
        self._bars.set_segments(list(bars))
        self._bars.set_color(kept.tolist())

        order = {"dct": ", in zig-zag order", "pca": ", by component", "sparse": ", by atom", "flatten": ", by pixel"}
        kind = "coefficients" if setting.vector_dim > 1 else "coefficient"
        self.axes.title.set_text(f"{setting.vector_dim} {kind}{order.get(setting.method, '')}")


class HeatMap(ImagePanel):
    """The same as a map: the corner of the cosine spectrum; other vectors row by row."""

    def show(self, view: View) -> None:
        setting, vector = view.setting, view.reconstruction.received.numpy()
        if setting.method == "dct":
            places = zigzag(setting.mask_size)[: len(vector)].numpy()
            rows, columns = places // setting.mask_size, places % setting.mask_size
            side, name = int(max(rows.max(), columns.max())) + 1, "waves across, waves down"
        else:
            side = int(np.ceil(np.sqrt(len(vector))))
            rows, columns = np.arange(len(vector)) // side, np.arange(len(vector)) % side
            name = "the vector, row by row"
        table = np.full((side, side), np.nan)
        table[rows, columns] = vector
        self.set(diverging(table / unit_of(view)), name)


class Curves(Panel):
    """1 - IoU of this object by vector length, one line per method, and where the setting stands."""

    columns = 2
    place = (0.105, 0.175, 0.865, 0.715)

    def __init__(self, axes: Axes) -> None:
        super().__init__(axes)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlim=(0.9, 900), ylim=(0.8 * LEAST_ERROR, 1.2), xlabel="vector length n_k")
        axes.set_title("1 - IoU of this object")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(FixedLocator([1, 4, 16, 64, 256, 784]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

        look: dict[str, Any] = {"marker": ".", "markersize": 4.5, "linewidth": 1.4}
        self._lines = {name: axes.plot([], [], color=CODEC_COLOURS[name], **look)[0] for name in CODEC_COLOURS}
        self._guide = axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")

        (self._here,) = axes.plot([], [], marker="o", markersize=9, markeredgecolor="black", linestyle="none")
        self._here.set_clip_on(False)
        self._number = axes.text(1, 1, "", fontsize=10, fontweight="bold")
        self._number.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0})

        self._drawn: tuple[str, ...] = ()
        self.moving = [self._guide, *self._lines.values(), self._here, self._number]

    def depends_on(self, view: View) -> Hashable:
        return view.setting, tuple((name, len(curve.ious)) for name, curve in view.curves.items())

    def background(self) -> Hashable:
        return self._drawn

    def show(self, view: View) -> None:
        for name, line in self._lines.items():
            curve = view.curves.get(name, Curve([], []))
            line.set_data(curve.vector_dims, [max(1 - iou, LEAST_ERROR) for iou in curve.ious])
        drawn = tuple(name for name in self._lines if name in view.curves)
        if drawn != self._drawn:
            self._drawn = drawn
            names = [CODEC_NAMES[name] for name in drawn]
            self.axes.legend([self._lines[name] for name in drawn], names, loc="lower left")

        count, iou = view.setting.vector_dim, view.reconstruction.iou
        error = max(1 - iou, LEAST_ERROR)
        self._guide.set_xdata([count, count])
        self._here.set_data([count], [error])
        self._here.set_markerfacecolor(CODEC_COLOURS[view.setting.method])
        left = count > 100
        self._number.set_text(f"IoU {iou:.3f}")
        self._number.set_position((count * (0.85 if left else 1.18), min(1.35 * error, 0.8)))
        self._number.set_horizontalalignment("right" if left else "left")
        self._number.set_verticalalignment("bottom")


TABLE: dict[type[Panel], Cell] = {
    Original: Cell(0, 0),
    Target: Cell(0, 1),
    Decoded: Cell(0, 2),
    Binary: Cell(0, 3),
    Errors: Cell(0, 4),
    Vector: Cell(1, 0),
    HeatMap: Cell(1, 2),
    Curves: Cell(1, 3),
}


def unit_of(view: View) -> float:
    """What entries of the vector are shown in: ones, or hundredths where all are small."""
    return 1.0 if float(view.reconstruction.vector.abs().max()) > SMALL_VECTOR else 0.01


def grey(values: np.ndarray) -> np.ndarray:
    """(N, N, 3) uint8 of values that lie around 0..1: 0 is nearly black and 1 nearly white, to show what overshoots."""
    shade = ((values.astype(np.float32) + 0.2) / 1.4).clip(0, 1) * 255
    return np.repeat(shade.astype(np.uint8)[..., None], 3, axis=2)


def diverging(values: np.ndarray) -> np.ndarray:
    """(N, N, 3) uint8 of entries in their unit: orange below zero, purple above, pale where NaN stands for none.

    The scale ends at 128: the first cosine coefficient of a full mask is N.
    """
    colours = colormaps["PuOr"](SymLogNorm(linthresh=1.0, vmin=-128, vmax=128)(values), bytes=True)[..., :3]
    colours[np.isnan(values)] = 245
    return colours


def tinted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) whose pixels outside `mask` (H, W) fade, and those inside keep their colour under a tint."""
    faded = (0.45 * pixels + 0.55 * 255).astype(np.uint8)
    inside = (0.62 * pixels + 0.38 * 255 * np.array(to_rgb(BLUE))).astype(np.uint8)
    return np.where(mask[..., None], inside, faded)


def error_image(pixels: np.ndarray, item: BoxedObject, found: dict) -> tuple[np.ndarray, int, int]:
    """The surroundings of an object in grey, (h, w, 3) uint8, with the pixels that a mask misses and adds coloured.

    Args:
        pixels: the image (H, W, 3) uint8.
        item: the object.
        found: RLE of the mask, of the image's size.

    Returns:
        the image, how many pixels are missed, and how many added.
    """
    truth, mask = decode_rle([item.rle, found]).numpy()
    rows, columns = surroundings(item, MARGIN)
    light = pixels[rows, columns].mean(axis=2, keepdims=True) * 0.35
    near_truth, near_mask = truth[rows, columns, None], mask[rows, columns, None]
    base = np.repeat(np.where(near_truth & near_mask, light + 90, light + 165), 3, axis=2)
    for wrong, colour in ((near_truth & ~near_mask, MISSED), (near_mask & ~near_truth, ADDED)):
        base = np.where(wrong, 255 * np.array(to_rgb(colour)), base)
    return base.astype(np.uint8), int((truth & ~mask).sum()), int((mask & ~truth).sum())


def surroundings(item: BoxedObject, margin: float) -> tuple[slice, slice]:
    """The rows and columns of an object's box with a margin around, a share of the box's larger side."""
    x0, y0, x1, y1 = item.box.tolist()
    around = max(2, round(margin * max(x1 - x0, y1 - y0)))
    return (
        slice(max(int(y0) - around, 0), int(np.ceil(y1)) + around),
        slice(max(int(x0) - around, 0), int(np.ceil(x1)) + around),
    )


def fit_square(pixels: np.ndarray, side: int = SIDE, *, sharp: bool = False) -> np.ndarray:
    """(side, side, 3): an image as large as fits, centred on white; `sharp` keeps the edges of single pixels."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    way = Image.Resampling.NEAREST if sharp and scale >= 1 else Image.Resampling.BILINEAR
    resized = np.asarray(Image.fromarray(pixels).resize(size, way))
    square = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = resized
    return square
