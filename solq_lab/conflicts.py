"""Settings of an experiment's sections that do not fit each other. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from solq_lab.codecs.kinds import CODECS, kinds_that_are
from solq_lab.data.kinds import MIXED

if TYPE_CHECKING:
    from solq_lab.schema import Experiment


def conflicts(experiment: Experiment) -> Iterator[str]:
    """One sentence for each: keys, values, and what to set instead."""
    model, codec, loss, train = experiment.model, experiment.codec, experiment.loss, experiment.train
    without_vectors = codec.kind == "none"

    # Who makes masks, and what only mask vectors have.
    if model.mask_branch != "none" and not without_vectors:
        yield (
            f"model.mask_branch {model.mask_branch} and codec.kind {codec.kind} would both make masks; "
            "give the mask branch codec.kind: none, or mask vectors model.mask_branch: none"
        )
    of_masks = {
        "model.mask_look": model.mask_look,
        "evaluation.rescore": experiment.evaluation.rescore.replace("none", ""),
        "data.augment": experiment.data.augment if experiment.data.augment in MIXED else "",
    }
    for key, value in of_masks.items():
        if value and without_vectors:
            yield f"{key} {value} serves mask vectors, and codec.kind is none; leave it out, or choose a codec"
    weights = ("decoded_dice_weight", "outline_dice_weight")
    of_vectors = ("vector_kind", "vector_units", "vector_frame", "class_loss", "band_limit", "tail_drop", *weights)
    changed = [key for key in of_vectors if getattr(loss, key) != type(loss).model_fields[key].default]
    if without_vectors and changed:
        yield (
            f"{', '.join(f'loss.{key} {getattr(loss, key)}' for key in changed)}: concerns mask vectors, and "
            "codec.kind is none; leave it out, or choose a codec"
        )
    yield from _lengths(experiment)
    if loss.class_loss == "quality" and loss.vector_layers < model.decoder_layers:
        yield (
            f"loss.class_loss quality judges the masks of all {model.decoder_layers} decoder layers, and "
            f"loss.vector_layers {loss.vector_layers} leaves some without mask vectors to learn; set it to "
            f"{model.decoder_layers} or more, or class_loss to focal"
        )
    if loss.vector_units == "std" and not model.standardise_vectors:
        yield "loss.vector_units std needs model.standardise_vectors: true, which measures the standard deviations"
    if loss.proposals_per_object > 1 and not (model.two_stage or model.mixed_queries):
        yield (
            f"loss.proposals_per_object {loss.proposals_per_object} needs proposals: set model.mixed_queries or "
            "model.two_stage to true, or it to 1"
        )

    # What a training starts from.
    if train.finetune_from and model.pretrained not in ("imagenet", "none"):
        yield (
            f"train.finetune_from {train.finetune_from} and model.pretrained {model.pretrained} both name weights to "
            "start from; leave one out"
        )
    if train.freeze_detector and model.mask_branch == "none":
        yield "train.freeze_detector leaves nothing to train without a branch: set model.mask_branch: sqr"
    if train.freeze_detector and model.pretrained in ("imagenet", "none"):
        yield (
            f"train.freeze_detector needs a trained detector, and model.pretrained is {model.pretrained}; "
            "name its weights file there"
        )


def _lengths(experiment: Experiment) -> Iterator[str]:
    """Of settings about parts of a mask vector."""
    codec, loss, shorter = experiment.codec, experiment.loss, experiment.evaluation.vector_dim
    if codec.learn_decoder and codec.kind != "dct":
        yield f"codec.learn_decoder true is for codec.kind dct, not {codec.kind}; leave it out"
    of_decoded = {"loss.tail_drop": loss.tail_drop, "codec.learn_decoder": codec.learn_decoder}
    for key, value in of_decoded.items():
        if value and not (loss.decoded_dice_weight or loss.outline_dice_weight):
            yield f"{key} {value} needs a loss of decoded masks; leave it out, or set loss.decoded_dice_weight above 0"

    needed: dict[str, tuple[float | None, str]] = {
        "loss.band_limit": (loss.band_limit, "cosine"),
        "loss.tail_drop": (loss.tail_drop, "ordered"),
        "evaluation.vector_dim": (shorter, "ordered"),
    }
    for key, (wanted, trait) in needed.items():
        if wanted and not getattr(CODECS.get(codec.kind), trait, False):
            allowed = kinds_that_are(trait)
            yield f"{key} {wanted}: codec.kind {codec.kind} has no such order; leave it out, or choose {allowed}"
    if shorter and shorter > codec.vector_dim:
        yield f"evaluation.vector_dim {shorter} exceeds codec.vector_dim {codec.vector_dim}; give at most as many"
