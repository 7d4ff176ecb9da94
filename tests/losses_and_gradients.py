"""Losses and gradients of the second step of a run whose weights are not moved."""

from pathlib import Path

import torch

from solq_lab import distributed
from solq_lab.runs import load_run
from solq_lab.training.signals import StopRequest
from solq_lab.training.trainer import Trainer


def losses_and_gradients(run_folder: Path) -> dict[str, dict]:
    """Losses of the second of two steps, averaged over the processes, and its gradients."""
    trainer = Trainer(load_run(run_folder))
    trainer.model.backbone.eval()  # a batch norm sees only its own process's share of the images
    trainer.optimizer.step = lambda: None
    trainer.total_steps = 2
    assert trainer.train_steps(StopRequest())
    distributed.wait_for_all()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return {"losses": trainer.run.metrics("train")[-1]["losses"], "gradients": gradients}


def write_losses_and_gradients(run_folder: Path, output: Path) -> None:
    """The same into a file of the main process, for `in_process_group`."""
    found = losses_and_gradients(run_folder)
    if distributed.is_main():
        torch.save(found, output)
