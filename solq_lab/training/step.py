"""One optimiser step on this process's share of a global batch. Paper: section 4.2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solq_lab import distributed
from solq_lab.codecs.base import MaskCodec
from solq_lab.config import Experiment
from solq_lab.precision import autocast_to
from solq_lab.structures import ImageBatch, Predictions, Target
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher, NonFiniteCostError
from solq_lab.training.optim import clip_gradients, gradient_norm

SCALE_FLOOR = 1.0  # gradients that overflow although the loss was not scaled up are no matter of the scale

Batch = tuple[ImageBatch, list[Target]]


class Pass(NamedTuple):
    """One forward and backward pass of a step, as this process saw it.

    images: the batch as the loader gave it.
    targets: its targets on the model's device.
    predictions: of the network.
    losses: scalars by name, not weighted, and their weighted "total"; the total alone, nan, where matching failed.
    fault: what the matcher found; None where all costs were finite.
    """

    images: ImageBatch
    targets: list[Target]
    predictions: Predictions
    losses: dict[str, Tensor]
    fault: str | None


class Outcome(NamedTuple):
    """What became of a step; `kind` is the same in every process.

    kind: "taken"; "overflow" where fp16 gradients did not fit and the scale was halved; "nonfinite" where a cost, a
        loss or the gradients of some process were not finite. Weights, optimiser, averaged weights and the network's
        buffers are untouched in the last two.
    passes: of this process.
    num_boxes: what the losses were divided by.
    norm: of all gradients before clipping, in units of the loss.
    scale: that the losses had in the backward passes; 1 but for fp16.
    generators: states of torch's random generators before the first pass.
    """

    kind: Literal["taken", "overflow", "nonfinite"]
    passes: list[Pass]
    num_boxes: float
    norm: Tensor
    scale: float
    generators: dict[str, Tensor]


class TrainingStep:
    """Takes optimiser steps: the backward passes, clipping, the update, and the averaged weights behind it.

    Args:
        model: the network, whose parameters `optimizer` holds, on its device.
        parallel: the same network as it is called; DDP around it where there are several processes.
        criterion: gives the losses.
        optimizer: moves the weights.
        average: follows the weights; None where nothing does.
        autocast: "none", "bf16" or "fp16", for the network's forward pass alone.
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
        self.scaler = torch.amp.GradScaler(device.type, enabled=autocast == "fp16")
        self._buffers = list(model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def take(self, batches: list[Batch]) -> Outcome:
        """Take a step with one backward pass for each of `batches`, or leave everything as it was and say why."""
        generators, scale = generator_states(self.device), self.scaler.get_scale()
        torch._foreach_copy_(self._buffers_before, self._buffers)
        num_boxes = self._boxes_per_process(batches)
        self.optimizer.zero_grad()
        passes = [
            self.differentiate(batch, num_boxes, apart=number < len(batches))
            for number, batch in enumerate(batches, start=1)
        ]
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        kind = self._judge(passes, norm)
        if kind == "taken":
            clip_gradients(self.model, self.clip_norm, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.average is not None:
                self.average.update(self.model)
        else:  # batch norms have taken in what the network saw
            torch._foreach_copy_(self._buffers, self._buffers_before)
        return Outcome(kind, passes, num_boxes, norm, scale, generators)

    def differentiate(self, batch: Batch, num_boxes: float, *, apart: bool = False) -> Pass:
        """A forward and a backward pass; gradients, times the scale, are added to those that are there.

        A pass that cannot be matched has a backward pass too, with nan: no process waits for its gradients, and every
        process learns of it from them.

        Args:
            batch: images and targets.
            num_boxes: what the losses are divided by.
            apart: processes wait with averaging their gradients, for a later pass of the same step.
        """
        images, targets = batch
        targets = [target.to(self.device) for target in targets]
        with self._gradients_kept_apart(apart):
            with autocast_to(self.autocast, self.device):
                predictions = self.parallel(images.to(self.device).normalised())
            try:
                losses, fault = self.criterion(predictions, targets, num_boxes=num_boxes), None
                total = self.criterion.total(losses)
            except NonFiniteCostError as error:
                losses, fault = {}, str(error)
                total = _sum_of_outputs(predictions) * math.nan
            self.scaler.scale(total).backward()
        return Pass(images, targets, predictions, {**losses, "total": total}, fault)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to scale its losses alike; empty but for fp16."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.scaler.load_state_dict(dict(state))

    def _judge(self, passes: list[Pass], norm: Tensor) -> Literal["taken", "overflow", "nonfinite"]:
        """Whether the step may be taken: the same answer in every process, for one exchange and one wait."""
        totals = torch.stack([done.losses["total"].detach() for done in passes])
        faults = torch.stack([~totals.isfinite().all(), ~norm.isfinite()]).float()
        in_losses, in_gradients = distributed.sum_over_processes(faults).tolist()
        if not in_losses and not in_gradients:
            return "taken"
        if not in_losses and self._lower_scale():
            return "overflow"
        self.scaler.update(self.scaler.get_scale())  # as it was, ready for the next step
        return "nonfinite"

    def _lower_scale(self) -> bool:
        """Halve the scale where it is to blame for gradients that are not finite."""
        before = self.scaler.get_scale()
        if before <= SCALE_FLOOR:
            return False
        self.scaler.update()
        return self.scaler.get_scale() < before

    def _boxes_per_process(self, batches: list[Batch]) -> float:
        """Objects of the global batch over the number of processes: what the losses of this step are divided by.

        Gradients are then summed over the step's backward passes and averaged over processes, and so are those of the
        whole batch at once.
        """
        objects = sum(len(target.labels) for _, targets in batches for target in targets)
        return distributed.sum_of_numbers(objects, self.device) / distributed.world_size()

    def _gradients_kept_apart(self, apart: bool) -> contextlib.AbstractContextManager:
        """Within: whether processes wait with averaging their gradients, for a later backward pass of the same step."""
        if apart and isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()


def build_criterion(experiment: Experiment, codec: MaskCodec | None) -> SetCriterion:
    """The losses that an experiment asks for, in training mode: the released PCA code draws noise there."""
    loss, costs = experiment.loss, experiment.matcher.model_dump()
    matcher = HungarianMatcher(**costs, focal_alpha=loss.focal_alpha, focal_gamma=loss.focal_gamma)
    return SetCriterion(codec, matcher, **loss.model_dump()).train()


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the generators that a step draws from, dropout above all."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Set torch's generators to what `generator_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _sum_of_outputs(predictions: Predictions) -> Tensor:
    """A scalar that reaches every output of the network, and so every parameter."""
    layers = [*predictions.layers, *([] if predictions.proposals is None else [predictions.proposals])]
    outputs = [part for layer in layers for part in (layer.logits, layer.boxes, layer.vectors) if part is not None]
    outputs += [layer.masks.logits for layer in layers if layer.masks is not None]
    return torch.stack([output.float().sum() for output in outputs]).sum()
