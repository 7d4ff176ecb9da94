"""Random arguments of deformable attention."""

import torch

SHAPES = ((7, 9), (4, 5), (2, 3))


def example(
    *, shapes=SHAPES, batch=2, heads=3, width=8, queries=5, points=4, dtype=torch.float32, device="cpu", seed=0
):
    """Random arguments; a fifth of the locations lies beyond the image, none on a line between two cells."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    cells = sum(height * columns for height, columns in shapes)
    levels = len(shapes)
    value = torch.randn(batch, cells, heads, width, generator=generator, dtype=torch.float64)
    sides = torch.tensor([[columns, height] for height, columns in shapes], dtype=torch.float64).view(
        1, 1, 1, levels, 1, 2
    )
    locations = (
        torch.rand(batch, queries, heads, levels, points, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    )
    # Bilinear interpolation has a kink at each cell's centre, where numerical gradients mean nothing: stay off it.
    position = locations * sides - 0.5
    fraction = (position - position.floor()).clamp(0.05, 0.95)
    locations = torch.where(sides > 0, (position.floor() + fraction + 0.5) / sides.clamp(min=1), locations)
    weights = torch.rand(batch, queries, heads, levels, points, generator=generator, dtype=torch.float64)
    tensors = (value.to(dtype), locations.to(exact), weights.to(exact))
    return tensors[0].to(device), list(shapes), tensors[1].to(device), tensors[2].to(device)
