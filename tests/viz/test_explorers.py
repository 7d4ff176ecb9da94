"""Both explorers show what their controls say, remember nothing wrong, and bear images without objects."""

from __future__ import annotations

import io
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.build import build_images, build_model
from solq_lab.data.classes import ClassMap
from solq_lab.inference.attention import predict_with_attention
from solq_lab.inference.predictor import Predictor
from solq_lab.models.weights import save_weights
from solq_lab.viz.widgets.attention_explorer import ALL, NOTHING, AttentionExplorer
from solq_lab.viz.widgets.detection_explorer import WIDTH, DetectionExplorer

CLASSES = ClassMap(("triangle", "diamond"), (1, 2))


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert plt.get_fignums() == []


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def dataset(root: Path):
    return build_images(tiny_experiment(root))


def make_predictor(root: Path, folder: Path, *, seed: int) -> Predictor:
    """A model that sees an object in some queries."""
    torch.manual_seed(seed)
    model = build_model(tiny_experiment(root), len(CLASSES))
    for head in model.heads:
        torch.nn.init.normal_(head.classify.weight, std=0.1)
        torch.nn.init.normal_(head.classify.bias, mean=-1.0, std=0.3)
        torch.nn.init.normal_(head.box.layers[2].weight, std=0.5)
        torch.nn.init.normal_(head.vector.layers[2].weight, std=1.0)
    path = folder / f"{seed}.safetensors"
    experiment = tiny_experiment(root).to_yaml()
    save_weights(path, model.state_dict(), experiment=experiment, classes=CLASSES.to_json())
    return Predictor(path, device="cpu")


@pytest.fixture(scope="module")
def predictors(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    folder = tmp_path_factory.mktemp("weights")
    return {"SOLQ": make_predictor(root, folder, seed=0), "SQR": make_predictor(root, folder, seed=1)}


@pytest.fixture
def both(predictors, dataset) -> DetectionExplorer:
    return DetectionExplorer(predictors, dataset, score=0.2)


@pytest.fixture
def attention(predictors, dataset) -> AttentionExplorer:
    return AttentionExplorer(predictors["SOLQ"], dataset, score=0.2)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# ---- detections


def test_there_is_a_switch_for_every_object_of_the_score(both, predictors, dataset):
    image = dataset[0][0].permute(1, 2, 0).numpy()
    for name, predictor in predictors.items():
        found = predictor.predict(image).above(0.2)
        assert len(found.names) > 0
        assert [switch.description.split()[0] for switch in both.switches[name]] == found.names
    both.score.value = 0.9
    assert both.switches == {"SOLQ": [], "SQR": []}
    assert "nothing found" in both._columns["SQR"].children[0].value


def test_the_wipe_shows_the_first_model_on_its_left_and_the_second_on_its_right(both):
    both.wipe.value = 1.0
    first = both.composed()
    both.wipe.value = 0.0
    second = both.composed()
    assert (first != second).any()
    both.wipe.value = 0.25
    mixed, seam = both.composed(), WIDTH // 4
    assert np.array_equal(mixed[:, : seam - 2], first[:, : seam - 2])
    assert np.array_equal(mixed[:, seam + 2 :], second[:, seam + 2 :])
    assert (mixed[:, seam] == 0).all()
    assert np.array_equal(pixels(both.clickable.image.value), mixed)


def test_an_object_that_is_switched_off_or_clicked_is_gone(both):
    before, count = both.composed(), len(both.switches["SOLQ"])
    both.switches["SOLQ"][0].value = False
    assert len(both.shown("SOLQ").names) == count - 1
    assert len(both.clickable.buttons) == count - 1
    both.switches["SOLQ"][0].value = True
    assert np.array_equal(both.composed(), before)
    both.clickable.buttons[0].click()
    assert not both.switches["SOLQ"][0].value


def test_clicks_are_for_the_model_that_has_the_larger_part(both):
    both.wipe.value = 0.2
    assert len(both.clickable.buttons) == len(both.shown("SQR").names)


def test_ground_truth_takes_the_place_of_both(both):
    both.truth.value = True
    assert both.clickable.buttons == []
    assert (both.composed()[:, WIDTH // 2] != 0).any()


def test_buttons_lie_over_their_objects_and_small_ones_on_top(both):
    found = both.shown("SOLQ")
    for button, box in zip(both.clickable.buttons, found.boxes.tolist(), strict=True):
        left, width = (float(text.rstrip("%")) for text in (button.layout.left, button.layout.width))
        low, high = (100 * min(max(edge / 48, 0), 1) for edge in box[::2])
        assert (left, left + width) == pytest.approx((low, high), abs=0.02)
    areas = [float(b.layout.width[:-1]) * float(b.layout.height[:-1]) for b in both.clickable.widget.children[1:]]
    whole = [(box[2] - box[0]) * (box[3] - box[1]) for box in found.boxes.tolist()]
    assert len(areas) == len(whole)
    assert both.clickable.widget.children[-1] is both.clickable.buttons[int(np.argmin(whole))]


def test_one_model_alone_has_no_wipe_but_all_the_rest(predictors, dataset):
    explorer = DetectionExplorer({"SOLQ": predictors["SOLQ"]}, dataset, score=0.2)
    assert explorer.wipe not in explorer.widget.children[2].children[0].children
    assert len(explorer.figure().axes) == 2


def test_the_figure_shows_truth_and_both_models(both):
    titles = [axes.get_title() for axes in both.figure().axes]
    assert titles[0] == "ground truth"
    assert titles[1] == f"SOLQ: {len(both.switches['SOLQ'])} shown"


def test_what_cannot_be_explored_is_refused(predictors, dataset, monkeypatch):
    with pytest.raises(ValueError, match="0 models: allowed are one, or two"):
        DetectionExplorer({}, dataset)
    monkeypatch.setattr(type(dataset), "__len__", lambda self: 0)
    with pytest.raises(ValueError, match="has no images to explore"):
        DetectionExplorer(predictors, dataset)
    with pytest.raises(ValueError, match="has no images to explore"):
        AttentionExplorer(predictors["SOLQ"], dataset)


def test_an_image_without_any_object_can_be_shown(both):
    both.image.value = 3
    both.truth.value = True
    assert len(both._dataset.objects(3).names) == 0
    assert both.composed().shape[1] == WIDTH
    assert len(both.figure().axes) == 3


def test_moving_the_wipe_answers_within_a_frame_or_two(both):
    both.wipe.value = 0.4
    times = []
    for share in (0.41, 0.42, 0.43, 0.44, 0.45):
        started = time.perf_counter()
        both.wipe.value = share
        times.append(time.perf_counter() - started)
    assert min(times) < 0.25  # 20 ms on an idle core; nothing is predicted or drawn again


# ---- attention


def test_lists_offer_what_the_model_has(attention):
    controls = (attention.layer, attention.head, attention.level)
    options = [[label for label, _ in control.options] for control in controls]
    assert options == [["all", "1", "2"], ["all", "1", "2"], ["all", "1", "2", "3"]]
    assert attention.layer.value == 1
    assert attention.head.value == attention.level.value == ALL


def test_the_view_is_the_chosen_objects_query(attention, predictors, dataset):
    image = dataset[0][0].permute(1, 2, 0).numpy()
    found, layers = predict_with_attention(predictors["SOLQ"], image)
    attention.object.value = 1
    attention.layer.value, attention.head.value, attention.level.value = 0, 1, 2
    query = int(found.queries[1])
    torch.testing.assert_close(attention.view().looked.points, layers[0].points[query, 1, 2])
    assert attention.figure()._suptitle.get_text() == "layer 1, head 2, level 3"


def test_clicking_an_object_chooses_it_and_marks_it(attention):
    before = attention.panels.value
    attention.clickable.buttons[1].click()
    assert attention.object.value == 1
    assert "solq-chosen" in attention.clickable.buttons[1]._dom_classes
    assert "solq-chosen" not in attention.clickable.buttons[0]._dom_classes
    assert attention.panels.value != before


def test_every_control_redraws(attention):
    for name, value in (("layer", 0), ("head", 0), ("level", 1), ("close_up", False), ("image", 1)):
        before = attention.panels.value
        getattr(attention, name).value = value
        assert attention.panels.value != before, name


def test_an_image_without_detections_says_so_and_comes_back(attention):
    attention.score.value = 0.95
    assert attention.message == NOTHING
    assert attention.panels.layout.visibility == "hidden"
    assert attention.object.value is None
    with pytest.raises(ValueError, match="Nothing is found in this image"):
        attention.figure()
    attention.score.value = 0.2
    assert attention.message == ""
    assert attention.panels.layout.visibility == "visible"
