"""The flight recorder: what becomes of a training step whose costs, losses or gradients were not finite.

It is written down, skipped, and counted; nothing is ever replaced by a finite number. `solq-lab replay` repeats it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from solq_lab import distributed
from solq_lab.data.coco import CocoDataset
from solq_lab.environment import describe_software
from solq_lab.errors import ExplainedError
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.runs import Run
from solq_lab.training.findings import describe_gradients, describe_pass, explain, name_first, nonfinite_tensors
from solq_lab.training.journal import Journal
from solq_lab.training.record import save_record, share_of
from solq_lab.training.step import Outcome, TrainingStep

log = logging.getLogger(__name__)


class NonFiniteError(ExplainedError):
    """Too many steps in a row were not finite; the message names the step, the images, the reason and the record."""


class FlightRecorder:
    """Follows a training's steps: numbers go to the journal, steps that were not finite to the run's folder `flight`.

    Args:
        run: the run.
        journal: takes the numbers of steps, and a line for every step that was not taken.
        training_step: what took the steps.
        dataset: the training images.

    Attributes:
        in_a_row: how many steps were not finite since the last one that was taken.
    """

    def __init__(self, run: Run, journal: Journal, training_step: TrainingStep, dataset: CocoDataset) -> None:
        self._run, self._journal, self._step, self._dataset = run, journal, training_step, dataset
        self.in_a_row = 0

    def follow(self, outcome: Outcome, number: int) -> None:
        """Journal what became of step `number`, the first being 1.

        Raises:
            NonFiniteError: it was not finite, and so were as many before it as `train.skip_nonfinite` allows.
        """
        if outcome.kind == "taken":
            self.in_a_row = 0
            for done in outcome.passes:
                self._journal.add(done.losses)
            self._journal.add({"grad_norm": outcome.norm})
        elif outcome.kind == "overflow":
            self._journal.skip_step(number, "overflow", {"scale": outcome.scale})
            log.info("step %d: gradients of losses times %g overflow in fp16; skipped", number, outcome.scale)
        else:
            self._skip_or_stop(outcome, number)

    def check_weights(self, number: int) -> None:
        """Keep weights that are not finite out of the checkpoints: the one before is worth more.

        Raises:
            NonFiniteError: the network's parameters are not finite after step `number`.
        """
        poisoned = nonfinite_tensors(self._step.model.named_parameters())  # the same in every process
        if poisoned:
            raise NonFiniteError(
                f"{name_first(poisoned)} is not finite after step {number}: no checkpoint is written, the one before "
                "stands. Lower optim.lr, or set train.autocast=none"
            )

    def _skip_or_stop(self, outcome: Outcome, number: int) -> None:
        self.in_a_row += 1
        allowed = self._run.experiment.train.skip_nonfinite
        facts, problem = self._record(outcome, number)
        name = f"flight/step_{number:07d}"
        images = [image["id"] for share in facts["shares"] for p in share["passes"] for image in p["images"]]
        line = {"reason": facts["reason"], "image_ids": images, "record": None if problem else name}
        self._journal.skip_step(number, "nonfinite", line)
        place = self._run.folder / name
        where = f"no record could be written ({problem})" if problem else f"record: {place}"
        message = f"step {number}: {facts['reason']}. Image ids of this step: {images}; {where}"
        if self.in_a_row <= allowed:
            if distributed.is_main():
                log.warning("%s; skipped, %d of at most %d in a row", message, self.in_a_row, allowed)
            return
        cure = "" if problem else f"Repeat it with `solq-lab replay {place}`. "
        raise NonFiniteError(
            f"{message}. The weights were left as they were before it; steps in a row that were not finite: "
            f"{self.in_a_row}, train.skip_nonfinite={allowed}. {cure}Raise train.skip_nonfinite to pass over it and go "
            "on from the last checkpoint, or train anew with a lower optim.lr or train.autocast=none"
        )

    def _record(self, outcome: Outcome, number: int) -> tuple[dict[str, Any], str | None]:
        """The facts about the step, and why they could not be written, if so; the same in every process."""
        step, experiment = self._step, self._run.experiment
        matcher, codec = step.criterion.matcher, step.criterion.codec
        costs = [matcher.costs(done.predictions, done.targets) for done in outcome.passes]
        name_of = self._dataset.file_name
        passes = [describe_pass(done, terms, name_of) for done, terms in zip(outcome.passes, costs, strict=True)]
        shares = distributed.gather_objects({"rank": distributed.rank(), "passes": passes})
        gradients = describe_gradients(step.model, outcome.norm)
        poisoned = nonfinite_tensors([*step.model.named_parameters(), *step.model.named_buffers()])
        facts = {
            "step": number,
            "epoch": self._journal.epoch(number),
            "reason": explain(shares, gradients, poisoned),
            "in_a_row": self.in_a_row,
            "learning_rates": {group["name"]: group["lr"] for group in step.optimizer.param_groups},
            "autocast": step.autocast,
            "scale": outcome.scale,
            "num_boxes": outcome.num_boxes,
            "weights_nonfinite": poisoned,
            "gradients": gradients,
            "shares": shares,
            "environment": describe_environment(step.device),
        }
        problem = save_record(
            self._run.folder / "flight" / f"step_{number:07d}",
            facts,
            share_of(outcome.passes, costs, outcome.generators),
            step.model.state_dict(),
            experiment=experiment.to_yaml(),
            classes=self._dataset.classes.to_json(),
            codec={} if codec is None else codec.state_dict(),
        )
        return facts, problem


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What decides whether a step gives the same bits again: device, threads, operator and versions."""
    cpu = f"{torch.backends.cpu.get_cpu_capability()} CPU"
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "operator": implementation_for(device.type),
        "versions": describe_software()["versions"],
    }
