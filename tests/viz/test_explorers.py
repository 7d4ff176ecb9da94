"""Both explorers show what their controls say, remember nothing wrong, and bear images without objects."""

import base64
import datetime
import io
import time
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import CLASSES, tiny_experiment, write_model, write_tiny_dataset

from solq_lab.build import build_images, build_model
from solq_lab.inference.attention import layer_views, pixel_views, predict_with_attention, record_encoder
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import decode_rle
from solq_lab.viz.attention import attention_by_size
from solq_lab.viz.style import OBJECT_COLOURS, colours_of, new_figure
from solq_lab.viz.widgets.attention_explorer import ALL, LAYERS, MARK, NOTHING, PIXEL, QUERIES, AttentionExplorer
from solq_lab.viz.widgets.clickable_image import colour_class, draw_image
from solq_lab.viz.widgets.detection_explorer import WIDTH, WIPE, DetectionExplorer


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
    return Predictor(write_model(folder / f"{seed}.safetensors", tiny_experiment(root), model), device="cpu")


@pytest.fixture(scope="module")
def predictors(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Predictor]:
    folder = tmp_path_factory.mktemp("weights")
    return {"SOLQ": make_predictor(root, folder, seed=0), "SQR": make_predictor(root, folder, seed=1)}


@pytest.fixture
def both(predictors, dataset) -> DetectionExplorer:
    return DetectionExplorer(predictors, dataset, score=0.2)


@pytest.fixture
def attention(predictors, dataset) -> AttentionExplorer:
    return AttentionExplorer({"SOLQ": predictors["SOLQ"]}, dataset, score=0.2)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# ---- detections


def shown(explorer: DetectionExplorer, name: str) -> np.ndarray:
    return pixels(explorer.panels[name].png)


def test_there_is_a_chip_for_every_object_of_the_score_in_its_colour(both, predictors, dataset):
    image = dataset[0][0].permute(1, 2, 0).numpy()
    for name, predictor in predictors.items():
        found = predictor.predict(image).above(0.2)
        assert len(found.names) > 0
        assert [switch.description.split()[0] for switch in both.switches[name]] == found.names
        classes = [colour_class(colour) for colour in colours_of(found.labels.tolist())]
        assert [switch._dom_classes[1] for switch in both.switches[name]] == classes
    both.colouring.value = "object"
    colours = [switch._dom_classes[1] for switch in both.switches["SOLQ"]]
    assert len(set(colours)) == min(len(colours), len(OBJECT_COLOURS))
    both.score.value = 0.9
    assert both.switches == {"SOLQ": [], "SQR": []}
    assert "nothing found" in both._titles["SQR"].value


def test_a_detection_has_the_colour_of_the_true_object_it_meets(both, dataset, monkeypatch):
    image = next(index for index in range(len(dataset)) if len(dataset.objects(index).labels) == 2)
    truth = dataset.objects(image)
    monkeypatch.setattr(both, "_find", lambda name, index: truth[[1, 0]])
    assert both._colours("SOLQ", image, "object") == colours_of([1, 0])
    assert both._colours("ground truth", image, "object") == colours_of([0, 1])


def test_the_panels_that_are_chosen_fill_the_row(both):
    assert len(both._row.children) == 3
    both.columns["SOLQ"].value = both.columns["ground truth"].value = False
    assert both._row.children == (both._places["SQR"],)
    assert both._row.layout.grid_template_columns == "repeat(1, minmax(0, 1fr))"


def test_an_object_that_is_switched_off_or_clicked_is_gone(both):
    before, count = shown(both, "SOLQ"), len(both.switches["SOLQ"])
    other = shown(both, "SQR")
    both.switches["SOLQ"][0].value = False
    assert len(both.shown("SOLQ").names) == len(both.panels["SOLQ"].objects) == count - 1
    assert np.array_equal(shown(both, "SQR"), other)
    both.switches["SOLQ"][0].value = True
    assert np.array_equal(shown(both, "SOLQ"), before)
    both.panels["SOLQ"].on_click(0, 0.5, 0.5)
    assert not both.switches["SOLQ"][0].value
    assert not np.array_equal(shown(both, "SOLQ"), before)


def test_outlines_alone_leave_the_inside_as_it_is(both, dataset):
    filled = shown(both, "ground truth")
    both.filled.value = False
    hollow = shown(both, "ground truth")
    (x, y), scale = dataset.objects(0).boxes[0].view(2, 2).mean(dim=0).tolist(), WIDTH / 48
    at = int(y * scale), int(x * scale)
    assert (filled[at] != hollow[at]).any()


def test_the_places_to_click_are_the_boxes_inside_the_image(both):
    found, panel = both.shown("SOLQ"), both.panels["SOLQ"]
    for shown, box in zip(panel.objects, found.boxes.tolist(), strict=True):
        (left, top, width, height), edges = shown["box"], [100 * min(max(edge / 48, 0), 1) for edge in box]
        assert (left, top, left + width, top + height) == pytest.approx(edges, abs=0.02)


def test_a_wipe_has_the_chosen_images_without_labels_and_the_objects_that_are_on(both):
    both.arrangement.value, both.columns["SQR"].value = "wipe", False
    both.switches["SOLQ"][0].value = False
    assert both._row.children == (both._wiped,)
    truth, found = both.wipe.layers
    assert (truth["name"], found["name"]) == ("ground truth", "SOLQ")
    for layer, objects in ((truth, both.true_objects(0)), (found, both.shown("SOLQ"))):
        assert [one["label"].split()[0] for one in layer["objects"]] == objects.names
        drawn = draw_image(both.pixels(0), objects, width=WIPE[1], labelled=False)
        assert np.array_equal(pixels(layer["png"]), pixels(drawn.png()))
    assert found["objects"][0]["colours"][0] == colours_of([int(both.shown("SOLQ").labels[0])])[0]

    both.labelled.value = False
    both.wipe._handle_custom_msg({"name": "ground truth", "row": 1}, [])
    both.wipe._handle_custom_msg({"name": "SOLQ", "row": 0}, [])
    truth, fewer = both.wipe.layers
    assert [one["chosen"] for one in truth["objects"]] == [row == 1 for row in range(len(truth["objects"]))]
    assert not any(one["label"] for one in truth["objects"] + fewer["objects"])
    assert [one["box"] for one in fewer["objects"]] == [one["box"] for one in found["objects"][1:]]


def test_one_model_alone_can_be_shown(predictors, dataset):
    explorer = DetectionExplorer({"SOLQ": predictors["SOLQ"]}, dataset, score=0.2)
    assert len(explorer._row.children) == len(explorer.figure().axes) == 2


def test_the_figure_shows_truth_and_both_models(both):
    titles = [axes.get_title() for axes in both.figure().axes]
    assert titles[:2] == ["ground truth", f"SOLQ: {len(both.switches['SOLQ'])} shown"]


def test_what_cannot_be_explored_is_refused(predictors, dataset, monkeypatch):
    with pytest.raises(ValueError, match="0 models: allowed are one, or two"):
        DetectionExplorer({}, dataset)
    monkeypatch.setattr(type(dataset), "__len__", lambda self: 0)
    for explorer in (DetectionExplorer, AttentionExplorer):
        with pytest.raises(ValueError, match="has no images to explore"):
            explorer(predictors, dataset)


def test_an_image_without_any_object_can_be_shown(both):
    both.image.value = 3
    assert both.panels["ground truth"].objects == []
    assert len(both.figure().axes) == 3


def test_a_switch_answers_within_a_frame_or_two(both):
    times = []
    for on in (False, True, False, True, False):
        started = time.process_time()
        both.switches["SOLQ"][0].value = on
        times.append(time.process_time() - started)
    assert min(times) < 0.15  # 25 ms; nothing is predicted or drawn again


# ---- the chooser


def matches(explorer: DetectionExplorer) -> list[int]:
    return [image for _, image in explorer.chooser.matches.options]


def with_class(dataset, name: str) -> list[int]:
    return [index for index in range(len(dataset)) if name in dataset.objects(index).names]


def test_images_are_found_by_name_class_and_size_and_walked_through(both, dataset):
    chooser = both.chooser
    assert matches(both) == list(range(len(dataset)))
    chooser.filters["class"].value = "diamond"
    assert matches(both) == with_class(dataset, "diamond")
    assert both.image.value == matches(both)[0]
    assert dataset.objects(both.image.value).names[both.chosen] == "diamond"
    chooser.next.click()
    assert both.image.value == matches(both)[1]
    chooser.previous.click()
    chooser.previous.click()
    assert both.image.value == matches(both)[-1]
    chooser.filters["class"].value = "all"
    name = dataset.truth.file_names[2]
    chooser.search.value = name.upper()
    assert matches(both) == [2] == [both.image.value]
    assert chooser.note.value == f"1 of {len(dataset)} images"
    chooser.search.value = "no such file"
    assert (matches(both), both.image.value) == ([], 2)


def test_images_are_sorted_and_filtered_by_what_a_model_gets_wrong(predictors, dataset):
    ids, count = dataset.truth.ids, len(dataset.truth)
    lost = np.linspace(1, 0, count)[np.random.default_rng(0).permutation(count)]
    columns = {"score": np.full(count, 0.5), "IoU": 1 - lost, "lost": lost}
    errors = pd.DataFrame(columns | {"error": np.where(lost > 0.5, "vector", "none")}, index=ids)
    explorer = DetectionExplorer(predictors, dataset, errors=errors)
    worst = int(lost.argmax())
    for order in ("most AP lost", "lowest IoU"):
        explorer.chooser.sort.value = "file"
        explorer.image.value = 3
        explorer.chooser.sort.value = order
        assert explorer.image.value == dataset.truth.image_rows[worst]
        assert explorer.chosen == worst - dataset.truth.rows_of(explorer.image.value).start
    explorer.chooser.filters["error"].value = "vector"
    assert set(matches(explorer)) == set(dataset.truth.image_rows[lost > 0.5].tolist())
    explorer.chooser.score.value = (0.6, 1)
    assert matches(explorer) == []


def test_an_uploaded_image_is_explored_like_any_other(both, attention):
    for explorer in (both, attention):
        file, count = io.BytesIO(), explorer.image.max + 1
        Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "png")
        upload = {"name": "mine.png", "type": "image/png", "size": 1, "content": memoryview(file.getvalue())}
        explorer.chooser.upload.value = ({**upload, "last_modified": datetime.datetime.now(datetime.UTC)},)
        assert (explorer.image.value, explorer.chooser.name) == (count, "mine.png")
        assert explorer.pixels(count).shape == (30, 40, 3)
        explorer.figure()
    assert both.panels["ground truth"].objects == []


def test_a_click_in_a_figure_opens_the_image_and_marks_the_object(both, dataset):
    figure, axes = new_figure(1, 2, size=(4, 2))
    object_id = int(dataset.truth.ids[dataset.truth.rows_of(1)][-1])
    axes[0, 0].set_gid(f"{dataset.image_ids[2]}")
    axes[0, 1].set_gid(f"{dataset.image_ids[1]} {object_id}")
    clickable = both.link(figure)
    assert base64.b64decode(clickable._repr_mimebundle_()[0]["image/png"]) == clickable.png  # without a kernel
    assert clickable.objects[0]["box"][0] < clickable.objects[1]["box"][0]
    clickable.on_click(0, 0.2, 0.5)
    assert (both.image.value, both.chosen) == (2, -1)
    clickable.on_click(1, 0.7, 0.5)
    assert (both.image.value, both.chosen) == (1, len(dataset.objects(1).names) - 1)
    assert both.panels["ground truth"].chosen == both.chosen
    axes[0, 0].set_gid("999999")
    both.link(figure).on_click(0, 0.2, 0.5)
    assert "999999" in both.message


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
    drawn = attention.clickable.png
    attention.clickable.on_click(1, 0.5, 0.5)
    assert attention.object.value == attention.clickable.chosen == 1
    assert attention.panels.value != before
    assert attention.clickable.png != drawn  # its frame is drawn in, below the labels


def test_an_upright_image_is_no_higher_than_a_square_one(attention):
    attention.add_image("upright", np.zeros((90, 30, 3), dtype=np.uint8))
    assert pixels(attention.clickable.png).shape[:2] == (480, 160)
    assert attention._place.layout.flex == "0 0 12%"


def test_a_click_draws_the_image_no_more(attention):
    with patch("solq_lab.viz.widgets.attention_explorer.draw_image") as drawn:
        attention.clickable.on_click(1, 0.5, 0.5)
        attention.what.value = PIXEL
        attention.clickable.on_click(-1, 0.9, 0.5)
    assert drawn.call_count == 0


def test_a_redraw_reads_its_image_once(both, dataset):
    kind = type(dataset)
    with patch.object(kind, "__getitem__", autospec=True, side_effect=kind.__getitem__) as read:
        both.image.value = 1
    assert read.call_count == 1


def test_a_legend_with_many_entries_stays_within_its_figure(attention, monkeypatch):
    attention.what.value = LAYERS
    views = layer_views(attention._predictors["SOLQ"], attention.pixels(0), *attention._found("SOLQ"), 0)
    figure = attention_by_size(
        {"A": views, "B": [view._replace(mask=None) for view in views]}, ["1", "2"][: len(views)]
    )
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert 0 <= extent.x0 < extent.x1 <= figure.bbox.x1


def test_two_models_show_the_same_object_beside_each_other(predictors, dataset):
    explorer = AttentionExplorer({"A": predictors["SOLQ"], "B": predictors["SOLQ"]}, dataset, score=0.2)
    explorer.object.value = 1
    assert explorer.row_of("B") == 1
    titles = [axes.get_title().split(",")[0] for axes in explorer.figure().axes]
    assert titles == ["A", "attention", "B", "attention"]


def test_the_last_layers_mask_is_the_detections_and_every_layer_has_one(attention, predictors, dataset):
    attention.what.value = LAYERS
    assert len(attention.figure().axes) == 2 * 2  # layers; points and heat
    image = dataset[0][0].permute(1, 2, 0).numpy()
    found, layers = predict_with_attention(predictors["SOLQ"], image)
    views = layer_views(predictors["SOLQ"], image, found, layers, 0)
    np.testing.assert_array_equal(views[-1].mask, decode_rle([found.masks[0]])[0])
    assert views[0].mask.any()
    assert views[-1].caption == f"score {found.scores[0]:.2f}"


def test_all_queries_are_drawn(attention, root):
    attention.what.value = QUERIES
    paths, boxes = attention.figure().axes
    assert len(boxes.patches) == len(paths.collections[0].get_segments()) == tiny_experiment(root).model.queries


def test_a_clicked_pixel_shows_the_points_of_its_tokens_in_the_encoder(attention, predictors, dataset):
    attention.what.value = PIXEL
    before = attention.panels.value
    attention.clickable.on_click(-1, 0.9, 0.3)
    assert attention.panels.value != before
    assert attention.clickable.objects[0]["box"][0] == pytest.approx(90 - 100 * MARK, abs=0.1)
    encoder = record_encoder(predictors["SOLQ"], dataset[0][0].permute(1, 2, 0).numpy())
    attending, memory = encoder[-1]
    points, weights = attending.sampling(memory.tokens + memory.positions, memory.to_levels(memory.centers), memory)
    first = 0
    for level, (rows, columns) in enumerate(memory.spatial_shapes):  # nothing is padded here
        token = first + int(0.3 * rows) * columns + int(0.9 * columns)
        view = pixel_views(attention.pixels(0), encoder, (0.9, 0.3), level=level)[-1]
        torch.testing.assert_close(view.looked.points, points[0, token].reshape(-1, 2))
        torch.testing.assert_close(view.looked.weights, weights[0, token].flatten() / attending.heads)
        assert view.mask[int(0.3 * 48), int(0.9 * 48)]
        assert view.mask.sum() == (48 // rows) * (48 // columns)
        first += rows * columns
    one = pixel_views(attention.pixels(0), encoder, (0.9, 0.3), level=2, head=1)[-1]
    torch.testing.assert_close(one.looked.weights, weights[0, token, 1].flatten())


def test_every_control_redraws(attention):
    for name, value in (
        ("what", LAYERS),
        ("what", PIXEL),
        ("head", 1),
        ("what", "points"),
        ("layer", 0),
        ("head", 0),
        ("level", 1),
        ("close_up", False),
        ("image", 1),
    ):
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
