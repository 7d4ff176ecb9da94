"""The parts of an optimiser step on this process's share of a global batch. Paper: section 4.2.

`Trainer.train_steps` puts them together; a replay repeats `forward_backward` alone.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from solq_lab import distributed
from solq_lab.models.batch_norm import BatchNorm2d
from solq_lab.precision import autocast_to
from solq_lab.runs import RunError
from solq_lab.schema import TrainSection
from solq_lab.structures import ImageBatch, Predictions, Target
from solq_lab.training.guests import draw_guests, with_guests
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import NonFiniteCostError

SCALE_FLOOR = 1.0  # gradients that overflow at this scale do not overflow because of it

Batch = tuple[ImageBatch, list[Target]]
StepKind = Literal["finite", "overflow", "nonfinite"]


class MicroBatch(NamedTuple):
    """A batch of one process after its forward and backward pass."""

    images: ImageBatch  # the batch as the loader gave it
    targets: list[Target]  # its targets on the model's device
    predictions: Predictions  # of the network
    # scalars by name, not weighted, and their weighted "total"; the total alone, nan, where matching failed
    losses: dict[str, Tensor]
    fault: str | None  # what the matcher found; None where all costs were finite


class StepResult(NamedTuple):
    """One optimiser step of this process; `kind` is the same in every process."""

    # "finite"; "overflow" where fp16 gradients overflowed and the scale was halved; "nonfinite" where a cost, a loss or
    # the gradients of some process were not finite. The last two leave weights, optimiser, averaged weights and the
    # network's buffers as they were
    kind: StepKind
    micro_batches: list[MicroBatch]  # of this process
    num_boxes: float  # what the losses were divided by
    norm: Tensor  # of all gradients before clipping, in units of the loss
    scale: float  # factor of the losses in the backward passes; 1 but for fp16
    generators: dict[str, Tensor]  # states of torch's random generators before the first forward pass


def forward_backward(
    model: nn.Module,
    criterion: SetCriterion,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    num_boxes: float,
    autocast: str,
) -> MicroBatch:
    """Forward pass, losses and backward pass; the gradients, times the scale, are added to those that are there.

    Args:
        model: the network, or DDP around it.
        criterion: computes the losses.
        scaler: scales the total loss for fp16, else leaves it.
        batch: images and targets, on the host.
        num_boxes: what the losses are divided by.
        autocast: "none", "bf16" or "fp16", for the network's forward pass alone.
    """
    images, targets = batch
    guests = draw_guests(model, targets)  # on the host, where the targets are
    device = next(model.parameters()).device
    targets, matches = [target.to(device) for target in targets], None

    def match(found: Predictions) -> tuple[Tensor, Tensor] | None:
        """Which queries need mask vectors; None where a cost is not finite, which the criterion will say."""
        nonlocal matches
        with contextlib.suppress(NonFiniteCostError):
            matches = criterion.matcher(found, targets)
        return None if matches is None else with_guests(matches.layers, found.guests)

    with autocast_to(autocast, device):
        inputs, guests = images.to(device).normalised(), None if guests is None else guests.to(device)
        # Masks take no part in the matching: it comes first, and only queries with an object get mask vectors.
        predictions = model(inputs, guests, match)

    try:
        losses, fault = criterion(predictions, targets, num_boxes=num_boxes, matches=matches), None
        total = criterion.total(losses)
    except NonFiniteCostError as error:
        # Without a matching there is still a backward pass, of nan: under DDP the other processes wait for these
        # gradients, and learn from them that the step is to be skipped.
        losses, fault = {}, str(error)
        outputs = [leaf for leaf in tree_leaves(predictions) if isinstance(leaf, Tensor) and leaf.requires_grad]
        total = torch.stack([output.float().sum() for output in outputs]).sum() * math.nan  # reaches every parameter

    scaler.scale(total).backward()
    return MicroBatch(images, targets, predictions, {**losses, "total": total}, fault)


def micro_batches_per_process(train: TrainSection) -> int:
    """Micro-batches per optimiser step of each process, so that each is as large as the experiment has it.

    A run may resume with another number of processes than it began with: its global batches and their sums stay the
    same, and fewer processes take more micro-batches each. Where `train.gpus` is 0 they take larger ones.

    Raises:
        RunError: the micro-batches do not divide by the processes that were started.
    """
    processes = distributed.world_size()
    parts = train.gpus * train.accumulate or train.batch_size // train.accumulate  # of a batch, at most
    if parts % processes:
        allowed = ", ".join(str(number) for number in range(1, parts + 1) if parts % number == 0)
        raise RunError(
            f"{processes} training processes were started, and train.gpus x train.accumulate = {train.gpus} x "
            f"{train.accumulate} passes per step do not divide by them; allowed are {allowed}. Start it with "
            f"python -m solq_lab.training.torchrun --nproc-per-node={train.gpus} RUN_FOLDER"
        )
    return parts // processes if train.gpus else train.accumulate


def check_gpus() -> None:
    """Raise RunError where this machine has fewer GPUs than processes, before a process takes one."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise RunError(f"{here} processes were started on a machine with {gpus} GPUs; start at most {gpus} on it")


def share_gradients(model: nn.Module, device: torch.device, *, micro_batches: int) -> nn.Module:
    """The model as DDP, which averages gradients over the processes; the model itself where there is only one."""
    if distributed.world_size() == 1:
        return model
    # Every loss reaches its parameters on every rank, objects or not: none is unused, and the graph is always the same.
    # DDP makes use of that unless the first backward pass is one of several, under `no_sync`.
    devices = [device] if device.type == "cuda" else None
    parallel = DistributedDataParallel(
        model, device_ids=devices, gradient_as_bucket_view=True, static_graph=micro_batches == 1
    )
    # Buffers are equal now. Our batch norms see the images of all processes and keep them so, timm's do not.
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    parallel.broadcast_buffers = not all(isinstance(norm, BatchNorm2d) for norm in norms)
    if distributed.has_shared_memory():
        parallel.register_comm_hook(None, lambda _, bucket: _average(bucket.buffer()))
    return parallel


def _average(gradients: Tensor) -> torch.futures.Future[Tensor]:
    """The mean of gradients over the processes, as DDP takes it."""
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(distributed.sum_over_processes(gradients) / distributed.world_size())
    return mean


def no_sync(model: nn.Module, *, active: bool) -> contextlib.AbstractContextManager[None]:
    """Within the block, if `active`, DDP leaves the averaging of gradients to a later micro-batch of the step."""
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def boxes_per_process(batches: Sequence[Batch], device: torch.device) -> float:
    """Objects of the global batch over the number of processes: what the losses of a step are divided by.

    Gradients are summed over the micro-batches of a process and averaged over processes; divided by this number they
    are those of the whole batch at once.
    """
    objects = sum(len(target.labels) for _, targets in batches for target in targets)
    return distributed.sum_of_numbers(objects, device) / distributed.world_size()


def check_finite(micro_batches: Sequence[MicroBatch], norm: Tensor, scaler: torch.amp.GradScaler) -> StepKind:
    """Whether losses and gradients of all processes are finite: one all-reduce, one wait for the GPU.

    Where they are not, `scaler` is made ready for the next step: with half its scale if that is to blame.
    """
    totals = torch.stack([micro_batch.losses["total"].detach() for micro_batch in micro_batches])
    faults = torch.stack([~totals.isfinite().all(), ~norm.isfinite()]).float()
    in_losses, in_gradients = distributed.sum_over_processes(faults).tolist()
    if not in_losses and not in_gradients:
        return "finite"

    scale = scaler.get_scale()
    if not in_losses and scale > SCALE_FLOOR:
        scaler.update()
        if scaler.get_scale() < scale:
            return "overflow"
    scaler.update(scaler.get_scale())  # unchanged
    return "nonfinite"
