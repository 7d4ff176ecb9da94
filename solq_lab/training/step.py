"""One optimiser step on this process's share of a global batch. Paper: section 4.2."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solq_lab import distributed
from solq_lab.structures import ImageBatch, Target
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.losses import SetCriterion
from solq_lab.training.optim import clip_gradients

Batch = tuple[ImageBatch, list[Target]]


class NonFiniteError(RuntimeError):
    """The gradients are no longer finite; the message names the step and the pictures."""


class TrainingStep:
    """Takes optimiser steps: the backward passes, clipping, the update, and the averaged weights behind it.

    Args:
        model: the network, whose parameters `optimizer` holds.
        parallel: the same network as it is called; DDP around it where there are several processes.
        criterion: gives the losses.
        optimizer: moves the weights.
        average: follows the weights; None where nothing does.
        autocast: "none" or "bf16", for the network's forward pass alone.
        clip_norm: largest gradient norm; 0 leaves the gradients alone.
        device: of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        average: AveragedWeights | None,
        *,
        autocast: str,
        clip_norm: float,
        device: torch.device,
    ) -> None:
        self.model, self.parallel, self.criterion = model, parallel, criterion
        self.optimizer, self.average = optimizer, average
        self.autocast, self.clip_norm, self.device = autocast, clip_norm, device

    def take(self, batches: list[Batch], *, number: int) -> list[dict[str, Tensor]]:
        """Take a step with one backward pass for each of `batches`; `number` is what messages call it.

        Returns:
            Scalars to be summed by name: the losses and their "total" of each pass, and once "grad_norm".

        Raises:
            NonFiniteError: the gradient norm is not finite; weights and optimiser are as they were.
        """
        num_boxes = self._boxes_per_process(batches)
        self.optimizer.zero_grad()
        passes = []
        for index, (images, targets) in enumerate(batches, start=1):
            with self._gradients_kept_apart(index < len(batches)):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast == "bf16"):
                    predictions = self.parallel(images.to(self.device).normalised())
                targets = [target.to(self.device) for target in targets]
                losses = self.criterion(predictions, targets, num_boxes=num_boxes)
                total = self.criterion.total(losses)
                total.backward()
            passes.append({**losses, "total": total})
        norm = clip_gradients(self.model, self.clip_norm)
        _check_finite(norm, batches, number)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        return [*passes, {"grad_norm": norm}]

    def _boxes_per_process(self, batches: list[Batch]) -> float:
        """Objects of the global batch over the number of processes: what the losses of this step are divided by.

        Gradients are then summed over the step's backward passes and averaged over processes, and so are those of the
        whole batch at once.
        """
        objects = sum(len(target.labels) for _, targets in batches for target in targets)
        total = distributed.sum_over_processes(torch.tensor(float(objects), device=self.device))
        return total.item() / distributed.world_size()

    def _gradients_kept_apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Within: whether processes wait with averaging their gradients, for a later backward pass of the same step."""
        if apart and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()


def _check_finite(norm: Tensor, batches: list[Batch], number: int) -> None:
    if math.isfinite(norm.item()):  # the norm is the same in every process
        return
    own = [target.image_id for _, targets in batches for target in targets]
    image_ids = [image_id for share in distributed.gather_objects(own) for image_id in share]
    raise NonFiniteError(
        f"step {number}: the gradient norm is {norm.item()}; image ids of this step: {image_ids}. "
        "The weights were left as they were before it. Lower optim.lr, or set train.autocast=none"
    )
