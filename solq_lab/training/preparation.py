"""What is measured once, before the first step: the training's mask vectors, and the data set's fingerprint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec
from solq_lab.data.coco import CocoDataset
from solq_lab.files import hash_file

SAMPLED_VECTORS = 2000  # enough for the median of a coefficient to within 3 % of its spread
SAMPLED_IMAGES = 1000


def sample_vectors(dataset: CocoDataset, codec: MaskCodec, *, seed: int) -> Tensor:
    """Vectors (K, D) of training masks as the network will meet them, from images drawn without replacement.

    K is about `SAMPLED_VECTORS`, or less in a small data set; it may be 0.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))[:SAMPLED_IMAGES]
    vectors, count = [torch.zeros(0, codec.vector_dim)], 0
    for index in order.tolist():
        masks = dataset[index][1].masks
        vectors.append(codec.encode(masks).float())
        count += len(masks)
        if count >= SAMPLED_VECTORS:
            break
    return torch.cat(vectors)


def vector_statistics(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Center (D,) and spread (D,) of vectors (K, D): median and standard deviation of each coefficient.

    A coefficient that hardly varies gets a hundredth of the mean spread, so that it can still be learned. Without
    vectors to look at the center is 0 and the spread 1.
    """
    if len(vectors) < 2:
        return vectors.new_zeros(vectors.shape[1]), vectors.new_ones(vectors.shape[1])
    spread = vectors.std(dim=0)
    floor = spread.mean() / 100 if spread.any() else 1.0
    return vectors.median(dim=0).values, spread.clamp(min=float(floor))


def describe_dataset(dataset: CocoDataset) -> dict[str, Any]:
    """What tells one data set from another: the annotation file's hash, and counts."""
    return {
        "annotations": str(dataset.annotations),
        "sha256": hash_file(dataset.annotations),
        "images": len(dataset),
        "classes": sum(1 for name in dataset.classes.names if name),
    }
