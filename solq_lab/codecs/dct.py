"""The paper's mask code: the low frequencies of a cosine transform. Paper: section 3.2, "DCT"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec


def zigzag(size: int) -> Tensor:
    """The zig-zag scan of a size x size spectrum, low frequencies first: 0, 1, N, 2N, N+1, 2, ...

    Returns:
        (size*size,) int64 row-major flat indexes, each once, for odd sizes as for even ones.
    """
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    diagonal = row + column
    along = torch.where(diagonal % 2 == 1, row, -row)  # odd anti-diagonals run down, even ones run up
    return (diagonal * 2 * size + along).flatten().argsort()


def cosine_basis(size: int, frequencies: int) -> Tensor:
    """The lowest `frequencies` rows of the orthonormal DCT-II matrix of `size` samples, (frequencies, size) float64."""
    frequency = torch.arange(frequencies, dtype=torch.float64).unsqueeze(1)
    sample = torch.arange(size, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi / size * (sample + 0.5) * frequency)
    basis[0] = math.sqrt(1 / size)
    return basis


class DCTCodec(MaskCodec):
    """The first `vector_dim` coefficients, in zig-zag order, of the orthonormal 2-D DCT-II of the 0/1 mask.

    Nothing is scaled: the first entry of a full mask's vector is N, and every entry weighs the same in an L1 loss.

    The kept coefficients fill only a corner of the spectrum (23 x 23 of 128 x 128 for 256 of them), so both ways are
    two thin matrix products per mask instead of a full transform.
    """

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        kept = zigzag(mask_size)[:vector_dim]
        row, column = kept // mask_size, kept % mask_size
        rows, columns = int(row.max()) + 1, int(column.max()) + 1
        # The tables follow from the two sizes, so no state dict carries them. They stay float64; each call rounds them.
        self.register_buffer("row_basis", cosine_basis(mask_size, rows), persistent=False)
        self.register_buffer("column_basis", cosine_basis(mask_size, columns), persistent=False)
        self.register_buffer("kept", row * columns + column, persistent=False)  # places in the rows x columns corner

    def encode(self, masks: Tensor) -> Tensor:
        """Vectors (K, D) of masks (K, N, N): float32, or float64 where the masks are.

        Raises:
            ValueError: the masks are not N x N.
        """
        if masks.ndim != 3 or masks.shape[1:] != (self.mask_size, self.mask_size):
            raise ValueError(f"masks have shape {tuple(masks.shape)}, expected (K, {self.mask_size}, {self.mask_size})")
        if masks.dtype == torch.bool:
            masks = masks.view(torch.uint8)  # the same bytes, but ten times quicker to turn into floats
        dtype = torch.promote_types(masks.dtype, torch.float32)
        exact = _product_dtype(dtype, masks.device)
        with torch.autocast(masks.device.type, enabled=False):
            rows = self.row_basis.to(exact).expand(masks.shape[0], -1, -1)
            half = torch.bmm(rows, masks.to(exact))  # (K, N, N) -> (K, rows, N)
            corner = half @ self.column_basis.to(exact).T  # (K, rows, columns)
        return corner.flatten(1).index_select(1, self.kept).to(dtype)

    def decode(self, vectors: Tensor) -> Tensor:
        """Reconstructions (K, N, N) of vectors (K, D), in the vectors' dtype; their cut frequencies are zero.

        Raises:
            ValueError: the vectors are not D long.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.vector_dim:
            raise ValueError(f"mask vectors have shape {tuple(vectors.shape)}, expected (K, {self.vector_dim})")
        rows, columns = self.row_basis.shape[0], self.column_basis.shape[0]
        exact = _product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            corner = vectors.new_zeros(vectors.shape[0], rows * columns, dtype=exact)
            corner = corner.index_copy(1, self.kept, vectors.to(exact)).unflatten(1, (rows, columns))
            half = corner @ self.column_basis.to(exact)  # (K, rows, columns) -> (K, rows, N)
            rows_back = self.row_basis.to(exact).T.expand(vectors.shape[0], -1, -1)
            return torch.bmm(rows_back, half).to(vectors.dtype)  # (K, N, N)


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float64 where the user lets float32 products round their factors (TF32, bf16)."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return dtype if backend.matmul.fp32_precision in ("none", "ieee") else torch.float64
