"""The splits that `check-data` is to look at. Loads without torch, so that a wrong folder is rejected at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from solq_lab.config import ConfigError, default_experiment, load_experiment
from solq_lab.data.folders import Split, find_splits
from solq_lab.data.yolo import is_yolo
from solq_lab.data_folder import prepare_data, split_of

if TYPE_CHECKING:
    from solq_lab.workbench.check.report import Options


def find_data(
    data: Path, overrides: Sequence[str] = (), images: Path | None = None
) -> tuple[tuple[Split, ...], Options, str]:
    """The splits to check, what the training will be like, and a name for the report.

    Args:
        data: data folder, annotation file, or experiment file (.yaml).
        overrides: `section.key=value` changes to the experiment, of a folder or file to the default experiment.
        images: folder of the images, where it is not found.

    Raises:
        DataError, ConfigError: there is no such data set or experiment.
    """
    is_data = data.suffix not in (".yaml", ".yml") or (data.is_file() and is_yolo(data))
    if is_data and any(text.startswith("data.root=") for text in overrides):
        raise ConfigError(f"data.root: {data} is the folder to check; leave one of the two out")
    experiment = default_experiment([f"data.root={data}", *overrides]) if is_data else load_experiment(data, overrides)
    section, named = experiment.data, "_annotations=" in " ".join(overrides)

    splits: tuple[Split, ...]
    if is_data and not named:
        splits, name = find_splits(data, images, section.val_fraction, section.orientation), data.resolve().stem
    else:
        prepare_data(experiment)
        splits, name = (split_of(experiment, "train"), split_of(experiment, "val")), experiment.name
    from solq_lab.workbench.check.report import Options  # pandas: not for a wrong folder

    options = Options(
        queries=experiment.model.queries,
        detections=experiment.evaluation.top_k,
        with_masks=experiment.codec.kind != "none" or experiment.model.mask_branch != "none",
        class_ids=section.class_ids,
        num_classes=section.num_classes,
        test_scale=section.test_scale,
        max_size=section.max_size,
        allow_links=section.allow_links,
    )
    return splits, options, name
