"""Weights laid out once for the CPU's kernels, instead of at every call.

The products behind `nn.Linear` and `nn.Conv2d` rearrange their weights on each call, and on some processors the library
behind `nn.Linear` is a quarter slower than oneDNN. oneDNN takes weights in an order of its own, prepared here, and
applies bias and ReLU while it writes the result. The ops are those that torch's own compiler emits for a CPU.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.encoder import FeedForward


class PackedLinear(nn.Module):
    """A linear layer that keeps its weights in oneDNN's order too; float32 on the CPU runs from that copy.

    Args:
        plain: the layer, not trained any more.
        relu: apply a ReLU to its result.
    """

    def __init__(self, plain: nn.Linear, *, relu: bool = False) -> None:
        super().__init__()
        self.plain, self.relu = plain, relu
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if _fits(features):
            activation = "relu" if self.relu else "none"
            return torch.ops.mkldnn._linear_pointwise(features, self._packed, self.plain.bias, activation, [], "")
        result = self.plain(features)
        return F.relu(result) if self.relu else result

    def __deepcopy__(self, memo: dict) -> PackedLinear:
        return PackedLinear(copy.deepcopy(self.plain, memo), relu=self.relu)  # packed weights cannot be copied


class PackedConv2d(nn.Module):
    """A convolution that keeps its weights in oneDNN's order too; float32 on the CPU runs from that copy.

    Args:
        plain: the convolution, padded with zeros, not trained any more.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.plain = plain
        self._geometry = (plain.padding, plain.stride, plain.dilation, plain.groups)
        self._packed = torch.ops.mkldnn._reorder_convolution_weight(plain.weight, *self._geometry)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H', W'), channels last in memory."""
        if not _fits(images):
            return self.plain(images)
        images = images.contiguous(memory_format=torch.channels_last)
        bias, geometry = self.plain.bias, self._geometry
        return torch.ops.mkldnn._convolution_pointwise(images, self._packed, bias, *geometry, "none", [], "")

    def __deepcopy__(self, memo: dict) -> PackedConv2d:
        return PackedConv2d(copy.deepcopy(self.plain, memo))  # packed weights cannot be copied


def pack_weights(model: nn.Module) -> None:
    """Replace the model's linear layers and convolutions, where they are float32 on the CPU, by packed ones."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        if isinstance(module, FeedForward) and module.activate is F.relu and _is_packable(module.linear1):
            module.linear1, module.activate = PackedLinear(module.linear1, relu=True), nn.Identity()
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and _is_packable(child):
                setattr(module, name, PackedLinear(child))
            elif isinstance(child, nn.Conv2d) and _is_packable(child) and child.padding_mode == "zeros":
                setattr(module, name, PackedConv2d(child))


def _is_packable(layer: nn.Linear | nn.Conv2d) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad


def _fits(inputs: Tensor) -> bool:
    """Autocast, half precision and other devices take the plain way."""
    plain = inputs.dtype == torch.float32 and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and inputs.numel() > 0
