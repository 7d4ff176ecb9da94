"""What a look through a data set brought to light: what there is, what is wrong, as a table and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from solq_lab.data.folders import Split
from solq_lab.workbench.check.findings import HEADINGS, RULES, SEVERITIES, Findings

MAX_MESSAGE = 200  # characters, in the table

Look = Literal["decode", "header", "names"]


class Options(NamedTuple):
    """What to look at, and what the training will be like.

    look: "decode" opens every image, "header" reads its size only, "names" only looks whether the file is there.
    queries: J, objects that the model can find in an image.
    detections: per image that evaluation scores.
    with_masks: masks are learnt.
    class_ids, num_classes: see `ClassMap.from_categories`.
    """

    look: Look = "decode"
    queries: int = 300
    detections: int = 100
    with_masks: bool = True
    class_ids: Literal["contiguous", "raw"] = "contiguous"
    num_classes: int | None = None


DEFAULTS = Options()


class Summary(NamedTuple):
    """What there is in a split.

    images, empty, objects, crowds: how many images, images without objects, objects to learn, crowd regions.
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


class Report(NamedTuple):
    """What was found in a data set.

    entries: the annotations that the kept findings are about, by split and id, to draw them.
    """

    splits: tuple[Split, ...]
    options: Options
    summaries: dict[str, Summary]
    findings: Findings
    entries: dict[str, dict[int, dict[str, Any]]]

    def table(self, title: str) -> str:
        """What there is and what was found, a column for each split, the first finding of every bad rule below it."""
        summaries = list(self.summaries.values())
        lines = [
            _line(title, list(self.summaries)),
            _line("images", [summary.images for summary in summaries]),
            _line("objects to learn", [summary.objects for summary in summaries]),
            _line("crowd regions, no targets", [summary.crowds for summary in summaries]),
            _line("objects per image, median", [f"{summary.median:g}" for summary in summaries]),
            _line("objects per image, most", [summary.most for summary in summaries]),
            _line("classes with objects", [sum(map(bool, summary.per_class.values())) for summary in summaries]),
        ]
        for severity in SEVERITIES:
            rules = list(self.findings.found(severity))
            lines += [f"\n{HEADINGS[severity]}"] if rules else []
            for rule in rules:
                counts = [self.findings.counts[rule][split] or "-" for split in self.summaries]
                lines.append(_line(RULES[rule].title, counts, f"  {rule}"))
                if severity != "note":
                    worst = (finding for split in self.summaries for finding in self.findings.worst(rule, split))
                    lines.append(f"    {textwrap.shorten(next(worst).message, MAX_MESSAGE, placeholder=' ...')}")
        if self.is_clean:
            lines.append("\nnothing that would stop or harm a training")
        return "\n".join(lines)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found but notes."""
        return not self.findings.failing("harmful")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "splits": {s.name: {"images": str(s.images), "annotations": str(s.annotations)} for s in self.splits},
            "options": self.options._asdict(),
            "summary": {name: summary._asdict() for name, summary in self.summaries.items()},
            "findings": self.findings.to_dict(),
        }


def _line(title: str, values: Sequence[object], end: str = "") -> str:
    return f"{title:<58}{''.join(f'{value:>9}' for value in values)}{end}"
