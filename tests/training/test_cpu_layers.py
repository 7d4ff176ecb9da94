"""Layers arranged for training on the CPU: the results, gradients and names of the plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_inputs import LAYER, draw_memory
from torch import Tensor, nn

from solq_lab.inference.packed_layers import SamplingFirst
from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.training.cpu_layers import TOKENS_AT_ONCE, TrainedFeedForward, TrainedLinear, arrange_for_cpu


def gradients(module: nn.Module, *inputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of a weighted sum of it with respect to inputs and parameters."""
    inputs = [features.clone().requires_grad_() for features in inputs]
    module.zero_grad()
    output = module(*inputs)
    (output * weights).sum().backward()
    found = {f"input {place}": features.grad for place, features in enumerate(inputs)}
    return found | {name: parameter.grad for name, parameter in module.named_parameters()} | {"output": output.detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        torch.testing.assert_close(
            found[name], numbers, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 0, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_learns_as_the_plain_one(shape: tuple[int, ...], bias: bool):
    layers = nn.Sequential(nn.Linear(24, 40, bias=bias))
    features, weights = torch.randn(shape), torch.randn(*shape[:-1], 40)
    expected = gradients(copy.deepcopy(layers), features, weights=weights)
    arrange_for_cpu(layers)
    assert isinstance(layers[0], TrainedLinear)
    assert_same(gradients(layers, features, weights=weights), expected)


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 2 * TOKENS_AT_ONCE + 1, 24), (1, 0, 24)])
def test_a_feed_forward_block_learns_as_the_plain_one(shape: tuple[int, ...]):
    blocks = nn.Sequential(FeedForward(24, 48, 0.0, "relu"))
    tokens, weights = torch.randn(shape), torch.randn(shape)
    expected = gradients(copy.deepcopy(blocks), tokens, weights=weights)
    arrange_for_cpu(blocks)
    assert isinstance(blocks[0], TrainedFeedForward)
    found = gradients(blocks, tokens, weights=weights)
    scale = max(1.0, shape[0] * shape[1] / 10)  # sums over tokens, in another order
    assert_same({name: value / scale for name, value in found.items()}, {k: v / scale for k, v in expected.items()})


@pytest.mark.parametrize(("dropout", "activation"), [(0.5, "relu"), (0.0, "gelu")])
def test_dropout_and_other_activations_are_those_of_the_plain_block(dropout: float, activation: str):
    blocks = nn.Sequential(FeedForward(24, 48, dropout, activation))
    plain, tokens = copy.deepcopy(blocks), torch.randn(2, 5, 24)
    arrange_for_cpu(blocks)
    torch.manual_seed(0)
    expected = plain(tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(blocks(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_layer_that_samples_first_learns_as_the_plain_one(padded: bool):
    layer = DecoderLayer(**LAYER, activation="relu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    memory, reference = draw_memory(2, ((20, 30), (10, 15)), padded=padded), torch.rand(2, 5, 4)

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, queries: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
            return self.inner(queries, positions, reference, memory._replace(tokens=tokens))

    given, weights = (torch.randn(2, 5, 24), torch.randn(2, 5, 24), memory.tokens), torch.randn(2, 5, 24)
    expected = gradients(Around(copy.deepcopy(layer)), *given, weights=weights)
    arrange_for_cpu(layer)
    assert isinstance(layer.cross_attention, SamplingFirst)
    assert_same(gradients(Around(layer), *given, weights=weights), expected)


def test_names_and_parameters_stay():
    layer = DecoderLayer(**LAYER, activation="relu")
    before = dict(layer.named_parameters())
    arrange_for_cpu(layer)
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_what_does_not_learn_is_computed_by_the_plain_kernels():
    plain, features = nn.Linear(24, 40), torch.randn(7, 24)
    layer = TrainedLinear(plain)
    with torch.no_grad():
        assert torch.equal(layer(features), plain(features))
    layer.requires_grad_(False)
    assert torch.equal(layer(features), plain(features))
    double = TrainedLinear(plain.double().requires_grad_(True))
    assert torch.equal(double(features.double()), plain(features.double()))


def test_an_arranged_layer_compiles_as_a_whole():
    layers = nn.Sequential(nn.Linear(24, 40))
    arrange_for_cpu(layers)
    features = torch.randn(7, 24)
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), layers(features), atol=1e-5, rtol=1e-5)
