"""Checks a whole data set before days are spent on it: every file, every object, every rule of the loader.

`check_data` never stops at the first fault. Severity "refused" is decided by the loader's own functions.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from solq_lab.bars import progress_bar
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
from solq_lab.data.ground_truth import MISREAD, GroundTruth, orientation_said
from solq_lab.data.images import (
    LEAVES,
    check_size,
    decode_bytes,
    describe_missing,
    leaves_folder,
    read_file,
    read_header,
)
from solq_lab.data.orientation import reading_of
from solq_lab.workbench.check import rules
from solq_lab.workbench.check.duplicates import thumbnail
from solq_lab.workbench.check.findings import Finding, Findings
from solq_lab.workbench.check.report import DEFAULTS, CheckedSplit, Image, Options, Report
from solq_lab.workers import in_processes

CHUNK = 32  # images that a process takes at once


class _Content(NamedTuple):
    """What the worker processes see of a split and its `annotations`; its classes are those of the first one."""

    split: Split
    images: list[Image]
    entries: Sequence[Any]
    options: Options
    classes: ClassMap | None


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

    report = Report({}, options, Findings(), [])
    learnt: ClassMap | None = None
    for split in splits:
        checked, own = _check_split(split, learnt, report, processes)
        report.splits[split.name], learnt = checked, learnt or own
        report.findings.add(split.name, rules.faults_of_split(checked))

    train, *others = report.splits.values()
    report.advice.extend(rules.what_it_asks_for(train))
    for name, finding in rules.turned_images([train, *others]):
        report.findings.add(name, [finding])
    for other in others:
        report.findings.add(other.split.name, rules.faults_between(train, other))
    return report


def _check_split(
    split: Split, learnt: ClassMap | None, report: Report, processes: int
) -> tuple[CheckedSplit, ClassMap | None]:
    """A split and its classes, where its categories can be used. Its annotations are in memory until this returns."""
    found: list[Finding] = []
    document, options = read_annotations(split.annotations), report.options
    names, own, source = {}, None, str(split.annotations)
    try:
        own = ClassMap.from_categories(document["categories"], options.class_ids, options.num_classes, source=source)
        found += [Finding("categories-same-name", shorten(name)) for name in own.same_names()]
        names = dict(zip(own.category_ids, own.names, strict=True))
    except DataError as error:
        found.append(Finding("categories", str(error)))

    with suppress(DataError):  # each has a finding of its own
        truth = GroundTruth(document, with_masks=options.with_masks, keep="all", report=False)
        if reading := truth.other_reading():
            found.append(Finding("boxes-misread", MISREAD.format(reading)))

    split = split._replace(orientation=split.orientation or orientation_said(document.get("info")))
    entries, images = document["annotations"], _read_images(document, split, found)
    report.findings.add(split.name, found)
    content = _Content(split, images, entries, options, learnt or own)
    return CheckedSplit(split, list(_check_images(content, processes, report.findings)), len(entries), names), own


def _read_images(document: dict, split: Split, found: list[Finding]) -> list[Image]:
    """The usable images with the places of their objects; what is unusable is added to `found`."""
    images: dict[int, Image] = {}
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
            found.append(Finding("duplicate-image-id", f"{images[image_id]} and {shorten(name)}", name, image_id))
            continue
        images[image_id] = Image(image_id, name, (entry["height"], entry["width"]), [])
        other = first_id.setdefault(os.path.normpath(name), image_id)
        if other != image_id:
            message = f"{shorten(name)}: image ids {other} and {image_id}"
            found.append(Finding("duplicate-file-name", message, name, image_id))

    ordered = list(images.values())
    rows = {image_id: row for row, image_id in enumerate(images)}
    seen: set[int] = set()
    for place, entry in enumerate(document["annotations"]):
        name = name_of(entry, place)
        try:
            ordered[owner_of(entry, rows, name)].places.append(place)
        except DataError as error:
            has_ids = isinstance(entry, dict) and all(is_id(entry.get(key)) for key in ("id", "category_id"))
            found.append(Finding("unknown-image" if has_ids else "object-entry", str(error)))
            continue
        if entry["id"] in seen:
            message = f"{name} comes more than once"
            found.append(Finding("duplicate-object-id", message, None, entry["image_id"], entry["id"]))
        seen.add(entry["id"])
    return ordered


def _check_images(content: _Content, processes: int, findings: Findings) -> Iterator[Image]:
    """Check all images of a split in several processes; their findings are too many to be kept, and are counted."""
    name, count = content.split.name, len(content.images)
    chunks = [slice(first, first + CHUNK) for first in range(0, count, CHUNK)]
    progress = progress_bar(total=count, desc=f"checking {name}", unit="image")
    with progress, closing(in_processes(_check_chunk, content, chunks, processes)) as results:
        for checked in results:
            for image, found in checked:
                findings.add(name, found)
                yield image
            progress.update(len(checked))


def _check_chunk(content: _Content, chunk: slice) -> list[tuple[Image, list[Finding]]]:
    return [_check_image(content, image) for image in content.images[chunk]]


def _check_image(content: _Content, image: Image) -> tuple[Image, list[Finding]]:
    """An image with what its file and its objects are, and what is wrong with them."""
    options, objects = content.options, []
    crowds: list[int] = []
    before: dict[tuple, Any] = {}
    image, found = _check_file(content, image)
    scale = min(options.test_scale / min(image.size), options.max_size / max(image.size))  # when tested
    for place in image.places:
        entry = content.entries[place]
        faults, side = rules.check_object(entry, place, image.size, content.classes, with_masks=options.with_masks)
        found += faults
        crowds += [entry["category_id"]] * (entry.get("iscrowd", 0) in (1, True))
        if side:
            objects.append((entry["category_id"], side))
            if side * scale < rules.SMALL:
                message = f"annotation id {entry['id']}: {side * scale:.1f} pixels wide when tested"
                found.append(Finding("object-small", message, annotation_id=entry["id"], weight=-side * scale))
            other = before.setdefault((entry["category_id"], *(entry.get("bbox") or [place])), entry["id"])
            if other != entry["id"]:
                message = f"annotation ids {other} and {entry['id']} have one class and box"
                found.append(Finding("object-twice", message, annotation_id=entry["id"]))

    count = len(objects)
    if count == 0:
        found.append(Finding("without-objects", str(image)))
    for what in ("queries", "detections"):
        if count > getattr(options, what):
            message = f"{image}: {count} objects, {getattr(options, what)} {what}"
            found.append(Finding(f"over-{what}", message, weight=count))
    found = [finding._replace(file_name=image.file_name, image_id=image.image_id) for finding in found]
    return image._replace(objects=objects, crowds=crowds), found


def _check_file(content: _Content, image: Image) -> tuple[Image, list[Finding]]:
    """An image with what its file is, as far as it was opened, and the file's fault if it has one."""
    split, look = content.split, content.options.look
    path = split.images / image.file_name
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        missing = describe_missing(split.images, image.file_name)
        return image, [Finding("image-missing", f"image id {image.image_id}: {missing}")]
    if not content.options.allow_links and leaves_folder(path, split.images.resolve()):
        return image, [Finding("path-leaves-folder", f"{image} {LEAVES}")]
    if look == "names":
        return image, []

    digest, thumb, orientation = b"", b"", split.orientation or "stored"
    try:
        data = read_file(path, str(image)) if look == "decode" else None
        header = read_header(path if data is None else data, str(image))
        size = header.size_as(orientation)
        if data is not None:
            pixels = decode_bytes(data, str(image), orientation)
            size, thumb = (pixels.shape[1], pixels.shape[2]), thumbnail(pixels)
            digest = hashlib.blake2b(data.numpy().data, digest_size=16).digest()
    except DataError as error:
        return image, [Finding("image-damaged", str(error))]

    image = image._replace(digest=digest, look=thumb, reading=reading_of(header, image.size))
    try:
        check_size(size, image.size, str(image), path, orientation)
    except DataError as error:
        return image, [Finding("image-size", str(error))]
    return image, []
