"""The data folder of an experiment: checked, or drawn where it is to hold shapes."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from solq_lab.config import ConfigError, Experiment


def check_data_folder(experiment: Experiment) -> None:
    """Check that the data folder of an experiment exists, unless it is drawn on demand.

    Raises:
        ConfigError: data.root is empty or missing, or lacks a file or folder that the experiment names.
    """
    data = experiment.data
    if not data.root:
        wanted = "with images and annotations" if data.generate == "none" else "to draw the shapes into"
        raise ConfigError(f"data.root: found '', allowed is a folder {wanted}; add data.root=FOLDER")
    if data.generate != "none":
        return
    _require("data.root", Path(data.root))
    for key in ("train_images", "train_annotations", "val_images", "val_annotations"):
        _require(f"data.{key}", Path(data.root) / getattr(data, key))


def prepare_data(experiment: Experiment) -> None:
    """Draw the shapes of an experiment where they are missing; check any other data folder.

    Raises:
        ConfigError: the data folder is missing, or lacks a file or folder that the experiment names.
        DataError: the folder holds shapes of other settings.
    """
    check_data_folder(experiment)
    data = experiment.data
    if data.generate == "none":
        return
    from solq_lab.data.shapes.writer import write_shapes

    write_shapes(Path(data.root), level=data.generate, train=data.generate_train, val=data.generate_val)


def _require(key: str, path: Path) -> None:
    """Raise ConfigError where a path does not exist, with the nearest that does."""
    if path.exists():
        return

    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(os.listdir(folder))
    missing = path.relative_to(folder).parts[0]
    nearest = difflib.get_close_matches(missing, names, n=1)
    hint = f"did you mean {folder / nearest[0]}?" if nearest else f"{folder} holds {', '.join(names[:8]) or 'nothing'}"
    raise ConfigError(f"{key}: found {path}, which does not exist; {hint}; set {key}=...")
