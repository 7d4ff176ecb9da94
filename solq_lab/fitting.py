"""Fitting a mask codec to the training masks of an experiment: streamed, resumable, the same for the same seed."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solq_lab.bars import progress_bar
from solq_lab.build import new_codec
from solq_lab.codecs.artifact import (
    ArtifactError,
    Description,
    identity,
    read_description,
    read_tensors,
    save_codec,
    write_tensors,
)
from solq_lab.codecs.base import CodecFit, FittedCodec, MaskCodec
from solq_lab.codecs.kinds import kinds_that_are
from solq_lab.codecs.reconstruct import box_frame_iou, reconstruct
from solq_lab.config import ConfigError, Experiment
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.data_folder import annotations_of
from solq_lab.files import hash_file

log = logging.getLogger(__name__)

SAMPLED_MASKS = 2000  # to measure the quality on: mean IoU to within some 0.2 percent
SECONDS_BETWEEN_SAVES = 60.0  # of the .partial file


def fit_codec(experiment: Experiment, *, max_objects: int | None = None) -> Description:
    """Fit the experiment's codec to its training masks and write it to `codec.artifact`.

    The order of the masks follows from the experiment's seed. Beside the artifact a `.partial` file keeps the state of
    the fit; the same call after an interruption resumes from there and ends with the same tables, bit by bit.

    Args:
        experiment: sections `codec` and `data` and the seed are read; images are not needed.
        max_objects: number of objects to fit to, drawn at random. None: all.

    Returns:
        The description of the file. Where it exists already, fitted to the same data, nothing is done.

    Raises:
        ConfigError: the codec needs no fitting, scikit-learn is missing, or the file exists and holds something else.
        DataError: the annotations cannot be used, or hold no object.
    """
    codec, path = new_codec(experiment), Path(experiment.codec.artifact)
    if not isinstance(codec, FittedCodec):
        raise ConfigError(f"codec.kind={experiment.codec.kind}: nothing to fit; {kinds_that_are('fitted')} are fitted")
    annotations = annotations_of(experiment, "train")
    if not annotations.is_file():
        raise DataError(f"{annotations}: no such annotation file; check data.root and data.train_annotations")
    dataset: dict[str, Any] = {"annotations": annotations.name, "sha256": hash_file(annotations)}
    if path.exists():
        return _already_there(path, codec, dataset)
    try:
        fit = codec.start_fit(experiment.seed)
    except ValueError as error:  # no scikit-learn
        raise ConfigError(f"codec.kind={experiment.codec.kind}: {error}") from None

    objects = GroundTruth(annotations)
    if len(objects) == 0:
        raise DataError(f"{annotations}: holds no object to fit a codec to")
    order = np.random.default_rng(experiment.seed).permutation(len(objects))[:max_objects]
    dataset |= {"objects": len(objects), "used": len(order)}

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _PartialFit(path.with_suffix(".partial"), identity(codec) | dataset | {"seed": experiment.seed})
    seen, saved = partial.restore(fit), time.monotonic()
    with progress_bar(total=len(order), initial=seen, desc="fitting", unit="mask") as progress:
        # The batches are the same wherever an earlier process stopped.
        for start in range(seen, len(order), fit.batch_size):
            batch = objects.box_masks(order[start : start + fit.batch_size], codec.mask_size)
            fit.update(batch)
            seen += len(batch)
            progress.update(len(batch))
            if time.monotonic() - saved >= SECONDS_BETWEEN_SAVES:
                partial.save(fit, seen)
                saved = time.monotonic()

    codec.load_state_dict(fit.tables())
    quality = measure_quality(codec.eval(), objects.box_masks(order[:SAMPLED_MASKS], codec.mask_size))
    save_codec(path, codec, dataset=dataset, quality=quality)
    partial.path.unlink(missing_ok=True)
    return read_description(path)


def check_fitted_data(experiment: Experiment) -> None:
    """Reject a training with a codec that was fitted to other masks: boxes would be learnt, masks would not.

    Raises:
        ConfigError: `codec.artifact` is missing, or was fitted to other annotations than the training's.
    """
    if not isinstance(new_codec(experiment), FittedCodec):
        return
    path, annotations = experiment.codec.artifact, annotations_of(experiment, "train")
    try:
        fitted_on = read_description(path).dataset
    except ArtifactError as error:
        raise ConfigError(f"codec.artifact: {error}") from None
    if fitted_on.get("sha256") != hash_file(annotations):
        raise ConfigError(
            f"codec.artifact: {path} was fitted to {fitted_on.get('annotations')} with {fitted_on.get('objects')} "
            f"objects, not to this training's {annotations}: its masks would come out wrong while the boxes look fine. "
            "Fit a codec to this data: solq-lab fit-codec EXPERIMENT codec.artifact=NEW_FILE"
        )


@torch.inference_mode()
def measure_quality(codec: MaskCodec, masks: Tensor) -> dict[str, Any]:
    """Quality of the reconstructions of masks (K, N, N) bool, K at least 1.

    Returns:
        "explained_variance": one minus the squared error over the squared deviation from the mean mask (0 where all
        masks are the same); "mean_iou" after `binarize`, two empty masks counting as equal; "masks": K.
    """
    mean = masks.float().mean(dim=0)
    error = deviation = overlap = 0.0
    for batch in masks.split(256):
        pixels = batch.float()
        decoded = reconstruct(codec, batch)
        overlap += box_frame_iou(decoded.masks, batch).sum().item()
        error += (decoded.decoded - pixels).square().sum(dtype=torch.float64).item()
        deviation += (pixels - mean).square().sum(dtype=torch.float64).item()
    explained = 1 - error / deviation if deviation else 0.0
    return {"explained_variance": explained, "mean_iou": overlap / len(masks), "masks": len(masks)}


class _PartialFit:
    """The state of an interrupted fit in a file, and the facts that have to agree to resume from it."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self._about = path, about

    def restore(self, fit: CodecFit) -> int:
        """Restore the state of `fit`; return the number of masks it had seen, 0 without a usable file."""
        if not self.path.exists():
            return 0
        try:
            state, header = read_tensors(self.path)
        except ArtifactError as error:
            log.warning("starting anew: %s", error)
            return 0
        if header.get("about") != self._about:
            log.warning("%s: belongs to another fit (other data, sizes, settings or seed); starting anew", self.path)
            return 0
        fit.restore(state)
        log.info("%s: resuming after %d masks", self.path, header["seen"])
        return header["seen"]

    def save(self, fit: CodecFit, seen: int) -> None:
        write_tensors(self.path, fit.state(), {"about": self._about, "seen": seen})


def _already_there(path: Path, codec: FittedCodec, dataset: dict[str, Any]) -> Description:
    """The description of a finished artifact, if it is the requested one."""
    try:
        about = read_description(path)
    except ArtifactError as error:
        raise ConfigError(f"codec.artifact: {error}") from None
    same_data = about.dataset.get("sha256") == dataset["sha256"]
    if not (identity(about) == identity(codec) and same_data):
        what = "another codec" if same_data else f"a codec fitted to {about.dataset.get('annotations')}, other data"
        raise ConfigError(
            f"codec.artifact: {path} exists and holds {what}; it is not written over: remove it, or name another file "
            "(codec.artifact=FILE)"
        )
    log.info("%s: fitted to this data already", path)
    return about
