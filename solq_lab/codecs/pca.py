"""Principal components of the training masks. Paper: section 3.2, eq. 4; table 3a, row "PCA"."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solq_lab.codecs.base import CodecFit, FittedCodec, product_dtype

PIXELS_PER_UPDATE = 2**24  # 1024 masks of 128 x 128: bounds the memory of an update (float64: 128 MiB per copy)
MIN_LABEL_NOISE, MAX_LABEL_NOISE = 0.01, 0.05  # of the released inverse sigmoid


class PCACodec(FittedCodec):
    """Coordinates of a mask along the first D principal components P of the training masks, v = m P.

    As eq. 4 writes it, nothing is subtracted or scaled: encoding is linear, an empty mask is the zero vector. The
    released implementation differs, see `released`.

    Args:
        mask_size: side N of the masks, mask pixels.
        vector_dim: number D of components.
        centered: subtract the mean mask first.
        whitened: divide each coordinate by its std over the training masks.
        inverse_sigmoid: encode logits of noisy labels instead of the masks, see `noise_moments`; decoding ends in a
            sigmoid. In training mode `encode` draws the label noise for every pixel; in evaluation it takes the mean.
    """

    method = "pca"
    components: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        mask_size: int,
        vector_dim: int,
        *,
        centered: bool = False,
        whitened: bool = False,
        inverse_sigmoid: bool = False,
    ) -> None:
        super().__init__(mask_size, vector_dim)
        self.centered, self.whitened, self.inverse_sigmoid = centered, whitened, inverse_sigmoid
        self.register_buffer("components", torch.zeros(vector_dim, mask_size**2))  # orthonormal rows
        self.register_buffer("mean", torch.zeros(mask_size**2))
        self.register_buffer("scale", torch.zeros(vector_dim))

    @classmethod
    def released(cls, mask_size: int = 28, vector_dim: int = 60) -> PCACodec:
        """The released variant: centered, whitened, on logits, cut at one half, trained with squares and dice."""
        codec = cls(mask_size, vector_dim, centered=True, whitened=True, inverse_sigmoid=True)
        codec.loss, codec.threshold = "l2_dice", "half"
        return codec

    @classmethod
    def from_options(cls, mask_size: int, vector_dim: int, **options: Any) -> PCACodec:
        """The codec of eq. 4, or with pca="released" the released variant."""
        return cls.released(mask_size, vector_dim) if options.get("pca") == "released" else cls(mask_size, vector_dim)

    @property
    def settings(self) -> dict[str, bool | float]:
        return {"centered": self.centered, "whitened": self.whitened, "inverse_sigmoid": self.inverse_sigmoid}

    def start_fit(self, seed: int = 0) -> PCAFit:
        """A new fit; it uses no random numbers."""
        return PCAFit(self)

    def encode(self, masks: Tensor) -> Tensor:
        self._check_fitted()
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        exact = product_dtype(dtype, masks.device)
        pixels = masks.flatten(1).to(exact)  # (K, N, N) -> (K, N*N)
        with torch.autocast(masks.device.type, enabled=False):
            if self.inverse_sigmoid:
                pixels = (2 * pixels - 1) * self._logit_size(pixels)
            vectors = (pixels - self.mean.to(exact)) @ self.components.to(exact).T
            return (vectors / self.scale.to(exact)).to(dtype)

    def decode(self, vectors: Tensor) -> Tensor:
        self._check_fitted()
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        with torch.autocast(vectors.device.type, enabled=False):
            scaled = vectors.to(exact) * self.scale.to(exact)
            pixels = torch.addmm(self.mean.to(exact), scaled, self.components.to(exact))
            pixels = pixels.sigmoid() if self.inverse_sigmoid else pixels
        return pixels.to(vectors.dtype).unflatten(1, (self.mask_size, self.mask_size))  # (K, N*N) -> (K, N, N)

    def _logit_size(self, pixels: Tensor) -> Tensor | float:
        """Absolute logit of each pixel: drawn in training, else its mean."""
        if not self.training:
            return noise_moments()[0]
        noise = (MAX_LABEL_NOISE * torch.rand_like(pixels)).clamp(min=MIN_LABEL_NOISE)
        return -noise.logit()


class PCAFit(CodecFit):
    """Principal components of a stream of masks, in memory for a few hundred of them (Ross et al., IJCV 2008).

    Kept are `rank` orthogonal rows R with R^T R close to the sum of all m^T m, of deviations from the mean where the
    codec is centered. Each batch is stacked below them, and the strongest `rank` rows of the rotated stack are kept. As
    long as all masks together span at most `rank` dimensions nothing is lost, so small masks (N*N up to `rank`) are
    fitted exactly; with twice the D components kept, truncation hardly changes the first D.
    """

    def __init__(self, codec: PCACodec) -> None:
        self._codec = codec
        pixels = codec.mask_size**2
        self.batch_size = max(1, min(1024, PIXELS_PER_UPDATE // pixels))
        self._rank = min(pixels, 2 * codec.vector_dim + 256)
        self._rows = torch.zeros(0, pixels, dtype=torch.float64)
        self._mean = torch.zeros(pixels, dtype=torch.float64)
        self._count = 0

    def update(self, masks: Tensor) -> None:
        """Learn from masks (K, N, N) bool, K at least 1."""
        batch = masks.flatten(1).to("cpu", torch.float64)  # (K, N, N) -> (K, N*N)
        before, self._count = self._count, self._count + len(batch)
        parts = [self._rows, batch]
        if self._codec.centered:
            mean = batch.mean(dim=0)
            step = mean - self._mean
            self._mean = self._mean + step * (len(batch) / self._count)
            parts = [self._rows, batch - mean, step[None] * math.sqrt(before * len(batch) / self._count)]
        self._rows = _strongest_rows(torch.cat(parts), self._rank)

    def state(self) -> dict[str, Tensor]:
        return {"rows": self._rows, "mean": self._mean, "count": torch.tensor(self._count)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._rows, self._mean, self._count = state["rows"], state["mean"], int(state["count"])

    def tables(self) -> dict[str, Tensor]:
        codec, mean = self._codec, self._mean
        _, sizes, components = torch.linalg.svd(self._rows, full_matrices=False)
        found = int((sizes > sizes[0] * 1e-9).sum()) if len(sizes) else 0  # fewer masks than components: the rest is 0
        variance = torch.zeros(codec.vector_dim, dtype=torch.float64)
        rows = torch.zeros(codec.vector_dim, codec.mask_size**2, dtype=torch.float64)
        kept = min(found, codec.vector_dim)
        variance[:kept] = sizes[:kept].square() / max(self._count - 1, 1)
        # The largest entry of each is positive.
        largest = components[:kept].abs().argmax(dim=1, keepdim=True)
        rows[:kept] = components[:kept] * components[:kept].gather(1, largest).sign()
        if codec.inverse_sigmoid:  # of a logit, +-L for a pixel in or out: L is independent of the mask
            size, std = noise_moments()
            mean, variance[:kept] = size * (2 * mean - 1), 4 * size**2 * variance[:kept] + std**2
        scale = variance.sqrt() if codec.whitened else torch.ones_like(variance)
        scale[kept:] = 1
        return {"components": rows.float(), "mean": mean.float(), "scale": scale.float()}


def noise_moments() -> tuple[float, float]:
    """Mean and std of L, the absolute logit of a pixel in the released inverse sigmoid of noisy labels.

    A pixel in the mask has probability 1 - u, one outside u, with label noise u = max(0.01, 0.05 r) and r uniform in
    0..1; so L is log((1 - u) / u). The released implementation draws u for every pixel of a fit; mean and variance give
    the same tables without random numbers.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    share = MIN_LABEL_NOISE / MAX_LABEL_NOISE  # of the draws, at the least noise
    noise = MIN_LABEL_NOISE + (MAX_LABEL_NOISE - MIN_LABEL_NOISE) * (nodes + 1) / 2
    noise = np.append(noise, MIN_LABEL_NOISE)
    weights = np.append(weights / 2 * (1 - share), share)
    logits = np.log((1 - noise) / noise)
    mean = float(weights @ logits)
    return mean, math.sqrt(float(weights @ (logits - mean) ** 2))


def _strongest_rows(rows: Tensor, count: int) -> Tensor:
    """At most `count` orthogonal rows S, the strongest first, with S^T S the best fit of that rank to rows^T rows."""
    length, pixels = rows.shape
    if length <= count:
        return rows
    if pixels < length:
        sizes, vectors = torch.linalg.eigh(rows.T @ rows)
        return sizes.clamp(min=0).sqrt().flip(0)[:count, None] * vectors.T.flip(0)[:count]
    _, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors.T.flip(0)[:count] @ rows
