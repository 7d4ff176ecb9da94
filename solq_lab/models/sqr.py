"""The paper's baseline, SQR: a mask branch beside the class and box heads. Paper: fig. 1(a), tables 2 and 5.

Where SOLQ predicts a short vector, the mask branch segments: a query's attention over the coarsest level is a coarse
mask, which convolutions refine with the backbone's finer maps. The mask covers the whole image, not a box. The branch
is DETR's, in the form that the released code gave it for Deformable DETR.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.attention import Memory
from solq_lab.models.checkpointing import Checkpointed
from solq_lab.models.solq import SOLQ, Match
from solq_lab.structures import Guests, ImageBatch, ImageMasks, Predictions

if TYPE_CHECKING:
    from solq_lab.models.backbone import Backbone

GROUPS = 8  # of the branch's group norms; narrow maps that do not divide have fewer


class SQRDetector(SOLQ):
    """Deformable DETR with a mask branch.

    Args:
        backbone: as for `SOLQ`, with three maps.
        num_classes: S, class channels.
        detail: logits per side of a cell of the mask branch.
        freeze_detector: train the mask branch alone, as the paper says; the detector stays in evaluation mode. The
            released models were trained as a whole.
        detector: every other argument of `SOLQ` but `vector_dim`.

    Raises:
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, detail: int = 1, freeze_detector: bool = False, **detector: Any
    ) -> None:
        super().__init__(backbone, num_classes, vector_dim=None, **detector)
        if len(backbone.channels) != 3:
            raise ValueError("the mask branch needs the maps C3, C4 and C5; levels 1 gives it C5 alone")
        self.freeze_detector = freeze_detector
        if freeze_detector:
            self.requires_grad_(False)
        levels, width = self.level_embedding.shape
        stride = 2 if levels > len(backbone.channels) else 1
        self.mask_branch = MaskBranch(width, detector["heads"], backbone.channels, stride=stride, detail=detail)
        self.train()  # modules start in training mode, a frozen part should not

    def forward(self, images: ImageBatch, guests: Guests | None = None, match: Match | None = None) -> Predictions:
        """Classes and boxes of all queries after every decoder layer, and the masks of the last.

        Args:
            images: normalised pixels (B, 3, H, W) and their padding (B, H, W).
            guests: as for `SOLQ`; they have no masks.
            match: as for `SOLQ`; there are no mask vectors to save.
        """
        features = self.backbone(images.pixels)  # C3, C4, C5
        levels = self.embed_levels(features, images.padding)  # C3 to C6 as one row of tokens
        memory = levels
        for encode in self.encoder:
            memory = self.checkpoint(encode, memory)
        predictions, queries = self.decode(memory, guests, match=match)

        logits = self.mask_branch(queries, levels, memory, features)  # (B, J, H/16, W/16) if released
        *earlier, last = predictions.layers
        last = last._replace(masks=ImageMasks(logits, images.padding))
        return predictions._replace(layers=[*earlier, last])

    def train(self, mode: bool = True) -> SQRDetector:
        """Training or evaluation mode; a frozen detector stays in the latter, its batch norms and dropout too."""
        super().train(mode)
        if self.freeze_detector:
            for name, part in self.named_children():
                part.train(mode and name == "mask_branch")
        return self


class MaskBranch(Checkpointed):
    """From the queries to mask logits in the image frame; each query's mask is computed on its own.

    Args:
        width: C.
        heads: M, attention maps per query.
        channels: of the backbone's maps C3, C4, C5.
        stride: of the convolutions that halve those channels: 2 brings C5 to a coarsest level above it, and the
            mask to twice the stride of C3; 1 where C5 is the coarsest level, and the mask has the stride of C3.
        detail: logits per side of a cell (a sub-pixel convolution answers), which divide that stride; 1 is released.
    """

    def __init__(self, width: int, heads: int, channels: tuple[int, ...], *, stride: int, detail: int = 1) -> None:
        super().__init__()
        self.detail = detail
        self.attention = AttentionMaps(width, heads)
        coarse_first = channels[::-1]

        self.pyramid = nn.ModuleList(
            nn.Conv2d(inputs, inputs // 2, kernel_size=3, stride=stride, padding=1) for inputs in coarse_first
        )
        inner = width + heads
        widths = [inner, inner, width // 2, width // 4, width // 8, width // 16]
        self.blocks = nn.ModuleList(_block(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.adapters = nn.ModuleList(
            nn.Conv2d(inputs // 2, outputs, kernel_size=1)
            for inputs, outputs in zip(coarse_first, widths[2:], strict=False)
        )
        self.answer = nn.Conv2d(widths[-1], detail**2, kernel_size=3, padding=1)  # its name is that of weights files

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, queries: Tensor, levels: Memory, memory: Memory, features: list[Tensor]) -> Tensor:
        """Mask logits (B, J, h, w).

        Args:
            queries: (B, J, C) after the last decoder layer.
            levels: the tokens before the encoder; their coarsest level enters the convolutions.
            memory: the tokens after it; the queries attend to their coarsest level.
            features: the backbone's maps C3, C4, C5.
        """
        batch, count, _ = queries.shape
        attention = self.attention(queries, memory)  # (B, J, M, h, w)
        coarsest = _for_each_query(coarsest_map(levels), count)
        maps = torch.cat([coarsest, attention.flatten(0, 1)], dim=1)  # (B*J, C+M, h, w)

        first, second, *refining = self.blocks
        maps = self.checkpoint(second, self.checkpoint(first, maps))
        for halve, adapt, refine, finer in zip(self.pyramid, self.adapters, refining, features[::-1], strict=True):
            maps = self.checkpoint(self._refine_at, refine, maps, adapt(halve(finer)))
        logits = F.pixel_shuffle(self.answer(maps), self.detail)  # (B*J, 1, h, w)
        return logits.unflatten(0, (batch, count)).squeeze(2)

    def _refine_at(self, refine: nn.Module, maps: Tensor, finer: Tensor) -> Tensor:
        """The masks (B*J, C', h, w) at the size of a finer map (B, C'', 2h, 2w) of their images."""
        finer = _for_each_query(finer, len(maps) // len(finer))
        return refine(finer + F.interpolate(maps, size=finer.shape[-2:]))  # nearest


class AttentionMaps(nn.Module):
    """Attention of each query over the coarsest level, M maps per query.

    One softmax over heads and cells together, as in DETR: a head without a match stays near zero.

    Args:
        width: C, a multiple of `heads`.
        heads: M.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.query, self.key):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, memory: Memory) -> Tensor:
        """(B, J, M, h, w) that sum to 1 per query, zero on padded cells; queries are (B, J, C)."""
        height, width = memory.spatial_shapes[-1]
        cells = slice(-height * width, None)  # the coarsest level comes last
        query = self.query(queries).unflatten(-1, (self.heads, -1))  # (B, J, C) -> (B, J, M, C/M)
        key = self.key(memory.tokens[:, cells]).unflatten(-1, (self.heads, -1))  # (B, h*w, C) -> (B, h*w, M, C/M)
        similarity = torch.einsum("bjmc,btmc->bjmt", query / math.sqrt(query.shape[-1]), key)
        similarity = similarity.masked_fill(memory.padding[:, None, None, cells], -torch.inf)
        return similarity.flatten(2).softmax(-1).unflatten(-1, (self.heads, height, width))


def coarsest_map(memory: Memory) -> Tensor:
    """The tokens of the last level as a map (B, C, h, w)."""
    height, width = memory.spatial_shapes[-1]
    return memory.tokens[:, -height * width :].transpose(1, 2).unflatten(-1, (height, width))


def _block(inputs: int, outputs: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(GROUPS, outputs), outputs), nn.ReLU(inplace=True))


def _for_each_query(maps: Tensor, queries: int) -> Tensor:
    """(B, C, h, w) -> (B*J, C, h, w)."""
    return maps.unsqueeze(1).expand(-1, queries, -1, -1, -1).flatten(0, 1)
