"""The cosine code: batched low-frequency products against one full transform per mask."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.fft import dctn, idctn

from solq_lab.bench.scenes import blob_masks
from solq_lab.bench.timing import Row, compare
from solq_lab.codecs.dct import DCTCodec

MASKS, MASK_SIZE, VECTOR_DIM = 100, 128, 256
ENCODE_TOLERANCE = 1e-3  # entries go up to 128
DECODE_TOLERANCE = 1e-4  # cells lie around 0..1


def rows() -> Iterator[Row]:
    """Encoding and decoding an image's worth of masks."""
    masks = blob_masks(0, count=MASKS, size=MASK_SIZE)
    codec = DCTCodec(MASK_SIZE, VECTOR_DIM)
    vectors = codec.encode(masks)
    kept = zigzag_places(MASK_SIZE)[:VECTOR_DIM]
    size = f"{MASKS} masks, {MASK_SIZE}x{MASK_SIZE} <-> {VECTOR_DIM}"
    yield compare(
        "codec",
        f"encode {size}",
        lambda: encode_one_by_one(masks.numpy(), kept),
        lambda: codec.encode(masks).numpy(),
        lambda expected, found: np.abs(expected - found).max() <= ENCODE_TOLERANCE,
    )
    yield compare(
        "codec",
        f"decode {size}",
        lambda: decode_one_by_one(vectors.numpy(), kept, MASK_SIZE),
        lambda: codec.decode(vectors).numpy(),
        lambda expected, found: np.abs(expected - found).max() <= DECODE_TOLERANCE,
    )


def zigzag_places(size: int) -> np.ndarray:
    """(size*size,) flat places of a spectrum in zig-zag order."""
    places = sorted(
        np.ndindex(size, size),
        key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]),
    )
    return np.array([row * size + column for row, column in places])


def encode_one_by_one(masks: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The plain way: a full transform of each mask (K, N, N), of which the kept places are picked."""
    return np.stack([dctn(mask.astype(np.float32), norm="ortho").ravel()[kept] for mask in masks])


def decode_one_by_one(vectors: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """The plain way back: each vector scattered into an empty spectrum, transformed."""
    decoded = []
    for vector in vectors:
        spectrum = np.zeros(size * size, dtype=np.float32)
        spectrum[kept] = vector
        decoded.append(idctn(spectrum.reshape(size, size), norm="ortho"))
    return np.stack(decoded)


def binarize_one_by_one(decoded: np.ndarray) -> torch.Tensor:
    """Masks (K, N, N) bool: cells strictly above the middle of each reconstruction's range."""
    return torch.from_numpy(np.stack([image > (image.max() + image.min()) / 2 for image in decoded]))
