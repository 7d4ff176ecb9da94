"""Weights of others, fetched into the cache folder: resumed, verified, and where a host sends a page, explained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from solq_lab.config import ConfigError, Experiment
from solq_lab.errors import DataError, did_you_mean
from solq_lab.files import hash_file, write_text
from solq_lab.models.released import IMAGENET, RELEASED, cached_file
from solq_lab.workbench.download.transfer import fetch

if TYPE_CHECKING:
    import pandas as pd


def download_weights(name: str, *, mirror: str | None = None, **patience: Any) -> Path:
    """The file of released weights in the cache folder, fetched where it is missing and verified in any case.

    Its SHA-256 is compared with the published one, or else with the one recorded beside the file when it came.

    Args:
        name: in `released.RELEASED`.
        mirror: address of a folder that has the file under its name in the cache folder; None: its owner's.
        patience: see `transfer.fetch`.

    Raises:
        ConfigError: an unknown name.
        DataError: the host is not reached, rejects the request or sends a page, the disk is full, or the sum is wrong.
    """
    if name not in RELEASED:
        raise ConfigError(f"weights {name!r}: {did_you_mean(name, list(RELEASED))}")
    released = RELEASED[name]
    target = cached_file(name)
    target.parent.mkdir(parents=True, exist_ok=True)

    with FileLock(target.with_name(f"{target.name}.lock")):
        fetched = not target.exists()
        if fetched:
            try:
                fetch(f"{mirror.rstrip('/')}/{released.file}" if mirror else released.url, target, **patience)
            except DataError as error:
                raise DataError(f"{error}. Or fetch it by hand from {released.link} and put it at {target}") from None
        _verify(target, released.sha256, remove=fetched)
    return target


def fetch_starting_weights(experiment: Experiment, run_folder: Path) -> None:
    """Fetch the ImageNet weights that a training will start from, before it starts; nothing where it has begun.

    Raises:
        DataError: they cannot be had (`download_weights`).
    """
    model, train = experiment.model, experiment.train
    if model.pretrained != "imagenet" or train.finetune_from or model.backbone not in IMAGENET:
        return
    begun = (run_folder / "weights.safetensors").exists() or any((run_folder / "checkpoints").glob("step_*"))
    if not begun:
        download_weights(model.backbone)


def weights_frame() -> pd.DataFrame:
    """What can be fetched: a row per name, with size, the published sum's first digits, whether it is here, link."""
    import pandas as pd

    rows = {
        name: {
            "weights": released.about,
            "MB": "-" if released.megabytes is None else released.megabytes,
            "SHA-256": released.sha256[:8] or "-",
            "here": "yes" if cached_file(name).exists() else "no",
            "link": released.link,
        }
        for name, released in RELEASED.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _verify(path: Path, published: str, *, remove: bool) -> None:
    """Compare the sum of a file, and record it; a wrong file that has just been fetched is removed."""
    record = path.with_name(f"{path.name}.sha256")
    recorded = record.read_text(encoding="utf-8").partition(" ")[0] if record.exists() else ""
    expected = published or recorded
    found = hash_file(path)
    if not found.startswith(expected):
        whose = "published" if published else f"recorded in {record} when it came"
        if remove:
            path.unlink()
        raise DataError(
            f"{path}: its SHA-256 is {found}, the one {whose} begins with {expected}; the file "
            f"{'has been removed: check the address' if remove else 'is another one: remove it'} and fetch it again"
        )
    if found != recorded:
        write_text(record, f"{found}  {path.name}\n")
