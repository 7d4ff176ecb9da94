"""The codec explorer: look at any object of a data set on its way through a codec. Paper: section 3.2, table 3.

`CodecExplorer.widget` is for JupyterLab; `figure`, `partial_sums` and `gallery` are the same views as plain figures.
"""

import html
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from solq_lab.codecs.kinds import CODECS
from solq_lab.data.annotations import DataError
from solq_lab.viz.style import CODEC_NAMES, save
from solq_lab.viz.widgets.clickable_image import Tiles
from solq_lab.viz.widgets.codec_cache import METHODS
from solq_lab.viz.widgets.codec_figures import (
    FRAME_MILLISECONDS,
    GALLERY,
    animate,
    compared_tile,
    gallery_figure,
    gallery_title,
    side_by_side,
    thumbnail,
)
from solq_lab.viz.widgets.codec_lab import OWN, VECTOR_DIMS, CodecLab, ScoredObject, object_title
from solq_lab.viz.widgets.codec_numbers import numbers, numbers_html
from solq_lab.viz.widgets.codec_panels import TABLE, Setting, View
from solq_lab.viz.widgets.codec_texts import DRAWING, TOOLTIPS
from solq_lab.viz.widgets.explorer import Explorer
from solq_lab.viz.widgets.live_panel import LivePanel, table_figure
from solq_lab.viz.widgets.mask_canvas import MaskCanvas
from solq_lab.viz.widgets.objects import ObjectFolder, OwnMask, Split
from solq_lab.viz.widgets.reconstruction import RULES

MASK_SIZES = (28, 64, 128)
COMPARED = 4  # settings beside each other
THUMBNAIL = 112  # pixels
FRAMES = 48  # of the animation, about
STEPS = {"none": 0.0} | {f"{step:g}": step for step in (0.1, 0.25, 0.5, 1.0, 2.0)}
MIN_SIDES = {"all": 0, "16 pixels and more": 16, "32 pixels and more": 32, "96 pixels and more": 96}


class CodecExplorer(Explorer):
    """Controls, live panels, up to four settings side by side, a canvas for an own mask, and a gallery of the worst.

    Attributes:
        data_set, object, method, mask_size, vector_dim, terms, rule, error, step: the controls.
        compared, compared_tiles: settings that were pinned, and what they make of the present object; clicking one
            sets the controls to it.
        canvas: draw a mask there, and it becomes the object. An uploaded image does too: what is light is the mask.
        gallery_tiles: the worst objects; clicking one shows it.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        cache: Path | str,
        *,
        method: str = "dct",
        mask_size: int = 128,
        vector_dim: int = 256,
        boundary_ratio: float = 0.02,
        figures: Path | str | None = None,
    ) -> None:
        """Read the first data set and draw its first object.

        Args:
            splits: data sets by name, at least one.
            cache: folder for fitted codecs.
            method: a name in `CODECS`.
            mask_size: N, pixels.
            vector_dim: n_k.
            boundary_ratio: boundary width over the image's diagonal.
            figures: folder that the buttons save into; None: `figures` beside `cache`.

        Raises:
            DataError: there is no data set, or the first cannot be read or has no object.
            ValueError: an unknown method, or sizes that do not fit.
        """
        if not splits:
            raise DataError("no data set to explore; `find_splits` finds those of a folder")
        if method not in METHODS:
            raise ValueError(f"method {method!r}: allowed are {', '.join(METHODS)}")
        if not 1 <= vector_dim <= mask_size**2:
            raise ValueError(
                f"vector_dim {vector_dim} does not fit mask_size {mask_size}: allowed are 1..{mask_size**2}"
            )

        super().__init__()
        self.lab = CodecLab(splits, Path(cache), boundary_ratio=boundary_ratio, report=self.report)
        self._figures = Path(figures) if figures else Path(cache).parent / "figures"
        self.canvas = MaskCanvas()
        self.compared: list[Setting] = []
        self.compared_tiles = Tiles(COMPARED, self.guarded(lambda place: self._take(self.compared[place])))
        self._make_controls([*splits, OWN], method, mask_size, vector_dim)
        self._live_panels = {panel: LivePanel(panel) for panel in TABLE}
        self._numbers, self._source = widgets.HTML(), widgets.HTML()

        self._worst: list[ScoredObject] = []
        self._searched: Setting | None = None  # what the gallery was made with
        self.gallery_tiles = Tiles(GALLERY, self.guarded(self._open_thumbnail))
        self._gallery_note = widgets.HTML()

        self.widget = self._lay_out()
        self.lab.folder(self.data_set.value)  # the first has to be usable
        self._choose_data_set()

    @property
    def setting(self) -> Setting | None:
        """What the controls say; None where the image has no object."""
        if self.object.value is None:
            return None
        what = self.data_set, self.object, self.method, self.mask_size, self.vector_dim
        how = self.terms, self.rule, self.error, self.step
        return Setting(*(control.value for control in (*what, *how)))

    def view(self) -> View:
        """What is shown.

        Raises:
            ValueError: there is nothing to show; the message says why.
        """
        self.lab.folder(self.data_set.value)  # it may have been refused
        setting = self.setting
        if setting is None:
            raise ValueError(f"{self.chooser.name} has no object; choose another image.")
        return self.lab.view(setting)

    def update(self) -> None:
        """Draw the panels that the controls' present values change."""
        try:
            view = self.view()
        except ValueError as reason:
            self._show_nothing(str(reason))
            return
        for live in self._live_panels.values():
            live.show(view)
            live.image.layout.visibility = "visible"
        self.compared_tiles.show(compared_tile(self.lab, one) for one in self._compared_settings(view.setting))
        empty = not view.reconstruction.target.any()
        self.report("This object is too small to fill half a cell: its mask is empty." if empty else "")
        self._numbers.value = numbers_html(view)

    def find_worst(self) -> None:
        """Fill the gallery with the objects that come back worst, and let the chooser sort by IoU of this codec."""
        setting = self.setting
        if setting is None:
            self._gallery_note.value = "This image has no object; choose one to say which codec is meant."
            return

        self._gallery_note.value = "Looking ..."
        try:
            found = self.lab.worst(setting, least_side=self.least_side.value)
            self._worst = found[:GALLERY]
        except ValueError as reason:
            self._worst, self._gallery_note.value = [], html.escape(str(reason))
        else:
            self._searched = setting
            ious = pd.Series({one.row: one.iou for one in found}, name="IoU", dtype=float)
            self.chooser.add_column(ious)
            self._gallery_note.value = html.escape(gallery_title(setting, len(self._worst)))

        self.gallery_tiles.show(thumbnail(self.lab, setting, one, THUMBNAIL) for one in self._worst)

    def show_object(self, row: int) -> None:
        """Go to an object of the present data set, in its image."""
        image = self.lab.folder(self.data_set.value)[row].image
        with self.together():
            self.image.value = image
            self.object.value = row

    def compare_methods(self) -> None:
        """Fit the codecs that the lines of all methods need at the present N."""
        if self.setting is not None:
            self.lab.compare_methods(self.setting)
            self.update()

    def figure(self) -> Figure:
        """The panels as one plain figure. Raises as `view` does."""
        view = self.view()
        return table_figure(TABLE, view, "   ".join(f"{name} {value}" for name, value, _, _ in numbers(view)))

    def partial_sums(self, terms: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)) -> Figure:
        """The reconstruction from more and more of the vector's entries. Raises as `view` does."""
        view = self.view()
        counts = [count for count in terms if count < view.setting.vector_dim] + [view.setting.vector_dim]
        title = f"{view.item.name}: partial sums of its {CODEC_NAMES[view.setting.method]} vector; below, the errors"
        sums = {f"{count}": view.setting._replace(terms=count) for count in counts}
        return side_by_side(self.lab, sums, width=1.18, title=title)

    def gallery(self) -> Figure:
        """The worst reconstructions as a plain figure. Raises as `view` does."""
        setting = self.view().setting
        return gallery_figure(self.lab, setting, self.lab.worst(setting, least_side=self.least_side.value)[:GALLERY])

    def _save(self, ending: str) -> None:
        """Write the view as PNG or SVG, or the partial sums as GIF, into the folder of figures."""
        setting = self.view().setting
        name = f"{setting.data_set}_{setting.row}_{setting.method}_{setting.mask_size}_{setting.vector_dim}"
        path = self._figures / f"{name.replace(' ', '_')}.{ending}"
        if ending == "gif":
            counts = range(self.play.min, self.play.max + 1, self.play.step)
            animate(self.lab, setting, counts, path)
        else:
            save(self.figure(), path)
        self.report(f"saved as {path}")

    def add_image(self, name: str, pixels: np.ndarray) -> None:
        """Take an uploaded image (H, W, 3) uint8 for a mask: what is lighter than the middle of its range."""
        light = pixels.mean(axis=2)
        self.show_mask(light > (light.min() + light.max()) / 2)

    def show_mask(self, mask: np.ndarray) -> None:
        """Make a mask (H, W) bool the object.

        Raises:
            DataError: it is empty.
        """
        self.lab.own.set(mask)
        with self.together():
            self.data_set.value = OWN
            self._choose_data_set()

    def _make_controls(self, names: list[str], method: str, mask_size: int, vector_dim: int) -> None:
        style = {"description_width": "78px"}
        look = {"layout": {"width": "98%"}, "style": style}
        self.data_set = widgets.Dropdown(options=names, description="data set", **look)
        self.object = widgets.Dropdown(options=[], description="object", **look)
        self.method = widgets.Dropdown(options=METHODS, value=method, description="method", **look)
        sizes = sorted({*MASK_SIZES, mask_size})
        self.mask_size = widgets.Dropdown(options=sizes, value=mask_size, description="N", **look)
        dims = sorted({*VECTOR_DIMS, vector_dim})
        self.vector_dim = widgets.SelectionSlider(options=dims, value=vector_dim, description="n_k", **look)
        self.rule = widgets.Dropdown(options=list(RULES.items()), description="threshold", **look)
        self.error = widgets.FloatSlider(min=0, max=1, step=0.02, description="noise", **look)
        self.step = widgets.SelectionSlider(options=STEPS, description="rounding", **look)
        self.terms = widgets.IntSlider(min=1, max=vector_dim, value=vector_dim, description="terms", **look)
        self.play = widgets.Play(interval=FRAME_MILLISECONDS, show_repeat=False)
        self._set_frames(vector_dim)
        self.compare = widgets.Button(description="fit all methods", icon="line-chart")
        self.pin = widgets.Button(description="compare", icon="columns", layout={"width": "110px"})
        self.unpin = widgets.Button(description="clear", layout={"width": "70px"})
        self.savers = {
            ending: widgets.Button(description=ending.upper(), icon="download", layout={"width": "80px"})
            for ending in ("png", "svg", "gif")
        }
        self.search = widgets.Button(description="find the worst", icon="search")
        self.least_side = widgets.Dropdown(options=MIN_SIDES, description="box side", style=style)
        for name, tooltip in TOOLTIPS.items():
            getattr(self, name).tooltip = tooltip

        self.on_change(self._choose_data_set, self.data_set)
        self.on_change(self._choose_image, self.image)
        self.chooser.refresh = self._choose_image
        self.on_change(self._choose_length, self.vector_dim)
        drawn = (self.object, self.method, self.mask_size, self.terms, self.rule, self.error, self.step)
        self.on_change(self.redraw, *drawn)
        self.on_change(self._show_source, self.method)
        self.on_change(lambda: setattr(self.terms, "value", self.play.value), self.play)
        self.on_click(self.compare_methods, self.compare)
        self.on_click(self.find_worst, self.search)
        self.on_click(self._pin, self.pin)
        self.on_click(self._unpin, self.unpin)
        for ending, button in self.savers.items():
            self.on_click(partial(self._save, ending), button)
        self.on_change(lambda: self.show_mask(self.canvas.mask), self.canvas, trait="bits")

    def _lay_out(self) -> widgets.Widget:
        third = widgets.Layout(width="33.3%", min_width="0")
        columns = (
            (self.data_set, self.object, self.rule),
            (self.method, self.mask_size, self.vector_dim),
            (self.error, self.step, self.terms),
        )
        controls = widgets.HBox([widgets.VBox(column, layout=third) for column in columns])

        panels = []
        for panel, live in self._live_panels.items():
            row, column = TABLE[panel]
            live.image.layout.grid_area = f"{row + 1} / {column + 1} / auto / span {panel.columns}"
            panels.append(live.image)
        grid = widgets.GridBox(panels, layout=widgets.Layout(grid_template_columns="repeat(5, 1fr)", width="100%"))

        line = widgets.HBox([self.play, self.compare, self.pin, self.unpin, *self.savers.values(), self.status])
        drawing = widgets.HBox([self.canvas, widgets.HTML(DRAWING)])
        self._more = widgets.Accordion([drawing, self._source], titles=("draw your own mask", ""))
        self._show_source()
        search = widgets.HBox([self.search, self.least_side, self._gallery_note])
        top = [self.chooser.widget, controls, self._numbers, grid, line, self.compared_tiles.widget]
        parts = [*top, self._more, search, self.gallery_tiles.widget]
        return widgets.VBox(parts, layout=widgets.Layout(max_width="1240px"))

    def _open_thumbnail(self, place: int) -> None:
        """Show an object of the gallery as it was found: its data set, codec and threshold are restored."""
        searched = self._searched
        assert searched is not None  # the buttons are hidden before the first search
        with self.together():
            self.data_set.value = searched.data_set
            self._take(searched)
            self.show_object(self._worst[place].row)

    def _take(self, setting: Setting) -> None:
        """Set the codec and the threshold of a setting."""
        with self.together():
            self.method.value, self.mask_size.value = setting.method, setting.mask_size
            self.vector_dim.value, self.rule.value = setting.vector_dim, setting.rule

    def _show_source(self) -> None:
        codec = CODECS[self.method.value].load()
        code = html.escape(inspect.getsource(codec))
        self._source.value = f'<pre style="line-height:1.3;max-height:320px;overflow:auto">{code}</pre>'
        self._more.titles = (self._more.titles[0], f"source: {codec.__module__.replace('.', '/')}.py")

    def _pin(self) -> None:
        setting = self.view().setting
        if len(self.compared) == COMPARED:
            raise ValueError(f"{COMPARED} settings are beside each other already; clear them first")
        self.compared.append(setting)
        self.update()

    def _unpin(self) -> None:
        self.compared.clear()
        self.update()

    def _compared_settings(self, present: Setting) -> list[Setting]:
        """The pinned settings for the present object, without noise and with all terms."""
        return [
            one._replace(data_set=present.data_set, row=present.row, terms=one.vector_dim, error=0.0, step=0.0)
            for one in self.compared
        ]

    def _choose_data_set(self) -> None:
        folder = self._folder()
        with self.together():
            if folder is not None:
                self.chooser.load(folder.table(), folder.file_names)
            self.image.value = 0
            self._list_objects()

    def _choose_image(self) -> None:
        with self.together():
            self._list_objects()

    def _choose_length(self) -> None:
        with self.together():
            length = self.vector_dim.value
            self.terms.max = length
            self._set_frames(length)
            self.terms.value = length

    def _set_frames(self, length: int) -> None:
        """The animation's steps; the last one is the whole vector, and play begins anew only from there."""
        step = max(1, length // FRAMES)
        self.play.min = 1  # below any maximum
        self.play.max, self.play.step, self.play.min = length, step, (length - 1) % step + 1

    def _list_objects(self) -> None:
        folder = self._folder()
        objects = [] if folder is None else [folder[row] for row in folder.rows_of(self.image.value)]
        self.object.options = [(object_title(item, place), item.row) for place, item in enumerate(objects, start=1)]
        rows = [item.row for item in objects]
        self.object.value = self.chooser.row if self.chooser.row in rows else next(iter(rows), None)

    def _folder(self) -> ObjectFolder | OwnMask | None:
        """The present data set; None where it cannot be used, and `update` says why."""
        try:
            return self.lab.folder(self.data_set.value)
        except DataError:
            return None

    def _show_nothing(self, reason: str) -> None:
        self.report(reason)
        self._numbers.value = ""
        for live in self._live_panels.values():
            live.image.layout.visibility = "hidden"
