"""Activation checkpointing: recompute activations in the backward pass instead of keeping them.

Training then keeps the inputs of the parts instead of everything inside them, for about a third more time.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Output = TypeVar("Output")


class Checkpointed(nn.Module):
    """A module that calls its parts by `checkpoint`.

    Attributes:
        checkpointing: whether training recomputes the activations inside the parts; set by `checkpoint_activations`.
    """

    checkpointing = False

    def checkpoint(self, part: Callable[..., Output], *inputs: object) -> Output:
        """part(*inputs), its activations recomputed in the backward pass of training where checkpointing is on.

        Dropout draws the same numbers again and autocast is restored, so that losses and gradients are those of the
        plain call. Batch norms see each batch once: the second pass leaves their running statistics alone. `part` is a
        module or a method of this one; tensors may lie inside lists and tuples.
        """
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return part(*inputs)
        return checkpoint(
            part,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(part)),  # of the first pass, the second
        )


def checkpoint_activations(network: nn.Module) -> None:
    """Turn activation checkpointing on in all parts of the network."""
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.checkpointing = True


@contextlib.contextmanager
def _frozen_statistics(part: Callable) -> Iterator[None]:
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
