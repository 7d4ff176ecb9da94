"""The mask itself as its vector, on a coarser grid for a shorter one. Paper: table 3a, row "Flatten"."""

import math

import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec, product_dtype


class FlattenCodec(MaskCodec):
    """The N x N mask pixels as N*N numbers, trained by squared distance and the dice overlap of the decoded masks.

    A shorter vector holds a coarser grid of s x s = D cells: encoding averages the mask over each cell, decoding
    interpolates between their centres. With D = N*N, the paper's 28 x 28, both are the identity.

    Args:
        mask_size: side N of the masks, mask pixels.
        vector_dim: a square number D; None: N*N.

    Raises:
        ValueError: D is not a square number, or exceeds N*N.
    """

    loss = "l2_dice"
    averaging: Tensor
    interpolation: Tensor

    def __init__(self, mask_size: int = 28, vector_dim: int | None = None) -> None:
        super().__init__(mask_size, mask_size**2 if vector_dim is None else vector_dim)
        side = math.isqrt(self.vector_dim)
        if side**2 != self.vector_dim:
            raise ValueError(
                f"vector_dim {self.vector_dim} is no square number; a coarser grid has s x s cells: "
                f"the nearest are {side**2} and {(side + 1) ** 2}"
            )
        # The tables follow from the two sizes, so no state dict carries them. They stay float64; each call rounds them.
        self.register_buffer("averaging", cell_overlap(mask_size, side), persistent=False)  # (s, N)
        self.register_buffer("interpolation", hat_weights(side, mask_size), persistent=False)  # (N, s)

    def encode(self, masks: Tensor) -> Tensor:
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        return resample(masks.to(dtype), self.averaging).flatten(1)  # (K, s, s) -> (K, D)

    def decode(self, vectors: Tensor) -> Tensor:
        self.check_vectors(vectors)
        side = self.averaging.shape[0]
        return resample(vectors.unflatten(1, (side, side)), self.interpolation)  # (K, D) -> (K, s, s) -> (K, N, N)


def cell_overlap(cells: int, coarse: int) -> Tensor:
    """(coarse, cells) float64: the share of each coarse cell that each mask pixel covers, along one axis."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * coarse / cells  # of the fine cells, in coarse ones
    starts = torch.arange(coarse, dtype=torch.float64).unsqueeze(1)
    inside = edges.clamp(min=starts, max=starts + 1)  # (coarse, cells + 1)
    return inside.diff(dim=1)


def hat_weights(coarse: int, cells: int) -> Tensor:
    """(cells, coarse) float64: weights of linear interpolation from coarse centres to mask pixels, along one axis."""
    position = (torch.arange(cells, dtype=torch.float64) + 0.5) * coarse / cells - 0.5  # in coarse centres
    position = position.clamp(0, coarse - 1).unsqueeze(1)  # constant beyond the outermost centres
    return (1 - (position - torch.arange(coarse, dtype=torch.float64)).abs()).clamp(min=0)


def resample(planes: Tensor, weights: Tensor) -> Tensor:
    """Planes (K, n, n) weighted along both axes by (m, n): (K, m, m), in their dtype."""
    if weights.shape[0] == weights.shape[1]:
        return planes  # the weights are one where n = m
    exact = product_dtype(torch.promote_types(planes.dtype, torch.float32), planes.device)
    with torch.autocast(planes.device.type, enabled=False):
        weights = weights.to(exact)
        return (weights @ planes.to(exact) @ weights.T).to(planes.dtype)
