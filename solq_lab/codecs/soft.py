"""Codes of smooth images of the mask instead of its 0/1 pixels: blurred, or its signed distance, cut at the outline."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from solq_lab.codecs.dct import DCTCodec

GAIN_OF_THE_LAST = 0.5  # of the highest kept frequency after the blur
REACH = 1 / 8  # of the signed distance, mask sides: pixels farther from the outline all count the same


class BlurredDCTCodec(DCTCodec):
    """DCT coefficients of the mask after a Gaussian blur that fits the length of the vector.

    A blur with mirrored edges multiplies each coefficient by a gain that falls with its frequency; the width is such
    that the highest kept frequency keeps `GAIN_OF_THE_LAST`. What is decoded is the blurred mask, cut at one half: the
    cut frequencies would hardly have mattered, so nothing rings, and an L1 loss weighs high frequencies less.
    """

    threshold = "half"
    gain: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        frequency = self.frequencies.square().sum(1)  # squared
        gain = GAIN_OF_THE_LAST ** (frequency / frequency.max().clamp(min=1))
        self.register_buffer("gain", gain.double(), persistent=False)  # (D,)

    def encode(self, masks: Tensor) -> Tensor:
        vectors = super().encode(masks)
        return vectors * self.gain.to(vectors)


class DistanceDCTCodec(DCTCodec):
    """DCT coefficients of the mask's signed distance: 0.5 on the outline, 1 deep inside, 0 far outside.

    The distance is exact (scipy), in mask pixels to the outline between pixels, and ends at `REACH` of the mask's side.
    A distance is smoother than a mask: its spectrum falls faster. Encoding is neither linear nor differentiable.
    """

    threshold = "half"

    def encode(self, masks: Tensor) -> Tensor:
        self.check_masks(masks)
        dtype = torch.promote_types(masks.dtype, torch.float32)
        distance = signed_distance(masks.detach().cpu().numpy() > 0.5) / (2 * REACH * self.mask_size)
        return super().encode(torch.from_numpy(distance.clip(-0.5, 0.5) + 0.5).to(masks.device, dtype))


def signed_distance(masks: np.ndarray) -> np.ndarray:
    """(K, N, N) float64 distance of each pixel's centre to the outline, pixels, positive inside masks (K, N, N) bool.

    The outline runs half way between the centres of pixels inside and outside. Pixels of a full or an empty mask are
    at least 4 N away.
    """
    count, size = masks.shape[:2]
    inside = np.zeros((count + 2, size, size), dtype=bool)  # a full and an empty mask: every pixel has an other side
    inside[:count], inside[count] = masks, True
    apart = (4 * size, 1, 1)  # masks are too far from each other to matter
    outwards = ndimage.distance_transform_edt(inside, sampling=apart)[:count]
    inwards = ndimage.distance_transform_edt(~inside, sampling=apart)[:count]
    return np.where(masks, outwards - 0.5, 0.5 - inwards)
