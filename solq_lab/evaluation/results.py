"""Detections as COCO results, in memory and in files, for evaluation and test servers."""

import contextlib
import dataclasses
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from solq_lab.data.annotations import DataError
from solq_lab.data.classes import ClassMap
from solq_lab.files import replacing
from solq_lab.structures import Detections

_NEEDED = ("image_id", "category_id", "score")
_SHAPES = {"box": "bbox", "segm": "segmentation"}
_WRITTEN_AT_ONCE = 10_000


def detections_to_results(detections: Detections, image_id: int, classes: ClassMap) -> list[dict]:
    """COCO results of one image, as `Detections.to_coco` makes them, with the categories of `classes`."""
    category_ids = [classes.category_ids[label] for label in detections.labels.tolist()]
    return dataclasses.replace(detections, category_ids=category_ids).to_coco(image_id)


def write_results(path: str | Path, results: Sequence[dict], *, kind: Literal["all", "box", "segm"] = "all") -> None:
    """Writes results as JSON, gzipped where the name ends in .gz; the file appears complete or not at all.

    Args:
        path: .json or .json.gz
        results: as `detections_to_results` makes them.
        kind: "box" and "segm" keep only the shape that this COCO challenge reads. A mask submission must not contain
            boxes: the server would take an object's area, and so its size, from them.

    Raises:
        ValueError: another file ending, or results that lack the wanted shape.
    """
    path = Path(path)
    _check_name(path)
    if kind != "all":
        wanted = _SHAPES[kind]
        if any(wanted not in result for result in results):
            raise ValueError(
                f"{path}: a {kind} result file needs {wanted!r} in every result; these come from a plain detector"
            )
    left_out = set() if kind == "all" else set(_SHAPES.values()) - {_SHAPES[kind]}

    with replacing(path) as temporary, contextlib.ExitStack() as opened:
        file: BinaryIO | gzip.GzipFile = opened.enter_context(temporary.open("wb"))
        if path.suffix == ".gz":  # without a time stamp inside, so that equal results give equal files
            packed = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0)
            file = opened.enter_context(packed)
        file.write(b"[")
        for start in range(0, len(results), _WRITTEN_AT_ONCE):  # the whole text at once could be half a gigabyte
            kept = [
                {key: value for key, value in result.items() if key not in left_out}
                for result in results[start : start + _WRITTEN_AT_ONCE]
            ]
            text = json.dumps(kept, separators=(",", ":"), allow_nan=False)
            file.write((("," if start else "") + text[1:-1]).encode())
        file.write(b"]")


def read_results(path: str | Path) -> list[dict]:
    """The results in a .json or .json.gz file.

    Raises:
        DataError: no such file, not JSON, or not a list of COCO results; the message names the first bad entry.
        ValueError: another file ending.
    """
    path = Path(path)
    _check_name(path)
    try:
        content = path.read_bytes()
        results = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as COCO results: {error}") from None

    if not isinstance(results, list):
        raise DataError(f"{path}: found a {type(results).__name__}, allowed is a list of results")
    for number, result in enumerate(results):
        missing = [key for key in _NEEDED if key not in result] if isinstance(result, dict) else list(_NEEDED)
        if missing or not any(shape in result for shape in _SHAPES.values()):
            lacking = ", ".join(missing) or "bbox or segmentation"
            raise DataError(
                f"{path}: result {number} lacks {lacking}: {str(result)[:100]}; allowed are COCO detection results"
            )
    return results


def _check_name(path: Path) -> None:
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(f"{path}: results are kept as .json or .json.gz; rename the file")
