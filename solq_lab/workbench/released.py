"""Released weights as weights of ours, with the experiment and the classes that they were trained with."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from solq_lab.config import validate_experiment
from solq_lab.data.annotations import read_annotations
from solq_lab.data.classes import UNUSED, ClassMap
from solq_lab.models.hugging_face import read_settings
from solq_lab.models.weights import ImportReport, import_official


def import_released(source: Path, destination: Path, annotations: Path | None = None) -> ImportReport:
    """Turn a released checkpoint, or Hugging Face's file or folder, into a weights file of ours.

    Args:
        source: see `weights.read_official`.
        destination: file to write.
        annotations: COCO annotations that name the classes. None: the names beside the checkpoint, or COCO's own.

    Raises:
        WeightMismatch, DataError: the checkpoint or the annotations cannot be used.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "-", destination.stem).lstrip("._-") or "imported"
    labels = read_settings((source if source.is_dir() else source.parent) / "config.json").get("labels", ())

    def describe(architecture: dict[str, dict[str, Any]]) -> tuple[str, str]:
        experiment = validate_experiment({"name": name} | architecture, source="the imported experiment")
        classes = _classes(architecture["data"]["num_classes"], annotations, labels)
        return experiment.to_yaml(), classes.to_json()

    return import_official(source, destination, describe)


def _classes(count: int, annotations: Path | None, labels: Sequence[str]) -> ClassMap:
    """The class map of released weights, whose channels are category ids: COCO's own where there are 91 of them."""
    if annotations is not None:
        categories = read_annotations(annotations)["categories"]
        return ClassMap.from_categories(categories, "raw", count, source=str(annotations))
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id, with gaps
    names = next((names for names in (labels, coco) if len(names) == count), None)
    names = names or [f"category {channel}" for channel in range(count)]
    names = ["" if name in ("N/A", "__background__") else name for name in names]
    return ClassMap(tuple(names), tuple(channel if name else UNUSED for channel, name in enumerate(names)))
