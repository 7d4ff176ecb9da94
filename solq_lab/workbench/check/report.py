"""The report about a data set: what there is and what is wrong, as data frames, as text and as JSON."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from solq_lab.data.folders import Split
from solq_lab.workbench.check.findings import HEADINGS, KEPT, Findings

MAX_MESSAGE = 200  # characters, in the text

Look = Literal["decode", "header", "names"]


class Options(NamedTuple):
    """What to look at, and what the training will be like.

    look: "decode" opens every image, "header" reads its size only, "names" only looks whether the file is there.
    queries: J, objects that the model can find in an image.
    detections: per image that evaluation scores.
    with_masks: masks are learnt.
    class_ids, num_classes: see `ClassMap.from_categories`.
    allow_links: images may be links that leave their folder.
    test_scale, max_size: short side, and largest long side, that images are tested at.
    """

    look: Look = "decode"
    queries: int = 300
    detections: int = 100
    with_masks: bool = True
    class_ids: Literal["contiguous", "raw"] = "contiguous"
    num_classes: int | None = None
    allow_links: bool = False
    test_scale: int = 800
    max_size: int = 1333

    def scale(self, size: tuple[int, int]) -> float:
        """By how much an image of (height, width) is enlarged for the network, when tested."""
        return min(self.test_scale / min(size), self.max_size / max(size))


DEFAULTS = Options()


class Summary(NamedTuple):
    """What there is in a split: counts of images, images without objects, objects to learn and crowd regions.

    median, most: objects per image.
    per_class: objects to learn by category name.
    """

    images: int
    empty: int
    objects: int
    crowds: int
    median: float
    most: int
    per_class: dict[str, int]


_TITLES = {
    "empty": "images without objects",
    "crowds": "crowd regions",
    "median": "objects per image, median",
    "most": "objects per image, maximum",
}


class Sample(NamedTuple):
    """An image to look at, all its entries of `annotations`, and their category names."""

    file_name: str
    entries: list[dict[str, Any]]
    names: list[str]


class Report(NamedTuple):
    """What was found in a data set.

    sides: square roots of the areas of the boxes to learn, pixels, by split.
    entries: the annotations that the kept findings are about, by split and id, to draw them.
    advice: what the first split asks of an experiment, a line each.
    samples: images to look at, the worst first, by split.
    """

    splits: list[Split]
    options: Options
    summaries: dict[str, Summary]
    sides: dict[str, np.ndarray]
    findings: Findings
    entries: dict[str, dict[int, dict[str, Any]]]
    advice: list[str]
    samples: dict[str, list[Sample]]

    def frame(self) -> pd.DataFrame:
        """What there is, one column per split."""
        summaries = {name: summary._asdict() for name, summary in self.summaries.items()}
        return pd.DataFrame(summaries, dtype=object).drop("per_class").rename(index=_TITLES)

    def table(self, title: str) -> str:
        """The frame, then the broken rules of each severity, each with its counts and its worst finding."""
        splits = list(self.summaries)
        found = [f"  {split.name}: images of {split.images} with {split.annotations}" for split in self.splits]
        lines = [title, *found, self.frame().to_string()]
        broken = self.findings.frame(splits)
        for severity, heading in HEADINGS.items():
            rules = broken[broken["severity"] == severity]
            if len(rules):
                lines += ["", heading]

            for rule, row in rules.iterrows():
                counts = ", ".join(f"{row[split]} in {split}" for split in splits if row[split])
                lines.append(f"  {rule}: {row['title']}: {counts}")
                if severity != "note":
                    worst = next(finding for split in splits for finding in self.findings.worst(rule, split, 1))
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
        return {
            "splits": {s.name: {"images": str(s.images), "annotations": str(s.annotations)} for s in self.splits},
            "options": self.options._asdict(),
            "summary": {name: summary._asdict() for name, summary in self.summaries.items()},
            "advice": self.advice,
            "findings": self.findings.to_dict(worst),
        }
