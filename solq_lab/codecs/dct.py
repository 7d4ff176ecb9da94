"""The paper's mask codec: the low frequencies of a cosine transform. Paper: section 3.2, "DCT"."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec, product_dtype
from solq_lab.ops.extension import cpu_operator


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


class SeparableCodec(MaskCodec):
    """Kept coefficients of a separable orthonormal transform, R m C^T, of the mask.

    The kept coefficients fill only a corner of the spectrum (23 x 23 of 128 x 128 for 256 of the DCT), so both ways are
    two thin matrix products per mask instead of a full transform.

    Args:
        mask_size: side N of the masks, mask pixels.
        vector_dim: number D of coefficients.
        basis: (size, rows) -> (rows, size) float64, the first rows of the transform's matrix.
        order: (N*N,) row-major indexes of the spectrum, the coefficients to keep first.
    """

    row_basis: Tensor
    column_basis: Tensor
    kept: Tensor

    def __init__(self, mask_size: int, vector_dim: int, basis: Callable[[int, int], Tensor], order: Tensor) -> None:
        super().__init__(mask_size, vector_dim)
        kept = order[:vector_dim]
        row, column = kept // mask_size, kept % mask_size
        rows, columns = int(row.max()) + 1, int(column.max()) + 1
        # The tables follow from the two sizes, so no state dict carries them. They stay float64; each call rounds them.
        self.register_buffer("row_basis", basis(mask_size, rows), persistent=False)
        self.register_buffer("column_basis", basis(mask_size, columns), persistent=False)
        self.register_buffer("kept", row * columns + column, persistent=False)  # indexes in the rows x columns corner

    def encode(self, masks: Tensor) -> Tensor:
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        exact = product_dtype(dtype, masks.device)
        if masks.dtype == torch.bool:
            masks = masks.view(torch.uint8)  # the same bytes, but ten times quicker to turn into floats
        with torch.autocast(masks.device.type, enabled=False):
            rows = self.row_basis.to(exact).expand(masks.shape[0], -1, -1)
            half = torch.bmm(rows, masks.to(exact))  # (K, N, N) -> (K, rows, N)
            corner = half @ self.column_basis.to(exact).T  # (K, rows, columns)
        return corner.flatten(1).index_select(1, self.kept).to(dtype)

    def decode(self, vectors: Tensor) -> Tensor:
        """Reconstructions whose cut coefficients are zero."""
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        rows, columns = self.row_basis.shape[0], self.column_basis.shape[0]
        with torch.autocast(vectors.device.type, enabled=False):
            corner = vectors.new_zeros(vectors.shape[0], rows * columns, dtype=exact)
            corner = corner.index_copy(1, self.kept, vectors.to(exact)).unflatten(1, (rows, columns))
            half = corner @ self.column_basis.to(exact)  # (K, rows, columns) -> (K, rows, N)
            rows_back = self.row_basis.to(exact).T.expand(vectors.shape[0], -1, -1)
            return torch.bmm(rows_back, half).to(vectors.dtype)  # (K, N, N)


class DCTCodec(SeparableCodec):
    """The first `vector_dim` coefficients, in zig-zag order, of the orthonormal 2-D DCT-II of the 0/1 mask.

    Nothing is scaled: the first entry of a full mask's vector is N, and every entry weighs the same in an L1 loss.

    Both ways run in plain torch, or in `cuda/dct_cpu.cpp`, which uses that a bool mask is a few runs of ones and that
    basis functions are symmetric.
    """

    isometric = True

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim, cosine_basis, zigzag(mask_size))

    @classmethod
    def from_options(cls, mask_size: int, vector_dim: int, **options: Any) -> DCTCodec:
        """The paper's codec, or with learn_decoder=True the one whose decoder is learnt."""
        return (LearnedDCTCodec if options.get("learn_decoder") else cls)(mask_size, vector_dim)

    @property
    def frequencies(self) -> Tensor:
        """(D, 2) int64 frequencies down and across of the coefficients, half periods per side of the box."""
        columns = self.column_basis.shape[0]
        return torch.stack([self.kept // columns, self.kept % columns], dim=1)

    def encode(self, masks: Tensor) -> Tensor:
        self.check_masks(masks)
        compiled = None
        if masks.dtype == torch.bool:
            compiled = _compiled("dct_encode", masks, product_dtype(torch.float32, masks.device))
        return super().encode(masks) if compiled is None else compiled(masks, *self._tables())

    def decode(self, vectors: Tensor) -> Tensor:
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        compiled = _compiled("dct_decode", vectors, exact)
        if compiled is None:
            return super().decode(vectors)
        return compiled(vectors.to(exact), *self._tables()).to(vectors.dtype)

    def decode_masks(self, vectors: Tensor) -> Tensor:
        """Masks of vectors; compiled, each is binarized while it is in cache."""
        self.check_vectors(vectors)
        # Vectors of other types: decoding rounds to them before the threshold.
        if self.threshold == "middle" and vectors.dtype == torch.float32:
            compiled = _compiled("dct_decode_bits", vectors, product_dtype(vectors.dtype, vectors.device))
            if compiled is not None:
                return compiled(vectors, *self._tables())
        return super().decode_masks(vectors)

    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row_basis, self.column_basis, self.kept


class LearnedDCTCodec(DCTCodec):
    """The DCT's vectors, decoded by a matrix, at first the DCT's own, that a network learns and keeps (`SOLQ`).

    The encoder is fixed. Linear form of the learned decoder of ISTR (Hu et al., TIP 2024). `decoder` (D, N*N), what
    unit vectors decode to, is a buffer until the parameter of a network takes its place.
    """

    decoder: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        units = torch.eye(vector_dim, dtype=torch.float64)
        basis = SeparableCodec.decode(self, units).flatten(1).float()
        self.register_buffer("decoder", basis, persistent=False)  # the network's state dict carries it

    def decode(self, vectors: Tensor) -> Tensor:
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            pixels = vectors.to(exact) @ self.decoder.to(exact)  # (K, N*N)
        return pixels.to(vectors.dtype).unflatten(1, (self.mask_size, self.mask_size))

    def decode_masks(self, vectors: Tensor) -> Tensor:
        return self.binarize(self.decode(vectors))


def _compiled(name: str, tensor: Tensor, exact: torch.dtype) -> Callable[..., Tensor] | None:
    """The C++ operator where it applies: float32 on the CPU, outside of autograd and tracing."""
    traced = torch.compiler.is_compiling() or (tensor.requires_grad and torch.is_grad_enabled())
    return None if tensor.device.type != "cpu" or exact != torch.float32 or traced else cpu_operator(name)
