"""The gallery shows each error with the object it is about, and the bars show what repairs give back."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rectangles import HEIGHT, WIDTH, rectangle, result_of, rle_of, truth_of

from solq_lab.data.coco import CocoDataset
from solq_lab.masks import decode_rle
from solq_lab.studies.cases import object_errors, worst_cases
from solq_lab.studies.errors import ERRORS, analyse_errors
from solq_lab.viz.failures import ERROR_COLOURS, ERROR_TITLES, failure_gallery, lost_ap
from solq_lab.viz.images import MASK_OPACITY

CAT, DOG = 1, 2
PLACE, ELSEWHERE = (4, 8, 20, 24), (40, 4, 12, 12)


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """Two grey images; a cat in the first, a dog in the second."""
    (tmp_path / "val").mkdir()
    for number in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).save(tmp_path / "val" / f"{number}.png")
    (tmp_path / "val.json").write_text(json.dumps(truth_of([(1, CAT, PLACE), (2, DOG, PLACE)])))
    return CocoDataset(tmp_path / "val", tmp_path / "val.json")


@pytest.fixture
def results() -> list[dict]:
    """A half mask of the cat, a detection beside it, and nothing of the dog."""
    half = result_of(1, CAT, PLACE) | {"segmentation": rle_of(rectangle(4, 8, 20, 11))}
    return [half, result_of(1, DOG, ELSEWHERE, score=0.4)]


def test_a_case_is_the_image_the_object_and_the_detection(dataset, results):
    analysis = analyse_errors(dataset.annotations, results, None)
    cases = worst_cases(analysis, results, dataset)
    assert list(cases) == list(ERRORS)
    assert {error: len(worst) for error, worst in cases.items() if worst} == {"missed": 1, "background": 1, "vector": 1}
    ((image, true, found, *ids),) = cases["vector"]
    assert ids == [1, 0]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert (true.names, found.names, found.scores.tolist()) == (["cat"], ["cat"], [pytest.approx(0.9)])
    np.testing.assert_array_equal(decode_rle(true.masks)[0], rectangle(*PLACE))
    np.testing.assert_array_equal(decode_rle(found.masks)[0], rectangle(4, 8, 20, 11))
    assert found.boxes.tolist() == [[4, 8, 24, 32]]
    ((_, true, found, *_),) = cases["missed"]
    assert (true.names, found.names, found.masks) == (["dog"], [], [])
    ((_, true, found, *_),) = cases["background"]
    assert (true.names, found.names) == ([], ["dog"])


def test_every_object_has_its_error_and_how_much_is_lost(dataset, results):
    errors = object_errors(analyse_errors(dataset.annotations, results, None))
    assert errors["error"].tolist() == ["vector", "missed"]
    np.testing.assert_allclose(errors["IoU"], [11 / 24, 0])
    np.testing.assert_allclose(errors["lost"], [1, 1])
    assert errors["score"].tolist() == [pytest.approx(0.9), pytest.approx(np.nan, nan_ok=True)]
    assert errors.index.tolist() == [0, 1]


def test_the_gallery_has_a_row_per_type_and_names_what_it_shows(dataset, results):
    analysis = analyse_errors(dataset.annotations, results, None)
    figure = failure_gallery(worst_cases(analysis, results, dataset), title="a model")
    rows = dict(zip(ERRORS, figure.axes, strict=True))  # one column, as no type has more than one case
    titles = {error: axes.get_title() for error, axes in rows.items() if axes.get_title()}
    assert titles == {"missed": "dog", "background": "dog 0.40", "vector": "cat 0.90 IoU 0.46"}
    assert [text.get_text() for text in rows["siamese"].texts] == ["siamese\nmask", "none"]
    painted = rows["vector"].artists[0].image.getpixel((10, 12))
    colour = 255 * np.array(to_rgb(ERROR_COLOURS["vector"]))
    np.testing.assert_allclose(painted, (1 - MASK_OPACITY) * 128 + MASK_OPACITY * colour, atol=0.5)


def test_bars_of_a_group_reach_a_hundred(dataset, results):
    analysis = analyse_errors(dataset.annotations, results, None)
    figure = lost_ap(analysis.groups, title="a model")
    types, groups = figure.axes
    assert [label.get_text() for label in types.get_yticklabels()] == list(ERROR_TITLES.values())
    assert len(groups.containers) == 1 + len(ERRORS)
    ends = [sum(bar.get_width() for bar in pieces) for pieces in zip(*groups.containers, strict=True)]
    expected = [100 if group.objects else 0 for group in analysis.groups.values()]
    np.testing.assert_allclose(ends, expected, atol=1e-6)
    assert sum(text.get_text() == "no objects" for text in groups.texts) == expected.count(0) > 0


def test_nothing_at_all_can_be_drawn(tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val.json").write_text(json.dumps(truth_of([], images=0)))
    dataset = CocoDataset(tmp_path / "val", tmp_path / "val.json")
    analysis = analyse_errors(dataset.annotations, [], None)
    failure_gallery(worst_cases(analysis, [], dataset))
    lost_ap(analysis.groups)


def test_colours_and_titles_belong_to_the_types_in_order():
    assert tuple(ERROR_COLOURS) == tuple(ERROR_TITLES) == ERRORS
    assert len(set(ERROR_COLOURS.values())) == len(ERRORS)
