"""The flight recorder: what becomes of a training step whose costs, losses or gradients were not finite.

It is written down, skipped, and counted; nothing is ever replaced by a finite number. `solq-lab replay` repeats it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from solq_lab import distributed
from solq_lab.data.coco import CocoDataset
from solq_lab.environment import describe_software
from solq_lab.errors import ExplainedError
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.runs import Run
from solq_lab.training.findings import describe_gradients, describe_pass, explain, name_first, nonfinite_tensors
from solq_lab.training.losses import SetCriterion
from solq_lab.training.record import save_record, share_of
from solq_lab.training.step import StepResult

log = logging.getLogger(__name__)


class NonFiniteError(ExplainedError):
    """Too many steps in a row were not finite; the message names the step, the images, the reason and the record."""


class FlightRecorder:
    """Writes steps that were not finite to the run's folder `flight`, and counts them.

    Args:
        run: the run.
        model: the network.
        criterion: of the training.
        optimizer: of the training.
        dataset: the training images.
        device: of the network.

    Attributes:
        in_a_row: how many steps were not finite since the last one that was; the trainer resets it.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        criterion: SetCriterion,
        optimizer: torch.optim.Optimizer,
        dataset: CocoDataset,
        device: torch.device,
    ) -> None:
        self._run, self._model, self._criterion, self._optimizer = run, model, criterion, optimizer
        self._dataset, self._device = dataset, device
        self.in_a_row = 0

    def check_weights(self, number: int) -> None:
        """Keep weights that are not finite out of the checkpoints: the one before is worth more.

        Raises:
            NonFiniteError: the network's parameters are not finite after step `number`.
        """
        poisoned = nonfinite_tensors(self._model.named_parameters())  # the same in every process
        if poisoned:
            raise NonFiniteError(
                f"{name_first(poisoned)} is not finite after step {number}: no checkpoint is written, the one before "
                "stands. Lower optim.lr, or set train.autocast=none"
            )

    def record(self, result: StepResult, number: int, epoch: float) -> tuple[dict[str, Any], NonFiniteError | None]:
        """Write down step `number`, the first being 1, which was not finite.

        Returns:
            Its line for the metrics, and the error to raise where as many steps before it as `train.skip_nonfinite`
            allows were not finite either.
        """
        self.in_a_row += 1
        allowed = self._run.experiment.train.skip_nonfinite
        facts, problem = self._record(result, number, epoch)
        name = f"flight/step_{number:07d}"
        images = [image["id"] for share in facts["shares"] for p in share["passes"] for image in p["images"]]
        line = {"reason": facts["reason"], "image_ids": images, "record": None if problem else name}
        place = self._run.folder / name
        where = f"no record could be written ({problem})" if problem else f"record: {place}"
        message = f"step {number}: {facts['reason']}. Image ids of this step: {images}; {where}"
        if self.in_a_row <= allowed:
            if distributed.is_main():
                log.warning("%s; skipped, %d of at most %d in a row", message, self.in_a_row, allowed)
            return line, None
        cure = "" if problem else f"Repeat it with `solq-lab replay {place}`. "
        return line, NonFiniteError(
            f"{message}. The weights were left as they were before it; steps in a row that were not finite: "
            f"{self.in_a_row}, train.skip_nonfinite={allowed}. {cure}Raise train.skip_nonfinite to pass over it and go "
            "on from the last checkpoint, or train anew with a lower optim.lr or train.autocast=none"
        )

    def _record(self, result: StepResult, number: int, epoch: float) -> tuple[dict[str, Any], str | None]:
        """The facts about the step, and why they could not be written, if so; the same in every process."""
        experiment, model = self._run.experiment, self._model
        matcher, codec = self._criterion.matcher, self._criterion.codec
        costs = [matcher.costs(done.predictions, done.targets) for done in result.micro_batches]
        name_of = self._dataset.file_name
        passes = [describe_pass(done, terms, name_of) for done, terms in zip(result.micro_batches, costs, strict=True)]
        shares = distributed.gather_objects({"rank": distributed.rank(), "passes": passes})
        gradients = describe_gradients(model, result.norm)
        poisoned = nonfinite_tensors([*model.named_parameters(), *model.named_buffers()])
        facts = {
            "step": number,
            "epoch": epoch,
            "reason": explain(shares, gradients, poisoned),
            "in_a_row": self.in_a_row,
            "learning_rates": {group["name"]: group["lr"] for group in self._optimizer.param_groups},
            "autocast": experiment.train.autocast,
            "scale": result.scale,
            "num_boxes": result.num_boxes,
            "weights_nonfinite": poisoned,
            "gradients": gradients,
            "shares": shares,
            "environment": describe_environment(self._device),
        }
        problem = save_record(
            self._run.folder / "flight" / f"step_{number:07d}",
            facts,
            share_of(result.micro_batches, costs, result.generators),
            model.state_dict(),
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
