"""The best weights of a training beside the last ones, and early stopping."""

import math

import pytest
import torch
from tiny import write_tiny_dataset
from training_runs import new_run

from solq_lab import Predictor
from solq_lab.models.weights import read_weights
from solq_lab.training import trainer as module
from solq_lab.training.best import BestWeights, score
from solq_lab.training.trainer import Trainer, train_run


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return write_tiny_dataset(tmp_path_factory.mktemp("images"))


def with_scores(monkeypatch, *scores: float) -> None:
    """Give the evaluations of a training these mask APs, one after the other."""
    real, left = module.evaluate_model, list(scores)

    def scored(*args, **kwargs):
        results, evaluation = real(*args, **kwargs)
        evaluation.metrics["segm.AP"] = left.pop(0)
        return results, evaluation

    monkeypatch.setattr(module, "evaluate_model", scored)


def test_the_weights_of_the_best_evaluation_are_kept_beside_the_last(data_root, tmp_path, monkeypatch):
    with_scores(monkeypatch, 0.5, 0.4)  # after steps 3 and 6 of 8; the last evaluation finds about nothing
    run = new_run(data_root, tmp_path, train={"evaluate_every": 1, "steps": 8, "ema": 0.5})
    kept = {}
    real = Trainer._write_weights

    def remember(trainer, path):
        real(trainer, path)
        kept.setdefault(path.name, []).append((trainer.step, read_weights(path).state))

    monkeypatch.setattr(Trainer, "_write_weights", remember)
    assert train_run(run) == "finished"
    assert [step for step, _ in kept["best.safetensors"]] == [3]
    best, last = read_weights(run.best).state, read_weights(run.weights).state
    assert all(torch.equal(tensor, kept["best.safetensors"][0][1][name]) for name, tensor in best.items())
    assert any(not torch.equal(tensor, last[name]) for name, tensor in best.items())
    assert Predictor(run.best).classes.names == ("triangle", "diamond")


def test_a_training_ends_where_its_evaluations_stay_below_the_best_and_resumes_as_stopped(
    data_root, tmp_path, monkeypatch
):
    with_scores(monkeypatch, 0.5, 0.4, 0.3)
    run = new_run(data_root, tmp_path, train={"evaluate_every": 1, "steps": 30, "stop_after": 2})
    assert train_run(run) == "finished"
    assert run.status()["step"] == 9
    assert [line["step"] for line in run.metrics("evaluation")] == [3, 6, 9]
    assert run.weights.exists()

    again = BestWeights(run)
    again.resume(9)
    assert again.should_stop(2)
    again.resume(6)
    assert not again.should_stop(2)


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([0.2, 0.1, 0.1], 2, True),
        ([0.2, 0.1, 0.2], 2, False),  # as good as the best
        ([0.2, 0.1, 0.1], 3, False),
        ([0.2, 0.1, 0.1], 0, False),
        ([0.009, 0.0, 0.0], 2, False),  # nothing learnt yet
    ],
)
def test_only_evaluations_below_the_best_count(data_root, tmp_path, scores, patience, stops):
    best = BestWeights(new_run(data_root, tmp_path))
    for value in scores:
        best.add({"segm.AP": value, "box.AP": 0.0}, lambda path: None)
    assert best.should_stop(patience) is stops


def test_where_nothing_is_learnt_yet_the_later_weights_are_kept(data_root, tmp_path):
    best, kept = BestWeights(new_run(data_root, tmp_path)), []
    for step, value in enumerate([0.009, 0.001, 0.02, 0.01]):
        best.add({"segm.AP": value, "box.AP": 0.0}, lambda path, step=step: kept.append(step))
    assert kept == [0, 1, 2]


def test_a_plain_detector_is_judged_by_its_boxes_and_what_is_undefined_counts_as_nothing():
    assert score({"box.AP": 0.3}) == 0.3
    assert score({"segm.AP": None, "box.AP": 0.3}) == score({"segm.AP": math.nan, "box.AP": 0.3}) == 0.0
