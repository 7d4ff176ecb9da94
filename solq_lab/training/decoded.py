"""What is compared of matched mask vectors: the vectors, and the masks they decode to. Paper: eq. 5, table 3a.

Shape letters beside those of `structures`: Z decoder layers with a vector loss, T matched pairs of one layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from solq_lab.boxes import cxcywh_to_xyxy, generalized_iou
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.ops.extension import cpu_operator
from solq_lab.structures import Target, filled
from solq_lab.training.focal import DICE_FLOOR, dice_loss

FRAME_IOU = 0.5  # generalised IoU with its object from which a predicted box is the frame of its target


@dataclass(eq=False)
class MatchedVectors:
    """The matched mask vectors of the last Z decoder layers, and their targets.

    Attributes:
        masks: (Z, T, N, N) bool of the objects in the frame of the targets.
        counting: `predicted`, without the coefficients that do not count.
    """

    codec: MaskCodec
    predicted: Tensor  # (Z, T, D) vectors
    target: Tensor  # (Z, T, D) vectors of the objects
    # boxes, true_boxes: (Z, T, 4) (cx, cy, w, h) of queries and objects, normalised image
    boxes: Tensor
    true_boxes: Tensor
    true_masks: Tensor  # (Z, T, N, N) bool of the objects in their own boxes
    # Recompute masks and vectors of the targets in the predicted boxes. A query's mask is pasted into its own box, so
    # this is what it is to learn, where that box is about right: from a generalised IoU of `FRAME_IOU` with its
    # object's on. No gradient passes through a frame.
    in_predicted_frame: bool
    band: Tensor | None = None  # (Z, T, D) bool, coefficients that count; the others have target 0. None: all
    tail_drop: float = 0.0  # share of the pairs of which `dice` decodes a random number of first coefficients alone

    def __post_init__(self) -> None:
        self.boxes, self.masks = self.boxes.detach(), self.true_masks
        if self.in_predicted_frame:
            overlap = generalized_iou(cxcywh_to_xyxy(self.boxes), cxcywh_to_xyxy(self.true_boxes))
            frames = torch.where(overlap.unsqueeze(-1) > FRAME_IOU, self.boxes, self.true_boxes)
            self.masks = self._true_masks_in(frames)
            with torch.no_grad():
                self.target = self.codec.encode(self.masks.flatten(0, 1)).view(self.predicted.shape)
        self.counting = self.predicted
        if self.band is not None:
            self.target, self.counting = self.target * self.band, self.predicted * self.band

    @cached_property
    def decoded(self) -> Tensor:
        """(Z, T, N, N) reconstructions of the predicted vectors."""
        return self._decode(self.counting)

    @cached_property
    def shortened(self) -> Tensor:
        """(Z, T, D) the predicted vectors, of `tail_drop` of the pairs from 1 to D first coefficients alone."""
        if not self.tail_drop:
            return self.counting
        pairs, dim, device = self.predicted.shape[:2], self.predicted.shape[2], self.predicted.device
        lengths = torch.randint(1, dim + 1, pairs, device=device)
        lengths = lengths.where(torch.rand(pairs, device=device) < self.tail_drop, dim)
        return self.counting * (torch.arange(dim, device=device) < lengths.unsqueeze(-1))

    def _decode(self, vectors: Tensor) -> Tensor:
        return self.codec.decode(vectors.flatten(0, 1)).view(self.true_masks.shape)

    @cached_property
    def masks_in_predicted_boxes(self) -> Tensor:
        """(Z, T, N, N) bool: the objects' masks cut out by the predicted boxes."""
        return self._true_masks_in(self.boxes)

    def _true_masks_in(self, boxes: Tensor) -> Tensor:
        flat = (values.flatten(0, 1) for values in (self.true_masks, self.true_boxes, boxes))
        return reframe(*flat).view(self.true_masks.shape)

    def distance(self, kind: str, std: Tensor | None) -> Tensor:
        """Sums (Z,) over pairs and coefficients of the squares ("l2", "l2_dice"), smooth or absolute differences.

        The differences are divided by `std` (D,), where it is given.
        """
        difference = self.predicted - self.target  # (Z, T, D)
        if std is not None:
            difference = difference / std
        if kind in ("l2", "l2_dice"):
            return difference.square().sum((1, 2))
        if kind == "smooth_l1":
            return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none").sum((1, 2))
        return difference.abs().sum((1, 2))

    def dice(self, *, near_outlines: bool = False) -> Tensor:
        """Sums (Z,) of the dice losses of decoded vectors and their targets' masks; or of the pixels near outlines."""
        vectors = self.shortened
        if self.codec.isometric and not near_outlines:  # nothing to decode: Parseval
            shared, squares = (vectors * self.target).sum(-1), vectors.square().sum(-1)
            areas = self.masks.view(torch.uint8).flatten(-2).to(vectors.dtype).sum(-1)  # bytes turn into floats quickly
            return (1 - 2 * shared / (squares + areas + DICE_FLOOR)).sum(1)

        decoded = (self._decode(vectors) if self.tail_drop else self.decoded).flatten(0, 1)  # (Z*T, N, N)
        masks = self.masks.flatten(0, 1).to(decoded.dtype)
        if near_outlines:
            band = outline_band(masks)
            masks, decoded = masks * band, decoded * band
        return dice_loss(decoded.flatten(1), masks.flatten(1)).view(self.predicted.shape[:2]).sum(1)

    def quality(self) -> Tensor:
        """(Z, T) IoU of the masks as they would be pasted with those of their objects, in units of mask pixels."""
        found = self.codec.binarize(self.decoded.detach().flatten(0, 1)).view(self.masks.shape)
        shared = (found & self.masks_in_predicted_boxes).sum((-2, -1))
        own, true = found.sum((-2, -1)), self.true_masks.sum((-2, -1))

        # A mask pixel of either frame covers its own share of the image.
        pixel, true_pixel = (values[..., 2:].prod(-1) for values in (self.boxes, self.true_boxes))
        shared, united = pixel * shared, pixel * (own - shared) + true_pixel * true
        return (shared / united.clamp(min=1e-12)).clamp(max=1)


def coefficients_in_band(codec: MaskCodec, targets: Sequence[Target], limit: float) -> Tensor:
    """(K, D) bool: coefficients of at most `limit` half periods per pixel of the network's input over the object's box.

    Of finer ones (beyond 1) the image shows nothing. The paper's appendix A.1 wants codes that follow objects' sizes.

    Raises:
        ValueError: the codec's coefficients have no frequencies.
    """
    if not isinstance(codec, DCTCodec):
        raise ValueError(f"a band limit needs a DCTCodec, not {type(codec).__name__}")
    device = codec.kept.device
    sizes = [filled(target.image_size, dtype=torch.float32, device=device) for target in targets]  # (height, width)
    sides = [target.boxes[:, 2:].flip(-1) * size for target, size in zip(targets, sizes, strict=True)]  # (K, 2) pixels
    return (codec.frequencies <= limit * torch.cat(sides).unsqueeze(1)).all(-1)


def reframe(masks: Tensor, boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """Box-frame masks in the frames of other boxes: bilinear at their cells, empty outside, kept at half.

    Args:
        masks: (K, N, N) bool in `boxes`. K may be 0.
        boxes, other_boxes: (K, 4) (cx, cy, w, h), in one frame and unit.

    Returns:
        (K, N, N) bool; empty for boxes without area.
    """
    if len(masks) == 0:
        return masks
    # On a CPU the grid below, 8 bytes for each byte of the masks, takes ten times as long.
    compiled = cpu_operator("reframe") if masks.device.type == "cpu" and boxes.dtype == torch.float32 else None
    if compiled is not None and not torch.compiler.is_compiling():
        return compiled(masks, boxes, other_boxes)
    scale = other_boxes[:, 2:] / boxes[:, 2:]
    shift = 2 * (other_boxes[:, :2] - boxes[:, :2]) / boxes[:, 2:]
    affine = torch.cat([torch.diag_embed(scale), shift.unsqueeze(-1)], dim=-1)  # (K, 2, 3): -1..1 of the other box
    grid = F.affine_grid(affine, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    sampled = F.grid_sample(masks.unsqueeze(1).to(grid.dtype), grid, align_corners=False).squeeze(1)
    return (sampled >= 0.5) & (other_boxes[:, 2:].amin(1) > 0)[:, None, None]


def outline_band(masks: Tensor) -> Tensor:
    """(K, N, N) bool: pixels at most N / 16 rows and columns from a pixel of the other kind; outside is background.

    The masks are (K, N, N) floats of 0 and 1.
    """
    reach = max(1, masks.shape[-1] // 16)
    rows = F.avg_pool2d(masks.unsqueeze(1), (2 * reach + 1, 1), stride=1, padding=(reach, 0))
    share = F.avg_pool2d(rows, (1, 2 * reach + 1), stride=1, padding=(0, reach)).squeeze(1)
    # Sums of a few ones and zeros: half the share of one pixel tells none and all from some.
    half = 0.5 / (2 * reach + 1) ** 2
    return (share > half) & (share < 1 - half)
