"""Checkpoints: the weights and all other state that a resumed training needs to continue bit for bit."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from solq_lab.errors import ExplainedError
from solq_lab.files import hash_file, read_json, replacing_folder, write_json
from solq_lab.models.weights import read_weights, save_weights
from solq_lab.runs import RunError

log = logging.getLogger(__name__)

FILES = ("weights.safetensors", "state.pt")
FINGERPRINTS = "sha256.json"  # of both files: neither format detects a changed bit
KEPT = 2  # the newest, and one before it in case the newest is damaged
MEGABYTE = 2**20
DAMAGE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)


class SaveError(ExplainedError):
    """A checkpoint could not be written; the message names the reason, the room on the disk and what stands."""


class Checkpoint(NamedTuple):
    """The content of one checkpoint folder."""

    step: int  # optimiser steps done
    weights: dict[str, Tensor]  # the model's state dict
    state: dict[str, Any]  # the training's other state, plain containers of tensors, numbers and strings
    # state dict of the mask codec; None or empty where its tables follow from its sizes
    codec: dict[str, Tensor] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, experiment: str, classes: str) -> None:
    """Write a checkpoint under `folder`, and remove all but the last `KEPT`.

    Crash-safe: the files are complete and on the disk before their folder gets its name. A kill or a power cut at any
    moment leaves the older checkpoints and at most a `.part` folder, which the next save removes.

    Args:
        folder: the run's folder of checkpoints.
        checkpoint: what to write; its state is read back with `weights_only=True`.
        experiment: YAML of the experiment, kept beside the weights.
        classes: JSON of the class map, likewise.

    Raises:
        SaveError: the disk is full or fails; the older checkpoints are as they were.
    """
    final = folder / f"step_{checkpoint.step:07d}"
    if not final.exists():
        try:
            with replacing_folder(final) as partial:
                weights, state = (partial / name for name in FILES)
                save_weights(
                    weights, checkpoint.weights, experiment=experiment, classes=classes, codec=checkpoint.codec
                )
                torch.save({"step": checkpoint.step, **checkpoint.state}, state)
                write_json(partial / FINGERPRINTS, {name: hash_file(partial / name) for name in FILES})
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(folder if folder.exists() else folder.parent).free / MEGABYTE
            room = f"{free:.1f} MB are free"
            for earlier in step_folders(folder)[-1:]:
                size = sum(path.stat().st_size for path in earlier.iterdir()) / MEGABYTE
                room += f"; {earlier.name} stands, it takes {size:.1f} MB"
            raise SaveError(
                f"{final} could not be written ({' '.join(str(error).split())}); {room}. Make room; re-running resumes "
                "from the last checkpoint"
            ) from error

    for old in step_folders(folder)[:-KEPT]:
        shutil.rmtree(old)


def step_folders(folder: Path) -> list[Path]:
    """The folders of steps in a run's folder of checkpoints, or of flight records, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that can be read, or None where there is none.

    Damaged ones that are newer are logged and renamed to `damaged_step_XXXXXXX`: they must neither count towards
    `KEPT` nor block the name of their step's next checkpoint.

    Raises:
        RunError: there are checkpoints, and all of them are damaged; nothing is renamed.
    """
    found, damaged = step_folders(folder), []
    for path in reversed(found):
        try:
            checkpoint = load_checkpoint(path)
        except DAMAGE as error:
            log.warning("%s: damaged checkpoint left aside: %s", path, " ".join(str(error).split()))
            damaged.append(path)
            continue

        # Only now: where no checkpoint can be read, nothing is renamed.
        for broken in damaged:
            aside = broken.with_name(f"damaged_{broken.name}")
            shutil.rmtree(aside, ignore_errors=True)
            broken.rename(aside)
        return checkpoint

    if found:
        names = ", ".join(path.name for path in found)
        raise RunError(
            f"{folder}: no checkpoint can be read (damaged: {names}); remove this folder to start the training anew"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        One of `DAMAGE`: it is not as it was written.
    """
    fingerprints = path / FINGERPRINTS  # checkpoints of older versions have none
    for name, written in (read_json(fingerprints) if fingerprints.exists() else {}).items():
        if hash_file(path / name) != written:
            raise ValueError(f"{name} is not what was written")
    weights, state = (path / name for name in FILES)
    read = read_weights(weights)
    values = torch.load(state, map_location="cpu", weights_only=True)
    return Checkpoint(values.pop("step"), read.state, values, read.codec)
