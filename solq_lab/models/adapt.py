"""A trained model's weights for a model with other classes, other queries or another mask code.

Everything else has to be the same. The paper starts from ImageNet weights (section 4.2); this is an addition.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from solq_lab.models.heads import VectorMLP
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightMismatch

CLASSES = re.compile(r"heads\.\d+\.classify\.(weight|bias)")  # rows are classes
PROPOSALS = re.compile(r"proposal_head\.classify\.(weight|bias)")  # of two stages; the first knows channel 0 alone
QUERIES = "query_embedding"  # rows are queries
ANSWERS = re.compile(r"heads\.\d+\.vector\.(layers\.2\.(weight|bias)|vector_(center|spread))")  # rows are coefficients
BRANCHES = {  # a model has all of a branch, or nothing
    "mask vectors": re.compile(r"heads\.\d+\.vector\."),
    "mask branch": re.compile(r"mask_branch\."),
}
JITTER = 0.1  # noise on a repeated query, in units of the spread of each feature over the queries


class SharedCoefficients(NamedTuple):
    """What two mask codes have in common.

    count: so many first coefficients mean the same.
    factor: a coefficient of the new code over that of the old one, for the same mask.
    """

    count: int
    factor: float = 1.0


@torch.no_grad()
def adapt_weights(
    model: SOLQ,
    state: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    own_classes: Sequence[str],
    shared: SharedCoefficients,
    source: str,
) -> list[str]:
    """Give a fresh model what fits of a trained one's weights; what has no counterpart stays as it is.

    Rows of the class head go by name. Queries beyond the model's are left out; missing ones are trained queries again
    with a little noise, which the matching then parts. Coefficients that both codes share answer as before, also where
    one model standardises its vectors and the other does not.

    Args:
        model: changed in place; a model that standardises its vectors has its statistics already.
        state: the trained model's state dict in our naming.
        classes, own_classes: names of both models' class channels, empty for unused ones.
        shared: what the mask codes have in common.
        source: what messages call the state.

    Returns:
        What was done, line by line.

    Raises:
        WeightMismatch: a tensor is missing, unknown, or of another shape for any other reason than the above.
    """
    own = model.state_dict()
    lines = _drop_and_keep_branches(own, state)
    rest = {name: tensor for name, tensor in own.items() if not _is_special(name) and not _in_absent(name, state)}
    _check_rest(rest, state, own, source)
    for name, tensor in rest.items():
        tensor.copy_(state[name])
    lines.insert(0, f"copied   {len(rest)} tensors, all but what follows")
    lines.append(_adapt_classes(own, state, classes, own_classes))
    if QUERIES in own:
        lines.append(_adapt_queries(own[QUERIES], state[QUERIES]))
    if model.heads[0].vector is not None and not _in_absent("heads.0.vector.", state):
        lines.append(_adapt_answers(model.heads[0].vector, state, shared))
    return lines


def _drop_and_keep_branches(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Lines about branches that only one of the two models has."""
    lines = []
    for title, pattern in BRANCHES.items():
        here, there = (any(map(pattern.match, names)) for names in (own, state))
        if here and not there:
            lines.append(f"fresh    {title}: the file has none")
        if there and not here:
            lines.append(f"dropped  {title}: this model has none")
    return lines


def _is_special(name: str) -> bool:
    return name == QUERIES or bool(CLASSES.fullmatch(name) or PROPOSALS.fullmatch(name) or ANSWERS.fullmatch(name))


def _in_absent(name: str, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a branch of which `others` have nothing."""
    return any(pattern.match(name) and not any(map(pattern.match, others)) for pattern in BRANCHES.values())


def _check_rest(
    rest: Mapping[str, Tensor], state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> None:
    """Every tensor outside of the heads is in both models, with one shape; and the heads have one width."""
    faults = []
    unknown = [name for name in state if name not in own and not _is_special(name) and not _in_absent(name, own)]
    for name, tensor in rest.items():
        if name not in state:
            faults.append(f"no tensor {name}{_nearest(name, unknown)}")
        elif state[name].shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(state[name].shape)}, this model {tuple(tensor.shape)}")
    faults += [f"unknown tensor {name}{_nearest(name, list(rest))}" for name in unknown]
    for name in filter(_is_special, own):
        if not _in_absent(name, state) and ".vector_" not in name and name not in state:  # units may be missing
            faults.append(f"no tensor {name}")
        elif name in state and state[name].shape[1:] != own[name].shape[1:]:
            faults.append(f"{name} has rows of {tuple(state[name].shape[1:])}, this model {tuple(own[name].shape[1:])}")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightMismatch(
            f"{source}: {'; '.join(faults[:3])}{more}. Only classes, queries and the mask code may differ; give the "
            "model section the values of the experiment in that file"
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" (nearest: {found[0]})" if found else ""


def _adapt_classes(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], classes: Sequence[str], own_classes: Sequence[str]
) -> str:
    """Copy the rows of classes with one name; the others keep the prior that a fresh head starts from."""
    place = {name.casefold(): row for row, name in enumerate(classes) if name}
    pairs = [(row, place[name.casefold()]) for row, name in enumerate(own_classes) if name.casefold() in place]
    rows, there = [row for row, _ in pairs], [row for _, row in pairs]
    for name in filter(CLASSES.fullmatch, own):
        own[name][rows] = state[name][there].to(own[name].dtype)
    for name in filter(PROPOSALS.fullmatch, own):
        common = slice(min(len(own[name]), len(state[name])))
        own[name][common] = state[name][common].to(own[name].dtype)
    known = {own_classes[row] for row in rows}
    fresh = [name for name in own_classes if name and name not in known]
    wanted = {name.casefold() for name in own_classes}
    dropped = [name for name in classes if name and name.casefold() not in wanted]
    return (
        f"classes  {len(pairs)} copied by name{_listed(sorted(known))}, {len(fresh)} fresh{_listed(fresh)}, "
        f"{len(dropped)} dropped{_listed(dropped)}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f" ({shown})" if names else ""


def _adapt_queries(own: Tensor, trained: Tensor) -> str:
    """Cut or repeat the rows (J, 2C) of the trained queries."""
    here, there, trained = len(own), len(trained), trained.to(own)
    kept = min(here, there)
    own[:kept] = trained[:kept]
    if here <= there:
        return f"queries  {here} copied" + (f", the last {there - here} cut" if here < there else "")
    again = torch.arange(there, here, device=own.device) % there
    noise = torch.randn_like(own[there:]) * trained.std(dim=0, correction=0)
    own[there:] = own[again] + JITTER * noise
    return f"queries  {there} copied, {here - there} grown: trained ones again, with noise"


def _adapt_answers(head: VectorMLP, state: Mapping[str, Tensor], shared: SharedCoefficients) -> str:
    """The last layer's rows of the shared coefficients, in the units that this head answers in."""
    last = head.layers[2]
    trained_weight, trained_bias = (
        state[f"heads.0.vector.layers.2.{name}"].to(last.bias) for name in ("weight", "bias")
    )
    length = len(trained_bias)
    center = state.get("heads.0.vector.vector_center", torch.zeros(length)).to(last.bias)
    spread = state.get("heads.0.vector.vector_spread", torch.ones(length)).to(last.bias)
    rows = slice(shared.count)
    weight = shared.factor * (trained_weight * spread.unsqueeze(1))[rows]  # of plain coefficients
    bias = shared.factor * (trained_bias * spread + center)[rows]
    if head.standardise:
        weight, bias = (
            weight / head.vector_spread[rows, None],
            (bias - head.vector_center[rows]) / head.vector_spread[rows],
        )
    last.weight[rows], last.bias[rows] = weight, bias
    fresh = len(last.bias) - shared.count
    return (
        f"vectors  {shared.count} coefficients copied"
        + (f", times {shared.factor:g} for the other mask size" if shared.factor != 1 and shared.count else "")
        + (f", {fresh} fresh" if fresh else "")
        + (f", {length - shared.count} dropped" if length > shared.count else "")
    )
