"""Backbones: from an image to the maps C3, C4, C5, on request C2. Paper: sections 3.2 and 4.2 (ResNet), table 1 (Swin).

`SmallBackbone` is not in the paper: it lets a CPU train a detector from scratch in minutes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from solq_lab.models.batch_norm import BatchNorm2d
from solq_lab.models.checkpointing import Checkpointed

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformerBlock

RESNETS = {"resnet50": torchvision.models.resnet50, "resnet101": torchvision.models.resnet101}
SWINS = {  # timm's name, and the released drop-path rate
    "swin_t": ("swin_tiny_patch4_window7_224", 0.2),
    "swin_s": ("swin_small_patch4_window7_224", 0.2),
    "swin_b": ("swin_base_patch4_window7_224", 0.3),
    "swin_l": ("swin_large_patch4_window7_224", 0.3),
}


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm with constant statistics and scales, applied in one pass over the map; torchvision takes two."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.view(1, -1, 1, 1), maps, scale.view(1, -1, 1, 1))


class Backbone(Checkpointed):
    """A module from normalised pixels (B, 3, H, W) to maps, finest first.

    Attributes:
        strides: of the maps that it returns, pixels.
        channels: of the same maps.
    """

    strides: tuple[int, ...]
    channels: tuple[int, ...]


class ResNetBackbone(Backbone):
    """ResNet whose batch norms are constants and whose first layers are frozen.

    Args:
        name: "resnet50" or "resnet101".
        dilation: keep stride 16 in the last stage and dilate its convolutions instead (DC5).
        c5_only: return C5 alone.
        c2: return C2 too, first.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str, *, dilation: bool = False, c5_only: bool = False, c2: bool = False) -> None:
        super().__init__()
        build = _look_up(name, RESNETS)
        body = build(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation])
        self.conv1, self.bn1 = body.conv1, body.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        self.first = first_map(c5_only=c5_only, c2=c2)
        self.strides = (4, 8, 16, 16 if dilation else 32)[self.first :]
        self.channels = (256, 512, 1024, 2048)[self.first :]
        self.conv1.requires_grad_(False)
        self.layer1.requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [C3, C4, C5], [C5] or [C2, C3, C4, C5], finest first, of normalised pixels (B, 3, H, W)."""
        current = F.max_pool2d(self.bn1(self.conv1(pixels)), kernel_size=3, stride=2, padding=1)
        current = F.relu(current, inplace=True)  # the same after the pooling, on a quarter of the cells
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                current = self.checkpoint(block, current)
            maps.append(current)
        return maps[self.first :]


class SwinBackbone(Backbone):
    """Swin Transformer with windows of 7 cells; each returned map has its own layer norm.

    The modules and their ImageNet weights are timm's, the forward pass is ours: the released models pad a map to whole
    windows before they shift it, timm shifts first.

    Args:
        name: "swin_t", "swin_s", "swin_b" or "swin_l".
        c5_only: return C5 alone.
        c2: return C2 too, first.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown name.
    """

    def __init__(self, name: str, *, c5_only: bool = False, c2: bool = False) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ImportError(f"backbone {name} needs timm; install it with: pip install 'solq-lab[swin]'") from None

        timm_name, drop_path = _look_up(name, SWINS)
        body: Any = timm.create_model(  # its layers have no declared types
            timm_name, num_classes=0, drop_path_rate=drop_path, strict_img_size=False, always_partition=True
        )
        self.patch_embed, self.layers = body.patch_embed, body.layers
        self.window: int = self.layers[0].blocks[0].window_size[0]

        width = body.embed_dim[0] if isinstance(body.embed_dim, list | tuple) else body.embed_dim
        returned = range(first_map(c5_only=c5_only, c2=c2), 4)
        self.strides = tuple(4 * 2**stage for stage in returned)
        self.channels = tuple(width * 2**stage for stage in returned)
        self.norms = nn.ModuleDict({str(stage): nn.LayerNorm(width * 2**stage) for stage in returned})

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [C3, C4, C5], [C5] or [C2, C3, C4, C5], finest first, of normalised pixels (B, 3, H, W) of any size."""
        height, width = pixels.shape[-2:]
        patch = self.patch_embed.patch_size
        tokens = self.patch_embed(F.pad(pixels, (0, -width % patch[1], 0, -height % patch[0])))  # (B, H/4, W/4, C)
        maps = []
        for stage, layer in enumerate(self.layers):
            tokens = layer.downsample(tokens)
            mask = _shift_mask(tokens.shape[1], tokens.shape[2], self.window, tokens)
            for block in layer.blocks:
                tokens = self.checkpoint(self._transform, block, tokens, mask)
            if str(stage) in self.norms:
                maps.append(self.norms[str(stage)](tokens).permute(0, 3, 1, 2))
        return maps

    def _transform(self, block: SwinTransformerBlock, tokens: Tensor, mask: Tensor) -> Tensor:
        """One transformer block; tokens (B, H, W, C) in and out."""
        tokens = tokens + block.drop_path1(self._attend(block, block.norm1(tokens), mask))
        return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))

    def _attend(self, block: SwinTransformerBlock, tokens: Tensor, mask: Tensor) -> Tensor:
        """Attention within (shifted) windows; tokens (B, H, W, C) in and out."""
        batch, height, width, channels = tokens.shape
        window, shift = self.window, block.shift_size[0]
        tokens = F.pad(tokens, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            tokens = tokens.roll((-shift, -shift), dims=(1, 2))
        rows, columns = tokens.shape[1] // window, tokens.shape[2] // window
        windows = tokens.view(batch, rows, window, columns, window, channels).transpose(2, 3)
        windows = block.attn(windows.reshape(-1, window * window, channels), mask=mask if shift else None)
        tokens = windows.view(batch, rows, columns, window, window, channels).transpose(2, 3)
        tokens = tokens.reshape(batch, rows * window, columns * window, channels)
        if shift:
            tokens = tokens.roll((shift, shift), dims=(1, 2))
        return tokens[:, :height, :width]


def _shift_mask(height: int, width: int, window: int, like: Tensor) -> Tensor:
    """Attention mask of shifted windows on a padded map: cells that only the roll made neighbours are masked.

    Returns:
        (windows, window^2, window^2): 0 where both cells were neighbours before the roll, -100 elsewhere.
    """

    def strips(length: int) -> Tensor:
        padded = length + -length % window
        cell = torch.arange(padded, device=like.device)
        return (cell >= padded - window).long() + (cell >= padded - window // 2).long()

    y, x = strips(height), strips(width)
    region = (3 * y.unsqueeze(1) + x).unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2)
    region = region.reshape(-1, window * window)  # (rows, window, columns, window) -> (windows, window^2)
    apart = region.unsqueeze(1) != region.unsqueeze(2)
    return torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -100.0)


class SmallBackbone(Backbone):
    """ResNet of basic blocks, about a million weights, trained from scratch; its batch norms learn.

    Args:
        widths: channels of the four stages; the last three are returned, at strides 8, 16 and 32.
        blocks: residual blocks of the four stages.
        c5_only: return C5 alone.
        c2: return the first stage's map too, first.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (32, 64, 128, 160),
        blocks: tuple[int, int, int, int] = (1, 1, 2, 1),
        *,
        c5_only: bool = False,
        c2: bool = False,
    ) -> None:
        super().__init__()
        # One wide stride-4 convolution: on a CPU two stride-2 ones cost more memory traffic than arithmetic.
        self.stem = nn.Conv2d(3, widths[0], kernel_size=6, stride=4, padding=1, bias=False)
        self.stem_norm = BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            strides = [1 if stage == 0 else 2] + [1] * (count - 1)
            stages.append(
                nn.Sequential(*[_BasicBlock(inputs if i == 0 else width, width, s) for i, s in enumerate(strides)])
            )
            inputs = width
        self.stages = nn.ModuleList(stages)
        self.first = first_map(c5_only=c5_only, c2=c2)
        self.strides, self.channels = (4, 8, 16, 32)[self.first :], widths[self.first :]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [C3, C4, C5], [C5] or [C2, C3, C4, C5], finest first, of normalised pixels (B, 3, H, W)."""
        current = F.relu(self.stem_norm(self.stem(pixels)), inplace=True)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                current = self.checkpoint(block, current)
            maps.append(current)
        return maps[self.first :]


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            projection = nn.Conv2d(inputs, width, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, BatchNorm2d(width))

    def forward(self, maps: Tensor) -> Tensor:
        changed = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)), inplace=True)))
        return F.relu(changed + self.shortcut(maps), inplace=True)


def first_map(*, c5_only: bool, c2: bool) -> int:
    """Of the maps C2 to C5, the first that is returned."""
    return 3 if c5_only else 0 if c2 else 1


def _look_up(name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise ValueError(f"backbone {name!r} is unknown; allowed are {', '.join(known)}")
    return known[name]
