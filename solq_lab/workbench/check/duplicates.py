"""Images of one split that look like images of another: neighbouring frames, resized or re-encoded copies.

Candidates have nearly the same bits of a perceptual hash, the signs of a thumbnail's low DCT coefficients about their
median; of these, the thumbnails have to correlate.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import scipy.fft
from torch import Tensor
from torch.nn.functional import interpolate

SIDE = 16  # of a thumbnail, pixels
LOW = 8  # DCT coefficients of each direction
MAX_BITS = 8  # of 64 that may differ
MIN_CORRELATION = 0.98
MIN_STD = 4.0  # grey levels: flat images have no look


def thumbnail(image: Tensor) -> bytes:
    """The look of an image (3, H, W) uint8: SIDE x SIDE grey levels; empty where it is flat."""
    grey = interpolate(image.float().mean(dim=0)[None, None], (SIDE, SIDE), mode="area")[0, 0].numpy()
    return grey.round().astype(np.uint8).tobytes() if grey.std() >= MIN_STD else b""


def lookalikes(train: Mapping[str, bytes], val: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    """Images of val with the image of train that looks the same, by name; thumbnails by name."""
    names = [name for name, look in train.items() if look]
    if not names:
        return
    looks = _pixels([train[name] for name in names])
    hashes = _hashes(looks)
    for name, look in val.items():
        if not look:
            continue
        own = _pixels([look])
        near = np.flatnonzero(np.bitwise_count(hashes ^ _hashes(own)) <= MAX_BITS)
        correlations = [np.corrcoef(looks[row].ravel(), own[0].ravel())[0, 1] for row in near.tolist()]
        if correlations and max(correlations) >= MIN_CORRELATION:
            yield name, names[near[int(np.argmax(correlations))]]


def _pixels(looks: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(looks), dtype=np.uint8).reshape(-1, SIDE, SIDE).astype(np.float32)


def _hashes(looks: np.ndarray) -> np.ndarray:
    """(n,) uint64 of thumbnails (n, SIDE, SIDE)."""
    low = scipy.fft.dctn(looks, axes=(1, 2))[:, :LOW, :LOW].reshape(len(looks), -1)
    low[:, 0] = 0  # the mean is brightness
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1).view(np.uint64)[:, 0]
