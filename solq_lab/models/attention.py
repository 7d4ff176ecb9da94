"""The two attentions of the transformer: multi-scale deformable attention, and self-attention among queries.

Paper: section 3.1 (Deformable DETR). Attention maps need no change here: a forward hook on
`MultiScaleDeformableAttention` receives the arguments that `sampling` takes.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from solq_lab.ops.ms_deform_attn import ms_deform_attn


class Memory(NamedTuple):
    """The tokens of all levels in one row, T of them, and where they lie."""

    tokens: Tensor  # (B, T, C), level after level, each row by row
    positions: Tensor  # (B, T, C) position encoding plus level embedding; added to the tokens as queries
    centers: Tensor  # (B, T, 2) float32 (x, y) of each token's cell, normalised image
    padding: Tensor  # (B, T) bool, True on padded cells
    spatial_shapes: tuple[tuple[int, int], ...]  # (H, W) of the L levels, cells
    level_sizes: Tensor  # (L, 2) float32 (W, H), the same numbers on the device
    valid_ratios: Tensor  # (B, L, 2) float32 (x, y) share of each level that is not padding

    def to_levels(self, reference: Tensor) -> Tensor:
        """Points (B, J, 2) or boxes (B, J, 4), normalised image -> (B, J, L, 2 or 4), 0..1 over each padded level."""
        ratios = self.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)  # (B, L, 2) -> (B, L, 2 or 4)
        return reference.unsqueeze(2) * ratios.unsqueeze(1)


class MultiScaleDeformableAttention(nn.Module):
    """Attention of each query to P points on each of L levels, placed around its reference.

    Args:
        width: C, a multiple of `heads`.
        heads: M.
        levels: L.
        points: P per head and level.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; choose another number of heads")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with equal weights on points that leave the reference in M compass directions, 1..P cells away."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # onto the unit square
        steps = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions.view(-1, 1, 1, 2) * steps.view(1, 1, -1, 1)  # (M, 1, P, 2), the same on all levels
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Values of the memory at the sampled points, weighted and summed.

        Args:
            queries: (B, J, C), position included.
            reference: (B, J, L, 2) points or (B, J, L, 4) boxes (cx, cy, w, h), 0..1 over each padded level.
            memory: what is sampled.

        Returns:
            (B, J, C).
        """
        locations, weights = self.sampling(queries, reference, memory)
        values = self.value_proj(memory.tokens)
        # In place it costs no copy; autograd would have to keep one.
        fill = values.masked_fill if values.requires_grad else values.masked_fill_
        values = fill(memory.padding.unsqueeze(-1), 0.0)
        values = values.unflatten(-1, (self.heads, -1))  # (B, T, C) -> (B, T, M, C/M)
        return self.output_proj(ms_deform_attn(values, memory.spatial_shapes, locations, weights))

    def sampling(self, queries: Tensor, reference: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Sampling locations and attention weights of the queries; the arguments are those of `forward`.

        Returns:
            locations (B, J, M, L, P, 2) as (x, y), 0..1 over each padded level (divide by `memory.valid_ratios` for
            the normalised image), and weights (B, J, M, L, P) that sum to 1 over levels and points.
        """
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).unflatten(-1, (self.heads, -1))  # (B, J, M, L*P*2)
        weights = self.attention_weights(queries).unflatten(-1, (self.heads, -1))  # (B, J, M, L*P)
        weights = softmax_of_few(weights)
        center = self._for_each_point(reference[..., :2])
        if reference.shape[-1] == 2:  # one offset unit is one cell
            locations = torch.addcdiv(center, offsets, self._for_each_point(memory.level_sizes))
        else:  # the outermost point starts on the box's edge
            locations = torch.addcmul(center, offsets, self._for_each_point(reference[..., 2:] * (0.5 / self.points)))
        return locations.unflatten(-1, (*shape[1:], 2)), weights.unflatten(-1, shape[1:])

    def _for_each_point(self, levels: Tensor) -> Tensor:
        """(..., L, 2) -> (..., 1, L*P*2): one row, the form in which sums with all offsets run fast."""
        return levels.unsqueeze(-2).expand(*levels.shape[:-1], self.points, 2).flatten(-3).unsqueeze(-2)


def softmax_of_few(logits: Tensor) -> Tensor:
    """`logits.softmax(-1)`; on a CPU torch's own kernel is six times slower for rows of a dozen numbers."""
    on_cpu = logits.device.type == "cpu" and logits.dtype == torch.float32 and not torch.compiler.is_compiling()
    return _SoftmaxOfFew.apply(logits) if on_cpu else logits.softmax(-1)


class _SoftmaxOfFew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        weights = (logits - logits.amax(-1, keepdim=True)).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        weighted = gradient * weights
        return torch.addcmul(weighted, weights, weighted.sum(-1, keepdim=True), value=-1)


class SelfAttention(nn.Module):
    """Multi-head attention among the queries of an image; parameters are shaped like `nn.MultiheadAttention`'s.

    Args:
        width: C, a multiple of `heads`.
        heads: M.
        dropout: share of attention weights that training drops.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; choose another number of heads")
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, query_pos: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, J, C) from queries (B, J, C); `query_pos` (B, J, C) is added to queries and keys, not to values.

        Where `visible` (B, 1, J, J) bool is given, each query (third index) attends to those that are True for it.
        """
        width = queries.shape[-1]
        qk = F.linear(queries + query_pos, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width])
        v = F.linear(queries, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        query, key = qk.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, dim=1)  # each (B, M, J, C/M)
        value = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        dropped = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropped)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, M, J, C/M) -> (B, J, C)
