"""The attention explorer: click an object and see where its query looks, layer by layer. Paper: figure 4.

`AttentionExplorer.widget` is for JupyterLab; `figure` is the same view as a plain figure.
"""

from functools import lru_cache

import ipywidgets as widgets
from matplotlib.figure import Figure
from torchvision.ops import box_iou

from solq_lab.inference.attention import (
    LayerAttention,
    ObjectView,
    layer_views,
    object_view,
    pixel_views,
    predict_with_attention,
    record_encoder,
)
from solq_lab.structures import Detections
from solq_lab.viz.attention import attention_by_size, attention_of_object, attention_of_queries
from solq_lab.viz.widgets.clickable_image import ClickableImage, draw_image, figure_pixels
from solq_lab.viz.widgets.explorer import ModelExplorer
from solq_lab.viz.widgets.live_panel import DPI, as_jpeg

WIDTH = 480  # of the drawn image, pixels; an upright one is as high
PLACE = 0.36  # its share of the explorer's width
ALL = -1  # of a list's options: everything summed up
NOTHING = "Nothing is found in this image with that score; lower the score or choose another image."
POINTS, LAYERS, QUERIES, PIXEL = "points", "layer by layer", "all queries", "encoder, a pixel"
USED = {  # which controls change a view; the others are hidden
    POINTS: ("object", "layer", "head", "level", "close_up"),
    LAYERS: ("object", "head", "level", "close_up"),
    QUERIES: (),
    PIXEL: ("head", "level", "close_up"),
}
MARK = 0.02  # half the side of the square around the clicked pixel, share of the image's longer side
MIN_IOU = 0.3  # of the boxes of two models' detections that are taken for one object


class AttentionExplorer(ModelExplorer):
    """An image whose objects can be clicked, and the attention of the chosen one's query in one model or two.

    Attributes:
        score, object, what, layer, head, level, close_up: the controls; `object` lists the first model's objects,
            `what` chooses between the points of the object, the same layer by layer with the mask that each layer
            predicts, all queries of the image, and a pixel's tokens in the encoder. `layer`, `head` and `level` count
            from 0, `ALL` sums up.
        clickable: the image; clicking an object chooses it, and in the encoder's view any pixel.
        place: (x, y) of that pixel, in 0..1 of the image.
        panels: the drawn attention.
    """

    def build(self) -> None:
        """Make the controls, the clickable image, and the panels below."""
        self._look = lru_cache(32)(
            lambda name, index: predict_with_attention(self._predictors[name], self.pixels(index))
        )
        self._encode = lru_cache(2)(lambda name, index: record_encoder(self._predictors[name], self.pixels(index)))
        self.place = 0.5, 0.5
        self._drawn = lru_cache(32)(
            lambda index, score: draw_image(
                self.pixels(index),
                self._look(self.names[0], index)[0].above(score),
                width=round(WIDTH * self._share(index)),
            )
        )
        self._make_controls()
        self.clickable = ClickableImage(self.guarded(self._click))
        self.panels = widgets.Image(format="jpeg", layout={"width": "100%", "min_width": "0"})

        chosen = [self.what, self.score, self.object, *self._choices.values(), self.close_up, self.status]
        controls = widgets.VBox(chosen, layout={"flex": "1 1 auto", "min_width": "0", "padding": "0 0 0 8px"})
        self._place = widgets.Box([self.clickable])
        parts = [self.chooser.widget, widgets.HBox([self._place, controls])]
        panels = widgets.VBox([self.panels], layout={"align_items": "flex-start"})  # stretched otherwise
        self.widget = widgets.VBox([*parts, panels])
        self._choose_image()

    @property
    def detections(self) -> Detections:
        """The objects of the first model that can be chosen, best score first."""
        return self._found(self.names[0])[0]

    def row_of(self, name: str) -> int:
        """The row of the chosen object in a model's detections; in the second model's, the one whose box is closest.

        Raises:
            ValueError: nothing is chosen, or the second model finds nothing there.
        """
        if self.object.value is None:
            raise ValueError(NOTHING)
        if name == self.names[0]:
            return self.object.value
        overlap = box_iou(self.detections.boxes[self.object.value][None], self._found(name)[0].boxes)[0]
        if not len(overlap) or overlap.max() < MIN_IOU:
            raise ValueError(f"{name} finds nothing there with that score.")
        return int(overlap.argmax())

    def view(self, name: str = "") -> ObjectView:
        """The chosen object and its points in a model, by default the first. Raises as `row_of`."""
        name = name or self.names[0]
        found, layers = self._found(name)
        view = object_view(self.pixels(self.image.value), found, layers, self.row_of(name), **self._which())
        return view._replace(caption=f"{name}, {view.caption}") if len(self.names) > 1 else view

    def figure(self) -> Figure:
        """What `what` says, of every model that finds the object.

        Raises:
            ValueError: the first model finds none.
        """
        pixels, what = self.pixels(self.image.value), self.what.value
        if what == QUERIES:
            return attention_of_queries(pixels, {name: self._found(name) for name in self.names})

        which = self._which()
        parts = {"head": which["head"], "level": which["level"]}
        look = {"title": self._describe(), "close_up": self.close_up.value}
        if what == PIXEL:
            return self._pixel_figure(**look, head=which["head"], level=which["level"])

        names = [name for name in self.names if self._finds(name)]
        if what == POINTS:
            views = [self.view(name) for name in names]
            return attention_of_object(*views, **look)
        layers = {}
        for name in names:
            found, attention = self._found(name)
            layers[name] = layer_views(self._predictors[name], pixels, found, attention, self.row_of(name), **parts)
        columns = [f"layer {number + 1}" for number in range(min(map(len, layers.values())))]
        shown = {name: views[: len(columns)] for name, views in layers.items()}
        return attention_by_size(shown, columns, with_heat=len(shown) == 1, **look)

    def _pixel_figure(self, *, title: str, close_up: bool, head: int | None, level: int | None) -> Figure:
        """The token of one level in every encoder layer; of all levels in the last one."""
        pixels, shown = self.pixels(self.image.value), {}
        levels = range(len(self.level.options) - 1) if level is None else [level]
        for name in self.names:
            encoder = self._encode(name, self.image.value)
            views = [pixel_views(pixels, encoder, self.place, level=one, head=head) for one in levels]
            shown[name] = views[0] if level is not None else [layers[-1] for layers in views]

        count = min(map(len, shown.values()))  # models may differ in layers
        columns = [f"token of level {1 + (one if level is None else level)}" for one in range(count)]
        return attention_by_size(
            {name: views[:count] for name, views in shown.items()},
            columns,
            title=title,
            with_heat=len(shown) == 1,
            close_up=close_up,
            outline="cell of the token",
        )

    def update(self) -> None:
        """Draw what the controls' present values ask for."""
        for name in ("object", "layer", "head", "level", "close_up"):
            getattr(self, name).layout.display = None if name in USED[self.what.value] else "none"
        objects, size = self.detections, self.pixels(self.image.value).shape[:2]
        chosen = -1 if self.object.value is None else self.object.value
        boxes, tooltips = objects.boxes.tolist(), [f"{row + 1}: {label}" for row, label in enumerate(objects.names)]
        if self.what.value == PIXEL:
            x, y = self.place[0] * size[1], self.place[1] * size[0]
            half = MARK * max(size)
            chosen, boxes, tooltips = 0, [[x - half, y - half, x + half, y + half]], ["the pixel"]
        drawn = self._drawn(self.image.value, self.score.value).png(() if chosen < 0 else boxes[chosen])
        self._place.layout.flex = f"0 0 {PLACE * self._share(self.image.value):.0%}"
        self.clickable.show(drawn, boxes, tooltips, size=size, chosen=chosen)

        self.report("")
        try:
            figure = self.figure()
        except ValueError as reason:
            self.report(str(reason))
            self.panels.layout.visibility = "hidden"
        else:
            self.panels.value = as_jpeg(figure_pixels(figure))
            self.panels.layout.max_width = f"{figure.get_figwidth() * DPI:.0f}px"
            self.panels.layout.visibility = "visible"

    def _share(self, index: int) -> float:
        """The width of an image over its height, 1 at most: of how much of the place it fills."""
        height, width = self.pixels(index).shape[:2]
        return min(width / height, 1.0)

    def _finds(self, name: str) -> bool:
        """Whether a model finds the chosen object; the first one's failure raises, another's is reported."""
        try:
            self.row_of(name)
        except ValueError as reason:
            if name == self.names[0]:
                raise
            self.report(str(reason))
            return False
        return True

    def _make_controls(self) -> None:
        model = next(iter(self._predictors.values())).experiment.model
        look = {"layout": {"width": "250px"}, "style": {"description_width": "44px"}}
        self.object = widgets.Dropdown(description="object", **look)
        self.what = widgets.ToggleButtons(options=list(USED), style={"button_width": "auto"})
        self.layer, self.head, self.level = (
            widgets.Dropdown(
                options=[("all", ALL)] + [(str(number + 1), number) for number in range(count)],
                description=name,
                **look,
            )
            for name, count in (("layer", model.decoder_layers), ("head", model.heads), ("level", model.levels))
        )
        self.layer.value = model.decoder_layers - 1
        self._choices = {"layer": self.layer, "head": self.head, "level": self.level}
        self.close_up = widgets.Checkbox(value=True, description="close-up", **look)

        self.on_change(self._choose_image, self.image, self.score)
        self.on_change(self.redraw, self.object, self.what, *self._choices.values(), self.close_up)
        self.chooser.refresh = self._choose_image

    def _choose_image(self) -> None:
        """Another image or score: other objects, the best one chosen, or the one that was asked for."""
        objects = self.detections
        names = zip(objects.names, objects.scores.tolist(), strict=True)
        with self.together():
            self.object.options = [(f"{row + 1}: {name} {score:.2f}", row) for row, (name, score) in enumerate(names)]
            self.object.value = 0 if len(objects.labels) else None
            row = self.chooser.row
            if row is not None and self.chooser.is_constrained:
                self._choose_true(row - self._dataset.truth.rows_of(self.image.value).start)

    def open(self, image_id: int, object_id: int | None = None) -> None:
        """Show an image of the data set by its id, and the detection of an object, by its annotation id."""
        with self.together():
            super().open(image_id, object_id)
            if self.chosen >= 0:
                self._choose_true(self.chosen)

    def _choose_true(self, row: int) -> None:
        """Choose the detection whose box is closest to a true object's, where there is one."""
        overlap = box_iou(self.true_objects(self.image.value).boxes[row][None], self.detections.boxes)[0]
        if len(overlap) and overlap.max() >= MIN_IOU:
            self.object.value = int(overlap.argmax())

    def _click(self, row: int, x: float, y: float) -> None:
        if self.what.value == PIXEL:
            self.place = x, y
            self.redraw()
        elif row >= 0:
            self.object.value = row

    def _found(self, name: str) -> tuple[Detections, list[LayerAttention]]:
        detections, layers = self._look(name, self.image.value)
        return detections.above(self.score.value), layers

    def _which(self) -> dict[str, int | None]:
        return {name: None if control.value == ALL else control.value for name, control in self._choices.items()}

    def _describe(self) -> str:
        """What is summed up, in words: "layer 3, all heads, level 1"."""
        controls = {name: one for name, one in self._choices.items() if name in USED[self.what.value]}
        (x, y), (height, width) = self.place, self.pixels(self.image.value).shape[:2]
        words = [f"pixel {x * width:.0f}, {y * height:.0f}"] if self.what.value == PIXEL else []
        for name, control in controls.items():
            words.append(f"all {name}s" if control.value == ALL else f"{name} {control.value + 1}")
        return ", ".join(words)
