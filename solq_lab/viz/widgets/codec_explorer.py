"""The codec explorer: look at any object of a data set on its way through a codec. Paper: section 3.2, table 3.

`CodecExplorer.widget` is for JupyterLab; `figure`, `partial_sums` and `gallery` are the same views as plain figures.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from solq_lab.data.annotations import DataError
from solq_lab.viz.style import CODEC_NAMES, STYLE, hide_axes, new_figure
from solq_lab.viz.widgets.callbacks import Callbacks
from solq_lab.viz.widgets.codec_cache import METHODS
from solq_lab.viz.widgets.codec_lab import VECTOR_DIMS, CodecLab, ScoredObject, object_title
from solq_lab.viz.widgets.codec_numbers import numbers, numbers_html
from solq_lab.viz.widgets.codec_panels import SIDE, TABLE, Setting, View, error_image, fit_square, grey
from solq_lab.viz.widgets.live_panel import LivePanel, as_png, table_figure
from solq_lab.viz.widgets.objects import ObjectFolder, Split
from solq_lab.viz.widgets.reconstruction import RULES

MASK_SIZES = (28, 64, 128)
GALLERY = 10  # objects
THUMBNAIL = 112  # pixels
FRAMES = 48  # of the animation, about
FRAME_MILLISECONDS = 200
MIN_SIDES = {"all": 0, "16 pixels and more": 16, "32 pixels and more": 32, "96 pixels and more": 96}
TOOLTIPS = {
    "data_set": "whose images and objects are shown; PCA and sparse coding are fitted to its masks",
    "image": "images by rising id, counted from 0",
    "object": "class and box, pixels",
    "method": "the codec: what a vector means",
    "mask_size": "N: the mask is drawn into N x N pixels of its box",
    "vector_dim": "how many numbers a mask becomes",
    "rule": "which value parts the mask from the background",
    "error": "normal noise on the vector, in standard deviations of each entry over the data set",
    "terms": "how many of the vector's entries are decoded; press play to add one after the other",
    "compare": "fit PCA and sparse coding at this N, so that their lines can be drawn",
    "search": "look through the data set with this codec and threshold",
    "least_side": "only objects whose box is at least as large as this square",
}


class CodecExplorer:
    """Controls, live panels, and a gallery of the worst.

    Attributes:
        data_set, image, object, method, mask_size, vector_dim, terms, rule, error: the controls; setting the value of
            one redraws what depends on it.
        widget: all of it, for JupyterLab to show.
        message: the sentence that is shown where there is nothing to draw or something takes time; else empty.
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
    ) -> None:
        """Read the first data set and draw its first object.

        Args:
            splits: data sets by name, at least one.
            cache: folder for fitted codecs.
            method: "dct", "pca", "sparse" or "flatten".
            mask_size: N, pixels.
            vector_dim: n_k.
            boundary_ratio: boundary width over the image's diagonal.

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

        self.lab = CodecLab(splits, Path(cache), boundary_ratio=boundary_ratio, report=self._report)
        self.message = ""
        self._quiet = False
        self._callbacks = Callbacks(self._report)
        self._make_controls(list(splits), method, mask_size, vector_dim)
        self._live_panels = {panel: LivePanel(panel) for panel in TABLE}
        self._numbers, self._status = widgets.HTML(), widgets.HTML()

        self._worst: list[ScoredObject] = []
        self._searched: Setting | None = None  # what the gallery was made with
        self._thumbnails = [widgets.Image(format="png", layout={"width": "100%"}) for _ in range(GALLERY)]
        self._captions = [widgets.Label() for _ in range(GALLERY)]
        self._buttons = [self._gallery_button(place) for place in range(GALLERY)]
        self._gallery_note = widgets.HTML()
        self._gallery_grid = self._lay_out_gallery()

        self.widget = self._lay_out()
        self.lab.folder(self.data_set.value)  # the first has to be usable
        self._choose_data_set()

    @property
    def setting(self) -> Setting | None:
        """What the controls say; None where the image has no object."""
        if self.object.value is None:
            return None
        return Setting(
            self.data_set.value,
            self.object.value,
            self.method.value,
            self.mask_size.value,
            self.vector_dim.value,
            self.terms.value,
            self.rule.value,
            self.error.value,
        )

    def view(self) -> View:
        """What is shown.

        Raises:
            ValueError: there is nothing to show; the message says why.
        """
        self.lab.folder(self.data_set.value)  # it may have been refused
        setting = self.setting
        if setting is None:
            raise ValueError(f"Image {self.image.value} has no object; choose another one.")
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
        empty = not view.reconstruction.target.any()
        self._report("This object is too small to fill half a cell: its mask is empty." if empty else "")
        self._numbers.value = numbers_html(view)

    def find_worst(self) -> None:
        """Fill the gallery with the objects that come back worst from the present codec."""
        setting = self.setting
        if setting is None:
            self._gallery_note.value = "This image has no object; choose one to say which codec is meant."
            return

        self._gallery_note.value = "Looking ..."
        try:
            self._worst = self.lab.worst(setting, GALLERY, least_side=self.least_side.value)
        except ValueError as reason:
            self._worst, self._gallery_note.value = [], html.escape(str(reason))
        else:
            self._searched = setting
            self._gallery_note.value = gallery_title(setting, len(self._worst))

        for place in range(GALLERY):
            shown = place < len(self._worst)
            self._buttons[place].layout.visibility = "visible" if shown else "hidden"
            self._thumbnails[place].layout.visibility = "visible" if shown else "hidden"
            self._captions[place].value = ""
            if shown:
                pixels, caption = self._thumbnail(setting, self._worst[place])
                self._thumbnails[place].value = as_png(pixels)
                self._captions[place].value = self._buttons[place].tooltip = caption

    def show_object(self, row: int) -> None:
        """Go to an object of the present data set, in its image."""
        image = self.lab.folder(self.data_set.value)[row].image
        with self._together():
            self.image.value = image
            self._list_objects()
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

    @mpl.rc_context(STYLE)
    def partial_sums(self, terms: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256)) -> Figure:
        """The reconstruction from more and more of the vector's entries. Raises as `view` does."""
        view = self.view()
        counts = [count for count in terms if count < view.setting.vector_dim] + [view.setting.vector_dim]
        title = f"{view.item.name}: partial sums of its {CODEC_NAMES[view.setting.method]} vector; below, the errors"
        figure, axes = new_figure(2, len(counts), size=(1.18 * len(counts), 3.0), title=title)
        for place, count in enumerate(counts):
            reconstruction = self.lab.reconstruction(view.setting._replace(terms=count))
            axes[0, place].imshow(grey(reconstruction.decoded.numpy()))
            axes[0, place].set_title(f"{count}")
            axes[1, place].imshow(fit_square(error_image(view.pixels, view.item, reconstruction.rle)[0], sharp=True))
            axes[1, place].set_title(f"IoU {reconstruction.iou:.2f}")
        for place in axes.flat:
            hide_axes(place)
        return figure

    @mpl.rc_context(STYLE)
    def gallery(self) -> Figure:
        """The worst reconstructions as a plain figure. Raises as `view` does."""
        setting = self.view().setting
        worst = self.lab.worst(setting, GALLERY, least_side=self.least_side.value)
        rows = 2
        across = GALLERY // rows
        title = gallery_title(setting, len(worst)).replace("n_k", "$n_k$")
        figure, axes = new_figure(rows, across, size=(11.8, 5.4), title=title)
        for place in axes.flat:
            hide_axes(place)
        for place, one in zip(axes.flat, worst, strict=False):
            pixels, caption = self._thumbnail(setting, one, side=SIDE)
            place.imshow(pixels)
            place.set_title(caption)
        return figure

    # -------------------------------------------------------------------------------------------- controls

    def _make_controls(self, names: list[str], method: str, mask_size: int, vector_dim: int) -> None:
        style = {"description_width": "78px"}
        look = {"layout": {"width": "98%"}, "style": style}
        self.data_set = widgets.Dropdown(options=names, description="data set", **look)
        self.image = widgets.IntSlider(min=0, max=0, description="image", **look)
        self.object = widgets.Dropdown(options=[], description="object", **look)
        self.method = widgets.Dropdown(options=METHODS, value=method, description="method", **look)
        sizes = sorted({*MASK_SIZES, mask_size})
        self.mask_size = widgets.Dropdown(options=sizes, value=mask_size, description="N", **look)
        dims = sorted({*VECTOR_DIMS, vector_dim})
        self.vector_dim = widgets.SelectionSlider(options=dims, value=vector_dim, description="n_k", **look)
        self.rule = widgets.Dropdown(options=list(RULES.items()), description="threshold", **look)
        self.error = widgets.FloatSlider(min=0, max=1, step=0.02, description="noise", **look)
        self.terms = widgets.IntSlider(min=1, max=vector_dim, value=vector_dim, description="terms", **look)
        self.play = widgets.Play(interval=FRAME_MILLISECONDS, show_repeat=False)
        self._set_frames(vector_dim)
        self.compare = widgets.Button(description="fit all methods", icon="line-chart")
        self.search = widgets.Button(description="find the worst", icon="search")
        self.least_side = widgets.Dropdown(options=MIN_SIDES, description="box side", style=style)
        for name, tooltip in TOOLTIPS.items():
            getattr(self, name).tooltip = tooltip

        self._callbacks.on_change(self._choose_data_set, self.data_set)
        self._callbacks.on_change(self._choose_image, self.image)
        self._callbacks.on_change(self._choose_length, self.vector_dim)
        drawn = (self.object, self.method, self.mask_size, self.terms, self.rule, self.error)
        self._callbacks.on_change(self._redraw, *drawn)
        self._callbacks.on_change(lambda: setattr(self.terms, "value", self.play.value), self.play)
        self._callbacks.on_click(self.compare_methods, self.compare)
        self._callbacks.on_click(self.find_worst, self.search)

    def _lay_out(self) -> widgets.Widget:
        third = widgets.Layout(width="33.3%", min_width="0")
        columns = (
            (self.data_set, self.image, self.object),
            (self.method, self.mask_size, self.vector_dim),
            (self.rule, self.error, self.terms),
        )
        controls = widgets.HBox([widgets.VBox(column, layout=third) for column in columns])

        panels = []
        for panel, live in self._live_panels.items():
            row, column = TABLE[panel]
            live.image.layout.grid_area = f"{row + 1} / {column + 1} / auto / span {panel.columns}"
            panels.append(live.image)
        grid = widgets.GridBox(panels, layout=widgets.Layout(grid_template_columns="repeat(5, 1fr)", width="100%"))

        self._status.layout.min_height = "24px"
        line = widgets.HBox([self.play, self.compare, self._status])
        search = widgets.HBox([self.search, self.least_side, self._gallery_note])
        parts = [controls, self._numbers, grid, line, search, self._gallery_grid]
        return widgets.VBox(parts, layout=widgets.Layout(max_width="1240px"))

    def _lay_out_gallery(self) -> widgets.Widget:
        tiles = []
        for thumbnail, caption, button in zip(self._thumbnails, self._captions, self._buttons, strict=True):
            for part, place in ((thumbnail, "1 / 1"), (caption, "2 / 1"), (button, "1 / 1 / 3 / 2")):
                part.layout.grid_area = place
            caption.style.font_size = "11px"
            caption.layout.margin = "-6px auto 0"
            thumbnail.layout.visibility = "hidden"
            tiles.append(widgets.GridBox([thumbnail, caption, button], layout=widgets.Layout(overflow="hidden")))
        columns = f"repeat({GALLERY}, minmax(0, 1fr))"
        return widgets.GridBox(tiles, layout=widgets.Layout(grid_template_columns=columns, width="100%"))

    def _gallery_button(self, place: int) -> widgets.Button:
        """A button without a face, over a thumbnail and its caption."""
        button = widgets.Button(layout=widgets.Layout(width="100%", height="100%", margin="0", visibility="hidden"))
        button.style.button_color = "transparent"
        self._callbacks.on_click(lambda: self._open_thumbnail(place), button)
        return button

    def _open_thumbnail(self, place: int) -> None:
        """Show an object of the gallery as it was found: its data set, codec and threshold are restored."""
        searched = self._searched
        assert searched is not None  # the buttons are hidden before the first search
        with self._together():
            self.data_set.value = searched.data_set
            self.method.value, self.mask_size.value = searched.method, searched.mask_size
            self.vector_dim.value, self.rule.value = searched.vector_dim, searched.rule
            self.show_object(self._worst[place].row)

    @contextmanager
    def _together(self) -> Iterator[None]:
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

    def _redraw(self) -> None:
        if not self._quiet:
            self.update()

    def _choose_data_set(self) -> None:
        folder = self._folder()
        with self._together():
            self.image.value = 0
            self.image.max = 0 if folder is None else folder.images - 1
            self._list_objects()

    def _choose_image(self) -> None:
        with self._together():
            self._list_objects()

    def _choose_length(self) -> None:
        with self._together():
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
        self.object.value = objects[0].row if objects else None

    def _folder(self) -> ObjectFolder | None:
        """The present data set; None where it cannot be used, and `update` says why."""
        try:
            return self.lab.folder(self.data_set.value)
        except DataError:
            return None

    # -------------------------------------------------------------------------------------------- what is said

    def _report(self, sentence: str) -> None:
        self.message = sentence
        self._status.value = html.escape(sentence)

    def _show_nothing(self, reason: str) -> None:
        self._report(reason)
        self._numbers.value = ""
        for live in self._live_panels.values():
            live.image.layout.visibility = "hidden"

    def _thumbnail(self, setting: Setting, one: ScoredObject, *, side: int = THUMBNAIL) -> tuple[np.ndarray, str]:
        """Pixels (side, side, 3) and caption of an object in the gallery."""
        whole = setting._replace(row=one.row, terms=setting.vector_dim, error=0.0)
        item = self.lab.folder(setting.data_set)[one.row]
        pixels = self.lab.pixels(setting.data_set, item.image)
        return (
            fit_square(error_image(pixels, item, self.lab.reconstruction(whole).rle)[0], side, sharp=True),
            f"{item.name} {one.iou:.2f}",
        )


def gallery_title(setting: Setting, count: int) -> str:
    """What the gallery shows."""
    codec = f"{CODEC_NAMES[setting.method]}, N = {setting.mask_size}, n_k = {setting.vector_dim}"
    what = f"{count} worst reconstructions of" if count else "No object of this size in"
    return f"{what} {setting.data_set}: {codec}"
