"""AdamW with three groups of parameters, and the learning rate as a function of the step. Paper: section 4.2."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from solq_lab.schema import OptimSection, TrainSection


def parameter_group(name: str) -> str:
    """The group of the parameter with this name: "backbone", "offsets" or "main".

    "offsets" are the layers that place the samples, `sampling_offsets` and `reference_points`; they learn more slowly.
    """
    if name.startswith("backbone."):
        return "backbone"
    if "sampling_offsets" in name or "reference_points" in name:
        return "offsets"
    return "main"


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW over all parameters that require a gradient; weight decay on every one of them, norms and biases too.

    Each group carries its `name` and its `base_lr`, the learning rate that `set_learning_rate` scales.
    """
    rates = {"main": optim.lr, "backbone": optim.backbone_lr, "offsets": optim.lr * optim.offset_lr_factor}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[parameter_group(name)].append(parameter)
    groups = [
        {"name": name, "params": parameters, "lr": rates[name], "base_lr": rates[name]}
        for name, parameters in members.items()
        if parameters
    ]
    # One fused kernel per group: a small network has as many launches in its optimiser as in its forward pass.
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)


def learning_rate_factor(optim: OptimSection, step: int, total_steps: int) -> float:
    """Factor of every group's learning rate in optimiser step `step` (0-based) of `total_steps`.

    Linear warm-up over the first `optim.warmup` of the training, then the step drop or the cosine.
    """
    warmup_steps = round(optim.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    match optim.schedule:
        case "step":
            return optim.drop_factor if step >= optim.drop_at * total_steps else 1.0
        case "cosine":
            progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
            return optim.final_factor + (1 - optim.final_factor) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its own base learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def square_root_rule(batch_size: int) -> dict[str, float]:
    """The paper's learning rates, scaled from its batch to another by the square root, by the settings' names."""
    factor, paper = math.sqrt(batch_size / TrainSection().batch_size), OptimSection()
    return {"optim.lr": paper.lr * factor, "optim.backbone_lr": paper.backbone_lr * factor}


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The common L2 norm of all gradients, a scalar tensor on their device; not finite when one of them is not."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float, norm: torch.Tensor) -> None:
    """Scale all gradients so that their common L2 norm, now `norm`, is at most `largest_norm`; 0 leaves them alone."""
    limit = largest_norm if largest_norm > 0 else math.inf
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
