"""Codes of the outline: distances from the centre, and Fourier coefficients of the closed contour.

They hold what an outline can hold: a mask with a hole comes back filled, of several parts one is left. Measured by
`codec-ceiling`, that is what holes and parts cost.
"""

import math
from typing import cast

import numpy as np
import torch
from contourpy import contour_generator
from torch import Tensor

from solq_lab.codecs.base import MaskCodec, product_dtype

MASKS_AT_ONCE = 16  # whose rays are sampled together: bounds the memory
SOFTNESS = 0.1  # mask sides over which a polar reconstruction passes from 0 to 1
CONTOUR_POINTS = 256  # on a contour, for its Fourier coefficients and for drawing it


class PolarCodec(MaskCodec):
    """The mask's centre of mass and D - 2 distances from it to the outline, at equal angles; all in mask sides.

    A distance is that of the farthest mask pixel along its ray (PolarMask, CVPR 2020), 0 where there is none. Between
    rays distances are interpolated over the angle. Decoding is differentiable: it passes from 1 to 0 over `SOFTNESS`
    of the mask's side, with 0.5 on the outline.

    Raises:
        ValueError: fewer than 3 numbers.
    """

    threshold = "half"
    directions: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        if vector_dim < 3:
            raise ValueError(f"vector_dim {vector_dim}: a polar code has a centre and rays, 3 numbers or more")
        angle = torch.arange(vector_dim - 2, dtype=torch.float64) * (2 * math.pi / (vector_dim - 2))
        self.register_buffer("directions", torch.stack([angle.cos(), angle.sin()], dim=1), persistent=False)  # (R, 2)

    def encode(self, masks: Tensor) -> Tensor:
        """Vectors with the centre (x, y) first."""
        self.check_masks(masks)
        vectors = masks.new_zeros(masks.shape[0], self.vector_dim, dtype=torch.float64)
        for start in range(0, masks.shape[0], MASKS_AT_ONCE):
            vectors[start : start + MASKS_AT_ONCE] = self._encode(masks[start : start + MASKS_AT_ONCE] > 0.5)
        return vectors.to(torch.promote_types(masks.dtype, torch.float32))

    def _encode(self, inside: Tensor) -> Tensor:
        size, area = self.mask_size, inside.sum((1, 2)).clamp(min=1)
        centres = (torch.arange(size, device=inside.device, dtype=torch.float64) + 0.5) / size
        x, y = (inside.sum(axis).double() @ centres / area for axis in (1, 2))  # (k,)
        centre = torch.where(inside.any(2).any(1)[:, None], torch.stack([x, y], dim=1), 0.5)  # (k, 2)

        # Steps of half a mask pixel along each ray, to the corner of the frame at most.
        steps = torch.arange(3 * size, device=inside.device, dtype=torch.float64) / (2 * size)  # (T,)
        points = centre[:, None, None] + self.directions[:, None] * steps[:, None]  # (k, R, T, 2)
        column, row = (points * size).floor().long().unbind(-1)
        within = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        flat = row.clamp(0, size - 1) * size + column.clamp(0, size - 1)
        hit = within & inside.flatten(1).gather(1, flat.flatten(1)).view_as(flat)
        farthest = (hit * (steps + 1 / (4 * size))).amax(dim=2)  # the outline lies beyond the last sample, on average
        return torch.cat([centre, farthest], dim=1)

    def decode(self, vectors: Tensor) -> Tensor:
        self.check_vectors(vectors)
        exact = product_dtype(torch.promote_types(vectors.dtype, torch.float32), vectors.device)
        centre, distances = vectors[:, :2].to(exact), vectors[:, 2:].to(exact)
        rays, centres = distances.shape[1], self._centres().to(exact)
        offset = centres - centre[:, None]  # (K, N*N, 2)

        # The ray before each pixel's angle, and the share of the way to the next one.
        turn = torch.atan2(offset[..., 1], offset[..., 0]) * (rays / (2 * math.pi))
        before = turn.floor()
        share = turn - before
        first, second = before.long() % rays, (before.long() + 1) % rays
        outline = distances.gather(1, first) * (1 - share) + distances.gather(1, second) * share
        soft = 0.5 + (outline - offset.square().sum(-1).clamp(min=1e-12).sqrt()) / SOFTNESS
        return soft.clamp(0, 1).to(vectors.dtype).unflatten(1, (self.mask_size, self.mask_size))

    def _centres(self) -> Tensor:
        """(N*N, 2) float64 centres (x, y) of the mask's pixels, in mask sides."""
        side = (torch.arange(self.mask_size, device=self.directions.device, dtype=torch.float64) + 0.5) / self.mask_size
        y, x = torch.meshgrid(side, side, indexing="ij")
        return torch.stack([x, y], dim=-1).flatten(0, 1)


class FourierContourCodec(MaskCodec):
    """The lowest Fourier coefficients of the longest contour, z = x + i y over its length, in mask sides.

    Coefficients 0, 1, -1, 2, -2, ... one after the other, real part before imaginary part (elliptic Fourier
    descriptors, Kuhl and Giardina 1982, in complex form). The contour runs around its largest part, from the point that
    lies to the right of its centre. Decoding fills the drawn contour: its result is 0 or 1, without a gradient.
    """

    threshold = "half"
    waves: Tensor

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        count = torch.arange((vector_dim + 1) // 2)
        frequency = torch.where(count % 2 == 1, (count + 1) // 2, -(count // 2))  # 0, 1, -1, 2, -2, ...
        turn = torch.arange(CONTOUR_POINTS, dtype=torch.float64) * (2 * math.pi / CONTOUR_POINTS)
        waves = torch.polar(torch.ones(1, dtype=torch.float64), frequency[:, None] * turn)
        self.register_buffer(
            "waves", torch.view_as_real(waves), persistent=False
        )  # (F, P, 2), moves and casts as reals

    def encode(self, masks: Tensor) -> Tensor:
        """Vectors of the largest contours; of empty masks, zeros."""
        self.check_masks(masks)
        inside = (masks > 0.5).cpu().numpy()
        contours = (
            np.stack([longest_contour(mask) for mask in inside]) if len(inside) else np.zeros((0, CONTOUR_POINTS))
        )
        points = torch.from_numpy(contours.astype(complex) / self.mask_size)  # (K, P)
        spectrum = points @ torch.view_as_complex(self.waves.cpu().double()).conj().T / CONTOUR_POINTS  # (K, F)
        vectors = torch.view_as_real(spectrum.resolve_conj()).flatten(1)[:, : self.vector_dim]
        return vectors.to(masks.device, torch.promote_types(masks.dtype, torch.float32))

    def decode(self, vectors: Tensor) -> Tensor:
        """Filled contours, 0 or 1."""
        self.check_vectors(vectors)
        parts = torch.zeros(vectors.shape[0], 2 * self.waves.shape[0], dtype=torch.float64, device=vectors.device)
        parts[:, : self.vector_dim] = vectors.detach()
        with torch.autocast(vectors.device.type, enabled=False):
            spectrum = torch.view_as_complex(parts.unflatten(1, (-1, 2)))
            contours = torch.view_as_real(spectrum @ torch.view_as_complex(self.waves.double()))  # (K, P, 2)
        return fill_contours(contours * self.mask_size, self.mask_size).to(vectors.dtype)


def longest_contour(mask: np.ndarray) -> np.ndarray:
    """(CONTOUR_POINTS,) complex points x + i y, mask pixels, at equal steps along a mask's largest contour.

    The mask is (N, N) bool; an empty one has zeros.
    """
    if not mask.any():
        return np.zeros(CONTOUR_POINTS, dtype=complex)
    lines = cast(list[np.ndarray], contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5))
    loops = [line[:-1, 0] + 1j * line[:-1, 1] - (0.5 + 0.5j) for line in lines]  # closed; a pixel's centre is at + 0.5
    areas = [np.imag(np.conj(loop) * np.roll(loop, -1)).sum() / 2 for loop in loops]
    best = int(np.argmax(np.abs(areas)))
    loop = loops[best] if areas[best] > 0 else loops[best][::-1]

    # From the point at angle 0 around the centre, in equal steps of length.
    loop = np.roll(loop, -int(np.abs(np.angle(loop - loop.mean())).argmin()))
    closed = np.append(loop, loop[0])
    length = np.concatenate([[0.0], np.abs(np.diff(closed)).cumsum()])
    return np.interp(np.linspace(0, length[-1], CONTOUR_POINTS, endpoint=False), length, closed)


def fill_contours(contours: Tensor, size: int) -> Tensor:
    """(K, size, size) masks, 0 or 1 in the contours' dtype, of closed contours (K, P, 2) of points (x, y), pixels.

    A pixel is inside where the contour winds around its centre.
    Every edge that crosses the height of a row of centres changes the winding number of all pixels to its right.
    """
    start, end = contours, contours.roll(-1, dims=1)
    heights = torch.arange(size, dtype=contours.dtype, device=contours.device) + 0.5  # (N,)
    below, above = start[..., 1, None] <= heights, end[..., 1, None] <= heights  # (K, P, N)
    crossing = above.long() - below.long()  # 1 upwards, -1 downwards, 0 none

    rise = end[..., 1] - start[..., 1]
    share = (heights - start[..., 1, None]) / torch.where(rise == 0, 1, rise)[..., None]
    x = start[..., 0, None] + share * (end[..., 0] - start[..., 0])[..., None]
    column = (
        (x - 0.5).ceil().clamp(0, size).nan_to_num().long()
    )  # the first pixel whose centre is right of the crossing

    changes = torch.zeros(len(contours), size, size + 1, dtype=torch.long, device=contours.device)
    changes.scatter_add_(2, column.transpose(1, 2), crossing.transpose(1, 2))  # (K, N, P) into (K, N, N + 1)
    return (changes[..., :size].cumsum(2) != 0).to(contours.dtype)
