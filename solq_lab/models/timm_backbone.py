"""Backbones of timm: hierarchical ones such as ConvNeXt, and plain vision transformers such as DINOv3's.

A transformer's maps all have the stride of its patches; three of them, from a third, two thirds and the whole of its
depth, are resized to strides 8, 16 and 32, and one from a sixth of it to stride 4 where C2 is wanted.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from solq_lab.models.backbone import Backbone, first_map

STRIDES = (4, 8, 16, 32)
DEPTHS = (1, 2, 4, 6)  # sixths of a transformer's depth


class TimmBackbone(Backbone):
    """A network of timm as backbone; all of it learns.

    Args:
        name: timm's.
        c5_only: return C5 alone.
        c2: return C2 too, first.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm does not know the name, or the network has maps of neither the returned strides nor 16 alone.
    """

    def __init__(self, name: str, *, c5_only: bool = False, c2: bool = False) -> None:
        super().__init__()
        self.body = _create(name)
        first = first_map(c5_only=c5_only, c2=c2)
        self.strides = STRIDES[first:]
        reductions = [stage["reduction"] for stage in getattr(self.body, "feature_info", ())]
        if hasattr(self.body, "forward_intermediates") and {*self.strides, *STRIDES[1:]} <= set(reductions):
            self.places = [reductions.index(stride) for stride in self.strides]
        elif hasattr(self.body, "forward_intermediates") and set(reductions) == {16}:
            self.places = [max(len(reductions) * sixths // 6 - 1, 0) for sixths in DEPTHS[first:]]
        else:
            wanted = ", ".join(str(stride) for stride in sorted({*self.strides, *STRIDES[1:]}))
            raise ValueError(
                f"backbone timm:{name} has maps of strides {sorted(set(reductions)) or 'unknown'}; allowed are "
                f"networks with strides {wanted}, and transformers with patches of 16 pixels"
            )
        self.channels = tuple(int(self.body.feature_info[place]["num_chs"]) for place in self.places)

        # What comes after the last map would get no gradient, and several processes would wait for it.
        self.body.prune_intermediate_layers(self.places, prune_norm=True, prune_head=True)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Maps [C3, C4, C5], [C5] or [C2, C3, C4, C5], finest first, of normalised pixels (B, 3, H, W) of any size."""
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
