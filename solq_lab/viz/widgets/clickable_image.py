"""Images whose parts can be clicked."""

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import anywidget
import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import traitlets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from solq_lab.structures import Detections
from solq_lab.viz.images import draw_objects
from solq_lab.viz.labels import Labels
from solq_lab.viz.style import OBJECT_COLOURS, STYLE, ImageAxes, text_colour
from solq_lab.viz.widgets.live_panel import DPI, as_png

CAPTION = '<div style="font-size: 11px; line-height: 1.3; text-align: center">{}</div>'
MAX_CHIPS = 100  # whose objects are marked when they are pointed at
_MARKED = "box-shadow: inset 0 0 0 2px white, inset 0 0 0 3px black, 0 0 0 2px black"
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
STYLE_SHEET = f"""
.solq-clickable {{position: relative; overflow: hidden; width: 100%; min-width: 0}}
.solq-clickable img {{width: 100%; height: auto; display: block; margin: 0}}
.solq-clickable .solq-object {{position: absolute; padding: 0; background: transparent; border: none; cursor: pointer}}
{_BY_CHIP} {{{_MARKED}; background: rgba(255, 255, 255, 0.25) !important}}
[class*="solq-chip-"]:not(.mod-active) {{opacity: 0.35}}
{_CHIPS}
"""


class ClickableImage(anywidget.AnyWidget):
    """The image and the places of its objects, as wide as its own place.

    Attributes:
        png: bytes of the image.
        objects: name and box of each object; a box is left, top, width and height in percent of the image.
        chosen: row of the object that is chosen, -1 for none; its frame is part of the image (`DrawnImage`).
        on_click: is given the row of the clicked object, -1 beside all, and the place (x, y) in 0..1 of the image.
    """

    png = traitlets.Bytes(b"").tag(sync=True)
    objects: Any = traitlets.List().tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)

    _css = STYLE_SHEET
    _esm = """
    function render({ model, el }) {
      const image = document.createElement("img");
      el.classList.add("solq-clickable");
      el.append(image);
      const paint = () => {
        image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
      };
      image.onload = () => URL.revokeObjectURL(image.src);
      image.onerror = () => setTimeout(paint, 500);  // the bytes may come later than the view
      const place = () => {
        el.querySelectorAll(".solq-object").forEach((button) => button.remove());
        const buttons = model.get("objects").map(({ name, box }, row) => {
          const button = document.createElement("button"), [left, top, width, height] = box.map((part) => part + "%");
          button.className = `solq-object solq-object-${row}` + (row === model.get("chosen") ? " solq-chosen" : "");
          button.title = name;
          Object.assign(button.style, { left, top, width, height });
          button.dataset.row = row;
          return [box[2] * box[3], button];
        });
        buttons.sort((one, other) => other[0] - one[0]);  // small objects stay within reach
        el.append(...buttons.map(([, button]) => button));
      };
      paint();
      place();
      model.on("change:png", paint);
      model.on("change:objects change:chosen", place);
      el.onclick = (event) => {
        const frame = image.getBoundingClientRect();
        const x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
        model.send({ row: Number(event.target.dataset.row ?? -1), x, y });
      };
    }
    export default { render };
    """

    def __init__(self, on_click: Callable[[int, float, float], None]) -> None:
        super().__init__()
        self.on_click = on_click
        self.on_msg(lambda _, click, buffers: self.on_click(click["row"], click["x"], click["y"]))

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        return data | {"image/png": base64.b64encode(self.png).decode()}, metadata  # seen where no kernel is

    def show(
        self,
        png: bytes,
        boxes: Sequence[Sequence[float]] = (),
        names: Sequence[str] = (),
        *,
        size: tuple[int, int],
        chosen: int = -1,
    ) -> None:
        """Show a drawn image, and let its objects be clicked.

        Args:
            png: the image.
            boxes: (K, 4) xyxy of the objects.
            names: K tooltips.
            size: (H, W) of the image that the boxes are in pixels of.
            chosen: the row of the object that is chosen.
        """
        with self.hold_sync():
            self.png, self.chosen = png, chosen
            self.objects = [
                {"name": name, "box": box} for name, box in zip(names, percent_boxes(boxes, size), strict=True)
            ]


def percent_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> list[list[float]]:
    """Left, top, width and height in percent of an image of `size` (H, W), for boxes (K, 4) xyxy in its pixels."""
    height, width = size
    scale = 100 / np.array([width, height, width, height])
    edges = (np.array(boxes, dtype=float).reshape(-1, 4) * scale).clip(0, 100)
    edges[:, 2:] -= edges[:, :2]
    return edges.round(2).tolist()


class Tiles:
    """A row of small images with captions that can be clicked.

    Attributes:
        images, captions: the widgets; those without content are hidden.
        widget: all of them.
    """

    def __init__(self, count: int, on_click: Callable[[int], None]) -> None:
        """At most `count` tiles; `on_click` is given the place of the clicked one."""
        self.images = [ClickableImage(lambda *_, place=place: on_click(place)) for place in range(count)]
        self.captions = [widgets.HTML(layout={"margin": "0 auto"}) for _ in range(count)]
        tiles = [widgets.VBox(parts) for parts in zip(self.images, self.captions, strict=True)]
        columns = f"repeat({count}, minmax(0, 1fr))"
        self.widget = widgets.GridBox(
            tiles, layout={"grid_template_columns": columns, "grid_gap": "6px", "width": "100%"}
        )
        self.show(())

    def show(self, contents: Iterable[tuple[np.ndarray, str]]) -> None:
        """Show pixels (h, w, 3) uint8 and their captions, in the first tiles; the others disappear."""
        shown = list(contents)
        for place, tile in enumerate(self.widget.children):
            tile.layout.display = None if place < len(shown) else "none"
        for (pixels, caption), image, words in zip(shown, self.images, self.captions, strict=False):
            image.show(as_png(pixels), [(0, 0, 1, 1)], [caption], size=(1, 1))
            words.value = CAPTION.format(html.escape(caption))


def link_figure(figure: Figure, open_object: Callable[..., None]) -> ClickableImage:
    """A figure whose panels open an explorer: those with a gid "IMAGE_ID" or "IMAGE_ID OBJECT_ID".

    Args:
        figure: as `comparison_grid` and `failure_gallery` make them.
        open_object: called with the ids.
    """
    pixels = figure_pixels(figure)
    panels = {axes: gid for axes in figure.axes if (gid := axes.get_gid())}
    ids = [tuple(map(int, gid.split())) for gid in panels.values()]
    corners = [axes.get_window_extent().get_points().tolist() for axes in panels]
    boxes = [(x0, pixels.shape[0] - y1, x1, pixels.shape[0] - y0) for (x0, y0), (x1, y1) in corners]
    clickable = ClickableImage(lambda row, x, y: None if row < 0 else open_object(*ids[row]))
    clickable.show(as_png(pixels), boxes, [f"open image {one[0]} below" for one in ids], size=pixels.shape[:2])
    return clickable


class DrawnImage(NamedTuple):
    """An image with its objects, and apart from it their labels: a frame lies between them."""

    objects: Image.Image
    labels: Image.Image  # with transparency
    scale: float  # pixels drawn for each of the image

    def png(self, framed: Sequence[float] = ()) -> bytes:
        """The PNG file, with a frame around the box `framed`, xyxy in pixels of the image."""
        whole = self.objects.copy()
        if len(framed):
            x0, y0, x1, y1 = (round(self.scale * edge) for edge in framed)
            for colour, thickness, off in (("white", 4, 2), ("black", 2, 1)):
                box = min(x0, x1) - off, min(y0, y1) - off, max(x0, x1) + off, max(y0, y1) + off
                ImageDraw.Draw(whole).rectangle(box, outline=colour, width=thickness)
        whole.paste(self.labels, mask=self.labels)
        return as_png(np.asarray(whole))


@mpl.rc_context(STYLE)
def draw_image(
    pixels: np.ndarray,
    objects: Detections,
    colours: Sequence[str] | None = None,
    *,
    width: int,
    filled: bool = True,
    labelled: bool = True,
) -> DrawnImage:
    """An image (H, W, 3) with its objects drawn in, `width` pixels wide and without any margin."""
    height = max(round(width * pixels.shape[0] / pixels.shape[1]), 1)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    axes = figure.add_axes(ImageAxes(figure, (0, 0, 1, 1)))
    draw_objects(axes, pixels, objects, colours, font_size=9 if labelled else 0, filled=filled)
    axes.set_aspect("auto")  # the height is rounded to whole pixels

    labels = [artist for artist in axes.artists if isinstance(artist, Labels)]
    for artist in labels:
        artist.set_animated(True)  # `draw` leaves it out
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    canvas.renderer.clear()
    for artist in labels:
        artist.draw(canvas.renderer)
    return DrawnImage(drawn, Image.fromarray(np.array(canvas.buffer_rgba())), width / pixels.shape[1])


def figure_pixels(figure: Figure) -> np.ndarray:
    """(h, w, 3) uint8: a figure as it would be saved."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
