"""Bipartite matching between predictions and objects. Paper: eq. 1; masks take no part in it.

Shape letters beside those of `structures`: Z decoder layers, T matched pairs of one layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from solq_lab.boxes import cxcywh_to_xyxy, generalized_iou
from solq_lab.structures import LayerPrediction, Predictions, Target

LOG_FLOOR = 1e-8  # the released cost adds it inside the logarithm


class MatchingError(ValueError):
    """Predictions or targets that cannot be matched."""


class NonFiniteCostError(MatchingError):
    """A cost is not finite; the message names image, layer, query and cost term."""


class Matching(NamedTuple):
    """The matched pairs of Z layers over one batch.

    An image with K objects has min(J, K) pairs in every layer, so the layers' pairs stack without padding.
    """

    images: Tensor  # (T,) int64, image of each pair, ascending; the same for all layers
    queries: Tensor  # (Z, T) int64
    objects: Tensor  # (Z, T) int64, counted through the whole batch, the images' objects one after the other


class Matches(NamedTuple):
    """The matched pairs of all decoder layers, and of the encoder's proposals (Z = 1), if there are any."""

    layers: Matching
    proposals: Matching | None


@dataclass(kw_only=True)
class HungarianMatcher:
    """Finds, for every layer and image on its own, the cheapest one-to-one matching of queries and objects.

    In the result a query and an object occur at most once per layer; with K <= J every object occurs.
    Proposals without classes are matched without regard to class: every object counts as class 0 there.

    Args:
        class_cost: weight of the focal class cost, positive minus negative term at the object's class.
        l1_cost: weight of the L1 distance of (cx, cy, w, h), normalised image.
        giou_cost: weight of the negative generalised IoU.
        focal_alpha: share of the positive term in the class cost.
        focal_gamma: focusing power of the class cost.
        proposals_per_object: how many of the encoder's proposals an object is matched to, as far as there are enough.
    """

    class_cost: float
    l1_cost: float
    giou_cost: float
    focal_alpha: float
    focal_gamma: float
    proposals_per_object: int = 1

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Sequence[Target]) -> Matches:
        """The matchings of all decoder layers and of the proposals, from one copy to the host.

        Args:
            predictions: of a batch of B images; half precision is raised to float32.
            targets: B targets on the same device; any of them, or all, may have no objects.

        Raises:
            MatchingError: B differs.
            NonFiniteCostError: a cost is not finite.
        """
        images, device = len(predictions.layers[0].logits), predictions.layers[0].logits.device
        if len(targets) != images:
            raise MatchingError(f"{len(targets)} targets for predictions of {images} images")
        counts = [len(target.labels) for target in targets]
        terms = self.costs(predictions, targets)
        on_host = (terms["class"] + terms["l1"] + terms["giou"]).cpu().numpy()  # (K, Z*J)
        if not np.isfinite(on_host).all():
            raise NonFiniteCostError(_describe_fault(terms, predictions, targets, counts))

        depth, columns = len(predictions.layers), columns_by_layer(predictions).values()
        repeats = [1] * depth + [self.proposals_per_object]
        assignments = [
            _assign(on_host[:, start:stop], counts, times)
            for (start, stop), times in zip(columns, repeats, strict=False)  # without proposals, one less
        ]
        return Matches(
            layers=_to_matching(assignments[:depth], device),
            proposals=None if predictions.proposals is None else _to_matching(assignments[depth:], device),
        )

    @torch.no_grad()
    def costs(self, predictions: Predictions, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Weighted costs by name, each (K, Z*J): the objects of the batch by the queries of all layers, side by side.

        A row has the queries of its own image only: costs between images are never computed. Proposals come last;
        `columns_by_layer` says which columns belong to which layer.
        """
        device = predictions.layers[0].logits.device
        images = _image_of_object([len(target.labels) for target in targets])
        images = images.to(device, non_blocking=True)  # the host does not wait for the forward pass yet
        labels = torch.cat([target.labels for target in targets])

        with torch.autocast(device.type, enabled=False):
            by_layer = [layer.logits[images, :, labels] for layer in predictions.layers]  # each (K, J)
            if predictions.proposals is not None:
                channels = labels if predictions.proposals_have_classes else torch.zeros_like(labels)
                by_layer.append(predictions.proposals.logits[images, :, channels])
            logits = torch.cat(by_layer, dim=1)
            boxes = torch.cat([layer.boxes for layer in _all_layers(predictions)], dim=1)  # (B, Z*J, 4)
            truth = torch.cat([target.boxes for target in targets])[:, None]  # (K, 4) -> (K, 1, 4)

            dtype = torch.promote_types(logits.dtype, torch.float32)
            boxes, truth = boxes.to(dtype), truth.to(dtype)
            corners, true_corners = _rows(cxcywh_to_xyxy(boxes), images), cxcywh_to_xyxy(truth)
            return {
                "class": self.class_cost * self._focal_cost(logits.to(dtype)),
                "l1": self.l1_cost * (_rows(boxes, images) - truth).abs().sum(-1),
                "giou": -self.giou_cost * generalized_iou(corners, true_corners),
            }

    def _focal_cost(self, logits: Tensor) -> Tensor:
        probability = logits.sigmoid()
        positive = -self.focal_alpha * (1 - probability) ** self.focal_gamma * (probability + LOG_FLOOR).log()
        negative = -(1 - self.focal_alpha) * probability**self.focal_gamma * (1 - probability + LOG_FLOOR).log()
        return positive - negative


def columns_by_layer(predictions: Predictions) -> dict[str, tuple[int, int]]:
    """First and last-plus-one column of each layer in the matcher's costs, by the layer's name."""
    names = [f"decoder layer {index}" for index in range(len(predictions.layers))] + ["encoder proposals"]
    widths = [layer.logits.shape[1] for layer in _all_layers(predictions)]
    return dict(zip(names, pairwise(accumulate(widths, initial=0)), strict=False))  # without proposals, no such name


def _rows(boxes: Tensor, images: Tensor) -> Tensor:
    """boxes[images], (B, J, 4) -> (K, J, 4), laid out as four planes: work on single coordinates is then dense."""
    return boxes.movedim(-1, 0).contiguous()[:, images].movedim(0, -1)


def _all_layers(predictions: Predictions) -> list[LayerPrediction]:
    """The decoder layers, then the proposals if there are any: the order of the costs' columns."""
    return predictions.layers + ([] if predictions.proposals is None else [predictions.proposals])


def _image_of_object(counts: list[int]) -> Tensor:
    """(K,) int64: the image each object of the batch belongs to."""
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts))


def _assign(cost: np.ndarray, counts: list[int], repeats: int) -> np.ndarray:
    """Pairs (3, T) of one layer, rows image, query, object, from its costs (K, J); each object `repeats` times."""
    pairs, first = [np.empty((3, 0), dtype=np.int64)], 0
    for image, count in enumerate(counts):
        objects, queries = linear_sum_assignment(cost[first : first + count].repeat(repeats, axis=0))
        pairs.append(np.stack([np.full_like(queries, image), queries, objects // repeats + first]))
        first += count
    return np.concatenate(pairs, axis=1)


def _to_matching(assignments: list[np.ndarray], device: torch.device) -> Matching:
    pairs = torch.from_numpy(np.stack(assignments, axis=1)).to(device, non_blocking=True)  # (3, Z, T)
    images, queries, objects = pairs
    return Matching(images[0], queries, objects)


def _describe_fault(
    terms: dict[str, Tensor], predictions: Predictions, targets: Sequence[Target], counts: list[int]
) -> str:
    """One sentence about the first cost that is not finite."""
    images = _image_of_object(counts).tolist()
    name, cost = next((name, cost) for name, cost in terms.items() if not cost.isfinite().all())
    row, column = (~cost.isfinite()).nonzero()[0].tolist()
    image, target = images[row], targets[images[row]]
    layer, query, place = _locate(column, predictions)
    number = row - sum(counts[:image])
    return (
        f"image {target.image_id}, {place}, query {query}: the {name} cost is not finite; "
        f"predicted box {_rounded(layer.boxes[image, query])}, object {number} has class {int(target.labels[number])} "
        f"and box {_rounded(target.boxes[number])} (cx, cy, w, h)"
    )


def _locate(column: int, predictions: Predictions) -> tuple[LayerPrediction, int, str]:
    """The layer, the query in it, and the layer's name, of a column of the costs."""
    for layer, (name, (start, stop)) in zip(
        _all_layers(predictions), columns_by_layer(predictions).items(), strict=True
    ):
        if column < stop:
            return layer, column - start, name
    raise AssertionError("a column belongs to a layer")


def _rounded(box: Tensor) -> list[float]:
    return [round(value, 4) for value in box.tolist()]
