"""The whole network, inference and a training step, against the same network on `grid_sample`.

Our training step keeps freed memory, as the training process does; the plain one leaves it to the C library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

from solq_lab.allocation import keep_freed_memory
from solq_lab.bench.codec import zigzag_places
from solq_lab.bench.postprocess import TOP_K, postprocess_one_by_one
from solq_lab.bench.scenes import HEIGHT, WIDTH, blob_masks, boxes_xyxy
from solq_lab.bench.timing import Row, are_near, compare
from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.build import build_codec, build_model
from solq_lab.config import Experiment
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.postprocess import postprocess
from solq_lab.models.onednn import use_onednn
from solq_lab.ops.ms_deform_attn import use_implementation
from solq_lab.structures import Detections, ImageBatch, LayerPrediction, Target
from solq_lab.training.losses import SetCriterion
from solq_lab.training.matcher import HungarianMatcher
from solq_lab.training.optim import build_optimizer, clip_gradients, gradient_norm

NETWORK_SIZE = (512, 852)  # of the network's input: table 5 of the paper
CLASSES = 91
OBJECTS = 7
EXPERIMENT = Experiment.model_validate({"name": "bench", "model": {"width": 384, "pretrained": "none", "dropout": 0}})
OUTPUT_TOLERANCE = 1e-3  # of the largest logit, box or vector entry, after twelve layers in float32
LOSS_TOLERANCE = 1e-3  # relative
GRADIENT_TOLERANCE = 1e-2  # relative, of the gradient's norm: single samples may change cells by rounding


def infer_rows() -> Iterator[Row]:
    """One image from pixels to masks."""
    model, images = build_network().eval(), draw_images()
    prepared = prepare_for_inference(model)
    codec, names = build_codec(EXPERIMENT), [str(channel) for channel in range(CLASSES)]
    kept = zigzag_places(codec.mask_size)[: codec.vector_dim]

    def plainly() -> tuple[LayerPrediction, Detections]:
        with torch.inference_mode(), use_implementation("reference"):
            prediction = model(images.normalised()).layers[-1]
            return prediction, postprocess_one_by_one(prediction, kept)

    def ours() -> tuple[LayerPrediction, Detections]:
        with torch.inference_mode():
            prediction = prepared(images.normalised()).layers[-1]
            return prediction, postprocess(prediction, [(HEIGHT, WIDTH)], codec, top_k=TOP_K, class_names=names)[0]

    yield compare(
        "infer",
        f"ResNet-50, width {EXPERIMENT.model.width}, {describe_size()}, batch 1, with masks",
        plainly,
        ours,
        lambda expected, found: are_near(expected[0][:3], found[0][:3], tolerance=OUTPUT_TOLERANCE),
        repeats=5,
    )


def train_rows() -> Iterator[Row]:
    """One optimiser step on one image."""
    model, images = build_network().train(), draw_images()
    criterion = build_criterion(EXPERIMENT)
    target = draw_target(criterion.codec.mask_size)

    def stepper(network: nn.Module) -> Callable[[], tuple[float, float]]:
        optimizer = build_optimizer(network, EXPERIMENT.optim)

        def step() -> tuple[float, float]:
            """Loss and gradient norm of one step."""
            optimizer.zero_grad(set_to_none=True)
            loss = criterion.total(criterion(network(images.normalised()), [target]))
            loss.backward()
            norm = gradient_norm(network)
            clip_gradients(network, EXPERIMENT.optim.clip_norm, norm)
            optimizer.step()
            return loss.item(), norm.item()

        return step

    plain_step = stepper(copy.deepcopy(model))
    use_onednn(model, training=True)
    step = stepper(model)

    def plainly() -> tuple[float, float]:
        keep_freed_memory(keep=False)
        with use_implementation("reference"):
            return plain_step()

    def ours() -> tuple[float, float]:
        keep_freed_memory()
        return step()

    yield compare(
        "train",
        f"one step, ResNet-50, width {EXPERIMENT.model.width}, {describe_size()}, batch 1, {OBJECTS} objects",
        plainly,
        ours,
        _same_step,
        repeats=2,
        seconds=60,
        settle=True,
    )


def build_network(experiment: Experiment = EXPERIMENT) -> nn.Module:
    """A fresh network whose zero matrices are drawn too: otherwise all queries would give one and the same mask."""
    torch.manual_seed(0)
    model = build_model(experiment, CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def build_criterion(experiment: Experiment) -> SetCriterion:
    """The losses of an experiment with mask vectors."""
    costs, loss = experiment.matcher.model_dump(), experiment.loss
    matcher = HungarianMatcher(**costs, focal_alpha=loss.focal_alpha, focal_gamma=loss.focal_gamma)
    return SetCriterion(build_codec(experiment), matcher, **loss.model_dump())


def draw_images(size: tuple[int, int] = NETWORK_SIZE) -> ImageBatch:
    """One image of noise, (height, width) pixels."""
    pixels = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels, torch.zeros(1, *size, dtype=torch.bool))


def draw_target(mask_size: int, size: tuple[int, int] = NETWORK_SIZE) -> Target:
    """`OBJECTS` objects for an image of (height, width) pixels."""
    boxes = xyxy_to_cxcywh(boxes_xyxy(0, count=OBJECTS) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    masks = blob_masks(0, count=OBJECTS, size=mask_size)
    return Target(0, torch.arange(OBJECTS), boxes, masks, size, (HEIGHT, WIDTH))


def describe_size(size: tuple[int, int] = NETWORK_SIZE) -> str:
    """(height, width) as it stands in a row."""
    return "x".join(map(str, size))


def _same_step(expected: tuple[float, float], found: tuple[float, float]) -> bool:
    (loss, norm), (our_loss, our_norm) = expected, found
    return abs(our_loss - loss) <= LOSS_TOLERANCE * loss and abs(our_norm - norm) <= GRADIENT_TOLERANCE * norm
