"""A local code: the coarse coefficients of a Haar wavelet transform."""

import math

import torch
from torch import Tensor

from solq_lab.codecs.dct import SeparableCodec


class HaarCodec(SeparableCodec):
    """The first `vector_dim` coefficients of the orthonormal 2-D Haar transform of the mask, the coarse scales first.

    Every coefficient belongs to one place: a wrong one moves a part of the mask and leaves the rest. With 4^k
    coefficients what is decoded are the mask's averages over 2^k x 2^k cells.
    """

    isometric = True

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        basis, scale = haar_basis(max(mask_size, 1))
        finer, coarser = torch.maximum(scale[:, None], scale), torch.minimum(scale[:, None], scale)
        order = (finer * (len(scale) + 1) + coarser).flatten().argsort(stable=True)
        super().__init__(mask_size, vector_dim, lambda _, rows: basis[:rows], order)


def haar_basis(size: int) -> tuple[Tensor, Tensor]:
    """The orthonormal Haar matrix of `size` samples, (size, size) float64, and the scale (size,) int64 of each row.

    Row 0 is the mean, scale 0. A row of scale s is the difference of two halves of an interval that was halved s - 1
    times; where a length is odd, the first half has one sample more (unbalanced Haar, Fryzlewicz 2007).
    """
    basis, scale = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    basis[0] = 1 / math.sqrt(size)

    # All intervals of one depth, from left to right, before those of the next.
    intervals, row, depth = [(0, size)], 1, 1
    while intervals:
        halves = []
        for start, end in intervals:
            middle = (start + end + 1) // 2
            left, right = middle - start, end - middle
            if right == 0:  # a single sample
                continue
            basis[row, start:middle] = math.sqrt(right / (left * (left + right)))
            basis[row, middle:end] = -math.sqrt(left / (right * (left + right)))
            scale[row] = depth
            halves += [(start, middle), (middle, end)]
            row += 1
        intervals, depth = halves, depth + 1
    return basis, scale
