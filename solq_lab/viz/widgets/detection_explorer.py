"""The detection explorer: what one model finds in an image, or two with a wipe between them. Paper: figures 3 and 5.

`DetectionExplorer.widget` is for JupyterLab; `figure` is the same view as a plain figure.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import lru_cache

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from solq_lab.data.coco import CocoDataset
from solq_lab.inference.predictor import Predictor
from solq_lab.structures import Detections
from solq_lab.viz.images import draw_objects
from solq_lab.viz.style import STYLE, class_colours, new_figure
from solq_lab.viz.widgets.callbacks import Callbacks
from solq_lab.viz.widgets.clickable_image import STYLE_SHEET, ClickableImage, draw_image

WIDTH = 460  # of the image, pixels of the screen
MIN_SCORE = 0.05  # below it are hundreds of guesses; the slider starts here
SEAM = 2  # width of the line of the wipe, pixels
NAMED = widgets.Layout(width="auto")
WIPE_NAMES = '<div style="display:flex;justify-content:space-between;line-height:1.2"><b>{}</b><b>{}</b></div>'


class DetectionExplorer:
    """An image with its detections, a score slider, a switch per object, and with two models a wipe.

    Attributes:
        image, score, truth, wipe: the controls; setting the value of one redraws the image. Left of the wipe, a
            share of the width, the first model is shown, right of it the second.
        switches: model -> one switch per object of at least the score, best first; clicking an object turns it off.
        clickable: the image.
        widget: all of it, for JupyterLab to show.
    """

    def __init__(self, predictors: Mapping[str, Predictor], dataset: CocoDataset, *, score: float = 0.3) -> None:
        """Show the first image.

        Args:
            predictors: one model or two, by name.
            dataset: images with true masks (`build_images`).
            score: the slider's first value.

        Raises:
            ValueError: another number of models, or no images.
        """
        if len(predictors) not in (1, 2):
            raise ValueError(f"{len(predictors)} models: allowed are one, or two with a wipe between them")
        if len(dataset) == 0:
            raise ValueError("the data set has no images to explore")

        self._predictors, self._dataset = dict(predictors), dataset
        self._status = widgets.HTML()
        self._callbacks = Callbacks(self._report)
        self._find = lru_cache(64)(self._predict)
        self._draw = lru_cache(64)(self._draw_objects)

        self.image = widgets.BoundedIntText(value=0, min=0, max=len(dataset) - 1, description="image")
        self.score = widgets.FloatSlider(
            value=score, min=MIN_SCORE, max=0.95, step=0.05, description="score", readout_format=".2f"
        )
        self.truth = widgets.Checkbox(value=False, description="ground truth", indent=False, layout=NAMED)
        wide = widgets.Layout(width=f"{WIDTH}px", margin="0")
        self.wipe = widgets.FloatSlider(value=0.5, min=0, max=1, step=0.01, readout=False, layout=wide)
        self.wipe.tooltip = "the line between the two models"

        self.switches: dict[str, list[widgets.ToggleButton]] = {name: [] for name in predictors}
        self.clickable = ClickableImage(WIDTH, self._turn_off)
        self._columns = {name: widgets.VBox(layout=widgets.Layout(min_width="170px")) for name in predictors}
        self.widget = self._lay_out()

        self._callbacks.on_change(self._choose, self.image, self.score)
        self._callbacks.on_change(self.update, self.truth, self.wipe)
        self._choose()

    @property
    def names(self) -> list[str]:
        """The models' names, first and second."""
        return list(self._predictors)

    def shown(self, name: str) -> Detections:
        """A model's objects in the image that are switched on."""
        found = self._found(name)
        return found[[row for row, switch in enumerate(self.switches[name]) if switch.value]]

    def composed(self) -> np.ndarray:
        """(h, w, 3) uint8: the image as it is shown."""
        if self.truth.value:
            return self._draw("", self.image.value, ())
        sides = [self._drawn(name) for name in self.names]
        if len(sides) == 1:
            return sides[0]
        pixels, seam = sides[0].copy(), round(self.wipe.value * sides[0].shape[1])
        pixels[:, seam:] = sides[1][:, seam:]
        pixels[:, max(seam - SEAM, 0) : seam + SEAM] = 255
        pixels[:, max(seam - 1, 0) : seam + 1] = 0
        return pixels

    def update(self) -> None:
        """Show the image for the controls' present values."""
        _, height, width = self._dataset[self.image.value][0].shape
        boxes = None if self.truth.value else self.shown(self._clickable())
        self.clickable.show(self.composed(), boxes, size=(height, width))

    @mpl.rc_context(STYLE)
    def figure(self) -> Figure:
        """Ground truth and each model's shown objects, side by side."""
        index, pixels = self.image.value, self._pixels(self.image.value)
        panels = {"ground truth": self._dataset.objects(index)}
        panels |= {f"{name}: {len(self.shown(name))} shown": self.shown(name) for name in self.names}
        title = f"image {index} (id {self._dataset.image_ids[index]}), scores of at least {self.score.value:.2f}"
        size = 3.6 * len(panels), 0.7 + 3.6 * pixels.shape[0] / pixels.shape[1]
        figure, axes = new_figure(1, len(panels), size=size, title=title)
        for place, (heading, objects) in zip(axes[0], panels.items(), strict=True):
            draw_objects(place, pixels, objects, self._colours(index), font_size=8)
            place.set_title(heading)
        return figure

    def _report(self, sentence: str) -> None:
        self._status.value = html.escape(sentence)

    def _lay_out(self) -> widgets.Widget:
        controls = widgets.HBox([self.image, self.score, self.truth, self._status])
        # No description: the slider is as wide as the image, so that its handle stays under the line.
        under = [self.wipe, widgets.HTML(WIPE_NAMES.format(*self.names))] if len(self._predictors) == 2 else []
        image = widgets.VBox([self.clickable.widget, *under])
        return widgets.VBox([widgets.HTML(STYLE_SHEET), controls, widgets.HBox([image, *self._columns.values()])])

    def _choose(self) -> None:
        """Another image or score: new switches, all on."""
        for name, column in self._columns.items():
            found = self._found(name)
            captions = zip(found.names, found.scores.tolist(), strict=True)
            self.switches[name] = [self._make_switch(f"{label} {score:.2f}") for label, score in captions]
            count = f"{len(found)} found" if len(found) else "nothing found"
            column.children = [widgets.HTML(f"<b>{name}</b>: {count}"), *self.switches[name]]
        self._report("")
        self.update()

    def _make_switch(self, caption: str) -> widgets.ToggleButton:
        switch = widgets.ToggleButton(value=True, description=caption, layout=widgets.Layout(width="150px"))
        self._callbacks.on_change(self.update, switch)
        return switch

    def _turn_off(self, row: int) -> None:
        """Switch off the object that was clicked, the row-th of those shown."""
        on = [switch for switch in self.switches[self._clickable()] if switch.value]
        on[row].value = False

    def _clickable(self) -> str:
        """The model whose objects can be clicked: the one with the larger part of the image."""
        return self.names[0 if len(self.names) == 1 or self.wipe.value >= 0.5 else 1]

    def _found(self, name: str) -> Detections:
        return self._find(name, self.image.value).above(self.score.value)

    def _predict(self, name: str, index: int) -> Detections:
        return self._predictors[name].predict(self._pixels(index))

    def _drawn(self, name: str) -> np.ndarray:
        found = self._found(name)
        on = tuple(row for row, switch in enumerate(self.switches[name]) if switch.value)
        return self._draw(name, self.image.value, on if len(found) else ())

    def _draw_objects(self, name: str, index: int, rows: Sequence[int]) -> np.ndarray:
        """The image with some of a model's objects, best first; with the true ones where there is no name."""
        objects = self._find(name, index)[list(rows)] if name else self._dataset.objects(index)
        return draw_image(self._pixels(index), objects, self._colours(index), width=WIDTH)

    def _colours(self, index: int) -> dict[int, str]:
        """One colour per class, the same for every model."""
        found = [self._find(name, index).above(MIN_SCORE) for name in self.names]
        everything = [self._dataset.objects(index), *found]
        return class_colours(label for objects in everything for label in objects.labels.tolist())

    def _pixels(self, index: int) -> np.ndarray:
        return self._dataset[index][0].permute(1, 2, 0).numpy()
