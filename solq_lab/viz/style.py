"""The style of all figures: one colour per method and per loss, readable at notebook size, colour-blind safe.

Colours: Okabe and Ito, "Color Universal Design" (2008).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from solq_lab.codecs.kinds import CODECS
from solq_lab.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8C8C8C"
FIGURE_WIDTH = 11.0  # inches; a notebook shrinks wider figures with their text

METHOD_COLOURS = {"SOLQ": BLUE, "SQR": ORANGE, "Deformable DETR": GREEN, "ceiling": GREY}
LOSS_COLOURS = {"class": VERMILION, "l1": GREEN, "giou": SKY, "vector": PURPLE, "mask": BLUE, "dice": ORANGE}
CODEC_SHADES = ("#8B5A00", "#B8A800", "#5B3A8C")  # brown, olive and violet, for codecs beyond the eight colours
KIND_COLOURS = {"box": GREEN, "segm": BLUE, "boundary": PURPLE}
CODEC_COLOURS = dict(
    zip(CODECS, (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, GREY, BLACK, *CODEC_SHADES), strict=True)
)
CODEC_NAMES = {kind: codec.label or kind for kind, codec in CODECS.items()}
MISSED, ADDED = VERMILION, SKY  # false negative and false positive pixels of a reconstruction
# The seven first, then each as far from all before it as CIELAB allows (26 units at least).
OBJECT_COLOURS = (
    *(ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE),
    *("#6611FF", "#00FF00", "#FF00CC", "#FF0066", "#9977FF", "#776633", "#44AA11", "#FFDDAA", "#00FFAA", "#55EEEE"),
    *("#AA3333", "#FF0022", "#AADD88", "#BB0077", "#FF9988", "#AAEE00", "#336600"),
)

warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a class name in a script that no font here has

STYLE: dict[Any, Any] = {  # of matplotlib
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titley": 1.0,  # the place that is searched otherwise, for milliseconds
    "image.interpolation": "nearest",
    "text.parse_math": False,  # a name with two dollar signs would be a formula
}


def new_figure(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    title: str = "",
    width_ratios: Sequence[float] | None = None,
    height_ratios: Sequence[float] | None = None,
    of_images: bool = False,
) -> tuple[Figure, np.ndarray]:
    """An empty figure and its axes (rows, columns), `of_images` without ticks, grid and frames.

    The size is (width, height) in inches.
    """
    ratios: dict[str, Any] = {"width_ratios": width_ratios, "height_ratios": height_ratios}
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **ratios)
    plt.close(figure)  # pyplot would keep it alive, and a notebook would show it twice
    if title:
        figure.suptitle(title)
    for place in axes.flat if of_images else ():
        place.set_axis_off()
    return figure, axes


_NO_TICKS: Any = ()


class _Across(XAxis):
    majorTicks = minorTicks = _NO_TICKS  # matplotlib's names


class _Down(YAxis):
    majorTicks = minorTicks = _NO_TICKS


class ImageAxes(Axes):
    """Axes of an image. Half of the time that makes usual ones goes into ticks that nobody sees."""

    def _init_axis(self) -> None:
        self.xaxis, self.yaxis = _Across(self, clear=False), _Down(self, clear=False)


def new_panels(
    rows: int, columns: int, *, panel: tuple[float, float], title: str = "", left: float = 0.0, below: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """An empty figure of images and its axes (rows, columns), each without ticks and under room for its title.

    Its places are computed here: a layout engine, and ticks that nobody sees, take longer than drawing the images.

    Args:
        panel: (width, height) of an image, inches.
        title: of all.
        left, below: inches for names of rows, and for a legend.
    """
    heading, above, gap = 0.36 if title else 0.04, 0.26, 0.07  # inches
    width, height = left + columns * (panel[0] + gap), heading + rows * (panel[1] + above) + below
    figure = plt.figure(figsize=(width, height))
    plt.close(figure)  # as in `new_figure`
    if title:
        figure.suptitle(title, y=1 - 0.06 / height)

    axes = np.empty((rows, columns), dtype=object)
    for row, column in np.ndindex(rows, columns):
        corner = left + column * (panel[0] + gap), below + (rows - 1 - row) * (panel[1] + above)
        place = (corner[0] / width, corner[1] / height, panel[0] / width, panel[1] / height)
        axes[row, column] = added = figure.add_axes(ImageAxes(figure, place))
        added.set_axis_off()
    return figure, axes


def save_animation(frames: Sequence[Image.Image], path: Path, *, milliseconds: int) -> None:
    """Write frames of one size as a GIF that starts again at its end, `milliseconds` each; its folder is made."""
    first, *others = frames
    with replacing(path) as unfinished:
        first.save(unfinished, format="GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def save(figure: Figure, path: Path) -> Figure:
    """Write a figure as PNG, making its folder, and return it for a notebook to show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def styled(frame: pd.DataFrame, digits: int = 1) -> Styler:
    """A frame for a notebook to show: rounded, "-" where a number is missing, digits in columns, texts to the left."""
    texts = [name for name in frame if frame[name].map(type).eq(str).all()]
    look = [
        {"selector": "td", "props": "text-align: right; font-variant-numeric: tabular-nums; padding: 3px 10px"},
        {"selector": "th.row_heading", "props": "text-align: left; white-space: nowrap; padding: 3px 10px"},
        {"selector": "th.col_heading", "props": "padding: 3px 10px"},
        {"selector": "tr", "props": "border-bottom: 1px solid #8884; background: transparent"},
        {"selector": "", "props": "border-collapse: collapse"},
    ]
    shown = frame.style.format(precision=digits, na_rep="-", escape="html").set_table_styles(look)
    shown = shown.format_index(lambda name: f"{name:g}" if isinstance(name, float) else name, escape="html")
    left: dict[Any, Any] = {name: [{"selector": "", "props": "text-align: left"}] for name in texts}
    return shown.set_table_styles(left, overwrite=False)


def metric_title(metric: str) -> str:
    """A metric's name on an axis: "boundary.APs" is "boundary AP, small"."""
    kind, _, number = metric.partition(".")
    sizes = {"APs": "AP, small", "APm": "AP, medium", "APl": "AP, large"}
    return f"{kind} {sizes.get(number, number)}"


def text_colour(background: str) -> str:
    """Black or white, whichever can be read on this colour."""
    red, green, blue = to_rgb(background)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def colours_of(numbers: Iterable[int]) -> list[str]:
    """The colour of each class channel, or object, by its number: the same in every image and figure."""
    return [OBJECT_COLOURS[number % len(OBJECT_COLOURS)] for number in numbers]
