"""What all explorers share: a chooser of images, a line for messages, and controls whose exceptions are shown.

Jupyter would write the exception of a callback to a log that nobody opens.
"""

import gc
import html
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from solq_lab.allocation import collecting_no_garbage
from solq_lab.data.coco import CocoDataset
from solq_lab.data.images import decode_bytes
from solq_lab.inference.predictor import Predictor
from solq_lab.structures import Detections
from solq_lab.viz.widgets.chooser import ImageChooser, list_objects
from solq_lab.viz.widgets.clickable_image import ClickableImage, link_figure

logger = logging.getLogger(__name__)
# JupyterLab gives each widget's messages a thread of the kernel, but widgets and matplotlib are shared.
ONE_AT_A_TIME = threading.RLock()
gc.freeze()  # the modules: every few redraws, collecting garbage would look through torch for half a second

MIN_SCORE = 0.05  # below it are hundreds of guesses; sliders of scores start here


class Explorer(ABC):
    """Controls and views; setting the value of a control redraws what depends on it.

    Attributes:
        chooser, image: which image is shown, and the control that holds its number.
        message: the sentence that is shown where there is nothing to draw or something takes time; else empty.
        status: its widget.
        widget: all of the explorer, for JupyterLab to show.
    """

    widget: widgets.Widget

    def __init__(self) -> None:
        self.message = ""
        self.status = widgets.HTML(layout={"min_height": "24px"})
        self._quiet = False
        self.chooser = ImageChooser()
        self.image = self.chooser.image
        self.on_change(self.chooser.mark, self.image)
        self.on_change(self.chooser.list_matches, *self.chooser.conditions)
        self.on_change(self.chooser.follow_list, self.chooser.matches)
        self.on_click(lambda: self.chooser.step(-1), self.chooser.previous)
        self.on_click(lambda: self.chooser.step(1), self.chooser.next)
        self.on_change(self._add_uploaded, self.chooser.upload)

    @abstractmethod
    def update(self) -> None:
        """Draw what the controls' present values change."""

    @abstractmethod
    def add_image(self, name: str, pixels: np.ndarray) -> None:
        """Add an uploaded image (H, W, 3) uint8, and show it."""

    def report(self, sentence: str) -> None:
        """Show a sentence beside the controls."""
        self.message = sentence
        self.status.value = html.escape(sentence)

    def guarded(self, action: Callable[..., None]) -> Callable[..., None]:
        """`action`, when no other one runs; its exception is shown. Whatever a user can set off goes through here."""

        def run(*arguments: object) -> None:
            with ONE_AT_A_TIME, collecting_no_garbage():
                try:
                    action(*arguments)
                except Exception as error:
                    logger.exception("a control's action failed")
                    self.report(f"{type(error).__name__}: {error}")
                gc.collect(0)  # the drawn figures are still young: later they would cost a third of a second

        return run

    def on_change(self, action: Callable[[], None], *controls: widgets.Widget, trait: str = "value") -> None:
        """Run `action` whenever the value of one of the controls changes."""
        run = self.guarded(action)
        for control in controls:
            control.observe(lambda _: run(), trait)
            if "set_state" not in vars(control):  # the browser's value waits too, or half a view would be older
                control.set_state = self.guarded(control.set_state)

    def on_click(self, action: Callable[[], None], button: widgets.Button) -> None:
        """Run `action` whenever the button is clicked."""
        run = self.guarded(action)
        button.on_click(lambda _: run())

    def redraw(self) -> None:
        """`update`, unless several controls are changing."""
        if not self._quiet:
            self.update()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Change several controls, then draw once."""
        if self._quiet:
            yield
            return
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
        self.update()

    def _add_uploaded(self) -> None:
        for file in self.chooser.upload.value:
            content = torch.frombuffer(bytearray(file["content"]), dtype=torch.uint8)
            pixels = decode_bytes(content, file["name"], "upright")  # (3, H, W)
            self.add_image(file["name"], pixels.permute(1, 2, 0).numpy())


class ModelExplorer(Explorer):
    """An explorer of what one model, or two, find in the images of a data set and in uploaded ones.

    Attributes:
        score: control of the least score.
        names: of the models.
        pixels: an image by its number, (H, W, 3) uint8.
        chosen: row of the true object that was asked for (`open`), -1 for none.
    """

    def __init__(
        self,
        predictors: Mapping[str, Predictor],
        dataset: CocoDataset,
        *,
        score: float = 0.3,
        errors: pd.DataFrame | None = None,
    ) -> None:
        """Read what can be chosen.

        Args:
            predictors: one model or two, by name.
            dataset: images with true masks (`build_images`).
            score: the slider's first value.
            errors: how the first model does on each object (`object_errors`), to filter and sort by.

        Raises:
            ValueError: another number of models, no images, or, of attention, a predictor that replays CUDA graphs.
        """
        super().__init__()
        if len(predictors) not in (1, 2):
            raise ValueError(f"{len(predictors)} models: allowed are one, or two beside each other")
        if len(dataset) == 0:
            raise ValueError("the data set has no images to explore")

        self._predictors, self._dataset, self._own = dict(predictors), dataset, list[np.ndarray]()
        self.pixels = lru_cache(8)(self._read)  # a redraw needs an image several times
        self.names = list(predictors)
        self.chosen = -1
        sides = next(iter(predictors.values())).experiment.evaluation.area_sides
        objects = list_objects(dataset.truth, dataset.classes, sides)
        self.chooser.load(objects if errors is None else objects.join(errors, on="id"), dataset.truth.file_names)
        self.score = widgets.FloatSlider(
            value=score, min=MIN_SCORE, max=0.95, step=0.05, description="score", readout_format=".2f"
        )
        self.score.layout, self.score.style = {"width": "220px"}, {"description_width": "44px"}

        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the controls and views, and show the first image."""

    def _read(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 of an image."""
        if index >= len(self._dataset):
            return self._own[index - len(self._dataset)]
        return self._dataset[index][0].permute(1, 2, 0).numpy()

    def true_objects(self, index: int) -> Detections:
        """The true objects of an image; none of an uploaded one."""
        is_own = index >= len(self._dataset)
        return self._dataset.objects(0).above(np.inf) if is_own else self._dataset.objects(index)

    def link(self, figure: Figure) -> ClickableImage:
        """A figure whose images open here when they are clicked (`link_figure`)."""
        return link_figure(figure, self.guarded(self.open))

    def open(self, image_id: int, object_id: int | None = None) -> None:
        """Show an image of the data set by its id, and mark one of its objects, by its annotation id."""
        index, truth = self._dataset.image_ids.index(image_id), self._dataset.truth
        rows = truth.ids[truth.rows_of(index)].tolist()
        with self.together():
            self.image.value = index
            self.chosen = rows.index(object_id) if object_id in rows else -1

    def add_image(self, name: str, pixels: np.ndarray) -> None:
        """Add an uploaded image (H, W, 3) uint8, and show it."""
        self._own.append(pixels)
        self.chooser.add(name)
