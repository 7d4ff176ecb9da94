"""Backbones of timm: hierarchical ones such as ConvNeXt, and plain vision transformers such as DINOv3's.

A transformer's maps all have the stride of its patches; three of them, from a third, two thirds and the whole of its
depth, are resized to strides 8, 16 and 32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from solq_lab.models.backbone import Backbone
from solq_lab.models.weights import WeightMismatch, read_backbone_weights

STRIDES = (8, 16, 32)


class TimmBackbone(Backbone):
    """A network of timm as backbone; all of it learns.

    Args:
        name: timm's.
        pretrained: "none", or a safetensors or .pth file with timm's names.
        c5_only: return C5 alone.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm does not know the name, or the network has no maps of strides 8, 16 and 32, nor of 16 alone.
        WeightMismatch: the weights cannot be read or do not fit.
    """

    def __init__(self, name: str, *, pretrained: str = "none", c5_only: bool = False) -> None:
        super().__init__()
        self.body = _create(name)
        reductions = [stage["reduction"] for stage in getattr(self.body, "feature_info", ())]
        if hasattr(self.body, "forward_intermediates") and set(STRIDES) <= set(reductions):
            places = [reductions.index(stride) for stride in STRIDES]
        elif hasattr(self.body, "forward_intermediates") and set(reductions) == {16}:
            places = [len(reductions) * third // 3 - 1 for third in (1, 2, 3)]
        else:
            raise ValueError(
                f"backbone timm:{name} has maps of strides {sorted(set(reductions)) or 'unknown'}; allowed are "
                "networks with strides 8, 16 and 32, and transformers with patches of 16 pixels"
            )
        channels = tuple(int(self.body.feature_info[place]["num_chs"]) for place in places)
        first = 2 if c5_only else 0
        self.places = places[first:]
        self.strides, self.channels = STRIDES[first:], channels[first:]

        # What comes after the last map would get no gradient, and several processes would wait for it.
        self.body.prune_intermediate_layers(self.places, prune_norm=True, prune_head=True)
        if pretrained == "imagenet":
            raise WeightMismatch(
                f"timm:{name}: weights are not fetched; name their file (huggingface.co/timm has it) as "
                "model.pretrained, or set it to none"
            )
        if pretrained != "none":
            self.body.load_state_dict(read_backbone_weights(Path(pretrained), self.body.state_dict()))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [C3, C4, C5] or [C5], finest first, of normalised pixels (B, 3, H, W) of any size."""
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))
        maps = []
        for found, stride in zip(self.checkpoint(self._features, pixels), self.strides, strict=True):
            size = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
            if found.shape[-2:] != size:
                found = F.interpolate(found, size=size, mode="bilinear")
            maps.append(found[..., : -(-height // stride), : -(-width // stride)])  # without the cells of the padding
        return maps

    def _features(self, pixels: Tensor) -> list[Tensor]:
        return self.body.forward_intermediates(pixels, indices=self.places, intermediates_only=True)


def _create(name: str) -> Any:
    """The network without its classifier, for images of any size."""
    try:
        import timm
    except ImportError:
        raise ImportError(f"backbone timm:{name} needs timm; install it with: pip install 'solq-lab[swin]'") from None
    if name not in timm.list_models():
        raise ValueError(
            f"backbone timm:{name}: timm {timm.__version__} has no network of this name; timm.list_models() has them"
        )
    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True)  # transformers
    except TypeError:
        return timm.create_model(name, num_classes=0)
