"""Whole trainings of a tiny model: they learn, resume exactly, stop politely, survive kills, and share work evenly."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny import write_tiny_dataset
from training_runs import (
    ENVIRONMENT,
    assert_shares_learn_as_the_whole,
    new_run,
    signal_after,
    torchrun,
    what_was_learned,
)

from solq_lab import distributed
from solq_lab.data.annotations import DataError
from solq_lab.files import read_json
from solq_lab.models.weights import read_weights
from solq_lab.runs import RunError, load_run
from solq_lab.training import trainer as module
from solq_lab.training.checkpoint import list_checkpoints
from solq_lab.training.losses import SetCriterion
from solq_lab.training.nonfinite import NonFiniteError
from solq_lab.training.trainer import Trainer, train_run


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("images"))


def test_a_training_leaves_everything_a_run_promises(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"evaluate_every": 2})
    assert train_run(run) == "finished"
    assert run.status()["state"] == "finished"
    start, *lines = run.metrics()
    assert start["kind"] == "start"
    assert start["plateau"]["vector"] > 0
    assert 0 < start["ceiling"]["segm.AP50"] <= 1
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, 9))
    assert train_lines[2]["epoch"] == 1.0
    terms = ("class", "l1", "giou", "vector")
    assert set(train_lines[0]["losses"]) == {f"{term}{layer}" for term in terms for layer in ("", "/0")}
    assert [line["step"] for line in run.metrics("evaluation")] == [6, 8]
    assert "segm.AP50" in run.metrics("evaluation")[0]["metrics"]

    environment = read_json(run.environment)
    assert environment["operator"] in ("cpu", "cuda", "reference")
    assert environment["dataset"]["images"] == 12
    assert len(environment["dataset"]["sha256"]) == len(environment["codec"]["sha256"]) == 64
    assert run.results.exists()
    assert run.detections.exists()
    stored = read_weights(run.weights)
    assert "name: tiny" in stored.experiment
    assert json.loads(stored.classes)["names"] == ["triangle", "diamond"]
    assert len(list_checkpoints(run.checkpoints)) == 2


def test_a_finished_run_is_not_trained_again(data_root, tmp_path, caplog):
    run = new_run(data_root, tmp_path, train={"steps": 1})
    train_run(run)
    before = run.weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert train_run(run) == "finished"
    assert "is finished; remove the folder to train it anew" in caplog.text
    assert run.weights.stat().st_mtime_ns == before


def test_the_loss_falls_below_what_a_constant_answer_gives(data_root, tmp_path):
    run = new_run(
        data_root, tmp_path, train={"steps": 150, "save_every": 1000}, model={"dropout": 0.0}, data={"cache": True}
    )
    train_run(run)
    losses = [line["total"] for line in run.metrics("train")]
    vector = [line["losses"]["vector"] for line in run.metrics("train")[-10:]]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sum(vector) / 10 < run.metrics("start")[0]["plateau"]["vector"]


DECODED = {"vector_kind": "l2", "vector_units": "std", "decoded_dice_weight": 3.0}
DECODED |= {"vector_frame": "predicted", "class_loss": "quality"}


@pytest.mark.parametrize(
    ("number", "loss"),
    [(signal.SIGINT, {}), (signal.SIGTERM, {}), (signal.SIGUSR1, {}), (signal.SIGTERM, DECODED)],
    ids=["SIGINT", "SIGTERM", "SIGUSR1", "std units and decoded dice"],
)
def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    data_root, tmp_path, monkeypatch, number, loss
):
    # dropout, averaged weights, accumulation, windows of three steps and an evaluation between: all of it has a state
    train = {"ema": 0.9, "accumulate": 2, "log_every": 3, "evaluate_every": 2}
    whole = new_run(data_root, tmp_path / "whole", train=train, loss=loss)
    train_run(whole)
    parts = new_run(data_root, tmp_path / "parts", train=train, loss=loss)
    with monkeypatch.context() as patch:
        signal_after(patch, 5, number)
        assert train_run(parts) == "preempted"
    status = parts.status()
    assert (status["state"], status["step"], status["message"]) == ("preempted", 5, number.name)
    assert not parts.weights.exists()
    torch.manual_seed(123)  # another process would not have these generators either
    assert train_run(parts) == "finished"
    assert what_was_learned(parts) == what_was_learned(whole)


def test_a_crash_between_checkpoints_repeats_the_lost_steps(data_root, tmp_path, monkeypatch):
    whole = new_run(data_root, tmp_path / "whole")
    train_run(whole)
    crashed = new_run(data_root, tmp_path / "crashed")
    end_step = module.MetricLogger.end_step

    def fall_over(self, step, *arguments):
        end_step(self, step, *arguments)
        if step == 5:
            raise OSError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(module.MetricLogger, "end_step", fall_over)
        with pytest.raises(OSError, match="fire"):
            train_run(crashed)
    assert crashed.status()["state"] == "failed"
    assert crashed.status()["message"] == "OSError: the disk is on fire"
    assert [path.name for path in list_checkpoints(crashed.checkpoints)] == ["step_0000003"]
    train_run(crashed)
    assert what_was_learned(crashed) == what_was_learned(whole)


def test_an_evaluation_that_was_interrupted_is_done_on_resuming(data_root, tmp_path, monkeypatch):
    run = new_run(data_root, tmp_path, train={"evaluate_every": 1})

    def interrupt(self, stop):
        raise OSError("killed while evaluating")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", interrupt)
        with pytest.raises(OSError, match="killed"):
            train_run(run)
    assert run.metrics("evaluation") == []
    train_run(run)
    assert [line["step"] for line in run.metrics("evaluation")] == [3, 6, 8]


def test_a_damaged_newest_checkpoint_costs_only_its_steps(data_root, tmp_path, monkeypatch, caplog):
    whole = new_run(data_root, tmp_path / "whole")
    train_run(whole)
    damaged = new_run(data_root, tmp_path / "damaged")
    with monkeypatch.context() as patch:
        signal_after(patch, 7)
        train_run(damaged)
    newest = list_checkpoints(damaged.checkpoints)[-1]
    (newest / "weights.safetensors").write_bytes(b"not weights")
    train_run(damaged)
    assert f"{newest}: damaged checkpoint left aside" in caplog.text
    assert what_was_learned(damaged) == what_was_learned(whole)


def test_a_data_set_without_any_object_trains(data_root, tmp_path):
    for split in ("train", "val"):
        document = json.loads((data_root / f"{split}.json").read_text()) | {"annotations": []}
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
    data = {f"{split}_annotations": str(tmp_path / f"{split}.json") for split in ("train", "val")}
    run = new_run(data_root, tmp_path / "runs", train={"steps": 2}, data=data)
    assert train_run(run) == "finished"
    losses = run.metrics("train")[-1]["losses"]
    assert losses["class"] > 0
    assert losses["l1"] == losses["giou"] == losses["vector"] == 0
    assert run.metrics("start")[0]["plateau"]["vector"] == 0


def test_a_plain_detector_trains(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"steps": 2}, codec={"kind": "none"}, model={"standardise_vectors": False})
    assert train_run(run) == "finished"
    assert run.metrics("start")[0]["plateau"] == {}
    assert "vector" not in run.metrics("train")[0]["losses"]


def test_autocast_trains_close_to_float32(data_root, tmp_path):
    losses = []
    for autocast in ("none", "bf16"):
        model = {"dropout": 0.0}
        run = new_run(data_root, tmp_path / autocast, train={"steps": 3, "autocast": autocast}, model=model)
        train_run(run)
        losses.append([line["total"] for line in run.metrics("train")])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)  # bf16 has three digits


def test_a_diverged_training_names_step_and_images_and_keeps_its_weights(data_root, tmp_path, monkeypatch):
    run = new_run(data_root, tmp_path)
    total, seen = SetCriterion.total, []

    def blow_up(self, losses):
        seen.append(total(self, losses))
        return seen[-1] * (float("nan") if len(seen) == 3 else 1.0)

    monkeypatch.setattr(SetCriterion, "total", blow_up)
    with pytest.raises(
        NonFiniteError, match=r"step 3: the loss total is nan. Image ids of this step: \[\d+, \d+, \d+, \d+\]"
    ):
        train_run(run)
    assert run.status()["state"] == "failed"
    assert len(run.metrics("train")) == 2


def test_a_batch_larger_than_the_data_set_is_refused_before_any_work(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"batch_size": 16})
    with pytest.raises(DataError, match=r"12 images, fewer than train\.batch_size 16"):
        train_run(run)
    assert run.metrics() == []


def test_a_wrong_number_of_processes_is_refused_with_the_command(data_root, tmp_path, monkeypatch):
    run = new_run(data_root, tmp_path, train={"gpus": 2})
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(RunError, match=r"3 training processes .* 2 x 1 passes .* allowed are 1, 2\. .*-per-node=2"):
        train_run(run)


def test_more_processes_than_gpus_are_refused_before_they_take_one(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "process_group", None)
    with pytest.raises(RunError, match="3 processes were started on a machine with 2 GPUs; start at most 2 on it"):
        train_run(new_run(data_root, tmp_path))


# -------------------------------------------------------------------------------------------- processes of their own


def start(run):
    """`python -m solq_lab.training` on a run, as a process."""
    command = [sys.executable, "-m", "solq_lab.training", str(run.folder)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 90
    while not any(line["step"] >= step for line in run.metrics("train")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_saves_and_kill_9_loses_only_the_steps_since(data_root, tmp_path):
    sections = {"train": {"steps": 40, "save_every": 10}, "data": {"workers": 1}}
    run = new_run(data_root, tmp_path / "parts", **sections)
    first = start(run)
    wait_for_step(run, 5, first)
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait(30) == 0, first.stderr.read()
    assert run.status()["state"] == "preempted"

    second = start(run)
    wait_for_step(run, run.status()["step"] + 14, second)
    assert run.is_training()
    os.kill(second.pid, signal.SIGKILL)
    second.wait(30)
    assert not run.is_training()
    assert run.status()["state"] == "training"  # nobody was left to say otherwise

    assert train_run(run) == "finished"
    whole = new_run(data_root, tmp_path / "whole", **sections)
    train_run(whole)
    assert what_was_learned(run) == what_was_learned(whole)


def test_the_command_refuses_in_one_line_and_with_status_2(data_root, tmp_path):
    run = new_run(data_root, tmp_path, data={"train_annotations": "missing.json"})
    process = start(run)
    assert process.wait(60) == 2
    lines = process.stderr.read().splitlines()
    assert "Traceback" not in "".join(lines)
    assert "missing.json" in lines[-1]
    assert "missing.json" in run.log_file.read_text()
    assert run.status()["state"] == "failed"
    assert "missing.json" in run.status()["message"]


@pytest.mark.parametrize(
    ("shares", "loss"),
    [({"accumulate": 2}, {}), ({"gpus": 2, "accumulate": 2}, {}), ({"gpus": 2, "accumulate": 2}, DECODED)],
    ids=["accumulated", "two processes", "two processes, std units and decoded dice"],
)
def test_a_shared_batch_gives_the_losses_and_gradients_of_the_whole_batch(data_root, tmp_path, shares, loss):
    same = {"model": {"dropout": 0.0}, "optim": {"clip_norm": 0.0}, "loss": loss}
    whole = new_run(data_root, tmp_path / "whole", **same)
    shared = new_run(data_root, tmp_path / "shared", train=shares, **same)
    assert_shares_learn_as_the_whole(whole, shared, tmp_path / "output.pt")


@pytest.mark.slow
def test_two_processes_train_save_stop_and_resume_together(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"gpus": 2, "steps": 40, "evaluate_every": 4, "save_every": 5})
    command = torchrun("-m", "solq_lab.training", run.folder)
    first = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 3, first)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    status = run.status()
    assert status["state"] == "preempted"
    assert list_checkpoints(run.checkpoints)[-1].name == f"step_{status['step']:07d}"
    second = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert load_run(run.folder).status()["state"] == "finished"
    assert [line["step"] for line in run.metrics("train")] == list(range(1, 41))
    assert [line["step"] for line in run.metrics("evaluation")] == [12, 24, 36, 40]
