"""Scores: against the reference numbers, against pycocotools, and where there is nothing to score."""

import copy
import dataclasses
import gc
import json
import math
import random
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as faster_rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rectangles import many_objects, rectangle, result_of, truth_of
from scipy import ndimage

from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.data.annotations import DataError
from solq_lab.data.classes import UNUSED, ClassMap
from solq_lab.evaluation.coco import KINDS, evaluate_results
from solq_lab.evaluation.results import detections_to_results, read_results, write_results
from solq_lab.evaluation.summary import AP_COLUMNS, AR_COLUMNS, Evaluation
from solq_lab.schema import EvaluationSection
from solq_lab.structures import Detections
from solq_lab.studies.ceiling import codec_ceiling

NUMBERS = AP_COLUMNS + AR_COLUMNS


def perfect_results(document: dict) -> list[dict]:
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "segmentation": faster_rle.segmToRle(entry["segmentation"], *reversed(sizes[entry["image_id"]])),
            "score": 1.0,
        }
        for entry in document["annotations"]
        if not entry["iscrowd"]
    ]


def numbers(evaluation: Evaluation, kind: str) -> np.ndarray:
    return np.array([evaluation.metrics[f"{kind}.{number}"] for number in NUMBERS])


def pycocotools_evaluation(
    path: Path, results: list[dict], kind: str, *, sides: tuple[float, float] = (32.0, 96.0), limit: int = 100
) -> COCOeval:
    """pycocotools after it has scored results, a segmentation without its box."""
    dropped = {"box": "segmentation", "segm": "bbox"}[kind]
    results = [{key: value for key, value in result.items() if key != dropped} for result in results]
    truth = COCO(str(path))
    evaluator = COCOeval(truth, truth.loadRes(results), {"box": "bbox", "segm": "segm"}[kind])
    small, medium = (side**2 for side in sides)
    evaluator.params.areaRng = [[0, 1e10], [0, small], [small, medium], [medium, 1e10]]
    evaluator.params.maxDets = [1, 10, limit]
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


@pytest.fixture(scope="module")
def tiny_annotations(coco_tiny: Path) -> Path:
    return coco_tiny / "annotations" / "instances_val2017.json"


@pytest.fixture(scope="module")
def tiny_document(tiny_annotations: Path) -> dict:
    return json.loads(tiny_annotations.read_text())


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> dict:
    return json.loads((golden_root / "parts_boundary_ap" / "fixture.json").read_text())


@pytest.fixture(scope="module")
def golden_detections(golden_root: Path) -> list[dict]:
    return read_results(golden_root / "parts_boundary_ap" / "detections.json")


# The same numbers as everybody


@pytest.mark.golden
def test_golden_boxes_masks_and_boundaries_have_the_reference_numbers(golden, golden_detections, tiny_annotations):
    evaluation = evaluate_results(tiny_annotations, golden_detections)
    assert tuple(golden["order"]) == NUMBERS
    np.testing.assert_allclose(numbers(evaluation, "box"), golden["bbox"], atol=1e-12)
    np.testing.assert_allclose(numbers(evaluation, "segm"), golden["segm_area_from_mask"], atol=1e-12)
    np.testing.assert_allclose(numbers(evaluation, "boundary"), golden["boundary_0.02"], atol=1e-12)
    narrow = evaluate_results(
        tiny_annotations, golden_detections, EvaluationSection(boundary_ratio=0.005), kinds=["boundary"]
    )
    np.testing.assert_allclose(numbers(narrow, "boundary"), golden["boundary_0.005"], atol=1e-12)


@pytest.mark.golden
def test_golden_boundaries_have_the_reference_pixel_counts(golden, tiny_document):
    objects = {entry["id"]: entry for entry in tiny_document["annotations"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in tiny_document["images"]}
    for annotation_id, mask_pixels, boundary_pixels in golden["boundary_pixel_counts_first_20_gt"]:
        entry = objects[annotation_id]
        rle = faster_rle.segmToRle(entry["segmentation"], *sizes[entry["image_id"]])
        assert faster_rle.area(rle) == mask_pixels
        assert faster_rle.area(faster_rle.rleToBoundary(rle, 0.02)) == boundary_pixels


@pytest.mark.parametrize("sides", [(32.0, 96.0), (50.0, 200.0)])
def test_pycocotools_gives_the_same_numbers(tiny_annotations, golden_detections, sides):
    evaluation = evaluate_results(
        tiny_annotations, golden_detections, EvaluationSection(area_sides=sides), kinds=["box", "segm"]
    )
    for kind in ("box", "segm"):
        expected = pycocotools_evaluation(tiny_annotations, golden_detections, kind, sides=sides)
        expected.summarize()
        np.testing.assert_allclose(numbers(evaluation, kind), expected.stats, atol=1e-6)


def test_boundaries_are_made_of_masks_that_can_match_only():
    truth = truth_of([(1, 1, (8, 8, 20, 20)), (1, 2, (40, 8, 16, 24))])
    found = [(1, 1, (8, 8, 20, 18)), (1, 1, (9, 26, 20, 20)), (1, 2, (8, 8, 20, 18))]  # near, off, of the other class
    with patch.object(faster_rle, "rleToBoundary", side_effect=faster_rle.rleToBoundary) as made:
        evaluation = evaluate_results(truth, [result_of(*one) for one in found], kinds=["boundary"])
    assert made.call_count == 2
    assert evaluation.metrics["boundary.AP50"] == pytest.approx(0.5)


def test_a_pair_counts_by_the_smaller_of_mask_and_boundary_iou():
    truth_box, found_box = (8, 8, 40, 30), (8, 8, 40, 26)
    boundary_ratio = 0.05  # of a diagonal of 80 pixels: erosions by 4 pixels

    def boundary(bitmap: np.ndarray) -> np.ndarray:
        return bitmap & ~ndimage.binary_erosion(bitmap, np.ones((3, 3)), iterations=4, border_value=0)

    def iou(one: np.ndarray, other: np.ndarray) -> float:
        return (one & other).sum() / (one | other).sum()

    truth_mask, found_mask = rectangle(*truth_box), rectangle(*found_box)
    pair = min(iou(truth_mask, found_mask), iou(boundary(truth_mask), boundary(found_mask)))
    assert 0.5 < pair < 0.8 < iou(truth_mask, found_mask)
    evaluation = evaluate_results(
        truth_of([(1, 1, truth_box)]), [result_of(1, 1, found_box)], EvaluationSection(boundary_ratio=boundary_ratio)
    )
    thresholds = np.arange(50, 100, 5) / 100
    assert evaluation.metrics["boundary.AP"] == pytest.approx((thresholds <= pair).mean())
    assert evaluation.metrics["segm.AP"] == pytest.approx((thresholds <= iou(truth_mask, found_mask)).mean())


# What must hold


def test_perfect_detections_score_one_in_every_kind_and_class(tiny_document):
    evaluation = evaluate_results(tiny_document, perfect_results(tiny_document))
    for kind in KINDS:
        assert all(evaluation.metrics[f"{kind}.{number}"] == 1 for number in AP_COLUMNS)
    assert {row["segm.AP"] for row in evaluation.per_class.values() if not math.isnan(row["segm.AP"])} == {1.0}


def test_the_order_of_results_does_not_matter(tiny_annotations, golden_detections):
    shuffled = random.Random(0).sample(golden_detections, len(golden_detections))
    one, other = (evaluate_results(tiny_annotations, results) for results in (golden_detections, shuffled))
    assert one.to_dict() == other.to_dict()


def test_inputs_are_left_as_they_are(tiny_document, golden_detections):
    document, results = copy.deepcopy(tiny_document), copy.deepcopy(golden_detections)
    evaluate_results(document, results)
    assert document == tiny_document
    assert results == golden_detections


def test_the_mean_over_classes_is_the_overall_number(tiny_annotations, golden_detections):
    evaluation = evaluate_results(tiny_annotations, golden_detections)
    for kind in KINDS:
        for number in AP_COLUMNS:
            name = f"{kind}.{number}"
            mean = np.nanmean([row[name] for row in evaluation.per_class.values()])
            assert evaluation.metrics[name] == pytest.approx(mean, abs=1e-12)


def test_only_the_asked_images_count(tiny_document, golden_detections):
    chosen = sorted(image["id"] for image in tiny_document["images"])[:10]
    smaller = {
        key: [entry for entry in tiny_document[key] if entry.get("image_id", entry["id"]) in chosen]
        for key in ("images", "annotations")
    }
    smaller["categories"] = tiny_document["categories"]
    of_them = [result for result in golden_detections if result["image_id"] in chosen]
    expected = evaluate_results(smaller, of_them, kinds=["segm"])
    found = evaluate_results(tiny_document, golden_detections, kinds=["segm"], image_ids=chosen)
    assert found.to_dict() == expected.to_dict()
    assert found.images == 10


def test_an_annotation_with_id_zero_is_found_like_any_other():
    truth = truth_of([(1, 1, (4, 4, 20, 20)), (2, 1, (4, 4, 20, 20))])
    assert truth["annotations"][0]["id"] == 0
    assert evaluate_results(truth, perfect_results(truth)).metrics["segm.AP"] == 1


def test_the_size_of_an_object_is_counted_in_the_given_sides():
    truth = truth_of([(1, 1, (0, 0, 10, 10)), (1, 1, (20, 20, 20, 20)), (2, 1, (0, 0, 40, 40))])
    results = perfect_results(truth)[1:]  # the 10 x 10 object is missed
    metrics = evaluate_results(truth, results, EvaluationSection(area_sides=(16, 32))).metrics
    assert [metrics[f"segm.AP{size}"] for size in "sml"] == [0.0, 1.0, 1.0]
    metrics = evaluate_results(truth, results).metrics  # 32 and 96: two small objects of three are not both found
    assert metrics["segm.APs"] < 1
    assert math.isnan(metrics["segm.APl"])


def test_a_missing_area_is_the_mask_area():
    truth = truth_of([(1, 1, (4, 4, 20, 20))])
    without = copy.deepcopy(truth)
    del without["annotations"][0]["area"]
    results = perfect_results(truth)
    assert evaluate_results(without, results).to_dict() == evaluate_results(truth, results).to_dict()


def test_detections_inside_a_crowd_are_neither_right_nor_wrong():
    truth = truth_of([(1, 1, (0, 0, 10, 10)), (1, 1, (20, 0, 40, 40))])
    truth["annotations"][1]["iscrowd"] = 1
    in_the_crowd = result_of(1, 1, (22, 4, 10, 10), score=0.99)
    evaluation = evaluate_results(truth, [in_the_crowd, *perfect_results(truth)])
    assert [evaluation.metrics[f"{kind}.AP"] for kind in KINDS] == [1.0, 1.0, 1.0]


# Nothing to score


def test_no_results_score_zero_where_there_are_objects():
    evaluation = evaluate_results(truth_of([(1, 1, (4, 4, 20, 20))]), [])
    assert evaluation.metrics["segm.AP"] == evaluation.metrics["box.AR100"] == 0.0
    assert math.isnan(evaluation.metrics["segm.APl"])
    assert evaluation.per_class["cat"]["segm.AP"] == 0.0
    assert math.isnan(evaluation.per_class["dog"]["segm.AP"])


@pytest.mark.parametrize("results", [[], [result_of(1, 1, (4, 4, 20, 20))]])
def test_without_objects_nothing_is_defined_and_the_table_shows_dashes(results):
    evaluation = evaluate_results(truth_of([]), results)
    assert all(math.isnan(value) for value in evaluation.metrics.values())
    rows = evaluation.table().splitlines()[1:4]
    assert [row.split()[0] for row in rows] == list(KINDS)
    assert all(set(row.split()[1:]) == {"-"} for row in rows)
    assert evaluation.class_frame("segm").empty
    assert evaluation.class_table("segm") == "no class has ground truth here"


def test_a_false_alarm_in_an_image_without_objects_costs():
    truth = truth_of([(1, 1, (4, 4, 20, 20))])
    alarm = result_of(2, 1, (4, 4, 20, 20), score=0.99)
    assert evaluate_results(truth, [*perfect_results(truth), alarm]).metrics["box.AP"] == 1.0  # score 1.0 comes first
    late = [result | {"score": 0.5} for result in perfect_results(truth)]
    assert evaluate_results(truth, [*late, alarm]).metrics["box.AP"] == pytest.approx(0.5)


def test_no_images_asked_gives_no_numbers():
    evaluation = evaluate_results(truth_of([(1, 1, (4, 4, 20, 20))]), [], image_ids=[])
    assert evaluation.images == 0
    assert math.isnan(evaluation.metrics["box.AP"])


# The numbers as text


def test_the_table_is_aligned_percent_and_says_what_small_is():
    truth = truth_of([(1, 1, (0, 0, 10, 10)), (1, 2, (20, 20, 20, 20))])
    settings = EvaluationSection(area_sides=(16, 32), boundary_ratio=0.025)
    evaluation = evaluate_results(truth, perfect_results(truth)[:1], settings)
    header, box, segm, boundary, legend = evaluation.table().splitlines()
    assert header.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    assert box.split() == ["box", "50.0", "50.0", "50.0", "100.0", "0.0", "-", "50.0"]
    assert len({len(line) for line in (header, box, segm, boundary)}) == 1
    assert (
        legend
        == "2 images, percent; s: below 16x16 pixels, m: below 32x32, l: the rest; boundary: 2.5 % of the diagonal"
    )


def test_the_ceiling_stands_row_by_row_below_the_numbers():
    truth = truth_of([(1, 1, (0, 0, 10, 10))])
    evaluation, ceiling = evaluate_results(truth, []), codec_ceiling(truth, DCTCodec(8, 64))
    frame = evaluation.frame(ceiling=ceiling)
    assert list(frame.index) == ["box", "segm", "segm ceiling", "boundary", "boundary ceiling"]
    assert frame.loc["segm ceiling", "AP"] == 100 * ceiling.metrics["segm.AP"]


def test_classes_are_listed_best_first_and_equal_names_are_told_apart():
    truth = truth_of([(1, 1, (0, 0, 10, 10)), (1, 2, (20, 20, 20, 20))])
    evaluation = evaluate_results(truth, perfect_results(truth)[1:])
    assert list(evaluation.class_frame("box").index) == ["dog", "cat"]
    assert [line.split()[0] for line in evaluation.class_table("box").splitlines()] == ["box,", "dog", "cat"]
    truth["categories"][1]["name"] = "cat"
    assert set(evaluate_results(truth, []).per_class) == {"cat (1)", "cat (2)"}
    with pytest.raises(ValueError, match="no 'segm' in this evaluation; it has box"):
        evaluate_results(truth, [], kinds=["box"]).class_frame("segm")


def test_an_evaluation_survives_strict_json():
    evaluation = evaluate_results(truth_of([(1, 1, (0, 0, 10, 10))]), [])
    stored = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert Evaluation.from_dict(stored).to_dict() == evaluation.to_dict()
    assert Evaluation.from_dict(stored).area_sides == evaluation.area_sides


# Results in files


def test_results_survive_a_file_and_equal_results_give_equal_bytes(tmp_path):
    results = [result_of(1, 1, (4, 4, 20, 20), score=1 / 3)]
    for name in ("results.json", "results.json.gz"):
        write_results(tmp_path / name, results)
        assert read_results(tmp_path / name) == results
    first = (tmp_path / "results.json.gz").read_bytes()
    write_results(tmp_path / "results.json.gz", results)
    assert (tmp_path / "results.json.gz").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.json.gz"]


def test_a_mask_submission_carries_no_boxes_and_a_box_submission_no_masks(tmp_path):
    results = [result_of(1, 1, (4, 4, 20, 20))]
    write_results(tmp_path / "masks.json", results, kind="segm")
    write_results(tmp_path / "boxes.json", results, kind="box")
    assert set(read_results(tmp_path / "masks.json")[0]) == {"image_id", "category_id", "score", "segmentation"}
    assert set(read_results(tmp_path / "boxes.json")[0]) == {"image_id", "category_id", "score", "bbox"}
    assert "bbox" in results[0]
    boxes_only = read_results(tmp_path / "boxes.json")
    with pytest.raises(ValueError, match="needs 'segmentation' in every result"):
        write_results(tmp_path / "masks.json", boxes_only, kind="segm")


def test_detections_become_results_in_coco_spelling():
    detections = Detections(
        scores=torch.tensor([0.75, 0.5, 0.25]),
        labels=torch.tensor([2, 1, 0]),
        boxes=torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 1.0, 1.0], [-2.0, 0.0, 3.0, 1.0]]),
        queries=torch.tensor([5, 5, 0]),
        masks=[{"size": [4, 4], "counts": b"04d0"}] * 3,
        names=["dog", "", "cat"],
    )
    classes = ClassMap(names=("cat", "", "dog"), category_ids=(7, UNUSED, 9))
    first, last = detections_to_results(detections, 42, classes)  # channel 1 is no category
    assert first == {
        "image_id": 42,
        "category_id": 9,
        "bbox": [1.0, 2.0, 3.0, 6.0],
        "score": 0.75,
        "segmentation": {"size": [4, 4], "counts": "04d0"},
    }
    assert (last["category_id"], last["bbox"]) == (7, [-2.0, 0.0, 5.0, 1.0])
    assert "segmentation" not in detections_to_results(dataclasses.replace(detections, masks=None), 42, classes)[0]


# A code's ceiling


def test_more_coefficients_raise_the_ceiling(tiny_annotations):
    some = EvaluationSection(max_images=12)
    ceilings = [codec_ceiling(tiny_annotations, DCTCodec(32, n), some).metrics for n in (4, 16, 64, 256)]
    for name in ("segm.IoU", "segm.AP", "boundary.AP"):
        values = [metrics[name] for metrics in ceilings]
        assert values == sorted(values)
        assert len(set(values)) == 4


def test_the_ceiling_ignores_crowds_and_looks_only_at_the_asked_images():
    truth = truth_of([(1, 1, (8, 8, 16, 16)), (2, 1, (4, 4, 16, 16))])
    truth["annotations"][0]["iscrowd"] = 1
    codec = DCTCodec(16, 256)
    assert codec_ceiling(truth, codec).metrics["segm.AP"] == 1.0
    of_the_crowd = codec_ceiling(truth, codec, EvaluationSection(max_images=1))
    assert of_the_crowd.images == 1
    assert math.isnan(of_the_crowd.metrics["segm.IoU"])
    assert math.isnan(of_the_crowd.metrics["segm.AP"])


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "result 0: image 99 is not in annotations"),
        ({"category_id": 0}, r"category_id 0 is not in annotations; allowed are \[1, 2\]. Were class channels written"),
        ({"score": math.nan}, r"result 0: score nan \(image 1\); allowed are finite numbers"),
        ({"segmentation": [[0, 0, 4, 0, 4, 4]]}, "allowed is a compressed RLE"),
        ({"segmentation": {"size": [64, 48], "counts": "0"}}, r"mask of size \[64, 48\], but image 1 has height and"),
    ],
)
def test_an_unusable_result_is_named(change, message):
    truth = truth_of([(1, 1, (4, 4, 20, 20))])
    with pytest.raises(DataError, match=message):
        evaluate_results(truth, [result_of(1, 1, (4, 4, 20, 20)) | change])


def test_scoring_leaves_the_garbage_collector_as_it_was():
    truth, result = truth_of([(1, 1, (4, 4, 20, 20))]), result_of(1, 1, (4, 4, 20, 20))
    for enabled in (True, False, True):
        (gc.enable if enabled else gc.disable)()
        evaluate_results(truth, [result])
        with pytest.raises(DataError):
            evaluate_results(truth, [result | {"score": math.nan}])
        assert gc.isenabled() == enabled


def test_scoring_masks_of_a_plain_detector_says_to_leave_them_out():
    truth = truth_of([(1, 1, (4, 4, 20, 20))])
    result = {"image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "score": 0.5}
    assert evaluate_results(truth, [result], kinds=["box"]).metrics["box.AP"] == 1
    with pytest.raises(DataError, match=r"result 0: no 'segmentation'.*Leave out kinds that were not predicted"):
        evaluate_results(truth, [result])


def test_ground_truth_without_masks_or_images_is_named():
    truth = truth_of([(1, 1, (4, 4, 20, 20))])
    with pytest.raises(DataError, match="no image of id 7; image_ids are those of this file"):
        evaluate_results(truth, [], image_ids=[7])
    del truth["annotations"][0]["segmentation"]
    assert evaluate_results(truth, [], kinds=["box"]).metrics["box.AP"] == 0
    with pytest.raises(DataError, match="none of the 1 objects can be learnt: 1 without segmentation"):
        evaluate_results(truth, [])


def test_unknown_kinds_are_refused():
    truth = truth_of([])
    with pytest.raises(ValueError, match=r"kinds \['bbox'\]: allowed are box, segm, boundary"):
        evaluate_results(truth, [], kinds=["bbox"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b"{}", "found a dict, allowed is a list of results"),
        ("r.json", b"[1]", "result 0 lacks image_id, category_id, score: 1"),
        ("r.json", b'[{"image_id": 1, "category_id": 1, "score": 1}]', "result 0 lacks bbox or segmentation"),
        ("r.json", b"[{", "cannot be read as COCO results"),
        ("r.json.gz", b"[]", "cannot be read as COCO results"),
    ],
)
def test_a_malformed_result_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_results(tmp_path / name)


def test_a_missing_file_and_another_ending_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"kept as \.json or \.json\.gz"):
        write_results(tmp_path / "results.txt", [])
    with pytest.raises(DataError, match=r"absent\.json"):
        evaluate_results(tmp_path / "absent.json", [])


# More than a hundred objects of a class in an image


@pytest.mark.parametrize("limit", [30, 100, 120, 500])
@pytest.mark.parametrize("kind", ["box", "segm"])
def test_as_many_detections_are_scored_as_pycocotools_scores_with_that_limit(tmp_path, kind, limit):
    truth, results = many_objects()
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    evaluator = pycocotools_evaluation(path, results, kind, limit=limit)
    precision, recall = evaluator.eval["precision"][:, :, 0, 0, -1], evaluator.eval["recall"][:, 0, 0, :]

    found = evaluate_results(truth, results, EvaluationSection(top_k=limit), kinds=[kind])
    assert found.metrics[f"{kind}.AP"] == pytest.approx(precision.mean(), abs=1e-12)
    assert found.metrics[f"{kind}.AR10"] == pytest.approx(recall[:, 1].mean(), abs=1e-12)
    assert found.metrics[f"{kind}.ARs"] == pytest.approx(recall[:, 2].mean(), abs=1e-12)
    if limit <= 100:
        assert found.metrics[f"{kind}.AR100"] == found.metrics[f"{kind}.ARs"]


def test_the_limit_of_detections_is_named_below_the_table_where_it_is_not_cocos():
    truth, results = many_objects()
    standard, wide = (
        evaluate_results(truth, results, EvaluationSection(top_k=limit), kinds=["box"]) for limit in (100, 500)
    )
    assert wide.metrics["box.AP"] > standard.metrics["box.AP"]
    assert wide.metrics["box.AR100"] == standard.metrics["box.AR100"] < wide.metrics["box.ARs"]
    assert "detections" not in standard.legend
    assert wide.legend.endswith("; at most 500 detections of a class in an image")
    assert Evaluation.from_dict(wide.to_dict()) == wide
    of_old = {name: value for name, value in standard.to_dict().items() if name != "max_detections"}
    assert Evaluation.from_dict(of_old) == standard


def test_the_ceiling_is_of_the_codec_whatever_the_number_of_objects():
    ceiling = codec_ceiling(many_objects()[0], FlattenCodec(8, 64))
    assert ceiling.metrics["segm.IoU"] == ceiling.metrics["segm.AP"] == ceiling.metrics["boundary.AP"] == 1.0
    assert ceiling.kinds == ("segm", "boundary")
