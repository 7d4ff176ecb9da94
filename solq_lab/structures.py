"""Data classes shared by model, data and evaluation: images and targets, predictions and detections.

Shape letters, here and everywhere: B batch, J queries, K objects, S classes, C channels, H W image, N mask side,
D vector_dim, L levels, P points, M heads. Frames: *image pixels*, *normalised image* (0..1 over the unpadded image),
*box frame* (N x N cells over an object's box).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PIXEL_MEAN = (0.485, 0.456, 0.406)  # RGB mean of ImageNet, on the 0..1 scale
PIXEL_STD = (0.229, 0.224, 0.225)


class ImageBatch(NamedTuple):
    """Images of one batch, padded bottom and right to a common size.

    pixels: (B, 3, H, W) RGB; uint8 as the loader gives them, or float once `normalised`.
    padding: (B, H, W) bool, True on padded cells.
    """

    pixels: Tensor
    padding: Tensor

    @classmethod
    def from_list(cls, images: Sequence[Tensor], size: tuple[int, int] | None = None) -> ImageBatch:
        """Pad images (3, h, w) uint8 with zeros to `size` (height, width), by default their largest sides."""
        height, width = size or (max(image.shape[1] for image in images), max(image.shape[2] for image in images))
        pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        padding = torch.ones(len(images), height, width, dtype=torch.bool)
        for row, image in enumerate(images):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            padding[row, : image.shape[1], : image.shape[2]] = False
        return cls(pixels, padding)

    @property
    def sizes(self) -> Tensor:
        """(B, 2) int64 (height, width) of the images without their padding, pixels."""
        return unpadded_sizes(self.padding)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on `device`; the copy does not block when the memory is pinned."""
        return ImageBatch(self.pixels.to(device, non_blocking=True), self.padding.to(device, non_blocking=True))

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory; the DataLoader's pinning thread calls this."""
        return ImageBatch(self.pixels.pin_memory(), self.padding.pin_memory())

    def normalised(self, dtype: torch.dtype = torch.float32) -> ImageBatch:
        """The input of the network: ImageNet-normalised floats, zero on padded cells."""
        mean = filled(PIXEL_MEAN, dtype=dtype, device=self.pixels.device).view(1, 3, 1, 1)
        std = filled(PIXEL_STD, dtype=dtype, device=self.pixels.device).view(1, 3, 1, 1)
        pixels = (self.pixels.to(dtype) / 255 - mean) / std
        return ImageBatch(pixels.masked_fill(self.padding.unsqueeze(1), 0.0), self.padding)


class Target(NamedTuple):
    """Ground truth of one image after its transforms.

    image_id: the id in the annotation file.
    labels: (K,) int64 class channels (not category ids).
    boxes: (K, 4) float32 (cx, cy, w, h), normalised image.
    masks: (K, N, N) bool in the box frame, or None without masks.
    image_size: (height, width) of the network input before padding, pixels.
    original_size: (height, width) of the image in the file, pixels.
    bitmaps: (K, height, width) bool, the masks in the image frame at `image_size`, or None without them.
    """

    image_id: int
    labels: Tensor
    boxes: Tensor
    masks: Tensor | None
    image_size: tuple[int, int]
    original_size: tuple[int, int]
    bitmaps: Tensor | None = None

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on `device`."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        bitmaps = None if self.bitmaps is None else self.bitmaps.to(device, non_blocking=True)
        labels, boxes = self.labels.to(device, non_blocking=True), self.boxes.to(device, non_blocking=True)
        return self._replace(labels=labels, boxes=boxes, masks=masks, bitmaps=bitmaps)


class ImageMasks(NamedTuple):
    """Masks of all queries in the image frame, coarse; output of the mask branch of the SQR baseline.

    logits: (B, J, h, w) over the whole padded images, one sigmoid each.
    padding: (B, H, W) bool of those images, True on padded cells.
    """

    logits: Tensor
    padding: Tensor


class LayerPrediction(NamedTuple):
    """Predictions of the queries after one decoder layer.

    logits: (B, J, S) class logits, one sigmoid each.
    boxes: (B, J, 4) (cx, cy, w, h), normalised image.
    vectors: (B, J, D) mask vectors, or None for a plain detector.
    masks: of the last layer of a model with a mask branch, else None.
    next_anchor: (B, J, 4) the same boxes, their gradient reaching no other layer than this; of a query head.
    """

    logits: Tensor
    boxes: Tensor
    vectors: Tensor | None
    masks: ImageMasks | None = None
    next_anchor: Tensor | None = None


class Predictions(NamedTuple):
    """All decoder layers, first to last, and the encoder's proposals where queries come from them.

    proposals: a `LayerPrediction` over all encoder tokens (B, T, ...) without vectors, or None.
    proposals_have_classes: whether their logits are those of the classes; otherwise channel 0 stands for any object.
    """

    layers: list[LayerPrediction]
    proposals: LayerPrediction | None
    proposals_have_classes: bool = False


class Detections(NamedTuple):
    """The objects found in one image, best score first.

    scores: (K,) float32 in 0..1.
    labels: (K,) int64 class channels.
    boxes: (K, 4) float32 (x0, y0, x1, y1), pixels of the original image, not clipped.
    queries: (K,) int64, the query each object came from; one query may predict several classes.
    masks: K compressed COCO RLEs ({"size": [H, W], "counts": bytes}) at original size, or None for a plain detector.
    names: K class names, parallel to labels.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor
    masks: list[dict] | None
    names: list[str]

    def above(self, score: float) -> Detections:
        """Only the objects whose score is at least `score`."""
        keep = (self.scores >= score).nonzero().squeeze(1)
        rows = keep.tolist()
        masks = None if self.masks is None else [self.masks[row] for row in rows]
        tensors = (self.scores[keep], self.labels[keep], self.boxes[keep], self.queries[keep])
        return Detections(*tensors, masks, [self.names[row] for row in rows])


def unpadded_sizes(padding: Tensor) -> Tensor:
    """(B, 2) int64 (height, width) of the unpadded parts; `padding` is (B, H, W) bool, bottom and right."""
    real = ~padding
    return torch.stack([real[:, :, 0].sum(1), real[:, 0, :].sum(1)], dim=1)


def filled(values: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers (K,) on the device, K > 0, without a copy from the host: a CUDA graph cannot hold one."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
