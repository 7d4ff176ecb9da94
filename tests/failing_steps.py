"""Three steps under torchrun, two of them spoilt by process 1 alone: `python failing_steps.py RUN_FOLDER OUTPUT`."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from solq_lab import distributed
from solq_lab.runs import load_run
from solq_lab.training.losses import SetCriterion
from solq_lab.training.trainer import Trainer


def take_steps(run_folder: Path) -> dict[str, list]:
    """Whether each step moved this process's weights or batch norms, and the reasons in the run's metrics."""
    trainer = Trainer(load_run(run_folder))
    spoils = distributed.rank() == 1
    batches, moved, total = trainer._batches(), [], SetCriterion.total
    for step in range(3):
        images, targets = next(batches)
        if spoils and step == 0:  # in the first target that has an object
            next(target for target in targets if len(target.labels)).boxes[0, 0] = math.nan
        if spoils and step == 1:  # a loss that is not finite, with gradients that are
            SetCriterion.total = lambda self, losses: total(self, losses) + math.inf
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        trainer._take_step([(images, targets)])
        SetCriterion.total = total
        trainer.step += 1
        moved.append(any(not torch.equal(before[name], now) for name, now in trainer.model.state_dict().items()))
    distributed.wait_for_all()
    return {"moved": moved, "reasons": [line["reason"] for line in trainer.run.metrics("nonfinite")]}


if __name__ == "__main__":
    with distributed.process_group(rank_timeout=60.0, on_fatal=print):
        torch.save(take_steps(Path(sys.argv[1])), Path(sys.argv[2]) / f"rank_{distributed.rank()}.pt")
