"""Fine-tuning: start from a trained model with other classes, queries or mask codec (`train.finetune_from`).

Everything else of the two models has to be the same. The paper starts from ImageNet weights (section 4.2); this is an
addition.
"""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solq_lab.build import build_codec
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.dct import DCTCodec, zigzag
from solq_lab.data.classes import ClassMap
from solq_lab.inference.predictor import find_weights, read_trained
from solq_lab.models.heads import VectorMLP
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightFile, WeightMismatch
from solq_lab.schema import Experiment, ModelSection, keys_with
from solq_lab.sections import Role

log = logging.getLogger(__name__)

CLASSES = re.compile(r"heads\.\d+\.classify\.(weight|bias)|label_embedding\.weight")  # rows are classes
PROPOSALS = re.compile(r"proposal_head\.classify\.(weight|bias)")  # of two stages; the first uses channel 0 alone
QUERIES = "query_embedding"  # rows are queries
VECTORS = re.compile(r"heads\.\d+\.vector\.(layers\.2\.(weight|bias)|vector_(center|spread))")  # rows: coefficients
BRANCHES = {  # a model has all of a branch, or nothing
    "mask vectors": re.compile(r"heads\.\d+\.vector\."),
    "mask look": re.compile(r"heads\.\d+\.look\."),
    "learned decoder": re.compile(r"mask_decoder$"),
    "denoising": re.compile(r"label_embedding\."),
    "mask branch": re.compile(r"mask_branch\."),
}
JITTER = 0.1  # noise on a repeated query, in units of the std of each feature over the queries
MAX_NAMES = 8  # of classes in one line


class TrainedModel(NamedTuple):
    """A model to start from."""

    path: Path
    weights: WeightFile
    classes: ClassMap  # of its class channels
    codec: MaskCodec | None  # its mask codec, None without mask vectors


def open_trained(experiment: Experiment) -> TrainedModel:
    """The model in `train.finetune_from`, after comparing its settings with those of the experiment's model.

    Args:
        experiment: sections `model`, `codec` and `train` are read.

    Raises:
        RunError, WeightMismatch: no such file or run, or a model that differs in more than classes, queries and codec.
        ConfigError: the tables of its codec are nowhere to be found.
    """
    path = find_weights(experiment.train.finetune_from)
    weights, trained, classes = read_trained(path)

    keys = [key for key in ModelSection.model_fields if f"model.{key}" not in keys_with(Role.ADAPTED)]
    if experiment.codec.kind != "none" and trained.codec.kind != "none":
        keys.append("vector_hidden")
    differing = [
        f"model.{key}={there} there, {here} here"
        for key in keys
        if (there := getattr(trained.model, key)) != (here := getattr(experiment.model, key))
    ]
    if differing:
        raise WeightMismatch(
            f"{path}: another network: {'; '.join(differing)}. train.finetune_from adapts classes, queries and the "
            "mask codec only; set these to the values there, or start from ImageNet weights without it"
        )
    return TrainedModel(path, weights, classes, build_codec(trained, tables=weights.codec))


@torch.no_grad()
def start_from_trained(model: SOLQ, codec: MaskCodec | None, names: Sequence[str], trained: TrainedModel) -> list[str]:
    """Copy what fits of a trained model's weights into a fresh one; what has no counterpart stays as it is.

    Rows of the class head are matched by name. Queries beyond the model's are dropped; missing ones repeat trained
    queries with a little noise, so that the matching separates them. Coefficients that both codecs share keep their
    predictions, also where one model standardises its vectors and the other does not. Nothing of the earlier training's
    optimiser, schedule or averages is taken over.

    Args:
        model: changed in place; a model that standardises its vectors has its statistics already.
        codec: its mask codec, None without mask vectors.
        names: of its class channels, empty for unused ones.
        trained: the model to start from.

    Returns:
        What was done, line by line; it is logged as well.

    Raises:
        WeightMismatch: a tensor is missing, unknown, or of another shape for any other reason than the above.
    """
    own, state = model.state_dict(), trained.weights.state
    lines = []
    for title, pattern in BRANCHES.items():
        here, there = (any(map(pattern.match, keys)) for keys in (own, state))
        if here and not there:
            lines.append(f"fresh    {title}: the file has none")
        if there and not here:
            lines.append(f"dropped  {title}: this model has none")

    rest = {name: tensor for name, tensor in own.items() if not _is_adapted(name) and not _in_absent(name, state)}
    _check_tensors(rest, state, own, str(trained.path))
    for name, tensor in rest.items():
        tensor.copy_(state[name])
    lines.insert(0, f"copied   {len(rest)} tensors, all but what follows")

    lines.append(_adapt_classes(own, state, trained.classes.names, names))
    if QUERIES in own:
        lines.append(_adapt_queries(own[QUERIES], state[QUERIES]))
    vector_head = model.heads[0].vector
    if isinstance(vector_head, VectorMLP) and not _in_absent("heads.0.vector.", state):
        lines.append(_adapt_vectors(vector_head, state, *shared_coefficients(trained.codec, codec)))

    log.info("%s: starting from its weights", trained.path)
    for line in lines:
        log.info("  %s", line)
    log.info("  left out the state of its optimiser, schedule and averages")
    return lines


def shared_coefficients(old: MaskCodec | None, new: MaskCodec | None) -> tuple[int, float]:
    """How many first coefficients of two codecs mean the same, and how their sizes compare.

    Two DCT codecs share the common beginning of their zig-zag scans. An orthonormal transform of an N x N mask sums N*N
    pixels, each weighted by about 1/N, so that the same outline has coefficients proportional to N. Other codecs share
    all or nothing: their tables have to be the same.

    Returns:
        So many first coefficients mean the same; and a coefficient of the new codec over that of the old one, for the
        same mask.
    """
    if old is None or new is None or type(old) is not type(new):
        return 0, 1.0
    if isinstance(old, DCTCodec):
        frequencies = []
        for codec in (old, new):
            kept = zigzag(codec.mask_size)[: codec.vector_dim]
            frequencies.append(torch.stack([kept // codec.mask_size, kept % codec.mask_size], dim=1))  # row, column
        length = min(map(len, frequencies))
        same = (frequencies[0][:length] == frequencies[1][:length]).all(dim=1)
        return int(same.cumprod(0).sum()), new.mask_size / old.mask_size

    sizes = [(codec.mask_size, codec.vector_dim) for codec in (old, new)]
    tables, own = old.state_dict(), new.state_dict()
    equal = sizes[0] == sizes[1] and tables.keys() == own.keys()
    equal = equal and all(torch.equal(tables[name], own[name].cpu()) for name in tables)
    return new.vector_dim if equal else 0, 1.0


def _is_adapted(name: str) -> bool:
    return name == QUERIES or any(pattern.fullmatch(name) for pattern in (CLASSES, PROPOSALS, VECTORS))


def _in_absent(name: str, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a branch of which `others` have nothing."""
    return any(pattern.match(name) and not any(map(pattern.match, others)) for pattern in BRANCHES.values())


def _check_tensors(
    rest: Mapping[str, Tensor], state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> None:
    """Raise WeightMismatch unless both models have the tensors outside of the heads, and heads of one width."""
    faults = []
    unknown = [name for name in state if name not in own and not _is_adapted(name) and not _in_absent(name, own)]
    for name, tensor in rest.items():
        if name not in state:
            faults.append(f"no tensor {name}{_nearest(name, unknown)}")
        elif state[name].shape != tensor.shape:
            faults.append(f"{name} has shape {tuple(state[name].shape)}, this model {tuple(tensor.shape)}")
    faults += [f"unknown tensor {name}{_nearest(name, list(rest))}" for name in unknown]

    for name in filter(_is_adapted, own):
        if not _in_absent(name, state) and ".vector_" not in name and name not in state:  # statistics may be missing
            faults.append(f"no tensor {name}")
        elif name in state and state[name].shape[1:] != own[name].shape[1:]:
            faults.append(f"{name} has rows of {tuple(state[name].shape[1:])}, this model {tuple(own[name].shape[1:])}")

    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightMismatch(
            f"{source}: {'; '.join(faults[:3])}{more}. Only classes, queries and the mask codec may differ; give the "
            "model section the values of the experiment in that file"
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" (nearest: {found[0]})" if found else ""


def _adapt_classes(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], classes: Sequence[str], own_classes: Sequence[str]
) -> str:
    """Copy the rows of classes with one name; the others keep the prior that a fresh head starts from."""
    row_there = {name.casefold(): row for row, name in enumerate(classes) if name}
    pairs = [(row, row_there[name.casefold()]) for row, name in enumerate(own_classes) if name.casefold() in row_there]
    rows, there = [row for row, _ in pairs], [row for _, row in pairs]
    for name in (name for name in own if CLASSES.fullmatch(name) and name in state):
        own[name][rows] = state[name][there].to(own[name].dtype)
    for name in filter(PROPOSALS.fullmatch, own):
        common = slice(min(len(own[name]), len(state[name])))
        own[name][common] = state[name][common].to(own[name].dtype)

    copied = sorted({own_classes[row] for row in rows})
    wanted = {name.casefold() for name in own_classes}
    parts = {
        "copied by name": copied,
        "fresh": [name for name in own_classes if name and name not in copied],
        "dropped": [name for name in classes if name and name.casefold() not in wanted],
    }
    described = []
    for what, names in parts.items():
        shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        described.append(f"{len(names)} {what}" + (f" ({shown})" if names else ""))
    return f"classes  {', '.join(described)}"


def _adapt_queries(own: Tensor, trained: Tensor) -> str:
    """Cut or repeat the rows (J, 2C) of the trained queries."""
    here, there, trained = len(own), len(trained), trained.to(own)
    kept = min(here, there)
    own[:kept] = trained[:kept]
    if here <= there:
        return f"queries  {here} copied" + (f", the last {there - here} cut" if here < there else "")
    repeated = torch.arange(there, here, device=own.device) % there
    noise = torch.randn_like(own[there:]) * trained.std(dim=0, correction=0)
    own[there:] = own[repeated] + JITTER * noise
    return f"queries  {there} copied, {here - there} grown: trained ones again, with noise"


def _adapt_vectors(head: VectorMLP, state: Mapping[str, Tensor], number: int, factor: float) -> str:
    """Copy the last layer's rows of the first coefficients, times a factor, converted to the units of this head."""
    last, prefix = head.layers[2], "heads.0.vector."
    assert isinstance(last, nn.Linear)
    weight, bias = (state[f"{prefix}layers.2.{name}"].to(last.bias) for name in ("weight", "bias"))
    length = len(bias)
    center = state.get(f"{prefix}vector_center", torch.zeros(length)).to(last.bias)
    std = state.get(f"{prefix}vector_spread", torch.ones(length)).to(last.bias)

    # To plain coefficients of the new mask size, and from there to standardised ones.
    rows = slice(number)
    weight = factor * (weight * std.unsqueeze(1))[rows]
    bias = factor * (bias * std + center)[rows]
    if head.standardise:
        own_center, own_std = head.get_buffer("vector_center")[rows], head.get_buffer("vector_spread")[rows]
        weight, bias = weight / own_std.unsqueeze(1), (bias - own_center) / own_std
    last.weight[rows], last.bias[rows] = weight, bias

    scaled = factor != 1 and number
    fresh, dropped = len(last.bias) - number, length - number
    return (
        f"vectors  {number} coefficients copied"
        + (f", times {factor:g} for the other mask size" if scaled else "")
        + (f", {fresh} fresh" if fresh else "")
        + (f", {dropped} dropped" if dropped else "")
    )
