"""The options of SOLQ+: their neutral values change no bit, and trainings with all of them resume, replay and share."""

from __future__ import annotations

import pytest
import torch
from losses_and_gradients import losses_and_gradients
from tiny import write_tiny_dataset
from training_runs import assert_shares_learn_as_the_whole, new_run, signal_after, what_was_learned

from solq_lab.training.nonfinite import NonFiniteError
from solq_lab.training.replay import replay_record
from solq_lab.training.trainer import train_run

NEUTRAL = {"model.mixed_queries": False, "model.look_twice": False}
PLUS = {"model": {"mixed_queries": True, "look_twice": True}}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plain(data_root, tmp_path_factory):
    """Losses and gradients of an experiment that names none of the options."""
    return losses_and_gradients(new_run(data_root, tmp_path_factory.mktemp("plain")).folder)


@pytest.mark.parametrize("key", NEUTRAL)
def test_an_option_at_its_neutral_value_changes_no_bit_of_losses_and_gradients(data_root, tmp_path, plain, key):
    section, name = key.split(".")
    found = losses_and_gradients(new_run(data_root, tmp_path, **{section: {name: NEUTRAL[key]}}).folder)
    assert found["losses"] == plain["losses"]
    assert found["gradients"].keys() == plain["gradients"].keys()
    assert all(torch.equal(found["gradients"][name], gradient) for name, gradient in plain["gradients"].items())


def test_a_stopped_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(data_root, tmp_path, monkeypatch):
    sections = PLUS | {"train": {"ema": 0.9, "accumulate": 2, "gradient_checkpointing": True}}
    whole, parts = (new_run(data_root, tmp_path / name, **sections) for name in ("whole", "parts"))
    train_run(whole)
    with monkeypatch.context() as patch:
        signal_after(patch, 5)
        assert train_run(parts) == "preempted"
    torch.manual_seed(123)
    assert train_run(parts) == "finished"
    assert what_was_learned(parts) == what_was_learned(whole)


def test_a_training_is_replayed_bit_for_bit(data_root, tmp_path):
    run = new_run(data_root, tmp_path, optim={"lr": 1e30, "backbone_lr": 1e30}, **PLUS)
    with pytest.raises(NonFiniteError, match="step 2: "):
        train_run(run)
    assert replay_record(run.folder / "flight" / "step_0000002").exact


@pytest.mark.parametrize("shares", [{"accumulate": 2}, {"gpus": 2}], ids=["two passes", "two processes"])
def test_a_shared_batch_gives_the_losses_and_gradients_of_the_whole_batch(data_root, tmp_path, shares):
    same = {"model": PLUS["model"] | {"dropout": 0.0}, "optim": {"clip_norm": 0.0}}
    whole = new_run(data_root, tmp_path / "whole", **same)
    shared = new_run(data_root, tmp_path / "shared", train=shares, **same)
    assert_shares_learn_as_the_whole(whole, shared, tmp_path / "output.pt")
