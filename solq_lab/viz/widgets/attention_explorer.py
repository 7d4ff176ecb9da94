"""The attention explorer: click an object and see where its query looks, layer by layer. Paper: figure 4.

`AttentionExplorer.widget` is for JupyterLab; `figure` is the same view as a plain figure.
"""

from __future__ import annotations

import html
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from solq_lab.data.coco import CocoDataset
from solq_lab.inference.attention import LayerAttention, ObjectView, object_view, predict_with_attention
from solq_lab.inference.predictor import Predictor
from solq_lab.structures import Detections
from solq_lab.viz.attention import attention_of_object
from solq_lab.viz.style import class_colours
from solq_lab.viz.widgets.callbacks import Callbacks
from solq_lab.viz.widgets.clickable_image import STYLE_SHEET, ClickableImage, draw_image, figure_pixels
from solq_lab.viz.widgets.live_panel import as_png

WIDTH = 320  # of the image, pixels of the screen
ALL = -1  # of a list's options: everything summed up
NOTHING = "Nothing is found in this image with that score; lower the score or choose another image."


class AttentionExplorer:
    """An image whose objects can be clicked, and the attention of the chosen one's query.

    Attributes:
        image, score, object, layer, head, level, close_up: the controls; setting the value of one redraws what
            depends on it. `layer`, `head` and `level` count from 0, and are `ALL` where they are summed up.
        clickable: the image; clicking an object chooses it.
        panels: the drawn attention.
        message: the sentence that is shown where there is nothing to draw, else empty.
        widget: all of it, for JupyterLab to show.
    """

    def __init__(self, predictor: Predictor, dataset: CocoDataset, *, score: float = 0.3) -> None:
        """Show the best object of the first image.

        Args:
            predictor: the model, built without `bucket`.
            dataset: images with true masks (`build_images`).
            score: the slider's first value.

        Raises:
            ValueError: the data set has no images, or the predictor replays CUDA graphs.
        """
        if len(dataset) == 0:
            raise ValueError("the data set has no images to explore")

        self._predictor, self._dataset = predictor, dataset
        self._look = lru_cache(16)(lambda index: predict_with_attention(predictor, self._pixels(index)))
        self._clickable_pixels = lru_cache(16)(self._draw_clickable)
        self._quiet = False
        self.message = ""
        self._status = widgets.HTML()
        self._callbacks = Callbacks(self._report)

        self._make_controls(score)
        self.clickable = ClickableImage(WIDTH, self._click)
        self.panels = widgets.Image(
            format="png", layout=widgets.Layout(width="100%", max_width="1020px", min_width="0")
        )
        self.widget = self._lay_out()
        self._choose_image()

    @property
    def detections(self) -> Detections:
        """The objects that can be chosen, best score first."""
        return self._looked()[0].above(self.score.value)

    def view(self) -> ObjectView:
        """What is shown.

        Raises:
            ValueError: the image has no object of at least the score.
        """
        if self.object.value is None:
            raise ValueError(NOTHING)
        which = {name: None if control.value == ALL else control.value for name, control in self._choices.items()}
        return object_view(
            self._pixels(self.image.value), self.detections, self._looked()[1], self.object.value, **which
        )

    def figure(self) -> Figure:
        """The object, its points and its heat map.

        Raises:
            ValueError: as `view`.
        """
        return attention_of_object(self.view(), title=self._describe(), close_up=self.close_up.value)

    def update(self) -> None:
        """Draw what the controls' present values ask for."""
        if self._quiet:
            return
        found = self.detections
        chosen = -1 if self.object.value is None else self.object.value
        size = tuple(self._pixels(self.image.value).shape[:2])
        self.clickable.show(self._clickable_pixels(self.image.value, self.score.value), found, size=size, chosen=chosen)

        try:
            drawn = self.figure()
        except ValueError as reason:
            self._report(str(reason))
            self.panels.layout.visibility = "hidden"
        else:
            self._report("")
            self.panels.value = as_png(figure_pixels(drawn))
            self.panels.layout.visibility = "visible"

    def _report(self, sentence: str) -> None:
        self.message = sentence
        self._status.value = html.escape(sentence)

    def _make_controls(self, score: float) -> None:
        model = self._predictor.experiment.model
        narrow = widgets.Layout(width="210px")
        self.image = widgets.BoundedIntText(
            value=0, min=0, max=len(self._dataset) - 1, description="image", layout=narrow
        )
        self.score = widgets.FloatSlider(
            value=score,
            min=0.05,
            max=0.95,
            step=0.05,
            description="score",
            readout_format=".2f",
            layout=widgets.Layout(width="340px"),
        )

        self.object = widgets.Dropdown(description="object", layout=narrow)
        self.layer = self._make_list("layer", model.decoder_layers, layout=narrow)
        self.layer.value = model.decoder_layers - 1
        self.head = self._make_list("head", model.heads, layout=narrow)
        self.level = self._make_list("level", model.levels, layout=narrow)
        self._choices = {"layer": self.layer, "head": self.head, "level": self.level}
        self.close_up = widgets.Checkbox(value=True, description="close-up", indent=False)

        self._callbacks.on_change(self._choose_image, self.image, self.score)
        self._callbacks.on_change(self.update, self.object, *self._choices.values(), self.close_up)

    def _make_list(self, name: str, count: int, *, layout: widgets.Layout) -> widgets.Dropdown:
        options = [("all", ALL)] + [(str(number + 1), number) for number in range(count)]
        return widgets.Dropdown(options=options, value=ALL, description=name, layout=layout)

    def _lay_out(self) -> widgets.Widget:
        chosen = [self.image, self.score, self.object, *self._choices.values(), self.close_up, self._status]
        controls = widgets.VBox(chosen, layout=widgets.Layout(flex="1 1 auto", min_width="0"))
        top = widgets.HBox([self.clickable.widget, controls])
        panels = widgets.VBox([self.panels], layout=widgets.Layout(align_items="flex-start"))  # stretched otherwise
        return widgets.VBox([widgets.HTML(STYLE_SHEET), top, panels])

    def _choose_image(self) -> None:
        """Another image or score: other objects, the best one chosen."""
        found = self.detections
        names = zip(found.names, found.scores.tolist(), strict=True)
        self._quiet = True
        self.object.options = [(f"{row + 1}: {name} {score:.2f}", row) for row, (name, score) in enumerate(names)]
        self.object.value = 0 if len(found.labels) else None
        self._quiet = False
        self.update()

    def _click(self, row: int) -> None:
        self.object.value = row

    def _looked(self) -> tuple[Detections, list[LayerAttention]]:
        return self._look(self.image.value)

    def _draw_clickable(self, index: int, score: float) -> np.ndarray:
        found = self._look(index)[0].above(score)
        return draw_image(self._pixels(index), found, class_colours(found.labels.tolist()), width=WIDTH)

    def _describe(self) -> str:
        """What is summed up, in words: "layer 3, all heads, level 1"."""
        parts = []
        for name, control in self._choices.items():
            parts.append(f"all {name}s" if control.value == ALL else f"{name} {control.value + 1}")
        return ", ".join(parts)

    def _pixels(self, index: int) -> np.ndarray:
        return self._dataset[index][0].permute(1, 2, 0).numpy()
