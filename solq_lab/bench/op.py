"""Deformable attention: the implementation in use against bilinear sampling by `grid_sample`."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from solq_lab.bench.timing import Row, are_near, compare
from solq_lab.ops.ms_deform_attn import implementation_for, ms_deform_attn

SHAPES = ((64, 107), (32, 54), (16, 27), (8, 14))  # C3, C4, C5 and the stride-64 level of a 512 x 852 image
HEADS, HEAD_WIDTH, POINTS = 8, 48, 4
TOLERANCE = 1e-4  # of the largest number; float32 sums of 16 products differ by a few 1e-6

Inputs = tuple[Tensor, Tensor, Tensor]  # value, sampling locations, attention weights


def rows() -> Iterator[Row]:
    """Forward and backward, at the size of an encoder layer and of a decoder layer."""
    tokens = sum(height * width for height, width in SHAPES)
    for layer, queries in (("encoder", tokens), ("decoder", 300)):
        inputs, gradient = draw_inputs(queries)
        what = f"{layer}, {queries} queries, 512x852, head width {HEAD_WIDTH}, {implementation_for('cpu')}"
        yield from layer_rows("op", what, inputs, SHAPES, gradient, tolerance=TOLERANCE)


def layer_rows(
    part: str,
    what: str,
    inputs: Inputs,
    shapes: Sequence[tuple[int, int]],
    gradient: Tensor,
    *,
    tolerance: float,
    deterministic: bool = False,
    measure: Callable[..., Row] = compare,
) -> Iterator[Row]:
    """Forward and backward of one layer, also in torch's deterministic mode; the plain way computes in float32."""
    exact = (inputs[0].detach().float().requires_grad_(), *inputs[1:])

    def same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
        return are_near(expected, found, tolerance=tolerance)

    def plainly() -> tuple[Tensor]:
        return (sample_by_grid(exact[0], shapes, *exact[1:]),)

    def ours() -> tuple[Tensor]:
        return (ms_deform_attn(inputs[0], shapes, *inputs[1:]),)

    with torch.no_grad():
        yield measure(part, f"{what}, forward", plainly, ours, same)
    plain_output, output = plainly(), ours()

    def plainly_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(plain_output, exact, gradient.float(), retain_graph=True)

    def ours_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    def ours_back_in_order() -> tuple[Tensor, ...]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return ours_back()
        finally:
            torch.use_deterministic_algorithms(before)

    yield measure(part, f"{what}, backward", plainly_back, ours_back, same)
    if deterministic:
        yield measure(part, f"{what}, deterministic backward", plainly_back, ours_back_in_order, same)


def sample_by_grid(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The plain way: one `grid_sample` per level, then a weighted sum. Arguments as in `ms_deform_attn`."""
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    levels = value.split([height * columns for height, columns in shapes], dim=1)
    sampled = []
    for level, (level_value, (height, columns)) in enumerate(zip(levels, shapes, strict=True)):
        image = level_value.flatten(2).transpose(1, 2).reshape(batch * heads, width, height, columns)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, P, 2)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))

    stacked = torch.stack(sampled, dim=-2).flatten(-2)  # L times (B*M, D, Q, P) -> (B*M, D, Q, L*P)
    share = weights.transpose(1, 2).reshape(batch * heads, 1, queries, len(shapes) * points)
    return (stacked * share).sum(-1).view(batch, heads * width, queries).transpose(1, 2)


def draw_inputs(
    queries: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Inputs, Tensor]:
    """Inputs of one layer and the gradient of its output.

    Samples keep off the pixel centres: the gradient with respect to a location jumps there, and rounding would decide
    on which side each way stands. `dtype` is that of the values and the gradient; locations and weights are float32.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, HEADS, HEAD_WIDTH, generator=generator)

    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32).view(1, 1, 1, -1, 1, 2)
    shape = (batch, queries, HEADS, len(shapes), POINTS)
    cell = (torch.rand(*shape, 2, generator=generator) * sizes).floor()
    inside_cell = 0.05 + 0.9 * torch.rand(*shape, 2, generator=generator)
    locations = (cell + 0.5 + inside_cell) / sizes

    weights = torch.rand(shape, generator=generator).flatten(-2).softmax(-1).view(shape)
    gradient = torch.randn(batch, queries, HEADS * HEAD_WIDTH, generator=generator)
    value, locations, weights = value.to(device, dtype), locations.to(device), weights.to(device)
    inputs = (value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_())
    return inputs, gradient.to(device, dtype)
