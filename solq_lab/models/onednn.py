"""The network's layers in oneDNN, for float32 on the CPU: the same parameters and results, other kernels.

On some processors the library behind `nn.Linear` is a quarter slower than oneDNN, which already serves convolutions.
The ops are those that torch's own compiler emits for a CPU. Half precision, autocast, other devices and models that are
being compiled take the plain layers' way. Packed convolutions of larger kernels were measured too and gained nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from solq_lab.models.attention import Memory, MultiScaleDeformableAttention
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.ops.ms_deform_attn import ms_deform_attn

TOKENS_PER_CHUNK = 1024  # of a feed-forward block: its hidden features, four megabytes, then stay in the cache
SAMPLING_COST = 4  # of a multiplication while sampling, in those of a matrix product; roughly


def use_onednn(model: nn.Module, *, training: bool) -> None:
    """Replace linear layers, feed-forward blocks, decoder attentions and, to predict, 1 x 1 convolutions of a model.

    Parameters and their names stay.

    Args:
        model: changed in place; only what is float32 on the CPU is replaced. Not for a model that will be compiled.
        training: layers that learn get a backward pass in oneDNN. Otherwise layers that no longer learn keep a second
            copy of their weights in the order that oneDNN reads; later changes of the weights do not reach it.
    """
    if not torch.backends.mkldnn.is_available():
        return

    for name, child in list(model.named_children()):
        use_onednn(child, training=training)  # children first: what replaces a block takes them over
        if type(child) is nn.Linear:
            if _is_plain(child.weight) and (training or not child.weight.requires_grad):
                setattr(model, name, OneDNNLinear(child, packed=not training))
        elif type(child) is nn.Conv2d and not training and OneDNNPointwise.serves(child):
            setattr(model, name, OneDNNPointwise(child))
        elif type(child) is FeedForward and isinstance(child.linear1, OneDNNLinear):
            setattr(model, name, OneDNNFeedForward(child))
        elif (
            isinstance(model, DecoderLayer)
            and isinstance(child, MultiScaleDeformableAttention)
            and isinstance(child.value_proj, OneDNNLinear)
        ):
            setattr(model, name, SampleFirstAttention(child))


class _Packed(nn.Module):
    """A layer that may keep a second copy of its weights, in the order that oneDNN reads."""

    weight: Tensor
    bias: Any
    packed: bool

    def multiply(self, features: Tensor, activation: str = "none") -> Tensor:
        """The product with the packed weights, with an activation ("none" or "relu") on its result."""
        return _multiply(features, self._packed_weight, self.bias, activation)

    def _pack(self) -> None:
        order = torch.ops.mkldnn._reorder_linear_weight
        self._packed_weight: Any = order(self.weight.flatten(1).contiguous()) if self.packed else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed_weight": None}  # packed weights cannot be copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


class OneDNNLinear(_Packed, nn.Linear):
    """A linear layer in oneDNN.

    Args:
        plain: the layer whose parameters this one takes over.
        packed: keep the weights in oneDNN's order too and run from that copy; for layers that no longer learn.
    """

    def __init__(self, plain: nn.Linear, *, packed: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.packed = packed
        self._pack()

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self.packed and _runs_in_onednn(features):
            return self.multiply(features)
        if not self.packed and _learns(features, self.weight):
            return _Linear.apply(features, self.weight, self.bias)
        return super().forward(features)


class OneDNNPointwise(_Packed, nn.Conv2d):
    """A 1 x 1 convolution that predicts: a linear layer where channels are last. torch has a slower one on one thread.

    Args:
        plain: the convolution whose parameters this one takes over.
    """

    packed = True

    def __init__(self, plain: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(plain.__dict__)
        self._pack()

    @staticmethod
    def serves(plain: nn.Conv2d) -> bool:
        """Whether a convolution is one of single pixels that no longer learns, in float32 on the CPU."""
        pointwise = plain.kernel_size == plain.stride == (1, 1) and plain.padding == (0, 0) and plain.groups == 1
        return pointwise and _is_plain(plain.weight) and not plain.weight.requires_grad

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H, W), with channels last."""
        if not (_runs_in_onednn(features) and features.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(features)
        return self.multiply(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class OneDNNFeedForward(FeedForward):
    """A feed-forward block with ReLU whose hidden features, or their gradients, never leave the cache.

    Args:
        plain: the block whose layers, `OneDNNLinear` already, this one takes over.
    """

    linear1: OneDNNLinear
    linear2: OneDNNLinear

    def __init__(self, plain: FeedForward) -> None:
        nn.Module.__init__(self)
        self.activate = plain.activate
        for name, layer in plain.named_children():
            setattr(self, name, layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        dropped = self.training and self.dropout.p > 0
        if dropped or self.activate is not F.relu:
            return super().forward(tokens)
        first, second = self.linear1, self.linear2
        if first.packed and _runs_in_onednn(tokens):
            return self._predict(tokens)
        if not first.packed and _learns(tokens, first.weight):
            return self.norm(tokens + _FeedForward.apply(tokens, first.weight, first.bias, second.weight, second.bias))
        return super().forward(tokens)

    def _predict(self, tokens: Tensor) -> Tensor:
        result = torch.empty_like(tokens)
        rows = tokens.flatten(0, -2).split(TOKENS_PER_CHUNK)  # (..., C) -> chunks (n, C)
        for some, place in zip(rows, result.flatten(0, -2).split(TOKENS_PER_CHUNK), strict=True):
            hidden = self.linear1.multiply(some, "relu")
            last = self.linear2._packed_weight, self.linear2.bias
            place.copy_(self.norm(torch.ops.mkldnn._linear_pointwise.binary(hidden, some, *last, "add")))
        return result


class SampleFirstAttention(MultiScaleDeformableAttention):
    """Deformable attention that samples the memory first and projects the samples, instead of the whole memory.

    Projection and sampling are both linear, so they may change places. The few queries of a decoder touch fewer numbers
    than a projection of all tokens: sampling all C channels for each head, and then projecting, is less work. The bias
    counts as much as a head's weights fell on the map, and not beyond it or on padding.

    Args:
        plain: the attention whose layers this one takes over.
    """

    def __init__(self, plain: MultiScaleDeformableAttention) -> None:
        nn.Module.__init__(self)  # the layers exist
        self.heads, self.levels, self.points = plain.heads, plain.levels, plain.points
        for name, layer in plain.named_children():
            setattr(self, name, layer)

    def forward(self, queries: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """As `MultiScaleDeformableAttention.forward`."""
        if not (_runs_in_onednn(memory.tokens) and self._is_less_work(queries, memory)):
            return super().forward(queries, reference, memory)

        tokens, present = memory.tokens, torch.ones_like(memory.tokens[..., :1])  # (B, T, 1)
        if memory.padding.any():
            present = present.masked_fill_(memory.padding.unsqueeze(-1), 0.0)
            tokens = tokens * present

        locations, weights = self.sampling(queries, reference, memory)
        present = present.unsqueeze(2).expand(-1, -1, self.heads, -1)  # (B, T, M, 1)
        share = ms_deform_attn(present, memory.spatial_shapes, locations, weights)  # (B, J, M)
        sampled = self._sample(tokens, locations, weights, memory)  # (B, J, M, C)

        matrix = self.value_proj.weight.unflatten(0, (self.heads, -1))
        bias = self.value_proj.bias.unflatten(0, (self.heads, -1))
        values = torch.einsum("bjmc,mdc->bjmd", sampled, matrix) + share.unsqueeze(-1) * bias
        return self.output_proj(values.flatten(2))

    def _sample(self, tokens: Tensor, locations: Tensor, weights: Tensor, memory: Memory) -> Tensor:
        """(B, J, M, C): all channels of the tokens at each head's points.

        The operator's queries are here the J*M pairs of query and head, and its heads are M slices of the channels.
        """
        slices = self.heads
        locations = locations.flatten(1, 2).unsqueeze(2).expand(-1, -1, slices, -1, -1, -1)  # (B, J*M, M, L, P, 2)
        weights = weights.flatten(1, 2).unsqueeze(2).expand(-1, -1, slices, -1, -1)
        sampled = ms_deform_attn(tokens.unflatten(-1, (slices, -1)), memory.spatial_shapes, locations, weights)
        return sampled.unflatten(1, (-1, self.heads))  # (B, J*M, C) -> (B, J, M, C)

    def _is_less_work(self, queries: Tensor, memory: Memory) -> bool:
        """Per channel: four corners of every sample, against one row of the projection for every token."""
        samples = queries.shape[1] * self.heads * self.levels * self.points
        return SAMPLING_COST * 4 * samples < memory.tokens.shape[1] * memory.tokens.shape[2]


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
            _multiply(rows.t(), features.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None,
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
        grad_tokens = torch.empty_like(tokens)
        grad_weight1, grad_weight2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
        grad_bias1 = torch.zeros_like(weight1[:, 0])

        # Chunk by chunk, the gradients of the hidden features stay in the cache.
        chunks = (part.flatten(0, -2).split(TOKENS_PER_CHUNK) for part in (tokens, hidden, gradient, grad_tokens))
        for inputs, active, grad_output, place in zip(*chunks, strict=True):
            grad_hidden = torch.ops.aten.threshold_backward(_multiply(grad_output, weight2.t()), active, 0)
            place.copy_(_multiply(grad_hidden, weight1.t()))
            grad_weight1.add_(_multiply(grad_hidden.t(), inputs.t()))
            grad_weight2.add_(_multiply(grad_output.t(), active.t()))
            grad_bias1.add_(grad_hidden.sum(0))
        return grad_tokens, grad_weight1, grad_bias1, grad_weight2, gradient.flatten(0, -2).sum(0)


def _multiply(features: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, activation, [], "")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _runs_in_onednn(inputs: Tensor) -> bool:
    return _is_plain(inputs) and not torch.is_autocast_enabled("cpu") and inputs.numel() > 0


def _learns(features: Tensor, weight: Tensor) -> bool:
    compiling = torch.compiler.is_compiling()
    return torch.is_grad_enabled() and weight.requires_grad and _runs_in_onednn(features) and not compiling
