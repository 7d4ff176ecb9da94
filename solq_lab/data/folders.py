"""Finding the annotations in a COCO-format folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from solq_lab.data.annotations import DataError


class Split(NamedTuple):
    """A part of a data set: its name, the folder of its images, and its annotation file."""

    name: str
    images: Path
    annotations: Path


def find_annotations(data: str | Path, split: Literal["train", "val"] = "val") -> Path:
    """The instances file of a split.

    Args:
        data: a COCO-format folder, with annotations/instances_<split>*.json in it, or an annotation file, which is
            returned as it is.
        split: which images; no matter where `data` is a file.

    Raises:
        DataError: there is nothing, no such file in the folder, or more than one.
    """
    data = Path(data)
    if data.is_file():
        return data
    if not data.is_dir():
        raise DataError(f"{data}: no such folder or annotation file; give a COCO-format folder or its .json file")
    pattern = f"instances_{split}*.json"
    found = sorted(data.glob(f"annotations/{pattern}"))
    if len(found) == 1:
        return found[0]
    names = found or sorted(data.rglob("*.json"))
    there = ", ".join(str(path.relative_to(data)) for path in names[:8]) or "no .json file"
    wanted = "needed is exactly one" if found else f"no annotations/{pattern}"
    raise DataError(f"{data}: {wanted} for split {split!r}, found {there}; name the annotation file itself")


def find_splits(data: Path | str, images: Path | None = None) -> tuple[Split, ...]:
    """The splits of a COCO-format folder, or the one of an annotation file.

    Images of annotations/instances_NAME.json are looked for in NAME/, then in images/NAME/, images/, and beside.

    Args:
        data: folder with annotations/instances_train*.json, instances_val*.json or both; or an annotation file.
        images: folder of the images; by default as above.

    Raises:
        DataError: there are no annotations, or no folder of images.
    """
    data = Path(data)
    if data.is_file():
        return (Split(data.stem, images or _image_folder(data), data),)
    both: tuple[Literal["train", "val"], ...] = ("train", "val")
    names = [name for name in both if any(data.glob(f"annotations/instances_{name}*.json"))]
    splits = []
    for name in names or both[:1]:
        annotations = find_annotations(data, name)
        splits.append(Split(name, images or _image_folder(annotations), annotations))
    return tuple(splits)


def _image_folder(annotations: Path) -> Path:
    name = annotations.stem.removeprefix("instances_")
    root = annotations.parent.parent if annotations.parent.name == "annotations" else annotations.parent
    candidates = [root / name, root / "images" / name, root / "images", annotations.parent / name]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        tried = ", ".join(map(str, candidates))
        raise DataError(f"{annotations}: no folder of its images ({tried}); name it with --images")
    return found
