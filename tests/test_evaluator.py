"""From a model to its numbers: whole data sets, run folders, several processes."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rectangles import rectangle, rle_of, truth_of
from torch import nn

from solq_lab.build import build_model
from solq_lab.codecs.dct import DCTCodec
from solq_lab.config import Experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.data.transforms import TestResize
from solq_lab.evaluation import evaluator
from solq_lab.evaluation.ceiling import codec_ceiling
from solq_lab.evaluation.evaluator import evaluate_model, evaluate_run, predict_dataset, run_ceiling
from solq_lab.evaluation.results import read_results
from solq_lab.evaluation.summary import Evaluation
from solq_lab.models.weights import save_weights
from solq_lab.runs import Run, RunError, create_run
from solq_lab.structures import PIXEL_MEAN, PIXEL_STD, ImageBatch, LayerPrediction, Predictions

PICTURES = 5  # the last one without objects
MASK_SIZE, VECTOR_DIM = 16, 5
SHADE_STEP = 40


class Clairvoyant(nn.Module):
    """Predicts the ground truth of a picture, which it knows by its shade of grey, with one query per object."""

    QUERIES = 4

    def __init__(self, dataset: CocoDataset, codec: DCTCodec | None) -> None:
        super().__init__()
        self.targets = [dataset[index][1] for index in range(len(dataset))]
        self.channels, self.codec = len(dataset.classes), codec
        self.modes: list[bool] = []

    def forward(self, images: ImageBatch) -> Predictions:
        self.modes.append(self.training)
        red = (images.pixels[:, 0, 0, 0] * PIXEL_STD[0] + PIXEL_MEAN[0]) * 255
        batch = len(red)
        logits = torch.full((batch, self.QUERIES, self.channels), -9.0)
        boxes = torch.full((batch, self.QUERIES, 4), 0.5)
        vectors = torch.zeros(batch, self.QUERIES, self.codec.vector_dim) if self.codec else None
        for row, index in enumerate((red / SHADE_STEP).round().int().tolist()):
            target, count = self.targets[index], len(self.targets[index].labels)
            logits[row, range(count), target.labels] = 9.0
            boxes[row, :count] = target.boxes
            if self.codec:
                vectors[row, :count] = self.codec.encode(target.masks)
        return Predictions([LayerPrediction(logits, boxes, vectors)], None)


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory) -> Path:
    """Pictures of one shade each, with up to two objects that miss their upper left quarter."""
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    boxes = [(1, 1, (4, 4, 32, 32)), (1, 2, (40, 8, 16, 24)), (2, 1, (8, 8, 24, 16)), (3, 2, (0, 0, 40, 40))]
    document = truth_of([*boxes, (4, 1, (30, 10, 20, 30))], pictures=PICTURES)
    for entry in document["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = rle_of(rectangle(x, y, w, h) & ~rectangle(x, y, w // 2, h // 2))
        entry["bbox"] = [x + 0.13, y + 0.19, w - 0.31, h - 0.37]  # no pixel centre halfway between two mask cells
    for index, image in enumerate(document["images"]):
        shade = np.full((image["height"], image["width"], 3), index * SHADE_STEP, dtype=np.uint8)
        Image.fromarray(shade).save(root / "images" / image["file_name"])
    (root / "instances.json").write_text(json.dumps(document))
    return root


def open_dataset(root: Path) -> CocoDataset:
    return CocoDataset(
        root / "images", root / "instances.json", mask_size=MASK_SIZE, transform=TestResize(32, max_size=60)
    )


@pytest.fixture
def dataset(coco_folder: Path) -> CocoDataset:
    return open_dataset(coco_folder)


@pytest.fixture
def codec() -> DCTCodec:
    return DCTCodec(MASK_SIZE, VECTOR_DIM)


def test_a_model_that_predicts_the_truth_scores_the_ceiling_of_its_code(dataset, codec):
    _, evaluation = evaluate_model(Clairvoyant(dataset, codec), codec, dataset, batch_size=2)
    ceiling = codec_ceiling(dataset.annotations, codec)
    assert evaluation.metrics["box.AP"] == 1.0
    assert 0.5 < ceiling.metrics["boundary.AP"] < ceiling.metrics["segm.AP"] < 1.0
    for kind in ("segm", "boundary"):
        assert evaluation.metrics[f"{kind}.AP"] == pytest.approx(ceiling.metrics[f"{kind}.AP"], abs=1e-12)


def test_every_picture_is_predicted_also_one_without_objects(dataset, codec):
    predicted = list(predict_dataset(Clairvoyant(dataset, codec), codec, dataset, batch_size=2))
    assert [image_id for image_id, _ in predicted] == dataset.image_ids
    assert [(detections.scores > 0.5).sum().item() for _, detections in predicted] == [2, 1, 1, 1, 0]


def test_results_do_not_depend_on_the_batch_size(dataset, codec):
    results = [
        evaluate_model(Clairvoyant(dataset, codec), codec, dataset, batch_size=size)[0] for size in (1, 3, PICTURES)
    ]
    assert results[0] == results[1] == results[2]


def test_only_the_first_pictures_are_predicted_and_scored_where_that_is_asked(dataset, codec):
    results, evaluation = evaluate_model(Clairvoyant(dataset, codec), codec, dataset, max_images=2)
    assert {result["image_id"] for result in results} == {1, 2}
    assert evaluation.images == 2
    assert evaluation.metrics["box.AP"] == 1.0


def test_top_k_bounds_the_results_of_a_picture(dataset, codec):
    results, _ = evaluate_model(Clairvoyant(dataset, codec), codec, dataset, top_k=3)
    assert len(results) == 3 * PICTURES


def test_a_plain_detector_has_box_numbers_only(dataset):
    results, evaluation = evaluate_model(Clairvoyant(dataset, None), None, dataset)
    assert evaluation.kinds == ("box",)
    assert evaluation.metrics["box.AP"] == 1.0
    assert not any("segmentation" in result for result in results)


def test_a_model_predicts_in_evaluation_mode_and_keeps_the_mode_it_came_in(dataset, codec):
    model = Clairvoyant(dataset, codec).train()
    evaluate_model(model, codec, dataset)
    assert set(model.modes) == {False}
    assert model.training
    half_way = predict_dataset(model, codec, dataset)
    next(half_way)
    assert not torch.is_inference_mode_enabled()  # between two pictures the caller's own code runs
    half_way.close()
    assert model.training


def _evaluate_on_one_of_two(rank: int, root: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    dataset, codec = open_dataset(root), DCTCodec(MASK_SIZE, VECTOR_DIM)
    model = Clairvoyant(dataset, codec)
    results, evaluation = evaluate_model(model, codec, dataset, batch_size=2)
    said = {"results": results, "evaluation": evaluation.to_dict(), "batches": len(model.modes)}
    (root / f"rank{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_two_processes_share_the_pictures_and_score_like_one(coco_folder, dataset, codec):
    torch.multiprocessing.spawn(_evaluate_on_one_of_two, args=(coco_folder,), nprocs=2)
    main, other = (json.loads((coco_folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    results, evaluation = evaluate_model(Clairvoyant(dataset, codec), codec, dataset, batch_size=2)
    assert main["results"] == results
    assert other["results"] == []
    assert main["evaluation"] == other["evaluation"] == evaluation.to_dict()
    assert (main["batches"], other["batches"]) == (2, 1)


# Run folders


@pytest.fixture
def run(coco_folder: Path, tmp_path: Path) -> Run:
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "model": {
                "backbone": "small",
                "pretrained": "none",
                "width": 64,
                "heads": 2,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "feedforward": 32,
                "vector_hidden": 32,
                "queries": 6,
            },
            "codec": {"mask_size": MASK_SIZE, "vector_dim": VECTOR_DIM},
            "data": {
                "root": str(coco_folder),
                "train_images": "images",
                "train_annotations": "instances.json",
                "val_images": "images",
                "val_annotations": "instances.json",
                "test_scale": 32,
                "max_size": 60,
                "workers": 0,
            },
            "evaluation": {"top_k": 5, "area_sides": [16, 32], "boundary_ratio": 0.05},
        }
    )
    return create_run(experiment, tmp_path)


def write_weights(run: Run, dataset: CocoDataset, seed: int) -> None:
    torch.manual_seed(seed)
    model = build_model(run.experiment, len(dataset.classes))
    save_weights(
        run.weights, model.state_dict(), experiment=run.experiment.to_yaml(), classes=dataset.classes.to_json()
    )


def test_evaluating_a_run_leaves_detections_and_numbers_in_its_folder(run, dataset):
    write_weights(run, dataset, seed=0)
    evaluation = evaluate_run(run)
    stored = json.loads(run.results.read_text())
    assert len(read_results(run.detections)) == 5 * PICTURES
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


def test_the_training_pictures_are_evaluated_into_files_of_their_own(run, dataset):
    write_weights(run, dataset, seed=0)
    evaluation = evaluate_run(run, split="train")
    assert not run.results.exists()
    assert json.loads((run.folder / "results_train.json").read_text())["images"] == evaluation.images == PICTURES
    assert len(read_results(run.folder / "detections_train.json.gz")) == 5 * PICTURES
    assert run_ceiling(run, split="train").metrics == run_ceiling(run).metrics  # here both splits are the same pictures


def test_a_run_without_weights_says_so(run):
    with pytest.raises(RunError, match=r"no weights\.safetensors yet \(created\); finish the training first"):
        evaluate_run(run)


def test_the_ceiling_of_a_run_is_that_of_its_code_on_its_validation_pictures(run, dataset, codec):
    ceiling = run_ceiling(run)
    assert ceiling.metrics["segm.IoU"] == codec_ceiling(dataset.annotations, codec).metrics["segm.IoU"]
    assert math.isclose(ceiling.boundary_ratio, 0.05)


def test_the_ceiling_is_measured_once_and_again_only_when_what_it_depends_on_changes(run, monkeypatch):
    measured = []
    monkeypatch.setattr(
        evaluator,
        "codec_ceiling",
        lambda *args, _real=evaluator.codec_ceiling, **settings: measured.append(1) or _real(*args, **settings),
    )
    first = run_ceiling(run)
    assert run_ceiling(run).to_dict() == first.to_dict()
    assert measured == [1]
    kept = run.folder / "ceiling.json"
    stored = json.loads(kept.read_text())
    kept.write_text(json.dumps(stored | {"codec": stored["codec"] | {"vector_dim": 3}}))
    assert run_ceiling(run).to_dict() == first.to_dict()
    assert measured == [1, 1]
