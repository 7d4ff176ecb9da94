"""Masks through a codec and back: encode, decode, binarize, paste, compare. Paper: section 3.2."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec
from solq_lab.masks import paste_to_rle, rle_iou


class Reconstruction(NamedTuple):
    """K masks after a codec, on its device."""

    vectors: Tensor  # (K, D) mask vectors as they were decoded, errors included
    decoded: Tensor  # (K, N, N) float
    masks: Tensor  # (K, N, N) bool


@torch.inference_mode()
def reconstruct(
    codec: MaskCodec, masks: Tensor, *, vector_error: Tensor | None = None, step: float = 0.0
) -> Reconstruction:
    """Masks (K, N, N) bool encoded, decoded and binarized, all in one batch.

    Args:
        codec: the codec, on any device.
        masks: in the box frame.
        vector_error: (K, D) added to the mask vectors. None: nothing.
        step: then every entry is rounded to a multiple of this. 0: none is.
    """
    vectors = codec.encode(masks.to(device_of(codec)))
    if vector_error is not None:
        vectors = vectors + vector_error.to(vectors)
    if step > 0:
        vectors = (vectors / step).round() * step
    decoded = codec.decode(vectors)
    return Reconstruction(vectors, decoded, codec.binarize(decoded))


def paste_and_compare(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], true_rles: Sequence[dict], *, both_empty: float = 1.0
) -> tuple[list[dict], np.ndarray]:
    """Box-frame masks (K, N, N) bool pasted into their image: RLEs, and their IoU (K,) with the true masks.

    Args:
        masks, boxes, image_size: as in `paste_to_rle`.
        true_rles: K compressed RLEs of the image.
        both_empty: the IoU of two empty masks.
    """
    rles = paste_to_rle(masks, boxes, image_size)
    return rles, rle_iou(rles, true_rles, both_empty=both_empty)


def box_frame_iou(first: Tensor, second: Tensor) -> Tensor:
    """(K,) IoU of masks (K, N, N) bool in one frame; 1 for two empty masks."""
    shared, united = (first & second).sum((1, 2)), (first | second).sum((1, 2))
    return torch.where(united > 0, shared / united.clamp(min=1), 1.0)


def device_of(codec: MaskCodec) -> torch.device:
    """Where a codec's tables are; the CPU for a codec without any."""
    table = next(codec.buffers(), None)
    return torch.device("cpu") if table is None else table.device
