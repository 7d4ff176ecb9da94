"""Averaged weights: an exponential moving average of the model over the optimiser steps."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of a model: floats move by (1 - decay) towards the model's; integers are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        average_of: dict[int, Tensor] = {}  # by address: a tensor under several names is averaged once
        self._average: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            self._average[name] = average_of.setdefault(value.data_ptr(), value.detach().clone())
        names = {id(value): name for name, value in self._average.items()}.values()
        self._floats = [name for name in names if self._average[name].is_floating_point()]
        self._integers = [name for name in names if not self._average[name].is_floating_point()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Average in the model's weights after a step."""
        current = model.state_dict()
        averages = [self._average[name] for name in self._floats]
        torch._foreach_lerp_(averages, [current[name] for name in self._floats], 1 - self.decay)
        for name in self._integers:
            self._average[name].copy_(current[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the model's names."""
        return self._average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averaged weights that `state_dict` returned."""
        for name, value in self._average.items():
            value.copy_(state[name])

    @contextlib.contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self._average)
        try:
            yield
        finally:
            model.load_state_dict(own)
