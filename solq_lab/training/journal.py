"""What a training writes while it runs: lines of metrics.jsonl, log lines, and once how long it will take."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from solq_lab import distributed
from solq_lab.evaluation.summary import Evaluation
from solq_lab.progress import describe_duration
from solq_lab.runs import Run
from solq_lab.training.tracking import TensorBoard

log = logging.getLogger(__name__)

WARM_STEPS, TIMED_STEPS = 10, 30  # the speed between these two of a process's steps gives the expected duration
SECONDS_BETWEEN_LINES = 10.0  # of the log; metrics.jsonl has every line


class Journal:
    """Collects the numbers of optimiser steps, and writes their means every `log_every` steps.

    Every process collects; the main one writes, after summing over all of them.

    Attributes:
        seconds: spent on optimiser steps since the training's first start, data loading included.
    """

    def __init__(
        self, run: Run, *, total_steps: int, steps_per_epoch: int, tensorboard: TensorBoard | None = None
    ) -> None:
        self._run, self._train, self._tensorboard = run, run.experiment.train, tensorboard
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch
        self.seconds = 0.0
        self._sums: dict[str, Tensor] = {}  # since the last line
        self._steps, self._skipped, self._since = 0, 0, 0.0
        self._steps_here, self._warm = 0, 0.0  # of this process, for the expected duration
        self._told = 0.0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add numbers of a step; those of one name are summed over the step and averaged over steps and processes."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach()

    def skip_step(self, step: int, kind: str, facts: dict[str, Any]) -> None:
        """Write why a step was not taken: it has no numbers to add, and no share in the means.

        Args:
            step: its number, the first being 1.
            kind: of the line.
            facts: plain values.
        """
        self._skipped += 1
        if distributed.is_main():
            self.write_line({"kind": kind, "step": step, "epoch": self.epoch(step), **facts})

    def write_line(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and its numbers to TensorBoard where that is asked for; main process only."""
        self._run.append_metrics(line)
        if self._tensorboard is not None:
            self._tensorboard.write(line)

    def end_step(self, step: int, seconds: float, learning_rates: dict[str, float]) -> None:
        """Count a step; write a line where one is due.

        Args:
            step: optimiser steps done, this one included.
            seconds: it took.
            learning_rates: of every group of parameters, the main one first.
        """
        self.seconds += seconds
        self._steps += 1
        self._steps_here += 1
        if self._steps_here == WARM_STEPS:
            self._warm = self.seconds
        if self._steps_here == TIMED_STEPS:
            self._tell_duration(step)
        if step % self._train.log_every == 0 or step == self._total_steps:
            self._write_train_line(step, learning_rates)

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Write an evaluation's line."""
        metrics = evaluation.to_dict()["metrics"]
        line = {"kind": "evaluation", "step": step, "epoch": self.epoch(step), "metrics": metrics}
        self.write_line(line)
        log.info("step %d of %d, evaluation\n%s", step, self._total_steps, evaluation.table())

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation after this step has been written."""
        return any(line["step"] == step for line in self._run.metrics("evaluation"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to write the same lines; every process has to ask for it."""
        counts, sums = {"steps": self._steps, "skipped": self._skipped}, self._sums
        if sums and distributed.world_size() > 1:  # one journal is kept, and all go on from it: from their mean
            means = distributed.sum_over_processes(torch.stack(list(sums.values()))) / distributed.world_size()
            sums = dict(zip(sums, means, strict=True))
        return {"seconds": self.seconds, "sums": sums, "since": self._since, **counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` gave."""
        self.seconds, self._since = state["seconds"], state["since"]
        self._steps, self._skipped = state["steps"], state["skipped"]
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}

    def _write_train_line(self, step: int, learning_rates: dict[str, float]) -> None:
        taken, speed = self._steps - self._skipped, self._steps * self._train.batch_size / (self.seconds - self._since)
        if taken == 0:  # nothing to average; every step has a line of its own that says why
            self._steps, self._skipped, self._since = 0, 0, self.seconds
            return
        shares = distributed.sum_over_processes(torch.stack(list(self._sums.values())))
        means = dict(zip(self._sums, (shares / (taken * distributed.world_size())).tolist(), strict=True))
        line = {
            "kind": "train",
            "step": step,
            "epoch": self.epoch(step),
            "total": means.pop("total"),
            "grad_norm": means.pop("grad_norm"),
            "losses": means,
            "lr": next(iter(learning_rates.values())),
            "learning_rates": learning_rates,
            "images_per_second": speed,
            "seconds": self.seconds,
        }
        self._sums = {}
        self._steps, self._skipped, self._since = 0, 0, self.seconds
        if not distributed.is_main():
            return
        self.write_line(line)
        if time.monotonic() - self._told > SECONDS_BETWEEN_LINES or step == self._total_steps:
            self._told = time.monotonic()
            last_layer = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if "/" not in name)
            progress = f"step {step} of {self._total_steps}, epoch {line['epoch']:.2f}"
            log.info("%s: loss %.3f (%s), %.1f images/s", progress, line["total"], last_layer, speed)

    def _tell_duration(self, step: int) -> None:
        per_step = (self.seconds - self._warm) / (TIMED_STEPS - WARM_STEPS)
        left = describe_duration(per_step * (self._total_steps - step))
        if distributed.is_main():
            speed = self._train.batch_size / per_step
            log.info("%.1f images/s; the remaining %d steps will take %s", speed, self._total_steps - step, left)

    def epoch(self, step: int) -> float:
        """Passes through the training images after so many steps."""
        return round(step / self._steps_per_epoch, 4)
