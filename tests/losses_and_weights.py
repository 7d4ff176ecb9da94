"""Losses and weights of four training steps in float64, for `in_process_group`."""

from pathlib import Path

import pytest
import torch
from training_runs import before_each_step

from solq_lab import distributed
from solq_lab.runs import load_run
from solq_lab.structures import ImageBatch
from solq_lab.training.signals import StopRequest
from solq_lab.training.step import Batch
from solq_lab.training.trainer import Trainer

STEPS = 4


def write_losses_and_weights(run_folder: Path, output: Path, frozen: bool) -> None:
    """Into a file of the main process: losses of each step, weights after the last, objects by step, process and pass.

    Where `frozen`, batch norms are constants.
    """
    torch.set_default_dtype(torch.float64)  # rounding is not to hide behind a tolerance, and AdamW enlarges it
    trainer = Trainer(load_run(run_folder))
    trainer.model.register_forward_pre_hook(_in_double_precision)
    if frozen:
        trainer.model.backbone.eval()
    objects = []

    def count_objects(trainer: Trainer, batches: list[Batch]) -> None:
        objects.append(distributed.gather_objects([sum(len(t.labels) for t in targets) for _, targets in batches]))

    before_each_step(pytest.MonkeyPatch(), count_objects)
    trainer.total_steps = STEPS
    trainer.train_steps(StopRequest())
    distributed.wait_for_all()
    losses = [
        {"total": line["total"], "grad_norm": line["grad_norm"], **line["losses"]}
        for line in trainer.run.metrics("train")
    ]
    if distributed.is_main():
        torch.save({"losses": losses, "objects": objects, "weights": trainer.model.state_dict()}, output)


def _in_double_precision(model: torch.nn.Module, inputs: tuple[ImageBatch]) -> tuple[ImageBatch]:
    return (inputs[0]._replace(pixels=inputs[0].pixels.double()),)
