"""Compiled training: the same numbers and names, evaluations as written, and a machine without a compiler."""

import copy
import logging

import pytest
import torch
from small_network import SIZES, random_batch, small_backbone, train_once
from tiny import tiny_experiment, write_tiny_dataset
from torch._dynamo.utils import counters
from training_runs import training, wait_for

from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import read_weights
from solq_lab.runs import create_run
from solq_lab.training import compilation
from solq_lab.training.compilation import as_written, compile_layers
from solq_lab.training.trainer import train_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def no_code_generation():
    """Layers are traced and differentiated ahead of time as ever, but run as they were traced: seconds, not minutes."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "BACKEND", "aot_eager")
        yield


@pytest.fixture
def model() -> SOLQ:
    torch.manual_seed(0)
    return SOLQ(small_backbone(), 3, vector_dim=6, **(SIZES | {"dropout": 0.0})).double().train()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("no_code_generation")
def test_compiled_layers_give_the_same_losses_gradients_and_names(model):
    plain, recomputing = copy.deepcopy(model), copy.deepcopy(model)
    checkpoint_activations(recomputing)
    loss, gradients, _ = train_once(plain, random_batch())
    for compiled in (model, recomputing):
        assert compile_layers(compiled, CPU)
        again, gradients_again, _ = train_once(compiled, random_batch())
        assert again.item() == pytest.approx(loss.item(), rel=1e-12)
        for name, gradient in gradients.items():  # float64 sums in another order
            torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
        assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.usefixtures("no_code_generation")
def test_a_layer_is_compiled_once_for_all_depths_and_sizes_and_not_for_evaluations(model):
    compile_layers(model, CPU)
    train_once(model, random_batch())
    compiled = graphs()
    assert compiled > 0
    for side in (64, 128):
        train_once(model, random_batch(side=side))
    with as_written(), torch.inference_mode():
        model.eval()(random_batch())
    assert graphs() == compiled


def test_without_a_working_compiler_a_training_goes_on_as_written(model, monkeypatch, caplog):
    def broken(graph: object, inputs: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(compilation, "BACKEND", broken)
    expected = train_once(copy.deepcopy(model), random_batch())[0]
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(model, CPU)
    assert "the compiler does not work here, training goes on without it" in caplog.text
    assert "no C++ compiler found" in caplog.text
    assert train_once(model, random_batch())[0] == expected


@pytest.mark.slow
def test_a_compiled_training_stops_in_its_first_compilation_and_ends_like_a_plain_one(tmp_path):
    data = write_tiny_dataset(tmp_path / "images")
    sections = {"model": {"dropout": 0.0, "decoder_layers": 1}}
    plain = create_run(tiny_experiment(data, train={"steps": 3, "ema": 0.9}, **sections), tmp_path / "plain")
    train_run(plain)
    train = {"steps": 3, "ema": 0.9, "compile": True, "gradient_checkpointing": True, "evaluate_every": 1}
    run = create_run(tiny_experiment(data, train=train, **sections), tmp_path / "compiled")
    with training(run) as process:
        wait_for(lambda: run.status()["state"] == "training", seconds=600, process=process)
        process.terminate()
        assert process.wait(600) == 0
    assert run.status()["state"] == "preempted"
    assert run.status()["step"] <= 1
    assert train_run(run) == "finished"
    found, expected = read_weights(run.weights).state, read_weights(plain.weights).state
    assert found.keys() == expected.keys()
    for compiled, written in zip(run.metrics("train"), plain.metrics("train"), strict=True):
        assert compiled["total"] == pytest.approx(written["total"], rel=1e-4)  # float32 sums in another order
