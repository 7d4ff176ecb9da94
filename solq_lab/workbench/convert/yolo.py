"""YOLO segmentation folders as COCO documents: images/, labels/ with one text file per image, and data.yaml.

A line of a label file is one object: its class, then x y x y ... of its outline, as shares of the image's sides.
Training tools that use this format turn an image by its EXIF mark first; here pixels count as they are stored, so the
outlines are turned back.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import yaml
from PIL import Image
from pycocotools import mask as coco_rle
from tqdm.auto import tqdm

from solq_lab.data.annotations import FIRST_FEW, DataError, shorten
from solq_lab.masks import segmentation_to_rle

logger = logging.getLogger(__name__)

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".gif"])  # what the loader reads
SETTINGS = ("data.yaml", "data.yml", "dataset.yaml")
SLACK = 0.01  # shares of a side that an outline may leave its image by, for roundings; it is cut off there
DIGITS = 2  # of pixel coordinates, as in COCO
ORIENTATION = 0x0112  # the EXIF tag
Point = tuple[float, float]

# From the turned image back to the stored one, in shares of the sides; by EXIF orientation
TURNS: dict[int, Callable[[float, float], Point]] = {
    1: lambda x, y: (x, y),
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (y, 1 - x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (1 - y, x),
}


class YoloSplit(NamedTuple):
    """One split: the folder of its images, and their COCO document."""

    name: str
    images: Path
    document: dict[str, Any]


def read_yolo(source: Path) -> list[YoloSplit]:
    """The splits train and val of a YOLO segmentation folder.

    Everything is read from this folder: `path` in data.yaml is not followed, and entries must not leave it.

    Args:
        source: the folder, or its data.yaml.

    Raises:
        DataError: a file cannot be read, or a line is no outline; the message names the file and the line.
    """
    settings = source if source.is_file() else _settings_in(source)
    values = _read_settings(settings)
    names = _class_names(values, settings)
    splits = []
    for name, keys in (("train", ("train",)), ("val", ("val", "valid"))):
        entry = next((values[key] for key in keys if values.get(key)), None)
        if entry is not None:
            folder, paths = _image_paths(entry, settings.parent, settings)
            splits.append(YoloSplit(name, folder, _document(name, folder, paths, settings.parent, names)))
    if not splits:
        raise DataError(f"{settings}: neither 'train' nor 'val'; needed are folders of images under these keys")
    return splits


def _settings_in(folder: Path) -> Path:
    for name in SETTINGS:
        if (folder / name).is_file():
            return folder / name
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise DataError(f"{folder}: no data.yaml with the class names (found {found or 'nothing'}); add it or name it")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: found a {type(values).__name__}, needed are the keys names, train and val")
    return values


def _class_names(values: dict[str, Any], path: Path) -> list[str]:
    names = values.get("names")
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{path}: names: found {shorten(names)}; needed is a list, or a mapping from 0, 1, ... on")
    if values.get("nc", len(names)) != len(names):
        raise DataError(f"{path}: nc is {values['nc']!r}, but there are {len(names)} names; correct one of them")
    return [str(name) for name in names]


def _image_paths(entry: Any, root: Path, settings: Path) -> tuple[Path, list[Path]]:
    """The folder that images of a split are named from, and the images: of one folder, several, or a list file."""
    entries = entry if isinstance(entry, list) else [entry]
    places = [_place(each, root, settings) for each in entries]
    images: list[Path] = []
    for place in places:
        if place.is_dir():
            images += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        else:
            images += _listed(place, root)
    if not images:
        raise DataError(f"{settings}: {shorten(entry)} holds no images ({', '.join(sorted(SUFFIXES))})")
    return (places[0] if len(places) == 1 and places[0].is_dir() else root), list(dict.fromkeys(images))


def _place(entry: Any, root: Path, source: Path | str) -> Path:
    """A path below `root`. Some tools write ../train/images for train/images: such dots are dropped."""
    if isinstance(entry, str):
        plain = PurePath(os.path.normpath(entry))
        while plain.parts[:1] == (os.pardir,):
            plain = PurePath(*plain.parts[1:])
        if not plain.is_absolute() and (root / plain).exists():
            return root / plain
        if not plain.is_absolute() and os.pardir not in PurePath(entry).parts:
            raise DataError(f"{source}: {shorten(entry)}: no such file or folder in {root}")
    raise DataError(f"{source}: found {shorten(entry)}; needed is a path inside {root}")


def _listed(path: Path, root: Path) -> list[Path]:
    """The images that a text file lists, one in a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return [_place(line.strip(), root, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _document(split: str, folder: Path, paths: Sequence[Path], root: Path, names: Sequence[str]) -> dict[str, Any]:
    entries, objects, labels = [], [], set()
    for number, path in enumerate(tqdm(paths, desc=f"reading {split}", unit="image"), start=1):
        width, height, orientation = _measure(path)
        file_name = path.relative_to(folder).as_posix()
        entries.append({"id": number, "file_name": file_name, "height": height, "width": width})
        label = _label_file(path, root)
        labels.add(label)
        for category, outline in _outlines(label, len(names)):
            turned = (TURNS[orientation](x, y) for x, y in outline)
            polygon = [(round(x * width, DIGITS), round(y * height, DIGITS)) for x, y in turned]
            objects.append(_object(len(objects) + 1, number, category, polygon, (height, width)))
    _name_leftovers(labels)
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    return {"images": entries, "annotations": objects, "categories": categories}


def _measure(path: Path) -> tuple[int, int, int]:
    """Width and height of an image as it is stored, pixels, and its EXIF orientation."""
    try:
        with Image.open(path) as opened:
            orientation = opened.getexif().get(ORIENTATION, 1)
            return opened.width, opened.height, orientation if orientation in TURNS else 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not an image that can be read ({error}); fetch it again or remove it") from None


def _label_file(image: Path, root: Path) -> Path:
    """labels/a/b.txt for images/a/b.jpg; where no folder is called images, the text file beside the image."""
    parts = list(image.relative_to(root).parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return root.joinpath(*parts).with_suffix(".txt")


def _outlines(path: Path, classes: int) -> Iterator[tuple[int, list[Point]]]:
    """Class and outline, as shares of the sides, of every line of a label file; none where there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield _parse(line.split(), classes)
            except ValueError as error:
                raise DataError(f"{path}: line {number}: {error}") from None


def _parse(words: Sequence[str], classes: int) -> tuple[int, list[Point]]:
    """Class and outline in the words of a line. Raises ValueError with what is wrong."""
    if not words[0].isdecimal() or int(words[0]) >= classes:
        raise ValueError(f"class {shorten(words[0])}; allowed are 0 to {classes - 1}, the places in 'names'")
    if len(words) == 5:
        raise ValueError("a box (class and 4 numbers), no outline; needed are at least 3 points x y")
    if len(words) % 2 == 0 or len(words) < 7:
        raise ValueError(f"{len(words) - 1} numbers after the class; needed are x and y of at least 3 points")
    numbers = []
    for word in words[1:]:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not -SLACK <= number <= 1 + SLACK:
            raise ValueError(f"coordinate {shorten(word)}; allowed are shares of the image's sides, 0 to 1")
        numbers.append(min(max(number, 0.0), 1.0))
    return int(words[0]), list(zip(numbers[::2], numbers[1::2], strict=True))


def _object(number: int, image: int, category: int, polygon: Sequence[Point], size: tuple[int, int]) -> dict[str, Any]:
    """A COCO annotation of one polygon, pixels of an image of `size` (height, width)."""
    xs, ys = [x for x, _ in polygon], [y for _, y in polygon]
    flat = [coordinate for point in polygon for coordinate in point]
    left, top = min(xs), min(ys)
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, round(max(xs) - left, DIGITS), round(max(ys) - top, DIGITS)],
        "area": int(coco_rle.area(segmentation_to_rle([flat], size))),
        "iscrowd": 0,
        "segmentation": [flat],
    }


def _name_leftovers(used: set[Path]) -> None:
    """Say which label files belong to no image: a misspelt name would lose its objects unseen."""
    there = {path for folder in {path.parent for path in used} for path in folder.glob("*.txt")}
    left = sorted(path for path in there - used if path.name != "classes.txt")
    if left:
        first = ", ".join(map(str, left[:FIRST_FEW])) + (", ..." if len(left) > FIRST_FEW else "")
        logger.warning("%d label files belong to no image and are left out: %s", len(left), first)
