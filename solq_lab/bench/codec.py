"""Every mask codec: ours, batched, against one mask after the other in scipy, numpy and scikit-learn."""

import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from solq_lab.bench.scenes import blob_masks
from solq_lab.bench.timing import Row, compare
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.codecs.sparse import SparseCodingCodec

logger = logging.getLogger(__name__)

MASKS, MASK_SIZE, VECTOR_DIM = 100, 128, 256
TRAINING_MASKS = 300
REPEATS = 4  # of the ways that take long
TOLERANCE = 1e-3  # of vectors up to 128 in size, and of pixels around 0..1

Way = Callable[[np.ndarray], np.ndarray]


def rows() -> Iterator[Row]:
    """Encoding and decoding an image's worth of masks by each method, with our masks per second."""
    kept = zigzag_places(MASK_SIZE)[:VECTOR_DIM]
    decode = partial(decode_one_by_one, kept=kept, size=MASK_SIZE)
    yield from _both_ways("DCT", DCTCodec(MASK_SIZE, VECTOR_DIM), partial(encode_one_by_one, kept=kept), decode)

    training = blob_masks(1, count=TRAINING_MASKS, size=MASK_SIZE)
    pca = PCACodec(MASK_SIZE, VECTOR_DIM)
    pca.fit([training])
    table = pca.get_buffer("components").numpy()
    yield from _both_ways("PCA", pca, *_products(np.ascontiguousarray(table.T), table), repeats=REPEATS)

    sparse = SparseCodingCodec(MASK_SIZE, VECTOR_DIM)
    try:
        sparse.fit([training])
    except ValueError as error:  # no scikit-learn
        logger.warning("no rows for sparse coding: %s", error)
    else:
        yield from _sparse_rows(sparse)

    flatten = FlattenCodec()
    identity = np.eye(flatten.vector_dim, dtype=np.float32)
    yield from _both_ways("flatten", flatten, *_products(identity, identity), repeats=REPEATS)


def _close(expected: np.ndarray, found: np.ndarray) -> bool:
    return bool(np.abs(expected - found).max() <= TOLERANCE)


def _both_ways(
    name: str,
    codec: MaskCodec,
    encode: Way,
    decode: Way,
    *,
    repeats: int = 9,
    same_vectors: Callable[[np.ndarray, np.ndarray], bool] = _close,
) -> Iterator[Row]:
    """Rows of one codec against the plain ways from masks to vectors and back."""
    masks = blob_masks(0, count=MASKS, size=codec.mask_size)
    vectors = codec.encode(masks)
    sizes = f"{MASKS} masks, {codec.mask_size}x{codec.mask_size} <-> {codec.vector_dim}, {name}"
    for verb, plainly, ours, same in (
        ("encode", lambda: encode(masks.numpy()), lambda: codec.encode(masks).numpy(), same_vectors),
        ("decode", lambda: decode(vectors.numpy()), lambda: codec.decode(vectors).numpy(), _close),
    ):
        row = compare("codec", f"{verb} {sizes}", plainly, ours, same, repeats=repeats)
        yield row._replace(what=f"{row.what}: {1000 * MASKS / row.ours:.3g} masks/s")


def _products(encoder: np.ndarray, decoder: np.ndarray) -> tuple[Way, Way]:
    """The plain ways of a linear codec: m B with B (N*N, D) and v C with C (D, N*N), one mask and vector at a time."""
    side = round(len(encoder) ** 0.5)

    def encode(masks: np.ndarray) -> np.ndarray:
        return np.stack([mask.ravel().astype(np.float32) @ encoder for mask in masks])

    def decode(vectors: np.ndarray) -> np.ndarray:
        return np.stack([(vector @ decoder).reshape(side, side) for vector in vectors])

    return encode, decode


def _sparse_rows(codec: SparseCodingCodec) -> Iterator[Row]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Lasso

    masks = blob_masks(0, count=MASKS, size=codec.mask_size)
    table = codec.get_buffer("atoms").numpy()
    pixels, atoms = masks.flatten(1).numpy().astype(np.float64), table.astype(np.float64)
    lasso = Lasso(
        codec.beta / codec.mask_size**2,  # scikit-learn averages the squared error over the pixels
        fit_intercept=False,
        precompute=atoms @ atoms.T,
        copy_X=False,
        tol=codec.tolerance / 2,  # of ||m||^2; ours is of its half
    )

    def encode(_: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # whether its codes are good enough is compared below
            return np.stack([lasso.fit(atoms.T, of_mask).coef_ for of_mask in pixels])

    def equally_good(expected: np.ndarray, found: np.ndarray) -> bool:
        """Whether the two costs differ by no more than either may lie above the minimum."""
        energy = np.square(pixels).sum(axis=1) / 2
        costs = [
            np.square(pixels - vectors @ atoms).sum(axis=1) / 2 + codec.beta * np.abs(vectors).sum(axis=1)
            for vectors in (expected, found.astype(np.float64))
        ]
        return bool((np.abs(costs[0] - costs[1]) <= codec.tolerance * energy).all())

    _, decode = _products(table.T, table)
    yield from _both_ways("sparse", codec, encode, decode, repeats=REPEATS, same_vectors=equally_good)


def zigzag_places(size: int) -> np.ndarray:
    """(size*size,) flat places of a spectrum in zig-zag order."""
    places = sorted(
        np.ndindex(size, size),
        key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]),
    )
    return np.array([row * size + column for row, column in places])


def encode_one_by_one(masks: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The plain way: a full cosine transform of each mask (K, N, N), of which the kept places are picked."""
    return np.stack([dctn(mask.astype(np.float32), norm="ortho").ravel()[kept] for mask in masks])


def decode_one_by_one(vectors: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """The plain way back: each vector scattered into an empty spectrum, transformed."""
    decoded = []
    for vector in vectors:
        spectrum = np.zeros(size * size, dtype=np.float32)
        spectrum[kept] = vector
        decoded.append(idctn(spectrum.reshape(size, size), norm="ortho"))
    return np.stack(decoded)


def binarize_one_by_one(decoded: np.ndarray) -> Tensor:
    """Masks (K, N, N) bool: pixels strictly above the middle of each reconstruction's range."""
    return torch.from_numpy(np.stack([image > (image.max() + image.min()) / 2 for image in decoded]))
