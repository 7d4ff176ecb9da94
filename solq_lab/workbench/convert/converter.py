"""Data sets of other formats as COCO-format folders; the images stay where they are and are linked."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

from solq_lab.data.annotations import DataError
from solq_lab.data.folders import Split
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.files import write_text
from solq_lab.workbench.convert.lvis import read_lvis
from solq_lab.workbench.convert.yolo import read_yolo

logger = logging.getLogger(__name__)


def convert_data(
    source: Path,
    target: Path,
    *,
    images: Path | None = None,
    split: Literal["train", "val"] | None = None,
    link: bool = True,
) -> list[Split]:
    """Write `annotations/instances_train.json` and `instances_val.json`, and links `train`, `val` to the images.

    Nothing is written before everything has been read and accepted by the loader's rules.

    Args:
        source: an LVIS annotation file (.json), or a YOLO segmentation folder or its data.yaml.
        target: COCO-format folder, made if it is missing; it may hold the other split already.
        images: with LVIS only: folder of COCO's train2017/ and val2017/.
        split: with LVIS only: which one it is; by default what the file's name says.
        link: make the links; False leaves only annotations, and the images have to be named in the experiment.

    Returns:
        The splits, with the folder of the images.

    Raises:
        DataError: something in the source cannot be used, or something is in the way.
    """
    if source.suffix == ".json":
        if images is None or not images.is_dir():
            raise DataError(f"{images or source}: --images needs the folder that holds COCO's train2017 and val2017")
        documents = {split or _split_in(source.stem): (images, read_lvis(source, images))}
    elif images is not None or split is not None:
        raise DataError(
            f"{source}: --images and --split belong to an LVIS file (.json); a YOLO folder says both itself"
        )
    else:
        documents = {part.name: (part.images, part.document) for part in read_yolo(source)}
    splits = []
    for name, (folder, document) in documents.items():
        place = Split(name, target / name if link else folder.resolve(), target / f"annotations/instances_{name}.json")
        _check(document, source, place, folder)
        splits.append(place)
    for place, (folder, document) in zip(splits, documents.values(), strict=True):
        _write(document, place)
        if link and not place.images.exists():
            place.images.symlink_to(folder.resolve(), target_is_directory=True)
    return splits


def _split_in(stem: str) -> Literal["train", "val"]:
    found = [name for name in ("train", "val") if name in stem]
    if len(found) != 1:
        raise DataError(f"{stem}.json: the name does not say whether this is train or val; say --split")
    return found[0]


def _check(document: dict[str, Any], source: Path, place: Split, folder: Path) -> None:
    """Refuse what the loader would refuse, and what is in the way."""
    if place.annotations.exists():
        raise DataError(f"{place.annotations}: exists and is not written over; remove it or give another folder")
    linked = place.images.exists() and place.images.resolve() == folder.resolve()
    if (place.images.exists() or place.images.is_symlink()) and not linked:
        raise DataError(f"{place.images}: exists and does not lead to {folder}; remove it or give another folder")
    GroundTruth(document, source=source)


def _write(document: dict[str, Any], place: Split) -> None:
    place.annotations.parent.mkdir(parents=True, exist_ok=True)
    write_text(place.annotations, json.dumps(document))
    counts = len(document["images"]), len(document["annotations"]), len(document["categories"])
    logger.info("%s: %d images, %d objects, %d classes", place.annotations, *counts)
