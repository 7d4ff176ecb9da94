"""Where queries look: the very points of the forward pass, measured on masks whose outline is known."""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from tiny import CLASSES, SIDE, tiny_experiment, write_model

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.build import build_images, build_model
from solq_lab.inference.attention import (
    LayerAttention,
    QueryPoints,
    heat_map,
    object_view,
    predict_with_attention,
    query_points,
    record_attention,
)
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import encode_rle
from solq_lab.structures import Detections, ImageBatch
from solq_lab.studies import attention as study
from solq_lab.studies.attention import (
    AttentionStudy,
    examples_by_size,
    near_zones,
    study_attention,
    view_of_true_object,
)
from solq_lab.viz.attention import attention_by_size, attention_of_object, attention_shares

HEADS, LEVELS, POINTS, QUERIES = 2, 3, 4, 8


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    assert plt.get_fignums() == []


def shaken_model(experiment) -> torch.nn.Module:
    """A model whose offsets, weights and boxes depend on the query and the image, as those of a trained one do."""
    torch.manual_seed(0)
    model = build_model(experiment, len(CLASSES)).eval()
    for layer in model.decoder:
        torch.nn.init.normal_(layer.cross_attention.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.cross_attention.attention_weights.weight, std=0.5)
    for head in model.heads:
        torch.nn.init.normal_(head.box.layers[2].weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def model(data_root: Path) -> torch.nn.Module:
    return shaken_model(tiny_experiment(data_root))


@pytest.fixture(scope="module")
def predictor(data_root: Path, model, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return saved(tiny_experiment(data_root), model, tmp_path_factory.mktemp("weights"))


def saved(experiment, model, folder: Path, **arguments) -> Predictor:
    return Predictor(write_model(folder / "weights.safetensors", experiment, model), device="cpu", **arguments)


@pytest.fixture
def images() -> ImageBatch:
    """An image of 64 x 48 pixels, padded on the right."""
    padding = torch.zeros(1, 64, 64, dtype=torch.bool)
    padding[:, :, 48:] = True
    pixels = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, padding).normalised()


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


# ---- the points


def test_weights_of_a_query_sum_to_one(model, images):
    layers = record_attention(model, images)
    assert [tuple(layer.weights.shape) for layer in layers] == [(QUERIES, HEADS, LEVELS, POINTS)] * 2
    for layer in layers:
        torch.testing.assert_close(layer.weights.sum((2, 3)), torch.ones(QUERIES, HEADS))
    for which in ({}, {"layer": None}, {"layer": 0}, {"head": 1}, {"layer": None, "head": 0}):
        assert float(query_points(layers, 3, **which).weights.sum()) == pytest.approx(1.0)
    levels = [float(query_points(layers, 3, level=level).weights.sum()) for level in range(LEVELS)]
    assert max(levels) < 1.0
    assert sum(levels) == pytest.approx(1.0)


@torch.no_grad()
def test_points_are_those_of_an_independent_forward_pass(model, images):
    """The decoder once more, by hand, with the paper's formula for the points in float64."""
    layers = record_attention(model, images)
    memory = model.embed_levels(model.backbone(images.pixels), images.padding)
    for encode in model.encoder:
        memory = encode(memory)
    queries, query_pos, reference, _ = model.initial_queries(memory)
    for decode, head, recorded in zip(model.decoder, model.heads, layers, strict=True):
        values = decode.self_norm(queries + decode.self_attention(queries, query_pos))
        qk, attention = (values + query_pos)[0].double(), decode.cross_attention
        offsets = F.linear(qk, attention.sampling_offsets.weight.double(), attention.sampling_offsets.bias.double())
        offsets = offsets.view(QUERIES, HEADS, LEVELS, POINTS, 2)
        logits = F.linear(qk, attention.attention_weights.weight.double(), attention.attention_weights.bias.double())
        weights = logits.view(QUERIES, HEADS, LEVELS * POINTS).softmax(-1).view(QUERIES, HEADS, LEVELS, POINTS)
        start = reference[0].double()
        for level, (height, width) in enumerate(memory.spatial_shapes):
            valid = torch.tensor([width * 0.75, height], dtype=torch.float64).ceil()  # cells that are not padding
            if start.shape[-1] == 2:
                expected = start[:, None, None] + offsets[:, :, level] / valid
            else:
                expected = start[:, None, None, :2] + offsets[:, :, level] / POINTS * start[:, None, None, 2:] / 2
            torch.testing.assert_close(recorded.points[:, :, level].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(recorded.weights.double(), weights, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(recorded.reference.double(), start, atol=1e-6, rtol=0)
        queries = decode(queries, query_pos, reference, memory)
        reference = head(queries, reference).boxes
        torch.testing.assert_close(recorded.boxes, reference[0], atol=1e-6, rtol=0)


def test_listening_changes_no_prediction_and_leaves_no_hook_behind(model, images):
    with torch.no_grad():
        before = model(images).layers
    layers = record_attention(model, images)
    for layer, prediction in zip(layers, before, strict=True):
        assert torch.equal(layer.boxes, prediction.boxes[0])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_boxes_are_the_layers_own_also_behind_proposals(data_root: Path, images):
    model = shaken_model(tiny_experiment(data_root, model={"two_stage": True}))
    with torch.no_grad():
        expected = model(images).layers
    layers = record_attention(model, images)
    assert [torch.equal(layer.boxes, one.boxes[0]) for layer, one in zip(layers, expected, strict=True)] == [True, True]
    assert layers[0].reference.shape == (QUERIES, 4)


def test_the_baseline_with_a_mask_branch_can_be_listened_to_as_well(data_root: Path, image, tmp_path):
    experiment = tiny_experiment(
        data_root, model={"mask_branch": "sqr", "standardise_vectors": False}, codec={"kind": "none"}
    )
    predictor = saved(experiment, shaken_model(experiment), tmp_path)
    detections, layers = predict_with_attention(predictor, image)
    assert len(layers) == 2
    torch.testing.assert_close(cxcywh_to_xyxy(layers[-1].boxes)[detections.queries] * SIDE, detections.boxes)
    assert object_view(image, detections, layers, 0).mask.shape == (SIDE, SIDE)


def test_an_image_is_predicted_and_listened_to_at_once(predictor: Predictor, image: np.ndarray):
    detections, layers = predict_with_attention(predictor, image)
    assert torch.equal(detections.scores, predictor.predict(image).scores)
    torch.testing.assert_close(cxcywh_to_xyxy(layers[-1].boxes)[detections.queries] * SIDE, detections.boxes)


def test_a_predictor_that_replays_graphs_cannot_be_listened_to(predictor: Predictor, image, tmp_path, data_root, model):
    bucketed = saved(tiny_experiment(data_root), model, tmp_path, bucket=32)
    with pytest.raises(ValueError, match="bucket=32 calls no hooks; build it with bucket=None"):
        predict_with_attention(bucketed, image)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({"query": 8}, "query 8 does not exist; allowed are 0 to 7"),
        ({"query": -1}, "query -1 does not exist; allowed are 0 to 7"),
        ({"query": 0, "layer": 2}, "layer 2 does not exist; allowed are 0 to 1"),
        ({"query": 0, "layer": -3}, "layer -3 does not exist; allowed are 0 to 1"),
        ({"query": 0, "head": 2}, "head 2 does not exist; allowed are 0 to 1"),
        ({"query": 0, "level": 3}, "level 3 does not exist; allowed are 0 to 2"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(model, images, which, message):
    layers = record_attention(model, images)
    with pytest.raises(ValueError, match=message):
        query_points(layers, **which)


def test_an_object_of_an_image_without_detections_is_refused(predictor: Predictor, image: np.ndarray):
    detections, layers = predict_with_attention(predictor, image)
    with pytest.raises(ValueError, match="object 0 does not exist: there is none"):
        object_view(image, detections.above(2.0), layers, 0)


# ---- heat maps


def looked_at(*points: tuple[float, float], weights: list[float] | None = None) -> QueryPoints:
    count = len(points)
    weight = torch.full((count,), 1 / max(count, 1)) if weights is None else torch.tensor(weights)
    return QueryPoints(torch.tensor(points).reshape(-1, 2), weight, torch.zeros(count, dtype=torch.long))


def test_a_heat_map_sums_to_the_weight_in_the_image_and_peaks_at_the_point():
    looked = looked_at((0.25, 0.5), (1.2, 0.5), weights=[0.7, 0.3])
    heat = heat_map(looked, (40, 80), std=3.0)
    assert heat.sum() == pytest.approx(0.7)
    assert np.unravel_index(heat.argmax(), heat.shape) == (20, 20)
    assert heat_map(looked_at((0.0, 0.0)), (10, 10), std=2.0).sum() == pytest.approx(1.0)  # mirrored at the edge
    for nothing in (looked_at(), looked_at((2.0, 0.5))):  # the only point lies outside
        assert (heat_map(nothing, (10, 10)) == np.zeros((10, 10))).all()
        assert heat_map(nothing, (10, 10)).dtype == np.float64


# ---- what attention lies on


def test_nearness_is_the_distance_to_the_line_between_pixels():
    """Brute force: the outline as the points half-way between neighbours of which one belongs to the object."""
    mask = np.zeros((30, 30), dtype=bool)
    mask[8:20, 5:17] = True
    mask[12:15, 9:12] = False
    mask[8:10, 5:7] = False
    zones = near_zones(mask, 2.0)
    x, y = zones.corner
    bits = np.pad(mask, 10)
    for row, column in np.ndindex(zones.outline.shape):
        here = bits[row + y + 10, column + x + 10]
        down, across = np.nonzero(bits != here)
        distance = np.hypot(down - 10 - y - row, across - 10 - x - column).min() - 0.5
        assert zones.outline[row, column] == (distance <= 2.0)
    assert zones.box.sum() == (12 + 4) ** 2  # grown by the band on each side


def test_extremities_are_where_an_object_touches_its_box():
    mask = np.zeros((40, 40), dtype=bool)
    for row in range(9):  # a diamond from (20, 12) to (20, 28)
        mask[12 + row, 20 - row : 21 + row] = mask[28 - row, 20 - row : 21 + row] = True
    zones = near_zones(mask, 0.5)
    x, y = zones.corner
    down, across = np.nonzero(zones.extremities)
    corners = {(12, 20), (28, 20), (20, 12), (20, 28)}
    assert corners <= set(zip((down + y).tolist(), (across + x).tolist(), strict=True))
    assert all(
        min(abs(row + y - r) + abs(column + x - c) for r, c in corners) <= 1
        for row, column in zip(down, across, strict=True)
    )


def test_an_object_cut_by_the_edge_of_the_image_has_its_outline_there():
    mask = np.ones((10, 10), dtype=bool)
    zones = near_zones(mask, 1.0)
    inner = zones.outline[2:-2, 2:-2]  # the image within the window
    assert inner[0].all()
    assert not inner[2:-2, 2:-2].any()


def looking_at(points: np.ndarray, box: tuple[float, float, float, float], layers: int = 2) -> list[LayerAttention]:
    """One query, one head, one level, that looks at points (n, 2) with equal weights; normalised image."""
    places = torch.from_numpy(points).float().view(1, 1, 1, -1, 2)
    weights = torch.full(places.shape[:-1], 1 / len(points))
    return [LayerAttention(places, weights, torch.tensor([box]), torch.tensor([box]), torch.ones(1), None)] * layers


@pytest.fixture
def one_square(monkeypatch, predictor, data_root):
    """Every image holds one square of 20 pixels that is found; the queries look where a test says."""
    dataset = build_images(tiny_experiment(data_root))
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[:, 10:30, 10:30] = True
    square = Detections(
        torch.ones(1),
        torch.zeros(1, dtype=torch.long),
        torch.tensor([[10.0, 10.0, 30.0, 30.0]]),
        torch.zeros(1, dtype=torch.long),
        encode_rle(mask),
        ["triangle"],
    )
    monkeypatch.setattr(dataset, "objects", lambda index: square)

    def look(*points: np.ndarray):
        answers = iter(points)
        box = (20 / SIDE, 20 / SIDE, 20 / SIDE, 20 / SIDE)
        monkeypatch.setattr(
            study, "predict_with_attention", lambda predictor, image: (square, looking_at(next(answers) / SIDE, box))
        )
        return study_attention(predictor, dataset, band=1.0, area_sides=(8, 32), max_images=len(points))

    return look


def test_shares_count_the_weight_near_the_outline_and_the_measures_of_chance(one_square):
    outline = np.array([[10.0, 20.0], [30.0, 20.0], [20.0, 10.0], [20.0, 20.0]])  # three of four on the outline
    middle = np.array([[20.0, 20.0], [-5.0, 20.0]])
    found = one_square(outline, middle)
    np.testing.assert_allclose(found.outline, [[0.75, 0.75], [0.0, 0.0]])
    assert np.isnan(found.other_outline[0]).all()
    np.testing.assert_allclose(found.other_outline[1], [0.75, 0.75])  # the first square's points, in the second's box
    np.testing.assert_allclose(found.even_outline, (22**2 - 18**2) / 22**2, atol=5e-3)  # corners are rounded
    assert found.sizes.tolist() == [1, 1]
    np.testing.assert_allclose(found.mean("outline", 1), [0.375, 0.375])
    first = found.frame().loc["medium, 2 objects", 1]
    assert (first["outline", "own query"], first["outline", "other query"]) == (37.5, 75.0)


@pytest.mark.parametrize(
    ("own", "verdict"), [(0.9, "follows the shape"), (0.5, "may be chance"), (0.1, "below the other")]
)
def test_a_verdict_needs_a_paired_difference_that_excludes_zero(own, verdict):
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, (50, 1))
    shares, other = own + noise - noise.mean(), np.full((50, 1), 0.5)
    other[0] = np.nan  # the first object has no other query to compare with
    even = np.full(50, 0.3)
    found = AttentionStudy(2.0, np.ones(50, int), shares, even, other, shares, even, other)
    row = found.shape_frame().loc["outline"]
    gains = 100 * (shares[1:, 0] - 0.5)
    low, high = scipy.stats.norm.interval(0.95, gains.mean(), scipy.stats.sem(gains))
    assert (row["objects"], row["verdict"]) == (49, verdict)
    np.testing.assert_allclose(row[["difference", "low", "high"]].astype(float), [gains.mean(), low, high], rtol=1e-4)


def test_every_edge_of_a_square_is_an_extremity(one_square):
    found = one_square(np.array([[10.5, 20.0], [20.0, 29.5], [20.0, 20.0], [48.5, 20.0]]))
    np.testing.assert_allclose(found.extremities, [[0.5, 0.5]])


def test_a_model_that_finds_nothing_has_an_empty_study(predictor: Predictor, data_root: Path):
    dataset = build_images(tiny_experiment(data_root))
    found = study_attention(predictor, dataset, band=2.0, area_sides=(16, 32), score=1.0)
    assert found.outline.shape == (0, 2)
    assert np.isnan(found.mean("outline", 0)).all()
    assert found.frame().loc["small, 0 objects"].isna().all(axis=None)
    assert found.shape_frame()["verdict"].tolist() == ["may be chance"] * 2
    assert attention_shares({"SOLQ": found}, title="nothing").axes
    assert examples_by_size([predictor], dataset, area_sides=(16, 32), score=1.0) == {}
    figure = attention_by_size({"SOLQ": []}, [], title="none")
    assert "no object was found by every run" in [text.get_text() for text in figure.axes[0].texts]


def test_a_band_has_a_width(predictor: Predictor, data_root: Path):
    with pytest.raises(ValueError, match="band 0: allowed are positive numbers of pixels"):
        study_attention(predictor, build_images(tiny_experiment(data_root)), band=0, area_sides=(16, 32))


def test_an_object_that_is_not_found_cannot_be_looked_at(predictor: Predictor, data_root: Path, monkeypatch):
    dataset = build_images(tiny_experiment(data_root))
    truth = dataset.objects(0)
    far = dataclasses.replace(truth, boxes=truth.boxes + 1000)
    monkeypatch.setattr(dataset, "objects", lambda index: far)
    with pytest.raises(ValueError, match="object 0 of image 1 is not found; choose another object"):
        view_of_true_object(predictor, dataset, (0, 0))


# ---- figures


def test_every_point_is_drawn_in_pixels_with_its_weight_and_the_largest_at_the_bottom(predictor, image):
    detections, layers = predict_with_attention(predictor, image)
    view = object_view(image, detections, layers, 0)
    figure = attention_of_object(view, title="one query")
    (cloud,) = figure.axes[1].collections[-1:]
    order = view.looked.weights.argsort(descending=True)
    np.testing.assert_allclose(cloud.get_offsets(), view.looked.points[order] * SIDE - 0.5, atol=1e-4)
    sizes = cloud.get_sizes() * 4 / np.pi  # squares of diameters
    assert (np.diff(sizes) <= 1e-6).all()
    np.testing.assert_allclose((sizes - 6) / (sizes - 6).sum(), view.looked.weights[order], atol=1e-5)
    assert figure.axes[0].get_title() == view.caption


def test_a_view_without_a_mask_shows_its_box(predictor, image):
    detections, layers = predict_with_attention(predictor, image)
    view = object_view(image, dataclasses.replace(detections, masks=None), layers, 0, layer=0)
    assert view.mask is None
    assert len(view.reference) == 2
    figure = attention_of_object(view, close_up=True)
    x0, y0, x1, y1 = view.box - 0.5
    for line in figure.axes[0].collections[0].get_segments():
        np.testing.assert_allclose([*line.min(axis=0), *line.max(axis=0)], [x0, y0, x1, y1], atol=1e-4)


def test_figure_four_has_a_column_per_object_and_two_rows_per_run(predictor, image):
    detections, layers = predict_with_attention(predictor, image)
    views = [object_view(image, detections, layers, row) for row in range(3)]
    figure = attention_by_size({"SOLQ": views, "SQR": views}, ["small", "medium", "large"], title="figure 4")
    assert len(figure.axes) == 12
    assert figure.axes[0].get_title().startswith("small: ")
    assert figure.axes[0].texts[0].get_text() == "SOLQ\nsampling points"
    with pytest.raises(ValueError, match="SQR: 3 views for 2 columns"):
        attention_by_size({"SOLQ": views[:2], "SQR": views}, ["small", "medium"])
