"""Gradient checkpointing: a part of the network forgets what it computed, and computes it again on the way back.

Training then keeps the inputs of the parts instead of everything inside them, for about a third more time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


class Recomputing(nn.Module):
    """A module that runs its parts by way of `through`.

    Attributes:
        recompute: whether training forgets what happens inside the parts; `recompute_activations` decides.
    """

    recompute = False

    def through(self, part: Callable[..., Output], *inputs: object) -> Output:
        """part(*inputs), in evaluation and without gradients always just that.

        Dropout draws the same numbers again and autocast is as it was, so that losses and gradients are those of the
        plain call. Batch norms see each batch once: their running statistics are left alone the second time.

        Args:
            part: a module or a method of this one.
            inputs: its arguments; tensors may lie inside lists and tuples.
        """
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return part(*inputs)
        contexts = partial(_both_times, part)
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)


def recompute_activations(network: nn.Module) -> None:
    """From now on, training recomputes all parts of the network that go `through`."""
    for module in network.modules():
        if isinstance(module, Recomputing):
            module.recompute = True


def _both_times(
    part: Callable,
) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What surrounds the first run of a part, and the second."""
    return contextlib.nullcontext(), _statistics_left_alone(part)


@contextlib.contextmanager
def _statistics_left_alone(part: Callable) -> Iterator[None]:
    """Within, the batch norms of `part` normalise by the batch as before, but do not count it again."""
    modules = part.modules() if isinstance(part, nn.Module) else ()
    norms = [module for module in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    settings = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, batches in settings:
            norm.momentum, norm.num_batches_tracked = momentum, batches
