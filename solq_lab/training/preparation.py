"""Measurements before the first step: mask vectors, their best constant prediction, the codec's ceiling, the data."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from solq_lab import distributed
from solq_lab.codecs.base import MaskCodec, describe_codec
from solq_lab.data.coco import CocoDataset
from solq_lab.environment import describe_hardware, describe_software
from solq_lab.files import hash_file
from solq_lab.models.solq import SOLQ
from solq_lab.ops.ms_deform_attn import implementation_for
from solq_lab.runs import Run
from solq_lab.schema import TrainSection
from solq_lab.studies.ceiling import run_ceiling
from solq_lab.training.finetune import TrainedModel, start_from_trained
from solq_lab.training.optim import square_root_rule
from solq_lab.training.step import micro_batches_per_process

log = logging.getLogger(__name__)

SAMPLED_VECTORS = 2000  # enough for the median of a coefficient to within 3 % of its spread
SAMPLED_IMAGES = 1000


def measure_start(
    run: Run, model: SOLQ, codec: MaskCodec | None, train_set: CocoDataset, trained: TrainedModel | None
) -> dict[str, Any]:
    """Give a new model the units of its mask vectors and the weights of `trained`, and measure what it must beat.

    Returns:
        The first line of metrics.jsonl: the vector loss of a constant prediction, and the codec's ceiling.
    """
    line: dict[str, Any] = {"kind": "start", "step": 0, "plateau": {}, "ceiling": {}}
    if codec is not None:
        vectors = sample_vectors(train_set, codec, seed=run.experiment.seed)
        center, std = vector_statistics(vectors)
        if run.experiment.model.standardise_vectors:
            model.set_vector_statistics(center, std)
        loss = run.experiment.loss
        if loss.vector_kind == "l1" or (loss.vector_kind == "codec" and codec.loss == "l1"):
            line["plateau"] = {"vector": vector_plateau(vectors / std if loss.vector_units == "std" else vectors)}

    if trained is not None:  # after the statistics: the weights of its vector heads are converted to the new units
        lines = start_from_trained(model, codec, train_set.classes.names, trained)
        run.record_environment({"finetuned": {"from": run.experiment.train.finetune_from, "lines": lines}})

    if codec is not None:
        ceiling = run_ceiling(run)
        assert ceiling is not None  # only a plain detector has none
        line["ceiling"] = ceiling.to_dict()["metrics"]
        log.info("the codec alone allows, on the validation split:\n%s", ceiling.table())
        if line["plateau"]:
            log.info("predicting the median vector gives a vector loss of %.3f", line["plateau"]["vector"])
    return line


def sample_vectors(dataset: CocoDataset, codec: MaskCodec, *, seed: int) -> Tensor:
    """Vectors (K, D) of training masks as the network will meet them, from images drawn without replacement.

    K is about `SAMPLED_VECTORS`, or less in a small data set; it may be 0.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))[:SAMPLED_IMAGES]
    vectors, count = [torch.zeros(0, codec.vector_dim)], 0
    for index in order.tolist():
        masks = dataset[index][1].masks
        assert masks is not None  # training targets have masks where there is a codec
        vectors.append(codec.encode(masks).float())
        count += len(masks)
        if count >= SAMPLED_VECTORS:
            break
    return torch.cat(vectors)


def vector_statistics(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Center (D,) and spread (D,) of vectors (K, D): median and standard deviation of each coefficient.

    A coefficient that hardly varies gets a hundredth of the mean spread, so that it can still be learned. Without
    vectors to look at the center is 0 and the spread 1.
    """
    if len(vectors) < 2:
        return vectors.new_zeros(vectors.shape[1]), vectors.new_ones(vectors.shape[1])
    spread = vectors.std(dim=0)
    floor = spread.mean() / 100 if spread.any() else 1.0
    return vectors.median(dim=0).values, spread.clamp(min=float(floor))


def vector_plateau(vectors: Tensor) -> float:
    """Mean L1 loss of the best constant prediction for vectors (K, D): each coefficient's median. 0 when K = 0.

    A vector head that has learnt nothing about the image reaches this value and no lower one.
    """
    if len(vectors) == 0:
        return 0.0
    return (vectors - vectors.median(dim=0).values).abs().mean().item()


def describe_training(train_set: CocoDataset, codec: MaskCodec | None, device: torch.device) -> dict[str, Any]:
    """What the numbers of a training depend on besides its experiment, for environment.json."""
    return describe_software() | {
        "operator": implementation_for(device.type),
        "device": describe_device(device),
        "hardware": describe_hardware(),
        "processes": distributed.world_size(),
        "dataset": {  # what tells one from another
            "annotations": str(train_set.annotations),
            "sha256": hash_file(train_set.annotations),
            "images": len(train_set),
            "classes": sum(1 for name in train_set.classes.names if name),
        },
        "codec": describe_codec(codec),
    }


def log_start(
    run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, *, images: int, step: int, total_steps: int
) -> None:
    """Log the size of the model, the device, how the batch is divided, the learning rates, and the first step."""
    train, optim, processes = run.experiment.train, run.experiment.optim, distributed.world_size()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    weights = sum(parameter.numel() for parameter in parameters)
    log.info("%s: %.2f M trained weights, images: %d", run.folder, weights / 1e6, images)
    operator = implementation_for(device.type)
    log.info("on %s, threads: %d, deformable attention: %s", describe_device(device), torch.get_num_threads(), operator)

    passes = micro_batches_per_process(train)
    factors = f"{processes} x {passes} x {train.batch_size // (processes * passes)}"
    log.info("batch %d = %s (processes x passes x images)", train.batch_size, factors)
    rates = ", ".join(f"{group['name']} {group['base_lr']:.2g}" for group in optimizer.param_groups)
    log.info("learning rates: %s; schedule %s until step %d", rates, optim.schedule, total_steps)
    if train.batch_size != TrainSection().batch_size:
        scaled = " ".join(f"{name}={rate:.2g}" for name, rate in square_root_rule(train.batch_size).items())
        log.info("the paper's learning rates at this batch, by square-root scaling: %s", scaled)
    if step:
        log.info("resuming from the checkpoint of step %d", step)


def describe_device(device: torch.device) -> str:
    """Name of the GPU, or the instruction set of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()} CPU"
