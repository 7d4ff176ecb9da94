"""From a model to its numbers: whole data sets and run folders."""

import json
import math
from pathlib import Path

import pytest
import torch
from oracle_detector import MASK_SIZE, NUM_IMAGES, VECTOR_DIM, OracleDetector, open_dataset, write_coco_folder
from tiny import tiny_experiment, write_model

from solq_lab.build import build_model
from solq_lab.codecs.dct import DCTCodec
from solq_lab.config import change_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.data.coco import CocoDataset
from solq_lab.data.transforms import TestResize
from solq_lab.evaluation import evaluator
from solq_lab.evaluation.evaluator import (
    evaluate_model,
    evaluate_run,
    inputs_of_scoring,
    predict_dataset,
    stored_evaluation,
)
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.evaluation.results import read_results
from solq_lab.evaluation.summary import Evaluation
from solq_lab.runs import Run, RunError, create_run
from solq_lab.schema import EvaluationSection
from solq_lab.studies import ceiling as ceiling_module
from solq_lab.studies.ceiling import codec_ceiling, run_ceiling


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> Path:
    return write_coco_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def dataset(coco_folder: Path) -> CocoDataset:
    return open_dataset(coco_folder)


@pytest.fixture
def codec() -> DCTCodec:
    return DCTCodec(MASK_SIZE, VECTOR_DIM)


def test_a_model_that_predicts_the_truth_scores_the_ceiling_of_its_code(dataset, codec):
    _, evaluation = evaluate_model(OracleDetector(dataset, codec), codec, dataset, EvaluationSection(batch_size=2))
    ceiling = codec_ceiling(dataset.annotations, codec)
    assert evaluation.metrics["box.AP"] == 1.0
    assert 0.5 < ceiling.metrics["boundary.AP"] < ceiling.metrics["segm.AP"] < 1.0
    for kind in ("segm", "boundary"):
        assert evaluation.metrics[f"{kind}.AP"] == pytest.approx(ceiling.metrics[f"{kind}.AP"], abs=1e-12)


def test_every_image_is_predicted_also_one_without_objects(dataset, codec):
    predicted = list(predict_dataset(OracleDetector(dataset, codec), codec, dataset, EvaluationSection(batch_size=2)))
    assert [image_id for image_id, _ in predicted] == dataset.image_ids
    assert [(detections.scores > 0.5).sum().item() for _, detections in predicted] == [2, 1, 1, 1, 0]


def test_results_do_not_depend_on_the_batch_size(dataset, codec):
    results = [
        evaluate_model(OracleDetector(dataset, codec), codec, dataset, EvaluationSection(batch_size=size))[0]
        for size in (1, 3, NUM_IMAGES)
    ]
    assert results[0] == results[1] == results[2]


def test_only_the_first_images_are_predicted_and_scored_where_that_is_asked(dataset, codec):
    results, evaluation = evaluate_model(
        OracleDetector(dataset, codec), codec, dataset, EvaluationSection(max_images=2)
    )
    assert {result["image_id"] for result in results} == {1, 2}
    assert evaluation.images == 2
    assert evaluation.metrics["box.AP"] == 1.0


def test_a_split_that_lists_fewer_categories_than_the_training_is_scored_on_those(coco_folder, codec):
    classes = ClassMap(("cat", "dog", "bird"), (1, 2, 3))
    dataset = CocoDataset(
        coco_folder / "images",
        coco_folder / "instances.json",
        classes=classes,
        mask_size=MASK_SIZE,
        transform=TestResize(32, max_size=60),
    )
    results, evaluation = evaluate_model(OracleDetector(dataset, codec), codec, dataset)
    assert evaluation.metrics["box.AP"] == 1.0
    assert {result["category_id"] for result in results} == {1, 2}


def test_top_k_bounds_the_results_of_an_image(dataset, codec):
    results, evaluation = evaluate_model(OracleDetector(dataset, codec), codec, dataset, EvaluationSection(top_k=3))
    assert len(results) == 3 * NUM_IMAGES
    assert evaluation.max_detections == 3


def test_a_plain_detector_has_box_numbers_only(dataset):
    results, evaluation = evaluate_model(OracleDetector(dataset, None), None, dataset)
    assert evaluation.kinds == ("box",)
    assert evaluation.metrics["box.AP"] == 1.0
    assert not any("segmentation" in result for result in results)


def test_a_model_predicts_in_evaluation_mode_and_keeps_the_mode_it_came_in(dataset, codec):
    model = OracleDetector(dataset, codec).train()
    evaluate_model(model, codec, dataset)
    assert set(model.modes) == {False}
    assert model.training
    half_way = predict_dataset(model, codec, dataset)
    next(half_way)
    assert not torch.is_inference_mode_enabled()  # between two images the caller's own code runs
    half_way.close()
    assert model.training


def test_an_evaluation_stops_between_two_images_and_leaves_the_model_as_it_was(dataset, codec):
    model, calls = OracleDetector(dataset, codec).train(), []

    def after_two_images() -> bool:
        calls.append(1)
        return len(calls) > 2

    with pytest.raises(EvaluationStopped):
        evaluate_model(model, codec, dataset, should_stop=after_two_images)
    assert model.modes == [False, False]
    assert model.training


# Run folders


@pytest.fixture
def run(coco_folder: Path, tmp_path: Path) -> Run:
    images = {f"{split}_images": "images" for split in ("train", "val")}
    images |= {f"{split}_annotations": "instances.json" for split in ("train", "val")}
    experiment = tiny_experiment(
        coco_folder,
        model={"queries": 6},
        codec={"mask_size": MASK_SIZE, "vector_dim": VECTOR_DIM},
        data={"test_scale": 32, "max_size": 60, **images},
        evaluation={"top_k": 5, "boundary_ratio": 0.05},
    )
    return create_run(experiment, tmp_path)


def write_weights(run: Run, dataset: CocoDataset, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_model(run.experiment, len(dataset.classes))
    write_model(run.weights, run.experiment, model, classes=dataset.classes)


def test_evaluating_a_run_leaves_detections_and_numbers_in_its_folder(run, dataset):
    write_weights(run, dataset, seed=0)
    evaluation = evaluate_run(run)
    stored = json.loads(run.results.read_text())
    assert len(read_results(run.detections)) == 5 * NUM_IMAGES
    assert Evaluation.from_dict(stored).to_dict() == evaluation.to_dict()
    assert evaluation.area_sides == (16.0, 32.0)
    assert stored["settings"]["boundary_ratio"] == evaluation.boundary_ratio == 0.05


def test_a_run_is_evaluated_again_only_when_its_weights_change(run, dataset, monkeypatch):
    write_weights(run, dataset, seed=0)
    first = evaluate_run(run)
    used = []
    monkeypatch.setattr(
        evaluator, "Predictor", lambda *args, _real=evaluator.Predictor, **kw: used.append(1) or _real(*args, **kw)
    )
    assert evaluate_run(run).to_dict() == first.to_dict()
    assert used == []
    write_weights(run, dataset, seed=1)
    evaluate_run(run)
    assert used == [1]
    run.detections.unlink()
    evaluate_run(run)
    assert used == [1, 1]


@pytest.mark.parametrize(("top_k", "again"), [(100, False), (300, True)])
def test_numbers_of_an_earlier_version_are_used_where_its_limit_of_100_detections_cut_nothing(
    run, tmp_path, top_k, again
):
    experiment = change_experiment(run.experiment, {"evaluation.top_k": top_k}, source="test")
    inputs = inputs_of_scoring(experiment)
    numbers = {"metrics": {}, "per_class": {}, "area_sides": [16, 32], "boundary_ratio": 0.05, "images": 1}
    old = {name: value for name, value in inputs.items() if name in ("settings", "annotations")}
    (tmp_path / "results.json").write_text(json.dumps(numbers | old))
    assert (stored_evaluation(tmp_path / "results.json", inputs) is None) == again
    (tmp_path / "results.json").write_text(json.dumps(numbers | inputs))
    assert stored_evaluation(tmp_path / "results.json", inputs) is not None


def test_the_training_images_are_evaluated_into_files_of_their_own(run, dataset):
    write_weights(run, dataset, seed=0)
    evaluation = evaluate_run(run, split="train")
    assert not run.results.exists()
    assert json.loads((run.folder / "results_train.json").read_text())["images"] == evaluation.images == NUM_IMAGES
    assert len(read_results(run.folder / "detections_train.json.gz")) == 5 * NUM_IMAGES
    assert run_ceiling(run, split="train").metrics == run_ceiling(run).metrics  # here both splits are the same images


def test_a_run_without_weights_says_so(run):
    with pytest.raises(RunError, match=r"no weights\.safetensors yet \(created\); finish the training first"):
        evaluate_run(run)


def test_the_ceiling_of_a_run_is_that_of_its_code_on_its_validation_images(run, dataset, codec):
    ceiling = run_ceiling(run)
    assert ceiling.metrics["segm.IoU"] == codec_ceiling(dataset.annotations, codec).metrics["segm.IoU"]
    assert math.isclose(ceiling.boundary_ratio, 0.05)


def test_the_ceiling_is_measured_once_and_again_only_when_what_it_depends_on_changes(run, monkeypatch):
    measured = []
    monkeypatch.setattr(
        ceiling_module,
        "codec_ceiling",
        lambda *args, _real=codec_ceiling, **settings: measured.append(1) or _real(*args, **settings),
    )
    first = run_ceiling(run)
    assert run_ceiling(run).to_dict() == first.to_dict()
    assert measured == [1]
    kept = run.folder / "ceiling.json"
    stored = json.loads(kept.read_text())
    kept.write_text(json.dumps(stored | {"codec": stored["codec"] | {"vector_dim": 3}}))
    assert run_ceiling(run).to_dict() == first.to_dict()
    assert measured == [1, 1]
