"""The detection explorer: ground truth, and what one model or two find in an image. Paper: figures 3 and 5.

`DetectionExplorer.widget` is for JupyterLab; `figure` is the same view as a plain figure.
"""

import html
from functools import lru_cache, partial

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from solq_lab.structures import Detections
from solq_lab.studies.pairing import UNMATCHED, pair_objects
from solq_lab.viz.images import draw_objects
from solq_lab.viz.style import STYLE, colours_of, new_figure
from solq_lab.viz.widgets.clickable_image import ClickableImage, colour_class, draw_image
from solq_lab.viz.widgets.explorer import MIN_SCORE, ModelExplorer
from solq_lab.viz.widgets.wipe import Wipe

WIDTH = 440  # of a drawn image, pixels; the browser fits it into its column
WIPE = (1100, 620)  # width and height of a wipe at most, pixels
TRUTH = "ground truth"


class DetectionExplorer(ModelExplorer):
    """Ground truth and the detections of the models side by side, as wide as the window, or in one wipe.

    Attributes:
        score, colouring, filled, labelled, arrangement, columns: the controls: least score, colour per class or per
            object, masks or outlines only, labels, images side by side or as a wipe, and which of them are shown.
        switches: model -> one switch per object of at least the score, best first, in the object's colour; clicking an
            object turns it off.
        panels: "ground truth" and each model -> its image.
        wipe: the same in one place.
    """

    def build(self) -> None:
        """Make the controls, and a panel for the ground truth and each model."""
        self._find = lru_cache(64)(lambda name, index: self._predictors[name].predict(self.pixels(index)))
        self._draw = lru_cache(128)(self._draw_objects)
        everything = [TRUTH, *self.names]
        self.colouring = widgets.ToggleButtons(options=["class", "object"], style={"button_width": "64px"})
        self.colouring.tooltip = "a colour per class, or per object: the same as the true object's that it meets"
        look = {"value": True, "indent": False, "layout": {"width": "auto"}}
        self.filled, self.labelled = (widgets.Checkbox(description=name, **look) for name in ("fill", "labels"))
        self.arrangement = widgets.ToggleButtons(options=["side by side", "wipe"], style={"button_width": "auto"})
        self.arrangement.tooltip = "images beside each other, or in one place with dividers to drag"
        self.columns = {name: widgets.Checkbox(description=name, **look) for name in everything}

        self.switches: dict[str, list[widgets.ToggleButton]] = {name: [] for name in self.names}
        self._made: dict[str, list[widgets.ToggleButton]] = {name: [] for name in self.names}  # for later images too
        self.panels = {name: ClickableImage(self.guarded(partial(self._turn_off, name))) for name in everything}
        self._titles = {name: widgets.HTML(layout={"flex": "0 0 auto"}) for name in everything}
        self._chips = {name: widgets.Box(layout={"flex_flow": "row wrap"}) for name in everything}
        self._places = {}
        for name in everything:
            parts = [self._titles[name], self.panels[name], self._chips[name]]
            self._places[name] = widgets.VBox(parts, layout={"min_width": "0"})
            self._places[name].add_class("solq-panel")
        self.wipe = Wipe(self.guarded(self._turn_off))
        chips = [widgets.HBox([self._titles[name], self._chips[name]]) for name in self.names]
        self._wiped = widgets.VBox([self.wipe, *chips], layout={"min_width": "0"})
        self._row = widgets.GridBox(layout={"width": "100%", "grid_gap": "8px"})
        looks = [self.score, self.colouring, self.filled, self.labelled, self.arrangement]
        columns = widgets.HBox(list(self.columns.values()))  # where there is no place, they wrap together
        controls = widgets.HBox([*looks, columns, self.status], layout={"flex_flow": "row wrap", "grid_gap": "0 6px"})
        self.widget = widgets.VBox([self.chooser.widget, controls, self._row])

        self.on_change(self._choose, self.image, self.score)
        self.on_change(self._recolour, self.colouring)
        self.on_change(self.redraw, self.filled, self.labelled, self.arrangement, *self.columns.values())
        self.chooser.refresh = self._mark_match
        self._choose()

    def shown(self, name: str) -> Detections:
        """A model's objects in the image that are switched on; all true objects for "ground truth"."""
        if name == TRUTH:
            return self.true_objects(self.image.value)
        return self._found(name)[self._switched_on(name)]

    def update(self) -> None:
        """Show the image for the controls' present values."""
        index, names = self.image.value, [name for name, column in self.columns.items() if column.value]
        size, wiped = self.pixels(index).shape[:2], self.arrangement.value == "wipe"
        self._row.children = [self._wiped] if wiped else [self._places[name] for name in names]
        self._row.layout.grid_template_columns = f"repeat({len(self._row.children) or 1}, minmax(0, 1fr))"

        drawings = {}  # of the wipe; empty while the images stand side by side
        for name in names:
            rows = None if name == TRUTH else tuple(self._switched_on(name))
            looks = self.colouring.value, self.filled.value, self.labelled.value and not wiped
            objects, chosen = self.shown(name), self.chosen if name == TRUTH else -1
            drawn = self._draw(name, index, rows, looks, wiped, -1 if wiped else chosen)
            if wiped:
                drawings[name] = drawn, objects, self._shown_colours(name), chosen
                continue
            tooltips = [f"{row + 1}: {label}" for row, label in enumerate(objects.names)]
            self.panels[name].show(drawn, objects.boxes.tolist(), tooltips, size=size, chosen=chosen)
        self.wipe.show(drawings, size=size, labelled=self.labelled.value)

    @mpl.rc_context(STYLE)
    def figure(self) -> Figure:
        """Ground truth and each model's shown objects, side by side."""
        pixels = self.pixels(self.image.value)
        title = f"{self.chooser.name}, scores of at least {self.score.value:.2f}"
        size = 3.6 * len(self.panels), 0.7 + 3.6 * pixels.shape[0] / pixels.shape[1]
        figure, axes = new_figure(1, len(self.panels), size=size, title=title)
        for place, name in zip(axes[0], self.panels, strict=True):
            objects, colours = self.shown(name), self._shown_colours(name)
            font_size = 8 if self.labelled.value else 0
            draw_objects(place, pixels, objects, colours, font_size=font_size, filled=self.filled.value)
            place.set_title(name if name == TRUTH else f"{name}: {len(objects.labels)} shown")
        return figure

    def _choose(self) -> None:
        """Another image or score: new switches, all on."""
        self.chosen = -1
        with self.together():
            for name, made in self._made.items():
                found = self._found(name)
                count = len(found.labels)
                self._titles[name].value = f"<b>{html.escape(name)}</b>: {count or 'nothing'} found"
                made += [self._make_switch() for _ in range(count - len(made))]
                self.switches[name] = made[:count]
                for switch, label, score in zip(made, found.names, found.scores.tolist(), strict=False):
                    switch.description, switch.value = f"{label} {score:.2f}", True
                self._chips[name].children = self.switches[name]

            count, is_own = len(self.true_objects(self.image.value).labels), self.image.value >= len(self._dataset)
            known = "none of an own image" if is_own else f"{count} object{'s' * (count != 1)}"
            self._titles[TRUTH].value = f"<b>{TRUTH}</b>: {known}"
            self.report("")
            self._recolour()

    def _recolour(self) -> None:
        """The chips in the colours of their objects."""
        for name, switches in self.switches.items():
            colours = self._colours(name, self.image.value, self.colouring.value)
            for row, switch in enumerate(switches):
                switch._dom_classes = (f"solq-chip-{row}", colour_class(colours[row]))
        self._mark_match()

    def _mark_match(self) -> None:
        """Mark the true object that meets the chooser's conditions."""
        if self.chooser.row is not None and self.chooser.is_constrained:
            self.chosen = self.chooser.row - self._dataset.truth.rows_of(self.image.value).start
        self.redraw()

    def _make_switch(self) -> widgets.ToggleButton:
        switch = widgets.ToggleButton(value=True, layout=widgets.Layout(width="auto", height="24px", margin="2px"))
        self.on_change(self.redraw, switch)
        return switch

    def _turn_off(self, name: str, row: int, *_: float) -> None:
        """Switch off the object that was clicked, the row-th of those shown; a true one is marked."""
        if row < 0:
            return
        if name == TRUTH:
            self.chosen = row
            self.redraw()
        else:
            self.switches[name][self._switched_on(name)[row]].value = False

    def _switched_on(self, name: str) -> list[int]:
        return [row for row, switch in enumerate(self.switches[name]) if switch.value]

    def _found(self, name: str) -> Detections:
        return self._find(name, self.image.value).above(self.score.value)

    def _draw_objects(
        self,
        name: str,
        index: int,
        rows: tuple[int, ...] | None,
        looks: tuple[str, bool, bool],
        wiped: bool,
        chosen: int,
    ) -> bytes:
        """The image with some of a model's objects, best first; with all true ones where there are no rows."""
        colouring, filled, labelled = looks
        colours = self._colours(name, index, colouring)
        objects, pixels = self.true_objects(index), self.pixels(index)
        if rows is not None:
            objects, colours = self._find(name, index)[list(rows)], [colours[row] for row in rows]
        width = min(WIPE[0], WIPE[1] * pixels.shape[1] // pixels.shape[0]) if wiped else WIDTH
        framed = objects.boxes[chosen].tolist() if chosen >= 0 else ()
        return draw_image(pixels, objects, colours, width=width, filled=filled, labelled=labelled).png(framed)

    def _shown_colours(self, name: str) -> list[str]:
        """The colours of the objects that are shown."""
        colours = self._colours(name, self.image.value, self.colouring.value)
        return colours if name == TRUTH else [colours[row] for row in self._switched_on(name)]

    def _colours(self, name: str, index: int, colouring: str) -> list[str]:
        """A colour for each object: of its class, or its own; a detection shares it with the true object it meets."""
        truth = self.true_objects(index)
        objects = truth if name == TRUTH else self._find(name, index)
        if colouring == "class":
            return colours_of(objects.labels.tolist())
        if name == TRUTH:
            return colours_of(range(len(truth.labels)))
        confident = objects.above(MIN_SCORE)
        partners, _ = pair_objects(confident, truth)
        numbers = np.arange(len(objects.labels)) + len(truth.labels)
        met = np.flatnonzero(partners != UNMATCHED)
        numbers[partners[met]] = met
        return colours_of(numbers.tolist())
