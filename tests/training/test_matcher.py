"""The matching against the released implementation's cost matrices, and against exhaustive search."""

import itertools
import json

import numpy as np
import pytest
import torch

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.structures import LayerPrediction, Predictions, Target
from solq_lab.training.matcher import HungarianMatcher, MatchingError

WEIGHTS = {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0, "focal_alpha": 0.25, "focal_gamma": 2.0}


def make_target(labels, boxes, image_id: int = 0) -> Target:
    labels, boxes = torch.as_tensor(labels, dtype=torch.int64), torch.as_tensor(boxes, dtype=torch.float32)
    return Target(image_id, labels, boxes.reshape(-1, 4), None, (64, 64), (64, 64))


def random_layer(generator, batch: int, queries: int, classes: int = 5) -> LayerPrediction:
    logits = torch.randn(batch, queries, classes, generator=generator)
    return LayerPrediction(logits, 0.1 + 0.4 * torch.rand(batch, queries, 4, generator=generator), None)


def random_targets(generator, counts: list[int], classes: int = 5) -> list[Target]:
    return [
        make_target(
            torch.randint(classes, (count,), generator=generator),
            0.1 + 0.4 * torch.rand(count, 4, generator=generator),
            image_id=100 + image,
        )
        for image, count in enumerate(counts)
    ]


def pairs_of(matching, layer: int, image: int, first_object: int) -> list[tuple[int, int]]:
    """(query, object of its image) of one layer and image, by rising query."""
    mine = matching.images == image
    queries, objects = matching.queries[layer][mine], matching.objects[layer][mine] - first_object
    return sorted(zip(queries.tolist(), objects.tolist(), strict=True))


@pytest.mark.golden
def test_golden_matcher_costs_and_assignments_are_the_released_ones(golden_root):
    folder = golden_root / "parts_matcher"
    record = json.loads((folder / "fixture.json").read_text())
    arrays = np.load(folder / "fixture.npz")
    matcher = HungarianMatcher(**WEIGHTS)
    for number, case in enumerate(record["cases"]):
        shape = (case["batch"], case["queries"])
        rng = np.random.RandomState(case["seed"])
        logits = (rng.standard_normal((*shape, 91)) * 2 - 4).astype(np.float32)
        stored = arrays[f"logits_{number}"]
        assert not stored.size or np.array_equal(stored, logits)
        layer = LayerPrediction(torch.from_numpy(logits), torch.from_numpy(arrays[f"boxes_{number}"]), None)
        targets = [
            make_target(arrays[f"t_labels_{number}_{image}"], arrays[f"t_boxes_{number}_{image}"])
            for image in range(case["batch"])
        ]
        predictions = Predictions([layer], None)
        counts = [len(target.labels) for target in targets]
        cost = sum(matcher.costs(predictions, targets).values())
        matching = matcher(predictions, targets).layers
        first = 0
        for image, count in enumerate(counts):
            expected = arrays[f"cost_{number}_{image}"]  # (J, K)
            np.testing.assert_allclose(cost[first : first + count].T, expected, atol=2e-5)
            released = sorted(zip(*case["indices"][image], strict=True))
            assert pairs_of(matching, 0, image, first) == released, f"case {number}, image {image}"
            first += count


@pytest.mark.parametrize("classes", [False, True], ids=["proposals of anything", "proposals with classes"])
def test_every_layer_and_image_has_the_cheapest_one_to_one_matching(classes: bool):
    generator = torch.Generator().manual_seed(0)
    predictions = Predictions(
        [random_layer(generator, 3, 5) for _ in range(2)], random_layer(generator, 3, 6), proposals_have_classes=classes
    )
    targets = random_targets(generator, [3, 0, 4])
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    as_class_0 = [target._replace(labels=target.labels * classes) for target in targets]
    sets = [(matches.layers, 0, predictions.layers[0], targets), (matches.layers, 1, predictions.layers[1], targets)]
    sets.append((matches.proposals, 0, predictions.proposals, as_class_0))
    for matching, row, layer, wanted in sets:
        for image, first in ((0, 0), (1, 3), (2, 3)):
            expected = exhaustive_matching(layer, wanted[image], image)
            assert pairs_of(matching, row, image, first) == expected


def exhaustive_matching(layer: LayerPrediction, target: Target, image: int) -> list[tuple[int, int]]:
    cost = plain_cost(layer.logits[image].double(), layer.boxes[image].double(), target)
    rows = range(len(target.labels))
    tried = itertools.permutations(range(len(cost)), len(target.labels))
    best = min(tried, key=lambda queries: sum(float(cost[q, k]) for q, k in zip(queries, rows, strict=True)))
    return sorted(zip(best, rows, strict=True))


def plain_cost(logits, boxes, target: Target):
    """Costs (J, K) of one image, written as the formula reads."""
    from torchvision.ops import generalized_box_iou

    p = logits.sigmoid()[:, target.labels]
    focal = -0.25 * (1 - p) ** 2 * (p + 1e-8).log() + 0.75 * p**2 * (1 - p + 1e-8).log()
    truth = target.boxes.double()
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
    return 2 * focal + 5 * torch.cdist(boxes, truth, p=1) - 2 * giou


def test_an_object_is_matched_to_several_proposals_and_a_query_to_one_object():
    generator = torch.Generator().manual_seed(3)
    predictions = Predictions([random_layer(generator, 2, 5)], random_layer(generator, 2, 6))
    targets = random_targets(generator, [3, 1])
    matches = HungarianMatcher(**WEIGHTS, proposals_per_object=2)(predictions, targets)
    assert matches.layers.queries.shape == (1, 4)
    for image, first in ((0, 0), (1, 3)):
        twice = targets[image]._replace(
            labels=torch.zeros_like(targets[image].labels).repeat(2), boxes=targets[image].boxes.repeat(2, 1)
        )
        count = len(targets[image].labels)
        expected = exhaustive_matching(predictions.proposals, twice, image)
        found = pairs_of(matches.proposals, 0, image, first)
        assert found == sorted((query, row % count) for query, row in expected)


def test_more_objects_than_queries_leave_objects_unmatched_and_queries_all_used():
    generator = torch.Generator().manual_seed(1)
    predictions = Predictions([random_layer(generator, 2, 3)], None)
    matching = HungarianMatcher(**WEIGHTS)(predictions, random_targets(generator, [7, 1])).layers
    assert matching.images.tolist() == [0, 0, 0, 1]
    assert sorted(matching.queries[0, :3].tolist()) == [0, 1, 2]
    assert len(set(matching.objects[0].tolist())) == 4
    assert matching.objects[0, 3] == 7


def test_a_batch_without_objects_has_an_empty_matching():
    generator = torch.Generator().manual_seed(2)
    layers = [random_layer(generator, 2, 3) for _ in range(4)]
    matches = HungarianMatcher(**WEIGHTS)(Predictions(layers, layers[0]), random_targets(generator, [0, 0]))
    assert matches.layers.images.shape == (0,)
    assert matches.layers.queries.shape == matches.layers.objects.shape == (4, 0)
    assert matches.proposals.queries.shape == (1, 0)


def test_layers_do_not_influence_each_other():
    generator = torch.Generator().manual_seed(3)
    layers = [random_layer(generator, 2, 20) for _ in range(3)]
    targets = random_targets(generator, [4, 2])
    matcher = HungarianMatcher(**WEIGHTS)
    together = matcher(Predictions(layers, None), targets).layers
    for index, layer in enumerate(layers):
        alone = matcher(Predictions([layer], None), targets).layers
        assert torch.equal(together.queries[index], alone.queries[0])
        assert torch.equal(together.objects[index], alone.objects[0])


def test_half_precision_under_autocast_is_matched_in_float32():
    generator = torch.Generator().manual_seed(4)
    layer = random_layer(generator, 2, 20)
    half = LayerPrediction(layer.logits.bfloat16(), layer.boxes.bfloat16(), None)
    raised = LayerPrediction(half.logits.float(), half.boxes.float(), None)
    targets = random_targets(generator, [5, 5])
    matcher = HungarianMatcher(**WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        matching = matcher(Predictions([half], None), targets).layers
    assert torch.equal(matching.queries, matcher(Predictions([raised], None), targets).layers.queries)


@pytest.mark.parametrize(
    ("field", "where", "term", "place"),
    [
        ("logits", "layer", "class", "decoder layer 1"),
        ("boxes", "layer", "l1", "decoder layer 1"),
        ("boxes", "proposals", "l1", "encoder proposals"),
    ],
)
def test_a_cost_that_is_not_finite_names_image_layer_query_and_term(field, where, term, place):
    generator = torch.Generator().manual_seed(5)
    layers = [random_layer(generator, 2, 6) for _ in range(2)]
    proposals = random_layer(generator, 2, 9)
    getattr(proposals if where == "proposals" else layers[1], field)[1, 4] = float("nan")
    targets = random_targets(generator, [2, 3])
    with pytest.raises(MatchingError) as raised:
        HungarianMatcher(**WEIGHTS)(Predictions(layers, proposals), targets)
    message = str(raised.value)
    assert message.startswith(f"image 101, {place}, query 4: the {term} cost is not finite")
    assert f"class {int(targets[1].labels[0])}" in message


def test_boxes_without_area_on_both_sides_are_reported_as_the_giou_cost():
    flat = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    predictions = Predictions([LayerPrediction(torch.zeros(1, 1, 2), flat[None], None)], None)
    with pytest.raises(MatchingError, match="image 7, decoder layer 0, query 0: the giou cost is not finite"):
        HungarianMatcher(**WEIGHTS)(predictions, [make_target([0], flat, image_id=7)])


def test_a_batch_of_another_size_is_refused():
    generator = torch.Generator().manual_seed(6)
    with pytest.raises(MatchingError, match="1 targets for predictions of 2 images"):
        HungarianMatcher(**WEIGHTS)(Predictions([random_layer(generator, 2, 3)], None), random_targets(generator, [1]))
