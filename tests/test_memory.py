"""Training and scoring in less memory: what is recomputed, or done in parts, gives the very same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from one_pass import SIZES, pictures, small_backbone, train_once
from torch import Tensor, nn

from solq_lab.bench.evaluation import draw_results
from solq_lab.bench.scenes import coco_document
from solq_lab.evaluation import coco
from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.inference.attention import record_attention
from solq_lab.models.backbone import ResNetBackbone, SwinBackbone
from solq_lab.models.encoder import EncoderLayer
from solq_lab.models.recomputing import recompute_activations
from solq_lab.models.solq import SOLQ
from solq_lab.models.sqr import SQRDetector
from solq_lab.structures import ImageBatch


def solq(backbone: nn.Module | None = None, **changes) -> SOLQ:
    return SOLQ(backbone or small_backbone(), 3, vector_dim=6, **(SIZES | changes))


MODELS: dict[str, Callable[[], SOLQ]] = {
    "small": solq,
    "two-stage": lambda: solq(two_stage=True),
    "without refinement": lambda: solq(refine_boxes=False),
    "without encoder": lambda: solq(encoder_layers=0),
    "deep": lambda: solq(encoder_layers=6, decoder_layers=6),
    "ResNet-50": lambda: solq(ResNetBackbone("resnet50")),
    "Swin-T": lambda: solq(SwinBackbone("swin_t")),
    "SQR": lambda: SQRDetector(small_backbone(), 3, **SIZES),
    "SQR on a frozen detector": lambda: SQRDetector(small_backbone(), 3, freeze_detector=True, **SIZES),
}


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[SOLQ, SOLQ]:
    """One network twice; the second recomputes."""
    torch.manual_seed(0)
    plain = MODELS[name]().to(dtype).train()
    recomputing = copy.deepcopy(plain)
    recompute_activations(recomputing)
    return plain, recomputing


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_statistics_are_those_of_the_plain_network(name):
    (loss, gradients, buffers), (again, gradients_again, buffers_again) = (
        train_once(model, pictures()) for model in twins(name)
    )
    assert again == loss
    assert gradients_again.keys() == gradients.keys() != set()
    for parameter, gradient in gradients.items():  # the same sums in the same order
        torch.testing.assert_close(gradients_again[parameter], gradient, rtol=1e-12, atol=1e-15, msg=parameter)
    for buffer, value in buffers.items():  # batch norms count each batch once
        assert torch.equal(buffers_again[buffer], value), buffer


def test_autocast_is_the_same_the_second_time():
    plain, recomputing = twins("small", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients, _ = train_once(plain, pictures(torch.float32))
        again, gradients_again, _ = train_once(recomputing, pictures(torch.float32))
    assert again == loss
    for parameter, gradient in gradients.items():
        assert torch.equal(gradients_again[parameter], gradient), parameter


def count_calls(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """A list that grows by one for every call of a part of that kind."""
    calls: list[nn.Module] = []
    for part in model.modules():
        if isinstance(part, kind):
            part.register_forward_pre_hook(lambda part, _: calls.append(part))
    return calls


def test_only_a_training_pass_with_gradients_computes_twice():
    _, model = twins("small")
    calls = count_calls(model, EncoderLayer)
    once = SIZES["encoder_layers"]
    model.eval()(pictures())
    assert len(calls) == once
    model.train()
    with torch.no_grad():
        model(pictures())
    assert len(calls) == 2 * once
    train_once(model, pictures())
    assert len(calls) == 4 * once


def test_less_is_kept_for_the_way_back():
    kept = []
    for model in twins("deep"):
        bytes_kept: dict[int, int] = {}

        def keep(tensor: Tensor, bytes_kept: dict[int, int] = bytes_kept) -> Tensor:
            bytes_kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predictions = model(pictures())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for place, size in bytes_kept.items() if place not in weights))
        del predictions
    assert kept[1] < kept[0] / 4


def test_attention_is_heard_as_before():
    views = []
    for model in twins("small", torch.float32):
        images = pictures(torch.float32)
        views.append(record_attention(model.eval(), ImageBatch(images.pixels[:1], images.padding[:1])))
    assert len(views[0]) == len(views[1]) == SIZES["decoder_layers"]
    for plain, recomputed in zip(*views, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_names_of_weights_stay():
    plain, recomputing = twins("SQR")
    assert recomputing.state_dict().keys() == plain.state_dict().keys()


def test_scoring_a_few_classes_at_a_time_gives_the_same_numbers(monkeypatch):
    document = coco_document(0, pictures=6)
    results = draw_results(document)
    whole = evaluate_results(document, results).to_dict()
    assert whole["metrics"]["segm.AP"] > 0
    for at_once in (1, 150):  # one class each; several, and the last share smaller
        monkeypatch.setattr(coco, "DETECTIONS_AT_ONCE", at_once)
        assert evaluate_results(document, results).to_dict() == whole


def test_scoring_stops_between_two_shares(monkeypatch):
    monkeypatch.setattr(coco, "DETECTIONS_AT_ONCE", 1)
    document, asked = coco_document(0, pictures=1), []
    with pytest.raises(EvaluationStopped):
        evaluate_results(document, draw_results(document), should_stop=lambda: len(asked) == 2 or asked.append(1))
