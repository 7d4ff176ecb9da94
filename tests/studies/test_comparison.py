"""Objects are paired one to one, runs of different data are refused, and rankings are what the IoUs say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_rle
from tiny import SIDE, tiny_experiment, write_model, write_tiny_dataset

from solq_lab.build import build_images
from solq_lab.codecs.dct import DCTCodec
from solq_lab.config import Experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.masks import encode_rle
from solq_lab.runs import RunError, create_run
from solq_lab.structures import Detections
from solq_lab.studies.comparison import (
    check_comparable,
    compare_codecs,
    compare_images,
    comparison_frame,
    open_comparison,
    run_names,
)
from solq_lab.studies.pairing import UNMATCHED, overlaps, pair_objects
from solq_lab.viz.comparison import comparison_grid
from solq_lab.workbench.workspace import PHOTOGRAPHS


def objects(*boxes: tuple[int, int, int, int], labels: list[int] | None = None, masks: bool = True) -> Detections:
    """Rectangles (x, y, w, h) that fill their boxes."""
    bits = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for bitmap, (x, y, w, h) in zip(bits, boxes, strict=True):
        bitmap[y : y + h, x : x + w] = True
    corners = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=torch.float32).reshape(-1, 4)
    labels = labels or [0] * len(boxes)
    rles = encode_rle(bits) if masks else None
    rows = torch.arange(len(boxes))
    return Detections(1 - 0.1 * rows, torch.tensor(labels, dtype=torch.long), corners, rows, rles, ["cat"] * len(boxes))


def test_pairs_are_one_to_one_of_one_class_and_overlap_most_in_all():
    truth = objects((0, 0, 20, 20), (0, 10, 20, 20), (38, 0, 10, 10), labels=[0, 0, 1])
    # The first detection fits both of the first two objects; the second fits only the first of them.
    found = objects((0, 5, 20, 20), (0, 0, 20, 17), (38, 0, 10, 10), (38, 0, 10, 9), labels=[0, 0, 0, 1])
    partners, ious = pair_objects(found, truth)
    assert partners.tolist() == [1, 0, 3]
    np.testing.assert_allclose(ious, [17 / 20, 15 / 25, 9 / 10], rtol=1e-6)


def test_what_overlaps_too_little_is_unmatched():
    partners, ious = pair_objects(objects((0, 0, 10, 10)), objects((5, 0, 10, 10)))
    assert partners.tolist() == [UNMATCHED]
    assert ious.tolist() == [0.0]


def test_images_without_detections_or_objects_have_no_pairs():
    assert pair_objects(objects(), objects((0, 0, 5, 5)))[0].tolist() == [UNMATCHED]
    assert pair_objects(objects((0, 0, 5, 5)), objects())[0].shape == (0,)
    assert overlaps(objects((0, 0, 5, 5), masks=False), objects((0, 0, 5, 5)), by="mask").tolist() == [[0.0]]


class FakePredictor:
    """Predicts given detections, image after image."""

    def __init__(self, root: Path, *answers: Detections, **sections) -> None:
        self.experiment, self._answers = tiny_experiment(root, **sections), iter(answers)

    def predict(self, image: np.ndarray) -> Detections:
        return next(self._answers)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_dataset(tmp_path / "images")


@pytest.fixture
def dataset(root: Path, monkeypatch):
    images = build_images(tiny_experiment(root))
    truths = [objects((0, 0, 10, 10)), objects((0, 0, 10, 10), (20, 20, 10, 10)), objects()]
    monkeypatch.setattr(images, "objects", lambda index: truths[index])
    return images


def test_images_are_ranked_by_the_difference_of_the_mean_iou(root, dataset):
    close, loose, none = objects((0, 0, 10, 10)), objects((0, 0, 10, 8)), objects()
    predictors = {"SOLQ": FakePredictor(root, loose, close, none), "SQR": FakePredictor(root, close, none, none)}
    compared = compare_images(predictors, dataset, max_images=3)
    assert [image.image_index for image in compared] == [1, 2, 0]
    assert [image.gain for image in compared] == pytest.approx([0.5, 0.0, -0.2])
    frame = comparison_frame(compared)
    assert frame.loc["SOLQ"].tolist() == pytest.approx([3, 2, 1, 80.0, 0.0])
    assert frame.loc["SQR"].tolist() == pytest.approx([3, 1, 0, 100.0, 100.0])
    titles = [axes.get_title() for axes in comparison_grid(compared, title="a").axes]
    assert titles[:3] == ["ground truth", "SOLQ: IoU 50 %", "SQR: IoU 0 %"]


def test_one_run_alone_is_ranked_by_its_own_iou(root, dataset):
    answers = FakePredictor(root, objects((0, 0, 10, 8)), objects(), objects())
    compared = compare_images({"SOLQ": answers}, dataset, max_images=3)
    assert [image.gain for image in compared] == pytest.approx([0.8, 0.0, 0.0])
    assert comparison_frame(compared).loc["SOLQ", ["found", "IoU of shared, %"]].tolist() == pytest.approx([1, 80.0])


def test_a_model_without_masks_is_compared_by_boxes(root, dataset):
    plain = FakePredictor(root, *[objects((0, 0, 10, 8), masks=False)] * 3, codec={"kind": "none"})
    compared = compare_images({"Deformable DETR": plain}, dataset, max_images=1)
    assert compared[0].mean_iou("Deformable DETR") == pytest.approx(0.8)


def test_nothing_to_compare_is_an_empty_figure():
    assert comparison_frame([]).empty
    assert comparison_grid([], title="none").axes


def test_runs_are_called_by_their_methods_unless_these_are_the_same(root, tmp_path):
    solq = create_run(tiny_experiment(root, name="a"), tmp_path / "runs")
    again = create_run(tiny_experiment(root, name="b"), tmp_path / "runs")
    plain = create_run(tiny_experiment(root, name="c", codec={"kind": "none"}), tmp_path / "runs")
    assert run_names([solq, plain]) == ["SOLQ", "Deformable DETR"]
    assert run_names([solq, again]) == ["a", "b"]
    elsewhere = create_run(tiny_experiment(root, name="a"), tmp_path / "others")
    assert run_names([solq, elsewhere]) == [str(solq.folder), str(elsewhere.folder)]
    assert Experiment(name="d", model={"mask_branch": "sqr"}, codec={"kind": "none"}).method == "SQR"


def test_runs_of_different_data_are_refused(root, tmp_path):
    first = create_run(tiny_experiment(root, name="a"), tmp_path / "runs")
    same = create_run(tiny_experiment(root, name="b"), tmp_path / "runs")
    check_comparable([first, same])
    check_comparable([first])
    other_root = write_tiny_dataset(tmp_path / "others", val=2)
    other = create_run(tiny_experiment(other_root, name="c", data={"class_ids": "raw"}), tmp_path / "runs")
    with pytest.raises(RunError, match=r"different validation annotations .*json\) and the numbers of classes"):
        check_comparable([first, other])


def test_a_second_run_that_is_missing_is_named_and_the_first_one_shown(root, tmp_path):
    experiment = tiny_experiment(root)
    run = create_run(experiment, tmp_path / "runs")
    write_model(run.weights, experiment)
    run.write_status("finished", step=1200)
    comparison = open_comparison(run.folder / "experiment.yaml", tmp_path / "none.yaml", runs_dir=tmp_path / "runs")
    assert "1,200 steps" in str(comparison)
    assert "WARNING" not in str(comparison)
    shorter = create_run(experiment.model_copy(update={"name": "shorter"}), tmp_path / "runs")
    assert "WARNING: SOLQ was trained for more steps" in str(
        comparison._replace(runs=[run, shorter], predictors=comparison.predictors | {"SQR": None})
    )
    assert list(comparison.predictors) == ["SOLQ"]
    assert str(comparison).startswith(f"SOLQ: {run.folder}")
    assert "none.yaml is missing, so one run is shown" in str(comparison)
    with pytest.raises(RunError, match=r"a run cannot be compared with itself; name another run's experiment\.yaml"):
        open_comparison(run.folder / "experiment.yaml", run.folder / "experiment.yaml", runs_dir=tmp_path / "runs")


def test_a_third_run_stands_beside_the_others_unless_its_images_are_others(root, tmp_path, caplog):
    others = write_tiny_dataset(tmp_path / "others", val=2)
    files = {}
    for name, data in (("first", root), ("third", root), ("elsewhere", others)):
        experiment = tiny_experiment(data, name=name)
        run = create_run(experiment, tmp_path / "runs")
        write_model(run.weights, experiment)
        run.write_status("finished", step=10)
        files[name] = run.folder / "experiment.yaml"

    for third, shown in (("third", ["first", "third"]), ("first", ["SOLQ"]), ("elsewhere", ["SOLQ"])):
        comparison = open_comparison(files["first"], "", third=files[third], runs_dir=tmp_path / "runs")
        assert list(comparison.predictors) == shown
    assert "left out" in caplog.text
    assert "different validation annotations" in caplog.text


def test_the_photographs_are_small_and_longer_codes_keep_more_of_each_of_their_objects():
    dataset = CocoDataset(PHOTOGRAPHS, PHOTOGRAPHS / "photographs.json", mask_size=64)
    sizes = [(PHOTOGRAPHS / dataset.file_name(image)).stat().st_size for image in dataset.image_ids]
    assert len(sizes) == 3
    assert max(sizes) <= 200_000

    images = compare_codecs({str(length): DCTCodec(64, length) for length in (16, 256)}, dataset)
    assert sum(len(image.ground_truth) for image in images) == 10
    for image in images:
        overlaps = coco_rle.iou(image.detections["16"].masks, image.ground_truth.masks, [0] * len(image.ground_truth))
        np.testing.assert_allclose(image.ious["16"], overlaps.diagonal())
        assert (image.ious["256"] > image.ious["16"]).all()
        assert image.ious["256"].min() > 0.9
