"""A drawn data set of shapes in COCO format, the same on every machine for one seed."""

import json
import logging
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from solq_lab import masks
from solq_lab.bars import progress_bar
from solq_lab.data.annotations import DataError
from solq_lab.data.shapes.scene import LEVELS, draw_scene
from solq_lab.workers import in_processes

logger = logging.getLogger(__name__)

VERSION = 1  # of the drawings: another number, other images for the same seed
STAMP = "shapes.json"  # the settings of a folder; it is written last
SPLITS = ("train", "val")


def write_shapes(
    root: Path | str,
    *,
    level: Literal["easy", "hard"] = "easy",
    train: int = 6000,
    val: int = 200,
    seed: int = 0,
    processes: int = 2,
) -> None:
    """Draw a data set into a folder: `train/`, `val/` and `annotations/instances_{train,val}.json`.

    The folder appears whole or not at all. One that already holds these settings is kept.

    Args:
        root: folder to make.
        level: "easy": 96 x 96 pixels, 8 classes, little turned, from 24 pixels; "hard": 128 x 128 pixels, 16 classes,
            turned at will, from 14 pixels.
        train, val: numbers of images.
        seed: of the drawings; the number of processes has no influence on them.
        processes: how many draw at the same time.

    Raises:
        DataError: the folder holds something else, or the level is unknown.
    """
    root = Path(root)
    if level not in LEVELS:
        raise DataError(f"level {level!r} does not exist; allowed are {', '.join(LEVELS)}")
    settings = {"generator": VERSION, "level": level, "train": train, "val": val, "seed": seed}
    if _already_there(root, settings):
        logger.info("%s holds these shapes already", root)
        return

    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        (unfinished / "annotations").mkdir()
        for split, count in zip(SPLITS, (train, val), strict=True):
            document = _write_split(unfinished / split, split, count, settings, processes)
            (unfinished / "annotations" / f"instances_{split}.json").write_text(json.dumps(document), encoding="utf-8")
        (unfinished / STAMP).write_text(json.dumps(settings), encoding="utf-8")
        unfinished.chmod(0o755)  # temporary folders are private, data sets are not
        try:
            os.replace(unfinished, root)
        except OSError:  # another process may have drawn the same in the meantime
            if not _already_there(root, settings):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _already_there(root: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds these shapes; DataError where it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{root}: holds something else than drawn shapes; give an empty or a new folder") from None
    if found == settings:
        return True

    found = found if isinstance(found, dict) else {}
    differing = "; ".join(
        f"{key}: found {found.get(key)!r}, asked {value!r}"
        for key, value in settings.items()
        if found.get(key) != value
    )
    raise DataError(f"{root}: holds other shapes ({differing}); give another folder or remove this one")


def _write_split(folder: Path, split: str, count: int, settings: dict[str, Any], processes: int) -> dict[str, Any]:
    """Draw the images of one split; the annotation document."""
    level = LEVELS[settings["level"]]
    folder.mkdir()
    work = folder, settings["level"], (settings["seed"], SPLITS.index(split))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with closing(in_processes(_draw, work, range(1, count + 1), processes)) as drawings:
        progress = progress_bar(drawings, total=count, desc=f"drawing {split}", unit="image")
        for number, entries in enumerate(progress, start=1):
            name = _file_name(number)
            images.append({"id": number, "file_name": name, "height": level.side, "width": level.side})
            for entry in entries:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})

    return {
        "info": {
            "description": f"Drawn shapes, level {settings['level']}, {split}",
            "version": str(settings["generator"]),
            "seed": settings["seed"],
            "object_side": list(level.object_side),
            "area_sides": [level.side / 6, level.side / 3],  # below the first: small; below the second: medium
        },
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(level.classes, start=1)
        ],
    }


def _draw(work: tuple[Path, str, tuple[int, int]], number: int) -> list[dict[str, Any]]:
    """Draw one image and write its file; `work` is the folder, the level and the seed of the split.

    Returns:
        The COCO entries of the image's objects, without ids.
    """
    folder, level, seed = work
    scene = draw_scene(LEVELS[level], np.random.default_rng((*seed, number)))
    Image.fromarray(scene.image).save(folder / _file_name(number), compress_level=1)

    entries = []
    rles = masks.encode_rle(torch.from_numpy(scene.masks))
    for class_index, mask, rle in zip(scene.classes, scene.masks, rles, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        top, left = int(rows[0]), int(columns[0])
        entries.append(
            {
                "category_id": class_index + 1,
                "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return entries


def _file_name(number: int) -> str:
    return f"{number:06d}.png"
