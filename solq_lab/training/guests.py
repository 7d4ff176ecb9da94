"""Denoising guests: copies of the objects with noise, which the decoder learns to restore (DN-DETR, DINO).

A guest needs no matching: its object is known. What it restores is the class, the box and, here, the mask vector too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solq_lab.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from solq_lab.models.solq import SOLQ
from solq_lab.structures import Guests, LayerPrediction, Predictions, Target
from solq_lab.training.matcher import Matching

WRONG_LABELS = 0.25  # share of guests whose class is drawn anew
BOX_NOISE = 0.4  # largest move of a box's edge, in units of its side: below 0.5, so that no box turns over
NO_OBJECT = -1e4  # logit of a place without an object: neither loss nor gradient, in every precision


def draw_guests(model: nn.Module, targets: Sequence[Target]) -> Guests | None:
    """Guests for the targets, on the host, of a batch; None for a model (or DDP around it) that takes none.

    They are drawn from torch's global generator of the CPU. Every image has as many places as the one with most objects
    needs, at least one: every process of a distributed training reaches the label embedding.
    """
    network = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(network, SOLQ) or not network.denoising:
        return None
    groups, classes = network.denoising, network.label_embedding.num_embeddings
    counts = [len(target.labels) for target in targets]
    places = max(1, *counts)

    # Object k of an image has place k in each group.
    images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    within = torch.cat([torch.arange(count) for count in counts])
    columns = (torch.arange(groups)[:, None] * places + within).flatten()  # (groups * K,)
    pairs = torch.stack([images.repeat(groups), columns, torch.arange(len(images)).repeat(groups)])

    true_labels = torch.cat([target.labels for target in targets]).repeat(groups)
    wrong = torch.rand(len(columns)) < WRONG_LABELS
    labels = torch.where(wrong, torch.randint(classes, (len(columns),)), true_labels)
    true_boxes = torch.cat([target.boxes for target in targets]).repeat(groups, 1)
    moves = (2 * torch.rand(len(columns), 4) - 1) * BOX_NOISE * true_boxes[:, 2:].repeat(1, 2)
    boxes = xyxy_to_cxcywh((cxcywh_to_xyxy(true_boxes) + moves).clamp(0, 1))

    guests = Guests(
        labels=torch.zeros(len(counts), groups * places, dtype=torch.int64),
        boxes=torch.full((len(counts), groups * places, 4), 0.5),
        real=torch.zeros(len(counts), groups * places, dtype=torch.bool),
        pairs=pairs,
        groups=groups,
    )
    where = (pairs[0], pairs[1])
    guests.labels[where], guests.boxes[where], guests.real[where] = labels, boxes, True
    return guests


def matched_guests(guests: Guests, predictions: Predictions) -> tuple[list[LayerPrediction], Matching]:
    """The guests' predictions, those of places without an object made sure of it, and their pairs with the objects."""
    empty = ~guests.real.unsqueeze(-1)
    layers = [layer._replace(logits=layer.logits.masked_fill(empty, NO_OBJECT)) for layer in predictions.guest_layers]
    images, columns, objects = guests.pairs
    return layers, Matching(images, columns.expand(len(layers), -1), objects.expand(len(layers), -1))


def with_guests(matching: Matching, guests: Guests | None) -> tuple[Tensor, Tensor]:
    """Images (T,) and places (Z, T) of matched queries and of guests, which sit in front of the queries."""
    if guests is None:
        return matching.images, matching.queries
    (images, places, _), count = guests.pairs, guests.labels.shape[1]
    places = places.expand(len(matching.queries), -1)
    return torch.cat([images, matching.images]), torch.cat([places, matching.queries + count], dim=1)
