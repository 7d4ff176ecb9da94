"""Bipartite matching: all layers at once, image by image, against all pairs of a batch, layer by layer."""

from collections.abc import Iterator
from functools import partial

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou

from solq_lab.bench.timing import Row, compare
from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.schema import LossSection, MatcherSection
from solq_lab.structures import LayerPrediction, Predictions, Target
from solq_lab.training.matcher import HungarianMatcher, Matches

LAYERS, QUERIES, CLASSES = 6, 300, 91
COSTS, FOCAL = MatcherSection(), LossSection()

Pairs = set[tuple[int, int, int]]  # layer, query counted through the batch, object counted through the batch


def rows() -> Iterator[Row]:
    """A batch of even images, and one with a crowded image in it."""
    matcher = HungarianMatcher(**COSTS.model_dump(), focal_alpha=FOCAL.focal_alpha, focal_gamma=FOCAL.focal_gamma)
    for counts in ((7, 7, 7, 7), (3, 20, 45, 93)):
        predictions, targets = _draw_batch(counts)
        yield compare(
            "matcher",
            f"batch {len(counts)}, {LAYERS} layers, {QUERIES} queries, objects {'/'.join(map(str, counts))}",
            partial(match_layer_by_layer, predictions, targets),
            partial(matcher, predictions, targets),
            lambda expected, found: expected == _pairs(found),
        )


def match_layer_by_layer(predictions: Predictions, targets: list[Target]) -> Pairs:
    """The plain way: for each layer the costs of all queries and all objects of the batch, of which blocks are used."""
    labels = torch.cat([target.labels for target in targets])
    truth = torch.cat([target.boxes for target in targets])
    counts = [len(target.labels) for target in targets]
    pairs: Pairs = set()
    for number, layer in enumerate(predictions.layers):
        boxes = layer.boxes.flatten(0, 1)
        giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
        cost = (
            COSTS.class_cost * _focal_cost(layer.logits.flatten(0, 1).sigmoid())[:, labels]
            + COSTS.l1_cost * torch.cdist(boxes, truth, p=1)
            - COSTS.giou_cost * giou
        )

        blocks = cost.view(len(targets), QUERIES, -1).cpu().split(counts, dim=-1)
        first = 0
        for image, count in enumerate(counts):
            queries, objects = linear_sum_assignment(blocks[image][image])
            pairs |= {
                (number, image * QUERIES + q, first + o)
                for q, o in zip(queries.tolist(), objects.tolist(), strict=True)
            }
            first += count
    return pairs


def _focal_cost(probability: Tensor) -> Tensor:
    alpha, gamma = FOCAL.focal_alpha, FOCAL.focal_gamma
    negative = (1 - alpha) * probability**gamma * -(1 - probability + 1e-8).log()
    return alpha * (1 - probability) ** gamma * -(probability + 1e-8).log() - negative


def _pairs(matches: Matches) -> Pairs:
    images, queries, objects = (tensor.tolist() for tensor in matches.layers)
    return {
        (layer, image * QUERIES + query, found)
        for layer in range(LAYERS)
        for image, query, found in zip(images, queries[layer], objects[layer], strict=True)
    }


def _draw_batch(counts: tuple[int, ...]) -> tuple[Predictions, list[Target]]:
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        low, extent = torch.tensor([0.2, 0.2, 0.05, 0.05]), torch.tensor([0.6, 0.6, 0.3, 0.3])
        return torch.rand(*shape, 4, generator=generator) * extent + low

    layers, targets = [], []
    for _ in range(LAYERS):
        logits = torch.randn(len(counts), QUERIES, CLASSES, generator=generator) - 3
        layers.append(LayerPrediction(logits, boxes(len(counts), QUERIES), None))
    for image, count in enumerate(counts):
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append(Target(image, labels, boxes(count), None, (800, 1066), (480, 640)))
    return Predictions(layers, None), targets
