"""The training of one run: the loop, and how it goes on after an interruption. Paper: section 4.2."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from solq_lab import distributed
from solq_lab.build import build_codec, build_dataset, build_model
from solq_lab.codecs.base import describe_codec
from solq_lab.data.loader import SUBSTITUTES, BatchLoader
from solq_lab.data.order import BatchStream
from solq_lab.data_folder import prepare_data
from solq_lab.environment import describe_hardware, describe_software
from solq_lab.errors import ExplainedError
from solq_lab.evaluation.evaluator import evaluate_model, evaluate_run
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.files import flush_to_disk
from solq_lab.fitting import check_fitted_data
from solq_lab.models.onednn import use_onednn
from solq_lab.models.recomputing import recompute_activations
from solq_lab.models.weights import save_weights
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.precision import TRAINING, check_autocast
from solq_lab.runs import Run, RunError, State
from solq_lab.schema import TrainSection
from solq_lab.studies.ceiling import run_ceiling
from solq_lab.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from solq_lab.training.compilation import as_written, compile_layers
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.faults import explain_fault
from solq_lab.training.finetune import TrainedModel, open_trained, start_from_trained
from solq_lab.training.flight import FlightRecorder
from solq_lab.training.journal import Journal
from solq_lab.training.losses import vector_plateau
from solq_lab.training.optim import build_optimizer, learning_rate_factor, set_learning_rate, square_root_rule
from solq_lab.training.preparation import describe_dataset, sample_vectors, vector_statistics
from solq_lab.training.signals import Stopped, StopRequest
from solq_lab.training.step import Batch, TrainingStep, build_criterion
from solq_lab.training.tracking import check_tracking, open_tensorboard

log = logging.getLogger(__name__)


def train_run(run: Run, stop: StopRequest | None = None) -> State:
    """Train a run to its end, or until a signal stops it; go on where an earlier process stood.

    Args:
        run: the run.
        stop: listens for signals already; None: only from here on.

    Returns:
        "finished" or "preempted"; the same is written to the run's status.

    Raises:
        ConfigError, DataError, RunError, WeightMismatch: the experiment cannot be trained as it stands.
        NonFiniteError: the training diverged.
        SaveError, DiskFull, OutOfMemory: disk or memory are at their end.
        KeyboardInterrupt: a second Ctrl-C, before the first one's checkpoint was written.
    """
    if stop is None:
        with StopRequest() as stop:
            return train_run(run, stop)
    _check_gpus()
    on_fatal = partial(_write_last_status, run, "failed")
    group = distributed.process_group(rank_timeout=run.experiment.train.rank_timeout, on_fatal=on_fatal)
    try:
        with group, run.locked() if distributed.is_main() else contextlib.nullcontext():
            return _train_locked(run, stop)
    except Stopped as signal:  # before the first step; other processes are not waited for, they were asked as well
        log.info("%s: stopped before the first step of this process; the same command goes on", signal)
        return "preempted"


def _train_locked(run: Run, stop: StopRequest) -> State:
    """Train; however it ends, say so in the run's status."""
    if run.status()["state"] == "finished":
        log.info("%s is finished; remove the folder to train it anew", run.folder)
        return "finished"
    try:
        with stop.at_once():
            trainer = Trainer(run)
        return trainer.train(stop)
    except (Stopped, KeyboardInterrupt) as end:
        if distributed.is_main():
            _write_last_status(run, "preempted", str(end) or "a second Ctrl-C, without saving")
        raise
    except Exception as error:
        cause = explain_fault(distributed.diagnose(error), run)
        if distributed.is_reporting_rank():
            exit_status = cause.exit_status if isinstance(cause, ExplainedError) else 1
            _write_last_status(run, "failed", f"{type(cause).__name__}: {cause}", exit_status)
        raise cause from (None if cause is error else error)


def _write_last_status(run: Run, state: State, message: str, exit_status: int | None = None) -> None:
    """Say how the training ended, if the disk still takes it; the step is that of the last checkpoint."""
    try:
        run.write_status(state, step=run.status()["step"], message=message, exit_status=exit_status)
    except OSError as error:
        log.error("%s: %s could not be written: %s", run.folder, state, error)


class Trainer:
    """One process of a run's training. Every process builds its own; the main one (rank 0) writes."""

    def __init__(self, run: Run) -> None:
        """Build everything; load the newest checkpoint, or measure the start where there is none."""
        self.run, self.experiment, self.device = run, run.experiment, distributed.device()
        experiment, train = run.experiment, run.experiment.train
        self.passes = _passes_per_process(train)
        check_autocast(train.autocast, self.device, setting="train.autocast", allowed=TRAINING)
        check_tracking(train)
        torch.set_num_threads(train.threads or torch.get_num_threads())
        _seed_generators(experiment.seed)

        checkpoint = load_newest_checkpoint(run.checkpoints)
        trained = None  # the model to start from
        if distributed.is_main():
            if checkpoint is None and train.finetune_from:  # a wrong file is refused before any work
                trained = open_trained(experiment)
            prepare_data(experiment)
            if checkpoint is None:  # a resumed training keeps the tables that it began with
                check_fitted_data(experiment)
        distributed.wait_for_all()
        self.codec = build_codec(experiment, tables=None if checkpoint is None else checkpoint.codec)
        self.train_set = build_dataset(experiment, "train")
        self.val_set = build_dataset(experiment, "val", classes=self.train_set.classes)
        self.step = 0 if checkpoint is None else checkpoint.step  # optimiser steps done
        steps_per_epoch = len(self.train_set) // train.batch_size
        self.total_steps = train.steps or train.epochs * steps_per_epoch
        self.evaluate_every = train.evaluate_every * steps_per_epoch
        self.stream = self._order_images()
        tensorboard = open_tensorboard(run, step=self.step) if distributed.is_main() else None
        self.journal = Journal(
            run, total_steps=self.total_steps, steps_per_epoch=steps_per_epoch, tensorboard=tensorboard
        )

        pretrained = checkpoint is None and not train.finetune_from
        self.model = build_model(experiment, len(self.train_set.classes), pretrained=pretrained)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.weights)
        elif distributed.is_main():  # the other processes receive the statistics with the first weights
            self._measure_start(steps_per_epoch, trained)
        self.model.to(self.device)
        if train.gradient_checkpointing:
            recompute_activations(self.model)
        if not (train.compile and compile_layers(self.model, self.device)):
            use_onednn(self.model, training=True)
        self.parallel = _share_gradients(self.model, self.device, passes=self.passes)

        self.criterion = build_criterion(experiment, self.codec).to(self.device)
        self.optimizer = build_optimizer(self.model, experiment.optim)
        self.average = AveragedWeights(self.model, train.ema) if train.ema else None
        self.training_step = TrainingStep(
            self.model,
            self.parallel,
            self.criterion,
            self.optimizer,
            self.average,
            autocast=train.autocast,
            clip_norm=experiment.optim.clip_norm,
            device=self.device,
        )
        self.recorder = FlightRecorder(run, self.journal, self.training_step, self.train_set)
        if checkpoint is None:
            _seed_generators(experiment.seed + distributed.rank())
        else:
            self._restore(checkpoint)

    def train(self, stop: StopRequest) -> State:
        """Train to the end and evaluate, or until `stop` has received a signal and the checkpoint is written."""
        self._announce()
        try:
            finished = self._take_steps(stop)
            return self._finish(stop) if finished else self._preempt(stop)
        except (Stopped, EvaluationStopped):  # what was being evaluated is saved, and will be evaluated anew
            return self._preempt(stop)

    def _take_steps(self, stop: StopRequest) -> bool:
        """The loop: one optimiser step after the other, with metrics, checkpoints and evaluations in between.

        Returns:
            False where a stop signal ended it before the last step.
        """
        with self._progress() as progress:
            loader = self._batches()
            while self.step < self.total_steps:
                if self._evaluation_is_due():
                    self._evaluate(stop)
                started = time.perf_counter()
                batches = self._next_batches(loader, stop)
                if batches is None:
                    return False
                set_learning_rate(self.optimizer, self._learning_rate_factor())
                self._take_step(batches)
                self.step += 1
                distributed.report_step(self.step)
                rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
                self.journal.end_step(self.step, time.perf_counter() - started, rates)
                progress.update()
                if self._checkpoint_is_due():
                    self._save()
        return True

    def _next_batches(self, loader: Iterator[Batch], stop: StopRequest) -> list[Batch] | None:
        """The batches of one step; None where any process was asked to stop, on all processes alike.

        Whoever is asked while it waits for a slow disk waits no longer. The step has not begun, so nothing is lost.
        """
        batches = None
        with contextlib.suppress(Stopped), stop.at_once():
            batches = [next(loader) for _ in range(self.passes)]
        return None if distributed.any_process(stop.received is not None, self.device) else batches

    def _take_step(self, batches: list[Batch]) -> None:
        """One optimiser step; its numbers go to the journal, or a record of what was not finite to the run folder."""
        self.recorder.follow(self.training_step.take(batches), number=self.step + 1)

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.experiment.optim, self.step, self.total_steps)

    def _order_images(self) -> BatchStream:
        """Which images this process sees, from the next step to the last, `accumulate` batches per step."""
        train = self.experiment.train
        return BatchStream(
            len(self.train_set),
            train.batch_size,
            seed=self.experiment.seed,
            total_steps=self.total_steps,
            start_step=self.step,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            accumulate=self.passes,
            aspects=self.train_set.aspects if self.experiment.data.bucket_by_aspect else None,
        )

    def _batches(self) -> Iterator[Batch]:
        """This process's batches, loaded in `stream`'s order."""
        with _random_state_kept(self.device):  # an iterator draws a seed for its workers
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
        return self.step < self.total_steps and not self.journal.has_evaluation(self.step)

    def _checkpoint_is_due(self) -> bool:
        return (
            self.step % self.experiment.train.save_every == 0
            or self.step == self.total_steps
            or self._evaluation_is_due()
        )

    def _evaluate(self, stop: StopRequest) -> None:
        """Validate the model as it stands, with averaged weights where there are some.

        Raises:
            Stopped, EvaluationStopped: by a signal; model and random generators are as before.
        """
        distributed.copy_from_main(self.model.buffers())  # batch norms saw different images in their last step
        averaged = contextlib.nullcontext() if self.average is None else self.average.inside(self.model)
        with averaged, as_written(), _random_state_kept(self.device), _interrupted_by(stop):
            _, evaluation = evaluate_model(
                self.model,
                self.criterion.codec,
                self.val_set,
                self.experiment.evaluation,
                device=self.device,
                workers=self.experiment.data.workers,
                should_stop=lambda: stop.received is not None,
            )
        if distributed.is_main():
            self.journal.write_evaluation(self.step, evaluation)
        distributed.wait_for_all()

    def _save(self) -> None:
        """Write a checkpoint, from which `_restore` makes a trainer that goes on in the very same way."""
        self.recorder.check_weights(self.step)
        state = {
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.training_step.state_dict(),
            "nonfinite_in_a_row": self.recorder.in_a_row,
            "journal": self.journal.state_dict(),
            "random": distributed.gather_objects(random_state(self.device)),
        }
        if distributed.is_main():
            if self.run.metrics_file.exists():  # not to lose lines that a resumed training would not write again
                flush_to_disk(self.run.metrics_file)
            checkpoint = Checkpoint(self.step, self.model.state_dict(), state, self._codec_tables())
            save_checkpoint(self.run.checkpoints, checkpoint, **self._metadata())
            self.run.write_status("training", step=self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over all but the weights and the step, which are in place already."""
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(checkpoint.state["average"])
        self.training_step.load_state_dict(checkpoint.state["scaler"])
        self.recorder.in_a_row = checkpoint.state["nonfinite_in_a_row"]
        self.journal.load_state_dict(checkpoint.state["journal"], self.device)
        generators, processes = checkpoint.state["random"], distributed.world_size()
        if len(generators) == processes:
            restore_random_state(generators[distributed.rank()], self.device)
        else:  # the images and their changes are drawn per image, and stay what they would have been
            log.warning("%d processes go on where there were %d: dropout is drawn anew", processes, len(generators))
            _seed_generators(self.experiment.seed + distributed.rank())
        if distributed.is_main():
            self.run.rewind_metrics(self.step)

    def _preempt(self, stop: StopRequest) -> State:
        self._save()
        if distributed.is_main():
            reason = stop.received or "another process was stopped"
            log.info("%s: saved at step %d of %d; the same command goes on", reason, self.step, self.total_steps)
            self.run.write_status("preempted", step=self.step, message=reason)
        return "preempted"

    def _finish(self, stop: StopRequest) -> State:
        """Write the trained model, and evaluate what was written; a stop signal ends the evaluation."""
        if distributed.is_main():
            weights = self.model.state_dict() if self.average is None else self.average.state_dict()
            save_weights(self.run.weights, weights, codec=self._codec_tables(), **self._metadata())
        distributed.wait_for_all()
        with _interrupted_by(stop):
            evaluation = evaluate_run(self.run, device=self.device, should_stop=lambda: stop.received is not None)
        if distributed.is_main():
            if not self.journal.has_evaluation(self.step):
                self.journal.write_evaluation(self.step, evaluation)
            self.run.write_status("finished", step=self.step)
        return "finished"

    def _codec_tables(self) -> dict[str, Tensor]:
        """What a reader of the weights needs of the mask code besides the experiment."""
        return {} if self.codec is None else self.codec.state_dict()

    def _metadata(self) -> dict[str, str]:
        return {"experiment": self.experiment.to_yaml(), "classes": self.train_set.classes.to_json()}

    def _measure_start(self, steps_per_epoch: int, trained: TrainedModel | None) -> None:
        """What the training can be compared with: the vector loss of a constant answer, and the code's ceiling.

        The weights of `trained` are taken over in between: they need the vectors' units.
        """
        line: dict[str, Any] = {"kind": "start", "step": 0, "plateau": {}, "ceiling": {}}
        line |= {"total_steps": self.total_steps, "steps_per_epoch": steps_per_epoch}
        if self.codec is not None:
            vectors = sample_vectors(self.train_set, self.codec, seed=self.experiment.seed)
            if self.experiment.model.standardise_vectors:
                self.model.set_vector_statistics(*vector_statistics(vectors))
        if trained is not None:
            lines = start_from_trained(self.model, self.codec, self.train_set.classes.names, trained)
            self.run.record_environment({"finetuned": {"from": self.experiment.train.finetune_from, "lines": lines}})
        if self.codec is not None:
            ceiling = run_ceiling(self.run)
            line["plateau"] = {"vector": vector_plateau(vectors)}
            line["ceiling"] = ceiling.to_dict()["metrics"]
            log.info("the mask code alone allows, on the validation split:\n%s", ceiling.table())
            log.info("predicting the median vector gives a vector loss of %.3f", line["plateau"]["vector"])
        self.run.metrics_file.unlink(missing_ok=True)
        self.journal.write_line(line)

    def _announce(self) -> None:
        """Say what is trained, with what, and where it starts."""
        if not distributed.is_main():
            return
        train, optim, processes = self.experiment.train, self.experiment.optim, distributed.world_size()
        operator = implementation_for(self.device.type)
        facts = {
            "operator": operator,
            "device": _describe_device(self.device),
            "hardware": describe_hardware(),
            "processes": processes,
            "dataset": describe_dataset(self.train_set),
            "codec": describe_codec(self.codec),
        }
        self.run.record_environment(describe_software() | facts)
        self.run.write_status("training", step=self.step)
        weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        log.info("%s: %.2f M trained weights, images: %d", self.run.folder, weights / 1e6, len(self.train_set))
        log.info("on %s, threads: %d, deformable attention: %s", facts["device"], torch.get_num_threads(), operator)
        factors = f"{processes} x {self.passes} x {train.batch_size // (processes * self.passes)}"
        log.info("batch %d = %s (processes x passes x images)", train.batch_size, factors)
        rates = ", ".join(f"{group['name']} {group['base_lr']:.2g}" for group in self.optimizer.param_groups)
        log.info("learning rates: %s; schedule %s until step %d", rates, optim.schedule, self.total_steps)
        if train.batch_size != TrainSection().batch_size:
            scaled = " ".join(f"{name}={rate:.2g}" for name, rate in square_root_rule(train.batch_size).items())
            log.info("the paper's learning rates at this batch, by square-root scaling: %s", scaled)
        if self.step:
            log.info("going on from the checkpoint of step %d", self.step)

    def _progress(self) -> tqdm:
        """A bar on a terminal; elsewhere the log lines speak."""
        hidden = not (distributed.is_main() and sys.stderr.isatty())
        return tqdm(total=self.total_steps, initial=self.step, desc=self.run.name, unit="step", disable=hidden)


def _interrupted_by(stop: StopRequest) -> contextlib.AbstractContextManager[None]:
    """Within: a stop signal ends an evaluation at once where this process is alone; others agree between images."""
    return stop.at_once() if distributed.world_size() == 1 else contextlib.nullcontext()


def _share_gradients(model: nn.Module, device: torch.device, *, passes: int) -> nn.Module:
    """The model as DDP, which averages gradients over the processes; as it is where there is only one."""
    if distributed.world_size() == 1:
        return model
    # Every loss reaches its parameters on every rank, objects or not: none is unused, and the graph is always the same.
    # DDP makes use of that from its first pass on, and cannot where that one keeps its gradients to itself.
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, static_graph=passes == 1)


def _passes_per_process(train: TrainSection) -> int:
    """Backward passes per optimiser step of each process, so that a pass is as large as the experiment has it.

    A run may go on with another number of processes than it began with: its global batches and their sums stay the
    same, and fewer processes take more passes each.

    Raises:
        RunError: the passes do not divide by the processes that were started.
    """
    processes, passes = distributed.world_size(), train.gpus * train.accumulate
    if passes % processes:
        allowed = ", ".join(str(number) for number in range(1, passes + 1) if passes % number == 0)
        raise RunError(
            f"{processes} training processes were started, and train.gpus x train.accumulate = {train.gpus} x "
            f"{train.accumulate} passes per step do not divide by them; allowed are {allowed}. Start it with "
            f"python -m solq_lab.training.torchrun --nproc-per-node={train.gpus} RUN_FOLDER"
        )
    return passes // processes


def _check_gpus() -> None:
    """Before a process takes its GPU: raises RunError where this machine has fewer of them than processes."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if torch.cuda.is_available() and here > gpus:
        raise RunError(f"{here} processes were started on a machine with {gpus} GPUs; start at most {gpus} on it")


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - whoever draws from the global generators gets the same numbers in every run
    torch.manual_seed(seed)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Within the block the random generators may be used; afterwards they are as if they had not been."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} CPU"
