"""Every part of a perfect model gains what was made wrong in it, and nothing else."""

import numpy as np
import pytest
from rectangles import WIDTH, masked, rectangle, result_of, rle_of, truth_of

from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.schema import EvaluationSection
from solq_lab.studies.budget import PARTS, Budget, oracle_budget

CAT, DOG = 1, 2
OBJECT, OTHER = (4, 8, 20, 24), (34, 8, 20, 24)
TRUTH = truth_of([(1, CAT, OBJECT), (2, CAT, OTHER)])
SETTINGS = EvaluationSection(area_sides=(10.0, 20.0))
FOUND = [result_of(1, CAT, OBJECT), result_of(2, CAT, OTHER)]


def ap(budget: Budget, *parts: str) -> float:
    return budget.evaluations[parts].metrics["segm.AP"]


def budget_of(results: list[dict], truth: dict = TRUTH) -> Budget:
    return oracle_budget(truth, results, FlattenCodec(28), SETTINGS)


LOOSE = (35, 9, 24, 28)


@pytest.mark.parametrize(
    ("results", "cures", "useless"),
    [
        ([FOUND[0], result_of(2, CAT, LOOSE)], ["box", "frame"], ["score", "code"]),
        ([FOUND[0], masked(FOUND[1], rectangle(34, 8, 20, 14))], ["vector", "frame"], ["score", "box", "code"]),
        ([result_of(1, CAT, (4, 8, 20, 17), score=0.95), *FOUND], ["score"], ["code"]),
        ([FOUND[0], masked(result_of(2, CAT, LOOSE), rectangle(35, 9, 5, 20))], ["frame"], ["score", "box"]),
        ([FOUND[0]], [], PARTS),
        ([result_of(1, DOG, OBJECT), FOUND[1]], [], PARTS),
    ],
    ids=["a loose box", "a wrong mask", "a wrong order", "box and mask", "a missed object", "a wrong class"],
)
def test_only_the_parts_that_are_wrong_give_their_ap_back(results, cures, useless):
    budget = budget_of(results)
    assert ap(budget) < 0.9
    for part in cures:
        assert ap(budget, part) >= 0.95, part  # masks are drawn in 28 cells a side
    for part in useless:
        assert ap(budget, part) == pytest.approx(ap(budget)), part
    assert ap(budget, "score", "box", "vector", "code") == pytest.approx(1 if cures else ap(budget))


def test_a_codec_that_loses_detail_bounds_a_perfect_vector_and_code_repairs_it():
    bitmap = rectangle(*OBJECT) & ~((np.arange(WIDTH) // 2 % 2 == 0) & (np.arange(48)[:, None] > 16))
    truth = truth_of([(1, CAT, OBJECT)])
    truth["annotations"][0] |= {"segmentation": rle_of(bitmap), "area": int(bitmap.sum())}
    budget = oracle_budget(truth, [result_of(1, CAT, OBJECT)], DCTCodec(48, 6), SETTINGS)
    assert ap(budget, "vector") < 0.8
    assert ap(budget, "vector", "code") == 1


def test_frame_stands_alone_and_without_a_codec_there_is_neither_frame_nor_code():
    budget = budget_of(FOUND)
    assert () in budget.evaluations
    assert not any("frame" in parts and {"box", "vector"} & set(parts) for parts in budget.evaluations)
    assert {part for parts in budget.evaluations for part in parts} == set(PARTS)
    plain = oracle_budget(TRUTH, FOUND, None)
    assert {part for parts in plain.evaluations for part in parts} == {"score", "box", "vector"}
    assert plain.frame().index.tolist()[:2] == ["as it is", "score"]
    assert plain.class_frame().loc["cat", "box"] == 100


@pytest.mark.parametrize("results", [[], [result_of(1, CAT, (0, 0, 3, 3))]], ids=["nothing", "background"])
def test_without_any_object_found_nothing_can_be_repaired(results):
    assert all(evaluation.metrics["segm.AP"] == 0 for evaluation in budget_of(results).evaluations.values())
