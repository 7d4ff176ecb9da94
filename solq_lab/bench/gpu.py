"""The op, inference and training on a GPU, against `grid_sample` and the plain network on the same GPU.

Sizes are COCO's: an encoder layer and a training step at 800 x 1333, inference at the 512 x 852 of the paper's table 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from solq_lab.bench.codec import zigzag_places
from solq_lab.bench.network import (
    CLASSES,
    NETWORK_SIZE,
    build_criterion,
    build_network,
    describe_size,
    draw_images,
    draw_target,
)
from solq_lab.bench.op import draw_inputs, sample_by_grid
from solq_lab.bench.postprocess import TOP_K, postprocess_one_by_one
from solq_lab.bench.scenes import HEIGHT, WIDTH
from solq_lab.bench.timing import Row, are_near, compare, timed_by_wall
from solq_lab.build import build_codec
from solq_lab.config import Experiment
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.graphs import GraphedForward
from solq_lab.inference.postprocess import postprocess
from solq_lab.inference.predictor import predict_last_layer
from solq_lab.ops.ms_deform_attn import implementation_for, ms_deform_attn, use_implementation
from solq_lab.structures import Detections, ImageBatch, LayerPrediction
from solq_lab.training.optim import build_optimizer, clip_gradients, gradient_norm
from solq_lab.training.step import Batch, boxes_per_process, forward_backward

STRIDES = (8, 16, 32, 64)  # of C3, C4, C5 and the level above
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number; bfloat16 itself rounds by 4e-3
OUTPUT_TOLERANCES = {"none": 1e-2, "bf16": 5e-2}  # after fifty convolutions, in TF32 as torch has it, and twelve layers
LOSS_TOLERANCE = 5e-2  # relative, between float32 and bfloat16
CALLS = 5  # of an operator that are timed as one, so that the GPU never waits for the host

Result = TypeVar("Result")
Timer = Callable[[Callable[[], Result]], tuple[float, Result]]


class Workload(NamedTuple):
    """What is measured.

    experiment: network, code, losses and optimiser.
    image: (height, width) of the encoder layer and of the training images, pixels.
    shown: (height, width) of the image to predict, pixels.
    batch: images of the encoder layer and of a training step.
    repeats: timed runs of each way, at most.
    """

    experiment: Experiment
    image: tuple[int, int]
    shown: tuple[int, int]
    batch: int
    repeats: int


COCO = Workload(
    Experiment.model_validate({"name": "bench", "model": {"width": 384, "pretrained": "none"}}),
    image=(800, 1333),
    shown=NETWORK_SIZE,
    batch=4,
    repeats=50,
)


def rows(device: torch.device | str = "cuda", work: Workload = COCO) -> Iterator[Row]:
    """An encoder layer's attention, inference, and a training step.

    Args:
        device: where; a CPU has no CUDA graphs, and runs without.
        work: what is measured.
    """
    device = torch.device(device)
    for dtype in (torch.float32, torch.bfloat16):
        yield from op_rows(device, work, dtype)
    for autocast in ("none", "bf16"):
        yield infer_row(device, work, autocast)
    yield train_row(device, work)


def op_rows(device: torch.device, work: Workload, dtype: torch.dtype) -> Iterator[Row]:
    """Forward, backward and the deterministic backward of one encoder layer; the plain way computes in float32."""
    shapes = [(-(-work.image[0] // stride), -(-work.image[1] // stride)) for stride in STRIDES]
    tokens = sum(height * width for height, width in shapes)
    inputs, gradient = draw_inputs(tokens, shapes, batch=work.batch, device=device, dtype=dtype)
    exact = (inputs[0].detach().float().requires_grad_(), *inputs[1:])
    served = f"{_name(dtype)}, {implementation_for(device.type)}"
    name = f"encoder layer, {describe_size(work.image)}, batch {work.batch}, {served}"
    measure = partial(compare, "gpu", repeats=work.repeats, timed=timer(device, CALLS))
    same = partial(are_near, tolerance=TOLERANCES[dtype])

    def plainly() -> Tensor:
        return sample_by_grid(exact[0], shapes, *exact[1:])

    def ours() -> Tensor:
        return ms_deform_attn(inputs[0], shapes, *inputs[1:])

    with torch.no_grad():
        yield measure(f"{name}, forward", plainly, ours, lambda expected, found: same([expected], [found]))
    plain_output, output = plainly(), ours()

    def plainly_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(plain_output, exact, gradient.float(), retain_graph=True)

    def ours_back() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    def ours_back_in_order() -> tuple[Tensor, ...]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return ours_back()
        finally:
            torch.use_deterministic_algorithms(before)

    yield measure(f"{name}, backward", plainly_back, ours_back, same)
    yield measure(f"{name}, deterministic backward", plainly_back, ours_back_in_order, same)


def infer_row(device: torch.device, work: Workload, autocast: str) -> Row:
    """One image of the host to run-length codes, against the network in float32 as it was trained."""
    model, images = build_network(work.experiment).eval().to(device), draw_images(work.shown)
    prepared, codec = prepare_for_inference(model), build_codec(work.experiment).to(device)
    names, kept = [str(channel) for channel in range(CLASSES)], zigzag_places(codec.mask_size)[: codec.vector_dim]

    predict = partial(predict_last_layer, prepared, autocast=autocast)
    near = partial(are_near, tolerance=OUTPUT_TOLERANCES[autocast])
    last_layer = GraphedForward(predict, device) if device.type == "cuda" else predict

    def plainly() -> tuple[LayerPrediction, Detections]:
        with torch.inference_mode(), use_implementation("reference"):
            last = _on_host(model(images.to(device).normalised()).layers[-1])
            return last, postprocess_one_by_one(last, kept)

    def ours() -> tuple[LayerPrediction, Detections]:
        with torch.inference_mode():
            last = last_layer(images.to(device))
            return last, postprocess(last, [(HEIGHT, WIDTH)], codec, top_k=TOP_K, class_names=names)[0]

    row = compare(
        "gpu",
        f"inference, {_model(work)}, {describe_size(work.shown)}, batch 1, with masks, {_type(autocast)}",
        plainly,
        ours,
        lambda expected, found: near(expected[0][:3], _on_host(found[0])[:3]),
        repeats=work.repeats,
        timed=timer(device),
    )
    return _with_speed(row, images=1)


def train_row(device: torch.device, work: Workload) -> Row:
    """An optimiser step in bfloat16, against one in float32 with `grid_sample`."""
    network, optim = build_network(work.experiment).train(), work.experiment.optim
    images, targets = draw_batch(work)
    batch = (images.pin_memory() if device.type == "cuda" else images, targets)  # as a loader does

    def stepper(model: nn.Module, autocast: str) -> Callable[[], float]:
        model.to(device)
        criterion, optimizer = build_criterion(work.experiment).to(device), build_optimizer(model, optim)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        num_boxes = boxes_per_process([batch], device)

        def step() -> float:
            optimizer.zero_grad()
            done = forward_backward(model, criterion, scaler, batch, num_boxes, autocast)
            clip_gradients(model, optim.clip_norm, gradient_norm(model))
            optimizer.step()
            return done.losses["total"].item()

        return step

    plain_step, step = stepper(copy.deepcopy(network), "none"), stepper(network, "bf16")

    def plainly() -> float:
        with use_implementation("reference"):
            return plain_step()

    row = compare(
        "gpu",
        f"training step, {_model(work)}, {describe_size(work.image)}, batch {work.batch}, bfloat16",
        plainly,
        step,
        lambda expected, found: bool(np.isclose(expected, found, rtol=LOSS_TOLERANCE, atol=0)),
        repeats=work.repeats,
        timed=timer(device),
    )
    return _with_speed(row, images=work.batch)


def draw_batch(work: Workload) -> Batch:
    """A batch of training images, on the host as a loader gives them."""
    images, target = draw_images(work.image), draw_target(work.experiment.codec.mask_size, work.image)
    batch = ImageBatch(images.pixels.expand(work.batch, -1, -1, -1), images.padding.expand(work.batch, -1, -1))
    return ImageBatch(*(part.contiguous() for part in batch)), [target] * work.batch


def timer(device: torch.device, calls: int = 1) -> Timer:
    """What `compare` takes as `timed`: on a GPU by its own clock, from an idle GPU until all is done.

    Args:
        device: where the way runs.
        calls: that are timed together; the result is that of the last, the time the mean.
    """

    def by_events(way: Callable[[], Result]) -> tuple[float, Result]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            start.record()
            for _ in range(calls):
                result = way()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls, result

    def by_wall(way: Callable[[], Result]) -> tuple[float, Result]:
        milliseconds, results = timed_by_wall(lambda: [way() for _ in range(calls)])
        return milliseconds / calls, results[-1]

    return by_events if device.type == "cuda" else by_wall


def _on_host(prediction: LayerPrediction) -> LayerPrediction:
    return LayerPrediction(*(part.float().cpu() for part in prediction[:3]))


def _with_speed(row: Row, *, images: int) -> Row:
    return row._replace(what=f"{row.what}: {1000 * images / row.ours_ms:.1f} images/s")


def _model(work: Workload) -> str:
    return f"{work.experiment.model.backbone}, width {work.experiment.model.width}"


def _type(autocast: str) -> str:
    return "bfloat16" if autocast == "bf16" else "float32"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
