"""The data folder of an experiment: found, checked, or drawn where it is to hold shapes."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from solq_lab.config import ConfigError, Experiment, change_experiment, default_experiment, with_found_data
from solq_lab.data.folders import Split, explain_missing
from solq_lab.errors import did_you_mean

logger = logging.getLogger(__name__)

EMPTY = "data.root is empty: give the folder that holds the images and annotations (data.root=FOLDER)"


def check_data_folder(experiment: Experiment) -> None:
    """Check that the data folder of an experiment exists, unless it is drawn on demand; one log line names its parts.

    Raises:
        ConfigError: data.root is empty or missing, or lacks a file or folder that the experiment names.
        DataError: names that the experiment leaves empty are not found, or there is more than one reading.
    """
    _check(experiment)
    data = with_found_data(experiment).data
    if data.generate == "none":
        logger.info(
            "%s: train images %s with %s, val images %s with %s",
            *(data.root, data.train_images, data.train_annotations, data.val_images, data.val_annotations),
        )


def open_folder(root: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The default experiment on a folder, with what is found there; a fifth of its only split becomes val.

    Raises:
        ConfigError, DataError: as `check_data_folder`; or a `section.key=value` of the overrides is wrong.
    """
    if wrong := [word for word in overrides if word.startswith("data.root=")]:
        raise ConfigError(f"{wrong[0]}: the folder is the first argument, {root}; leave one of the two out")
    named = default_experiment([f"data.root={root}", *overrides])
    experiment = with_found_data(named)
    if not (experiment.data.train_annotations and experiment.data.val_annotations):
        experiment = with_found_data(change_experiment(named, {"data.val_fraction": 0.2}, source=str(root)))
    check_data_folder(experiment)
    return experiment


def prepare_data(experiment: Experiment) -> None:
    """Draw the shapes of an experiment where they are missing; check any other data folder.

    Raises:
        ConfigError, DataError: as `check_data_folder`; or the folder holds shapes of other settings.
    """
    _check(experiment)
    data = experiment.data
    if data.generate == "none":
        return
    from solq_lab.data.shapes.writer import write_shapes

    write_shapes(Path(data.root), level=data.generate, train=data.generate_train, val=data.generate_val)


def split_of(experiment: Experiment, name: Literal["train", "val"]) -> Split:
    """The images and the annotation file of a split, as the experiment names them or as they are found.

    Raises:
        ConfigError: data.root is empty.
        DataError: they are not found, or cannot be made of what is there.
    """
    experiment = with_found_data(experiment)  # so that `annotations_of` does not look again
    data, images = experiment.data, getattr(experiment.data, f"{name}_images")
    if not data.root:
        raise ConfigError(EMPTY)
    if not images:
        raise explain_missing(Path(data.root), name, data.val_fraction)
    return Split(name, Path(data.root) / images, annotations_of(experiment, name), data.orientation)


def annotations_of(experiment: Experiment, name: Literal["train", "val"]) -> Path:
    """The annotation file of a split alone; raises as `split_of`."""
    from solq_lab.data.derived import annotation_file

    data = with_found_data(experiment).data
    annotations = getattr(data, f"{name}_annotations")
    if annotations:
        return annotation_file(Path(data.root) / annotations, data.val_fraction)
    if not data.root:
        raise ConfigError(EMPTY)
    raise explain_missing(Path(data.root), name, data.val_fraction)


def _check(experiment: Experiment) -> None:
    """Raise where the data folder, or a part of it, is missing."""
    data = with_found_data(experiment).data
    if not data.root:
        wanted = "with images and annotations" if data.generate == "none" else "to draw the shapes into"
        raise ConfigError(f"data.root: found '', allowed is a folder {wanted}; add data.root=FOLDER")
    if data.generate != "none":
        return

    root = Path(data.root)
    _require("data.root", root)
    for name in ("train", "val"):
        for key in (f"{name}_annotations", f"{name}_images"):
            value = getattr(data, key)
            if not value:
                raise explain_missing(root, name, data.val_fraction)
            while not (root / value).exists() and value.rpartition("#")[2] in ("train", "val", "test"):
                value = value.rpartition("#")[0]
            _require(f"data.{key}", root / value)


def _require(key: str, path: Path) -> None:
    """Raise ConfigError where a path does not exist, with the nearest that does."""
    if path.exists():
        return
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    missing = path.relative_to(folder).parts[0]
    hint = did_you_mean(missing, sorted(os.listdir(folder))[:50], f"{folder} holds", folder=folder)
    raise ConfigError(f"{key}: found {path}, which does not exist; {hint}; set {key}=...")
