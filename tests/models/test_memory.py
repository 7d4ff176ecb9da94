"""Training and scoring in less memory: what is recomputed, or done in parts, gives the very same numbers."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import in_process_group
from small_network import SIZES, random_batch, small_backbone, train_once
from tiny import tiny_experiment, write_tiny_dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solq_lab import distributed
from solq_lab.bench import memory
from solq_lab.bench.evaluation import draw_results
from solq_lab.bench.scenes import coco_document
from solq_lab.evaluation import coco
from solq_lab.evaluation.coco import evaluate_results
from solq_lab.evaluation.gathering import EvaluationStopped
from solq_lab.inference.attention import record_attention
from solq_lab.models.backbone import ResNetBackbone, SwinBackbone
from solq_lab.models.checkpointing import checkpoint_activations
from solq_lab.models.encoder import EncoderLayer
from solq_lab.models.solq import SOLQ
from solq_lab.models.sqr import SQRDetector
from solq_lab.models.weights import read_weights
from solq_lab.runs import create_run
from solq_lab.structures import ImageBatch
from solq_lab.training.trainer import train_run


def solq(backbone: nn.Module | None = None, **changes) -> SOLQ:
    return SOLQ(backbone or small_backbone(), 3, vector_dim=6, **(SIZES | changes))


MODELS: dict[str, Callable[[], SOLQ]] = {
    "small": solq,
    "two-stage": lambda: solq(two_stage=True),
    "plus": lambda: solq(small_backbone(c2=True), mixed_queries=True, look_twice=True, mask_look=8),
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
    checkpoint_activations(recomputing)
    return plain, recomputing


@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_statistics_are_those_of_the_plain_network(name):
    (loss, gradients, buffers), (again, gradients_again, buffers_again) = (
        train_once(model, random_batch()) for model in twins(name)
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
        loss, gradients, _ = train_once(plain, random_batch(torch.float32))
        again, gradients_again, _ = train_once(recomputing, random_batch(torch.float32))
    assert again == loss
    for parameter, gradient in gradients.items():
        assert torch.equal(gradients_again[parameter], gradient), parameter


def share_gradients(root: Path) -> None:
    """One of two processes: the averaged gradients of both twins go into a file."""
    rank, found = distributed.rank(), []
    for model in twins("small"):
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        with parallel.no_sync():  # accumulated, as a training with several passes per step does
            train_once(parallel, random_batch(side=64 + 32 * rank))
        train_once(parallel, random_batch(side=96 - 32 * rank))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.save(found, root / f"process{rank}.pt")


def test_two_processes_share_the_same_gradients(tmp_path):
    in_process_group(share_gradients, tmp_path, processes=2)
    plain, recomputed = torch.load(tmp_path / "process0.pt", weights_only=True)
    others = torch.load(tmp_path / "process1.pt", weights_only=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-12, atol=1e-15, msg=name)
        assert torch.equal(others[0][name], gradient)
        assert torch.equal(others[1][name], recomputed[name])


def test_a_training_that_recomputes_ends_with_the_same_weights(tmp_path):
    data, learned = write_tiny_dataset(tmp_path / "images"), []
    for recompute in (False, True):
        train = {"steps": 3, "gradient_checkpointing": recompute, "ema": 0.9, "accumulate": 2}
        run = create_run(tiny_experiment(data, train=train), tmp_path / str(recompute))
        assert train_run(run) == "finished"
        learned.append(([line["total"] for line in run.metrics("train")], read_weights(run.weights).state))
    (losses, weights), (losses_again, weights_again) = learned
    assert losses_again == losses
    assert weights_again.keys() == weights.keys()
    assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


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
    model.eval()(random_batch())
    assert len(calls) == once
    model.train()
    with torch.no_grad():
        model(random_batch())
    assert len(calls) == 2 * once
    train_once(model, random_batch())
    assert len(calls) == 4 * once


def test_less_is_kept_for_the_way_back():
    kept = []
    for model in twins("deep"):
        bytes_kept: dict[int, int] = {}

        def keep(tensor: Tensor, bytes_kept: dict[int, int] = bytes_kept) -> Tensor:
            bytes_kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            predictions = model(random_batch())
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for place, size in bytes_kept.items() if place not in weights))
        del predictions
    assert kept[1] < kept[0] / 4


def test_attention_is_heard_as_before():
    views = []
    for model in twins("small", torch.float32):
        images = random_batch(torch.float32)
        views.append(record_attention(model.eval(), ImageBatch(images.pixels[:1], images.padding[:1])))
    assert len(views[0]) == len(views[1]) == SIZES["decoder_layers"]
    for plain, recomputed in zip(*views, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(plain, recomputed, strict=True))


def test_scoring_a_few_classes_at_a_time_gives_the_same_numbers(monkeypatch):
    document = coco_document(0, num_images=6)
    results = draw_results(document)
    whole = evaluate_results(document, results).to_dict()
    assert whole["metrics"]["segm.AP"] > 0
    for at_once in (1, 150):  # one class each; several, and the last share smaller
        monkeypatch.setattr(coco, "DETECTIONS_AT_ONCE", at_once)
        assert evaluate_results(document, results).to_dict() == whole


def test_scoring_stops_between_two_shares(monkeypatch):
    monkeypatch.setattr(coco, "DETECTIONS_AT_ONCE", 1)
    document, asked = coco_document(0, num_images=1), []
    with pytest.raises(EvaluationStopped):
        evaluate_results(document, draw_results(document), should_stop=lambda: len(asked) == 2 or asked.append(1))


def test_the_peak_counts_memory_that_was_given_back():
    before = memory.peak_memory()
    held = torch.ones(int(before * 2**30), dtype=torch.uint8)  # as much as ever before, on top of what is held now
    del held
    assert memory.peak_memory() > before + 0.5


@pytest.mark.slow
def test_both_ways_of_the_memory_benchmark_give_the_same_numbers():
    rows = list(memory.rows(num_images=4, size=(64, 96)))
    assert [row.what for row in rows if not row.equal] == []
    assert [row.unit for row in rows] == ["GiB"] * 4
    assert rows[0].to_dict()["ratio"] == rows[0].to_dict()["baseline_gib"] / rows[0].to_dict()["ours_gib"]
