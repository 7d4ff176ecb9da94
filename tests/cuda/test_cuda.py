"""Training and inference on a GPU: on tensors without numbers where there is none, and for real where there is one.

Without a GPU it is proved that no operator mixes devices, and where the host waits for the GPU. The kernels of
deformable attention have their own tests, in `test_ms_deform_attn.py`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import fake_gpu
from tiny import tiny_experiment
from torch import Tensor, nn

from solq_lab.build import build_codec, build_model
from solq_lab.codecs.base import FittedCodec, MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.codecs.sparse import SparseCodingCodec
from solq_lab.config import Experiment
from solq_lab.data.classes import ClassMap
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.postprocess import postprocess
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import crop_and_resize, paste_masks
from solq_lab.models.weights import save_weights
from solq_lab.ops.ms_deform_attn import ms_deform_attn
from solq_lab.structures import ImageBatch, Target
from solq_lab.training.ema import AveragedWeights
from solq_lab.training.findings import nonfinite_tensors
from solq_lab.training.optim import build_optimizer
from solq_lab.training.step import Batch, TrainingStep, build_criterion

CLASSES = ClassMap(("triangle", "diamond"), (1, 2))
MATCHING, JUDGING = "HungarianMatcher.__call__", "TrainingStep._judge"
VARIANTS = {
    "solq": {},
    "refined": {"model": {"refine_boxes": True, "two_stage": True}, "loss": {"vector_normalisation": "num_boxes"}},
    "sqr": {"model": {"standardise_vectors": False, "mask_branch": "sqr"}, "codec": {"kind": "none"}},
    "flatten": {"codec": {"kind": "flatten", "vector_dim": 16}},
}


def draw_batch(experiment: Experiment) -> Batch:
    """Two padded images, as a loader gives them; the second has no object."""
    generator = torch.Generator().manual_seed(0)
    size, side = (64, 90), experiment.codec.mask_size
    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[:, :, 90:] = True
    targets = [
        Target(
            image,
            torch.randint(len(CLASSES), (count,), generator=generator),
            0.2 + 0.4 * torch.rand(count, 4, generator=generator),
            torch.rand(count, side, side, generator=generator) > 0.5,
            size,
            size,
            torch.rand(count, *size, generator=generator) > 0.5,
        )
        for image, count in enumerate((3, 0))
    ]
    return ImageBatch(torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator), padding), targets


def build_step(experiment: Experiment, device: str, *, autocast: str = "none") -> TrainingStep:
    """What a trainer builds, on the device."""
    model = build_model(experiment, len(CLASSES)).train().to(device)
    criterion = build_criterion(experiment, build_codec(experiment)).to(device)
    optimizer, average = build_optimizer(model, experiment.optim), AveragedWeights(model, 0.99)
    there = torch.device(device)
    return TrainingStep(model, model, criterion, optimizer, average, autocast=autocast, clip_norm=0.1, device=there)


@pytest.fixture
def learning(monkeypatch) -> list[nn.Parameter]:
    """Parameters that get zeros for gradients: on "cuda" the way back needs a driver."""

    def fill(total: Tensor) -> None:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    parameters: list[nn.Parameter] = []
    monkeypatch.setattr(Tensor, "backward", fill)
    return parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_a_training_step_the_host_waits_for_the_matching_and_for_the_verdict(variant, learning):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])
    with fake_gpu() as traffic:
        step = build_step(experiment, "cuda")
        learning += [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        outcome = step.take([draw_batch(experiment)])
    assert outcome.kind == "taken"
    assert outcome.norm.device.type == "cuda"
    assert traffic.waits == [MATCHING, JUDGING]


@pytest.mark.parametrize(("autocast", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_adds_no_waiting_but_for_the_scale_of_fp16(autocast, type_, learning):
    experiment = tiny_experiment(Path())
    with fake_gpu() as traffic:
        step = build_step(experiment, "cuda", autocast=autocast)
        learning += [parameter for parameter in step.model.parameters() if parameter.requires_grad]
        first = step.take([draw_batch(experiment)])
        assert traffic.waits == [MATCHING, JUDGING]
        step.take([draw_batch(experiment)])
    assert {layer.logits.dtype for layer in first.passes[0].predictions.layers} == {type_}
    assert traffic.waits[2:] == (["TrainingStep.take"] if autocast == "fp16" else []) + [MATCHING, JUDGING]


@pytest.mark.parametrize("variant", ["solq", "refined", "sqr"])
def test_the_way_back_mixes_no_devices_and_never_waits(variant):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])
    with fake_gpu("meta") as traffic:
        step = build_step(experiment, "meta")
        step.differentiate(draw_batch(experiment), 3.0)
        missing = [name for name, p in step.model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert traffic.waits == [MATCHING]


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "small", "refine_boxes": True, "two_stage": True},
        {"backbone": "resnet50"},
        {"backbone": "swin_t"},
    ],
)
def test_a_prepared_network_predicts_without_waiting_or_copying_from_the_host(model):
    """A CUDA graph can hold neither."""
    experiment = tiny_experiment(Path(), model=model)
    with fake_gpu() as traffic, torch.inference_mode():
        prepared = prepare_for_inference(build_model(experiment, len(CLASSES)).to("cuda"))
        images = draw_batch(experiment)[0].to("cuda")
        traffic.copies.clear()
        prediction = prepared(images.normalised()).layers[-1]
    assert prediction.boxes.device.type == "cuda"
    assert traffic.waits == traffic.copies == []


@pytest.mark.parametrize(
    ("variant", "for_masks"), [("solq", ["_draw_masks"]), ("sqr", ["cut_out_masks", "encode_rle"])]
)
def test_after_the_network_the_host_waits_for_what_it_shows(variant, for_masks):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])
    with fake_gpu() as traffic:
        model, codec = build_model(experiment, len(CLASSES)).eval().to("cuda"), build_codec(experiment)
        codec = codec if codec is None else codec.to("cuda")
        images = draw_batch(experiment)[0].to("cuda").normalised()
        sizes, names = [(64, 90), (40, 50)], CLASSES.names
        found = postprocess(model(images).layers[-1], sizes, codec, top_k=5, class_names=names)
    assert [len(detections.masks) for detections in found] == [5, 5]
    assert {detections.boxes.device.type for detections in found} == {"cpu"}
    assert [wait.partition(".")[0] for wait in traffic.waits] == ["postprocess"] * 4 + for_masks * 2


def test_a_predictor_goes_from_a_file_to_masks(tmp_path):
    experiment = tiny_experiment(tmp_path)
    weights = build_model(experiment, len(CLASSES)).state_dict()
    path = tmp_path / "weights.safetensors"
    save_weights(path, weights, experiment=experiment.to_yaml(), classes=CLASSES.to_json())
    with fake_gpu():
        predictor = Predictor(path, device="cuda", autocast="bf16", top_k=3)
        found = predictor.predict(np.zeros((64, 96, 3), dtype=np.uint8))
    assert [rle["size"] for rle in found.masks] == [[64, 96]] * 3


def fitted(codec: FittedCodec) -> FittedCodec:
    """As if it had tables."""
    codec.fitted = True
    return codec


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(
    "codec",
    [
        DCTCodec(12, 20),
        FlattenCodec(12, 16),
        fitted(PCACodec(12, 20)),
        fitted(PCACodec.released(12, 20)),
        fitted(SparseCodingCodec(12, 20)),
    ],
    ids=lambda codec: type(codec).__name__,
)
def test_a_code_stays_on_the_gpu(codec: MaskCodec, count: int):
    with fake_gpu() as traffic:
        there = codec.to("cuda")
        vectors = there.encode(torch.zeros(count, 12, 12, dtype=torch.bool, device="cuda"))
        bits = there.decode_bits(vectors)
    assert vectors.device.type == bits.device.type == "cuda"
    is_solved_in_steps = isinstance(codec, SparseCodingCodec) and count > 0
    assert set(traffic.waits) == ({"lasso_codes"} if is_solved_in_steps else set())


def test_weights_are_looked_over_in_one_wait():
    with fake_gpu() as traffic:
        model = build_model(tiny_experiment(Path()), len(CLASSES)).to("cuda")
        poisoned = nonfinite_tensors([*model.named_parameters(), *model.named_buffers()])
    assert len(poisoned) > 50, "what a fake GPU holds counts as not finite"
    assert traffic.waits == ["nonfinite_tensors"]
    assert nonfinite_tensors([]) == []


def test_masks_of_the_gpu_are_pasted_and_cropped_there():
    boxes = torch.tensor([[1.0, 2.0, 9.0, 8.0], [0.0, 0.0, 3.0, 3.0]])
    with fake_gpu() as traffic:
        images = paste_masks(torch.zeros(2, 5, 5, dtype=torch.bool, device="cuda"), boxes, (12, 14))
        cells = crop_and_resize(images, boxes.to("cuda", non_blocking=True), 5)
    assert images.device.type == cells.device.type == "cuda"
    assert cells.shape == (2, 5, 5)
    assert traffic.waits == []


def test_tensors_of_two_devices_are_refused_by_name():
    with fake_gpu():
        value, weights = torch.zeros(1, 6, 2, 4, device="cuda"), torch.zeros(1, 1, 2, 1, 3, device="cuda")
        with pytest.raises(ValueError, match=r"value is on cuda:0, sampling_locations on cpu, .* share one device"):
            ms_deform_attn(value, [(2, 3)], torch.zeros(1, 1, 2, 1, 3, 2), weights)


# What needs a GPU.

# Deterministic mode asks for it; cuBLAS reads it once, at its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return "cuda"


@pytest.mark.cuda
def test_a_training_step_gives_the_losses_of_the_cpu(gpu):
    experiment = tiny_experiment(Path(), model={"dropout": 0})
    outcomes = []
    with torch.backends.cudnn.flags(enabled=False):  # its convolutions would round to TF32
        for device in ("cpu", gpu):
            torch.manual_seed(0)
            outcomes.append(build_step(experiment, device).take([draw_batch(experiment)]))
    expected, found = outcomes
    for name, loss in expected.passes[0].losses.items():
        torch.testing.assert_close(found.passes[0].losses[name].cpu(), loss, rtol=1e-3, atol=1e-4)
    # A sample on a cell's centre may take either side's slope.
    torch.testing.assert_close(found.norm.cpu(), expected.norm, rtol=1e-2, atol=0)


@pytest.mark.cuda
def test_a_training_step_waits_twice_for_the_gpu(gpu):
    experiment = tiny_experiment(Path())
    step, batch = build_step(experiment, gpu), draw_batch(experiment)
    step.take([batch])  # loads what is loaded lazily
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.take([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 2, [f"{wait.filename}:{wait.lineno}" for wait in waits]


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_half_precision_steps_are_taken(gpu, autocast):
    experiment = tiny_experiment(Path())
    step, batch = build_step(experiment, gpu, autocast=autocast), draw_batch(experiment)
    kinds = [step.take([batch]).kind for _ in range(12)]
    assert "nonfinite" not in kinds
    assert kinds[-1] == "taken", "fp16 may overflow a few times until its scale is found"


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["solq", "refined", "sqr"])
def test_gradients_are_bit_equal_when_torch_is_deterministic(gpu, variant):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        step = build_step(experiment, gpu)
        step.differentiate(draw_batch(experiment), 3.0)
        return [parameter.grad for parameter in step.model.parameters() if parameter.requires_grad]

    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first * len(others), [gradient for run in others for gradient in run]))
