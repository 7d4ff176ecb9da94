"""Losses and weights of four training steps in float64.

`python losses_and_weights.py RUN_FOLDER OUTPUT [frozen]`, also under torchrun; frozen: batch norms are constants.
"""

import sys
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


def losses_and_weights(run_folder: Path, *, frozen: bool) -> dict[str, list | dict[str, torch.Tensor]]:
    """The losses of each step, the weights after the last, and objects by step, process and pass."""
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
    return {"losses": losses, "objects": objects, "weights": trainer.model.state_dict()}


def _in_double_precision(model: torch.nn.Module, inputs: tuple[ImageBatch]) -> tuple[ImageBatch]:
    return (inputs[0]._replace(pixels=inputs[0].pixels.double()),)


if __name__ == "__main__":
    with distributed.process_group(rank_timeout=60.0, on_fatal=print):
        found = losses_and_weights(Path(sys.argv[1]), frozen="frozen" in sys.argv)
        if distributed.is_main():
            torch.save(found, sys.argv[2])
