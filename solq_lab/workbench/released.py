"""Released weights as weights of ours, with the experiment and the classes that they were trained with."""

import re
from collections.abc import Sequence
from pathlib import Path

from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from solq_lab.config import validate_experiment
from solq_lab.data.annotations import read_annotations
from solq_lab.data.classes import UNUSED, ClassMap
from solq_lab.models.official import infer_architecture
from solq_lab.models.weights import ImportReport, read_official, save_weights, translate_official_state


def import_released(source: Path, destination: Path, annotations: Path | None = None) -> ImportReport:
    """Turn a released checkpoint, or Hugging Face's file or folder, into a weights file of ours.

    Args:
        source: see `weights.read_official`.
        destination: file to write.
        annotations: COCO annotations that name the classes. None: the names beside the checkpoint, or COCO's own.

    Raises:
        WeightMismatch, DataError: the checkpoint or the annotations cannot be used.
    """
    official = read_official(source)
    state, report = translate_official_state(official.state, source=str(source))
    architecture = infer_architecture(official.state, official.args, source=str(source))

    name = re.sub(r"[^A-Za-z0-9._-]", "-", destination.stem).lstrip("._-") or "imported"
    experiment = validate_experiment({"name": name} | architecture, source="the imported experiment")
    classes = _classes(architecture["data"]["num_classes"], annotations, official.args.get("labels", ()))
    save_weights(destination, state, experiment=experiment.to_yaml(), classes=classes.to_json())
    return report._replace(architecture=architecture)


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
