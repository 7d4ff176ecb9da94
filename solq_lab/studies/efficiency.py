"""The cost of masks: parameters, multiply-adds and images per second of UQR and SQR. Paper: table 5.

Both are the same detector with another mask branch, so the counts of the detector are those without any.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from solq_lab.bars import progress_bar
from solq_lab.build import build_codec, build_model
from solq_lab.config import ConfigError, Experiment, change_experiment
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.postprocess import decoding_of, postprocess
from solq_lab.models.solq import SOLQ
from solq_lab.ops.ms_deform_attn import MULTIPLY_ADD
from solq_lab.structures import ImageBatch

IMAGE_SIZE = (512, 852)  # height and width of the network's input in table 5, pixels
CLASS_CHANNELS = 91  # of the released models on COCO
METHODS = ("SQR", "UQR")

_SHOWN = {  # columns of the paper's table -> title, and how many of ours make one of the unit shown
    "detector_parameters": ("detector, M parameters", 1e6),
    "mask_parameters": ("mask branch, M parameters", 1e6),
    "detector_multiply_adds": ("detector, G multiply-adds", 1e9),
    "mask_multiply_adds": ("mask branch, G multiply-adds", 1e9),
    "decoding_multiply_adds": ("decoding one mask, M multiply-adds", 1e6),
    "images_per_second": ("images per second", 1),
}
_PAPER_UNITS = {"decoding_multiply_adds": 1000.0}  # printed in 10^9, shown in millions


class Cost(NamedTuple):
    """The cost of one method for one image."""

    # detector_parameters, mask_parameters: trained numbers of the detector and of the mask branch
    detector_parameters: int
    mask_parameters: int
    detector_multiply_adds: int  # of a forward pass without masks
    # of the masks, or mask vectors, of all queries after the last decoder layer. Earlier layers need none to predict
    mask_multiply_adds: int
    decoding_multiply_adds: int | None  # of turning one mask vector into a mask; None where there are no vectors
    images_per_second: float | None = None  # from pixels to run lengths, batch 1; None where it was not measured


def count_costs(
    experiment: Experiment, *, num_classes: int = CLASS_CHANNELS, image_size: tuple[int, int] = IMAGE_SIZE
) -> dict[str, Cost]:
    """Parameters and multiply-adds of SQR and UQR, counted on meta tensors, which have shapes only.

    Args:
        experiment: sections `model` and `codec` are read; it has a codec, and its model no mask branch.
        num_classes: S, class channels.
        image_size: (height, width) of the network's input, pixels.

    Raises:
        ConfigError: the experiment has no codec, or SQR cannot be built at its sizes.
    """
    variants = _variants(experiment)
    with torch.device("meta"):
        detector, sqr, uqr = (build_model(variants[name], num_classes).eval() for name in ("detector", *METHODS))
        images = _blank(image_size)
        queries = torch.zeros(1, uqr.num_queries, experiment.model.width)
    codec = build_codec(variants["UQR"])
    assert codec is not None
    vector = torch.zeros(1, codec.vector_dim, dtype=torch.float64)  # decoded in plain torch, whose products are counted

    # Parameters are counted first: `_multiply_adds` freezes the module.
    parameters = _trained(detector)
    alone = _multiply_adds(detector, images.normalised())
    sqr_costs = _trained(sqr) - parameters, alone, _multiply_adds(sqr, images.normalised()) - alone
    uqr_costs = _trained(uqr) - parameters, alone, _multiply_adds(uqr.heads[-1].get_submodule("vector"), queries)
    return {
        "SQR": Cost(parameters, *sqr_costs, None),
        "UQR": Cost(parameters, *uqr_costs, _multiply_adds(codec.decode, vector)),
    }


def measure_costs(
    experiment: Experiment,
    *,
    num_classes: int = CLASS_CHANNELS,
    image_size: tuple[int, int] = IMAGE_SIZE,
    device: torch.device | str | None = None,
    repeats: int = 3,
) -> dict[str, Cost]:
    """The counts of `count_costs`, and the speed of both methods with random weights, batch 1.

    The methods are timed in turn, so that a busy moment of the machine affects both; the median of their times counts.
    Networks are prepared as `Predictor` prepares them, masks have the size of the input.

    Args:
        experiment, num_classes, image_size: as in `count_costs`.
        device: where to measure. None: the first CUDA device, or the CPU where there is none.
        repeats: timed images of each method, after one that is not timed.

    Raises:
        ConfigError: as in `count_costs`.
        ValueError: no repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats {repeats}: allowed are positive numbers of timed images")
    costs = count_costs(experiment, num_classes=num_classes, image_size=image_size)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    variants = _variants(experiment)
    predict = {name: _predictor(variants[name], num_classes, image_size, device) for name in METHODS}

    # In turns, so that what else the machine does slows all methods alike.
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in progress_bar(range(repeats + 1), desc="measuring", unit="turn"):
        for name in METHODS:
            started = time.perf_counter()
            predict[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn > 0:  # the first one builds and warms what is built lazily
                seconds[name].append(time.perf_counter() - started)
    return {name: costs[name]._replace(images_per_second=1 / statistics.median(seconds[name])) for name in METHODS}


def efficiency_frame(costs: Mapping[str, Cost], paper: Mapping[str, Mapping[str, float | None]]) -> pd.DataFrame:
    """Ours beside the paper's, and the ratio of speeds; NaN where there is no number.

    Args:
        costs: the costs of each of `METHODS`.
        paper: method -> column -> the paper's number, in millions, 10^9 and images per second.

    Returns:
        Columns (method, "here") and (method, "paper").
    """
    columns = {}
    for name, cost in costs.items():
        ours = {column: getattr(cost, column) for column in _SHOWN}
        columns[name, "here"] = [value and value / _SHOWN[column][1] for column, value in ours.items()]
        printed = {column: paper.get(name, {}).get(column) for column in _SHOWN}
        columns[name, "paper"] = [value and value * _PAPER_UNITS.get(column, 1.0) for column, value in printed.items()]
    frame = pd.DataFrame(columns, index=[title for title, _ in _SHOWN.values()], dtype=float)

    speeds = frame.loc["images per second"]
    for source in ("here", "paper"):
        frame.loc["images per second, UQR over SQR", ("UQR", source)] = speeds["UQR", source] / speeds["SQR", source]
    return frame


def _variants(experiment: Experiment) -> dict[str, Experiment]:
    """The detector alone, with SQR and with UQR, otherwise with the experiment's settings."""
    if experiment.codec.kind == "none":
        raise ConfigError(
            f"{experiment.name}: codec.kind none has no mask vectors to measure; give an experiment with a codec, "
            "for example experiments/solq_r50.yaml"
        )

    changes = {
        "detector": {"model.mask_branch": "none", "codec.kind": "none"},
        "SQR": {"model.mask_branch": "sqr", "codec.kind": "none"},
        "UQR": {"model.mask_branch": "none"},
    }
    return {
        name: change_experiment(
            experiment, some | {"train.freeze_detector": False}, source=f"{experiment.name}, mask branch of {name}"
        )
        for name, some in changes.items()
    }


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _multiply_adds(function: Callable[..., Any], argument: Any) -> int:
    """Of one call. A module cannot be trained afterwards."""
    if isinstance(function, nn.Module):
        function.requires_grad_(False)  # the counter follows gradients, which shapes alone do not have
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(argument)
    return counter.get_total_flops() // MULTIPLY_ADD


def build_random_network(experiment: Experiment, num_classes: int = CLASS_CHANNELS) -> SOLQ:
    """A fresh network whose zero matrices are drawn too: otherwise all queries would give one and the same mask."""
    torch.manual_seed(0)
    model = build_model(experiment, num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
    return model


def _predictor(
    experiment: Experiment, num_classes: int, image_size: tuple[int, int], device: torch.device
) -> Callable[[], object]:
    """A function that predicts one image, from pixels to run lengths, with random weights."""
    model = prepare_for_inference(build_random_network(experiment, num_classes).to(device))
    codec = build_codec(experiment)
    if codec is not None:
        codec.to(device)
    images, names = _blank(image_size).to(device), [str(channel) for channel in range(num_classes)]
    top_k, decoding = experiment.evaluation.top_k, decoding_of(experiment.evaluation)

    def predict() -> object:
        with torch.inference_mode():
            last = model(images.normalised()).layers[-1]
            return postprocess(last, [image_size], codec, top_k=top_k, class_names=names, **decoding)

    return predict


def _blank(image_size: tuple[int, int]) -> ImageBatch:
    return ImageBatch(torch.zeros(1, 3, *image_size, dtype=torch.uint8), torch.zeros(1, *image_size, dtype=torch.bool))
