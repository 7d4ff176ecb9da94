"""The network's layers in oneDNN, for float32 on the CPU: the same parameters and results, other kernels.

On some processors the library behind `nn.Linear` is a quarter slower than oneDNN, which already serves convolutions.
The ops are those that torch's own compiler emits for a CPU. Half precision, autocast, other devices and models that are
being compiled take the plain layers' way. Packed convolutions of larger kernels were measured too and gained nothing.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.resnet import Bottleneck

from solq_lab.models.attention import Memory, MultiScaleDeformableAttention
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.models.heads import MLP
from solq_lab.models.look import MaskLook
from solq_lab.ops.ms_deform_attn import ms_deform_attn

TOKENS_PER_CHUNK = 1024  # of a feed-forward block: its hidden features, four megabytes, then stay in the cache
SAMPLING_COST = 4  # of a multiplication while sampling, in those of a matrix product; roughly


def use_onednn(model: nn.Module, *, training: bool) -> None:
    """Replace the layers of a model that oneDNN computes faster, and the blocks that can do with less work.

    Parameters and their names stay.

    Args:
        model: changed in place; only what is float32 on the CPU is replaced. Not for a model that will be compiled.
        training: layers that learn get a backward pass in oneDNN. Otherwise layers that no longer learn keep a second
            copy of their weights in the order that oneDNN reads; later changes of the weights do not reach it.
    """
    if not torch.backends.mkldnn.is_available():
        return

    for name, child in list(model.named_children()):
        use_onednn(child, training=training)  # children first: what replaces a block uses them
        if type(child) is nn.Linear:
            if _is_plain(child.weight) and (training or not child.weight.requires_grad):
                setattr(model, name, OneDNNLinear(child, packed=not training))
        # All others keep what they have, and get another `forward`.
        elif type(child) is nn.Conv2d and not training and OneDNNPointwise.serves(child):
            child.__class__ = OneDNNPointwise
            cast(OneDNNPointwise, child)._pack()
        elif type(child) is Bottleneck and type(child.conv1) is OneDNNPointwise and type(child.bn3) is nn.Identity:
            child.__class__ = OneDNNBottleneck
        elif type(child) is FeedForward and isinstance(child.linear1, OneDNNLinear):
            child.__class__ = OneDNNFeedForward
        elif type(child) is MultiScaleDeformableAttention and isinstance(model, DecoderLayer):
            if isinstance(child.value_proj, OneDNNLinear):
                child.__class__ = SampleFirstAttention
        elif training and name == "proposal_head":
            child.get_submodule("box").__class__ = ProposalMLP
        elif training and name == "fine" and isinstance(model, MaskLook):
            child.__class__ = ProjectionWithNorm


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
    """A 1 x 1 convolution that predicts: a linear layer where channels are last. On one thread torch's is slower."""

    packed = True

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


class OneDNNBottleneck(Bottleneck):
    """A block of a ResNet that predicts, its batch norms folded: ReLU and residual sum are part of the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        if not (_runs_in_onednn(x) and x.is_contiguous(memory_format=torch.channels_last)):
            return super().forward(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = self.conv1.multiply(x.permute(0, 2, 3, 1), "relu").permute(0, 3, 1, 2)
        second, third = (
            (layer.weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups)
            for layer in (self.conv2, self.conv3)
        )
        hidden = torch.ops.mkldnn._convolution_pointwise(hidden, *second, "relu", [], "")
        return torch.ops.mkldnn._convolution_pointwise.binary(hidden, shortcut, *third, "add", None, "relu", [], "")


class OneDNNFeedForward(FeedForward):
    """A feed-forward block with ReLU whose hidden features, or their gradients, never leave the cache."""

    linear1: OneDNNLinear
    linear2: OneDNNLinear

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
        add, last = torch.ops.mkldnn._linear_pointwise.binary, (self.linear2._packed_weight, self.linear2.bias)
        flat = tokens.flatten(0, -2)  # (..., C) -> (n, C)
        changed = torch.empty_like(flat)
        for some, place in zip(flat.split(TOKENS_PER_CHUNK), changed.split(TOKENS_PER_CHUNK), strict=True):
            place.copy_(self.norm(add(self.linear1.multiply(some, "relu"), some, *last, "add")))
        return changed.view_as(tokens)


class ProposalMLP(MLP):
    """The box head of the encoder's proposals, of which few have an object: only those are differentiated."""

    def forward(self, features: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        learns = _learns(features, self.output_bias)
        return _ProposalMLP.apply(features, *self.parameters()) if learns else super().forward(features)


class ProjectionWithNorm(nn.Sequential):
    """A 1 x 1 convolution to more channels and its group norm, as one product per image.

    Mean and variance of what the convolution makes follow from mean and covariance of its fewer inputs.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, C, H, W), with channels last."""
        convolution, norm = cast("tuple[nn.Conv2d, nn.GroupNorm]", tuple(self))
        if not _learns(maps, convolution.weight):
            return super().forward(maps)
        weight, groups = convolution.weight.flatten(1), (norm.num_groups, -1)

        tokens = maps.flatten(2).mT  # (B, H*W, channels)
        mean = tokens.mean(1, keepdim=True)
        centered = tokens - mean
        variance = ((weight @ (centered.mT @ centered)) * weight).sum(-1) / tokens.shape[1]  # (B, C)
        shift = F.linear(mean, weight, convolution.bias).squeeze(1).unflatten(1, groups)
        shift = shift - shift.mean(-1, keepdim=True)  # of a feature from the mean of its group
        spread = (variance.unflatten(1, groups) + shift.square()).mean(-1, keepdim=True)
        scale = norm.weight.unflatten(0, groups) * (spread + norm.eps).rsqrt()
        shift = torch.addcmul(norm.bias, shift.flatten(1), scale.flatten(1))
        tokens = torch.baddbmm(shift.unsqueeze(1), centered, (scale.flatten(1).unsqueeze(-1) * weight).mT)
        return tokens.mT.unflatten(2, maps.shape[2:])


class SampleFirstAttention(MultiScaleDeformableAttention):
    """Deformable attention that samples the memory first and projects the samples, instead of the whole memory.

    Projection and sampling are both linear, so they may change places. The few queries of a decoder touch fewer numbers
    than a projection of all tokens: sampling all C channels for each head, and then projecting, is less work. The bias
    counts as much as a head's weights fell on the map, and not beyond it or on padding.
    """

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


class _ProposalMLP(torch.autograd.Function):
    """Three linear layers; the backward pass computes the rows that have a gradient again."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(features, *parameters)
        weight1, bias1, weight2, bias2, weight3, bias3 = parameters
        hidden = _multiply(_multiply(features, weight1, bias1, "relu"), weight2, bias2, "relu")
        return _multiply(hidden, weight3, bias3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        features, *parameters = ctx.saved_tensors
        rows = gradient.any(-1).nonzero(as_tuple=True)
        with torch.enable_grad():
            some = features[rows].requires_grad_()
            hidden = F.linear(F.linear(some, *parameters[:2]).relu(), *parameters[2:4]).relu()
            outputs = F.linear(hidden, *parameters[4:])
        grad_some, *grads = torch.autograd.grad(outputs, [some, *parameters], gradient[rows])
        return torch.zeros_like(features).index_put_(rows, grad_some), *grads


def _multiply(features: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(features, weight, bias, activation, [], "")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _runs_in_onednn(inputs: Tensor) -> bool:
    return _is_plain(inputs) and not torch.is_autocast_enabled("cpu") and inputs.numel() > 0


def _learns(features: Tensor, weight: Tensor) -> bool:
    compiling = torch.compiler.is_compiling()
    return torch.is_grad_enabled() and weight.requires_grad and _runs_in_onednn(features) and not compiling
