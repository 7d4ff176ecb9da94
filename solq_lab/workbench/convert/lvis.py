"""LVIS annotation files as COCO ones. LVIS has COCO's images, its own classes, and no file names but addresses.

LVIS says for each image which classes were looked for in vain (`neg_category_ids`) and which were not labelled
everywhere (`not_exhaustive_category_ids`). Both stay in the file; COCO's evaluation, used here, does not read them.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from solq_lab.data.annotations import DataError, check_image_entry, read_annotations, shorten

logger = logging.getLogger(__name__)


def read_lvis(annotations: Path, images: Path) -> dict[str, Any]:
    """The COCO document of an LVIS file.

    Args:
        annotations: LVIS file, any version.
        images: folder that holds COCO's train2017/ and val2017/, from both of which LVIS takes images, or all of
            them directly.

    Raises:
        DataError: not such a file, or an image without a usable name.
    """
    document = read_annotations(annotations)
    entries = [_image(entry, place, annotations, images) for place, entry in enumerate(document["images"])]
    partly = sum(bool(entry.get("not_exhaustive_category_ids")) for entry in entries)
    if partly:
        logger.warning(
            "%s: %d images have classes that are not labelled everywhere; COCO's AP counts these finds as wrong",
            annotations,
            partly,
        )
    objects = [{"iscrowd": 0} | entry if isinstance(entry, dict) else entry for entry in document["annotations"]]
    return document | {"images": entries, "annotations": objects}


def _image(entry: Any, place: int, annotations: Path, images: Path) -> dict[str, Any]:
    """An entry of `images` with its file name below `images`, from its own name or its address."""
    if isinstance(entry, dict) and not isinstance(entry.get("file_name"), str):
        address = entry.get("coco_url")
        parts = PurePosixPath(urlsplit(address).path).parts[-2:] if isinstance(address, str) else ()
        if len(parts) < 2:
            raise DataError(
                f"{annotations}: images[{place}]: found {shorten(entry)}; needed is a text 'file_name', or 'coco_url' "
                "with folder and name of the image"
            )
        folder, name = parts
        entry = entry | {"file_name": f"{folder}/{name}" if (images / folder).is_dir() else name}
    check_image_entry(entry, place, annotations)
    return entry
