"""Whole trainings of a tiny model: they learn, resume exactly, stop politely, survive kills, and share work evenly."""

import json
import logging

import pytest
import torch
from losses_and_gradients import losses_and_gradients, write_losses_and_gradients
from processes import in_process_group
from training_runs import (
    DECODED,
    PLUS,
    SQR,
    assert_an_interruption_changes_nothing,
    assert_same_step,
    new_run,
    training,
    wait_for,
    what_was_learned,
)

from solq_lab import distributed
from solq_lab.data.annotations import DataError
from solq_lab.files import read_json
from solq_lab.models.weights import read_weights
from solq_lab.runs import RunError
from solq_lab.training.checkpoint import step_folders
from solq_lab.training.trainer import train_run


@pytest.fixture(scope="module")
def finished(data_root, tmp_path_factory):
    run = new_run(data_root, tmp_path_factory.mktemp("finished"), train={"evaluate_every": 2})
    assert train_run(run) == "finished"
    return run


def test_a_training_leaves_everything_a_run_promises(finished):
    run = finished
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
    assert {"versions", "git", "operator", "dataset", "codec", "command", "host", "created"} <= set(environment)
    assert {"processor", "cores", "memory_gb", "gpus", "driver", "cuda", "cudnn", "nccl"} == set(
        environment["hardware"]
    )
    assert environment["versions"]["torch"]
    assert environment["hardware"]["cores"] >= 1
    assert environment["operator"] in ("cpu", "cuda", "reference")
    assert environment["dataset"]["images"] == 12
    assert len(environment["dataset"]["sha256"]) == len(environment["codec"]["sha256"]) == 64
    assert run.results.exists()
    assert run.detections.exists()
    stored = read_weights(run.weights)
    assert "name: tiny" in stored.experiment
    assert json.loads(stored.classes)["names"] == ["triangle", "diamond"]
    assert len(step_folders(run.checkpoints)) == 2


def test_a_finished_run_is_not_trained_again(finished, caplog):
    before = finished.weights.stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert train_run(finished) == "finished"
    assert "is finished; remove the folder to train it anew" in caplog.text
    assert finished.weights.stat().st_mtime_ns == before


def test_the_loss_falls_below_what_a_constant_answer_gives(data_root, tmp_path):
    run = new_run(
        data_root, tmp_path, train={"steps": 150, "save_every": 1000}, model={"dropout": 0.0}, data={"cache": True}
    )
    train_run(run)
    losses = [line["total"] for line in run.metrics("train")]
    vector = [line["losses"]["vector"] for line in run.metrics("train")[-10:]]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sum(vector) / 10 < run.metrics("start")[0]["plateau"]["vector"]


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [({}, False), (DECODED, False), (PLUS, True)],
    ids=["plain", "decoded", "plus and recomputed passes"],
)
def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    data_root, tmp_path, kind, checkpointing
):
    # dropout, averaged weights, accumulation, windows of three steps and an evaluation between: all of it has a state
    train = {"ema": 0.9, "accumulate": 2, "log_every": 3, "evaluate_every": 2, "gradient_checkpointing": checkpointing}
    assert_an_interruption_changes_nothing(data_root, tmp_path, steps=5, train=train, **kind)


def test_a_plain_detector_trains(data_root, tmp_path):
    run = new_run(data_root, tmp_path, train={"steps": 2}, codec={"kind": "none"}, model={"standardise_vectors": False})
    assert train_run(run) == "finished"
    assert run.metrics("start")[0]["plateau"] == {}
    assert "vector" not in run.metrics("train")[0]["losses"]


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


def test_sigterm_saves_and_kill_9_loses_only_the_steps_since(data_root, tmp_path):
    sections = {"train": {"steps": 40, "save_every": 10}, "data": {"workers": 1}}
    run = new_run(data_root, tmp_path / "parts", **sections)
    with training(run) as first:
        wait_for(lambda: any(line["step"] >= 5 for line in run.metrics("train")), process=first)
        first.terminate()
        assert first.wait(30) == 0, first.stderr.read()
    assert run.status()["state"] == "preempted"

    target = run.status()["step"] + 14
    with training(run) as second:
        wait_for(lambda: any(line["step"] >= target for line in run.metrics("train")), process=second)
        assert run.is_training()
    assert not run.is_training()
    assert run.status()["state"] == "training"  # nobody was left to say otherwise

    assert train_run(run) == "finished"
    whole = new_run(data_root, tmp_path / "whole", **sections)
    train_run(whole)
    assert what_was_learned(run) == what_was_learned(whole)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", [{}, DECODED, SQR, PLUS], ids=["plain", "decoded", "SQR", "plus"])
def test_a_shared_batch_gives_the_losses_and_gradients_of_the_whole_batch(data_root, tmp_path, kind, processes):
    """But for guests and lengths of vectors, which every process draws for itself."""
    same = kind | {"model": kind.get("model", {}) | {"dropout": 0.0, "denoising": 0}, "optim": {"clip_norm": 0.0}}
    same |= {"loss": kind.get("loss", {}) | {"tail_drop": 0.0}}
    whole = new_run(data_root, tmp_path / "whole", **same)
    shared = new_run(data_root, tmp_path / "shared", train={"gpus": processes, "accumulate": 2}, **same)
    in_process_group(write_losses_and_gradients, shared.folder, tmp_path / "output.pt", processes=processes)
    assert_same_step(torch.load(tmp_path / "output.pt", weights_only=True), losses_and_gradients(whole.folder))
