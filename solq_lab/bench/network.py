"""The whole network, inference and a training step, against the same network on `grid_sample`.

On the CPU our training step keeps freed memory, as the training process does; the plain one leaves it to the C library.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solq_lab.allocation import keep_freed_memory
from solq_lab.bench.codec import zigzag_places
from solq_lab.bench.postprocess import TOP_K, postprocess_one_by_one
from solq_lab.bench.scenes import HEIGHT, WIDTH, blob_masks, boxes_xyxy
from solq_lab.bench.timing import Row, are_near, compare
from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.build import build_codec
from solq_lab.config import Experiment
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.graphs import GraphedForward
from solq_lab.inference.postprocess import postprocess
from solq_lab.inference.predictor import predict_last_layer
from solq_lab.models.onednn import use_onednn
from solq_lab.ops.ms_deform_attn import use_implementation
from solq_lab.structures import Detections, ImageBatch, LayerPrediction, Target
from solq_lab.studies.efficiency import CLASS_CHANNELS, IMAGE_SIZE, build_random_network
from solq_lab.training.losses import build_criterion
from solq_lab.training.optim import build_optimizer, clip_gradients, gradient_norm
from solq_lab.training.step import Batch, boxes_per_process, forward_backward

OBJECTS = 7  # per image, COCO's mean
CPU = torch.device("cpu")
Numbers = tuple[float, float]  # loss and gradient norm of one step
Prediction = tuple[LayerPrediction, Detections]  # of one image


class Workload(NamedTuple):
    """What is measured."""

    experiment: Experiment  # network, codec, losses and optimiser
    image: tuple[int, int]  # (height, width) of the training images, pixels
    shown: tuple[int, int]  # (height, width) of the image to predict, pixels
    batch: int  # images of a training step
    repeats: int  # timed runs of each way, at most

    def describe(self, size: tuple[int, int], batch: int) -> str:
        """The network, the size and the batch as they stand in a row."""
        backbone = {"resnet50": "ResNet-50"}.get(self.experiment.model.backbone, self.experiment.model.backbone)
        return f"{backbone}, width {self.experiment.model.width}, {describe_size(size)}, batch {batch}"


def released_model(**changes: Any) -> Experiment:
    """SOLQ with ResNet-50 in the released width."""
    return Experiment.model_validate({"name": "bench", "model": {"width": 384, "pretrained": "none", **changes}})


TABLE_5 = Workload(released_model(dropout=0), image=IMAGE_SIZE, shown=IMAGE_SIZE, batch=1, repeats=5)


def infer_rows() -> Iterator[Row]:
    """One image from pixels to masks."""
    what = f"{TABLE_5.describe(TABLE_5.shown, 1)}, with masks"
    yield infer_row("infer", what, TABLE_5, tolerance=1e-3)  # after twelve layers in float32


def train_rows() -> Iterator[Row]:
    """One optimiser step on one image."""

    def same(expected: Numbers, found: Numbers) -> bool:
        """The loss to 0.1 %, the norm to 1 %: single samples may change cells by rounding."""
        (loss, norm), (our_loss, our_norm) = expected, found
        return abs(our_loss - loss) <= 1e-3 * loss and abs(our_norm - norm) <= 1e-2 * norm

    what = f"one step, {TABLE_5.describe(TABLE_5.image, TABLE_5.batch)}, {OBJECTS} objects"
    yield train_row("train", what, TABLE_5, equal=same, repeats=2, seconds=60, settle=True)


def infer_row(
    part: str,
    what: str,
    work: Workload,
    device: torch.device = CPU,
    *,
    autocast: str = "none",
    tolerance: float,
    **settings: Any,
) -> Row:
    """One image of the host to run-length codes, against the network as it was trained, in float32.

    Equal means: within `tolerance` of the largest logit, box or vector entry.
    """

    def same(expected: Prediction, found: Prediction) -> bool:
        return are_near(_outputs(expected[0]), _outputs(found[0]), tolerance=tolerance)

    plainly, ours = inference_ways(work, device, autocast)
    return compare(part, what, plainly, ours, same, **{"repeats": work.repeats, **settings})


def inference_ways(
    work: Workload, device: torch.device = CPU, autocast: str = "none"
) -> tuple[Callable[[], Prediction], Callable[[], Prediction]]:
    """The plain way of predicting one image, and ours, on a GPU as a CUDA graph."""
    model, images = build_random_network(work.experiment).eval().to(device), draw_images(work.shown)
    codec, names = build_codec(work.experiment), [str(channel) for channel in range(CLASS_CHANNELS)]
    assert codec is not None, "the bench measures networks with mask vectors"
    codec.to(device)
    kept = zigzag_places(codec.mask_size)[: codec.vector_dim]

    @torch.inference_mode()
    def plainly() -> Prediction:
        with use_implementation("reference"):
            last = LayerPrediction(*_outputs(model(images.to(device).normalised()).layers[-1]))
            return last, postprocess_one_by_one(last, kept)

    predict = partial(predict_last_layer, prepare_for_inference(model), autocast=autocast)
    last_layer = GraphedForward(predict, device) if device.type == "cuda" else predict

    @torch.inference_mode()
    def ours() -> Prediction:
        last = last_layer(images.to(device))
        return last, postprocess(last, [(HEIGHT, WIDTH)], codec, top_k=TOP_K, class_names=names)[0]

    return plainly, ours


def train_row(
    part: str,
    what: str,
    work: Workload,
    device: torch.device = CPU,
    *,
    autocast: str = "none",
    equal: Callable[[Numbers, Numbers], bool],
    **settings: Any,
) -> Row:
    """An optimiser step, against one in float32 with `grid_sample`."""
    network = build_random_network(work.experiment).train()
    batch = draw_batch(work, pinned=device.type == "cuda")
    plain_step = stepper(copy.deepcopy(network).to(device), work.experiment, batch)
    if device.type == "cpu":
        use_onednn(network, training=True)
    step = stepper(network.to(device), work.experiment, batch, autocast)

    def plainly() -> Numbers:
        keep_freed_memory(keep=False)
        with use_implementation("reference"):
            return plain_step()

    def ours() -> Numbers:
        keep_freed_memory()
        return step()

    return compare(part, what, plainly, ours, equal, **{"repeats": work.repeats, **settings})


def stepper(model: nn.Module, experiment: Experiment, batch: Batch, autocast: str = "none") -> Callable[[], Numbers]:
    """A function that takes one optimiser step of `model` on `batch`, and waits for its loss and gradient norm."""
    device = next(model.parameters()).device
    criterion = build_criterion(experiment, build_codec(experiment), model).to(device)
    optimizer = build_optimizer(model, experiment.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    num_boxes = max(boxes_per_process([batch], device), 1.0)  # the images may have no objects

    def step() -> Numbers:
        optimizer.zero_grad(set_to_none=True)
        done = forward_backward(model, criterion, scaler, batch, num_boxes, autocast)
        norm = gradient_norm(model.parameters())
        clip_gradients(model.parameters(), experiment.optim.clip_norm, norm)
        optimizer.step()
        return done.losses["total"].item(), norm.item()

    return step


def draw_images(size: tuple[int, int], batch: int = 1) -> ImageBatch:
    """A batch of one image of noise, (height, width) pixels."""
    pixels = torch.randint(256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageBatch(pixels.repeat(batch, 1, 1, 1), torch.zeros(batch, *size, dtype=torch.bool))


def draw_batch(work: Workload, *, pinned: bool = False) -> Batch:
    """A batch of training images with `OBJECTS` objects each, on the host as a loader gives them."""
    images, mask_size = draw_images(work.image, work.batch), work.experiment.codec.mask_size
    boxes = xyxy_to_cxcywh(boxes_xyxy(0, count=OBJECTS) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    masks = blob_masks(0, count=OBJECTS, size=mask_size)
    target = Target(0, torch.arange(OBJECTS), boxes, masks, work.image, (HEIGHT, WIDTH))
    return images.pin_memory() if pinned else images, [target] * work.batch


def describe_size(size: tuple[int, int]) -> str:
    """(height, width) as it stands in a row."""
    return "x".join(map(str, size))


def _outputs(prediction: LayerPrediction) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, boxes and mask vectors on the host, in float32."""
    assert prediction.vectors is not None, "the bench measures networks with mask vectors"
    return prediction.logits.float().cpu(), prediction.boxes.float().cpu(), prediction.vectors.float().cpu()
