"""What can be wrong with a data set, as a table of rules, and what was found: counted, the worst of each rule kept."""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

Severity = Literal["refused", "harmful", "note"]
HEADINGS: dict[Severity, str] = {
    "refused": "the training would stop",
    "harmful": "the training would learn or measure something wrong",
    "note": "to know",
}
KEPT = 100  # findings of one rule and split that a report lists; all are counted


class Rule(NamedTuple):
    """A kind of finding: how bad it is, its title in tables, and how to mend it."""

    severity: Severity
    title: str
    cure: str = ""


RULES: dict[str, Rule] = {
    # the annotation file
    "categories": Rule("refused", "categories that cannot be used", "give every category its own id, 0 or more"),
    "categories-same-name": Rule(
        "harmful", "categories of one name, learnt as different classes", "give them one id, or other names"
    ),
    "image-entry": Rule("refused", "entries of images that cannot be used", "complete or remove them"),
    "path-leaves-folder": Rule("refused", "file names that leave the image folder", "use names relative to it"),
    "duplicate-image-id": Rule("refused", "image ids that come twice", "give every image its own id"),
    "object-entry": Rule("refused", "entries of annotations that cannot be used", "complete or remove them"),
    "unknown-image": Rule("refused", "objects of unknown images", "add the image or remove the object"),
    "unknown-category": Rule("refused", "objects of unknown categories", "add the category or remove the object"),
    "duplicate-file-name": Rule("harmful", "entries with one file name", "merge the entries"),
    "duplicate-object-id": Rule("refused", "annotation ids that come twice", "give every object its own id"),
    # the image files
    "image-missing": Rule("refused", "missing images", "fetch them or remove their entries"),
    "image-damaged": Rule("refused", "damaged images", "fetch them again or remove their entries"),
    "image-size": Rule("refused", "images of another size than annotated", "correct the entries or the files"),
    "orientation-mixed": Rule("refused", "turned images annotated both ways", "annotate all of them one way"),
    "orientation-undecided": Rule(
        "harmful",
        "images turned by EXIF whose annotations may count pixels as stored or upright",
        "look at their outlines and set data.orientation=stored or data.orientation=upright",
    ),
    "orientation": Rule("note", "images turned by EXIF, read as their sizes or data.orientation say"),
    "image-twice": Rule("harmful", "images with the same bytes as another one", "remove one of the two"),
    "object-twice": Rule("harmful", "objects with class and box of another of their image", "remove one of the two"),
    # boxes
    "box": Rule("refused", "boxes that are not four finite numbers", "correct or remove the object"),
    "box-without-area": Rule("harmful", "boxes without area, left out", "correct or remove the object"),
    "box-outside": Rule("harmful", "boxes outside their image, left out", "correct or remove the object"),
    "box-beyond-image": Rule("harmful", "boxes or outlines out of their image, cut off", "correct them"),
    "boxes-misread": Rule("harmful", "boxes or outlines with numbers in another order", "convert them"),
    # masks
    "mask": Rule("refused", "masks that cannot be read", "correct or remove the object"),
    "mask-missing": Rule("harmful", "objects without segmentation, left out", "draw or remove the object"),
    "mask-without-area": Rule("harmful", "polygons of fewer than three points, left out", "draw or remove the object"),
    "mask-empty": Rule("harmful", "masks without a pixel", "draw or remove the object"),
    "mask-outside-box": Rule("harmful", "masks that reach out of their box", "correct the box or the mask"),
    "mask-smaller-than-box": Rule("harmful", "boxes much wider than their mask", "correct the box or the mask"),
    "area": Rule("harmful", "areas that disagree with the mask", "write the number of the mask's pixels"),
    "short-polygon": Rule("note", "masks with a polygon of fewer than three points, ignored"),
    "crowd": Rule("harmful", "crowd regions that cannot be used", "correct or remove the region"),
    # counts
    "over-queries": Rule("harmful", "images with more objects than queries", "raise model.queries"),
    "over-detections": Rule("note", "images with more objects than detections are scored"),
    "without-objects": Rule("note", "images without objects, kept"),
    "nothing-to-learn": Rule("refused", "splits of which no object can be learnt", "correct the objects"),
    "nothing-to-measure": Rule("harmful", "val splits without an object", "annotate it, or name another one"),
    "many-crowds": Rule("harmful", "categories with many objects marked as crowds, left out", "write iscrowd 0"),
    "object-small": Rule("note", "objects under 8 pixels wide at the size images are tested at"),
    "class-few-objects": Rule("note", "categories with under 10 objects, or under 1 % of the largest one's"),
    "class-without-objects": Rule("note", "categories without objects"),
    # train and val together
    "image-in-both": Rule("harmful", "images that are in both splits", "remove them from one"),
    "lookalike-in-both": Rule("harmful", "images that look like one of train", "move both to one split"),
    "name-in-both": Rule("note", "file names that are in both splits"),
    "class-not-trained": Rule("harmful", "categories that only val has objects of", "add training objects"),
    "categories-swapped": Rule("refused", "categories that have another id in val", "use one list of categories"),
    "categories-differ": Rule("harmful", "categories that the splits name differently", "use one list of categories"),
}


class Finding(NamedTuple):
    """One thing that is wrong."""

    rule: str  # key of `RULES`
    message: str  # what was found, in one line
    # file_name, image_id, annotation_id: where; None where it is not about a single one
    file_name: str | None = None
    image_id: int | None = None
    annotation_id: int | None = None
    weight: float = 0.0  # how bad it is among its kind; the worst are shown


class Findings:
    """All findings of a data set: every one counted, the worst of each rule and split kept."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {rule: Counter() for rule in RULES}  # rule -> split -> how many
        self._kept: defaultdict[tuple[str, str], list[Finding]] = defaultdict(list)

    def add(self, split: str, found: Iterable[Finding]) -> None:
        """Count findings of a split and keep the worst; of equally bad ones the first."""
        for finding in found:
            self.counts[finding.rule][split] += 1
            kept = self._kept[finding.rule, split]
            kept.append(finding)
            if len(kept) >= 2 * KEPT:  # now and then, so that a million findings need little memory and time
                kept[:] = self.worst(finding.rule, split)

    def worst(self, rule: str, split: str, count: int = KEPT) -> list[Finding]:
        """The `count` worst findings of a rule, the worst first."""
        return heapq.nlargest(count, self._kept.get((rule, split), []), key=lambda finding: finding.weight)

    def total(self, rule: str) -> int:
        """How often a rule was broken, over all splits."""
        return self.counts[rule].total()

    def found(self, severity: Severity) -> list[str]:
        """The broken rules of a severity."""
        return [rule for rule in RULES if RULES[rule].severity == severity and self.total(rule)]

    def failing(self, fail_on: Severity = "harmful", allowed: Mapping[str, int | None] | None = None) -> list[str]:
        """The rules at least as bad as `fail_on` that were broken more often than allowed (None: any number)."""
        severities = list(HEADINGS)
        broken = [rule for bad in severities[: severities.index(fail_on) + 1] for rule in self.found(bad)]
        limits = {rule: math.inf if limit is None else limit for rule, limit in (allowed or {}).items()}
        return [rule for rule in broken if self.total(rule) > limits.get(rule, 0)]

    def frame(self, splits: Sequence[str]) -> pd.DataFrame:
        """Counts of the broken rules by split, the worst severity first, with title and cure."""
        rules = [rule for severity in HEADINGS for rule in self.found(severity)]
        rows = []
        for rule in rules:
            about, counts = RULES[rule], {split: self.counts[rule][split] for split in splits}
            rows.append({"severity": about.severity, "title": about.title} | counts | {"cure": about.cure})
        return pd.DataFrame(rows, index=pd.Index(rules, name="rule"), columns=["severity", "title", *splits, "cure"])

    def worst_frame(self, splits: Sequence[str], count: int) -> pd.DataFrame:
        """The `count` worst findings of each broken rule and split, without notes."""
        rows = [
            [rule, split, finding.file_name or "-", finding.message]
            for rule in self.failing("harmful")
            for split in splits
            for finding in self.worst(rule, split, count)
        ]
        return pd.DataFrame(rows, columns=["rule", "split", "image", "finding"])

    def to_dict(self, count: int = KEPT) -> dict[str, Any]:
        """For JSON: each broken rule with its counts and its worst findings."""
        found = {}
        for rule, counts in self.counts.items():
            if counts:
                worst = {name: [finding._asdict() for finding in self.worst(rule, name, count)] for name in counts}
                found[rule] = RULES[rule]._asdict() | {"counts": dict(counts), "worst": worst}
        return found
