"""One chooser of images for all explorers: by file name, class, size, score or error, and in which order."""

from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
import pandas as pd

from solq_lab.data.classes import ClassMap
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.coco import DEFAULTS
from solq_lab.evaluation.sizes import SIZES, size_of

ALL = "all"
MAX_LISTED = 500  # images in the list; a browser takes seconds for more
FILTERS = {"class": "160px", "size": "134px", "error": "150px"}  # column of the table -> width, both rows fit 848 px
SORTS = {"file": (), "lowest IoU": ("IoU", True), "most AP lost": ("lost", False), "highest score": ("score", False)}


def list_objects(
    truth: GroundTruth, classes: ClassMap, area_sides: tuple[float, float] = DEFAULTS.area_sides
) -> pd.DataFrame:
    """One line per object: "id", "image" and "row" in the ground truth, "class" and "size"."""
    areas = truth.areas_of(np.arange(len(truth)))
    return pd.DataFrame(
        {
            "id": truth.ids,
            "image": truth.image_rows,
            "row": np.arange(len(truth)),
            "class": [classes.names[classes.channel_of(one)] for one in truth.category_ids.tolist()],
            "size": [SIZES[size_of(area, area_sides)] for area in areas.tolist()],
        }
    )


class ImageChooser:
    """Controls that lead to an image.

    Attributes:
        image: the control that holds the number of the image.
        is_constrained: whether a condition on objects, or an order, is set.
        refresh: called where the image stays and only its object may change.
        search, filters, score, sort: the conditions and the order. A control without a column in the table is hidden.
        matches: the list of images that meet them.
        previous, next, upload: buttons.
        note: how many there are.
        widget: all of it.
    """

    def __init__(self) -> None:
        style = {"description_width": "44px"}
        self.image = widgets.BoundedIntText(min=0, max=0, description="image", layout={"width": "130px"}, style=style)
        self.previous, self.next = (
            widgets.Button(icon=f"chevron-{side}", tooltip=name, layout={"width": "34px"})
            for side, name in (("left", "the match before"), ("right", "the next match"))
        )
        self.search = widgets.Text(placeholder="part of it", description="file", continuous_update=False)
        self.search.layout, self.search.style = {"width": "150px"}, style
        self.filters = {
            column: widgets.Dropdown(options=[ALL], description=column, layout={"width": width}, style=style)
            for column, width in FILTERS.items()
        }
        self.score = widgets.FloatRangeSlider(
            value=(0, 1), min=0, max=1, step=0.05, description="found at", continuous_update=False, readout_format=".0%"
        )
        self.score.layout, self.score.style = {"width": "232px"}, {"description_width": "60px"}
        self.sort = widgets.Dropdown(options=["file"], description="first", layout={"width": "172px"}, style=style)
        self.matches = widgets.Dropdown(options=[], layout={"width": "190px"})
        whole = {"flex": "0 0 auto", "width": "auto"}  # narrower, they would end in dots
        self.upload = widgets.FileUpload(accept="image/*", description="own image", layout=whole)
        self.note = widgets.Label(layout=whole)

        self.conditions = (self.search, *self.filters.values(), self.score, self.sort)
        self.refresh: Callable[[], None] = lambda: None
        self._rows: dict[int, int] = {}
        self.is_constrained = False
        self._listing = False
        walk = [self.image, self.previous, self.next, self.matches, self.note, self.sort, self.upload]
        filters = [self.search, *self.filters.values(), self.score]
        self.widget = widgets.VBox([widgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in (walk, filters)])

    def load(self, objects: pd.DataFrame, files: Sequence[str]) -> None:
        """Offer the images of a data set.

        Args:
            objects: as `list_objects`; with "score", "IoU", "lost" and "error" where a model was scored on them.
            files: the name of each image.
        """
        self._objects, self._files = objects, list(files)
        self._listing = True
        for column, control in self.filters.items():
            known = objects[column].dropna().unique().tolist() if column in objects else []
            control.options = [ALL, *(SIZES if column == "size" else sorted(known))]
            control.layout.display = None if known else "none"
        self.score.layout.display = None if "score" in objects else "none"
        self.score.value, self.search.value = (0, 1), ""
        self._offer_sorts()
        self.image.max = len(self._files) - 1
        self._listing = False
        self.list_matches()

    def add_column(self, values: pd.Series) -> None:
        """Let the images be sorted by a number of objects, as "IoU", by their rows; those without one come last."""
        self._objects = self._objects.assign(**{str(values.name): self._objects["row"].map(values)})
        self._offer_sorts()

    def _offer_sorts(self) -> None:
        known = [name for name, by in SORTS.items() if not by or by[0] in self._objects]
        if list(self.sort.options) != known:
            self.sort.options = known
        self.sort.layout.display = None if len(known) > 1 else "none"

    def add(self, file: str) -> None:
        """Offer one more image, without objects, and go there."""
        self._files.append(file)
        self.image.max = len(self._files) - 1
        self.list_matches()
        self.image.value = self.image.max

    def list_matches(self) -> None:
        """List what meets the conditions, and go to the first match where the present image is none."""
        if self._listing:
            return
        table, self.is_constrained = self._objects, False
        for column, control in self.filters.items():
            if control.value != ALL:
                table, self.is_constrained = table[table[column] == control.value], True
        if self.score.value != (0, 1):
            table, self.is_constrained = table[table["score"].between(*self.score.value)], True
        by = SORTS[self.sort.value]
        if by:
            self.is_constrained = True
            table = table.dropna(subset=by[0]).sort_values(by[0], ascending=by[1], kind="stable")

        self._rows = dict(
            zip(*(table[::-1][name].tolist() for name in ("image", "row")), strict=True)
        )  # the first wins
        images = table["image"].unique().tolist() if self.is_constrained else range(len(self._files))
        wanted = self.search.value.lower()
        found = [image for image in images if wanted in self._files[image].lower()]
        self.note.value = f"{len(found):,} of {len(self._files):,} images"

        self._listing = True
        self.matches.options = [(self._files[image], image) for image in found[:MAX_LISTED]]
        self._listing = False
        if found and (by or self.image.value not in found):
            self.go(found[0])
        else:
            self.go(self.image.value)

    @property
    def row(self) -> int | None:
        """The first object of the image that meets the conditions, a row of the ground truth; None without one."""
        return self._rows.get(self.image.value)

    @property
    def name(self) -> str:
        """The file name of the image."""
        return self._files[self.image.value]

    def go(self, image: int) -> None:
        """Show an image, and its first object that meets the conditions."""
        if image == self.image.value:
            self.mark()
            self.refresh()
        self.image.value = image

    def follow_list(self) -> None:
        """Go to the image that was chosen in the list."""
        if not self._listing and self.matches.value is not None:
            self.go(self.matches.value)

    def step(self, by: int) -> None:
        """Go to the next match, or to the one before; from an image that is none, to the first."""
        found = [image for _, image in self.matches.options]
        if found:
            place = found.index(self.image.value) + by if self.image.value in found else 0
            self.go(found[place % len(found)])

    def mark(self) -> None:
        """Mark the present image in the list."""
        self._listing = True
        self.matches.value = self.image.value if self.image.value in dict(self.matches.options).values() else None
        self._listing = False
