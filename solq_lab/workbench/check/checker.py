"""Checks a whole data set before days are spent on it: every file, every object, every rule of the loader.

`check_data` never stops at the first fault. Severity "refused" is decided by the loader's own functions.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from solq_lab.data.annotations import (
    DataError,
    check_image_entry,
    is_id,
    is_image_entry,
    name_of,
    owner_of,
    read_annotations,
    shorten,
)
from solq_lab.data.classes import ClassMap
from solq_lab.data.folders import Split
from solq_lab.data.ground_truth import orientation_said
from solq_lab.data.images import (
    LEAVES,
    check_size,
    decode_bytes,
    describe_missing,
    leaves_folder,
    read_file,
    read_header,
)
from solq_lab.data.orientation import Reading, reading_of
from solq_lab.workbench.check import rules
from solq_lab.workbench.check.duplicates import thumbnail
from solq_lab.workbench.check.findings import RULES, Finding, Findings
from solq_lab.workbench.check.report import DEFAULTS, Options, Report, Sample, Summary
from solq_lab.workers import in_processes

SAMPLES = 16  # images of a split that a report shows with all objects
CHUNK = 32  # images that a process takes at once


class _Image(NamedTuple):
    """A usable entry of `images` and the places of its objects in `annotations`."""

    image_id: int
    file_name: str
    size: tuple[int, int]
    objects: list[int]


class _Content(NamedTuple):
    """What the worker processes see of a split."""

    split: Split
    options: Options
    images: list[_Image]
    entries: Sequence[Any]
    classes: ClassMap | None


class _Checked(NamedTuple):
    """What a worker returns about one image; the digest is empty where the file was not read.

    objects: category id and square root of the box's area of each object to learn.
    reading: what the size of a turned image says.
    look: its thumbnail, empty where it was not decoded.
    """

    findings: list[Finding]
    digest: bytes
    objects: list[tuple[int, float]]
    crowds: int
    reading: Reading | None
    look: bytes


class _Facts(NamedTuple):
    """What a split is compared by: names by category id; bytes, thumbnails, readings and ids of images by path.

    said: whether it is known how turned images are annotated.
    """

    names: dict[int, str]
    digests: dict[str, bytes]
    looks: dict[str, bytes]
    turned: dict[str, Reading]
    ids: dict[str, int]
    said: bool

    @classmethod
    def of(cls, content: _Content, checked: Sequence[_Checked], names: dict[int, str]) -> _Facts:
        paths = [os.path.normpath(image.file_name) for image in content.images]
        return cls(
            names,
            digests={path: image.digest for path, image in zip(paths, checked, strict=True)},
            looks={path: image.look for path, image in zip(paths, checked, strict=True)},
            turned={path: image.reading for path, image in zip(paths, checked, strict=True) if image.reading},
            ids={path: image.image_id for path, image in zip(paths, content.images, strict=True)},
            said=content.split.orientation is not None,
        )


def check_data(splits: Sequence[Split], options: Options = DEFAULTS, *, processes: int = 2) -> Report:
    """Check a data set.

    Args:
        splits: of one data set; the first one's categories are those that are learnt.
        options: what to look at.
        processes: how many share the images.

    Raises:
        DataError: an annotation file, or a folder of images, cannot be read at all.
    """
    for split in splits:
        if not split.images.is_dir():
            raise DataError(f"{split.images}: no such image folder; check data.root and the names in the data section")

    report = Report([], options, {}, {}, Findings(), {}, [], {})
    learnt: ClassMap | None = None
    facts: dict[str, _Facts] = {}
    for split in splits:
        found: list[Finding] = []
        document = read_annotations(split.annotations)
        own = _read_classes(document, options, found)
        learnt = learnt or own
        split = split._replace(orientation=split.orientation or orientation_said(document.get("info")))
        content = _Content(split, options, _read_images(document, split, found), document["annotations"], learnt)
        report.splits.append(split)
        report.findings.add(split.name, found)

        # Only the counts of the images are kept: their findings are too many.
        checked = list(_check_images(content, processes, report.findings))
        names = dict(zip(own.category_ids, own.names, strict=True)) if own else {}
        facts[split.name] = own_facts = _Facts.of(content, checked, names)
        summary = report.summaries[split.name] = _summarise(checked, names)
        sides = report.sides[split.name] = np.array([s for image in checked for _, s in image.objects], np.float32)

        entries = len(document["annotations"])
        report.findings.add(split.name, rules.images_twice(own_facts.digests, own_facts.ids))
        report.findings.add(split.name, rules.counts_of_split(split.name, summary, entries))
        report.entries[split.name] = _entries_of(report.findings, split, document)
        report.samples[split.name] = _choose_samples(report.findings, content, summary, names)
        if len(facts) == 1 and content.images:
            height, width = np.median([image.size for image in content.images], axis=0).tolist()
            report.advice.extend(rules.what_it_asks_for(summary, sides, (height, width)))

    evidence = {reading for one in facts.values() if not one.said for reading in one.turned.values()}
    for name, one in facts.items():
        report.findings.add(name, rules.turned_images(one.turned, evidence, one.ids, said=one.said))
    first, *others = facts
    for name in others:
        report.findings.add(name, _compare(facts[first], facts[name]))
        per_class = (report.summaries[split].per_class for split in (first, name))
        report.findings.add(name, rules.classes_not_trained(*per_class))
    return report


def _compare(train: _Facts, val: _Facts) -> Iterator[Finding]:
    """What is wrong between two splits."""
    yield from rules.images_in_both(train.digests, val.digests)
    of_train = set(train.digests.values())
    other = {name: look for name, look in val.looks.items() if val.digests[name] not in of_train}
    yield from rules.lookalikes_in_both(train.looks, other)
    yield from rules.categories_differ(train.names, val.names)


def _choose_samples(findings: Findings, content: _Content, summary: Summary, names: dict[int, str]) -> list[Sample]:
    """Images with the worst findings first, then such with about as many objects as most."""
    images, name = {image.file_name: image for image in content.images}, content.split.name
    bad = [finding.file_name for rule in findings.failing("harmful") for finding in findings.worst(rule, name)]
    worst = [file for file in dict.fromkeys(bad) if file in images][: SAMPLES // 2]
    filled = [image for image in content.images if image.objects]
    typical = sorted(filled, key=lambda image: abs(len(image.objects) - summary.median))
    chosen = list(dict.fromkeys([*worst, *(image.file_name for image in typical)]))[:SAMPLES]
    samples = []
    for file in filter(None, chosen):
        entries = [content.entries[place] for place in images[file].objects]
        called = [names.get(entry["category_id"], str(entry["category_id"])) for entry in entries]
        samples.append(Sample(file, entries, called))
    return samples


def _read_classes(document: dict, options: Options, found: list[Finding]) -> ClassMap | None:
    try:
        classes = ClassMap.from_categories(document["categories"], options.class_ids, options.num_classes)
        found += [Finding("categories-same-name", shorten(name)) for name in classes.same_names()]
        return classes
    except DataError as error:
        found.append(Finding("categories", str(error)))
        return None


def _read_images(document: dict, split: Split, found: list[Finding]) -> list[_Image]:
    """The usable images with the places of their objects; what is unusable is added to `found`."""
    images: dict[int, _Image] = {}
    first_id: dict[str, int] = {}  # by file name
    for place, entry in enumerate(document["images"]):
        try:
            check_image_entry(entry, place, split.annotations)
        except DataError as error:
            rule = "path-leaves-folder" if isinstance(entry, dict) and is_image_entry(entry) else "image-entry"
            found.append(Finding(rule, str(error).removeprefix(f"{split.annotations}: ")))
            continue

        image_id, name = entry["id"], entry["file_name"]
        if image_id in images:
            message = f"image id {image_id}: {shorten(images[image_id].file_name)} and {shorten(name)}"
            found.append(Finding("duplicate-image-id", message, name, image_id))
            continue
        images[image_id] = _Image(image_id, name, (entry["height"], entry["width"]), [])
        other = first_id.setdefault(os.path.normpath(name), image_id)
        if other != image_id:
            message = f"{shorten(name)}: image ids {other} and {image_id}"
            found.append(Finding("duplicate-file-name", message, name, image_id))

    ordered = list(images.values())
    _assign_objects(document["annotations"], ordered, found)
    return ordered


def _assign_objects(entries: Sequence[Any], images: list[_Image], found: list[Finding]) -> None:
    """Add to each image the places of its objects; entries without usable ids are added to `found`."""
    rows = {image.image_id: row for row, image in enumerate(images)}
    seen: set[int] = set()
    for place, entry in enumerate(entries):
        name = name_of(entry, place)
        try:
            images[owner_of(entry, rows, name)].objects.append(place)
        except DataError as error:
            has_ids = isinstance(entry, dict) and all(is_id(entry.get(key)) for key in ("id", "category_id"))
            found.append(Finding("unknown-image" if has_ids else "object-entry", str(error)))
            continue
        if entry["id"] in seen:
            message = f"{name} comes more than once"
            found.append(Finding("duplicate-object-id", message, None, entry["image_id"], entry["id"]))
        seen.add(entry["id"])


def _check_images(content: _Content, processes: int, findings: Findings) -> Iterator[_Checked]:
    """Check all images of a split in several processes; their findings are added, the rest is handed on."""
    chunks = [slice(first, first + CHUNK) for first in range(0, len(content.images), CHUNK)]
    progress = tqdm(total=len(content.images), desc=f"checking {content.split.name}", unit="image")
    with progress, closing(in_processes(_check_chunk, content, chunks, processes)) as results:
        for checked in results:
            for image in checked:
                findings.add(content.split.name, image.findings)
                yield image._replace(findings=[])
            progress.update(len(checked))


def _check_chunk(content: _Content, chunk: slice) -> list[_Checked]:
    return [_check_image(content, image) for image in content.images[chunk]]


def _check_image(content: _Content, image: _Image) -> _Checked:
    """An image's file, all its objects, and how many they are."""
    options, objects, crowds = content.options, [], 0
    before: dict[tuple, Any] = {}
    digest, look, reading, found = _check_file(content, image)
    scale = options.scale(image.size)
    for place in image.objects:
        entry = content.entries[place]
        faults, side = rules.check_object(entry, place, image.size, content.classes, with_masks=options.with_masks)
        found += faults
        crowds += entry.get("iscrowd", 0) in (1, True)
        if side:
            objects.append((entry["category_id"], side))
            if side * scale < rules.SMALL:
                message = f"annotation id {entry['id']}: {side * scale:.1f} pixels wide when tested"
                found.append(Finding("object-small", message, annotation_id=entry["id"], weight=-side * scale))
            other = before.setdefault((entry["category_id"], *(entry.get("bbox") or [place])), entry["id"])
            if other != entry["id"]:
                message = f"annotation ids {other} and {entry['id']} have one class and box"
                found.append(Finding("object-twice", message, annotation_id=entry["id"]))

    name, count = f"image id {image.image_id}: {shorten(image.file_name)}", len(objects)
    if count == 0:
        found.append(Finding("without-objects", name))
    if count > options.queries:
        found.append(Finding("over-queries", f"{name}: {count} objects, {options.queries} queries", weight=count))
    if count > options.detections:
        message = f"{name}: {count} objects, {options.detections} detections"
        found.append(Finding("over-detections", message, weight=count))
    found = [finding._replace(file_name=image.file_name, image_id=image.image_id) for finding in found]
    return _Checked(found, digest, objects, crowds, reading, look)


def _check_file(content: _Content, image: _Image) -> tuple[bytes, bytes, Reading | None, list[Finding]]:
    """Digest and thumbnail of an image, empty where it was not decoded, the reading if it is turned, and its faults."""
    path, look = content.split.images / image.file_name, content.options.look
    name = f"image id {image.image_id}: {shorten(image.file_name)}"
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        missing = describe_missing(content.split.images, image.file_name)
        return b"", b"", None, [Finding("image-missing", f"image id {image.image_id}: {missing}")]
    if not content.options.allow_links and leaves_folder(path, content.split.images.resolve()):
        return b"", b"", None, [Finding("path-leaves-folder", f"{name} {LEAVES}")]
    if look == "names":
        return b"", b"", None, []

    digest, thumb, orientation = b"", b"", content.split.orientation or "stored"
    try:
        header = read_header(path, name)
        size = header.size_as(orientation)
        if look == "decode":
            data = read_file(path, name)
            pixels = decode_bytes(data, name, orientation)
            size, thumb = (pixels.shape[1], pixels.shape[2]), thumbnail(pixels)
            digest = hashlib.blake2b(data.numpy().data, digest_size=16).digest()
    except DataError as error:
        return b"", b"", None, [Finding("image-damaged", str(error))]

    reading = reading_of(header, image.size)
    try:
        check_size(size, image.size, name, path, orientation)
    except DataError as error:
        return digest, thumb, reading, [Finding("image-size", str(error))]
    return digest, thumb, reading, []


def _summarise(checked: Sequence[_Checked], names: dict[int, str]) -> Summary:
    """Counts of a split; categories of one name are added up."""
    per_category = Counter(category for image in checked for category, _ in image.objects)
    per_class: Counter[str] = Counter()
    for category, name in names.items():
        if name:
            per_class[name] += per_category[category]

    counts = np.array([len(image.objects) for image in checked] or [0])
    return Summary(
        images=len(checked),
        empty=sum(not image.objects for image in checked),
        objects=int(counts.sum()),
        crowds=sum(image.crowds for image in checked),
        median=float(np.median(counts)),
        most=int(counts.max()),
        per_class=dict(per_class),
    )


def _entries_of(findings: Findings, split: Split, document: dict) -> dict[int, dict[str, Any]]:
    """The annotations that the kept findings of a split are about, by id."""
    wanted = {finding.annotation_id for rule in RULES for finding in findings.worst(rule, split.name)} - {None}
    entries = (entry for entry in document["annotations"] if isinstance(entry, dict) and is_id(entry.get("id")))
    return {entry["id"]: entry for entry in entries if entry["id"] in wanted}
