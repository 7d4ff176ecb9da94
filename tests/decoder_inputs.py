"""The sizes of a small decoder layer, and a memory for it to attend to."""

import torch

from solq_lab.models.attention import Memory

LAYER = {"width": 24, "heads": 3, "levels": 2, "points": 2, "feedforward": 48, "dropout": 0.0}


def draw_memory(batch: int, shapes: tuple[tuple[int, int], ...], *, padded: bool) -> Memory:
    """Random tokens; with padding, the right third of every level of the last image."""
    paddings = [torch.zeros(batch, height, width, dtype=torch.bool) for height, width in shapes]
    for padding in paddings:
        padding[-1, :, padding.shape[-1] * 2 // 3 :] = padded
    cells = sum(height * width for height, width in shapes)
    return Memory(
        tokens=torch.randn(batch, cells, LAYER["width"]),
        positions=torch.randn(batch, cells, LAYER["width"]),
        centers=torch.rand(batch, cells, 2),
        padding=torch.cat([padding.flatten(1) for padding in paddings], dim=1),
        spatial_shapes=shapes,
        level_sizes=torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32),
        valid_ratios=torch.full((batch, len(shapes), 2), 2 / 3 if padded else 1.0),
    )
