"""Linear layers laid out for the CPU's kernels.

On some processors the library behind `nn.Linear` is a quarter slower than oneDNN, which already serves convolutions.
oneDNN takes weights in an order of its own, prepared here, and applies bias and ReLU while it writes the result. The
ops are those that torch's own compiler emits for a CPU. Packed convolutions were measured too and gained nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer that keeps its weights in oneDNN's order too; float32 on the CPU runs from that copy.

    Args:
        plain: the layer, not trained any more.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.plain = plain
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.multiply(features) if runs_packed(features) else self.plain(features)

    def multiply(self, features: Tensor, activation: str = "none") -> Tensor:
        """The product in oneDNN with an activation ("none" or "relu") on its result; float32 on the CPU only."""
        return torch.ops.mkldnn._linear_pointwise(features, self._packed, self.plain.bias, activation, [], "")

    def multiply_and_add(self, features: Tensor, others: Tensor) -> Tensor:
        """The product plus `others`, which have its shape; float32 on the CPU only."""
        return torch.ops.mkldnn._linear_pointwise.binary(features, others, self._packed, self.plain.bias, "add")

    def __deepcopy__(self, memo: dict) -> PackedLinear:
        return PackedLinear(copy.deepcopy(self.plain, memo))  # packed weights cannot be copied


def is_packable(layer: nn.Linear) -> bool:
    """Whether a layer is done with learning and float32 on a CPU that has oneDNN."""
    weight = layer.weight
    ready = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    return ready and torch.backends.mkldnn.is_available()


def runs_packed(inputs: Tensor) -> bool:
    """Whether packed layers serve these inputs; autocast, half precision and other devices take the plain way."""
    plain = inputs.dtype == torch.float32 and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and inputs.numel() > 0
