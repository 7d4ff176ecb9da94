"""Fine-tuning copies what fits of a trained model, and lists what became of the rest."""

import logging
from pathlib import Path

import pytest
import torch
from tiny import tiny_experiment, write_model, write_tiny_dataset

from solq_lab.build import build_model, new_codec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.config import ConfigError, Experiment
from solq_lab.data.classes import ClassMap
from solq_lab.files import read_json
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightMismatch, read_weights, save_weights
from solq_lab.runs import RunError, create_run
from solq_lab.structures import ImageBatch, LayerPrediction
from solq_lab.training import trainer
from solq_lab.training.finetune import open_trained, shared_coefficients, start_from_trained
from solq_lab.training.optim import build_optimizer
from solq_lab.training.trainer import train_run

ANIMALS = ("cat", "dog", "cow")


def trained_model(experiment: Experiment, classes: int) -> SOLQ:
    torch.manual_seed(7)
    model = build_model(experiment, classes).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    if experiment.model.standardise_vectors:
        model.set_vector_statistics(
            torch.randn(experiment.codec.vector_dim), 0.5 + torch.rand(experiment.codec.vector_dim)
        )
    return model


def write_trained(folder: Path, classes: tuple[str, ...] = ANIMALS, **sections) -> tuple[Path, SOLQ]:
    experiment = tiny_experiment(folder, **sections)
    model = trained_model(experiment, len(classes))
    ids = ClassMap(classes, tuple(range(1, len(classes) + 1)))
    return write_model(folder / "trained.safetensors", experiment, model, classes=ids), model


def start(path: Path, names: tuple[str, ...] = ANIMALS, **sections) -> tuple[SOLQ, list[str]]:
    """A fresh model of an experiment with other sections that starts from the file."""
    experiment = tiny_experiment(path.parent, **sections, train={"finetune_from": str(path)})
    torch.manual_seed(1)
    model = build_model(experiment, len(names)).eval()
    if experiment.model.standardise_vectors and experiment.codec.kind != "none":
        length = experiment.codec.vector_dim
        model.set_vector_statistics(torch.linspace(-1, 1, length), torch.linspace(1, 2, length))
    return model, start_from_trained(model, new_codec(experiment), names, open_trained(experiment))


def predict(model: SOLQ) -> LayerPrediction:
    torch.manual_seed(2)
    with torch.no_grad():
        return model(ImageBatch(torch.randn(1, 3, 48, 48), torch.zeros(1, 48, 48, dtype=torch.bool))).layers[-1]


def test_the_same_sizes_give_the_same_predictions_in_other_units(tmp_path):
    """Everything is copied; only the vectors' units, which follow the new data, differ."""
    path, trained = write_trained(tmp_path)
    model, lines = start(path)
    for ours, theirs in zip(predict(model)[:3], predict(trained)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    own = model.state_dict()
    differing = {name for name, tensor in trained.state_dict().items() if not torch.equal(own[name], tensor)}
    assert all(".vector.layers.2." in name or ".vector.vector_" in name for name in differing)
    assert "classes  3 copied by name (cat, cow, dog), 0 fresh, 0 dropped" in lines
    assert "queries  8 copied" in lines
    assert "vectors  20 coefficients copied" in lines


def test_classes_go_by_name_and_new_ones_start_from_the_prior(tmp_path):
    path, trained = write_trained(tmp_path)
    model, lines = start(path, ("horse", "Dog", "cat", ""))
    there, here = trained.heads[1].classify, model.heads[1].classify
    assert torch.equal(here.weight[[1, 2]], there.weight[[1, 0]])
    assert torch.equal(here.bias[[1, 2]], there.bias[[1, 0]])
    assert here.bias[[0, 3]].sigmoid().tolist() == pytest.approx([0.01, 0.01])
    assert "classes  2 copied by name (Dog, cat), 1 fresh (horse), 1 dropped (cow)" in lines
    torch.testing.assert_close(predict(model).boxes, predict(trained).boxes)


def test_queries_are_cut_or_grown_from_trained_ones(tmp_path):
    path, trained = write_trained(tmp_path)
    cut, lines = start(path, model={"queries": 5})
    assert torch.equal(cut.query_embedding, trained.query_embedding[:5])
    assert "queries  5 copied, the last 3 cut" in lines
    grown, lines = start(path, model={"queries": 20})
    assert torch.equal(grown.query_embedding[:8], trained.query_embedding)
    new, old = grown.query_embedding[8:].detach(), trained.query_embedding.detach()[torch.arange(8, 20) % 8]
    apart = (new - old).std() / trained.query_embedding.detach().std(dim=0, correction=0).mean()
    assert 0.05 < float(apart) < 0.2
    assert "queries  8 copied, 12 grown: trained ones again, with noise" in lines


@pytest.mark.parametrize(("there", "here"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_common_low_frequencies_are_predicted_as_before_with_and_without_standardising(
    there: bool, here: bool, tmp_path
):
    path, trained = write_trained(tmp_path, model={"standardise_vectors": there})
    longer, lines = start(path, model={"standardise_vectors": here}, codec={"vector_dim": 30})
    torch.testing.assert_close(predict(longer).vectors[..., :20], predict(trained).vectors, atol=1e-5, rtol=1e-4)
    assert "vectors  20 coefficients copied, 10 fresh" in lines
    assert not longer.heads[0].vector.layers[2].weight[20:].any()
    shorter, lines = start(path, model={"standardise_vectors": here}, codec={"vector_dim": 6})
    torch.testing.assert_close(predict(shorter).vectors, predict(trained).vectors[..., :6], atol=1e-5, rtol=1e-4)
    assert "vectors  6 coefficients copied, 14 dropped" in lines


def test_another_mask_size_scales_the_coefficients_and_another_kind_shares_none(tmp_path):
    """Independent check: one blob, drawn at both mask sizes."""
    small, large = DCTCodec(32, 40), DCTCodec(64, 50)
    shared = shared_coefficients(small, large)
    assert shared == (40, 2.0)
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    blob = ((row - 30) ** 2 + (column - 34) ** 2 < 400).float()
    coarse = torch.nn.functional.avg_pool2d(blob[None], 2)
    torch.testing.assert_close(large.encode(blob[None])[:, :40], 2 * small.encode(coarse), atol=0.4, rtol=0.02)
    assert shared_coefficients(small, FlattenCodec(8, 16)) == shared_coefficients(None, small) == (0, 1.0)
    assert shared_coefficients(FlattenCodec(8, 16), FlattenCodec(8, 16)) == (16, 1.0)
    number, _ = shared_coefficients(DCTCodec(4, 16), DCTCodec(16, 16))
    assert number == 10  # then the small grid's corner ends the scan

    path, trained = write_trained(tmp_path)
    model, lines = start(path, codec={"kind": "flatten", "vector_dim": 16})
    assert "vectors  0 coefficients copied, 16 fresh, 20 dropped" in lines
    assert torch.equal(model.heads[0].vector.layers[1].weight, trained.heads[0].vector.layers[1].weight)


def test_a_trained_model_without_a_mask_look_predicts_as_before_with_a_fresh_one(tmp_path):
    path, trained = write_trained(tmp_path)
    model, lines = start(path, model={"mask_look": 8, "look_twice": True})
    assert "fresh    mask look: the file has none" in lines
    for ours, theirs in zip(predict(model)[:3], predict(trained)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_label_embeddings_go_by_name_and_are_dropped_without_denoising(tmp_path):
    path, trained = write_trained(tmp_path, model={"mixed_queries": True, "denoising": 2})
    model, _ = start(path, ("horse", "Dog"), model={"mixed_queries": True, "denoising": 1})
    assert torch.equal(model.label_embedding.weight[1], trained.label_embedding.weight[1])
    _, lines = start(path, model={"mixed_queries": True})
    assert "dropped  denoising: this model has none" in lines


def test_a_branch_that_only_one_model_has_starts_fresh_or_is_dropped(tmp_path):
    plain = {"codec": {"kind": "none"}, "model": {"standardise_vectors": False}}
    sqr = {"codec": {"kind": "none"}, "model": {"standardise_vectors": False, "mask_branch": "sqr"}}
    path, trained = write_trained(tmp_path)
    model, lines = start(path, **sqr)
    assert {"fresh    mask branch: the file has none", "dropped  mask vectors: this model has none"} <= set(lines)
    torch.testing.assert_close(predict(model).boxes, predict(trained).boxes)
    path, trained = write_trained(tmp_path, **plain)
    model, lines = start(path)
    assert "fresh    mask vectors: the file has none" in lines
    torch.testing.assert_close(predict(model).logits, predict(trained).logits)


def test_a_two_stage_model_keeps_its_proposals_whatever_the_classes(tmp_path):
    path, trained = write_trained(tmp_path, model={"two_stage": True})
    model, _ = start(path, ("dog",), model={"two_stage": True, "queries": 5})
    assert torch.equal(model.proposal_head.classify.weight, trained.proposal_head.classify.weight[:1])


def test_weights_in_half_precision_are_taken_too(tmp_path):
    path, trained = write_trained(tmp_path)
    stored = read_weights(path)
    halves = {name: tensor.half() for name, tensor in stored.state.items()}
    save_weights(path, halves, experiment=stored.experiment, classes=stored.classes)
    model, _ = start(path, model={"queries": 9})
    assert model.query_embedding.dtype == torch.float32
    torch.testing.assert_close(model.query_embedding[:8], trained.query_embedding, atol=1e-3, rtol=1e-3)


def test_missing_and_unknown_tensors_are_named_with_the_nearest(tmp_path):
    path, trained = write_trained(tmp_path)
    opened = open_trained(tiny_experiment(tmp_path, train={"finetune_from": str(path)}))
    opened.weights.state["decoder.0.self_norm.wieght"] = opened.weights.state.pop("decoder.0.self_norm.weight")
    wrong = r"no tensor decoder\.0\.self_norm\.weight \(nearest: decoder\.0\.self_norm\.wieght\); unknown tensor"
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with pytest.raises(WeightMismatch, match=wrong):
        start_from_trained(trained, None, ANIMALS, opened)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_two_sources_of_weights_are_rejected(tmp_path):
    with pytest.raises(
        ConfigError, match=r"finetune_from a\.safetensors and model\.pretrained b\.pth both name weights"
    ):
        tiny_experiment(tmp_path, model={"pretrained": "b.pth"}, train={"finetune_from": "a.safetensors"})


def test_a_training_starts_from_it_and_resumes_without_the_file(tmp_path, caplog):
    """Own data of two classes, from a run of three classes, fewer queries and a shorter code."""
    images = write_tiny_dataset(tmp_path / "images", train=8, val=2)
    (tmp_path / "base").mkdir()
    path, trained = write_trained(tmp_path / "base", ("triangle", "circle", "square"), model={"queries": 6})
    sections = {"codec": {"vector_dim": 24}, "train": {"steps": 2, "finetune_from": str(path)}}
    run = create_run(tiny_experiment(images, **sections), tmp_path / "runs")
    with caplog.at_level(logging.INFO):
        assert train_run(run) == "finished"
    assert "classes  1 copied by name (triangle), 1 fresh (diamond), 2 dropped (circle, square)" in caplog.text
    assert "queries  6 copied, 2 grown" in caplog.text
    assert "left out the state of its optimiser" in caplog.text
    assert read_json(run.environment)["finetuned"]["from"] == str(path)
    learnt = read_weights(run.weights).state
    moved = (learnt["query_embedding"][:6] - trained.query_embedding.detach()).abs().max()
    assert 0 < float(moved) < 0.01  # two small steps away from where it started
    path.unlink()
    run.write_status("training", step=2)
    assert train_run(run) == "finished"


@pytest.mark.parametrize(
    ("sections", "file", "error", "message"),
    [
        ({}, "train.json", WeightMismatch, "not a safetensors file"),
        ({}, ".", RunError, "not a run folder"),
        (
            {"decoder_layers": 3, "refine_boxes": False},
            "trained.safetensors",
            WeightMismatch,
            r"another network: model\.decoder_layers=2 there, 3 here; model\.refine_boxes=True there, .*set these to",
        ),
    ],
)
def test_a_wrong_file_is_rejected_before_any_work(tmp_path, monkeypatch, sections, file, error, message):
    write_trained(tmp_path)
    (tmp_path / "train.json").write_text("{}")
    monkeypatch.setattr(trainer, "prepare_data", lambda _: pytest.fail("the data are prepared first"))
    settings = {"model": sections, "train": {"finetune_from": str(tmp_path / file)}}
    with pytest.raises(error, match=message):
        train_run(create_run(tiny_experiment(tmp_path, **settings), tmp_path / "runs"))


def test_every_parameter_gets_a_gradient_afterwards(tmp_path):
    path, _ = write_trained(tmp_path)
    model, _ = start(path, ("dog", "horse"), model={"queries": 12}, codec={"vector_dim": 28})
    optimizer = build_optimizer(model, tiny_experiment(tmp_path).optim)
    batch = ImageBatch(torch.randn(2, 3, 48, 48), torch.zeros(2, 48, 48, dtype=torch.bool))
    layers = model.train()(batch).layers
    sum(
        layer.logits.square().mean() + layer.boxes.mean() + layer.vectors.square().mean() for layer in layers
    ).backward()
    without = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
