"""Three steps, two of them spoilt by process 1 alone, for `in_process_group`."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from training_runs import before_each_step

from solq_lab import distributed
from solq_lab.runs import load_run
from solq_lab.training.losses import SetCriterion
from solq_lab.training.signals import StopRequest
from solq_lab.training.step import Batch
from solq_lab.training.trainer import Trainer


def take_steps(run_folder: Path, output: Path) -> None:
    """Into rank_<n>.pt: whether each step moved weights or batch norms, and the reasons in the run's metrics."""
    trainer = Trainer(load_run(run_folder))
    spoils = distributed.rank() == 1
    states, total = [], SetCriterion.total

    def copy_state() -> None:
        states.append([value.clone() for value in trainer.model.state_dict().values()])

    def spoil(trainer: Trainer, batches: list[Batch]) -> None:
        copy_state()
        (_, targets), *_ = batches
        if spoils and trainer.step == 0:  # in the first target that has an object
            next(target for target in targets if len(target.labels)).boxes[0, 0] = math.nan
        # A loss that is not finite, with gradients that are.
        infinite = spoils and trainer.step == 1
        SetCriterion.total = (lambda self, losses: total(self, losses) + math.inf) if infinite else total

    before_each_step(pytest.MonkeyPatch(), spoil)
    trainer.total_steps = 3
    trainer.train_steps(StopRequest())
    copy_state()
    moved = [not all(map(torch.equal, before, after)) for before, after in pairwise(states)]
    distributed.wait_for_all()
    reasons = [line["reason"] for line in trainer.run.metrics("nonfinite")]
    torch.save({"moved": moved, "reasons": reasons}, output / f"rank_{distributed.rank()}.pt")
