"""What the numbers of a step were and which of them are not finite, as plain values that a record keeps and compares.

Numbers that are not finite are the texts "nan", "inf" and "-inf": JSON has no other way to say them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solq_lab.training.matcher import columns_by_layer
from solq_lab.training.optim import parameter_group
from solq_lab.training.step import MicroBatch

SHOWN_GRADIENTS = 20  # the largest; those that are not finite are all shown


def describe_pass(done: MicroBatch, costs: Mapping[str, Tensor], file_name: Callable[[int], str]) -> dict[str, Any]:
    """Images, matching costs and losses of one pass, and what the matcher found wrong with it.

    Args:
        done: the pass.
        costs: of its matching by term, (K, Z*J) each.
        file_name: of the image with an id.
    """
    images = [
        {
            "id": target.image_id,
            "file_name": file_name(target.image_id),
            "image_size": list(target.image_size),
            "original_size": list(target.original_size),
            "objects": len(target.labels),
        }
        for target in done.targets
    ]
    layers = columns_by_layer(done.predictions)
    ends = {
        term: {layer: _summarise(values[:, start:stop]) for layer, (start, stop) in layers.items()}
        for term, values in costs.items()
    }
    losses = {name: number(value.item()) for name, value in done.losses.items()}
    return {"images": images, "fault": done.fault, "losses": losses, "costs": ends}


def describe_gradients(model: nn.Module, norm: Tensor) -> dict[str, Any]:
    """L2 norms of the gradients: of all, by group of the optimiser, by module, the largest, and those not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: torch.linalg.vector_norm(gradient).item() for name, gradient in gradients.items()}
    finite = [name for name, norm in norms.items() if math.isfinite(norm)]
    largest = sorted(finite, key=lambda name: -norms[name])[:SHOWN_GRADIENTS]
    return {
        "norm": number(norm.item()),
        "groups": _combine(norms, parameter_group),
        "modules": _combine(norms, lambda name: name.partition(".")[0]),
        "largest": {name: norms[name] for name in largest},
        "nonfinite": {name: count_nonfinite(gradients[name]) for name in norms if name not in finite},
    }


def nonfinite_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors, all on one device, with a number that is not finite."""
    named = list(named)
    if not named:
        return []
    finite = torch.stack([tensor.isfinite().all() for _, tensor in named]).tolist()  # one wait for a GPU
    return [name for (name, _), fine in zip(named, finite, strict=True) if not fine]


def explain(shares: Sequence[Mapping[str, Any]], gradients: Mapping[str, Any], weights: Sequence[str]) -> str:
    """One sentence: what was not finite, and where it came from as far as the numbers tell.

    Args:
        shares: of every process, its "rank" and its "passes" as `describe_pass` gives them.
        gradients: as `describe_gradients` gives them.
        weights: names of the weights that were not finite before the step.
    """
    before = f"{name_first(weights)} was not finite before the step already; " if weights else ""
    for share in shares:
        where = f"in process {share['rank']}, " if len(shares) > 1 else ""
        for done in share["passes"]:
            if done["fault"]:
                return f"{before}{where}{done['fault']}"
            bad = [f"{name} is {value}" for name, value in done["losses"].items() if isinstance(value, str)]
            if bad:
                return f"{before}{where}the loss {name_first(bad)}"
    if gradients["nonfinite"]:
        return f"{before}all losses are finite, the gradient of {name_first(list(gradients['nonfinite']))} is not"
    return f"{before}every gradient is finite, and their norm is {gradients['norm']}"


def number(value: float) -> float | str:
    """A float as JSON can say it: itself, or "nan", "inf", "-inf"."""
    return value if math.isfinite(value) else str(value)


def count_nonfinite(values: Tensor) -> str:
    """How many numbers of a tensor are not finite, in words."""
    return f"{int((~values.detach().isfinite()).sum())} of {values.numel()}"


def _summarise(values: Tensor) -> dict[str, Any]:
    if values.numel() == 0:
        return {"smallest": None, "largest": None, "nonfinite": 0}
    ends = {"smallest": number(values.amin().item()), "largest": number(values.amax().item())}
    return {**ends, "nonfinite": int((~values.isfinite()).sum())}


def _combine(norms: Mapping[str, float], kind: Callable[[str], str]) -> dict[str, float | str]:
    """The common norms of the gradients of each kind."""
    members: dict[str, list[float]] = {}
    for name, norm in norms.items():
        members.setdefault(kind(name), []).append(norm)
    return {name: number(math.sqrt(math.fsum(norm * norm for norm in some))) for name, some in members.items()}


def name_first(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
