"""The report about a data set: what there is and what is wrong, as data frames, as text and as JSON."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from solq_lab.data.annotations import read_annotations
from solq_lab.data.folders import Split
from solq_lab.errors import shorten
from solq_lab.workbench.check.findings import HEADINGS, KEPT, Finding, Findings

if TYPE_CHECKING:
    from solq_lab.data.orientation import Reading

MAX_MESSAGE = 200  # characters, in the text
SAMPLES = 16  # images of a split that are shown with all objects

Look = Literal["decode", "header", "names"]


class Options(NamedTuple):
    """What to look at, and what the training will be like."""

    # "decode" opens every image, "header" reads its size only, "names" only looks whether the file is there
    look: Look = "decode"
    queries: int = 300  # J, objects that the model can find in an image
    detections: int = 100  # per image that evaluation scores
    with_masks: bool = True  # masks are learnt
    # class_ids, num_classes: see `ClassMap.from_categories`
    class_ids: Literal["contiguous", "raw"] = "contiguous"
    num_classes: int | None = None
    allow_links: bool = False  # images may be links that leave their folder
    # test_scale, max_size: short side, and largest long side, that images are tested at
    test_scale: int = 800
    max_size: int = 1333


DEFAULTS = Options()


class Image(NamedTuple):
    """A usable entry of `images`, and what was found in its file and its objects."""

    image_id: int
    file_name: str
    size: tuple[int, int]  # (height, width) as annotated, pixels
    places: list[int]  # of its objects in `annotations`
    # category id and square root of the box's area, pixels, of each object to learn
    objects: Sequence[tuple[int, float]] = ()
    crowds: Sequence[int] = ()  # category ids of its crowd regions
    # digest, look: of the file's bytes, and its thumbnail; empty where it was not decoded
    digest: bytes = b""
    look: bytes = b""
    reading: Reading | None = None  # what the size of a turned image says

    def __str__(self) -> str:
        return f"image id {self.image_id}: {shorten(self.file_name)}"


@dataclass(frozen=True, eq=False)
class CheckedSplit:
    """A split, its usable images, how many entries `annotations` has, and the names of its categories by id."""

    split: Split
    images: list[Image]
    count: int
    names: dict[int, str]

    @cached_property
    def by_path(self) -> dict[str, Image]:
        """The images by their normalised file names."""
        return {os.path.normpath(image.file_name): image for image in self.images}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What there is: counts by the keys of `TITLES`, and "per_class", objects to learn by category name."""
        per_category = Counter(category for image in self.images for category, _ in image.objects)
        per_class: Counter[str] = Counter()
        for category, name in self.names.items():  # categories of one name are added up
            if name:
                per_class[name] += per_category[category]

        counts = np.array([len(image.objects) for image in self.images] or [0])
        return {
            "images": len(self.images),
            "empty": sum(not image.objects for image in self.images),
            "objects": int(counts.sum()),
            "crowds": sum(len(image.crowds) for image in self.images),
            "median": float(np.median(counts)),
            "most": int(counts.max()),
            "per_class": dict(per_class),
        }

    def sides(self) -> np.ndarray:
        """Square roots of the areas of the boxes to learn, pixels."""
        return np.array([side for image in self.images for _, side in image.objects], np.float32)

    def entries_of(self, image: Image) -> list[dict[str, Any]]:
        """All entries of an image, read anew, to draw them."""
        path = self.split.annotations
        entries = _read_entries(path, path.stat().st_mtime_ns)
        return [entries[place] for place in image.places]

    def objects_of(self, image: Image) -> list[tuple[dict[str, Any], str]]:
        """The same with their category names."""
        return [
            (entry, self.names.get(entry["category_id"], str(entry["category_id"]))) for entry in self.entries_of(image)
        ]


@lru_cache(1)  # one split at a time: a large one's take half a gigabyte
def _read_entries(annotations: Path, changed: int) -> Sequence[Any]:
    """The entries of a file that was changed at this time."""
    return read_annotations(annotations)["annotations"]


TITLES = {
    "empty": "images without objects",
    "crowds": "crowd regions",
    "median": "objects per image, median",
    "most": "objects per image, maximum",
}


class Report(NamedTuple):
    """What was found in a data set, by split; `advice` is what the first one asks of an experiment, a line each."""

    splits: dict[str, CheckedSplit]
    options: Options
    findings: Findings
    advice: list[str]

    def frame(self) -> pd.DataFrame:
        """What there is, one column per split."""
        summaries = {name: checked.summary for name, checked in self.splits.items()}
        return pd.DataFrame(summaries, dtype=object).drop("per_class").rename(index=TITLES)

    def samples(self, name: str) -> list[Image]:
        """Images of a split to look at: the worst findings first, then such with about as many objects as most."""
        checked = self.splits[name]
        images, median = checked.by_path, checked.summary["median"]
        found = [found for rule in self.findings.failing("harmful") for found in self.findings.worst(rule, name)]
        bad = dict.fromkeys(os.path.normpath(finding.file_name) for finding in found if finding.file_name)
        worst = [path for path in bad if path in images][: SAMPLES // 2]
        filled = [path for path, image in images.items() if image.places]
        typical = sorted(filled, key=lambda path: abs(len(images[path].places) - median))
        return [images[path] for path in list(dict.fromkeys([*worst, *typical]))[:SAMPLES]]

    def entry_of(self, name: str, finding: Finding) -> dict[str, Any] | None:
        """The annotation of a split that a finding is about, to draw it."""
        images = (image for image in self.splits[name].images if image.image_id == finding.image_id)
        entries = (entry for image in images for entry in self.splits[name].entries_of(image))
        return next((entry for entry in entries if entry["id"] == finding.annotation_id), None)

    def table(self, title: str) -> str:
        """The frame, then the broken rules of each severity, each with its counts and its worst finding."""
        splits = [checked.split for checked in self.splits.values()]
        found = [f"  {split.name}: images of {split.images} with {split.annotations}" for split in splits]
        lines = [title, *found, self.frame().to_string()]
        broken = self.findings.frame([*self.splits])
        for severity, heading in HEADINGS.items():
            rules = broken[broken["severity"] == severity]
            if len(rules):
                lines += ["", heading]

            for rule, row in rules.iterrows():
                counts = ", ".join(f"{row[split]} in {split}" for split in self.splits if row[split])
                lines.append(f"  {rule}: {row['title']}: {counts}")
                if severity != "note":
                    worst = next(finding for split in self.splits for finding in self.findings.worst(rule, split, 1))
                    lines.append(f"    {textwrap.shorten(worst.message, MAX_MESSAGE, placeholder=' ...')}")
        if self.is_clean:
            lines.append("\nnothing that would stop or harm a training")
        lines += ["", "what the data asks for", *self.advice] if self.advice else []
        return "\n".join(lines)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found but notes."""
        return not self.findings.failing("harmful")

    def to_dict(self, worst: int = KEPT) -> dict[str, Any]:
        """For JSON, with at most `worst` findings of each rule and split."""
        splits = {name: checked.split for name, checked in self.splits.items()}
        return {
            "splits": {n: {"images": str(s.images), "annotations": str(s.annotations)} for n, s in splits.items()},
            "options": self.options._asdict(),
            "summary": {name: checked.summary for name, checked in self.splits.items()},
            "advice": self.advice,
            "findings": self.findings.to_dict(worst),
        }
