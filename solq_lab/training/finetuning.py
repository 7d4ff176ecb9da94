"""The start of a training from a trained model of other classes, queries or mask vectors: `train.finetune_from`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from solq_lab.build import build_codec
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec, zigzag
from solq_lab.data.classes import ClassMap
from solq_lab.inference.predictor import find_weights, read_trained
from solq_lab.models.adapt import SharedCoefficients, adapt_weights
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightFile, WeightMismatch
from solq_lab.schema import Experiment, ModelSection, Role, keys_with

log = logging.getLogger(__name__)


class TrainedModel(NamedTuple):
    """A model to start from.

    path: its file.
    weights: what the file holds.
    classes: of its class channels.
    codec: its mask code, None without mask vectors.
    """

    path: Path
    weights: WeightFile
    classes: ClassMap
    codec: MaskCodec | None


def open_trained(experiment: Experiment) -> TrainedModel:
    """The model in `train.finetune_from`, whose settings are those of the experiment's model as far as they have to be.

    Args:
        experiment: sections `model`, `codec` and `train` are read.

    Raises:
        RunError, WeightMismatch: no such file or run, or a model that differs in more than classes, queries and code.
        ConfigError: the tables of its code are nowhere to be found.
    """
    path = find_weights(experiment.train.finetune_from)
    weights, trained, classes = read_trained(path)
    _check_settings(experiment, trained, path)
    return TrainedModel(path, weights, classes, build_codec(trained, tables=weights.codec))


def start_from_trained(model: SOLQ, codec: MaskCodec | None, names: Sequence[str], trained: TrainedModel) -> list[str]:
    """Give a fresh model what fits of a trained one, and log line by line what that is.

    Nothing of that training's optimiser, schedule or averages is taken over.

    Args:
        model: changed in place; with its vector statistics where it standardises.
        codec: its mask code, None without mask vectors.
        names: of its class channels.
        trained: the model to start from.

    Returns:
        The lines.

    Raises:
        WeightMismatch: the tensors are not those that the file's settings promise.
    """
    lines = adapt_weights(
        model,
        trained.weights.state,
        classes=trained.classes.names,
        own_classes=names,
        shared=shared_coefficients(trained.codec, codec),
        source=str(trained.path),
    )
    log.info("%s: starting from its weights", trained.path)
    for line in lines:
        log.info("  %s", line)
    log.info("  left out the state of its optimiser, schedule and averages")
    return lines


def shared_coefficients(old: MaskCodec | None, new: MaskCodec | None) -> SharedCoefficients:
    """How many first coefficients of two codes mean the same, and how their sizes compare.

    Two DCT codes share the common beginning of their zig-zag scans. An orthonormal transform of N x N cells sums N*N
    cells, each weighted by about 1/N, so that the same outline has coefficients proportional to N. Other codes share
    all or nothing: their tables have to be the same.
    """
    if old is None or new is None or type(old) is not type(new):
        return SharedCoefficients(0)
    if isinstance(old, DCTCodec):
        first, second = (_frequencies(codec) for codec in (old, new))
        length = min(len(first), len(second))
        same = (first[:length] == second[:length]).all(dim=1)
        return SharedCoefficients(int(same.cumprod(0).sum()), new.mask_size / old.mask_size)
    sizes = [(codec.mask_size, codec.vector_dim) for codec in (old, new)]
    same = sizes[0] == sizes[1] and _equal(old.state_dict(), new.state_dict())
    return SharedCoefficients(new.vector_dim if same else 0)


def _frequencies(codec: DCTCodec) -> Tensor:
    """(D, 2) row and column of each coefficient."""
    kept = zigzag(codec.mask_size)[: codec.vector_dim]
    return torch.stack([kept // codec.mask_size, kept % codec.mask_size], dim=1)


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name].cpu()) for name in first)


def _check_settings(experiment: Experiment, trained: Experiment, path: Path) -> None:
    keys = [key for key in ModelSection.model_fields if f"model.{key}" not in keys_with(Role.ADAPTED)]
    if experiment.codec.kind != "none" and trained.codec.kind != "none":
        keys.append("vector_hidden")
    differing = [
        f"model.{key}={there} there, {here} here"
        for key in keys
        if (there := getattr(trained.model, key)) != (here := getattr(experiment.model, key))
    ]
    if differing:
        raise WeightMismatch(
            f"{path}: another network: {'; '.join(differing)}. train.finetune_from adapts classes, queries and the "
            "mask code only; set these to the values there, or start from ImageNet weights without it"
        )
