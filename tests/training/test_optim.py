"""Groups of parameters as in the released training, and learning rates by the step."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from solq_lab.build import build_model
from solq_lab.config import validate_experiment
from solq_lab.models.official import Layout, name_table
from solq_lab.schema import OptimSection
from solq_lab.training.optim import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate_factor,
    set_learning_rate,
    square_root_rule,
)


@pytest.mark.golden
def test_every_parameter_is_in_the_group_of_the_released_training(golden_root):
    misc = json.loads((golden_root / "parts_misc" / "fixture.json").read_text())
    experiment = validate_experiment({"name": "paper", "model": {"width": 384}}, source="test")
    with torch.device("meta"):  # names and groups need no numbers
        model = build_model(experiment, 91)
    optimizer = build_optimizer(model, experiment.optim)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {name_of[id(p)]: group for group in optimizer.param_groups for p in group["params"]}

    layout = Layout("resnet50", 4, encoder_layers=6, decoder_layers=6, refine_boxes=True, two_stage=False, vectors=True)
    ours = dict(name_table(layout))
    released = {"main": "main", "linear_proj": "offsets", "backbone": "backbone", "frozen": None}
    rates = misc["param_group_lr"]
    for name, group in misc["param_groups_r50_paper"].items():
        found = group_of.get(ours[name])
        assert (found and found["name"]) == released[group], name
        if found:
            assert math.isclose(found["lr"], rates[group]), name
    sizes = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
    expected = misc["group_sizes"]
    assert sizes == {"main": expected["main"], "backbone": expected["backbone"], "offsets": expected["linear_proj"]}
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == misc["trainable_parameter_count"]


def test_weight_decay_reaches_every_parameter():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimSection(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_the_step_schedule_drops_once():
    optim = OptimSection(schedule="step", drop_at=0.8, drop_factor=0.1)
    factors = [learning_rate_factor(optim, step, 10) for step in range(10)]
    assert factors == [1.0] * 8 + [0.1] * 2


def test_the_step_drop_of_the_paper_is_after_epoch_40_of_50():
    steps_per_epoch = 3665  # 117 k images in batches of 32
    optim = OptimSection()
    assert learning_rate_factor(optim, 40 * steps_per_epoch - 1, 50 * steps_per_epoch) == 1.0
    assert learning_rate_factor(optim, 40 * steps_per_epoch, 50 * steps_per_epoch) == pytest.approx(0.1)


def test_the_cosine_warms_up_linearly_and_ends_at_its_final_factor():
    optim = OptimSection(schedule="cosine", warmup=0.1, final_factor=0.01)
    factors = [learning_rate_factor(optim, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("total", [1, 2])
def test_the_shortest_trainings_have_a_learning_rate(total):
    for schedule in ("step", "cosine"):
        factors = [
            learning_rate_factor(OptimSection(schedule=schedule, warmup=0.05), step, total) for step in range(total)
        ]
        assert factors[0] == 1.0


def test_a_factor_scales_each_group_from_its_own_rate():
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1), "sampling_offsets": nn.Linear(1, 1), "head": nn.Linear(1, 1)})
    optimizer = build_optimizer(model, OptimSection(lr=1e-3, backbone_lr=2e-4, offset_lr_factor=0.5))
    for _ in range(2):  # not from the last one
        set_learning_rate(optimizer, 0.1)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"main": 1e-4, "backbone": 2e-5, "offsets": 5e-5})


def test_a_quarter_of_the_papers_batch_halves_its_learning_rates():
    assert square_root_rule(32) == {"optim.lr": 2e-4, "optim.backbone_lr": 2e-5}
    assert square_root_rule(8) == pytest.approx({"optim.lr": 1e-4, "optim.backbone_lr": 1e-5})


def test_clipping_shrinks_to_the_largest_norm_and_zero_leaves_gradients_alone():
    model = nn.Linear(2, 1, bias=False)
    for limit, expected in ((0.5, [0.3, 0.4]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        norm = gradient_norm(model.parameters())
        assert norm.item() == pytest.approx(5.0)
        clip_gradients(model.parameters(), limit, norm)
        assert model.weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_norm_and_clipping_together_are_torchs_own_bit_for_bit():
    ours, theirs = nn.Linear(7, 5), nn.Linear(7, 5)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.grad = torch.randn_like(mine)
        reference.grad = mine.grad.clone()
    norm = gradient_norm(ours.parameters())
    clip_gradients(ours.parameters(), 0.1, norm)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_one_gradient_that_is_not_finite_shows_in_the_norm():
    model = nn.Linear(2, 1)
    for value in (math.nan, math.inf):
        model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.tensor([value])
        assert not gradient_norm(model.parameters()).isfinite()
