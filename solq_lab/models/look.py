"""The mask look: features of a stride-4 map inside a predicted box, for its mask vector. Not in the paper.

The encoder's finest tokens are eight pixels wide, too coarse for outlines. The look adds to a query what lies at N
points of its predicted box, on a map of half that stride. The points move with the box and with the query, each reads
channels of its own, and nothing is cropped or pooled: a query still answers with one vector.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.attention import Memory
from solq_lab.ops.ms_deform_attn import ms_deform_attn
from solq_lab.structures import filled, padding_at, unpadded_sizes

Rows = tuple[Tensor, Tensor]  # images (T,) and places (T,), int64, of T queries among (B, J)


class View(NamedTuple):
    """What a mask look reads, of the images of a batch."""

    values: Tensor  # (B, H/4 * W/4, N, C/N) features of each cell, row by row, zero where the image is padded
    shape: tuple[int, int]  # (H/4, W/4), cells
    valid_ratio: Tensor  # (B, 2) float32 (x, y) share of the map that is not padding


class MaskLook(nn.Module):
    """What a query sees in its predicted box; zero before training, so that a trained model without it is unchanged.

    Args:
        width: C, a multiple of `points`.
        channels: of the backbone's map C2.
        points: N, over the box; each reads C/N channels.
        groups: of the group norm after the projection of C2.

    Raises:
        ValueError: the width is not a multiple of the points.
    """

    def __init__(self, width: int, channels: int, points: int, *, groups: int) -> None:
        super().__init__()
        if width % points:
            raise ValueError(f"mask_look {points} does not divide width {width}")
        self.points = points
        self.fine = nn.Sequential(nn.Conv2d(channels, width, kernel_size=1), nn.GroupNorm(groups, width))
        self.coarse = nn.Linear(width, width)
        self.sampling_offsets = nn.Linear(width, points * 2)
        self.output_proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with points on a grid over the box, read alike by all queries, and an output of zero."""
        for weight in (self.fine.get_parameter("0.weight"), self.coarse.weight):
            nn.init.xavier_uniform_(weight)
        for bias in (self.fine.get_parameter("0.bias"), self.coarse.bias):
            nn.init.zeros_(bias)
        for zero in (self.sampling_offsets.weight, *self.output_proj.parameters()):
            nn.init.zeros_(zero)

        columns = math.ceil(math.sqrt(self.points))
        cell = torch.arange(self.points)
        rows = math.ceil(self.points / columns)
        grid = torch.stack([(cell % columns + 0.5) / columns, (cell // columns + 0.5) / rows], dim=-1)  # (N, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((2 * grid - 1).flatten())

    def view(self, fine: Tensor, memory: Memory, padding: Tensor) -> View:
        """The map that the points lie on, the same for all decoder layers.

        Args:
            fine: the backbone's map C2, (B, channels, H/4, W/4).
            memory: the encoder's tokens; the finest level counts.
            padding: (B, H, W) bool of the pixels.
        """
        shape = (fine.shape[-2], fine.shape[-1])
        height, width = memory.spatial_shapes[0]
        coarse = self.coarse(memory.tokens[:, : height * width]).transpose(1, 2).unflatten(2, (height, width))
        # Channels last from the start: what reads the tokens, forward and backward, wants them dense.
        fine = self.fine(fine.contiguous(memory_format=torch.channels_last))
        tokens = (fine + F.interpolate(coarse, size=shape, mode="bilinear")).flatten(2).transpose(1, 2)

        (padding,) = padding_at([shape], padding)
        tokens = (tokens * ~padding.flatten(1).unsqueeze(-1)).contiguous()  # (B, H/4 * W/4, C)
        size = filled(shape, dtype=torch.float32, device=tokens.device)
        valid_ratio = (unpadded_sizes(padding) / size).flip(-1)
        return View(tokens.unflatten(-1, (self.points, -1)), shape, valid_ratio)

    def forward(self, queries: Tensor, boxes: Tensor, view: View, *, images: Tensor | None = None) -> Tensor:
        """(B, J, C) from queries (B, J, C) and their boxes (B, J, 4) (cx, cy, w, h), normalised image.

        With `images` (T,), ascending: (T, C) from queries (T, C) of those images and their boxes (T, 4).
        """
        offsets = self.sampling_offsets(queries).unflatten(-1, (self.points, 2))  # in halves of the box
        center, size = boxes.unsqueeze(-2).chunk(2, dim=-1)  # (..., 1, 2)
        locations = center + offsets * size / 2
        if images is not None:  # the operator takes as many queries of each image: what is missing reads beyond the map
            counts = torch.bincount(images, minlength=len(view.values))
            places = torch.arange(len(images), device=images.device) - (counts.cumsum(0) - counts)[images]
            outside = locations.new_full((len(counts), int(counts.max()), self.points, 2), -1.0)
            locations = outside.index_put((images, places), locations)
        locations = locations * view.valid_ratio[:, None, None]
        locations = locations[:, :, :, None, None]  # (B, J, N, 2) -> (B, J, N, 1, 1, 2): one level, one point a head
        seen = ms_deform_attn(view.values, [view.shape], locations, torch.ones_like(locations[..., 0]))
        return self.output_proj(seen if images is None else seen[images, places])
