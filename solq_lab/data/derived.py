"""Annotation files that are made of others, and kept in a cache until these change.

A YOLO folder is read as COCO documents, and a file without a val split is divided at random. Everything that works on
annotation files works on both so. The cache is $XDG_CACHE_HOME/solq_lab/annotations, by default in ~/.cache.
"""

import itertools
import json
import os
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from solq_lab.data.annotations import read_annotations
from solq_lab.data.yolo import find_yolo
from solq_lab.errors import DataError
from solq_lab.files import write_text

VERSION = 1  # of the documents; a larger one makes those in the cache anew


def annotation_file(path: Path, val_fraction: float = 0.0) -> Path:
    """The COCO file at a path; for FILE#PART the one that is made of this part.

    Args:
        path: a COCO file, returned as it is; or FILE#PART as in `data.folders`.
        val_fraction: share of the images that is the part val of a COCO file.

    Raises:
        DataError: the part cannot be made.
    """
    whole, sign, part = str(path).rpartition("#")
    if not sign or path.exists():
        return path
    source = annotation_file(Path(whole))  # a split of a data.yaml may be divided too
    if not source.is_file():
        raise DataError(f"{source}: no such annotation file; check data.root and the names in the data section")

    if source.suffix in (".yaml", ".yml"):
        split = next((split for split in find_yolo(source) if split.name == part), None)
        if split is None:
            raise DataError(f"{source}: no split {part!r}; add it, or name another one")
        facts: list[Any] = [_stamp(file) for file in itertools.chain([source], *split.files().items())]
        make = split.document
    else:
        facts = [val_fraction, _stamp(source)]
        make = partial(_part_of, source, part, val_fraction)

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solq_lab" / "annotations"
    key = blake2b(json.dumps([VERSION, str(source.resolve()), facts]).encode(), digest_size=8).hexdigest()
    made = folder / f"{source.parent.resolve().name}-{key}" / f"instances_{part}.json"
    if not made.exists():
        write_text(made, json.dumps(make()))
    return made


def _stamp(path: Path) -> list[Any]:
    """What changes when a file does; nothing where there is no file."""
    facts = [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else []
    return [str(path), *facts]


def _part_of(source: Path, part: str, val_fraction: float) -> dict[str, Any]:
    """The part train or val of a COCO file: images in the order of a hash of their names, so that it never changes."""
    document = read_annotations(source)
    entries = list(document["images"])
    if part not in ("train", "val") or not 0 < val_fraction < 1:
        raise DataError(f"{source}#{part}: the parts are train and val, and data.val_fraction lies between 0 and 1")
    if len(entries) < 2:
        raise DataError(f"{source}: {len(entries)} images cannot be divided into train and val; two are needed")

    names = [str(entry.get("file_name")) if isinstance(entry, dict) else "" for entry in entries]
    order = sorted(range(len(entries)), key=lambda place: blake2b(names[place].encode("utf-8", "replace")).digest())
    count = min(max(round(val_fraction * len(entries)), 1), len(entries) - 1)
    chosen = set(order[:count])

    # What cannot be used stays in train, where the loader names it.
    val_ids = {repr(entries[place].get("id")) for place in chosen if isinstance(entries[place], dict)}

    def belongs(entry: Any) -> bool:
        in_val = isinstance(entry, dict) and repr(entry.get("image_id")) in val_ids
        return in_val == (part == "val")

    images = [entry for place, entry in enumerate(entries) if (place in chosen) == (part == "val")]
    return document | {"images": images, "annotations": [entry for entry in document["annotations"] if belongs(entry)]}
