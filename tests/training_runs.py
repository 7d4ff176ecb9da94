"""Tiny trainings: made in a folder, stopped by a signal, started as several processes, and compared."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import tiny_experiment

from solq_lab.models.weights import read_weights
from solq_lab.runs import Run, create_run
from solq_lab.training.trainer import Trainer, train_run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# Sections of the kinds of training whose steps differ; `{}` is the paper's.
SQR = {"model": {"mask_branch": "sqr", "standardise_vectors": False}, "codec": {"kind": "none"}}
DECODED = {
    "loss": {"vector_kind": "l2", "vector_units": "std", "decoded_dice_weight": 3.0}
    | {"vector_frame": "predicted", "class_loss": "quality", "outline_dice_weight": 1.0}
}
PLUS = {
    "model": {"mixed_queries": True, "look_twice": True, "mask_look": 8, "denoising": 2},
    "loss": {"proposals_per_object": 3, "vector_kind": "l2", "vector_units": "std", "vector_frame": "predicted"}
    | {"class_loss": "quality", "decoded_dice_weight": 1.0, "outline_dice_weight": 1.0}
    | {"band_limit": 0.5, "tail_drop": 0.5},
    "codec": {"learn_decoder": True},
    "evaluation": {"rescore": "sharpness", "vector_dim": 9},
}


def new_run(data_root, folder, **sections):
    return create_run(tiny_experiment(data_root, **sections), folder)


def what_was_learned(run):
    """Everything of the metrics but the time it took, and the trained weights."""
    lines = [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in run.metrics()]
    return lines, {name: value.tolist() for name, value in read_weights(run.weights).state.items()}


def before_each_step(patch, act):
    """Call act(trainer, batches) before every step, when its batches are loaded."""
    next_batches = Trainer._next_batches

    def load_and_act(self, loader, stop):
        batches = next_batches(self, loader, stop)
        if batches is not None:
            act(self, batches)
        return batches

    patch.setattr(Trainer, "_next_batches", load_and_act)


def signal_after(patch, steps, *numbers, pause=0.0):
    """Send this process signals, SIGTERM by default, in its step of that number, which is still taken."""
    taken = []

    def count_and_signal(trainer, batches):
        taken.append(trainer.step)
        if len(taken) == steps:
            for number in numbers or (signal.SIGTERM,):
                os.kill(os.getpid(), number)
                time.sleep(pause)

    before_each_step(patch, count_and_signal)


def assert_an_interruption_changes_nothing(data_root, folder, *, steps=4, **sections) -> Run:
    """A training that a signal stops learns what an uninterrupted one, which is returned, has learnt."""
    whole, parts = (new_run(data_root, folder / name, **sections) for name in ("whole", "parts"))
    assert train_run(whole) == "finished"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, steps)
        assert train_run(parts) == "preempted"
    status = parts.status()
    assert (status["state"], status["step"], status["message"]) == ("preempted", steps, "SIGTERM")
    assert not parts.weights.exists()
    torch.manual_seed(123)  # another process would not have these generators either
    assert train_run(parts) == "finished"
    assert what_was_learned(parts) == what_was_learned(whole)
    return whole


@contextlib.contextmanager
def training(run, **environment):
    """`python -m solq_lab.training` on a run, as a process; what is left of it is killed at the end."""
    command = [sys.executable, "-m", "solq_lab.training", str(run.folder)]
    process = subprocess.Popen(command, env=ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=120.0, *, process=None):
    """Wait until a condition holds; `process`, if given, has to live until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def assert_same_step(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """Losses and gradients are the same but for float32 sums in another order."""
    assert found["losses"].keys() == expected["losses"].keys()
    for name, loss in expected["losses"].items():
        assert found["losses"][name] == pytest.approx(loss, rel=1e-5), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    largest = max(gradient.abs().max().item() for gradient in expected["gradients"].values())
    for name, gradient in expected["gradients"].items():
        assert torch.allclose(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * largest), name
