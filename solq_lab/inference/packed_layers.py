"""The transformer's layers arranged for the CPU: the same arithmetic, with fewer products and fewer passes over memory.

`models` says what is computed. These layers take over for float32 on the CPU; everything else goes the plain way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.inference.packing import PackedLinear, is_packable, runs_packed
from solq_lab.models.attention import Memory, MultiScaleDeformableAttention
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.ops.ms_deform_attn import ms_deform_attn

TOKENS_AT_ONCE = 1024  # of a feed-forward block: its hidden features, four megabytes, then stay in the cache
SAMPLING_PRICE = 4  # of a multiplication while sampling, in those of a matrix product; roughly


class PackedFeedForward(nn.Module):
    """A feed-forward block with ReLU whose hidden features never leave the cache.

    Args:
        plain: the block, its linear layers packed.
    """

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not runs_packed(tokens):
            return self.plain(tokens)
        result = torch.empty_like(tokens)
        rows = tokens.flatten(0, -2).split(TOKENS_AT_ONCE)  # (..., C) -> pieces (n, C)
        for some, place in zip(rows, result.flatten(0, -2).split(TOKENS_AT_ONCE), strict=True):
            hidden = self.plain.linear1.multiply(some, "relu")
            place.copy_(self.plain.norm(self.plain.linear2.multiply_and_add(hidden, some)))
        return result


class SamplingFirst(MultiScaleDeformableAttention):
    """Deformable attention that projects what the queries found instead of the whole memory before they look.

    Projection and sampling are both linear, so they may change places. The few queries of a decoder touch fewer numbers
    than a projection of all tokens: sampling all C channels for each head, and then projecting, is less work. The bias
    counts as much as a head's weights fell on the map, and not beyond it or on padding.

    Args:
        plain: the attention; its linear layers may be packed later.
    """

    def __init__(self, plain: MultiScaleDeformableAttention) -> None:
        nn.Module.__init__(self)  # the layers exist
        self.heads, self.levels, self.points = plain.heads, plain.levels, plain.points
        for name, layer in plain.named_children():
            setattr(self, name, layer)

    def forward(self, queries: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """As `MultiScaleDeformableAttention.forward`."""
        if not (runs_packed(memory.tokens) and self._is_less_work(queries, memory)):
            return super().forward(queries, reference, memory)
        tokens, present = memory.tokens, torch.ones_like(memory.tokens[..., :1])  # (B, T, 1)
        if memory.padding.any():
            present = present.masked_fill_(memory.padding.unsqueeze(-1), 0.0)
            tokens = tokens * present
        locations, weights = self.sampling(queries, reference, memory)
        present = present.unsqueeze(2).expand(-1, -1, self.heads, -1)  # (B, T, M, 1)
        share = ms_deform_attn(present, memory.spatial_shapes, locations, weights)  # (B, J, M)
        found = self._sample(tokens, locations, weights, memory)  # (B, J, M, C)
        project = self.value_proj.plain if isinstance(self.value_proj, PackedLinear) else self.value_proj
        matrix, bias = project.weight.unflatten(0, (self.heads, -1)), project.bias.unflatten(0, (self.heads, -1))
        values = torch.einsum("bjmc,mdc->bjmd", found, matrix) + share.unsqueeze(-1) * bias
        return self.output_proj(values.flatten(2))

    def _sample(self, tokens: Tensor, locations: Tensor, weights: Tensor, memory: Memory) -> Tensor:
        """(B, J, M, C): all channels of the tokens at each head's points.

        The operator's queries are here the J*M pairs of query and head, and its heads are M slices of the channels.
        """
        slices = self.heads
        locations = locations.flatten(1, 2).unsqueeze(2).expand(-1, -1, slices, -1, -1, -1)  # (B, J*M, M, L, P, 2)
        weights = weights.flatten(1, 2).unsqueeze(2).expand(-1, -1, slices, -1, -1)
        found = ms_deform_attn(tokens.unflatten(-1, (slices, -1)), memory.spatial_shapes, locations, weights)
        return found.unflatten(1, (-1, self.heads))  # (B, J*M, C) -> (B, J, M, C)

    def _is_less_work(self, queries: Tensor, memory: Memory) -> bool:
        """Per channel: four corners of every sample, against one row of the projection for every token."""
        samples = queries.shape[1] * self.heads * self.levels * self.points
        return SAMPLING_PRICE * 4 * samples < memory.tokens.shape[1] * memory.tokens.shape[2]


def pack_weights(model: nn.Module) -> None:
    """Replace what is float32 on the CPU and learns no more: linear layers, and what the transformer makes of them."""
    for module in list(model.modules()):
        if isinstance(module, DecoderLayer) and is_packable(module.cross_attention.value_proj):
            module.cross_attention = SamplingFirst(module.cross_attention)
    _replace(model, nn.Linear, is_packable, PackedLinear)
    _replace(model, FeedForward, _is_packed, PackedFeedForward)


def _is_packed(block: FeedForward) -> bool:
    return block.activate is F.relu and isinstance(block.linear1, PackedLinear)


def _replace(
    model: nn.Module, kind: type[nn.Module], fits: Callable[[nn.Module], bool], packed: Callable[[nn.Module], nn.Module]
) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind) and fits(child):
                setattr(module, name, packed(child))
