"""Images whose parts can be clicked: invisible buttons lie over them. No script runs in the browser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from solq_lab.structures import Detections
from solq_lab.viz.images import draw_objects
from solq_lab.viz.style import OBJECT_COLOURS, STYLE, text_colour
from solq_lab.viz.widgets.live_panel import DPI, as_png

MAX_CHIPS = 100  # whose objects are marked when they are pointed at
_MARKED = "box-shadow: inset 0 0 0 {}px white, inset 0 0 0 {}px black, 0 0 0 2px black"
# Pointing at the chip of an object marks the object too.
_BY_CHIP = ", ".join(
    f".solq-panel:has(.solq-chip-{row}:hover) .solq-object-{row}, .solq-object-{row}:hover" for row in range(MAX_CHIPS)
)


def colour_class(colour: str) -> str:
    """The CSS class of a chip in a colour of `OBJECT_COLOURS`; a toggle button has no colour of its own."""
    return f"solq-colour-{colour[1:]}"


_CHIPS = "\n".join(
    f".jupyter-button.{colour_class(one)} {{background: {one} !important; color: {text_colour(one)} !important}}"
    for one in OBJECT_COLOURS
)
STYLE_SHEET = f"""<style>
.solq-clickable {{position: relative; overflow: hidden; padding: 0}}
.solq-clickable img {{width: 100%; height: auto; display: block; margin: 0}}
.solq-clickable .solq-object {{position: absolute; margin: 0; padding: 0; background: transparent; border: none}}
{_BY_CHIP} {{{_MARKED.format(2, 3)}; background: rgba(255, 255, 255, 0.25) !important}}
.solq-clickable .solq-chosen {{{_MARKED.format(3, 4)}}}
[class*="solq-chip-"]:not(.mod-active) {{opacity: 0.35}}
{_CHIPS}
</style>"""


class ClickableImage:
    """The image and its buttons.

    Attributes:
        widget: for an explorer to show; as wide as its place.
        image: the widget of the pixels.
        buttons: one per object, in the order of the boxes.
    """

    def __init__(self, on_click: Callable[[int], None]) -> None:
        """A clickable image; `on_click` is given the row of the clicked object."""
        self._on_click = on_click
        self.image = widgets.Image(format="png", layout=widgets.Layout(width="100%", margin="0"))
        self.buttons: list[widgets.Button] = []
        self.widget = widgets.Box(layout=widgets.Layout(width="100%", min_width="0"))
        self.widget.add_class("solq-clickable")

    def show(
        self,
        pixels: np.ndarray,
        boxes: Sequence[Sequence[float]] = (),
        names: Sequence[str] = (),
        *,
        size: tuple[int, int],
        chosen: int = -1,
    ) -> None:
        """Show a drawn image, and let its objects be clicked.

        Args:
            pixels: (h, w, 3) uint8 to show.
            boxes: (K, 4) xyxy of the objects, which become buttons.
            names: K tooltips.
            size: (H, W) of the image that the boxes are in pixels of.
            chosen: the row of the object that is marked.
        """
        self.image.value = as_png(pixels)
        self.buttons = [
            self._make_button(row, box, name, size) for row, (box, name) in enumerate(zip(boxes, names, strict=True))
        ]
        if 0 <= chosen < len(self.buttons):
            self.buttons[chosen].add_class("solq-chosen")
        largest_first = sorted(range(len(boxes)), key=lambda row: -_area(boxes[row]))  # small objects stay within reach
        self.widget.children = [self.image, *(self.buttons[row] for row in largest_first)]

    def _make_button(self, row: int, box: Sequence[float], name: str, size: tuple[int, int]) -> widgets.Button:
        height, width = size
        x0, x1 = (100 * min(max(edge / width, 0.0), 1.0) for edge in box[::2])
        y0, y1 = (100 * min(max(edge / height, 0.0), 1.0) for edge in box[1::2])
        place = widgets.Layout(left=f"{x0:.2f}%", top=f"{y0:.2f}%", width=f"{x1 - x0:.2f}%", height=f"{y1 - y0:.2f}%")
        button = widgets.Button(tooltip=name, layout=place)
        button.add_class("solq-object")
        button.add_class(f"solq-object-{row}")
        button.on_click(lambda _: self._on_click(row))
        return button


class Tiles:
    """A row of small images with captions that can be clicked.

    Attributes:
        buttons, images, captions: the widgets; those without content are hidden.
        widget: all of them.
    """

    def __init__(self, count: int, on_click: Callable[[int], None]) -> None:
        """At most `count` tiles; `on_click` is given the place of the clicked one."""
        self.images = [widgets.Image(format="png", layout={"width": "100%"}) for _ in range(count)]
        self.captions = [widgets.Label() for _ in range(count)]
        self.buttons = [widgets.Button(layout={"width": "100%", "height": "100%", "margin": "0"}) for _ in range(count)]
        tiles = []
        for place, (image, caption, button) in enumerate(zip(self.images, self.captions, self.buttons, strict=True)):
            for part, area in ((image, "1 / 1"), (caption, "2 / 1"), (button, "1 / 1 / 3 / 2")):
                part.layout.grid_area = area

            caption.style.font_size, caption.layout.margin = "11px", "-6px auto 0"
            button.style.button_color = "transparent"  # without a face, over the image and its caption
            button.on_click(lambda _, place=place: on_click(place))
            tiles.append(widgets.GridBox([image, caption, button], layout={"overflow": "hidden"}))
        columns = f"repeat({count}, minmax(0, 1fr))"
        self._tiles = tiles
        self.widget = widgets.GridBox(
            tiles, layout={"grid_template_columns": columns, "grid_gap": "6px", "width": "100%"}
        )
        self.show(())

    def show(self, contents: Iterable[tuple[np.ndarray, str]]) -> None:
        """Show pixels (h, w, 3) uint8 and their captions, in the first tiles; the others disappear."""
        shown = list(contents)
        for place, tile in enumerate(self._tiles):
            tile.layout.display = None if place < len(shown) else "none"
        for place, (pixels, caption) in enumerate(shown):
            self.images[place].value = as_png(pixels)
            self.captions[place].value = self.buttons[place].tooltip = caption


def link_figure(figure: Figure, open_object: Callable[..., None], *, width: str = "100%") -> widgets.Widget:
    """A figure whose panels open an explorer: those with a gid "IMAGE_ID" or "IMAGE_ID OBJECT_ID".

    Args:
        figure: as `comparison_grid` and `failure_gallery` make them.
        open_object: an explorer's `open`, called with the ids.
        width: of the widget, a CSS length.
    """
    pixels = figure_pixels(figure)
    panels = {axes: gid for axes in figure.axes if (gid := axes.get_gid())}
    ids = [tuple(map(int, gid.split())) for gid in panels.values()]
    corners = [axes.get_window_extent().get_points().tolist() for axes in panels]
    boxes = [(x0, pixels.shape[0] - y1, x1, pixels.shape[0] - y0) for (x0, y0), (x1, y1) in corners]
    clickable = ClickableImage(lambda place: open_object(*ids[place]))
    clickable.show(pixels, boxes, [f"open image {one[0]} below" for one in ids], size=pixels.shape[:2])
    clickable.widget.layout.width = width
    return widgets.VBox([widgets.HTML(STYLE_SHEET), clickable.widget])


@mpl.rc_context(STYLE)
def draw_image(
    pixels: np.ndarray,
    objects: Detections,
    colours: Sequence[str] | None = None,
    *,
    width: int,
    filled: bool = True,
) -> np.ndarray:
    """(h, width, 3) uint8: an image (H, W, 3) with its objects drawn in, without any margin."""
    height = max(round(width * pixels.shape[0] / pixels.shape[1]), 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    draw_objects(figure.add_axes((0, 0, 1, 1)), pixels, objects, colours, font_size=9, filled=filled)
    figure.axes[0].set_aspect("auto")  # the height is rounded to whole pixels
    return figure_pixels(figure)


def figure_pixels(figure: Figure) -> np.ndarray:
    """(h, w, 3) uint8: a figure as it would be saved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
