"""Discovery of the annotations and images in a data folder, whatever tool exported it. Loads without torch.

- COCO: annotations/instances_NAME.json or NAME.json, also without annotations/; images in NAME/, images/NAME/, images/
- Roboflow: NAME/ with _annotations.coco.json, or with one JSON file of any name, beside its images
- CVAT: the only JSON file with images in it, as annotations/instances_default.json
- YOLO segmentation: data.yaml with class names and folders of images

NAME begins with train, val (or valid, validation) or test. A part of a file is written FILE#PART: the split of a
data.yaml, or the train or val part of a file that `data.val_fraction` divides.
"""

import json
import mmap
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from solq_lab.data.kinds import Orientation
from solq_lab.data.yolo import SETTINGS, find_yolo, is_yolo
from solq_lab.errors import DataError

ROBOFLOW = "_annotations.coco.json"
PARTS = ("train", "val", "test")
ARCHIVES = (".7z", ".gz", ".rar", ".tar", ".tgz", ".zip")
_PART = re.compile(r"(train|val|test)(?:ing|id|idation)?(?![a-z])", re.IGNORECASE)
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


class Split(NamedTuple):
    """A part of a data set: its name, the folder of its images, and its annotation file."""

    name: str
    images: Path
    annotations: Path
    # how the annotations count the pixels of images with an EXIF orientation; None where nobody has said
    orientation: Orientation | None = None


class _Found(NamedTuple):
    """One split as a layout has it; `images` is None where no folder of its images is found."""

    name: str
    images: Path | None
    annotations: Path


def find_splits(
    data: Path | str,
    images: Path | None = None,
    val_fraction: float = 0.0,
    orientation: Orientation | None = None,
) -> tuple[Split, ...]:
    """The splits of a data folder, train first, or the one of an annotation file, ready to be read.

    Args:
        data: folder in one of the layouts above; or an annotation file, COCO's or a data.yaml.
        images: folder of the images; by default found.
        val_fraction: share of the images that becomes val where the folder has one split only; 0: none.
        orientation: see `Split`.

    Raises:
        DataError: there are no annotations or no folder of images, or more than one reading of the folder.
    """
    splits, there = [], _find_one_each(Path(data), val_fraction)
    from solq_lab.data.derived import annotation_file  # torch: not for a wrong folder

    for found in there:
        folder = images or found.images
        if folder is None:
            raise DataError(f"{found.annotations}: no folder with its images; name it with --images")
        splits.append(Split(found.name, folder, annotation_file(found.annotations, val_fraction), orientation))
    return tuple(splits)


def found_names(data: Mapping[str, Any]) -> dict[str, str]:
    """The keys of an experiment's section data that name images and annotations and are empty, and what is found there.

    What is missing or has several readings is left out; `explain_missing` says why.
    """
    keys = [f"{name}_{kind}" for name in ("train", "val") for kind in ("images", "annotations")]
    empty = [key for key in keys if not data[key]]
    if not empty or not (data["root"] or data["generate"] != "none"):
        return {}
    if data["generate"] != "none":
        written = {f"{name}_annotations": f"annotations/instances_{name}.json" for name in ("train", "val")}
        return {key: written.get(key, key.partition("_")[0]) for key in empty}

    names, root, val_fraction = {}, Path(data["root"]), data["val_fraction"]
    try:
        splits = _find(root, val_fraction)
    except DataError:
        splits = []
    found = {split.name: split for split in splits if [other.name for other in splits].count(split.name) == 1}
    for name in ("train", "val"):
        own = data[f"{name}_annotations"]
        if val_fraction and data["train_annotations"] and not data["val_annotations"]:  # divides the named file
            own = f"{data['train_annotations'].partition('#')[0]}#{name}"
            names[f"{name}_annotations"] = own
        whole = root / own.partition("#")[0]
        split = _Found(name, _image_folder(whole), root / own) if own else found.get(name)
        if split is not None:
            paths = {f"{name}_images": split.images, f"{name}_annotations": split.annotations}
            names |= {key: _relative(path, root) for key, path in paths.items() if key in empty and path is not None}
    return names


def explain_missing(root: Path, name: str, val_fraction: float = 0.0) -> DataError:
    """Why `found_names` has found nothing for a split, and what helps."""
    try:
        for fraction in (0.0, val_fraction):  # a folder with several readings cannot be divided either
            found = _find_one_each(root, fraction)
    except DataError as error:
        return error
    split = next((split for split in found if split.name == name), None)
    if split is not None:
        return DataError(f"{split.annotations}: no folder with its images; name it with data.{name}_images=FOLDER")
    cure = f"name them with data.{name}_images=FOLDER data.{name}_annotations=FILE"
    if val_fraction == 0 and name != "test":
        cure += ", or split the images at random with data.val_fraction=0.1"
    return DataError(f"{root}: no split {name!r}, only {_describe(found, root)}; {cure}")


def _find_one_each(data: Path, val_fraction: float) -> list[_Found]:
    """The splits of a folder or file, where each is found once."""
    splits = _find(data, val_fraction)
    for name in {split.name for split in splits}:
        same = [[split] for split in splits if split.name == name]
        if len(same) > 1:
            what = f"{len(same)} annotation files for {name}" if name in PARTS else f"{len(same)} annotation files"
            raise _ambiguous(data, same, f"has {what}: {_describe(splits, data)}")
    return splits


def _find(data: Path, val_fraction: float) -> list[_Found]:
    """The splits of the only layout of a folder, or of a file; train, val and test first."""
    if data.is_file():
        if data.suffix.lower() in ARCHIVES:
            raise DataError(f"{data}: an archive; unpack it, and name the folder")
        if data.suffix in (".yaml", ".yml"):
            found = list(_yolo_splits(data))
        else:
            stem = _stem(data)
            found = [_Found(_part_of(stem) or _part_of(data.resolve().parent.name) or stem, _image_folder(data), data)]
    elif data.is_dir():
        found = _only_reading(data)
    else:
        raise DataError(f"{data}: no such folder or annotation file; give a data folder or its annotation file")

    if val_fraction > 0:
        found = _divide(data, found, val_fraction)
    return sorted(found, key=lambda split: (PARTS.index(split.name) if split.name in PARTS else 3, split.name))


def _divide(data: Path, found: list[_Found], val_fraction: float) -> list[_Found]:
    """Train and val parts of the only split beside test."""
    rest = [split for split in found if split.name != "test"]
    if len(rest) != 1:
        raise DataError(
            f"{data}: to divide one annotation file into train and val (data.val_fraction), name it with "
            f"data.train_annotations; there are {_describe(found, data)}"
        )
    (whole,) = rest
    parts = [_Found(name, whole.images, Path(f"{whole.annotations}#{name}")) for name in ("train", "val")]
    return parts + [split for split in found if split.name == "test"]


def _only_reading(root: Path) -> list[_Found]:
    """The splits of the one layout that a folder has."""
    readings = _readings(root)
    if not readings:
        inner = next((child for child in _listed(root) if child.is_dir() and _readings(child)), None)
        there = ", ".join(path.name for path in _listed(root)[:8]) or "nothing"
        hint = f"did you mean {inner}?" if inner else "name the annotation file itself"
        if packed := [path for path in (*root.glob("*"), *root.glob("*/*")) if path.suffix.lower() in ARCHIVES]:
            hint = f"unpack {packed[0]}"
        raise DataError(
            f"{root}: no annotations found; needed is annotations/instances_NAME.json, NAME/{ROBOFLOW}, one COCO file "
            f"(.json), or a YOLO data.yaml; it holds {there}; {hint}"
        )

    if len(readings) > 1:
        listed = [_describe(found, root) for found in readings]
        raise _ambiguous(root, readings, f"can be read as {' or as '.join(listed)}")
    return readings[0]


def _ambiguous(root: Path, readings: Sequence[Sequence[_Found]], what: str) -> DataError:
    """The error of a folder with several readings, each with the settings that choose it."""
    choices = []
    for found in readings:
        named = []
        for split in found:
            name = "train" if split.name == "all" else split.name
            paths = {"images": split.images or "FOLDER", "annotations": split.annotations}
            named += [f"data.{name}_{key}={_relative(Path(path), root)}" for key, path in paths.items()]
        choices.append(shlex.join(named))
    return DataError(f"{root}: {what}; remove what is not meant, or choose by name: {' | '.join(choices)}")


def _readings(root: Path) -> list[list[_Found]]:
    """What each layout finds in a folder, without those that find nothing."""
    files = [*_json_files(root / "annotations"), *_json_files(root)]
    named = [(_part_of(_stem(path)), path) for path in files]
    coco = [_Found(name, _image_folder(path), path) for name, path in named if name is not None]
    readings = [coco, list(_folder_splits(root)), list(_yolo_splits(root))]
    if not any(readings):  # no file is called after a split; several are ambiguous
        readings = [[_Found("all", _image_folder(path), path) for path in files if first_file_name(path) is not None]]
    return [found for found in readings if found]


def _folder_splits(root: Path) -> Iterator[_Found]:
    """Folders that are called after their splits, with an annotation file in each."""
    for folder in _listed(root):
        name = _part_of(folder.name)
        if name is None or not folder.is_dir():
            continue
        files = [*_json_files(folder), *_json_files(folder / "annotations")]
        files = [path for path in files if path.name == ROBOFLOW] or files
        if len(files) == 1 and first_file_name(files[0]) is not None:
            yield _Found(name, _image_folder(files[0]), files[0])


def _yolo_splits(data: Path) -> Iterator[_Found]:
    """The splits that a data.yaml names; `data` is it or its folder. Without class names it is another file."""
    path = data if data.is_file() else next((data / name for name in SETTINGS if (data / name).is_file()), None)
    if path is not None and (data.is_file() or is_yolo(path)):
        for split in find_yolo(path):
            yield _Found(split.name, split.images, Path(f"{path}#{split.name}"))


def _image_folder(annotations: Path) -> Path | None:
    """The folder in which the first image of an annotation file lies, else one that is called like the file."""
    inside = annotations.parent
    root = inside.parent if inside.name == "annotations" else inside
    stem = _stem(annotations)
    names = [stem, *(("val", "valid", "validation") if _part_of(stem) == "val" else ())]
    places = [root / name for name in names] + [root / "images" / name for name in names]
    places += [root / "images", root / "data", inside, root]
    folders = [place for place in places if place.is_dir()]

    first = first_file_name(annotations) if annotations.is_file() else None
    if first is not None and not Path(first).is_absolute():
        below = [place for folder in (root / "images", root) for place in _listed(folder) if place.is_dir()]
        for folder in [*folders, *below]:
            if (folder / first).is_file():
                return folder
    return next((folder for folder in folders if folder not in (inside, root)), None)


def first_file_name(path: Path) -> str | None:
    """The name of the first image in a COCO file, without reading all of it; None where it names no image."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            found = _FILE_NAME.search(text)
            return None if found is None else json.loads(found[1])
    except (OSError, ValueError):  # ValueError: an empty file, or no text
        return None


def _part_of(name: str) -> str | None:
    """train, val or test, where a name begins so."""
    found = _PART.match(name)
    return found[1].lower() if found else None


def _stem(path: Path) -> str:
    return path.stem.removeprefix("instances_")


def _json_files(folder: Path) -> list[Path]:
    return [path for path in _listed(folder) if path.suffix.lower() == ".json" and path.is_file()]


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, without what archives of macOS add."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX")


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _describe(found: Sequence[_Found], root: Path) -> str:
    """Splits and their annotation files, on one line."""
    return ", ".join(f"{split.name} ({_relative(split.annotations, root)})" for split in found)
