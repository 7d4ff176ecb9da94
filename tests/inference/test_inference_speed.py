"""What makes prediction fast changes no result: folded batch norms, padded sizes, bfloat16, CUDA graphs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CLASSES, tiny_experiment, write_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solq_lab import precision
from solq_lab.build import build_model
from solq_lab.inference.folding import fold, prepare_for_inference
from solq_lab.inference.graphs import WARM_UP_RUNS, GraphedForward
from solq_lab.inference.predictor import Predictor
from solq_lab.models.attention import MultiScaleDeformableAttention
from solq_lab.models.backbone import FrozenBatchNorm2d
from solq_lab.models.solq import SOLQ
from solq_lab.structures import ImageBatch, LayerPrediction

BACKBONES = ("small", "resnet50", "swin_t")
BATCH_NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def build(backbone: str, **changes: object) -> SOLQ:
    """A network of one encoder and two decoder layers whose batch norms have seen some data."""
    torch.manual_seed(0)
    model = build_model(tiny_experiment(Path(), model={"backbone": backbone, **changes}), len(CLASSES))
    for norm in model.backbone.modules():
        if isinstance(norm, BATCH_NORMS):
            for tensor, low, high in (
                (norm.weight, 0.8, 1.2),
                (norm.bias, -0.2, 0.2),
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.8, 1.2),
            ):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


def draw_images(height: int = 64, width: int = 96, *, padded: int = 0) -> ImageBatch:
    """Two images, the second with `padded` columns of padding."""
    pixels = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, :, width - padded :] = True
    return ImageBatch(pixels, padding)


def assert_close(found: LayerPrediction, expected: LayerPrediction, tolerance: float) -> None:
    for ours, theirs in zip(found[:3], expected[:3], strict=True):  # logits, boxes, vectors
        torch.testing.assert_close(ours.float(), theirs, atol=tolerance * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize(
    ("backbone", "changes"), [*((name, {}) for name in BACKBONES), ("small", {"mixed_queries": True, "mask_look": 8})]
)
def test_a_prepared_network_predicts_the_same(backbone: str, changes: dict[str, Any]):
    model, images = build(backbone, **changes), draw_images(padded=20).normalised()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = prepare_for_inference(model)
    with torch.no_grad():
        for found, expected in zip(prepared.backbone(images.pixels), model.backbone(images.pixels), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        assert_close(prepared(images).layers[-1], model(images).layers[-1], 1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("backbone", ["small", "resnet50"])
def test_no_batch_norm_is_left_and_convolutions_have_their_channels_last(backbone: str):
    prepared = prepare_for_inference(build(backbone).train())
    assert not prepared.training
    assert not any(isinstance(module, BATCH_NORMS) for module in prepared.modules())
    weights = [module.weight for module in prepared.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(parameter.requires_grad for parameter in prepared.parameters())


def test_folding_reads_the_epsilon_of_each_norm():
    model = build("resnet50")
    for norm in model.backbone.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.eps = 0.5
    pixels = draw_images().normalised().pixels
    with torch.no_grad():
        expected, found = model.backbone(pixels)[0], prepare_for_inference(model).backbone(pixels)[0]
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_prepared_network_keeps_its_number_type(dtype: torch.dtype):
    prepared = prepare_for_inference(build("small").to(dtype))
    assert {parameter.dtype for parameter in prepared.parameters()} == {dtype}


def test_a_hook_on_the_attention_of_a_prepared_network_is_called():
    prepared, heard = prepare_for_inference(build("small")), []
    for module in prepared.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.register_forward_pre_hook(lambda attention, arguments: heard.append(attention.sampling(*arguments)))
    prepared(draw_images().normalised())
    assert [tuple(weights.shape[:2]) for _, weights in heard] == [(2, 8 * 12 + 4 * 6 + 2 * 3), (2, 8), (2, 8)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment = tiny_experiment(tmp_path_factory.mktemp("data"))
    return write_model(tmp_path_factory.mktemp("weights") / "weights.safetensors", experiment, build("small"))


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)  # 32 x 48 once resized


def test_a_bucket_pads_as_a_batch_does(weights: Path, image: np.ndarray):
    """40 makes 40 x 80 of 32 x 48; what is added is marked as padding, and zero once normalised."""
    predictor, seen = Predictor(weights, device="cpu", bucket=40), []
    predictor.model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    found = predictor.predict(image)
    (batch,) = seen
    assert batch.pixels.shape == (1, 3, 40, 80)
    assert not batch.padding[:, :32, :48].any()
    assert batch.padding.sum() == 40 * 80 - 32 * 48
    assert not batch.pixels[:, :, batch.padding[0]].any()
    unpadded = Predictor(weights, device="cpu").predict(image)
    assert [rle["size"] for rle in found.masks] == [[64, 96]] * len(found.names)
    assert found.scores.shape == unpadded.scores.shape


def test_a_bucket_that_divides_the_sides_changes_nothing(weights: Path, image: np.ndarray):
    found, expected = (Predictor(weights, device="cpu", bucket=bucket).predict(image) for bucket in (16, None))
    assert list(found) == list(expected)


def test_bfloat16_comes_near_float32(weights: Path, image: np.ndarray):
    halved, exact = (Predictor(weights, device="cpu", autocast=mode).predict(image) for mode in ("bf16", "none"))
    assert halved.scores.dtype == torch.float32
    torch.testing.assert_close(halved.scores, exact.scores, atol=0.02, rtol=0)


def test_bfloat16_on_a_processor_without_it_is_said_to_be_slow(weights: Path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    with caplog.at_level(logging.WARNING, logger=precision.__name__):
        Predictor(weights, device="cpu", autocast="none")
        assert not caplog.messages
        Predictor(weights, device="cpu", autocast="bf16")
    (message,) = caplog.messages
    assert message.startswith("autocast=bf16: this CPU has no bf16 instructions")


def test_a_bucket_or_autocast_that_does_not_exist_is_rejected(weights: Path):
    with pytest.raises(ValueError, match="bucket 0: allowed are positive numbers of pixels"):
        Predictor(weights, device="cpu", bucket=0)
    with pytest.raises(ValueError, match="autocast='fp16' is unknown; allowed are none, bf16"):
        Predictor(weights, device="cpu", autocast="fp16")


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph` on a CPU: a replay runs the captured operators again, on their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.captured.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.captured:
            for written, computed in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(written, Tensor):
                    written.copy_(computed)


class NoStream:
    """Stands in for `torch.cuda.Stream`: a CPU does one thing after the other."""

    def wait_stream(self, other: object) -> None:
        pass


@contextmanager
def capturing(graph: RecordedGraph, pool: object, stream: NoStream, capture_error_mode: str) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda")


@pytest.fixture
def cpu_with_graphs(monkeypatch) -> torch.device:
    """A CPU whose stand-in for a CUDA graph is as blind to Python's decisions as a real one."""
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, NoStream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    return torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "backbone", "autocast"),
    [
        ("cpu_with_graphs", "small", False),
        ("cpu_with_graphs", "swin_t", True),
        *(
            pytest.param("gpu", backbone, autocast, marks=pytest.mark.cuda)
            for backbone in BACKBONES
            for autocast in (False, True)
        ),
    ],
)
def test_a_replayed_graph_predicts_what_the_network_does(
    device: str, backbone: str, autocast: bool, request: pytest.FixtureRequest
):
    """Two sizes in turn, with other pixels and padding each time; a third size is beyond the limit."""
    there = request.getfixturevalue(device)
    model = build(backbone).to(there)
    # Packed layers look at the padding: they are for a CPU without graphs.
    model = fold(model) if there.type == "cpu" else prepare_for_inference(model)
    forwards = []

    def forward(images: ImageBatch) -> LayerPrediction:
        forwards.append(images)
        with torch.autocast(there.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            return model(images.normalised()).layers[-1]

    graphed = GraphedForward(forward, there, limit=2)
    for width, padded in ((96, 0), (128, 16), (96, 20), (128, 0), (64, 8), (96, 5)):
        images = draw_images(width=width, padded=padded).to(there)
        images = images._replace(pixels=images.pixels.flip(0) if padded else images.pixels)
        with torch.inference_mode():
            expected = forward(images)
        found = graphed(images)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-2 if autocast else 1e-4, rtol=1e-2 if autocast else 1e-4)
    assert len(forwards) == 6 + 2 * (WARM_UP_RUNS + 1) + 1, "Python runs for a capture and beyond the limit alone"


@pytest.mark.cuda
def test_a_predictor_with_buckets_finds_the_same_on_a_gpu(weights: Path, image: np.ndarray, gpu: torch.device):
    graphed, plain = Predictor(weights, device=gpu, bucket=40), Predictor(weights, device="cpu", bucket=40)
    for shown in (image, image[::-1].copy(), image.transpose(1, 0, 2).copy()):
        found, expected = graphed.predict(shown), plain.predict(shown)
        torch.testing.assert_close(found.scores, expected.scores, atol=1e-3, rtol=0)
