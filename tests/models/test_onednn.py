"""Layers in oneDNN compute and learn what the plain ones do, and leave to those what the kernels do not serve."""

import copy

import pytest
import torch
from decoder_inputs import LAYER, draw_memory
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from solq_lab.models.decoder import DecoderLayer
from solq_lab.models.encoder import FeedForward
from solq_lab.models.heads import UnifiedQueryHead
from solq_lab.models.look import MaskLook
from solq_lab.models.onednn import (
    TOKENS_PER_CHUNK,
    OneDNNBottleneck,
    OneDNNFeedForward,
    OneDNNLinear,
    OneDNNPointwise,
    ProjectionWithNorm,
    ProposalMLP,
    SampleFirstAttention,
    use_onednn,
)

SHAPES = [(7, 24), (2, 5, 24), (2, 0, 24)]
OTHER_CONVOLUTIONS = [{"kernel_size": 3}, {"stride": 2}, {"padding": 1}, {"groups": 2}]
CHUNKED_SHAPES = [(2, 5, 24), (1, 2 * TOKENS_PER_CHUNK + 1, 24), (1, 0, 24)]


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def decoder_layer() -> DecoderLayer:
    """Random numbers in place of zeros, so that samples differ, fall beyond the map, and biases count."""
    layer = DecoderLayer(**LAYER, activation="relu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_linear_layer_equals_the_plain_one(shape: tuple[int, ...], bias: bool):
    plain, features = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    packed = OneDNNLinear(frozen(plain), packed=True)
    torch.testing.assert_close(packed(features), plain(features), atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_packed_layer_has_its_own_weights():
    layer, features = OneDNNLinear(frozen(nn.Linear(24, 40)), packed=True), torch.randn(3, 24)
    twin = copy.deepcopy(layer)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    assert torch.equal(twin(features), layer(features))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kind", [OneDNNPointwise, OneDNNBottleneck])
@pytest.mark.parametrize("batch", [1, 2, 0])
def test_packed_convolutions_equal_the_plain_ones(layout: torch.memory_format, kind: type[nn.Module], batch: int):
    layers = nn.Sequential(nn.Conv2d(24, 40, 1), nn.Conv2d(40, 8, 1, bias=False))
    if kind is OneDNNBottleneck:  # its batch norms folded
        downsample = nn.Conv2d(24, 32, 1, stride=2)
        layers = nn.Sequential(Bottleneck(24, 8, 2, downsample, norm_layer=lambda _: nn.Identity()))
    features = torch.randn(batch, 24, 5, 7).to(memory_format=layout)
    expected = frozen(layers)(features)
    use_onednn(layers, training=False)
    assert all(type(layer) is kind for layer in layers)
    found = copy.deepcopy(layers)(features)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert batch == 0 or found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("shape", CHUNKED_SHAPES)
def test_a_packed_feed_forward_block_equals_the_plain_one(activation: str, shape: tuple[int, ...]):
    layers, tokens = frozen(nn.Sequential(FeedForward(24, 48, 0.1, activation))), torch.randn(shape)
    expected, before = layers(tokens), tokens.clone()
    use_onednn(layers, training=False)
    assert isinstance(layers[0], OneDNNFeedForward)
    torch.testing.assert_close(layers(tokens), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, before)


@pytest.mark.parametrize("block", [nn.Linear(24, 24), FeedForward(24, 48, 0.0, "relu")], ids=["linear", "block"])
def test_packed_layers_take_the_plain_way_under_autocast(block: nn.Module):
    layers, tokens = frozen(nn.Sequential(block)), torch.randn(2, 5, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layers(tokens)
        use_onednn(layers, training=False)
        found = layers(tokens)
    assert type(layers[0]) in (OneDNNLinear, OneDNNFeedForward)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 4), frozen(nn.Linear(4, 4).double())]
    + [frozen(nn.Conv2d(24, 40, **{"kernel_size": 1, **changes})) for changes in OTHER_CONVOLUTIONS],
)
def test_layers_that_learn_or_are_of_another_kind_or_number_type_are_not_packed(layer: nn.Module):
    layers = nn.Sequential(layer)
    use_onednn(layers, training=False)
    assert layers[0] is layer


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("corners", [2, 4])
@pytest.mark.parametrize("queries", [5, 0])
def test_projecting_after_sampling_equals_projecting_before(batch: int, padded: bool, corners: int, queries: int):
    layer = frozen(decoder_layer())
    memory = draw_memory(batch, ((20, 30), (10, 15)), padded=padded)
    given = (torch.randn(batch, queries, LAYER["width"]), torch.randn(batch, queries, LAYER["width"]))
    reference = torch.rand(batch, queries, corners)
    expected = layer(*given, reference, memory)
    use_onednn(layer, training=False)
    assert isinstance(layer.cross_attention, SampleFirstAttention)
    assert layer.cross_attention._is_less_work(given[0], memory)
    torch.testing.assert_close(layer(*given, reference, memory), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(copy.deepcopy(layer)(*given, reference, memory), layer(*given, reference, memory))


def test_many_queries_on_a_small_map_keep_the_order_of_the_paper(monkeypatch):
    layer = frozen(decoder_layer())
    memory, queries = draw_memory(1, ((4, 4), (2, 2)), padded=False), torch.randn(1, 40, LAYER["width"])
    use_onednn(layer, training=False)
    monkeypatch.delattr(SampleFirstAttention, "_sample")
    assert layer(queries, queries, torch.rand(1, 40, 4), memory).shape == queries.shape


def learning_blocks() -> nn.ModuleDict:
    """One of each that learns, by the names they have in the network."""
    blocks = {"linear": nn.Linear(24, 40), "bare": nn.Linear(24, 40, bias=False)}
    blocks |= {"feedforward": FeedForward(24, 48, 0.0, "relu"), "look": MaskLook(96, 24, 48, groups=32)}
    blocks["proposal_head"] = UnifiedQueryHead(24, 3, None)
    nn.init.normal_(blocks["proposal_head"].box.layers[2].weight)
    return nn.ModuleDict(blocks)


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [(name, OneDNNLinear, shape) for name in ("linear", "bare") for shape in SHAPES]
    + [("feedforward", OneDNNFeedForward, shape) for shape in CHUNKED_SHAPES]
    + [("proposal_head.box", ProposalMLP, shape) for shape in SHAPES]
    + [("look.fine", ProjectionWithNorm, (2, 24, 5, 7)), ("look.fine", ProjectionWithNorm, (1, 24, 40, 30))],
)
def test_what_is_replaced_learns_as_the_plain_one(name: str, kind: type[nn.Module], shape: tuple[int, ...]):
    blocks, features = learning_blocks(), 3 + torch.randn(shape)
    scale = max(1.0, features.numel() / 240)  # sums over tokens, in another order
    weights = torch.randn(blocks.get_submodule(name)(features).shape) / scale
    if kind is ProposalMLP:
        weights[..., 1:, :] = 0  # most proposals have no object
    expected = gradients(copy.deepcopy(blocks).get_submodule(name), features, weights=weights)
    use_onednn(blocks, training=True)
    assert type(blocks.get_submodule(name)) is kind
    assert_same(gradients(blocks.get_submodule(name), features, weights=weights), expected)


@pytest.mark.parametrize(("dropout", "activation"), [(0.5, "relu"), (0.0, "gelu")])
def test_dropout_and_other_activations_are_those_of_the_plain_block(dropout: float, activation: str):
    blocks = nn.Sequential(FeedForward(24, 48, dropout, activation))
    plain, tokens = copy.deepcopy(blocks), torch.randn(2, 5, 24)
    use_onednn(blocks, training=True)
    torch.manual_seed(0)
    expected = plain(tokens)
    torch.manual_seed(0)
    torch.testing.assert_close(blocks(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_layer_that_samples_first_learns_as_the_plain_one(padded: bool):
    layer = decoder_layer()
    memory, reference = draw_memory(2, ((20, 30), (10, 15)), padded=padded), torch.rand(2, 5, 4)

    def around(layer: DecoderLayer) -> DecoderLayer:
        forward = type(layer).forward
        layer.forward = lambda q, pos, tokens: forward(layer, q, pos, reference, memory._replace(tokens=tokens))
        return layer

    given, weights = (torch.randn(2, 5, 24), torch.randn(2, 5, 24), memory.tokens), torch.randn(2, 5, 24)
    expected = gradients(around(copy.deepcopy(layer)), *given, weights=weights)
    use_onednn(layer, training=True)
    assert isinstance(layer.cross_attention, SampleFirstAttention)
    assert_same(gradients(around(layer), *given, weights=weights), expected)


@pytest.mark.parametrize("training", [False, True])
def test_names_and_parameters_stay(training: bool):
    layer = DecoderLayer(**LAYER, activation="relu").requires_grad_(training)
    before = dict(layer.named_parameters())
    use_onednn(layer, training=training)
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_layers_that_do_not_learn_in_training_use_the_plain_kernels():
    plain, features = nn.Linear(24, 40), torch.randn(7, 24)
    layer = OneDNNLinear(plain, packed=False)
    with torch.no_grad():
        assert torch.equal(layer(features), plain(features))
    layer.requires_grad_(False)
    assert torch.equal(layer(features), plain(features))
    double = OneDNNLinear(plain.double().requires_grad_(True), packed=False)
    assert torch.equal(double(features.double()), plain(features.double()))


def test_a_replaced_layer_compiles_as_a_whole():
    layers, features = nn.Sequential(nn.Linear(24, 40)), torch.randn(7, 24)
    use_onednn(layers, training=True)
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), layers(features), atol=1e-5, rtol=1e-5)
