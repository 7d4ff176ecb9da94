"""A packaged run is small, names nothing of the machine, detects the same objects, and is never written to."""

import json
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, tiny_experiment, write_model

from solq_lab.build import build_model
from solq_lab.evaluation.evaluator import evaluate_run
from solq_lab.inference.export import packaging
from solq_lab.inference.export.packaging import halved, package_run
from solq_lab.inference.predictor import Predictor
from solq_lab.models.weights import read_weights
from solq_lab.runs import Run, RunError, create_run, load_run, working_copy
from solq_lab.workbench.workspace import experiment_run, open_run, run_folder, trained_run


def finish(run: Run, *, seed: int = 0) -> Run:
    """Give a run what a training leaves behind; its weights see objects everywhere."""
    torch.manual_seed(seed)
    model = build_model(run.experiment, len(CLASSES))
    for head in model.heads:
        torch.nn.init.constant_(head.classify.bias, 0.0)
        for layer in (head.box.layers[2], head.vector.layers[2]):
            torch.nn.init.normal_(layer.weight, std=0.1)
    write_model(run.weights, run.experiment, model)
    run.write_status("finished", step=8)
    for step in range(1, 9):
        run.append_metrics({"kind": "train", "step": step, "total": 1.0 / step})
    run.append_metrics({"kind": "evaluation", "step": 8, "metrics": {}})
    return run


@pytest.fixture
def run(data_root: Path, tmp_path: Path) -> Run:
    return finish(create_run(tiny_experiment(data_root), tmp_path / "trained"))


@pytest.fixture
def packaged(run: Run, tmp_path: Path) -> Path:
    package_run(run, tmp_path / "shipped" / "tiny", run.experiment)
    return tmp_path / "shipped" / "tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_half_precision_is_only_how_weights_are_stored(run: Run, packaged: Path):
    stored = read_weights(packaged / "weights.safetensors").state.values()
    assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {torch.float16}
    assert (packaged / "weights.safetensors").stat().st_size < 0.6 * run.weights.stat().st_size
    model = Predictor(packaged, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("vector_dim", [None, 1])
def test_it_detects_the_same_objects_and_reports_the_difference(run: Run, tmp_path: Path, vector_dim: int | None):
    settings = run.experiment.evaluation.model_copy(update={"vector_dim": vector_dim})
    loss = package_run(run, tmp_path / "small", run.experiment.model_copy(update={"evaluation": settings}))
    assert loss.images == 4
    assert loss.matched == loss.detections > 0
    assert 0 < loss.score < packaging.TOLERANCE.score
    assert 0 < loss.box < packaging.TOLERANCE.box
    stored = json.loads((tmp_path / "small" / "shipped.json").read_text())["half_precision"]
    assert stored.pop("mask") == 1 - loss.mask_iou
    assert stored == {"images": 4, "objects": loss.detections, "score": loss.score, "box": loss.box}


def test_it_names_no_machine_and_no_path(run: Run, data_root: Path, packaged: Path):
    run.record_environment({"dataset": {"annotations": str(data_root / "train.json"), "images": 12}})
    package_run(run, packaged, run.experiment)
    facts = json.loads((packaged / "environment.json").read_text())
    assert facts["dataset"] == {"images": 12}
    assert facts["versions"]["torch"]
    assert not {"host", "command", "platform"} & set(facts)
    assert set(json.loads((packaged / "status.json").read_text())) == {"state", "step", "message"}


def test_a_long_record_is_thinned_but_keeps_its_evaluations(run: Run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(packaging, "MAX_TRAIN_LINES", 3)
    package_run(run, tmp_path / "small", run.experiment)
    kept = load_run(tmp_path / "small").metrics()
    assert [line["step"] for line in kept if line["kind"] == "train"] == [1, 4, 7]
    assert [line["step"] for line in kept if line["kind"] == "evaluation"] == [8]


def test_a_tensor_that_half_precision_cannot_hold_stays_and_shared_ones_stay_shared():
    shared = torch.ones(3)
    state = halved({"a": shared, "b": shared, "large": torch.tensor([1e6]), "count": torch.tensor(3)})
    assert state["a"] is state["b"]
    assert state["a"].dtype == torch.float16
    assert state["large"].dtype == torch.float32
    assert state["count"].dtype == torch.int64


def test_too_large_a_difference_is_rejected_with_its_size_and_nothing_is_left(run: Run, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(packaging, "TOLERANCE", packaging.TOLERANCE._replace(score=1e-9))
    with pytest.raises(RunError, match=r"half precision changes too much \(\d+ of .*allowed are score 1e-09"):
        package_run(run, tmp_path / "out" / "small", run.experiment)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_be_packaged_is_rejected_by_name(run: Run, data_root: Path, tmp_path: Path):
    with pytest.raises(RunError, match="exists and was not written by `solq-lab ship`; name another folder"):
        package_run(run, data_root, run.experiment)
    with pytest.raises(RunError, match="a packaged run keeps its codec"):
        package_run(run, tmp_path / "out", tiny_experiment(data_root, codec={"vector_dim": 10}))
    run.weights.unlink()
    with pytest.raises(RunError, match=r"no weights\.safetensors \(finished\); finish the training first"):
        package_run(run, tmp_path / "out", run.experiment)


def test_looking_into_a_packaged_run_never_writes_into_it(packaged: Path, tmp_path: Path):
    before = contents(packaged)
    run = open_run(packaged, tmp_path / "runs")
    assert run.folder == tmp_path / "runs" / "shipped" / "tiny"
    evaluate_run(run)
    run.figures.mkdir()
    assert run.results.exists()
    assert contents(packaged) == before
    assert open_run(packaged, tmp_path / "runs").results.exists()  # the copy is kept


def test_other_packaged_weights_make_another_copy(run: Run, packaged: Path, tmp_path: Path):
    copy = working_copy(load_run(packaged), tmp_path / "runs")
    copy.results.write_text("{}")
    package_run(finish(run, seed=1), packaged, run.experiment)
    again = working_copy(load_run(packaged), tmp_path / "runs")
    assert again.weights.read_bytes() == (packaged / "weights.safetensors").read_bytes()
    assert not again.results.exists()


def test_a_trained_run_is_its_own_copy_and_a_foreign_folder_is_left_alone(run: Run, packaged: Path, tmp_path: Path):
    assert working_copy(run, tmp_path / "runs").folder == run.folder
    foreign = tmp_path / "runs" / "shipped" / "tiny"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"is no copy of .*move it away, or give another runs_dir"):
        working_copy(load_run(packaged), tmp_path / "runs")
    assert (foreign / "notes.txt").read_text() == "mine"


def test_a_run_without_weights_is_rejected_before_its_images_are_drawn(tmp_path: Path):
    drawn = tiny_experiment(tmp_path / "drawn", data={"generate": "easy"})
    run = create_run(drawn, tmp_path / "runs")
    with pytest.raises(RunError, match=r"no weights\.safetensors \(created\); finish the training first"):
        open_run(run.folder)
    assert not (tmp_path / "drawn").exists()


def test_the_command_gives_the_packaged_run_its_folders_name(run: Run, tmp_path: Path, command_line):
    status, output = command_line("ship", run.folder, tmp_path / "small")
    assert status == 0
    assert "images matched (0 more at the cut-off); scores within" in output
    assert load_run(tmp_path / "small").experiment.name == "small"
    assert Predictor(tmp_path / "small").experiment.name == "small"


def test_a_notebooks_experiment_names_its_run_beside_the_file_or_in_the_runs_folder(
    run: Run, packaged: Path, tmp_path: Path
):
    opened = trained_run(packaged / "experiment.yaml", [], tmp_path / "runs")
    assert experiment_run(packaged / "experiment.yaml", [], tmp_path / "runs").folder == opened.folder
    with pytest.raises(RunError, match="not a run folder"):  # another seed is another experiment
        trained_run(packaged / "experiment.yaml", ["seed=1"], tmp_path / "runs")
    assert opened.folder == tmp_path / "runs" / "shipped" / "tiny"
    experiment = tmp_path / "mine.yaml"
    experiment.write_text(run.experiment.to_yaml())
    assert trained_run(experiment, [], tmp_path / "trained").folder == run.folder
    assert run_folder(experiment, ["name=other"], tmp_path / "trained") == tmp_path / "trained" / "other"
    with pytest.raises(RunError, match=r"other: not a run folder .*runs there: tiny"):
        trained_run(experiment, ["name=other"], tmp_path / "trained")
