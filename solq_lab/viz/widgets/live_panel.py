"""Panels that stay alive: only what moves is drawn again, over a kept background, and shown as PNG bytes.

Drawing a whole matplotlib figure takes tens of milliseconds, ticks and texts most of them. A slider wants its answer at
once, so each panel of an explorer is a small figure of its own whose axes are drawn once.
"""

import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NamedTuple

import ipywidgets as widgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.image import AxesImage
from PIL import Image

from solq_lab.viz.style import STYLE

DPI = 100
CELL = (2.36, 2.6)  # width and height of a panel of one column, inches
HEADING = 0.4  # inches above the panels of a whole figure


class Panel(ABC):
    """Artists in one axes, made once; `show` gives them the data of a view.

    Attributes:
        columns: how many cells wide the panel is.
        place: its axes in the panel: left, bottom, width, height in 0..1.
        moving: the artists that `show` changes.
    """

    columns: ClassVar[int] = 1
    place: ClassVar[tuple[float, float, float, float]] = (0.02, 0.02, 0.96, 0.87)

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.moving: list[Artist] = []

    @abstractmethod
    def show(self, view: Any) -> None:
        """Give the artists the data of `view`."""

    def depends_on(self, view: Any) -> Hashable:
        """What of `view` the panel shows: it is not drawn again while that stays equal. As a rule the whole setting."""
        return view.setting

    def background(self) -> Hashable:
        """What the parts that do not move depend on, such as the limits of an axis."""
        return None


class ImagePanel(Panel):
    """A panel of one square image under a title."""

    def __init__(self, axes: Axes) -> None:
        super().__init__(axes)
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(1, 0))
        self.image: AxesImage = axes.imshow(np.full((1, 1, 3), 255, dtype=np.uint8), extent=(0, 1, 1, 0))
        self.title = axes.set_title(" ")
        self.moving = [self.image, self.title]

    def set(self, pixels: np.ndarray, title: str) -> None:
        """Show pixels (H, W, 3) uint8, which are stretched to the square."""
        self.image.set_data(pixels)
        self.title.set_text(title)


class LivePanel:
    """One live panel and the widget that shows it.

    Attributes:
        image: the widget.
        drawn: how often it was drawn.
    """

    def __init__(self, panel: type[Panel]) -> None:
        width, height = CELL[0] * panel.columns, CELL[1]
        figure = Figure(figsize=(width, height), dpi=DPI)
        self._agg = FigureCanvasAgg(figure)
        with mpl.rc_context(STYLE):
            self.panel = panel(figure.add_axes(panel.place))
        for artist in self.panel.moving:
            artist.set_animated(True)  # `draw` leaves them out
        self._backgrounds: dict[Hashable, Any] = {}
        self._shown: Hashable = None
        self.image = widgets.Image(format="png", layout=widgets.Layout(width="100%", min_width="0"))
        self.drawn = 0

    def show(self, view: Any) -> None:
        """Draw the panel for a view, unless nothing it depends on has changed."""
        wanted = self.panel.depends_on(view)
        if self.drawn and wanted == self._shown:
            return
        with mpl.rc_context(STYLE):
            self.panel.show(view)
            self._restore_background()
            for artist in self.panel.moving:
                self.panel.axes.draw_artist(artist)
        self.image.value = as_png(np.asarray(self._agg.buffer_rgba())[..., :3])
        self._shown = wanted
        self.drawn += 1

    def _restore_background(self) -> None:
        key = self.panel.background()
        if key not in self._backgrounds:
            self._agg.draw()
            self._backgrounds[key] = self._agg.copy_from_bbox(self._agg.figure.bbox)
        self._agg.restore_region(self._backgrounds[key])


class Cell(NamedTuple):
    """Where a panel stands in the table of panels."""

    row: int
    column: int


def table_figure(table: Mapping[type[Panel], Cell], view: Any, title: str) -> Figure:
    """All panels of a view in one plain figure, placed as the explorer places them."""
    rows = 1 + max(cell.row for cell in table.values())
    columns = max(cell.column + panel.columns for panel, cell in table.items())
    figure = plt.figure(figsize=(CELL[0] * columns, CELL[1] * rows + HEADING), dpi=DPI)
    plt.close(figure)  # made by pyplot, so that a notebook knows how to show it; kept by it no longer
    with mpl.rc_context(STYLE):
        grid = GridSpec(rows + 1, columns, figure=figure, height_ratios=[HEADING] + [CELL[1]] * rows)
        figure.text(0.5, 1 - 0.5 * HEADING / figure.get_figheight(), title, ha="center", va="center", fontsize=11)
        for panel, (row, column) in table.items():
            part: SubFigure = figure.add_subfigure(grid[row + 1, column : column + panel.columns])
            panel(part.add_axes(panel.place)).show(view)
    return figure


def as_png(pixels: np.ndarray) -> bytes:
    """The PNG file of pixels (H, W, 3) uint8."""
    file = io.BytesIO()
    # Run lengths alone: faster than zlib's other ways by half, and no larger for images with areas of one colour.
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "png", compress_level=1, compress_type=zlib.Z_RLE)
    return file.getvalue()


def as_jpeg(pixels: np.ndarray) -> bytes:
    """The JPEG file of pixels (H, W, 3) uint8: for panels of photographs, in a third of the time of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=92, subsampling=0)
    return file.getvalue()
