"""The network's layers arranged for training on the CPU: the same parameters and results, other kernels.

`models` says what is computed. On some processors the library behind `nn.Linear` is a quarter slower than oneDNN, which
already serves convolutions; gradients of the weights are as fast there and stay. float32 on the CPU with gradients
goes this way; everything else the plain one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from solq_lab.inference.packed_layers import TOKENS_AT_ONCE, SamplingFirst
from solq_lab.inference.packing import runs_packed
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward


class TrainedLinear(nn.Linear):
    """A linear layer in oneDNN, forward and backward.

    Args:
        plain: the layer whose parameters this one takes over.
    """

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not _learns(features, self.weight):
            return super().forward(features)
        return _Linear.apply(features, self.weight, self.bias)


class TrainedFeedForward(FeedForward):
    """A feed-forward block with ReLU whose hidden gradients never leave the cache.

    Args:
        plain: the block whose layers this one takes over.
    """

    def __init__(self, plain: FeedForward) -> None:
        nn.Module.__init__(self)
        self.activate = plain.activate
        for name, layer in plain.named_children():
            setattr(self, name, layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        dropped = self.training and self.dropout.p > 0
        if dropped or self.activate is not F.relu or not _learns(tokens, self.linear1.weight):
            return super().forward(tokens)
        first, second = self.linear1, self.linear2
        return self.norm(tokens + _FeedForward.apply(tokens, first.weight, first.bias, second.weight, second.bias))


def arrange_for_cpu(model: nn.Module) -> None:
    """Exchange the layers of a model that is on the CPU; its parameters and their names stay.

    Not for a model to be compiled: the compiler arranges the plain layers by itself.
    """
    if not torch.backends.mkldnn.is_available() or next(model.parameters()).device.type != "cpu":
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, TrainedLinear(child))
            elif type(child) is FeedForward:
                setattr(module, name, TrainedFeedForward(child))
        if isinstance(module, DecoderLayer):
            module.cross_attention = SamplingFirst(module.cross_attention)


def _learns(features: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_grad_enabled() and weight.requires_grad and runs_packed(features) and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        return _multiply(features, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return (
            _multiply(gradient, weight.t()) if ctx.needs_input_grad[0] else None,
            rows.t() @ features.flatten(0, -2) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        hidden = _multiply(tokens, weight1, bias1, "relu")
        ctx.save_for_backward(tokens, hidden, weight1, weight2)
        return _multiply(hidden, weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, hidden, weight1, weight2 = ctx.saved_tensors
        to_tokens = torch.empty_like(tokens)
        to_weight1, to_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        to_bias1 = torch.zeros_like(weight1[:, 0])
        pieces = (part.flatten(0, -2).split(TOKENS_AT_ONCE) for part in (tokens, hidden, gradient, to_tokens))
        for seen, active, asked, place in zip(*pieces, strict=True):
            inside = torch.ops.aten.threshold_backward(_multiply(asked, weight2.t()), active, 0)
            place.copy_(_multiply(inside, weight1.t()))
            to_weight1.addmm_(inside.t(), seen)
            to_weight2.addmm_(asked.t(), active)
            to_bias1.add_(inside.sum(0))
        return to_tokens, to_weight1, to_bias1, to_weight2, gradient.flatten(0, -2).sum(0)


def _multiply(features: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, activation, [], "")
