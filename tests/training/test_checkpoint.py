"""Checkpoints: whole or not there, the last two kept, a damaged one named, nothing executed."""

import logging
import os
import pickle
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trap import Trap

from solq_lab import files
from solq_lab.runs import RunError
from solq_lab.training import checkpoint as module
from solq_lab.training.checkpoint import (
    Checkpoint,
    load_newest_checkpoint,
    save_checkpoint,
    step_folders,
)
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.random import random_state, restore_random_state

CPU = torch.device("cpu")


def save(folder, step, **state):
    weights = {"a.weight": torch.full((2, 3), float(step))}
    save_checkpoint(folder, Checkpoint(step, weights, state), experiment="name: x", classes="{}")


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"name": "main", "base_lr": 0.5, "params": model.parameters()}], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path, 7, optimizer=optimizer.state_dict(), average=None, seconds=1.5)
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded.step == 7
    assert torch.equal(loaded.weights["a.weight"], torch.full((2, 3), 7.0))
    assert loaded.state["seconds"] == 1.5
    assert loaded.state["average"] is None
    moments, group = loaded.state["optimizer"]["state"][0], loaded.state["optimizer"]["param_groups"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert group["name"] == "main"


def test_where_nothing_was_saved_there_is_no_checkpoint(tmp_path):
    assert load_newest_checkpoint(tmp_path / "checkpoints") is None


def test_the_last_two_are_kept(tmp_path):
    for step in (5, 10, 100, 20):
        save(tmp_path, step)
    assert [path.name for path in step_folders(tmp_path)] == ["step_0000020", "step_0000100"]


def test_saving_the_same_step_twice_keeps_the_first(tmp_path):
    save(tmp_path, 5, seconds=1.0)
    save(tmp_path, 5, seconds=2.0)
    assert load_newest_checkpoint(tmp_path).state["seconds"] == 1.0


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "scribbled", "one bit", "removed"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path, caplog, file, damage):
    save(tmp_path, 5)
    save(tmp_path, 10, moments=torch.full((99,), 10.0))
    path = tmp_path / "step_0000010" / file
    whole = path.read_bytes()
    bit = bytearray(whole)
    bit[whole.rindex(np.float32(10).tobytes())] ^= 1
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-20], "emptied": b"", "scribbled": b"x" * len(whole), "one bit": bit}[damage])
    with caplog.at_level(logging.WARNING):
        assert load_newest_checkpoint(tmp_path).step == 5
    assert "step_0000010: damaged checkpoint left aside" in caplog.text


def test_a_damaged_one_makes_way_for_the_next_of_its_step_and_does_not_count_as_kept(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step_0000010" / "state.pt").write_bytes(b"")
    load_newest_checkpoint(tmp_path)
    save(tmp_path, 7)
    assert [path.name for path in step_folders(tmp_path)] == ["step_0000005", "step_0000007"]
    save(tmp_path, 10)
    assert load_newest_checkpoint(tmp_path).step == 10
    assert (tmp_path / "damaged_step_0000010").is_dir()  # for whoever wants to look at it


def test_a_checkpoint_without_a_fingerprint_is_read_as_older_versions_were(tmp_path):
    save(tmp_path, 5)
    (tmp_path / "step_0000005" / module.FINGERPRINTS).unlink()
    assert load_newest_checkpoint(tmp_path).step == 5


def test_kills_at_any_moment_of_saving_leave_a_whole_checkpoint(tmp_path):
    delays = np.random.default_rng(7).uniform(0.0, 0.03, 12)
    save(tmp_path, 1)
    for delay in delays:
        newest = load_newest_checkpoint(tmp_path)
        child = os.fork()
        if child == 0:
            for step in range(newest.step + 1, newest.step + 1000):
                save(tmp_path, step)
            os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = load_newest_checkpoint(tmp_path)
        assert loaded.step >= newest.step
        assert torch.equal(loaded.weights["a.weight"], torch.full((2, 3), float(loaded.step)))
    save(tmp_path, 10**6)
    assert not list(tmp_path.glob(".*"))
    assert not list(tmp_path.glob("damaged_*"))


def test_files_and_folders_are_on_the_disk_before_a_checkpoint_has_its_name(tmp_path, monkeypatch):
    flushed, rename = [], Path.rename

    def note_and_rename(path, target):
        flushed.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(files, "flush_to_disk", lambda path: flushed.append(path.name))
    monkeypatch.setattr(Path, "rename", note_and_rename)
    save(tmp_path / "checkpoints", 5)
    partial = ".step_0000005.part"
    assert flushed[-6:] == ["sha256.json", "state.pt", "weights.safetensors", partial, "renamed", "checkpoints"]


def test_when_all_are_damaged_the_training_does_not_start_anew(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
        (tmp_path / f"step_{step:07d}" / "state.pt").write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint can be read .*step_0000005, step_0000010.* remove this folder"):
        load_newest_checkpoint(tmp_path)
    assert [path.name for path in step_folders(tmp_path)] == ["step_0000005", "step_0000010"]


def test_a_save_that_dies_half_way_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 10)
    monkeypatch.undo()
    assert load_newest_checkpoint(tmp_path).step == 5
    save(tmp_path, 10)
    assert load_newest_checkpoint(tmp_path).step == 10
    assert not list(tmp_path.glob(".*"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_code_in_a_state_file_is_not_executed(tmp_path, write):
    save(tmp_path, 5)
    save(tmp_path, 10)
    write({"step": Trap(tmp_path / "executed")}, tmp_path / "step_0000010" / "state.pt")
    assert load_newest_checkpoint(tmp_path).step == 5
    assert not (tmp_path / "executed").exists()


def test_random_generators_are_restored(tmp_path):
    def draw():
        return torch.randn(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)  # noqa: NPY002

    draw()  # leaves half a pair of Gaussians in the generators of Python and numpy
    save(tmp_path, 1, random=[random_state(CPU)])
    expected = draw()
    restore_random_state(load_newest_checkpoint(tmp_path).state["random"][0], CPU)
    assert draw() == expected


def test_averaged_weights_are_updated_and_swapped_into_the_model():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    start = model[0].weight.detach().clone()
    average = AveragedWeights(model, 0.75)
    with torch.no_grad():
        model[0].weight += 4.0
        model[1].num_batches_tracked += 3
    average.update(model)
    assert torch.allclose(average.state_dict()["0.weight"], start + 1.0)
    assert average.state_dict()["1.num_batches_tracked"] == 3
    with average.inside(model):
        assert torch.allclose(model[0].weight, start + 1.0)
    assert torch.allclose(model[0].weight, start + 4.0)


def test_a_shared_tensor_is_averaged_once():
    shared = nn.Linear(2, 2, bias=False)
    model = nn.ModuleList([shared, shared])
    average = AveragedWeights(model, 0.5)
    with torch.no_grad():
        shared.weight += 4.0
    average.update(model)
    state = average.state_dict()
    assert state["0.weight"] is state["1.weight"]
    assert torch.allclose(state["0.weight"], shared.weight - 2.0)
