"""The criterion against a plain loop over layers and images, and the laws it keeps on odd batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn, idctn
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec, zigzag
from solq_lab.schema import LossSection
from solq_lab.structures import LayerPrediction, Predictions, Target
from solq_lab.training.focal import dice_loss, sigmoid_focal_loss
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher
from solq_lab.training.preparation import vector_plateau

CLASSES, MASK_SIZE, VECTOR_DIM = 5, 8, 10


class SquashedDCT(DCTCodec):
    """A code trained by squared error and dice; its reconstructions lie in 0..1."""

    loss = "l2_dice"

    def decode(self, vectors):
        return super().decode(vectors).sigmoid()


def make_criterion(codec: MaskCodec | None, *, vector_std: torch.Tensor | None = None, **settings: object):
    matcher = HungarianMatcher(class_cost=2.0, l1_cost=5.0, giou_cost=2.0, focal_alpha=0.25, focal_gamma=2.0)
    return SetCriterion(codec, matcher, LossSection(**settings), vector_std=vector_std)


def random_layer(generator, batch: int, queries: int, *, vectors: bool = True) -> LayerPrediction:
    logits = torch.randn(batch, queries, CLASSES, generator=generator, dtype=torch.float64)
    boxes = 0.1 + 0.4 * torch.rand(batch, queries, 4, generator=generator, dtype=torch.float64)
    code = torch.randn(batch, queries, VECTOR_DIM, generator=generator, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (logits, boxes, code)]
    return LayerPrediction(leaves[0], leaves[1], leaves[2] if vectors else None)


def random_targets(generator, counts: list[int]) -> list[Target]:
    return [
        Target(
            image_id=image,
            labels=torch.randint(CLASSES, (count,), generator=generator),
            boxes=0.1 + 0.4 * torch.rand(count, 4, generator=generator),
            masks=torch.rand(count, MASK_SIZE, MASK_SIZE, generator=generator) > 0.5,
            image_size=(64, 64),
            original_size=(64, 64),
        )
        for image, count in enumerate(counts)
    ]


def plain_losses(criterion, layer, matching, row, targets, count) -> dict[str, float]:
    """Losses of one layer, one image after the other."""
    sums = dict.fromkeys(("class", "l1", "giou", "vector"), torch.zeros(()))
    pairs, first = 0, 0
    for image, target in enumerate(targets):
        mine = matching.images == image
        queries, objects = matching.queries[row][mine], matching.objects[row][mine] - first
        first += len(target.labels)
        pairs += len(queries)
        truth = torch.zeros_like(layer.logits[image])
        truth[queries] = F.one_hot(target.labels[objects], CLASSES).to(truth)
        focal = torchvision_focal_loss(layer.logits[image], truth, alpha=0.25, gamma=2.0, reduction="sum")
        sums["class"] = sums["class"] + focal
        boxes, true_boxes = layer.boxes[image, queries], target.boxes[objects].double()
        sums["l1"] = sums["l1"] + F.l1_loss(boxes, true_boxes, reduction="sum")
        corners = cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(true_boxes)
        sums["giou"] = sums["giou"] + generalized_box_iou_loss(*corners, eps=0.0, reduction="sum")
        if layer.vectors is not None:
            vectors = criterion.codec.encode(target.masks[objects]).double()
            sums["vector"] = sums["vector"] + F.l1_loss(layer.vectors[image, queries], vectors, reduction="sum")
    losses = {term: value.item() / count for term, value in sums.items() if term != "vector"}
    over = pairs * VECTOR_DIM if criterion.settings.vector_normalisation == "mean" else count
    return losses | {"vector": sums["vector"].item() / over}


@pytest.mark.parametrize("normalisation", ["mean", "num_boxes"])
@pytest.mark.parametrize("counts", [[3, 0, 2], [9, 1, 4]])
def test_stacked_losses_equal_a_plain_loop_over_layers_and_images(normalisation, counts):
    generator = torch.Generator().manual_seed(0)
    layers = [random_layer(generator, 3, 6) for _ in range(3)]
    proposals = random_layer(generator, 3, 11, vectors=False)
    targets = random_targets(generator, counts)
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM), vector_normalisation=normalisation)
    predictions = Predictions(layers, proposals)
    losses = criterion(predictions, targets)
    matches = criterion.matcher(predictions, targets)

    expected = {}
    for index, suffix in enumerate(("/0", "/1", "")):
        plain = plain_losses(criterion, layers[index], matches.layers, index, targets, sum(counts))
        expected |= {term + suffix: value for term, value in plain.items()}
    as_class_0 = [target._replace(labels=torch.zeros_like(target.labels)) for target in targets]
    plain = plain_losses(criterion, proposals, matches.proposals, 0, as_class_0, sum(counts))
    expected |= {f"{term}/proposals": value for term, value in plain.items() if term != "vector"}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-6)

    weight = {"class": 2.0, "l1": 5.0, "giou": 2.0, "vector": 3.0}
    by_hand = sum(weight[name.split("/")[0]] * value for name, value in expected.items())
    assert criterion.total(losses).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(("vector_layers", "expected"), [(1, {"vector"}), (2, {"vector/1", "vector"}), (9, None)])
def test_only_the_last_vector_layers_have_a_vector_loss(vector_layers, expected):
    generator = torch.Generator().manual_seed(1)
    layers = [random_layer(generator, 2, 6) for _ in range(3)]
    targets = random_targets(generator, [2, 1])
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM), vector_layers=vector_layers)
    losses = criterion(Predictions(layers, None), targets)
    names = {name for name in losses if name.startswith("vector")}
    assert names == (expected or {"vector/0", "vector/1", "vector"})
    every = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM))(Predictions(layers, None), targets)
    assert all(torch.equal(losses[name], every[name]) for name in names)


@pytest.mark.parametrize("codec", [None, DCTCodec(MASK_SIZE, VECTOR_DIM), SquashedDCT(MASK_SIZE, VECTOR_DIM)])
def test_without_objects_all_losses_are_there_and_reach_every_prediction(codec):
    generator = torch.Generator().manual_seed(2)
    layers = [random_layer(generator, 2, 6, vectors=codec is not None) for _ in range(2)]
    proposals = random_layer(generator, 2, 9, vectors=False)
    criterion = make_criterion(codec)
    empty = criterion(Predictions(layers, proposals), random_targets(generator, [0, 0]))
    full = criterion(Predictions(layers, proposals), random_targets(generator, [2, 1]))
    assert list(empty) == list(full)
    assert all(loss.item() == 0 for name, loss in empty.items() if not name.startswith("class"))
    criterion.total(empty).backward()
    for layer in (*layers, proposals):
        assert layer.logits.grad.abs().sum() > 0
        assert torch.equal(layer.boxes.grad, torch.zeros_like(layer.boxes))
        if layer.vectors is not None:
            assert torch.equal(layer.vectors.grad, torch.zeros_like(layer.vectors))


def test_two_processes_average_to_the_losses_of_one_with_the_whole_batch():
    generator = torch.Generator().manual_seed(3)
    layers = [random_layer(generator, 2, 6) for _ in range(2)]
    targets = random_targets(generator, [5, 1])
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM))
    whole = criterion(Predictions(layers, None), targets)
    halves = []
    for image in (0, 1):
        part = [LayerPrediction(*(tensor[image : image + 1] for tensor in layer[:3])) for layer in layers]
        halves.append(criterion(Predictions(part, None), targets[image : image + 1], num_boxes=3.0))
    for name, loss in whole.items():
        assert (halves[0][name] + halves[1][name]).item() / 2 == pytest.approx(loss.item(), rel=1e-9), name


@pytest.mark.parametrize(
    "options",
    [{}, {"vector_frame": "predicted", "outline_dice_weight": 2.0, "band_limit": 0.1}, {"class_loss": "quality"}],
)
def test_gradients_agree_with_finite_differences(options):
    generator = torch.Generator().manual_seed(4)
    layers = [random_layer(generator, 2, 4) for _ in range(2)]
    targets = random_targets(generator, [2, 1])
    for layer in layers:  # about right, so that they are frames
        layer.boxes.data[:, :2] = torch.stack([target.boxes[:1].expand(2, 4) for target in targets]) + 0.01
        for tensor in layer[:2]:  # weights and qualities depend on them without gradients
            tensor.requires_grad_("class_loss" not in options)
    criterion = make_criterion(SquashedDCT(MASK_SIZE, VECTOR_DIM), vector_normalisation="num_boxes", **options)

    def total(*leaves):
        rebuilt = [LayerPrediction(*leaves[:3]), LayerPrediction(*leaves[3:])]
        return criterion.total(criterion(Predictions(rebuilt, None), targets))

    leaves = [tensor for layer in layers for tensor in layer[:3]]
    assert torch.autograd.gradcheck(total, leaves, fast_mode=True)


def test_l2_dice_follows_its_formula():
    generator = torch.Generator().manual_seed(5)
    layer = random_layer(generator, 1, 4)
    targets = random_targets(generator, [3])
    codec = SquashedDCT(MASK_SIZE, VECTOR_DIM)
    criterion = make_criterion(codec)
    losses = criterion(Predictions([layer], None), targets)
    matching = criterion.matcher(Predictions([layer], None), targets).layers
    vectors = layer.vectors[0, matching.queries[0]]
    masks = targets[0].masks[matching.objects[0]]
    squared = (vectors - codec.encode(masks)).square().sum() / VECTOR_DIM
    decoded, masks = codec.decode(vectors), masks.double()
    overlap = (decoded * masks).sum((1, 2)) * 2 / ((decoded**2).sum((1, 2)) + masks.sum((1, 2)) + 1e-5)
    assert losses["vector"].item() == pytest.approx((squared + (1 - overlap).sum()).item() / 3, rel=1e-7)


def test_l2_and_decoded_dice_are_the_two_parts_of_l2_dice():
    generator = torch.Generator().manual_seed(2)
    predictions = Predictions([random_layer(generator, 2, 6) for _ in range(3)], None)
    targets = random_targets(generator, [2, 3])
    codec = SquashedDCT(MASK_SIZE, VECTOR_DIM)
    whole = make_criterion(codec)(predictions, targets)
    parts = make_criterion(codec, vector_kind="l2", decoded_dice_weight=1.0)(predictions, targets)
    assert {name for name in parts if name.startswith("vector_dice")} == {
        "vector_dice/0",
        "vector_dice/1",
        "vector_dice",
    }
    for layer in ("", "/0", "/1"):
        torch.testing.assert_close(parts[f"vector{layer}"] + parts[f"vector_dice{layer}"], whole[f"vector{layer}"])


def test_a_band_limit_keeps_the_frequencies_that_the_pixels_of_an_object_show():
    generator = torch.Generator().manual_seed(9)
    layer, targets = random_layer(generator, 2, 6), random_targets(generator, [2, 3])
    targets[1] = targets[1]._replace(image_size=(48, 96))
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM), band_limit=0.1, decoded_dice_weight=1.0)
    losses = criterion(Predictions([layer], None), targets)
    matching = criterion.matcher(Predictions([layer], None), targets).layers

    objects = [(target, number) for target in targets for number in range(len(target.labels))]
    kept, (down, across) = zigzag(MASK_SIZE)[:VECTOR_DIM].numpy(), np.indices((MASK_SIZE, MASK_SIZE))
    distances, dices, shares = [], [], []
    for image, query, number in zip(matching.images, matching.queries[0], matching.objects[0], strict=True):
        target, index = objects[number]
        (height, width), (_, _, w, h) = target.image_size, target.boxes[index].tolist()
        inside, mask = (down <= 0.1 * h * height) & (across <= 0.1 * w * width), target.masks[index].double().numpy()
        vector, spectrum = layer.vectors[image, query].detach().numpy(), np.zeros(MASK_SIZE**2)
        distances.append(np.abs(vector - (dctn(mask, norm="ortho") * inside).ravel()[kept]).sum())
        spectrum[kept] = vector
        decoded = idctn(spectrum.reshape(MASK_SIZE, MASK_SIZE) * inside, norm="ortho")
        dices.append(1 - 2 * (decoded * mask).sum() / ((decoded**2).sum() + mask.sum() + 1e-5))
        shares.append(inside.ravel()[kept].mean())
    assert min(shares) < max(shares) < 1
    assert losses["vector"].item() == pytest.approx(sum(distances) / (5 * VECTOR_DIM), rel=1e-5)
    assert losses["vector_dice"].item() == pytest.approx(sum(dices) / 5, rel=1e-6)


def test_dropped_tails_leave_the_dice_of_prefixes_of_every_length():
    generator, codec = torch.Generator().manual_seed(10), DCTCodec(MASK_SIZE, VECTOR_DIM)
    layer, targets = random_layer(generator, 1, 1), random_targets(generator, [1])
    prefixes = torch.ones(VECTOR_DIM, VECTOR_DIM).tril() * layer.vectors[0].detach()
    expected = dice_loss(codec.decode(prefixes).flatten(1), targets[0].masks.flatten(1).double().expand(VECTOR_DIM, -1))

    torch.manual_seed(0)
    counts = {}
    for share in (0.0, 0.5, 1.0):
        criterion = make_criterion(codec, tail_drop=share, decoded_dice_weight=1.0)
        found = torch.stack([criterion(Predictions([layer], None), targets)["vector_dice"] for _ in range(120)])
        # Targets are float32. Dice of neighbouring prefixes differ by more.
        counts[share] = ((found[:, None] - expected).abs() < 1e-7).sum(0).tolist()
    assert counts[0.0] == [0] * (VECTOR_DIM - 1) + [120]
    assert min(counts[1.0]) > 0
    assert counts[0.5][-1] == pytest.approx(120 * 0.55, abs=25)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "l2"])
def test_units_of_the_standard_deviation_divide_every_coefficient(kind):
    generator = torch.Generator().manual_seed(3)
    layer, targets = random_layer(generator, 2, 6), random_targets(generator, [2, 3])
    std = torch.linspace(0.5, 4.0, VECTOR_DIM)
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM), vector_kind=kind, vector_units="std", vector_std=std)
    predictions = Predictions([layer], None)
    matching = criterion.matcher(predictions, targets).layers
    true = criterion.codec.encode(torch.cat([target.masks for target in targets]))[matching.objects[0]]
    difference = (layer.vectors[matching.images, matching.queries[0]] - true) / std
    distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}[kind]
    expected = distance(difference, torch.zeros_like(difference))  # all five objects have a pair
    torch.testing.assert_close(criterion(predictions, targets)["vector"], expected)


def test_frames_and_qualities_change_their_own_terms_alone():
    generator = torch.Generator().manual_seed(12)
    targets = random_targets(generator, [2, 1])
    boxes = torch.stack([target.boxes[:1].expand(6, 4) for target in targets]).double() + 0.02
    layers = [random_layer(generator, 2, 6)._replace(boxes=boxes + 0.001 * index) for index in range(2)]
    codec, predictions = (
        DCTCodec(MASK_SIZE, VECTOR_DIM),
        Predictions(layers, random_layer(generator, 2, 9, vectors=False)),
    )
    plain = make_criterion(codec)(predictions, targets)
    for options, term in (({"vector_frame": "predicted"}, "vector"), ({"class_loss": "quality"}, "class")):
        losses = make_criterion(codec, **options)(predictions, targets)
        changed = {name for name in plain if not torch.equal(losses[name], plain[name])}
        assert changed == {f"{term}/0", term}


def test_units_without_standard_deviations_are_rejected():
    with pytest.raises(
        ValueError, match="vector_units 'std' needs vector_std, of a model built with standardise_vectors"
    ):
        make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM), vector_units="std")


def test_a_perfect_reconstruction_has_no_dice_loss_and_an_empty_pair_a_finite_one():
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    loss = dice_loss(masks, masks)
    assert loss[0] == pytest.approx(0.0, abs=1e-5)
    assert loss[1] == 1.0


def test_focal_loss_is_torchvisions_and_finite_at_huge_logits():
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64) * 3
    truth = (torch.rand(4, 7, generator=generator) > 0.7).double()
    expected = torchvision_focal_loss(logits, truth, alpha=0.3, gamma=1.5)
    torch.testing.assert_close(sigmoid_focal_loss(logits, truth, alpha=0.3, gamma=1.5), expected)
    extreme = sigmoid_focal_loss(torch.tensor([-1e4, 1e4]), torch.tensor([1.0, 0.0]), alpha=0.25, gamma=2.0)
    assert extreme.tolist() == [2500.0, 7500.0]


def test_half_precision_predictions_give_float32_losses_also_under_autocast():
    generator = torch.Generator().manual_seed(7)
    layer = random_layer(generator, 2, 6)
    half = LayerPrediction(*(tensor.detach().bfloat16() for tensor in layer[:3]))
    raised = LayerPrediction(*(tensor.float() for tensor in half[:3]))
    targets = random_targets(generator, [3, 2])
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(Predictions([half], None), targets)
    expected = criterion(Predictions([raised], None), targets)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, expected[name]), name


def test_targets_are_encoded_once_per_step():
    class Counting(DCTCodec):
        calls = 0

        def encode(self, masks):
            Counting.calls += 1
            return super().encode(masks)

    generator = torch.Generator().manual_seed(8)
    layers = [random_layer(generator, 3, 6) for _ in range(4)]
    make_criterion(Counting(MASK_SIZE, VECTOR_DIM))(Predictions(layers, None), random_targets(generator, [2, 0, 1]))
    assert Counting.calls == 1


def test_plateau_is_what_no_constant_answer_beats():
    generator = torch.Generator().manual_seed(9)
    vectors = torch.randn(101, VECTOR_DIM, generator=generator) * torch.arange(1, VECTOR_DIM + 1)
    plateau = vector_plateau(vectors)
    for _ in range(50):
        constant = vectors.median(0).values + torch.randn(VECTOR_DIM, generator=generator)
        assert F.l1_loss(constant.expand_as(vectors), vectors) >= plateau
    assert vector_plateau(vectors[:1]) == 0.0
    assert vector_plateau(vectors[:0]) == 0.0


def test_targets_and_predictions_that_do_not_fit_the_codec_are_named():
    generator = torch.Generator().manual_seed(10)
    layer = random_layer(generator, 1, 6)
    targets = random_targets(generator, [2])
    criterion = make_criterion(DCTCodec(MASK_SIZE, VECTOR_DIM))
    with pytest.raises(ValueError, match=r"image 0: masks None do not fit the codec, which wants \(2, 8, 8\)"):
        criterion(Predictions([layer], None), [targets[0]._replace(masks=None)])
    with pytest.raises(ValueError, match=r"masks \(2, 4, 4\) do not fit"):
        criterion(Predictions([layer], None), [targets[0]._replace(masks=torch.ones(2, 4, 4, dtype=torch.bool))])
    with pytest.raises(ValueError, match="decoder layer 0 predicts vectors of length None, the codec has 10"):
        criterion(Predictions([layer._replace(vectors=None)], None), targets)


def test_arguments_outside_their_choices_are_refused():
    for wrong in ({"vector_normalisation": "sum"}, {"vector_layers": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_criterion(None, **wrong)
    codec = DCTCodec(MASK_SIZE, VECTOR_DIM)
    codec.loss = "huber"
    with pytest.raises(ValueError, match=r"DCTCodec.loss 'huber': allowed are 'l1' and 'l2_dice'"):
        make_criterion(codec)
