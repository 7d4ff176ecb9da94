"""A whole data set looked through before days are spent on it: every file, every object, every rule of the loader.

`check_data` never stops at the first fault. What it calls "refused" is what the loader would refuse: it asks the
loader's own functions.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
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
from solq_lab.data.images import check_size, decode_bytes, read_file
from solq_lab.workbench.check.findings import RULES, Finding, Findings
from solq_lab.workbench.check.object_rules import check_object
from solq_lab.workbench.check.report import DEFAULTS, Options, Report, Summary
from solq_lab.workbench.check.split_rules import compare_classes, compare_files, same_bytes, untrained_classes
from solq_lab.workers import in_processes

PIECE = 32  # images that a process takes at once


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


class _Looked(NamedTuple):
    """What a worker hands back of some images, one item each; digests are empty where no file was read."""

    findings: list[Finding]
    learnt: list[int]
    digests: list[bytes]
    per_category: Counter[int]
    crowds: int


def check_data(splits: Sequence[Split], options: Options = DEFAULTS, *, processes: int = 2) -> Report:
    """Look through a data set.

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
    findings, summaries, entries = Findings(), {}, {}
    learnt: ClassMap | None = None
    names: dict[str, dict[int, str]] = {}
    files: dict[str, dict[str, bytes]] = {}
    for split in splits:
        document = read_annotations(split.annotations)
        own = _read_classes(document, options, split, findings)
        learnt = learnt or own
        content = _content(document, split, options, learnt, findings)
        looked = _look_at_all(content, processes, findings)
        file_names = [image.file_name for image in content.images]
        image_ids = [image.image_id for image in content.images]
        findings.add(split.name, same_bytes(file_names, image_ids, looked.digests))
        names[split.name] = dict(zip(own.category_ids, own.names, strict=True)) if own else {}
        files[split.name] = dict(zip(map(os.path.normpath, file_names), looked.digests, strict=True))
        summaries[split.name] = summary = _summarise(looked, names[split.name])
        empty = [name for name, count in summary.per_class.items() if not count]
        findings.add(split.name, (Finding("class-without-objects", f"category {shorten(name)}") for name in empty))
        entries[split.name] = _entries_of(findings, split, document)
    train, *others = (split.name for split in splits)
    for split in others:
        findings.add(split, compare_files(files[train], files[split]))
        findings.add(split, compare_classes(names[train], names[split]))
        findings.add(split, untrained_classes(summaries[train].per_class, summaries[split].per_class))
    return Report(tuple(splits), options, summaries, findings, entries)


def _entries_of(findings: Findings, split: Split, document: dict) -> dict[int, dict[str, Any]]:
    """The annotations that the kept findings of a split are about, by id."""
    wanted = {finding.annotation_id for rule in RULES for finding in findings.worst(rule, split.name)} - {None}
    entries = (entry for entry in document["annotations"] if isinstance(entry, dict) and is_id(entry.get("id")))
    return {entry["id"]: entry for entry in entries if entry["id"] in wanted}


def _read_classes(document: dict, options: Options, split: Split, findings: Findings) -> ClassMap | None:
    try:
        return ClassMap.from_categories(document["categories"], options.class_ids, options.num_classes)
    except DataError as error:
        findings.add(split.name, [Finding("categories", str(error))])
        return None


def _content(document: dict, split: Split, options: Options, classes: ClassMap | None, findings: Findings) -> _Content:
    """The usable images with their objects; what is unusable goes to the findings."""
    images: dict[int, _Image] = {}
    seen_names: dict[str, int] = {}
    for place, entry in enumerate(document["images"]):
        try:
            check_image_entry(entry, place, split.annotations)
        except DataError as error:
            usable = isinstance(entry, dict) and is_image_entry(entry)
            rule = "path-leaves-folder" if usable else "image-entry"
            findings.add(split.name, [Finding(rule, str(error).removeprefix(f"{split.annotations}: "))])
            continue
        image_id, name = entry["id"], entry["file_name"]
        if image_id in images:
            message = f"image id {image_id}: {shorten(images[image_id].file_name)} and {shorten(name)}"
            findings.add(split.name, [Finding("duplicate-image-id", message, name, image_id)])
            continue
        images[image_id] = _Image(image_id, name, (entry["height"], entry["width"]), [])
        other = seen_names.setdefault(os.path.normpath(name), image_id)
        if other != image_id:
            message = f"{shorten(name)}: image ids {other} and {image_id}"
            findings.add(split.name, [Finding("duplicate-file-name", message, name, image_id)])
    ordered = list(images.values())
    rows = {image.image_id: row for row, image in enumerate(ordered)}
    seen: set[int] = set()
    for place, entry in enumerate(document["annotations"]):
        name = name_of(entry, place)
        try:
            ordered[owner_of(entry, rows, name)].objects.append(place)
        except DataError as error:
            whole = isinstance(entry, dict) and all(is_id(entry.get(key)) for key in ("id", "category_id"))
            findings.add(split.name, [Finding("unknown-image" if whole else "object-entry", str(error))])
            continue
        if entry["id"] in seen:
            message = f"{name} comes more than once"
            findings.add(split.name, [Finding("duplicate-object-id", message, None, entry["image_id"], entry["id"])])
        seen.add(entry["id"])
    return _Content(split, options, ordered, document["annotations"], classes)


def _look_at_all(content: _Content, processes: int, findings: Findings) -> _Looked:
    """Look at all images of a split in several processes; their findings are added, the rest is handed back."""
    total = _Looked([], [], [], Counter(), 0)
    pieces = [slice(first, first + PIECE) for first in range(0, len(content.images), PIECE)]
    progress = tqdm(total=len(content.images), desc=f"checking {content.split.name}", unit="image")
    with progress, closing(in_processes(_look_at, content, pieces, processes)) as results:
        for looked in results:
            findings.add(content.split.name, looked.findings)
            total.learnt.extend(looked.learnt)
            total.digests.extend(looked.digests)
            total.per_category.update(looked.per_category)
            total = total._replace(crowds=total.crowds + looked.crowds)
            progress.update(len(looked.learnt))
    return total


def _look_at(content: _Content, piece: slice) -> _Looked:
    found: list[Finding] = []
    learnt, digests, per_category, crowds = [], [], Counter(), 0
    for image in content.images[piece]:
        digest, faults = _look_at_file(content, image)
        count = 0
        for place in image.objects:
            entry = content.entries[place]
            object_faults, kept = check_object(
                entry, place, image.size, content.classes, with_masks=content.options.with_masks
            )
            faults += object_faults
            count += kept
            per_category[entry["category_id"]] += kept
            crowds += entry.get("iscrowd", 0) in (1, True)
        faults += _count_faults(image, count, content.options)
        found += [f._replace(file_name=image.file_name, image_id=image.image_id) for f in faults]
        learnt.append(count)
        digests.append(digest)
    return _Looked(found, learnt, digests, per_category, crowds)


def _look_at_file(content: _Content, image: _Image) -> tuple[bytes, list[Finding]]:
    """A digest of an image file's bytes, empty where it was not read whole, and what is wrong with the file."""
    path = content.split.images / image.file_name
    name = f"image id {image.image_id}: {shorten(image.file_name)}"
    if not os.path.isfile(path):  # unlike Path's, it knows no name too long to ask for
        return b"", [Finding("image-missing", name)]
    if content.options.look == "names":
        return b"", []
    try:
        if content.options.look == "header":
            with Image.open(path) as opened:
                pixels = np.empty((0, opened.height, opened.width))
            digest = b""
        else:
            data = read_file(path, name)
            digest = hashlib.blake2b(data.numpy(), digest_size=16).digest()
            pixels = decode_bytes(data, name)
    except (DataError, OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        return b"", [Finding("image-damaged", str(error) if isinstance(error, DataError) else f"{name}: {error}")]
    try:
        check_size(pixels, image.size, name)
    except DataError as error:
        return digest, [Finding("image-size", str(error))]
    return digest, []


def _count_faults(image: _Image, count: int, options: Options) -> Iterator[Finding]:
    name = f"image id {image.image_id}: {shorten(image.file_name)}"
    if count == 0:
        yield Finding("without-objects", name)
    if count > options.queries:
        yield Finding("over-queries", f"{name}: {count} objects, {options.queries} queries", weight=count)
    if count > options.detections:
        yield Finding("over-detections", f"{name}: {count} objects, {options.detections} detections", weight=count)


def _summarise(looked: _Looked, names: dict[int, str]) -> Summary:
    per_class: dict[str, int] = defaultdict(int)
    for category, name in names.items():
        if name:
            per_class[name] += looked.per_category[category]
    counts = np.array(looked.learnt or [0])
    return Summary(
        images=len(looked.learnt),
        empty=sum(count == 0 for count in looked.learnt),
        objects=int(counts.sum()),
        crowds=looked.crowds,
        median=float(np.median(counts)),
        most=int(counts.max()),
        per_class=dict(per_class),
    )
