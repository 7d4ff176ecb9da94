"""YOLO segmentation folders as COCO documents: images/, labels/ with one text file per image, and data.yaml.

A line of a label file is one object: its class, then x y x y ... of its outline, as shares of the image's sides.
Training tools of this format turn an image by its EXIF orientation first, so the documents count pixels of upright
images, and say so in their `info`.
"""

import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import yaml
from pycocotools import mask as coco_rle

from solq_lab.bars import progress_bar
from solq_lab.data.kinds import IMAGE_SUFFIXES, count_endings
from solq_lab.errors import DataError, first_few, shorten
from solq_lab.files import files_below, require_file
from solq_lab.plain_yaml import load_yaml

logger = logging.getLogger(__name__)

SETTINGS = ("data.yaml", "data.yml", "dataset.yaml")
SLACK = 0.01  # share of a side that an outline may leave its image by, for roundings; it is cut off there
PHOTOGRAPHS = frozenset([".dng", ".heic", ".heif", ".pfm"])  # YOLO's tools read them, this project does not
DIGITS = 2  # of pixel coordinates, as in COCO


class YoloSplit(NamedTuple):
    """One split of a YOLO folder, before its images and labels are read."""

    name: str  # train, val or test
    root: Path  # the folder of data.yaml, which nothing leads out of
    places: list[Path]  # folders of images, and lists of them
    classes: list[str]  # the class names
    settings: Path  # data.yaml, for messages

    @property
    def images(self) -> Path:
        """The folder that the images are named from."""
        return self.places[0] if len(self.places) == 1 and self.places[0].is_dir() else self.root

    def files(self) -> dict[Path, Path]:
        """The label file of every image, whether it exists or not.

        Raises:
            DataError: there are no images, or some in formats that are not read.
        """
        return {path: _label_file(path, self.root) for path in _image_paths(self)}

    def document(self) -> dict[str, Any]:
        """The split as a COCO document.

        Raises:
            DataError: an image cannot be read, or a line is no outline; the message names the file and the line.
        """
        from solq_lab.data.images import read_header  # torch takes seconds to load
        from solq_lab.masks import segmentation_to_rle

        files = self.files()
        if unlabelled := [path for path, label in files.items() if not label.exists()]:
            message = f"{self.settings}: {len(unlabelled)} of the {len(files)} images of {self.name} have no label file"
            if len(unlabelled) == len(files) and self.name == "train":
                raise DataError(f"{message}; that of {unlabelled[0]} would be {files[unlabelled[0]]}")
            logger.info("%s, and no objects: %s", message, first_few(unlabelled))

        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        progress = progress_bar(files.items(), desc=f"reading {self.name}", unit="image")
        for number, (path, label) in enumerate(progress, start=1):
            height, width = read_header(path, str(path)).size_as("upright")
            file_name = path.relative_to(self.images).as_posix()
            images.append({"id": number, "file_name": file_name, "height": height, "width": width})
            for category_id, outline in _outlines(label, len(self.classes)):
                polygon = np.round(outline * (width, height), DIGITS)
                corner, flat = polygon.min(axis=0), polygon.ravel().tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": category_id,
                        "bbox": [*corner.tolist(), *np.round(polygon.max(axis=0) - corner, DIGITS).tolist()],
                        "area": int(coco_rle.area(segmentation_to_rle([flat], (height, width)))),
                        "iscrowd": 0,
                        "segmentation": [flat],
                    }
                )

        # A misspelt name would lose its objects unseen.
        labels = set(files.values())
        there = {path for place in {label.parent for label in labels} for path in place.glob("*.txt")}
        left = sorted(path for path in there - labels if path.name != "classes.txt")
        if left:
            logger.warning("%d label files belong to no image and are left out: %s", len(left), first_few(left))
        categories = [{"id": index, "name": name} for index, name in enumerate(self.classes)]
        info = {"orientation": "upright"}
        return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def is_yolo(path: Path) -> bool:
    """Whether a YAML file is the data.yaml of a YOLO folder, sound or not: it lists class names."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")  # some editors write a byte order mark
    return re.search(r"^[{'\"]*names\b", text, re.MULTILINE) is not None


def find_yolo(source: Path) -> list[YoloSplit]:
    """The splits of a YOLO segmentation folder, named itself or by its data.yaml.

    Everything is read from this folder: `path` in data.yaml is not followed, and entries must not leave it.

    Raises:
        DataError: data.yaml is missing or cannot be used, or leads to nothing.
    """
    settings, values, names = _read_settings(source)
    splits = []
    for name, keys in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        entry = next((values[key] for key in keys if values.get(key)), None)
        if entry is not None:
            entries = entry if isinstance(entry, list) else [entry]
            places = [_place(each, settings.parent, settings) for each in entries]
            splits.append(YoloSplit(name, settings.parent, places, names, settings))
    if not splits:
        raise DataError(f"{settings}: neither 'train' nor 'val'; needed are folders of images under these keys")
    return splits


def _read_settings(source: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The path of data.yaml, its content and its class names."""
    path = source if source.is_file() else next((source / name for name in SETTINGS if (source / name).is_file()), None)
    if path is None:
        found = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) if source.is_dir() else "no such folder"
        raise DataError(f"{source}: no data.yaml with the class names (found {found or 'nothing'}); add it or name it")
    try:
        values = load_yaml("\n".join(_read_lines(path)))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: found a {type(values).__name__}, needed are the keys names, train and val")

    names = values.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int) for name in names):
        needed = "needed is a list, or a mapping from 0, 1, ... on; write off, no and the like in quotes"
        raise DataError(f"{path}: names: found {shorten(names)}; {needed}")
    if "kpt_shape" in values:
        raise DataError(
            f"{path}: kpt_shape: labels of key points, no outlines; export the data set as YOLO segmentation"
        )
    if str(values.get("nc", len(names))) != str(len(names)):
        raise DataError(f"{path}: nc is {values['nc']!r}, but there are {len(names)} names; correct one of them")
    return path, values, [str(name) for name in names]


def _read_lines(path: Path) -> list[str]:
    require_file(path, "text file")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _image_paths(split: YoloSplit) -> list[Path]:
    """The images of a split: of one folder, several, or a list file."""
    paths: list[Path] = []
    for place in split.places:
        if place.is_dir():
            paths += sorted(path for path in files_below(place) if not path.name.startswith("."))
        else:
            lines = enumerate(_read_lines(place), start=1)
            paths += [_place(line.strip(), split.root, f"{place}: line {n}") for n, line in lines if line.strip()]

    images = list(dict.fromkeys(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES))
    unread = [path for path in paths if path.suffix.lower() in PHOTOGRAPHS]
    others = [path for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES | {".txt", ".npy"}]
    allowed = ", ".join(sorted(IMAGE_SUFFIXES))
    if unread:
        raise DataError(
            f"{split.settings}: {len(unread)} images are in formats that cannot be read: {first_few(unread)}; allowed "
            f"are {allowed}: convert or remove them"
        )
    if others:
        logger.warning("%s: files left out by their ending: %s", split.settings, count_endings(others))
    if not images:
        raise DataError(f"{split.settings}: {split.name}: {first_few(split.places)} holds no images ({allowed})")
    return images


def _place(entry: Any, root: Path, source: Path | str) -> Path:
    """A path below `root`. Some tools write ../train/images for train/images: such dots are dropped."""
    if isinstance(entry, str):
        if "\\" in entry and not os.path.lexists(root / entry):
            entry = entry.replace("\\", "/")  # as Windows writes paths
        plain = PurePath(os.path.normpath(entry))
        if plain.is_relative_to(root.resolve()):
            plain = plain.relative_to(root.resolve())
        while plain.parts[:1] == (os.pardir,):
            plain = PurePath(*plain.parts[1:])
        if not plain.is_absolute() and (root / plain).exists():
            return root / plain
        if not plain.is_absolute() and os.pardir not in PurePath(entry).parts:
            raise DataError(f"{source}: {shorten(entry)}: no such file or folder in {root}")
    raise DataError(f"{source}: found {shorten(entry)}; needed is a path inside {root}")


def _label_file(image: Path, root: Path) -> Path:
    """labels/a/b.txt for images/a/b.jpg; where no folder is called images, the text file beside the image."""
    parts = list(image.relative_to(root).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return root.joinpath(*parts).with_suffix(".txt")


def _outlines(path: Path, classes: int) -> Iterator[tuple[int, np.ndarray]]:
    """Class and outline (P, 2), as shares of the sides, of every line of a label file; none where there is no file."""
    for place, line in enumerate(_read_lines(path) if path.exists() else [], start=1):
        words = line.split()
        if not words:
            continue
        name, count = f"{path}: line {place}", len(words) - 1
        if not words[0].isdecimal() or int(words[0]) >= classes:
            raise DataError(f"{name}: class {shorten(words[0])}; allowed are 0 to {classes - 1}, the places in 'names'")
        if count == 4:
            raise DataError(f"{name}: a box (class and 4 numbers), no outline; needed are at least 3 points x y")
        if count % 2 or count < 6:
            raise DataError(f"{name}: {count} numbers after the class; needed are x and y of at least 3 points")
        outline = [_share(word, name) for word in words[1:]]
        yield int(words[0]), np.clip(outline, 0.0, 1.0).reshape(-1, 2)


def _share(word: str, name: str) -> float:
    """The number in a word; `name` is what the message calls its line."""
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not -SLACK <= number <= 1 + SLACK:
        raise DataError(f"{name}: coordinate {shorten(word)}; allowed are shares of the image's sides, 0 to 1")
    return number
