"""Linear layers laid out for the CPU's kernels and caches.

On some processors the library behind `nn.Linear` is a quarter slower than oneDNN, which already serves convolutions.
oneDNN takes weights in an order of its own, prepared here, and applies bias and ReLU while it writes the result. The
ops are those that torch's own compiler emits for a CPU. Packed convolutions were measured too and gained nothing.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq_lab.models.encoder import FeedForward

TOKENS_AT_ONCE = 1024  # of a feed-forward block: its hidden features, four megabytes, then stay in the cache


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
        return self.multiply(features) if _fits(features) else self.plain(features)

    def multiply(self, features: Tensor, activation: str = "none") -> Tensor:
        """The product in oneDNN with an activation ("none" or "relu") on its result; float32 on the CPU only."""
        return torch.ops.mkldnn._linear_pointwise(features, self._packed, self.plain.bias, activation, [], "")

    def __deepcopy__(self, memo: dict) -> PackedLinear:
        return PackedLinear(copy.deepcopy(self.plain, memo))  # packed weights cannot be copied


class PackedFeedForward(nn.Module):
    """A feed-forward block with ReLU whose hidden features never leave the cache.

    Args:
        plain: the block, its linear layers packed.
    """

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not _fits(tokens):
            return self.plain(tokens)
        result = torch.empty_like(tokens)
        rows = tokens.flatten(0, -2).split(TOKENS_AT_ONCE)  # (..., C) -> pieces (n, C)
        for some, place in zip(rows, result.flatten(0, -2).split(TOKENS_AT_ONCE), strict=True):
            changed = self.plain.linear2.multiply(self.plain.linear1.multiply(some, "relu"))
            place.copy_(self.plain.norm(changed.add_(some)))
        return result


def pack_weights(model: nn.Module) -> None:
    """Replace linear layers that are float32 on the CPU, and the feed-forward blocks of such, by packed ones."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and _is_packable(child):
                setattr(module, name, PackedLinear(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FeedForward) and child.activate is F.relu and isinstance(child.linear1, PackedLinear):
                setattr(module, name, PackedFeedForward(child))


def _is_packable(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad


def _fits(inputs: Tensor) -> bool:
    """Autocast, half precision and other devices take the plain way."""
    plain = inputs.dtype == torch.float32 and inputs.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and inputs.numel() > 0
