"""The unified query head: class, box and mask vector of one query. Paper: section 3.2, fig. 2."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.look import MaskLook, Rows, View
from solq_lab.structures import LayerPrediction

PRIOR = 0.01  # score of every class before training, so that the focal loss starts small
EDGE = 1e-5  # references nearer to 0 or 1 are clamped to it


def inverse_sigmoid(values: Tensor) -> Tensor:
    """Logits of numbers 0..1, finite at both ends."""
    values = values.clamp(0, 1)
    return torch.log(values.clamp(min=EDGE) / (1 - values).clamp(min=EDGE))


class MLP(nn.Module):
    """Three linear layers with ReLU between; the last weight starts at zero, so that outputs start as its bias."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        first, second, last = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
        self.layers = nn.ModuleList([first, second, last])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @property
    def output_bias(self) -> Tensor:
        """(outputs,) the last layer's."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last.bias

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(features)))))


class VectorMLP(MLP):
    """Mask vectors of queries; all decoder layers share one.

    Args:
        width: C.
        hidden: features of the two hidden layers.
        vector_dim: D.
        standardise: predict in units of the training vectors' std (`set_statistics`). Otherwise, as released,
            coefficients 2 and higher start at -2.
    """

    vector_center: Tensor
    vector_spread: Tensor

    def __init__(self, width: int, hidden: int, vector_dim: int, *, standardise: bool = False) -> None:
        super().__init__(width, hidden, vector_dim)
        self.standardise = standardise
        if standardise:
            self.register_buffer("vector_center", torch.zeros(vector_dim))
            self.register_buffer("vector_spread", torch.ones(vector_dim))
        else:
            nn.init.constant_(self.output_bias[2:], -2.0)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., D)."""
        vectors = super().forward(features)
        return self.vector_center + self.vector_spread * vectors if self.standardise else vectors

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and std, each (D,), of the training vectors.

        Raises:
            ValueError: the head does not standardise, or the lengths differ.
        """
        if not self.standardise:
            raise ValueError("this vector head predicts plain coefficients; build the model with standardise_vectors")
        if mean.shape != self.vector_center.shape or std.shape != self.vector_spread.shape:
            raise ValueError(
                f"vector statistics of shapes {tuple(mean.shape)} and {tuple(std.shape)} do not fit vectors of "
                f"length {self.vector_center.numel()}; take both over the training vectors of this codec"
            )
        self.vector_center.copy_(mean)
        self.vector_spread.copy_(std)


class UnifiedQueryHead(nn.Module):
    """Class, box and mask vector of each query after one decoder layer.

    Args:
        width: C.
        num_classes: S, class channels.
        vector: the mask-vector head that all layers share, or None for a plain detector.
        look: adds what lies in the predicted box to the features of `vector`; all layers share it.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        vector: VectorMLP | None,
        look: MaskLook | None = None,
    ) -> None:
        super().__init__()
        self.classify = nn.Linear(width, num_classes)
        self.box = MLP(width, width, 4)
        self.vector, self.look = vector, look
        nn.init.constant_(self.classify.bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, queries: Tensor, anchor: Tensor) -> LayerPrediction:
        """Classes and boxes of the queries.

        Args:
            queries: (B, J, C).
            anchor: (B, J, 2) points or (B, J, 4) boxes (cx, cy, w, h), normalised image; boxes are predicted relative
                to it.
        """
        delta = self.box(queries)
        boxes = _moved(anchor, delta)
        next_anchor = _moved(anchor.detach(), delta) if anchor.requires_grad else boxes
        return LayerPrediction(self.classify(queries), boxes, vectors=None, next_anchor=next_anchor)

    def vectors(self, queries: Tensor, boxes: Tensor, view: View | None, *, rows: Rows | None = None) -> Tensor:
        """Mask vectors (B, J, D) of queries (B, J, C) for their boxes (B, J, 4); for heads with `vector`.

        `view` is what `look` reads. The layers share what makes vectors, so queries of several layers may come at once.
        With `rows`, ascending by image, theirs alone are made, and the others are zero.
        """
        assert self.vector is not None
        some, near = (queries, boxes) if rows is None else (queries[rows], boxes[rows])
        if self.look is not None:
            assert view is not None  # SOLQ makes it
            some = some + self.look(some, near, view, images=None if rows is None else rows[0])
        made = self.vector(some)
        return made if rows is None else made.new_zeros(*queries.shape[:2], made.shape[-1]).index_put(rows, made)


def _moved(anchor: Tensor, delta: Tensor) -> Tensor:
    """Boxes (B, J, 4): points or boxes `anchor`, moved and scaled by (B, J, 4) logits."""
    logits = inverse_sigmoid(anchor)
    if anchor.shape[-1] == 2:
        logits = F.pad(logits, (0, 2))  # a point has no size
    return (delta + logits).sigmoid()
