"""Training and inference on a GPU: on tensors without numbers where there is none, and for real where there is one.

Without a GPU it is proved that no operator mixes devices, and where the host waits for the GPU. The kernels of
deformable attention have their own tests, in `test_ms_deform_attn.py`.
"""

import os
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gpu import Traffic, fake_gpu
from tiny import CLASSES, tiny_experiment, write_model, write_tiny_dataset
from torch import Tensor, nn
from training_runs import before_each_step

from solq_lab import distributed
from solq_lab.build import build_codec, build_model
from solq_lab.codecs.base import FittedCodec, MaskCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.codecs.sparse import SparseCodingCodec
from solq_lab.config import Experiment
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.postprocess import postprocess
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import crop_and_resize, paste_masks
from solq_lab.runs import create_run
from solq_lab.structures import ImageBatch, Target
from solq_lab.training import trainer as trainer_module
from solq_lab.training.losses import SetCriterion, build_criterion
from solq_lab.training.nonfinite import nonfinite_tensors
from solq_lab.training.signals import StopRequest
from solq_lab.training.step import Batch, forward_backward
from solq_lab.training.trainer import Trainer

MATCHING, CHECKING = "HungarianMatcher.__call__", "check_finite"
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


def build_trainer(patch: pytest.MonkeyPatch, folder: Path, device: str, **sections: dict) -> Trainer:
    """A trainer of three steps on twelve images, on that device, whose loop neither logs nor saves before its end."""
    train = {"steps": 3, "log_every": 1000, "save_every": 1000, "ema": 0.99} | sections.pop("train", {})
    experiment = tiny_experiment(folder / "data", train=train, **sections)
    patch.setattr(distributed, "device", lambda: torch.device(device))
    patch.setattr(trainer_module, "measure_start", lambda *_: {"kind": "start", "step": 0})
    if not (folder / "data").exists():
        write_tiny_dataset(folder / "data")
    return Trainer(create_run(experiment, folder / device))


def waits_by_step(patch: pytest.MonkeyPatch, trainer: Trainer, traffic: Traffic) -> list[list[str]]:
    """The waits of all steps but the last, which logs."""
    patch.setattr(Trainer, "_save", lambda trainer: None)  # what a fake GPU holds counts as not finite
    before: list[int] = []
    before_each_step(patch, lambda *_: before.append(len(traffic.waits)))
    assert trainer.train_steps(StopRequest())
    return [traffic.waits[start:stop] for start, stop in pairwise(before)]


def build_parts(experiment: Experiment, device: str) -> tuple[nn.Module, SetCriterion, torch.amp.GradScaler]:
    """What a forward and backward pass needs, on the device."""
    model = build_model(experiment, len(CLASSES)).train().to(device)
    criterion = build_criterion(experiment, build_codec(experiment)).to(device)
    return model, criterion, torch.amp.GradScaler(device, enabled=False)


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
def test_in_a_training_step_the_host_waits_for_the_matching_and_the_finite_check(
    variant, learning, tmp_path, monkeypatch
):
    with fake_gpu() as traffic:
        trainer = build_trainer(monkeypatch, tmp_path, "cuda", **VARIANTS[variant])
        learning += [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        waits = waits_by_step(monkeypatch, trainer, traffic)
    assert waits == [[MATCHING, CHECKING]] * 2


@pytest.mark.parametrize(("autocast", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_adds_no_waiting_but_for_the_scale_of_fp16(autocast, type_, learning, tmp_path, monkeypatch):
    types = set()
    with fake_gpu() as traffic:
        trainer = build_trainer(monkeypatch, tmp_path, "cuda", train={"autocast": autocast})
        trainer.model.register_forward_hook(lambda *call: types.update(layer.logits.dtype for layer in call[-1].layers))
        learning += [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        waits = waits_by_step(monkeypatch, trainer, traffic)
    assert types == {type_}
    scaling = ["Trainer.train_steps"] if autocast == "fp16" else []
    assert waits == [[MATCHING, CHECKING], [*scaling, MATCHING, CHECKING]]


@pytest.mark.parametrize("variant", ["solq", "refined", "sqr"])
def test_the_way_back_mixes_no_devices_and_never_waits(variant):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])
    with fake_gpu("meta") as traffic:
        model, criterion, scaler = build_parts(experiment, "meta")
        forward_backward(model, criterion, scaler, draw_batch(experiment), 3.0, "none")
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
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
    ("variant", "for_masks"), [("solq", ["_decode_masks"]), ("sqr", ["cut_out_masks", "encode_rle"])]
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
    path = write_model(tmp_path / "weights.safetensors", experiment)
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
        bits = there.decode_masks(vectors)
    assert vectors.device.type == bits.device.type == "cuda"
    is_solved_in_steps = isinstance(codec, SparseCodingCodec) and count > 0
    assert set(traffic.waits) == ({"solve_lasso"} if is_solved_in_steps else set())


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


# What needs a GPU.

# Deterministic mode needs it; cuBLAS reads it once, at its first call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return "cuda"


@pytest.mark.cuda
def test_a_training_step_gives_the_losses_of_the_cpu(gpu, tmp_path, monkeypatch):
    lines = []
    with torch.backends.cudnn.flags(enabled=False):  # its convolutions would round to TF32
        for device in ("cpu", gpu):
            trainer = build_trainer(monkeypatch, tmp_path, device, train={"steps": 1}, model={"dropout": 0})
            assert trainer.train_steps(StopRequest())
            lines += trainer.run.metrics("train")
    expected, found = lines
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-4)
    # A sample on a cell's centre may take either side's slope.
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


@pytest.mark.cuda
def test_a_training_step_waits_twice_for_the_gpu(gpu, tmp_path, monkeypatch):
    trainer = build_trainer(monkeypatch, tmp_path, gpu)

    def warn_in_the_second(trainer: Trainer, batches: list[Batch]) -> None:  # the first loads what is loaded lazily
        torch.cuda.set_sync_debug_mode("warn" if trainer.step == 1 else "default")

    before_each_step(monkeypatch, warn_in_the_second)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert trainer.train_steps(StopRequest())
    waits = [warning for warning in caught if "called a synchronizing" in str(warning.message)]
    assert len(waits) == 2, [f"{wait.filename}:{wait.lineno}" for wait in waits]


@pytest.mark.cuda
@pytest.mark.parametrize("autocast", ["bf16", "fp16"])
def test_half_precision_steps_are_taken(gpu, autocast, tmp_path, monkeypatch):
    train = {"autocast": autocast, "steps": 12, "log_every": 1}
    trainer = build_trainer(monkeypatch, tmp_path, gpu, train=train)
    assert trainer.train_steps(StopRequest())  # raises where a step is not finite
    assert trainer.run.metrics("train")[-1]["step"] == 12, "fp16 may overflow a few times until its scale is found"


@pytest.mark.cuda
@pytest.mark.parametrize("variant", ["solq", "refined", "sqr"])
def test_gradients_are_bit_equal_when_torch_is_deterministic(gpu, variant):
    experiment = tiny_experiment(Path(), **VARIANTS[variant])

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model, criterion, scaler = build_parts(experiment, gpu)
        forward_backward(model, criterion, scaler, draw_batch(experiment), 3.0, "none")
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    torch.use_deterministic_algorithms(True)
    try:
        first, *others = [gradients() for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first * len(others), [gradient for run in others for gradient in run]))
