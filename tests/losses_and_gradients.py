"""Losses and gradients of the second step of a run whose weights are not moved.

`python losses_and_gradients.py RUN_FOLDER OUTPUT`, also under torchrun.
"""

import sys
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


if __name__ == "__main__":
    with distributed.process_group(rank_timeout=60.0, on_fatal=print):
        found = losses_and_gradients(Path(sys.argv[1]))
        if distributed.is_main():
            torch.save(found, sys.argv[2])
