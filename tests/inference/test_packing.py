"""Packed layers say what the plain ones say, and step aside where the CPU's float32 kernels do not serve."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_inputs import LAYER, draw_memory
from torch import nn

from solq_lab.inference.packed_layers import (
    TOKENS_AT_ONCE,
    PackedFeedForward,
    SamplingFirst,
    pack_weights,
)
from solq_lab.inference.packing import PackedLinear
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_layer_equals_the_plain_one(shape: tuple[int, ...], bias: bool):
    plain, features = frozen(nn.Linear(24, 40, bias=bias)), torch.randn(shape)
    torch.testing.assert_close(PackedLinear(plain)(features), plain(features), atol=1e-5, rtol=1e-5)


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
@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 2 * TOKENS_AT_ONCE + 1, 24), (1, 0, 24)])
def test_a_packed_feed_forward_block_equals_the_plain_one(activation: str, shape: tuple[int, ...]):
    layers = frozen(nn.Sequential(FeedForward(24, 48, 0.1, activation))).eval()
    tokens = torch.randn(shape)
    expected, before = layers(tokens), tokens.clone()
    pack_weights(layers)
    assert isinstance(layers[0], PackedFeedForward) == (activation == "relu")
    torch.testing.assert_close(layers(tokens), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, before)


def test_a_packed_feed_forward_block_steps_aside_for_autocast():
    layers, tokens = frozen(nn.Sequential(FeedForward(24, 48, 0.0, "relu"))).eval(), torch.randn(2, 5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layers(tokens)
        pack_weights(layers)
        assert torch.equal(layers(tokens), expected)


def test_what_still_learns_or_is_not_float32_stays_as_it_is():
    learning, double = nn.Sequential(nn.Linear(4, 4)), frozen(nn.Sequential(nn.Linear(4, 4)).double())
    for model in (learning, double):
        before = type(model[0])
        pack_weights(model)
        assert type(model[0]) is before


def draw_weights(layer: nn.Module) -> nn.Module:
    """Random numbers in place of zeros, so that samples differ, fall beyond the map, and biases count."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return frozen(layer).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("corners", [2, 4])
@pytest.mark.parametrize("queries", [5, 0])
def test_projecting_after_sampling_equals_projecting_before(batch: int, padded: bool, corners: int, queries: int):
    layer = draw_weights(DecoderLayer(**LAYER, activation="relu"))
    memory = draw_memory(batch, ((20, 30), (10, 15)), padded=padded)
    given = (torch.randn(batch, queries, LAYER["width"]), torch.randn(batch, queries, LAYER["width"]))
    reference = torch.rand(batch, queries, corners)
    expected = layer(*given, reference, memory)
    pack_weights(layer)
    attention = layer.cross_attention
    assert isinstance(attention, SamplingFirst)
    assert attention._is_less_work(given[0], memory)
    torch.testing.assert_close(layer(*given, reference, memory), expected, atol=1e-4, rtol=1e-4)


def test_many_queries_on_a_small_map_keep_the_order_of_the_paper(monkeypatch):
    layer = draw_weights(DecoderLayer(**LAYER, activation="relu"))
    memory, queries = draw_memory(1, ((4, 4), (2, 2)), padded=False), torch.randn(1, 40, LAYER["width"])
    pack_weights(layer)
    monkeypatch.delattr(SamplingFirst, "_sample")
    assert layer(queries, queries, torch.rand(1, 40, 4), memory).shape == queries.shape


def test_a_copy_of_a_packed_attention_answers_for_itself():
    layer, memory = (
        draw_weights(DecoderLayer(**LAYER, activation="relu")),
        draw_memory(1, ((20, 30), (5, 5)), padded=True),
    )
    given = (torch.randn(1, 5, LAYER["width"]), torch.randn(1, 5, LAYER["width"]), torch.rand(1, 5, 4), memory)
    pack_weights(layer)
    assert torch.equal(copy.deepcopy(layer)(*given), layer(*given))
