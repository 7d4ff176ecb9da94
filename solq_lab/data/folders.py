"""Finding the annotations in a COCO-format folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from solq_lab.data.annotations import DataError


def find_annotations(data: str | Path, split: Literal["train", "val"] = "val") -> Path:
    """The instances file of a split.

    Args:
        data: a COCO-format folder, with annotations/instances_<split>*.json in it, or an annotation file, which is
            returned as it is.
        split: which pictures; no matter where `data` is a file.

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
