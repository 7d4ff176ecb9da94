"""A small network's parts, a random batch, and the loss, gradients and buffers of one training pass."""

import torch
from torch import Tensor, nn

from solq_lab.models.backbone import SmallBackbone
from solq_lab.structures import ImageBatch, Predictions

SIZES = {
    "width": 32,
    "heads": 2,
    "levels": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_points": 4,
    "decoder_points": 4,
    "feedforward": 48,
    "vector_hidden": 24,
    "queries": 5,
    "dropout": 0.3,
    "activation": "relu",
    "refine_boxes": True,
}
SIDE = 96  # of the images, pixels


def small_backbone(*, c2: bool = False) -> SmallBackbone:
    return SmallBackbone((8, 16, 24, 32), (1, 1, 2, 1), c2=c2)


def draw_images(*sizes: tuple[int, int]) -> ImageBatch:
    """Normalised noise of these (height, width), padded to the largest."""
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for row, (real_height, real_width) in enumerate(sizes):
        padding[row, :real_height, :real_width] = False
    pixels = torch.randn(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels.masked_fill(padding.unsqueeze(1), 0.0), padding)


def random_batch(dtype: torch.dtype = torch.float64, side: int = SIDE) -> ImageBatch:
    """A square image, and one of half its width."""
    images = draw_images((side, side), (side, side // 2))
    return images._replace(pixels=images.pixels.to(dtype))


def some_loss(predictions: Predictions) -> Tensor:
    """A scalar that depends on every output."""
    layers = [*predictions.layers, *([predictions.proposals] if predictions.proposals else [])]
    parts = [tensor for layer in layers for tensor in layer[:3] if tensor is not None]
    parts += [layer.masks.logits for layer in layers if layer.masks is not None]
    return sum((part.double() - 0.3).square().mean() for part in parts)


def train_once(model: nn.Module, images: ImageBatch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers of one pass, always with the same dropout."""
    torch.manual_seed(7)
    loss = some_loss(model(images))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(model.named_buffers())
