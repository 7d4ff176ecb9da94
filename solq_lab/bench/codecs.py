"""Every mask code: ours, batched, against one mask after the other in numpy and scikit-learn."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from solq_lab.bench import codec as cosine
from solq_lab.bench.scenes import blob_masks
from solq_lab.bench.timing import Row, compare
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.codecs.sparse import SparseCodingCodec

logger = logging.getLogger(__name__)

MASKS = cosine.MASKS
TRAINING_MASKS = 300
REPEATS = 4
TOLERANCE = 1e-3  # of vectors up to 128 in size, and of cells around 0..1


class PlainCode(NamedTuple):
    """The plain way of a linear code: encoding m B and decoding v C, one mask and one vector at a time.

    encoder: B, (N*N, D).
    decoder: C, (D, N*N).
    """

    encoder: np.ndarray
    decoder: np.ndarray

    def encode(self, masks: np.ndarray) -> np.ndarray:
        """Vectors (K, D) of masks (K, N, N)."""
        return np.stack([mask.ravel().astype(np.float32) @ self.encoder for mask in masks])

    def decode(self, vectors: np.ndarray) -> np.ndarray:
        """Reconstructions (K, N, N) of vectors (K, D)."""
        side = round(self.decoder.shape[1] ** 0.5)
        return np.stack([(vector @ self.decoder).reshape(side, side) for vector in vectors])


def rows() -> Iterator[Row]:
    """Encoding and decoding an image's worth of masks by each method, with our masks per second."""
    for row in _rows():
        yield row._replace(what=f"{row.what}: {1000 * MASKS / row.ours_ms:.3g} masks/s")


def _rows() -> Iterator[Row]:
    yield from cosine.rows()
    size, vector_dim = cosine.MASK_SIZE, cosine.VECTOR_DIM
    training = blob_masks(1, count=TRAINING_MASKS, size=size)
    components = PCACodec(size, vector_dim)
    components.fit([training])
    table = components.components.numpy()
    yield from _linear_rows("PCA", components, PlainCode(np.ascontiguousarray(table.T), table))
    try:
        yield from _sparse_rows(size, vector_dim, training)
    except ValueError as error:  # no scikit-learn
        logger.warning("no rows for sparse coding: %s", error)
    flat, identity = FlattenCodec(), np.eye(FlattenCodec().vector_dim, dtype=np.float32)
    yield from _linear_rows("flatten", flat, PlainCode(identity, identity))


def _linear_rows(name: str, codec: MaskCodec, plain: PlainCode) -> Iterator[Row]:
    masks = blob_masks(0, count=MASKS, size=codec.mask_size)
    vectors = codec.encode(masks)
    sizes = f"{MASKS} masks, {codec.mask_size}x{codec.mask_size} <-> {codec.vector_dim}, {name}"
    for verb, baseline, ours in (
        ("encode", lambda: plain.encode(masks.numpy()), lambda: codec.encode(masks).numpy()),
        ("decode", lambda: plain.decode(vectors.numpy()), lambda: codec.decode(vectors).numpy()),
    ):
        yield compare("codec", f"{verb} {sizes}", baseline, ours, _close, repeats=REPEATS)


def _sparse_rows(size: int, vector_dim: int, training: torch.Tensor) -> Iterator[Row]:
    codec = SparseCodingCodec(size, vector_dim)
    codec.fit([training])
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    masks = blob_masks(0, count=MASKS, size=size)
    cells, atoms = masks.flatten(1).numpy().astype(np.float64), codec.atoms.numpy().astype(np.float64)
    vectors = codec.encode(masks)
    sizes = f"{MASKS} masks, {size}x{size} <-> {vector_dim}, sparse"

    lasso = Lasso(
        codec.beta / size**2,  # scikit-learn averages the squared error over the cells
        fit_intercept=False,
        precompute=atoms @ atoms.T,
        copy_X=False,
        tol=codec.tolerance / 2,  # of ||m||^2; ours is of its half
    )

    def encode_one_by_one() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # whether its codes are good enough is compared below
            return np.stack([lasso.fit(atoms.T, cell).coef_ for cell in cells])

    def equally_good(expected: np.ndarray, found: np.ndarray) -> bool:
        """Whether the two costs differ by no more than either may lie above the minimum."""
        energy = np.square(cells).sum(axis=1) / 2
        costs = [
            np.square(cells - codes @ atoms).sum(axis=1) / 2 + codec.beta * np.abs(codes).sum(axis=1)
            for codes in (expected, found.astype(np.float64))
        ]
        return bool((np.abs(costs[0] - costs[1]) <= codec.tolerance * energy).all())

    yield compare(
        "codec", f"encode {sizes}", encode_one_by_one, lambda: codec.encode(masks).numpy(), equally_good, repeats=2
    )
    plain = PlainCode(codec.atoms.numpy().T, codec.atoms.numpy())
    yield compare(
        "codec",
        f"decode {sizes}",
        lambda: plain.decode(vectors.numpy()),
        lambda: codec.decode(vectors).numpy(),
        _close,
        repeats=REPEATS,
    )


def _close(expected: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.abs(expected - found).max() <= TOLERANCE)
