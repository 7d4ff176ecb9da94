"""Packed layers say what the plain ones say, and step aside where the CPU's float32 kernels do not serve."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from solq_lab.inference.packing import PackedConv2d, PackedLinear, pack_weights
from solq_lab.models.encoder import FeedForward


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_layer_equals_the_plain_one(shape: tuple[int, ...], relu: bool, bias: bool):
    plain, features = frozen(nn.Linear(24, 40, bias=bias)), torch.randn(shape)
    expected = plain(features).relu() if relu else plain(features)
    torch.testing.assert_close(PackedLinear(plain, relu=relu)(features), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "geometry", [{"kernel_size": 1}, {"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": 7, "stride": 2}]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_a_packed_convolution_equals_the_plain_one(geometry: dict, groups: int):
    plain, images = frozen(nn.Conv2d(8, 16, groups=groups, **geometry)), torch.randn(2, 8, 21, 30)
    found = PackedConv2d(plain)(images)
    torch.testing.assert_close(found, plain(images), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_inside_autocast_takes_the_plain_way():
    plain, features = frozen(nn.Linear(24, 40)), torch.randn(3, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PackedLinear(plain)(features)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, plain(features))


def test_a_copy_of_a_packed_layer_answers_for_itself():
    layer, features = PackedLinear(frozen(nn.Linear(24, 40))), torch.randn(3, 24)
    twin = copy.deepcopy(layer)
    assert twin.plain.weight.data_ptr() != layer.plain.weight.data_ptr()
    assert torch.equal(twin(features), layer(features))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_packed_feed_forward_block_activates_once(activation: str):
    block = frozen(FeedForward(24, 48, 0.0, activation)).eval()
    tokens = torch.randn(2, 5, 24)
    expected = block(tokens)
    pack_weights(block)
    assert isinstance(block.linear1, PackedLinear)
    torch.testing.assert_close(block(tokens), expected, atol=1e-5, rtol=1e-5)


def test_what_still_learns_or_is_not_float32_stays_as_it_is():
    learning, double = nn.Sequential(nn.Linear(4, 4)), frozen(nn.Sequential(nn.Linear(4, 4)).double())
    circular = frozen(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")))
    for model in (learning, double, circular):
        before = type(model[0])
        pack_weights(model)
        assert type(model[0]) is before
