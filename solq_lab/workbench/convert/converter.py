"""Data sets of other formats as COCO-format folders; the images stay where they are and are linked."""

import json
import logging
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from solq_lab.data.annotations import DataError, check_image_entry, read_annotations, shorten
from solq_lab.data.folders import Split
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data.yolo import find_yolo
from solq_lab.files import write_text

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
        split: with LVIS only: which one it is; by default as in the file's name.
        link: make the links; False leaves only annotations, and the images have to be named in the experiment.

    Returns:
        The splits, with the folder of the images.

    Raises:
        DataError: something in the source cannot be used, or something is in the way.
    """
    if source.suffix == ".json":
        if images is None or not images.is_dir():
            raise DataError(f"{images or source}: --images needs the folder that holds COCO's train2017 and val2017")
        names: list[str] = [split] if split else [name for name in ("train", "val") if name in source.stem]
        if len(names) != 1:
            raise DataError(f"{source.name}: the name does not tell train from val; give --split")
        documents: dict[str, tuple[Path, dict]] = {names[0]: (images, read_lvis(source, images))}
    elif images is not None or split is not None:
        raise DataError(f"{source}: --images and --split belong to an LVIS file (.json); a YOLO folder has both itself")
    else:
        documents = {part.name: (part.images, part.document()) for part in find_yolo(source)}

    # Check everything, also what is in the way, before anything is written.
    splits = []
    for name, (folder, document) in documents.items():
        place = Split(name, target / name if link else folder.resolve(), target / f"annotations/instances_{name}.json")
        if place.annotations.exists():
            raise DataError(f"{place.annotations}: exists and is not written over; remove it or give another folder")
        linked = place.images.exists() and place.images.resolve() == folder.resolve()
        if (place.images.exists() or place.images.is_symlink()) and not linked:
            raise DataError(f"{place.images}: exists and does not lead to {folder}; remove it or give another folder")
        GroundTruth(document, source=source)
        splits.append(place)

    for place, (folder, document) in zip(splits, documents.values(), strict=True):
        write_text(place.annotations, json.dumps(document))
        if link and not place.images.exists():
            place.images.symlink_to(folder.resolve(), target_is_directory=True)
        counts = len(document["images"]), len(document["annotations"]), len(document["categories"])
        logger.info("%s: %d images, %d objects, %d classes", place.annotations, *counts)
    return splits


def read_lvis(annotations: Path, images: Path) -> dict[str, Any]:
    """The COCO document of an LVIS file, which has COCO's images, its own classes, and addresses for file names.

    LVIS lists for each image the absent classes that were looked for (`neg_category_ids`) and those not labelled
    everywhere (`not_exhaustive_category_ids`). Both stay in the file; COCO's evaluation, used here, does not read them.

    Args:
        annotations: LVIS file, any version.
        images: folder that holds COCO's train2017/ and val2017/, from both of which LVIS takes images, or all of
            them directly.

    Raises:
        DataError: not such a file, or an image without a usable name.
    """
    document = read_annotations(annotations)
    entries, partly = [], 0
    for place, entry in enumerate(document["images"]):
        if isinstance(entry, dict) and not isinstance(entry.get("file_name"), str):
            address = entry.get("coco_url")
            parts = PurePosixPath(urlsplit(address).path).parts[-2:] if isinstance(address, str) else ()
            if len(parts) < 2:
                raise DataError(
                    f"{annotations}: images[{place}]: found {shorten(entry)}; needed is a text 'file_name', or "
                    "'coco_url' with folder and name of the image"
                )
            entry["file_name"] = "/".join(parts) if (images / parts[0]).is_dir() else parts[1]

        check_image_entry(entry, place, annotations)
        entries.append(entry)
        partly += bool(entry.get("not_exhaustive_category_ids"))

    if partly:
        message = "%s: %d images have classes that are not labelled everywhere; COCO's AP counts these finds as wrong"
        logger.warning(message, annotations, partly)
    objects = [{"iscrowd": 0} | entry if isinstance(entry, dict) else entry for entry in document["annotations"]]
    return document | {"images": entries, "annotations": objects}
