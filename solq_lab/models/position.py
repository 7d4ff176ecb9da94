"""Sine position encodings, and the geometry of padded levels.

Paper: section 3.2 takes both from Deformable DETR. Everything here is float32 whatever the network computes in: the
released implementation does so too, and a half-precision coordinate would miss its cell.
"""

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0  # longest wave over shortest
STABILISER = 1e-6  # keeps the division finite in a padded row or column, whose count is 0


def sine_features(values: Tensor, features: int) -> Tensor:
    """Sines and cosines of numbers at `features / 2` wave lengths, alternating.

    Args:
        values: (...) float, usually 0..1; 1 is one turn of the shortest wave.
        features: length of the result per number, even.

    Returns:
        (..., features).
    """
    feature = torch.arange(features, dtype=torch.float32, device=values.device)
    wave_length = TEMPERATURE ** (2 * torch.div(feature, 2, rounding_mode="floor") / features)
    angles = (values * (2 * math.pi)).unsqueeze(-1) / wave_length
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_encoding(padding: Tensor, width: int) -> Tensor:
    """Position encoding of one level's cells: half of the features encode y, half x, relative to the unpadded part.

    Args:
        padding: (B, H, W) bool, True on padded cells.
        width: features per cell, a multiple of 4.

    Returns:
        (B, H, W, width) float32.
    """
    real = ~padding
    y = real.cumsum(1, dtype=torch.float32)  # 1, 2, ... down each column
    x = real.cumsum(2, dtype=torch.float32)
    y = (y - 0.5) / (y[:, -1:, :] + STABILISER)
    x = (x - 0.5) / (x[:, :, -1:] + STABILISER)
    return sine_features(torch.stack([y, x], dim=-1), width // 2).flatten(-2)  # (B, H, W, 2, width/2)


def cell_centers(shape: tuple[int, int], valid: Tensor) -> Tensor:
    """Centres of one level's cells, row by row, in the normalised image.

    Args:
        shape: (H, W) of the level, cells.
        valid: (B, 2) float32 (width, height) of its unpadded part, cells.

    Returns:
        (B, H*W, 2) float32 (x, y); beyond 1 on padded cells.
    """
    height, width = shape
    y = torch.arange(height, dtype=torch.float32, device=valid.device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=valid.device) + 0.5
    grid = torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)], dim=-1).view(1, -1, 2)
    return grid / valid.unsqueeze(1)
