"""The baseline with a mask branch: its parts, its losses, and whole runs, joint and on a frozen detector."""

import argparse
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from small_network import draw_images
from tiny import SIDE, tiny_experiment
from torchvision.ops import sigmoid_focal_loss
from training_runs import SQR

from solq_lab.build import build_dataset, build_model
from solq_lab.config import ConfigError
from solq_lab.data.coco import CocoDataset
from solq_lab.data.transforms import ReleasedAugmentation
from solq_lab.files import read_json
from solq_lab.inference import postprocess as postprocessing
from solq_lab.inference.postprocess import postprocess
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import crop_and_resize, decode_rle
from solq_lab.models.attention import Memory
from solq_lab.models.heads import VectorMLP
from solq_lab.models.sqr import AttentionMaps, MaskBranch, SQRDetector
from solq_lab.models.weights import WeightMismatch, export_official, read_weights
from solq_lab.runs import create_run
from solq_lab.schema import LossSection
from solq_lab.structures import ImageMasks, LayerPrediction, Predictions, Target
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher
from solq_lab.training.trainer import train_run
from solq_lab.workbench.released import import_released

CLASSES = 2


@pytest.fixture(scope="module")
def detector_run(data_root, tmp_path_factory):
    """A plain detector, trained for two steps."""
    changes = SQR | {"model": {"standardise_vectors": False}, "train": {"steps": 2}}
    run = create_run(tiny_experiment(data_root, **changes), tmp_path_factory.mktemp("detector"))
    train_run(run)
    return run


def sqr_experiment(data_root, **sections):
    model = SQR["model"] | sections.pop("model", {})
    return tiny_experiment(data_root, **{**SQR, **sections, "model": model})


def frozen_experiment(data_root, weights, **train):
    return sqr_experiment(data_root, model={"pretrained": str(weights)}, train={"freeze_detector": True, **train})


def some_tokens(count: int, padded: int = 0, width: int = 32, batch: int = 2) -> Memory:
    """A memory of one level, one row of cells, whose last cells are padding."""
    tokens = torch.randn(batch, count, width, generator=torch.Generator().manual_seed(1))
    padding = torch.arange(count).expand(batch, -1) >= count - padded
    nothing = torch.empty(0)
    return Memory(tokens, nothing, nothing, padding, ((1, count),), nothing, nothing)


# The network


def test_parameters_at_width_256_are_as_many_as_the_paper_counts(data_root):
    with torch.device("meta"):
        branch = MaskBranch(256, 8, (512, 1024, 2048), stride=2)
        vectors = VectorMLP(256, 1024, 256)
        sizes = {"backbone": "resnet50", "levels": 4, "width": 256, "heads": 8, "encoder_layers": 6, "queries": 300}
        sizes |= {"decoder_layers": 6, "feedforward": 1024}
        whole = build_model(sqr_experiment(data_root, model=sizes), 91)
    assert sum(parameter.numel() for parameter in branch.parameters()) == 26_108_057
    assert sum(parameter.numel() for parameter in vectors.parameters()) == 1_575_168
    trained = [parameter.numel() for parameter in whole.parameters() if parameter.requires_grad]
    assert sum(trained) == 66_735_317  # as the released log says


def test_attention_of_a_query_sums_to_one_over_heads_and_cells_and_shuns_padding():
    torch.manual_seed(0)
    maps = AttentionMaps(32, heads=4)(torch.randn(2, 5, 32), some_tokens(7, padded=3))
    assert maps.shape == (2, 5, 4, 1, 7)
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 5))
    assert (maps[..., 4:] == 0).all()
    assert (maps[..., :4] > 0).all()


def test_a_query_draws_its_mask_whatever_the_others_are():
    torch.manual_seed(0)
    branch = MaskBranch(32, 2, (16, 24, 32), stride=1)
    features = [torch.randn(2, channels, 4, 4 * side) for channels, side in ((16, 4), (24, 2), (32, 1))]
    queries, levels, memory = torch.randn(2, 5, 32), some_tokens(4), some_tokens(4)
    whole = branch(queries, levels, memory, features)
    assert whole.shape == (2, 5, 4, 16)
    some = branch(queries[:, [3, 1]], levels, memory, features)
    torch.testing.assert_close(some, whole[:, [3, 1]])
    assert not torch.allclose(whole[:, 1], whole[:, 3])
    assert branch(queries[:, :0], levels, memory, features).shape == (2, 0, 4, 16)


@pytest.mark.parametrize(("levels", "detail", "stride"), [(3, 1, 8), (3, 2, 4), (4, 1, 16), (5, 1, 16)])
def test_masks_have_the_stride_of_c3_or_twice_that_above_c5_over_the_detail(data_root, levels, detail, stride):
    model = build_model(sqr_experiment(data_root, model={"levels": levels, "mask_detail": detail}), CLASSES).eval()
    images = draw_images((96, 136), (70, 64))
    *earlier, last = model(images).layers
    assert last.masks.logits.shape == (2, 8, -(-96 // stride), -(-136 // stride))
    assert torch.equal(last.masks.padding, images.padding)
    assert all(layer.masks is None for layer in earlier)
    assert last.vectors is None


def test_padding_changes_nothing_in_classes_and_boxes_of_the_same_detector_without_branch(data_root):
    torch.manual_seed(0)
    sqr = build_model(sqr_experiment(data_root), CLASSES).eval()
    plain = build_model(sqr_experiment(data_root, model={"mask_branch": "none"}), CLASSES).eval()
    state = {name: tensor for name, tensor in sqr.state_dict().items() if not name.startswith("mask_branch.")}
    plain.load_state_dict(state)
    images = draw_images((48, 48), (32, 40))
    for ours, theirs in zip(sqr(images).layers, plain(images).layers, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(ours.boxes, theirs.boxes)


# The losses


def criterion_of(**weights) -> SetCriterion:
    matcher = HungarianMatcher(class_cost=2.0, l1_cost=5.0, giou_cost=2.0, focal_alpha=0.25, focal_gamma=2.0)
    equal = {f"{name}_weight": 1.0 for name in ("class", "l1", "giou", "vector", "mask", "dice")}
    return SetCriterion(None, matcher, LossSection(**{**equal, **weights}))


def random_layer(padding: torch.Tensor, queries: int = 4) -> LayerPrediction:
    generator = torch.Generator().manual_seed(2)
    batch, height, width = padding.shape
    logits = torch.randn(batch, queries, height // 8, width // 8, generator=generator, dtype=torch.float64)
    boxes = 0.1 + 0.4 * torch.rand(batch, queries, 4, generator=generator, dtype=torch.float64)
    classes = torch.randn(batch, queries, CLASSES, generator=generator, dtype=torch.float64)
    return LayerPrediction(classes, boxes, None, ImageMasks(logits.requires_grad_(), padding))


def random_target(count: int, height: int, width: int) -> Target:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    boxes = 0.1 + 0.4 * torch.rand(count, 4, generator=generator)
    bitmaps = torch.rand(count, height, width, generator=generator) > 0.5
    return Target(count, labels, boxes, None, (height, width), (height, width), bitmaps)


def test_mask_losses_are_a_plain_sum_over_pixels_of_the_padded_image():
    padding = draw_images((40, 48), (24, 32)).padding
    targets, layer = [random_target(2, 40, 48), random_target(1, 24, 32)], random_layer(padding)
    criterion = criterion_of()
    losses = criterion(Predictions([layer], None), targets)
    matching = criterion.matcher(Predictions([layer], None), targets).layers
    bitmaps = [bitmap for target in targets for bitmap in target.bitmaps.double()]
    focal = dice = 0.0
    for image, query, number in zip(matching.images, matching.queries[0], matching.objects[0], strict=True):
        truth = torch.zeros(40, 48, dtype=torch.float64)
        truth[: bitmaps[number].shape[0], : bitmaps[number].shape[1]] = bitmaps[number]
        logits = F.interpolate(layer.masks.logits[image, query][None, None], size=(40, 48), mode="bilinear")[0, 0]
        focal += sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2.0).mean().item() / 3
        chance = logits.sigmoid()
        dice += (1 - (2 * (chance * truth).sum() + 1) / (chance.sum() + truth.sum() + 1)).item() / 3
    assert losses["mask"].item() == pytest.approx(focal, rel=1e-9)
    assert losses["dice"].item() == pytest.approx(dice, rel=1e-9)
    assert "mask/0" not in losses


def test_weights_of_the_mask_losses_count_in_the_total():
    layer, targets = random_layer(draw_images((16, 16)).padding), [random_target(2, 16, 16)]
    criterion = criterion_of(mask_weight=3.0, dice_weight=0.5)
    losses = criterion(Predictions([layer], None), targets)
    others = sum(loss for name, loss in losses.items() if name not in ("mask", "dice"))
    torch.testing.assert_close(criterion.total(losses), others + 3 * losses["mask"] + losses["dice"] / 2)


def test_without_objects_the_mask_losses_are_zero_and_still_reach_the_masks():
    layer = random_layer(draw_images((40, 48), (24, 32)).padding)
    targets = [random_target(0, 40, 48), random_target(0, 24, 32)]
    losses = criterion_of()(Predictions([layer], None), targets)
    assert losses["mask"] == losses["dice"] == 0
    (losses["mask"] + losses["dice"]).backward()
    assert torch.equal(layer.masks.logits.grad, torch.zeros_like(layer.masks.logits))


def test_bitmaps_that_do_not_fit_are_rejected():
    layer, target = random_layer(draw_images((16, 16)).padding), random_target(2, 16, 16)
    for wrong, found in ((None, "None"), (target.bitmaps[:, :8], r"\(2, 8, 16\)")):
        with pytest.raises(ValueError, match=rf"image 2: bitmaps {found} .* expected \(2, 16, 16\)"):
            criterion_of()(Predictions([layer], None), [target._replace(bitmaps=wrong)])


# Data and detections


def test_bitmaps_move_with_their_image(data_root):
    crop = ReleasedAugmentation((40, 56), 64, (44, 60), (30, 44))
    dataset = CocoDataset(
        data_root / "train",
        data_root / "train.json",
        mask_size=16,
        with_bitmaps=True,
        transform=crop,
        mask_route="bitmap",
    )
    cropped = 0
    for epoch in range(3):
        for index in range(len(dataset)):
            image, target = dataset[epoch, index]
            assert target.bitmaps.shape == (len(target.labels), *image.shape[1:])
            assert target.bitmaps.dtype == torch.bool
            height, width = target.image_size
            corners = target.boxes * torch.tensor([width, height, width, height])
            corners = torch.cat([corners[:, :2] - corners[:, 2:] / 2, corners[:, :2] + corners[:, 2:] / 2], dim=1)
            same = (crop_and_resize(target.bitmaps, corners, 16) >= 0.5) == target.masks
            assert same.float().mean() > 0.99 or not len(same)  # the box went through float32 and back
            cropped += image.shape[1:] != (40, 40)
    assert cropped


def test_bitmaps_are_made_for_the_mask_branch_alone(data_root):
    sqr = sqr_experiment(data_root)
    target = build_dataset(sqr, "train")[0][1]
    assert target.masks is None
    assert target.bitmaps.shape == (1, SIDE, SIDE)
    assert build_dataset(sqr, "train")[3][1].bitmaps.shape == (0, SIDE, SIDE)
    assert build_dataset(sqr, "val")[0][1].bitmaps is None
    assert build_dataset(sqr, "val", with_masks=True)[0][1].bitmaps is not None
    assert build_dataset(tiny_experiment(data_root), "train")[0][1].bitmaps is None


def test_a_mask_is_cut_to_its_image_and_brought_to_the_original_size():
    logits = torch.full((2, 3, 5, 6), -4.0)
    logits[1, 2, :, 3:] = 4.0  # columns 24 to 48 of the padded 40 x 48
    padding = torch.zeros(2, 40, 48, dtype=torch.bool)
    padding[1, :, 32:] = True
    padding[1, 32:] = True
    scores = torch.zeros(2, 3, CLASSES)
    scores[1, 2] = torch.tensor([3.0, 2.0])  # one query speaks for both classes
    prediction = LayerPrediction(scores, torch.full((2, 3, 4), 0.5), None, ImageMasks(logits, padding))
    first, second = postprocess(prediction, [(40, 48), (64, 64)], None, top_k=2, class_names=["a", "b"])
    assert [rle["size"] for rle in first.masks + second.masks] == [[40, 48]] * 2 + [[64, 64]] * 2
    assert coco_mask.area(first.masks).sum() == 0
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[:, 48:] = True  # twice the size; the object goes on under the padding, which is cut off
    found = decode_rle(second.masks)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    second.masks[0]["counts"] = b""
    assert second.masks[1]["counts"] != b""


def test_masks_of_a_photograph_are_brought_to_its_size_a_few_at_a_time(monkeypatch):
    size, at_once = (1500, 2000), []

    def encode(masks: torch.Tensor, _real=postprocessing.encode_rle) -> list[dict]:
        at_once.append(masks.numel())
        return _real(masks)

    monkeypatch.setattr(postprocessing, "encode_rle", encode)
    logits = torch.randn(1, 10, 8, 8)
    masks = ImageMasks(logits, torch.zeros(1, 32, 32, dtype=torch.bool))
    prediction = LayerPrediction(torch.zeros(1, 10, 1), torch.full((1, 10, 4), 0.5), None, masks)
    [found] = postprocess(prediction, [size], None, top_k=10, class_names=["a"])
    assert max(at_once) <= postprocessing.PIXELS_PER_CHUNK
    whole = F.interpolate((F.interpolate(logits[0, :, None], (32, 32), mode="bilinear") > 0).byte(), size)[:, 0].bool()
    assert torch.equal(decode_rle(found.masks), whole[found.queries])


# Settings


def test_settings_that_contradict_each_other_are_rejected(data_root, tmp_path):
    faults = {
        "model.mask_branch sqr and codec.kind dct would both make masks": {"model": {"mask_branch": "sqr"}},
        "mask_detail 2 is about a mask branch; set it to 1": {"model": {"mask_detail": 2}},
        "mask_branch sqr needs the maps C3-C5: give levels 3 or more": SQR | {"model": SQR["model"] | {"levels": 1}},
        "freeze_detector leaves nothing to train": {"train": {"freeze_detector": True}},
        "freeze_detector needs a trained detector, and model.pretrained is none": SQR
        | {"train": {"freeze_detector": True}},
    }
    for message, sections in faults.items():
        with pytest.raises(ConfigError, match=message):
            tiny_experiment(data_root, **sections)


def test_a_frozen_detector_must_be_whole(data_root, detector_run, tmp_path):
    wider = frozen_experiment(data_root, detector_run.weights)
    wider = wider.model_copy(update={"model": wider.model.model_copy(update={"feedforward": 64})})
    with pytest.raises(WeightMismatch, match=r"9 tensors of the frozen detector are not in it, the first is encoder"):
        build_model(wider, CLASSES, pretrained=True)


# Whole runs


def test_every_trained_parameter_gets_a_gradient_with_and_without_objects(data_root):
    model = build_model(sqr_experiment(data_root), CLASSES)
    images = draw_images((48, 48), (40, 32))
    for counts in ((2, 0), (0, 0)):
        model.zero_grad()
        targets = [random_target(counts[0], 48, 48), random_target(counts[1], 40, 32)]
        criterion = criterion_of()
        criterion.total(criterion(model(images), targets)).backward()
        without = [n for n, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
        assert without == []


def test_a_joint_training_learns_is_evaluated_and_predicts_masks(data_root, tmp_path):
    run = create_run(sqr_experiment(data_root, train={"steps": 60}, data={"cache": True}), tmp_path)
    assert train_run(run) == "finished"
    lines = run.metrics("train")
    halves = (lines[:10], lines[-10:])
    first, last = ({name: sum(line["losses"][name] for line in part) for name in ("mask", "dice")} for part in halves)
    assert last["mask"] < 0.75 * first["mask"]
    assert last["dice"] < first["dice"]
    metrics = read_json(run.results)["metrics"]
    assert {"box.AP", "segm.AP", "boundary.AP"} <= set(metrics)
    predictor = Predictor(run)
    assert isinstance(predictor.model, SQRDetector)
    image = np.asarray(Image.open(data_root / "val" / "1.png"))[:40]
    found = predictor.predict(image)
    assert len(found.masks) == len(found.scores) > 0
    assert found.masks[0]["size"] == [40, SIDE]
    assert Predictor(run, bucket=64).predict(image).masks[0]["size"] == [40, SIDE]


def test_a_frozen_detector_stays_as_it_was_while_the_branch_learns(data_root, detector_run, tmp_path):
    experiment = frozen_experiment(data_root, detector_run.weights, steps=3)
    run = create_run(experiment, tmp_path)
    train_run(run)
    before, after = (read_weights(path).state for path in (detector_run.weights, run.weights))
    for name, tensor in before.items():  # batch-norm statistics among them
        assert torch.equal(after[name], tensor), name
    torch.manual_seed(experiment.seed)
    fresh = build_model(experiment, CLASSES, pretrained=True)
    assert all(name.startswith("mask_branch.") == p.requires_grad for name, p in fresh.named_parameters())
    assert any(not torch.equal(after[name], tensor) for name, tensor in fresh.state_dict().items())
    fresh.train()
    assert fresh.mask_branch.training
    assert not fresh.backbone.training
    assert not fresh.decoder[0].dropout.training
    assert not fresh.eval().mask_branch.training


@pytest.mark.golden
def test_a_released_checkpoint_is_imported_predicts_masks_and_goes_back(golden_root: Path, tmp_path):
    fixture = golden.Fixture(golden_root / "sqr_small")
    official = fixture.official_state()
    released, ours, back = (tmp_path / name for name in ("released.pth", "ours.safetensors", "back.pth"))
    torch.save({"model": official, "args": argparse.Namespace(**fixture.args)}, released)

    report = import_released(released, ours)
    assert (report.missing, report.left_over) == ((), ())
    predictor = Predictor(ours, device="cpu", top_k=5)
    assert (predictor.experiment.model.mask_branch, predictor.codec) == ("sqr", None)
    found = predictor.predict(np.zeros((48, 64, 3), dtype=np.uint8))
    assert [mask["size"] for mask in found.masks] == [[48, 64]] * 5
    export_official(ours, back)
    returned = torch.load(back, weights_only=True)["model"]
    assert list(returned) == list(official)
    assert all(torch.equal(returned[name], tensor) for name, tensor in official.items())
