"""The paired bootstrap: its AP is COCO's, on all images and on any draw, and its interval says what it should."""

import copy

import numpy as np
import pytest
from rectangles import HEIGHT, WIDTH, many_objects, result_of, rle_of, truth_of
from tiny import SIDE, tiny_experiment, write_tiny_dataset

from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.results import write_results
from solq_lab.files import hash_file, write_json
from solq_lab.runs import RunError, create_run
from solq_lab.schema import EvaluationSection
from solq_lab.studies.bootstrap import compare_results, compare_runs, match_results, precision_on_draws

NUM_IMAGES = 12


def scene(seed: int, *, noise: float, num_images: int = NUM_IMAGES) -> tuple[dict, list[dict]]:
    """Ground truth of random rectangles with a few crowds, and results that miss, shift, repeat and confuse them."""
    truth_random, random = np.random.default_rng(0), np.random.default_rng(seed)
    objects, results = [], []
    for image in range(1, num_images + 1):
        for _ in range(truth_random.integers(0, 5)):
            w, h = truth_random.integers(6, 20, 2).tolist()
            x, y = int(truth_random.integers(0, WIDTH - w)), int(truth_random.integers(0, HEIGHT - h))
            category = int(truth_random.integers(1, 3))
            objects.append((image, category, (x, y, w, h)))
            for _ in range(int(random.integers(0, 3))):
                dx, dy = np.rint(random.normal(0, noise, 2)).astype(int).tolist()
                box = (min(max(x + dx, 0), WIDTH - w), min(max(y + dy, 0), HEIGHT - h), w, h)
                predicted = category if random.random() < 0.8 else 3 - category
                results.append(result_of(image, predicted, box, random.random()))
    truth = truth_of(objects, num_images)
    for entry in truth["annotations"][::7]:
        entry["iscrowd"] = 1
    return truth, results


def repeated(truth: dict, results: list[dict], counts: list[int]) -> tuple[dict, list[dict]]:
    """The data set in which every image is there as often as a draw counts it, under ids of its own."""
    images, annotations, found = [], [], []
    for image, count in zip(truth["images"], counts, strict=True):
        for _ in range(count):
            new = len(images) + 1
            images.append(image | {"id": new})
            for entry in (entry for entry in truth["annotations"] if entry["image_id"] == image["id"]):
                annotations.append(entry | {"image_id": new, "id": len(annotations) + 1})
            found += [result | {"image_id": new} for result in results if result["image_id"] == image["id"]]
    return truth | {"images": images, "annotations": annotations}, found


@pytest.mark.parametrize("limit", [60, 100, 500])
def test_as_many_detections_count_as_the_evaluation_scores(limit):
    truth, results = many_objects()
    settings = EvaluationSection(top_k=limit)
    expected = evaluate_results(truth, results, settings, kinds=["segm"]).metrics["segm.AP"]
    found = compare_results(truth, results, results, settings, kinds=["segm"], draws=5).differences
    assert found.loc["segm.AP", "first"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["box", "segm", "boundary"])
def test_on_all_images_the_ap_is_that_of_the_evaluation(kind):
    truth, results = scene(1, noise=1.5)
    expected = evaluate_results(truth, results, kinds=[kind]).metrics
    assert 0.05 < expected[f"{kind}.AP"] < 0.95
    drawn = precision_on_draws(match_results(truth, results, kind=kind), np.ones((1, NUM_IMAGES)))[0]
    assert drawn.mean() == pytest.approx(expected[f"{kind}.AP"], abs=1e-12)
    assert drawn[0] == pytest.approx(expected[f"{kind}.AP50"], abs=1e-12)
    assert drawn[5] == pytest.approx(expected[f"{kind}.AP75"], abs=1e-12)


def test_on_a_draw_the_ap_is_that_of_a_data_set_with_the_drawn_images():
    truth, results = scene(2, noise=1.5)
    counts = np.random.default_rng(3).multinomial(NUM_IMAGES, np.full(NUM_IMAGES, 1 / NUM_IMAGES), size=5)
    drawn = precision_on_draws(match_results(truth, results, kind="segm"), counts)
    for row, count in zip(drawn, counts.tolist(), strict=True):
        expected = evaluate_results(*repeated(truth, results, count), kinds=["segm"]).metrics
        assert row.mean() == pytest.approx(expected["segm.AP"], abs=1e-12)


def test_equal_runs_differ_by_nothing_at_all():
    truth, results = scene(4, noise=1.0)
    for row in compare_results(truth, results, copy.deepcopy(results), draws=50).differences.itertuples():
        assert (row.change, row.low, row.high, row.better) == (0.0, 0.0, 0.0, 0.0)
        assert not row.clear


def test_a_clearly_better_run_has_its_interval_above_zero_and_the_worse_one_below():
    truth, worse = scene(5, noise=4.0, num_images=40)
    better = [result_of(o["image_id"], o["category_id"], tuple(o["bbox"])) for o in truth["annotations"]]
    for row in compare_results(truth, worse, better, draws=200).differences.itertuples():
        assert 0 < row.low <= row.change <= row.high
        assert row.better == 1.0
        assert row.clear
    for row in compare_results(truth, better, worse, draws=200).differences.itertuples():
        assert row.high < 0
        assert row.clear


def test_two_runs_of_the_same_quality_are_called_chance():
    truth, first = scene(6, noise=1.5)
    _, second = scene(7, noise=1.5)
    comparison = compare_results(truth, first, second, names=("one", "two"), draws=300)
    aps = comparison.differences.loc[["box.AP", "segm.AP"]]
    assert ((aps["low"] < 0) & (aps["high"] > 0)).all()
    assert set(comparison.frame()["verdict"]) == {"may be chance"}
    assert (comparison.draws, comparison.images) == (300, 12)


def test_pairing_makes_the_interval_narrower_than_drawing_for_each_run():
    truth, first = scene(8, noise=1.5, num_images=30)
    second = [result | {"score": result["score"] * 0.99} for result in first[:-3]]  # nearly the same run
    matches = [match_results(truth, results, kind="segm") for results in (first, second)]
    random = np.random.default_rng(0)
    counts = [random.multinomial(30, np.full(30, 1 / 30), size=300) for _ in range(2)]
    unpaired = precision_on_draws(matches[1], counts[0]) - precision_on_draws(matches[0], counts[1])
    row = compare_results(truth, first, second, kinds=["segm"], draws=300).differences.loc["segm.AP"]
    assert row.high - row.low < 0.5 * np.ptp(np.quantile(unpaired.mean(axis=1), [0.025, 0.975]))


def test_the_same_seed_gives_the_same_interval():
    truth, first = scene(9, noise=1.5)
    _, second = scene(10, noise=1.5)
    once, again, other = (compare_results(truth, first, second, draws=60, seed=seed) for seed in (1, 1, 2))
    assert once.differences.equals(again.differences)
    assert not once.differences.equals(other.differences)


def test_without_detections_ap_is_zero_and_without_objects_there_is_none():
    truth, results = scene(11, noise=1.0)
    row = compare_results(truth, [], results, kinds=["box"], draws=20).differences.loc["box.AP"]
    assert row["first"] == 0.0
    assert row.change > 0
    empty = compare_results(truth_of([], 2), [], [result_of(1, 1, (0, 0, 5, 5))], kinds=["box"], draws=5)
    assert np.isnan(empty.differences["first"]).all()
    assert not empty.differences["clear"].any()


@pytest.mark.parametrize("wrong", [{"draws": 0}, {"confidence": 1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"draws .*, confidence .*: allowed are"):
        compare_results(truth_of([], 1), [], [], **wrong)


# ---- runs


@pytest.fixture
def evaluated(tmp_path):
    """Make a run of a name with results on a data set, as an evaluation leaves them."""

    def make(name: str, root, results: list[dict]):
        run = create_run(tiny_experiment(root, name=name), tmp_path / "runs")
        annotations = root / "val.json"
        write_results(run.detections, results)
        about = {"annotations": hash_file(annotations), "settings": {"top_k": 100}}
        write_json(run.results, evaluate_results(annotations, results).to_dict() | about)
        return run

    return make


def square(x: int) -> dict:
    bitmap = np.zeros((SIDE, SIDE))
    bitmap[x : x + 20, x : x + 20] = 1
    return {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [x, x, 20, 20], "segmentation": rle_of(bitmap)}


def test_two_runs_on_the_same_images_are_compared(tmp_path, evaluated):
    root = write_tiny_dataset(tmp_path / "images")
    first, second = evaluated("a", root, [square(2)]), evaluated("b", root, [square(10)])
    comparison = compare_runs(first, second, draws=20)
    assert comparison.names == ("a", "b")
    assert comparison.images == 4
    assert list(comparison.differences.index) == [
        f"{kind}.{number}" for kind in ("box", "segm") for number in ("AP", "AP50", "AP75")
    ]


def test_two_runs_on_different_images_are_refused_with_the_reason(tmp_path, evaluated):
    one = evaluated("a", write_tiny_dataset(tmp_path / "one"), [square(2)])
    other = evaluated("b", write_tiny_dataset(tmp_path / "other", val=5), [square(2)])
    with pytest.raises(RunError, match=r"a and .*b were scored on different annotations .*only runs on the same"):
        compare_runs(one, other)


def test_a_run_without_results_is_refused_with_the_command_that_makes_them(tmp_path, evaluated):
    root = write_tiny_dataset(tmp_path / "images")
    fresh = create_run(tiny_experiment(root, name="fresh"), tmp_path / "runs")
    with pytest.raises(RunError, match=r"fresh: no results yet; `solq-lab evaluate .*fresh` makes them"):
        compare_runs(evaluated("a", root, [square(2)]), fresh)
