"""TensorBoard shows the numbers of metrics.jsonl, each once whatever was interrupted, and never ends a training."""

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_experiment, write_tiny_dataset
from training_runs import signal_after

from solq_lab.config import ConfigError
from solq_lab.runs import Run, create_run
from solq_lab.training import tracking
from solq_lab.training.tracking import FOLDER, TensorBoard, scalars
from solq_lab.training.trainer import train_run

TRAIN = {"tensorboard": True, "steps": 6, "save_every": 2}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("images"), train=8, val=2)


def drawn(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads in a folder: (step, value) of every tag."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def recorded(run: Run) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.metrics():
        for tag, value in scalars(line, line["kind"]):
            found.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_every_number_of_metrics_jsonl_is_drawn_once_after_a_stop_and_a_rewind(data_root, tmp_path, monkeypatch):
    """Stopped after step 3 and, as after a kill, set back to the checkpoint of step 2: step 3 is taken again."""
    run = create_run(tiny_experiment(data_root, train=TRAIN), tmp_path)
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        assert train_run(run) == "preempted"
    before = drawn(run.folder / FOLDER)["train/total"]
    assert [step for step, _ in before] == [1, 2, 3]
    for path in (run.checkpoints / "step_0000003").iterdir():
        path.unlink()
    (run.checkpoints / "step_0000003").rmdir()
    assert train_run(run) == "finished"

    curves = drawn(run.folder / FOLDER)
    assert curves == recorded(run)
    assert [step for step, _ in curves["train/total"]] == [1, 2, 3, 4, 5, 6]
    assert {"train/losses/vector", "evaluation/metrics/segm.AP", "start/plateau/vector"} <= set(curves)
    rates = {tag for tag in curves if tag.startswith("train/learning_rates/")}
    assert len(rates) >= 3
    assert all(len(curves[tag]) == 6 for tag in rates)


def test_without_being_asked_for_nothing_is_written(data_root, tmp_path):
    run = create_run(tiny_experiment(data_root), tmp_path)
    assert tracking.open_tensorboard(run, step=0) is None
    assert not (run.folder / FOLDER).exists()


def test_a_missing_package_is_refused_before_any_work(data_root, tmp_path, monkeypatch):
    run = create_run(tiny_experiment(data_root, train=TRAIN), tmp_path)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs TensorBoard; .*pip install 'solq-lab\[tracking\]'"):
        train_run(run)
    assert not run.metrics_file.exists()


def test_a_folder_that_cannot_be_written_costs_the_curves_only(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        board = TensorBoard(tmp_path / "file", step=0)
        board.write({"kind": "train", "step": 1, "total": 1.0})
    assert caplog.text.count("no longer written, the training goes on") == 1


def test_a_write_that_fails_later_is_said_once(tmp_path, caplog, monkeypatch):
    board = TensorBoard(tmp_path / "board", step=0)
    board.write({"kind": "train", "step": 1, "total": 1.0})

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(board._writer), "flush", full)
    with caplog.at_level(logging.WARNING):
        board.write({"kind": "train", "step": 2, "total": 1.0})
        board.write({"kind": "train", "step": 3, "total": 1.0})
    assert caplog.text.count("No space left on device") == 1
    assert drawn(tmp_path / "board")["train/total"][0] == (1, 1.0)


def test_only_numbers_become_scalars():
    line = {"kind": "skipped", "step": 3, "why": "nan", "ids": [1, 2], "fatal": True, "norms": {"all": 2}}
    assert dict(scalars(line, "skipped")) == {"skipped/norms/all": 2.0}
