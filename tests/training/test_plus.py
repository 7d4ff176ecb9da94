"""The options of SOLQ+: none is on by default, and trainings with all of them learn as they should."""

import subprocess
from collections.abc import Sequence

import pytest
import torch
from small_network import SIDE, SIZES, random_batch, small_backbone
from torchvision.ops import sigmoid_focal_loss
from training_runs import ENVIRONMENT, PLUS, assert_same_step, new_run

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.build import new_codec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.config import default_experiment
from solq_lab.inference.predictor import Predictor
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import read_weights
from solq_lab.structures import Target
from solq_lab.training import compilation
from solq_lab.training.guests import BOX_NOISE, WRONG_LABELS, draw_guests
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher
from solq_lab.training.step import forward_backward
from solq_lab.training.trainer import Trainer, train_run
from solq_lab.workbench.trainings import training_command

NEUTRAL = {
    "model.mixed_queries": False,
    "model.look_twice": False,
    "model.mask_look": 0,
    "model.denoising": 0,
    "loss.proposals_per_object": 1,
    "loss.band_limit": 0.0,
    "loss.tail_drop": 0.0,
    "loss.vector_kind": "codec",
    "loss.vector_units": "raw",
    "loss.vector_frame": "truth",
    "loss.class_loss": "focal",
    "loss.decoded_dice_weight": 0.0,
    "loss.outline_dice_weight": 0.0,
    "codec.learn_decoder": False,
    "evaluation.vector_dim": None,
    "evaluation.rescore": "none",
}
TERMS = ("class", "l1", "giou", "vector", "vector_dice", "outline_dice")
CLASSES = 3
PROPOSALS = {"class/proposals", "l1/proposals", "giou/proposals"}


def test_the_options_are_at_most_twenty_and_neutral_by_default():
    assert len(NEUTRAL) <= 20
    assert {key: default_experiment().value(key) for key in NEUTRAL} == NEUTRAL


def test_two_processes_train_where_one_of_them_has_no_object(data_root, tmp_path):
    run = new_run(data_root, tmp_path, **PLUS, train={"gpus": 2, "batch_size": 2, "steps": 12})
    done = subprocess.run(training_command(run, 2), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = list(run.metrics("train"))
    terms = {f"{term}{layer}" for term in TERMS for layer in ("", "/0")}
    of_guests = {f"{term}/guests{layer}" for term in TERMS for layer in ("", "/0")}
    assert all(line["losses"].keys() == terms | of_guests | PROPOSALS for line in lines)

    learned, fresh = Predictor(run).codec.decoder, new_codec(run.experiment).decoder
    assert torch.equal(learned, read_weights(run.weights).state["mask_decoder"])
    torch.testing.assert_close(fresh, DCTCodec(16, len(fresh)).decode(torch.eye(len(fresh))).flatten(1))
    assert 0 < (learned - fresh).abs().max() < 0.1


@pytest.mark.parametrize("sections", [{}, {"loss": {"vector_layers": 1}}, PLUS], ids=["plain", "last layer", "plus"])
@pytest.mark.parametrize("objects", [True, False])
def test_matching_before_mask_vectors_changes_no_loss_and_no_gradient(
    data_root, tmp_path, monkeypatch, sections, objects
):
    trainer = Trainer(new_run(data_root, tmp_path, **sections))
    for parameter in trainer.model.parameters():  # weights that start at zero would hide what reaches others
        torch.nn.init.normal_(parameter, std=0.1)
    images, targets = next(trainer._load_batches())
    if not objects:
        none = slice(0)
        targets = [t._replace(labels=t.labels[none], boxes=t.boxes[none], masks=t.masks[none]) for t in targets]

    def step():
        torch.manual_seed(0)
        trainer.model.zero_grad()
        done = forward_backward(trainer.model, trainer.criterion, trainer.scaler, (images, targets), 3.0, "none")
        gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        losses = {name: loss.item() for name, loss in done.losses.items()}
        return done.predictions.layers[-1].vectors, {"losses": losses, "gradients": gradients}

    vectors, found = step()
    assert vectors.any(-1).sum() == sum(len(target.labels) for target in targets)
    forward = SOLQ.forward
    monkeypatch.setattr(SOLQ, "forward", lambda self, images, guests, _: forward(self, images, guests))
    every, expected = step()
    assert every.any(-1).all()
    assert_same_step(found, expected)


def test_compiled_layers_take_guests(data_root, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    runs = [new_run(data_root, tmp_path / str(on), **PLUS, train={"compile": on}) for on in (False, True)]
    for run in runs:
        train_run(run)
    plain, compiled = ([line["total"] for line in run.metrics("train")] for run in runs)
    assert compiled[:3] == pytest.approx(plain[:3], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- guests


def network(**changes) -> SOLQ:
    torch.manual_seed(0)
    model = SOLQ(small_backbone(), CLASSES, vector_dim=6, **(SIZES | {"mixed_queries": True, "denoising": 2} | changes))
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def targets_of(counts: Sequence[int]) -> list[Target]:
    random = torch.Generator().manual_seed(0)
    targets = []
    for count in counts:
        boxes = 0.2 + 0.3 * torch.rand(count, 4, generator=random)
        labels = torch.randint(CLASSES, (count,), generator=random)
        targets.append(Target(0, labels, boxes, None, (SIDE, SIDE), (SIDE, SIDE)))
    return targets


def test_guests_are_the_objects_with_noise_once_in_every_group():
    targets = targets_of([3, 0, 400])
    torch.manual_seed(1)
    guests = draw_guests(network(), targets)
    assert (guests.labels.shape, guests.boxes.shape, guests.real.sum(1).tolist()) == (
        (3, 800),
        (3, 800, 4),
        [6, 0, 800],
    )
    labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
    images, places, objects = guests.pairs
    assert guests.real[images, places].all()
    assert sorted(zip((places // 400).tolist(), objects.tolist(), strict=True)) == [
        (g, k) for g in (0, 1) for k in range(403)
    ]
    assert torch.equal(images, (objects >= 3) * 2)

    kept = (guests.labels[images, places] == labels[objects]).float().mean().item()
    assert kept == pytest.approx(1 - WRONG_LABELS * (CLASSES - 1) / CLASSES, abs=0.05)
    moved = cxcywh_to_xyxy(guests.boxes[images, places]) - cxcywh_to_xyxy(boxes[objects])
    share = (moved / boxes[objects][:, 2:].repeat(1, 2)).abs()
    assert share.max() <= BOX_NOISE + 1e-5
    assert share.mean().item() == pytest.approx(BOX_NOISE / 2, rel=0.1)
    assert draw_guests(network(denoising=0), targets) is None


def test_queries_do_not_see_guests_nor_guests_those_of_another_group_or_empty_places():
    model, images = network(), random_batch()
    torch.manual_seed(2)
    guests = draw_guests(model, targets_of([3, 1]))
    found, alone = model(images, guests), model(images)
    for layer, expected in zip(found.layers, alone.layers, strict=True):
        for ours, theirs in zip(layer[:3], expected[:3], strict=True):
            torch.testing.assert_close(ours, theirs)

    changed = guests._replace(labels=guests.labels.clone(), boxes=guests.boxes.clone())
    changed.labels[:, 3:], changed.boxes[:, 3:] = (guests.labels[:, 3:] + 1) % CLASSES, 0.3  # the second group
    changed.labels[1, 1:3], changed.boxes[1, 1:3] = 2, 0.7  # empty places of the first
    for layer, other in zip(found.guest_layers, model(images, changed).guest_layers, strict=True):
        torch.testing.assert_close(other.boxes[:, 0], layer.boxes[:, 0])
        assert not torch.allclose(other.boxes[:, 3], layer.boxes[:, 3])


@pytest.mark.parametrize("counts", [[3, 1], [0, 0]])
def test_losses_of_guests_are_means_over_the_pairs_and_reach_the_labels_without_objects(counts):
    model = network()
    guests = draw_guests(model, targets_of(counts))
    predictions, targets = model(random_batch(), guests), targets_of(counts)
    costs = {"class_cost": 2.0, "l1_cost": 5.0, "giou_cost": 2.0, "focal_alpha": 0.25, "focal_gamma": 2.0}
    criterion = SetCriterion(None, HungarianMatcher(**costs))
    losses = criterion(predictions, targets)

    boxes, labels = torch.cat([t.boxes for t in targets]), torch.cat([t.labels for t in targets])
    for suffix, layer in zip(("/0", ""), predictions.guest_layers, strict=True):
        distances, focal = [], []
        for image, place, number in guests.pairs.T.tolist():
            distances.append((layer.boxes[image, place] - boxes[number]).abs().sum().item())
            truth = torch.nn.functional.one_hot(labels[number], CLASSES).double()
            focal.append(sigmoid_focal_loss(layer.logits[image, place], truth, reduction="sum").item())
        mean = {"l1": sum(distances) / max(len(distances), 1), "class": sum(focal) / max(len(focal), 1)}
        for term, expected in mean.items():
            assert losses[f"{term}/guests{suffix}"].item() == pytest.approx(expected), term
    sum(loss for name, loss in losses.items() if "/guests" in name).backward()
    assert model.label_embedding.weight.grad is not None
    assert bool(model.label_embedding.weight.grad.any()) == bool(sum(counts))
