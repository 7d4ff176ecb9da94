"""Batch norm with the statistics of the images of all processes, also on the CPU; torch's own needs a GPU.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training ...", algorithm 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from solq_lab import distributed


class BatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm; where several processes train, mean and variance are those of all their maps together."""

    running_mean: Tensor
    running_var: Tensor

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); in training a collective call, of all processes."""
        if not self.training or distributed.world_size() == 1:
            return super().forward(maps)

        # In float64, as a difference of squares follows.
        values = maps.detach() if maps.dtype == self.running_mean.dtype else maps.detach().float()
        mean, variance = (moment.double() for moment in torch.batch_norm_update_stats(values, None, None, 0.0))
        moments = torch.cat([mean, variance + mean.square(), mean.new_ones(1)]) * (maps.numel() / len(mean))
        moments = distributed.sum_over_processes(moments)
        count = moments[-1]
        mean, squares = (moments[:-1] / count).chunk(2)
        variance = squares - mean.square()

        # Where activations are recomputed, momentum is 0 and there is no counter: a batch counts once.
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum or 0.0)
        self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        mean, variance = mean.to(self.running_mean.dtype), variance.to(self.running_var.dtype)
        return _Normalise.apply(maps, self.weight, self.bias, mean, variance, count, self.eps)


class _Normalise(torch.autograd.Function):
    """Normalises maps (B, C, H, W) by a mean and a variance (C,) that depend on the maps of all processes."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, count: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(maps, weight, mean, variance, count)
        ctx.eps = eps
        return F.batch_norm(maps, mean, variance, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, variance, count = ctx.saved_tensors
        of_maps, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, maps, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )

        # That was for constant statistics. Through them, every map of every process has its share in the losses.
        sums = distributed.sum_over_processes(torch.stack([of_weight, of_bias]))
        slope, constant = sums / count * (weight * (variance + ctx.eps).rsqrt())
        of_maps -= F.batch_norm(maps, mean, variance, slope.to(mean.dtype), constant.to(mean.dtype), eps=ctx.eps)
        return of_maps, of_weight, of_bias, None, None, None, None
