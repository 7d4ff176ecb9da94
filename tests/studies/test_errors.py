"""Every error has the type it was made to have, and what repairs give back adds up."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rectangles import HEIGHT, WIDTH, many_objects, masked, rectangle, result_of, rle_of, truth_of
from torch import Tensor

from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.data.annotations import DataError
from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.results import read_results
from solq_lab.schema import EvaluationSection
from solq_lab.studies.errors import ERRORS, SIAMESE_LEAK, ErrorAnalysis, analyse_errors
from solq_lab.studies.rules import THRESHOLDS, average_precision

SIDES = (10.0, 20.0)
CAT, DOG = 1, 2
LEFT, RIGHT = (4, 8, 20, 24), (24, 8, 20, 24)  # two objects side by side: their boxes touch but share no pixel
BEHIND = (16, 8, 24, 24)  # a box that does meet LEFT's
FRONT, HIDDEN = (
    rectangle(*LEFT),
    rectangle(*BEHIND) & ~rectangle(*LEFT),
)  # a mask of LEFT, and what it leaves of BEHIND


class Exact(MaskCodec):
    """Loses nothing of a mask of 32 x 32 cells but the last `lost` columns."""

    def __init__(self, lost: int = 0) -> None:
        super().__init__(32, 32 * 32)
        self.lost = lost

    def encode(self, masks: Tensor) -> Tensor:
        return masks.flatten(1).float()

    def decode(self, vectors: Tensor) -> Tensor:
        decoded = vectors.unflatten(1, (32, 32)).clone()
        decoded[:, :, 32 - self.lost :] = 0
        return decoded

    def binarize(self, decoded: Tensor) -> Tensor:
        return decoded > 0.5


def analyse(truth: dict, results: list[dict], codec: MaskCodec | None = None) -> ErrorAnalysis:
    return analyse_errors(truth, results, codec or Exact(), EvaluationSection(area_sides=SIDES))


def types_at(analysis: ErrorAnalysis, threshold: float) -> list[str | None]:
    """The type of each result, in the order given, at one threshold; None where it is right or ignored."""
    row = int(np.argmin(np.abs(THRESHOLDS - threshold)))
    by_place = dict(zip(analysis.overlaps.detections.results.tolist(), analysis.types[row].tolist(), strict=True))
    return [None if by_place[place] < 0 else ERRORS[by_place[place]] for place in sorted(by_place)]


def one_behind_another(category: int) -> dict:
    """A cat at LEFT, and an object of this category of which HIDDEN is seen."""
    truth = truth_of([(1, CAT, LEFT), (1, category, BEHIND)])
    truth["annotations"][1]["segmentation"] = rle_of(HIDDEN)
    return truth


def assert_adds_up(analysis: ErrorAnalysis) -> None:
    for name, group in analysis.groups.items():
        assert list(group.alone) == list(group.in_turn) == list(ERRORS)
        gains = [*group.alone.values(), *group.in_turn.values()]
        if group.objects == 0:
            assert all(math.isnan(value) for value in (group.ap, *gains)), name
            continue
        assert group.ap + sum(group.in_turn.values()) == pytest.approx(1, abs=1e-9), name
        assert min(gains) >= -1e-9, name
        assert group.alone[ERRORS[0]] == pytest.approx(group.in_turn[ERRORS[0]])


def test_the_rank_correlation_compares_scores_with_the_overlap_of_each_objects_best_detection():
    places = [(4, 4, 16, 16), (24, 4, 16, 16), (44, 4, 16, 16)]
    truth = truth_of([(1, CAT, place) for place in places])
    narrower = [(x, y, 16 - cut, 16) for cut, (x, y, _, _) in zip((0, 2, 4), places, strict=True)]

    def with_scores(*scores: float) -> list[dict]:
        shown = zip(narrower, scores, strict=True)
        return [masked(result_of(1, CAT, place, score), rectangle(*place)) for place, score in shown]

    assert analyse(truth, with_scores(0.9, 0.6, 0.3)).rank_correlation() == pytest.approx(1)
    assert analyse(truth, with_scores(0.3, 0.6, 0.9)).rank_correlation() == pytest.approx(-1)
    worse = masked(result_of(1, CAT, places[0], 0.1), rectangle(4, 4, 9, 16))  # a second one, of less overlap
    assert analyse(truth, [*with_scores(0.9, 0.6, 0.3), worse]).rank_correlation() == pytest.approx(1)
    assert math.isnan(analyse(truth, with_scores(0.9, 0.6, 0.3)[:1]).rank_correlation())


# ---- each fault has its type


def test_a_detection_that_is_right_has_no_type():
    analysis = analyse(truth_of([(1, CAT, LEFT)]), [result_of(1, CAT, LEFT)])
    assert types_at(analysis, 0.95) == [None]
    assert analysis.groups["all"].ap == 1
    assert not any(analysis.worst(error, 5) for error in ERRORS)


def test_an_object_without_any_detection_is_missed():
    analysis = analyse(truth_of([(1, CAT, LEFT), (2, CAT, RIGHT)]), [result_of(1, CAT, LEFT)])
    (case,) = analysis.worst("missed", 5)
    assert (case.image_id, case.object_id, case.result, case.threshold) == (2, 1, None, 0.5)
    assert analysis.groups["all"].ap == pytest.approx(51 / 101)  # recalls 0, 0.01, ... 0.5 are reached
    assert analysis.groups["all"].alone["missed"] == pytest.approx(50 / 101)


def test_a_detection_on_nothing_is_background():
    found = [result_of(1, CAT, (44, 2, 10, 4), score=0.95), result_of(1, CAT, LEFT)]
    analysis = analyse(truth_of([(1, CAT, LEFT)]), found)
    assert types_at(analysis, 0.5) == ["background", None]
    (case,) = analysis.worst("background", 5)
    assert (case.result, case.object_id, case.score) == (0, None, 0.95)
    assert analysis.groups["all"].alone["background"] == pytest.approx(0.5)


def test_a_right_mask_of_another_class_is_a_class_error():
    analysis = analyse(truth_of([(1, CAT, LEFT), (1, DOG, RIGHT)]), [result_of(1, DOG, LEFT), result_of(1, DOG, RIGHT)])
    assert types_at(analysis, 0.5) == ["class", None]
    assert analysis.groups["all"].alone["class"] == pytest.approx(1 - analysis.groups["all"].ap)
    assert not analysis.worst("missed", 5)


def test_a_second_detection_of_a_found_object_is_a_duplicate_whatever_its_mask():
    poor = masked(result_of(1, CAT, LEFT, score=0.3), rectangle(4, 8, 20, 8))
    analysis = analyse(truth_of([(1, CAT, LEFT)]), [result_of(1, CAT, LEFT), result_of(1, CAT, LEFT, score=0.5), poor])
    assert types_at(analysis, 0.5) == [None, "duplicate", "duplicate"]


def test_a_box_that_is_off_is_a_box_error_from_the_threshold_it_cannot_reach():
    shifted = (8, 8, 20, 24)  # IoU 2/3
    analysis = analyse(truth_of([(1, CAT, LEFT)]), [result_of(1, CAT, shifted)])
    assert types_at(analysis, 0.65) == [None]
    assert types_at(analysis, 0.7) == ["box"]
    assert analysis.worst("box", 1)[0].threshold == pytest.approx(0.7)
    np.testing.assert_allclose(analysis.overlaps.detections.reach, 2 / 3, atol=1e-9)


def test_a_poor_mask_in_a_right_box_is_a_vector_error():
    half = masked(result_of(1, CAT, LEFT), rectangle(4, 8, 20, 11))
    analysis = analyse(truth_of([(1, CAT, LEFT)]), [half])
    assert types_at(analysis, 0.5) == ["vector"]
    (case,) = analysis.worst("vector", 5)
    assert case.overlap == pytest.approx(11 / 24)


def test_what_the_code_cannot_say_is_codec_truncation():
    codec = Exact(lost=8)  # a quarter of every mask
    found = masked(result_of(1, CAT, LEFT), rectangle(4, 8, 15, 24))
    analysis = analyse(truth_of([(1, CAT, LEFT)]), [found], codec)
    np.testing.assert_allclose(analysis.overlaps.objects.ceiling, 0.75, atol=1e-9)
    assert types_at(analysis, 0.75) == [None]
    assert types_at(analysis, 0.8) == ["codec"]


def test_a_mask_over_two_overlapping_objects_is_siamese():
    both = masked(result_of(1, CAT, LEFT), FRONT | HIDDEN)
    analysis = analyse(one_behind_another(DOG), [both, masked(result_of(1, DOG, BEHIND), HIDDEN)])
    assert types_at(analysis, 0.6) == ["siamese", None]
    np.testing.assert_allclose(analysis.overlaps.detections.leak, [HIDDEN.sum() / (FRONT | HIDDEN).sum(), 0])


def test_of_two_neighbours_with_the_same_mask_the_one_it_is_not_is_siamese():
    found = [masked(result_of(1, CAT, LEFT, score=0.9), FRONT), masked(result_of(1, CAT, BEHIND, score=0.8), FRONT)]
    assert types_at(analyse(one_behind_another(CAT), found), 0.5) == [None, "siamese"]


def test_a_mask_over_a_neighbour_whose_box_stays_apart_is_not_siamese():
    wide = masked(result_of(1, CAT, LEFT), rectangle(4, 8, 36, 24))
    analysis = analyse(truth_of([(1, CAT, LEFT), (1, DOG, RIGHT)]), [wide])
    assert analysis.overlaps.detections.leak.tolist() == [0]
    assert types_at(analysis, 0.6) == ["vector"]


def test_a_leak_below_the_bound_is_no_siamese_mask():
    slightly = masked(result_of(1, CAT, LEFT), FRONT | rectangle(24, 8, 4, 24))
    analysis = analyse(one_behind_another(DOG), [slightly])
    assert 0 < analysis.overlaps.detections.leak[0] < SIAMESE_LEAK
    assert types_at(analysis, 0.9) == ["vector"]


def test_without_a_code_the_box_itself_is_judged_and_nothing_is_truncated():
    truth = truth_of([(1, CAT, LEFT)])
    shifted = masked(result_of(1, CAT, (8, 8, 20, 24)), rectangle(4, 8, 20, 11))
    in_place = masked(result_of(1, CAT, LEFT), rectangle(4, 8, 20, 11))
    for found, at_half, at_most in ((shifted, "vector", "box"), (in_place, "vector", "vector")):
        analysis = analyse_errors(truth, [found], None, EvaluationSection(area_sides=SIDES))
        assert (types_at(analysis, 0.5), types_at(analysis, 0.95)) == ([at_half], [at_most])


def test_a_detection_on_a_crowd_is_no_error():
    truth = truth_of([(1, CAT, LEFT), (1, CAT, RIGHT)])
    truth["annotations"][1]["iscrowd"] = 1
    analysis = analyse(truth, [result_of(1, CAT, (30, 10, 6, 6)), result_of(1, CAT, LEFT)])
    assert types_at(analysis, 0.5) == [None, None]
    assert analysis.groups["all"].objects == 1
    assert analysis.groups["all"].ap == 1


# ---- groups


def test_occlusion_is_the_share_of_the_box_on_other_objects():
    truth = truth_of([(1, CAT, LEFT), (1, DOG, BEHIND), (2, DOG, RIGHT)])
    truth["annotations"][1]["segmentation"] = rle_of(HIDDEN)
    analysis = analyse(truth, [])
    np.testing.assert_allclose(analysis.overlaps.objects.occlusion, [0, 8 / 24, 0])  # LEFT lies on top of the other
    counts = {name: group.objects for name, group in analysis.groups.items()}
    assert counts == {"all": 3, "small": 0, "medium": 0, "large": 3, "free": 2, "touched": 0, "crowded": 1}


def test_an_error_is_counted_where_its_object_is():
    truth = truth_of([(1, CAT, LEFT), (1, CAT, (40, 4, 8, 8))])  # a large and a small one
    analysis = analyse(truth, [result_of(1, CAT, LEFT)])
    assert analysis.groups["large"].ap == 1
    assert analysis.groups["small"].in_turn["missed"] == 1


# ---- adding up


@pytest.mark.parametrize("results", [[], [result_of(1, CAT, LEFT)]], ids=["no detections", "one detection"])
@pytest.mark.parametrize("objects", [[], [(1, CAT, LEFT), (2, DOG, RIGHT)]], ids=["no objects", "objects"])
def test_the_empty_cases_add_up(objects, results):
    analysis = analyse(truth_of(objects), results)
    assert_adds_up(analysis)
    assert analysis.types.shape == (10, len(results))
    assert list(analysis.frame().index) == list(analysis.groups)
    assert list(analysis.frame()) == ["objects", "AP", *ERRORS]


def test_more_than_255_objects_in_an_image_are_measured():
    found = [(1, CAT, (x, y, 2, 2)) for x in range(0, 60, 3) for y in range(0, 42, 3)]
    analysis = analyse(truth_of(found), [result_of(1, CAT, box) for _, _, box in found])
    assert analysis.groups["all"].objects == len(found) > 255


def test_a_file_without_images_has_nothing_to_lose():
    assert_adds_up(analyse(truth_of([], images=0), []))


boxes = st.tuples(st.integers(0, WIDTH - 14), st.integers(0, HEIGHT - 14), st.integers(3, 24), st.integers(3, 24))
scenes = st.lists(st.tuples(st.integers(1, 2), st.sampled_from([CAT, DOG]), boxes), max_size=6)


@settings(max_examples=60, deadline=None)
@given(scenes, scenes, st.randoms(use_true_random=False), st.booleans())
def test_whatever_was_found_repairs_in_turn_add_up_to_one_and_ap_is_cocos(objects, found, chance, crowds):
    truth = truth_of(objects)
    for entry in truth["annotations"]:
        entry["iscrowd"] = int(crowds and chance.random() < 0.3)
    near = [(i, c, (x + chance.randint(-2, 2), y + chance.randint(-2, 2), w, h)) for i, c, (x, y, w, h) in objects]
    near = [(i, chance.choice([c, c, c, 3 - c]), (max(x, 0), max(y, 0), w, h)) for i, c, (x, y, w, h) in near]
    results = [
        result_of(*one, score=chance.choice([0.2, 0.5, chance.random()])) for one in [*near, *objects[:2], *found]
    ]
    analysis = analyse(truth, results)
    assert_adds_up(analysis)
    reference = evaluate_results(truth, results, EvaluationSection(area_sides=SIDES), kinds=("segm",)).metrics
    for group, number in (("all", "AP"), ("small", "APs"), ("medium", "APm"), ("large", "APl")):
        assert analysis.groups[group].ap == pytest.approx(reference[f"segm.{number}"], abs=1e-9, nan_ok=True)


@pytest.mark.golden
def test_on_photographs_ap_is_cocos_and_repairs_add_up(golden_root: Path, coco_tiny: Path):
    annotations = coco_tiny / "annotations" / "instances_val2017.json"
    results = read_results(golden_root / "parts_boundary_ap" / "detections.json")
    analysis = analyse_errors(annotations, results, DCTCodec(128, 256))
    assert_adds_up(analysis)
    reference = evaluate_results(annotations, results, kinds=("segm",)).metrics
    for group, number in (("all", "AP"), ("small", "APs"), ("medium", "APm"), ("large", "APl")):
        assert analysis.groups[group].ap == pytest.approx(reference[f"segm.{number}"], abs=1e-9)


@pytest.mark.parametrize("limit", [60, 100, 500])
def test_as_many_detections_are_typed_as_the_evaluation_scores(limit):
    truth, results = many_objects()
    expected = evaluate_results(truth, results, EvaluationSection(top_k=limit), kinds=["segm"]).metrics["segm.AP"]
    analysis = analyse_errors(truth, results, DCTCodec(16, 30), EvaluationSection(top_k=limit))
    assert analysis.groups["all"].ap == pytest.approx(expected, abs=1e-9)


def test_a_class_without_objects_has_no_ap():
    nothing = np.zeros(0, dtype=bool)
    aps = average_precision(nothing, nothing, np.zeros(0, dtype=int), np.array([0, 3]))
    np.testing.assert_array_equal(aps, [np.nan, 0])


# ---- the worst ones, and refusals


def test_the_worst_are_those_wrong_at_the_lowest_threshold_and_then_the_surest():
    truth = truth_of([(image, CAT, LEFT) for image in (1, 2, 3)], images=3)
    shifts = {1: (10, 0.6), 2: (10, 0.7), 3: (5, 0.99)}  # pixels, score
    analysis = analyse(truth, [result_of(i, CAT, (4 + by, 8, 20, 24), score) for i, (by, score) in shifts.items()])
    assert [case.image_id for case in analysis.worst("box", 5)] == [2, 1, 3]
    assert len(analysis.worst("box", 2)) == 2


def test_an_unknown_type_is_refused_with_the_known_ones():
    analysis = analyse(truth_of([]), [])
    with pytest.raises(ValueError, match="error type 'blur': allowed are missed, background, class"):
        analysis.worst("blur", 1)


def test_a_plain_detectors_results_are_refused():
    box_only = {key: value for key, value in result_of(1, CAT, LEFT).items() if key != "segmentation"}
    with pytest.raises(DataError, match=r"result 0 has no mask; .* A plain detector has no masks"):
        analyse(truth_of([(1, CAT, LEFT)]), [box_only])
    mask_only = {key: value for key, value in result_of(1, CAT, LEFT).items() if key != "bbox"}
    with pytest.raises(DataError, match="result 0 has no box"):
        analyse(truth_of([(1, CAT, LEFT)]), [mask_only])
