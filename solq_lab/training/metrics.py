"""The metrics of a training: lines of metrics.jsonl and of the log, and once the expected duration."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from solq_lab import distributed
from solq_lab.evaluation.summary import Evaluation
from solq_lab.progress import describe_duration
from solq_lab.runs import Run
from solq_lab.training.step import MicroBatch
from solq_lab.training.tracking import TensorBoard

log = logging.getLogger(__name__)

WARM_STEPS, TIMED_STEPS = 10, 30  # the expected duration follows from the speed between these steps of a process
SECONDS_BETWEEN_LINES = 10.0  # of the log; metrics.jsonl has every line


class MetricLogger:
    """Means of losses and gradient norm over every `log_every` optimiser steps, in metrics.jsonl and the log.

    Every process collects its own; the main one writes the means over all of them.
    """

    def __init__(
        self, run: Run, *, total_steps: int, steps_per_epoch: int, tensorboard: TensorBoard | None = None
    ) -> None:
        self._run, self._train, self._tensorboard = run, run.experiment.train, tensorboard
        self._total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.seconds = 0.0  # spent on optimiser steps since the training's first start, data loading included
        self._sums: dict[str, Tensor] = {}  # since the last line
        self._steps, self._skipped, self._since = 0, 0, 0.0
        self._steps_here, self._warm = 0, 0.0  # of this process, for the expected duration
        self._logged_at = -math.inf

    def add_step(self, micro_batches: Sequence[MicroBatch], norm: Tensor) -> None:
        """Add the losses and the gradient norm of a step; losses are summed over its micro-batches."""
        for values in (*(micro_batch.losses for micro_batch in micro_batches), {"grad_norm": norm}):
            for name, value in values.items():
                self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach()

    def skip_step(self, step: int, kind: str, facts: dict[str, Any]) -> None:
        """Write a line about a step, the first being 1, that was skipped; it is left out of the means."""
        self._skipped += 1
        if distributed.is_main():
            self.write_line({"kind": kind, "step": step, "epoch": self.epoch(step), **facts})

    def write_line(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and to TensorBoard if that is on; main process only."""
        self._run.append_metrics(line)
        if self._tensorboard is not None:
            self._tensorboard.write(line)

    def end_step(self, step: int, seconds: float, groups: Sequence[Mapping[str, Any]]) -> None:
        """Count a step, and write a line every `log_every` steps.

        Args:
            step: optimiser steps done, this one included.
            seconds: it took.
            groups: of parameters, the main one first, with their "name" and "lr".
        """
        self.seconds += seconds
        self._steps += 1
        self._steps_here += 1
        if self._steps_here == WARM_STEPS:
            self._warm = self.seconds
        if self._steps_here == TIMED_STEPS:
            per_step, left = (self.seconds - self._warm) / (TIMED_STEPS - WARM_STEPS), self._total_steps - step
            if distributed.is_main():
                speed, duration = self._train.batch_size / per_step, describe_duration(per_step * left)
                log.info("%.1f images/s; the remaining %d steps will take %s", speed, left, duration)
        if step % self._train.log_every == 0 or step == self._total_steps:
            self._write_train_line(step, {group["name"]: group["lr"] for group in groups})

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Append an evaluation's line, and log its table."""
        metrics = evaluation.to_dict()["metrics"]
        line = {"kind": "evaluation", "step": step, "epoch": self.epoch(step), "metrics": metrics}
        self.write_line(line)
        log.info("step %d of %d, evaluation\n%s", step, self._total_steps, evaluation.table())

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl has the evaluation after this step."""
        return any(line["step"] == step for line in self._run.metrics("evaluation"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to write the same lines; a collective call, of all processes."""
        counts, sums = {"steps": self._steps, "skipped": self._skipped}, self._sums
        if sums and distributed.world_size() > 1:  # rank 0 saves for all: every process resumes from the mean
            means = distributed.sum_over_processes(torch.stack(list(sums.values()))) / distributed.world_size()
            sums = dict(zip(sums, means, strict=True))
        return {"seconds": self.seconds, "sums": sums, "since": self._since, **counts}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned."""
        self.seconds, self._since = state["seconds"], state["since"]
        self._steps, self._skipped = state["steps"], state["skipped"]
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}

    def _write_train_line(self, step: int, learning_rates: dict[str, float]) -> None:
        """Average over the steps since the last line and over the processes, and start anew."""
        sums, taken = self._sums, self._steps - self._skipped
        speed = self._steps * self._train.batch_size / (self.seconds - self._since)
        self._sums, self._steps, self._skipped, self._since = {}, 0, 0, self.seconds
        if taken == 0:  # every step was skipped and has a line of its own
            return
        total_sums = distributed.sum_over_processes(torch.stack(list(sums.values())))
        means = dict(zip(sums, (total_sums / (taken * distributed.world_size())).tolist(), strict=True))
        if not distributed.is_main():
            return

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
        self.write_line(line)

        # A person reads the log: one line in ten seconds is enough.
        if time.monotonic() - self._logged_at > SECONDS_BETWEEN_LINES or step == self._total_steps:
            self._logged_at = time.monotonic()
            last_layer = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if "/" not in name)
            progress = f"step {step} of {self._total_steps}, epoch {line['epoch']:.2f}"
            log.info("%s: loss %.3f (%s), %.1f images/s", progress, line["total"], last_layer, speed)

    def epoch(self, step: int) -> float:
        """Passes through the training images after so many steps."""
        return round(step / self.steps_per_epoch, 4)
