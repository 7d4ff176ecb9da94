"""The training of one run: the loop, its checkpoints, and resuming from them. Paper: section 4.2."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from solq_lab import distributed
from solq_lab.bars import progress_bar
from solq_lab.build import build_codec, build_dataset, build_model, build_stream
from solq_lab.data.loader import SUBSTITUTES, BatchLoader
from solq_lab.data.orientation import check_orientation
from solq_lab.data_folder import prepare_data
from solq_lab.errors import ExplainedError
from solq_lab.evaluation.evaluator import evaluate_model, evaluate_run
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.files import flush_to_disk
from solq_lab.fitting import check_fitted_data
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.onednn import use_onednn
from solq_lab.models.weights import save_weights
from solq_lab.precision import TRAINING, check_autocast
from solq_lab.runs import Run, State
from solq_lab.training import random as rng
from solq_lab.training.best import BestWeights
from solq_lab.training.checkpoint import Checkpoint, load_newest_checkpoint, save_checkpoint
from solq_lab.training.compilation import as_written, compile_layers
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.faults import explain_fault, write_last_status
from solq_lab.training.finetune import TrainedModel, open_trained
from solq_lab.training.losses import build_criterion
from solq_lab.training.metrics import MetricLogger
from solq_lab.training.nonfinite import NonFiniteRecorder
from solq_lab.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    set_learning_rate,
)
from solq_lab.training.preparation import describe_training, log_start, measure_start
from solq_lab.training.signals import Stopped, StopRequest, interrupted_by
from solq_lab.training.step import (
    Batch,
    StepResult,
    boxes_per_process,
    check_finite,
    check_gpus,
    forward_backward,
    micro_batches_per_process,
    no_sync,
    share_gradients,
)
from solq_lab.training.tracking import check_tracking, open_tensorboard

log = logging.getLogger(__name__)


def train_run(run: Run, stop: StopRequest | None = None) -> State:
    """Train a run to its end, or until a signal stops it; resume from its newest checkpoint.

    Signals are handled from here on, or by `stop` already.

    Returns:
        "finished" or "preempted"; the same is written to the run's status.

    Raises:
        ConfigError, DataError, RunError, WeightMismatch: the experiment cannot be trained as it stands.
        NonFiniteError: the training diverged.
        SaveError, DiskFull, OutOfMemory: disk or memory are exhausted.
        KeyboardInterrupt: a second Ctrl-C, before the first one's checkpoint was written.
    """
    if stop is None:
        with StopRequest() as stop:
            return train_run(run, stop)
    check_gpus()
    on_fatal = partial(write_last_status, run, "failed")
    group = distributed.process_group(rank_timeout=run.experiment.train.rank_timeout, on_fatal=on_fatal)
    try:
        with group, run.locked() if distributed.is_main() else contextlib.nullcontext():
            return _train_locked(run, stop)
    except Stopped as signal:  # before the first step; the other processes received the signal as well
        log.info("%s: stopped before the first step of this process; re-running resumes", signal)
        return "preempted"


def _train_locked(run: Run, stop: StopRequest) -> State:
    """Train, and write how it ended into the run's status."""
    if run.status()["state"] == "finished":
        log.info("%s is finished; remove the folder to train it anew", run.folder)
        return "finished"

    try:
        with stop.at_once():
            trainer = Trainer(run)
        return trainer.train(stop)
    except (Stopped, KeyboardInterrupt) as end:
        if distributed.is_main():
            write_last_status(run, "preempted", str(end) or "a second Ctrl-C, without saving")
        raise
    except Exception as error:
        cause = explain_fault(distributed.diagnose(error), run)
        if distributed.is_reporting_rank():
            exit_status = cause.exit_status if isinstance(cause, ExplainedError) else 1
            write_last_status(run, "failed", f"{type(cause).__name__}: {cause}", exit_status)
        raise cause from (None if cause is error else error)


class Trainer:
    """One process of a run's training. Every process builds its own; the main one (rank 0) writes."""

    def __init__(self, run: Run) -> None:
        """Build everything; load the newest checkpoint, or measure the start where there is none."""
        self.run, self.experiment, self.device = run, run.experiment, distributed.device()
        train = run.experiment.train
        self.accumulate = micro_batches_per_process(train)
        check_autocast(train.autocast, self.device, setting="train.autocast", allowed=TRAINING)
        check_tracking(train)
        torch.set_num_threads(train.threads or torch.get_num_threads())
        rng.seed_generators(run.experiment.seed)

        checkpoint = load_newest_checkpoint(run.checkpoints)
        trained = self._prepare_files(resuming=checkpoint is not None)
        self._build_data(checkpoint)
        self._build_model(checkpoint, trained)
        self._build_optimizer()
        self.recorder = NonFiniteRecorder(run, self.model, self.criterion, self.optimizer, self.train_set, self.device)

        if checkpoint is None:  # each process draws its own dropout
            rng.seed_generators(run.experiment.seed + distributed.rank())
        else:
            self._restore(checkpoint)

    def _prepare_files(self, *, resuming: bool) -> TrainedModel | None:
        """Check or create the files that a training reads, in the main process first; the model to start from."""
        trained = None
        if distributed.is_main():
            if self.experiment.train.finetune_from and not resuming:  # a wrong file raises before any work
                trained = open_trained(self.experiment)
            prepare_data(self.experiment)
            if not resuming:  # a resumed training keeps the codec tables of its checkpoint
                check_fitted_data(self.experiment)
        distributed.wait_for_all()
        return trained

    def _build_data(self, checkpoint: Checkpoint | None) -> None:
        """The codec, both splits, the order of the images, and the metrics that are counted in their epochs."""
        experiment, train = self.experiment, self.experiment.train
        self.codec = build_codec(experiment, tables=None if checkpoint is None else checkpoint.codec)
        self._codec_tables = {} if self.codec is None else self.codec.state_dict()  # a weights file holds them
        self.train_set = build_dataset(experiment, "train")
        self.val_set = build_dataset(experiment, "val", classes=self.train_set.classes)
        if experiment.data.orientation is None and checkpoint is None and distributed.is_main():
            check_orientation([self.train_set, self.val_set])

        self.step = 0 if checkpoint is None else checkpoint.step  # optimiser steps done
        steps_per_epoch = len(self.train_set) // train.batch_size
        self.total_steps = train.steps or train.epochs * steps_per_epoch
        self.evaluate_every = train.evaluate_every * steps_per_epoch
        self.stream = build_stream(
            experiment, self.train_set, total_steps=self.total_steps, start_step=self.step, accumulate=self.accumulate
        )

        tensorboard = open_tensorboard(self.run, step=self.step) if distributed.is_main() else None
        counts = {"total_steps": self.total_steps, "steps_per_epoch": steps_per_epoch}
        self.metrics, self.best = MetricLogger(self.run, tensorboard=tensorboard, **counts), BestWeights(self.run)

    def _build_model(self, checkpoint: Checkpoint | None, trained: TrainedModel | None) -> None:
        """The network with its first weights, arranged for this device, and shared by the processes."""
        train = self.experiment.train
        pretrained = checkpoint is None and not train.finetune_from
        self.model = build_model(self.experiment, len(self.train_set.classes), pretrained=pretrained)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.weights)
        elif distributed.is_main():  # DDP sends weights and statistics to the other processes
            line = measure_start(self.run, self.model, self.codec, self.train_set, trained)
            counts = {"total_steps": self.total_steps, "steps_per_epoch": self.metrics.steps_per_epoch}
            self.run.metrics_file.unlink(missing_ok=True)
            self.metrics.write_line(line | counts)

        # Moved before it is wrapped or compiled: DDP and the compiler look at the weights as they are then.
        self.model.to(self.device)
        if train.gradient_checkpointing:
            checkpoint_activations(self.model)
        if not (train.compile and compile_layers(self.model, self.device)):
            use_onednn(self.model, training=True)
        self.parallel = share_gradients(self.model, self.device, micro_batches=self.accumulate)

    def _build_optimizer(self) -> None:
        """Losses, optimiser, averaged weights, and what else changes the weights in a step."""
        train = self.experiment.train
        self.criterion = build_criterion(self.experiment, self.codec, self.model).to(self.device)
        self.optimizer = build_optimizer(self.model, self.experiment.optim)
        self.average = AveragedWeights(self.model, train.ema) if train.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=train.autocast == "fp16")
        # Lists, because walking through the modules takes longer than the norm of a small network's gradients. A
        # skipped step restores the buffers, statistics of batch norms.
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._buffers = list(self.model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    def train(self, stop: StopRequest) -> State:
        """Train to the end and evaluate, or until `stop` has received a signal and the checkpoint is written."""
        if distributed.is_main():
            self.run.record_environment(describe_training(self.train_set, self.codec, self.device))
            self.run.write_status("training", step=self.step)
            counts = {"images": len(self.train_set), "step": self.step, "total_steps": self.total_steps}
            log_start(self.run, self.model, self.optimizer, **counts)
        try:
            finished = self.train_steps(stop)
            return self._finish(stop) if finished else self._preempt(stop)
        except (Stopped, EvaluationStopped):  # what was being evaluated is saved, and will be evaluated anew
            return self._preempt(stop)

    def train_steps(self, stop: StopRequest) -> bool:
        """The training loop: one optimiser step after the other, with metrics, checkpoints and evaluations in between.

        Returns:
            False where a stop signal ended it before the last step.
        """
        optim, autocast = self.experiment.optim, self.experiment.train.autocast
        loader = self._load_batches()
        for step in self._remaining_steps():
            if self._evaluation_is_due():
                self._evaluate(stop)
            if self.best.should_stop(self.experiment.train.stop_after):
                break
            started = time.perf_counter()
            batches = self._next_batches(loader, stop)
            if batches is None:
                return False
            set_learning_rate(self.optimizer, learning_rate_factor(optim, self.step, self.total_steps))

            # Forward and backward; DDP averages the gradients in the last micro-batch only.
            generators, scale = rng.generator_states(self.device), self.scaler.get_scale()
            torch._foreach_copy_(self._buffers_before, self._buffers)
            num_boxes = boxes_per_process(batches, self.device)
            micro_batches = []
            self.optimizer.zero_grad()
            for number, batch in enumerate(batches, start=1):
                with no_sync(self.parallel, active=number < len(batches)):
                    done = forward_backward(self.parallel, self.criterion, self.scaler, batch, num_boxes, autocast)
                micro_batches.append(done)

            # Unscale, clip, step, average; or skip the step, alike in all processes.
            self.scaler.unscale_(self.optimizer)
            norm = gradient_norm(self._parameters)
            kind = check_finite(micro_batches, norm, self.scaler)
            if kind == "finite":
                clip_gradients(self._parameters, optim.clip_norm, norm)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                if self.average is not None:
                    self.average.update(self.model)
                self.recorder.in_a_row = 0
                self.metrics.add_step(micro_batches, norm)
            else:  # batch norms have taken in what the network saw
                torch._foreach_copy_(self._buffers, self._buffers_before)
                self._skip_step(step, StepResult(kind, micro_batches, num_boxes, norm, scale, generators))

            # Log and save.
            self.step = step
            distributed.report_step(step)
            self.metrics.end_step(step, time.perf_counter() - started, self.optimizer.param_groups)
            if step % self.experiment.train.save_every == 0 or step == self.total_steps or self._evaluation_is_due():
                self._save()
        return True

    def _next_batches(self, loader: Iterator[Batch], stop: StopRequest) -> list[Batch] | None:
        """The batches of one step; None in all processes after one received a stop signal, even while waiting."""
        batches = None
        with contextlib.suppress(Stopped), stop.at_once():
            batches = [next(loader) for _ in range(self.accumulate)]
        return None if distributed.any_process(stop.received is not None, self.device) else batches

    def _skip_step(self, step: int, result: StepResult) -> None:
        """Log and record why the step was skipped; raise NonFiniteError after too many of them in a row."""
        if result.kind == "overflow":
            self.metrics.skip_step(step, "overflow", {"scale": result.scale})
            log.info("step %d: gradients of losses times %g overflow in fp16; skipped", step, result.scale)
            return
        line, error = self.recorder.record(result, step, self.metrics.epoch(step))
        self.metrics.skip_step(step, "nonfinite", line)
        if error is not None:
            raise error

    def _load_batches(self) -> Iterator[Batch]:
        """This process's batches, loaded in `stream`'s order."""
        with rng.random_state_kept(self.device):  # an iterator draws a seed for its workers
            return BatchLoader(
                self.train_set,
                self.stream,
                self.experiment.data.workers,
                substitutes=SUBSTITUTES if self.experiment.data.unreadable == "replace" else 0,
            )

    def _evaluation_is_due(self) -> bool:
        """Between two steps; the evaluation after the last one belongs to `_finish`."""
        if not self.evaluate_every or self.step == 0 or self.step % self.evaluate_every:
            return False
        return self.step < self.total_steps and not self.metrics.has_evaluation(self.step)

    def _evaluate(self, stop: StopRequest) -> None:
        """Evaluate the model, averaged if it is; Stopped or EvaluationStopped on a signal leave all as before."""
        distributed.copy_from_main(self.model.buffers())  # timm's batch norms saw different images in their last step
        averaged = contextlib.nullcontext() if self.average is None else self.average.inside(self.model)
        with averaged, as_written(), rng.random_state_kept(self.device), interrupted_by(stop):
            _, evaluation = evaluate_model(
                self.model,
                self.criterion.codec,
                self.val_set,
                self.experiment.evaluation,
                device=self.device,
                workers=self.experiment.data.workers,
                should_stop=lambda: stop.received is not None,
            )

        self.best.add(evaluation.metrics, self._write_weights)
        if distributed.is_main():
            self.metrics.write_evaluation(self.step, evaluation)
        distributed.wait_for_all()

    def _save(self) -> None:
        """Write a checkpoint; a trainer that restores it continues bit for bit."""
        self.recorder.check_weights(self.step)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "nonfinite_in_a_row": self.recorder.in_a_row,
            "journal": self.metrics.state_dict(),
            "random": distributed.gather_objects(rng.random_state(self.device)),
        }

        if distributed.is_main():
            if self.run.metrics_file.exists():  # not to lose lines that a resumed training would not write again
                flush_to_disk(self.run.metrics_file)
            checkpoint = Checkpoint(self.step, self.model.state_dict(), state, self._codec_tables)
            save_checkpoint(self.run.checkpoints, checkpoint, **self._metadata())
            self.run.write_status("training", step=self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore all but the weights and the step, which are in place already."""
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint.state["average"])
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.recorder.in_a_row = checkpoint.state["nonfinite_in_a_row"]
        self.metrics.load_state_dict(checkpoint.state["journal"], self.device)
        self.best.resume(checkpoint.step)
        rng.resume_random_states(checkpoint.state["random"], self.device, seed=self.experiment.seed)
        if distributed.is_main():
            self.run.rewind_metrics(self.step)

    def _preempt(self, stop: StopRequest) -> State:
        self._save()
        if distributed.is_main():
            reason = stop.received or "another process was stopped"
            log.info("%s: saved at step %d of %d; re-running resumes", reason, self.step, self.total_steps)
            self.run.write_status("preempted", step=self.step, message=reason)
        return "preempted"

    def _finish(self, stop: StopRequest) -> State:
        """Write the trained model, and evaluate what was written; a stop signal ends the evaluation."""
        if distributed.is_main():
            self._write_weights(self.run.weights)
        distributed.wait_for_all()
        with interrupted_by(stop):
            evaluation = evaluate_run(self.run, device=self.device, should_stop=lambda: stop.received is not None)
        if distributed.is_main():
            if not self.metrics.has_evaluation(self.step):
                self.best.add(evaluation.metrics, self._write_weights)
                self.metrics.write_evaluation(self.step, evaluation)
            self.run.write_status("finished", step=self.step)
        return "finished"

    def _write_weights(self, path: Path) -> None:
        """Write the model, averaged if it is, with all that is needed to use it."""
        weights = self.model.state_dict() if self.average is None else self.average.state_dict()
        save_weights(path, weights, codec=self._codec_tables, **self._metadata())

    def _metadata(self) -> dict[str, str]:
        return {"experiment": self.experiment.to_yaml(), "classes": self.train_set.classes.to_json()}

    def _remaining_steps(self) -> Iterable[int]:
        """Numbers of the steps that are left, the first of all being 1; a progress bar in a terminal."""
        hidden = not (distributed.is_main() and sys.stderr.isatty())
        whole = {"total": self.total_steps, "initial": self.step, "leave": True, "disable": hidden}
        steps = range(self.step + 1, self.total_steps + 1)
        return progress_bar(steps, desc=self.run.name, unit="step", **whole)
