"""An image whose objects can be clicked: invisible buttons lie over their boxes. No script runs in the browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from solq_lab.structures import Detections
from solq_lab.viz.images import draw_objects
from solq_lab.viz.style import STYLE
from solq_lab.viz.widgets.live_panel import DPI, as_png

STYLE_SHEET = """<style>
.solq-clickable {position: relative; overflow: hidden; padding: 0}
.solq-clickable img {width: 100%; height: 100%; margin: 0}
.solq-clickable .solq-object {position: absolute; margin: 0; padding: 0; background: transparent; border: none}
.solq-clickable .solq-object:hover {box-shadow: inset 0 0 0 2px white, inset 0 0 0 3px black}
.solq-clickable .solq-chosen {box-shadow: inset 0 0 0 3px white, inset 0 0 0 4px black}
</style>"""


class ClickableImage:
    """The image and its buttons.

    Attributes:
        widget: for an explorer to show.
        image: the widget of the pixels.
        buttons: one per object, in the order of the detections.
    """

    def __init__(self, width: int, on_click: Callable[[int], None]) -> None:
        """A clickable image `width` screen pixels wide; `on_click` is given the row of the clicked object."""
        self._width, self._on_click = width, on_click
        self.image = widgets.Image(format="png", layout=widgets.Layout(width="100%", margin="0"))
        self.buttons: list[widgets.Button] = []
        self.widget = widgets.Box(layout=widgets.Layout(width=f"{width}px", flex="0 0 auto"))
        self.widget.add_class("solq-clickable")

    def show(
        self, pixels: np.ndarray, detections: Detections | None, *, size: tuple[int, int], chosen: int = -1
    ) -> None:
        """Show a drawn image, and let its objects be clicked.

        Args:
            pixels: (h, w, 3) uint8 to show.
            detections: whose boxes become buttons; None: no buttons.
            size: (H, W) of the image that the boxes are in pixels of.
            chosen: the row of the object that is marked.
        """
        self.image.value = as_png(pixels)
        self.widget.layout.height = f"{round(self._width * pixels.shape[0] / pixels.shape[1])}px"
        self.buttons = [] if detections is None else self._make_buttons(detections, size, chosen)
        boxes = [] if detections is None else detections.boxes.tolist()
        largest_first = sorted(range(len(boxes)), key=lambda row: -_area(boxes[row]))  # small objects stay within reach
        self.widget.children = [self.image, *(self.buttons[row] for row in largest_first)]

    def _make_buttons(self, detections: Detections, size: tuple[int, int], chosen: int) -> list[widgets.Button]:
        height, width = size
        buttons = []
        for row, (box, name) in enumerate(zip(detections.boxes.tolist(), detections.names, strict=True)):
            x0, x1 = (100 * min(max(edge / width, 0.0), 1.0) for edge in box[::2])
            y0, y1 = (100 * min(max(edge / height, 0.0), 1.0) for edge in box[1::2])
            place = widgets.Layout(
                left=f"{x0:.2f}%", top=f"{y0:.2f}%", width=f"{x1 - x0:.2f}%", height=f"{y1 - y0:.2f}%"
            )

            button = widgets.Button(tooltip=f"object {row + 1}: {name}", layout=place)
            button.add_class("solq-object")
            if row == chosen:
                button.add_class("solq-chosen")
            button.on_click(lambda _, row=row: self._on_click(row))
            buttons.append(button)
        return buttons


@mpl.rc_context(STYLE)
def draw_image(pixels: np.ndarray, objects: Detections, colours: Mapping[int, str], *, width: int) -> np.ndarray:
    """(h, width, 3) uint8: an image (H, W, 3) with its objects drawn in, without any margin."""
    height = max(round(width * pixels.shape[0] / pixels.shape[1]), 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    draw_objects(figure.add_axes((0, 0, 1, 1)), pixels, objects, colours, font_size=8)
    figure.axes[0].set_aspect("auto")  # the height is rounded to whole pixels
    return figure_pixels(figure)


def figure_pixels(figure: Figure) -> np.ndarray:
    """(h, w, 3) uint8: a figure as it would be saved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
