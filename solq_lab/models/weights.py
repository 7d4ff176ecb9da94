"""Weight files: ours (safetensors), the released ones (.pth), and their conversion. No file's code is ever executed."""

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from solq_lab.files import replacing
from solq_lab.models.hugging_face import FILES, is_hugging_face, read_settings
from solq_lab.models.official import (
    BODY,
    WeightMismatch,
    is_official,
    name_table,
    official_layout,
    own_aliases,
    own_layout,
    own_swin_name,
    released_names,
    swin_position_index,
    with_prefixes,
)
from solq_lab.models.pickled import load_pickle

log = logging.getLogger(__name__)

SWIN_WINDOW = 7
LEARNED_DECODER = "mask_decoder"  # of a network; its codec decodes with it
CODEC = "codec."  # prefix of the mask codec's tables in a file; no network has such a part


class WeightFile(NamedTuple):
    """Content of a weights file of ours."""

    state: dict[str, Tensor]  # tensors by our names; shared tensors stand under each of their names
    experiment: str | None  # the experiment as YAML, or None
    classes: str | None  # the class map as JSON, or None
    # tables of the mask codec that the network was trained with, by name; empty where they follow from its sizes
    codec: dict[str, Tensor]


class OfficialFile(NamedTuple):
    """The parts of a released checkpoint that are used."""

    state: dict[str, Tensor]  # tensors by released names, without the prefixes that wrappers add
    args: dict[str, Any]  # the configuration stored in the checkpoint, empty where there is none


class ImportReport(NamedTuple):
    """Tensors of a file by their use."""

    # sections of the fitting experiment (`infer_architecture`); empty where nothing was inferred
    architecture: dict[str, dict[str, Any]]
    used: tuple[str, ...]  # tensors that were taken
    missing: tuple[str, ...]  # tensors of the model that the file has no fitting one for; they stay as they were
    left_over: tuple[str, ...]  # tensors of the file that the model does not have, or has in another shape

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used, {len(self.missing)} missing, {len(self.left_over)} left over"]
        lines += [f"  missing    {name}" for name in self.missing]
        lines += [f"  left over  {name}" for name in self.left_over]
        return "\n".join(lines)


def save_weights(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    experiment: str,
    classes: str,
    codec: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights to a safetensors file, all or nothing, and on the disk at the end.

    Args:
        path: the file; its folder exists.
        state: a model's state dict. A tensor that it holds under several names is stored once.
        experiment: the experiment as YAML.
        classes: the class map as JSON.
        codec: the mask codec's state dict: a fitted codec's tables belong to the network that learnt its vectors.
    """
    state = {**state, **{CODEC + name: table for name, table in (codec or {}).items()}}

    # A tensor is stored under its first name; safetensors would store views of one memory several times.
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        first = first_name.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        if first != name and tensor.numel():
            shared[name] = first
        else:
            stored[name] = tensor.detach().cpu().contiguous()

    metadata = {"experiment": experiment, "classes": classes, "shared": json.dumps(shared)}
    with replacing(Path(path)) as temporary:
        save_file(stored, temporary, metadata)


def read_weights(path: Path) -> WeightFile:
    """A weights file of ours, on the CPU.

    Raises:
        WeightMismatch: no such file, or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError:
        raise WeightMismatch(f"{path}: no such weights file or run folder") from None
    except (SafetensorError, OSError) as error:
        raise WeightMismatch(
            f"{path}: not a safetensors file ({error}); released .pth files have to be imported first: "
            "solq-lab import-weights"
        ) from None

    # Tensors of several names are stored once; the header names the others.
    try:
        state |= {name: state[first] for name, first in json.loads(metadata.get("shared", "{}")).items()}
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        raise WeightMismatch(
            f"{path}: its header names shared tensors that are not there ({metadata['shared'][:80]!r}); the file is "
            "damaged or not of this program; copy or export it again"
        ) from None

    codec = {name.removeprefix(CODEC): state.pop(name) for name in list(state) if name.startswith(CODEC)}
    codec |= {name: state[name] for name in state.keys() & {LEARNED_DECODER}}
    return WeightFile(state, metadata.get("experiment"), metadata.get("classes"), codec)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load a state dict in our naming; every name and shape has to fit. `source` names the file in messages.

    Raises:
        WeightMismatch: a tensor is missing, superfluous or of another shape.
    """
    own = model.state_dict()
    cure = "build the model from the experiment stored beside the weights, or give other weights"
    for name, tensor in own.items():
        if name not in state:
            raise WeightMismatch(f"{source}: no tensor {name}, the model expects one of shape {_shape(tensor)}; {cure}")
        found, expected = _shape(state[name]), _shape(tensor)
        if found != expected:
            raise WeightMismatch(f"{source}: {name} has shape {found}, the model expects {expected}; {cure}")
    superfluous = [name for name in state if name not in own]
    if superfluous:
        raise WeightMismatch(f"{source}: the model has no tensor {superfluous[0]} ({len(superfluous)} such); {cure}")
    model.load_state_dict(state)


def read_official(path: Path) -> OfficialFile:
    """A released checkpoint, on the CPU: `{"model": ..., "args": ...}`, or a state dict alone; .pth or safetensors.

    A Deformable DETR of Hugging Face is read too: its file, or the folder that `save_pretrained` wrote.

    Raises:
        WeightMismatch: no such file, not a checkpoint, or one with code in it.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
    if path.suffix == ".safetensors":
        tensors, args = read_weights(path).state, None
    else:
        content = load_pickle(path)
        checkpoint = content if isinstance(content, dict) else {}
        named = checkpoint.get("model", checkpoint.get("state_dict", checkpoint))
        entries = named.items() if isinstance(named, dict) else ()
        tensors = {name: value for name, value in entries if isinstance(value, Tensor)}
        args = checkpoint.get("args")

    if not tensors:
        raise WeightMismatch(f"{path}: holds no tensors by name; allowed are state dicts and {{'model': state dict}}")
    known = vars(args) if isinstance(args, argparse.Namespace) else {}
    if is_hugging_face(tensors):
        known = read_settings(path.with_name("config.json"))
    return OfficialFile(released_names(tensors), known)


def translate_official_state(
    state: Mapping[str, Tensor], *, source: str = "state dict"
) -> tuple[dict[str, Tensor], ImportReport]:
    """A state dict in our naming from one in released naming, and the use of its tensors; shared ones stay shared.

    Raises:
        WeightMismatch: not a detector of this family, a tensor is missing, or two names of one tensor disagree.
    """
    own, report = _translate(released_names(state), source)
    if report.missing:
        raise WeightMismatch(
            f"{source}: {len(report.missing)} tensors are missing, the first is {report.missing[0]}; is the file "
            "whole? To start a training from part of it, name it as model.pretrained"
        )
    return own, report


def to_official_state(
    state: Mapping[str, Tensor], *, refine_boxes: bool | None = None, source: str = "state dict"
) -> dict[str, Tensor]:
    """A state dict in released naming, in the released order, from one in ours.

    A standardising vector head has no released counterpart; its mean and std are folded into its last layer.

    Args:
        state: a state dict in our naming.
        refine_boxes: whether the model refines boxes. None: its heads differ from layer to layer, or it has one layer.
        source: name of the state in messages.

    Raises:
        WeightMismatch: not one of our models, or its backbone has no released counterpart.
    """
    state = _without_standardising(state)
    layout = own_layout(state, source=source)
    if refine_boxes is not None:
        layout = layout._replace(refine_boxes=refine_boxes)
    table = name_table(layout)
    absent = [own for _, own in table if own is not None and own not in state]
    if absent:
        raise WeightMismatch(
            f"{source}: {len(absent)} tensors are missing, the first is {absent[0]}; is the file whole?"
        )
    index = swin_position_index(SWIN_WINDOW)
    return with_prefixes({official: index if own is None else state[own] for official, own in table})


def export_official(source: Path, destination: Path) -> None:
    """Turn a weights file of ours into a released checkpoint, `{"model": state dict}`.

    Raises:
        WeightMismatch: the file cannot be used, or its model has no released counterpart.
    """
    state = to_official_state(read_weights(source).state, source=str(source))
    with replacing(Path(destination)) as temporary:
        torch.save({"model": state}, temporary)


def initialise(model: nn.Module, path: Path) -> ImportReport:
    """Start a model from a file that need not fit: tensors of the same name and shape are copied, the rest stays fresh.

    Args:
        model: changed in place.
        path: weights of ours, or a released SOLQ or Deformable DETR checkpoint (`read_official`).

    Raises:
        WeightMismatch: the file cannot be read, or nothing in it fits.
    """
    path = Path(path)
    state = read_official(path).state
    left_over: list[str] = []
    if is_official(state):
        state, translated = _translate(state, str(path))
        left_over += translated.left_over

    own = model.state_dict()
    if "heads.0.vector.vector_center" not in own:
        state = _without_standardising(state)
    fitting = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not fitting:
        shown = ", ".join(list(state)[:3])
        raise WeightMismatch(f"{path}: none of its tensors fits this model (it holds {shown}, ...)")

    model.load_state_dict(fitting, strict=False)
    missing = tuple(name for name in own if name not in fitting)
    left_over += [f"{name} {_shape(tensor)}" for name, tensor in state.items() if name not in fitting]
    report = ImportReport({}, tuple(fitting), missing, tuple(left_over))
    log.info("%s: %s", path, report)
    return report


def read_backbone_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict for a backbone from a classifier's or a detector's file.

    Args:
        path: safetensors or .pth; names of torchvision, timm, the released Swin, or of a detector.
        own: the backbone's state dict; norms of the returned maps, which no classifier has, keep their values, and a
            network of timm is its part `body`.

    Raises:
        WeightMismatch: the file cannot be read, or a tensor is missing or of another shape.
    """
    state = read_official(path).state
    # A detector's file holds the backbone under a prefix, the released Swin has other names, and timm no `body`.
    for prefix in (BODY, "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "layers.0.downsample.reduction.weight" in state:
        state = {own_swin_name(name): tensor for name, tensor in state.items()}

    if any(name.startswith("body.") for name in own):
        state = {name if name.startswith("body.") else f"body.{name}": tensor for name, tensor in state.items()}

    for name, tensor in own.items():
        if name not in state and name.startswith("norms."):
            continue
        found = _shape(state[name]) if name in state else "no such tensor"
        if found != _shape(tensor):
            raise WeightMismatch(
                f"{path}: {name}: found {found}, the backbone expects {_shape(tensor)}; name a file of this very "
                "backbone as model.pretrained"
            )
    return {name: state.get(name, tensor) for name, tensor in own.items()}


def _translate(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], ImportReport]:
    """Our names for a state dict in released naming, and what became of its tensors."""
    layout = official_layout(state, source=source)
    # Several released names may share one of ours; their values have to be equal.
    own: dict[str, Tensor] = {}
    taken_from: dict[str, str] = {}
    table = name_table(layout)
    for official, name in table:
        if official not in state or name is None:
            continue
        first = taken_from.setdefault(name, official)
        own.setdefault(name, state[official])
        if state[official] is not own[name] and not torch.equal(state[official], own[name]):
            raise WeightMismatch(
                f"{source}: {first} and {official} are two names of one tensor, but their values differ; "
                "the file is damaged, or was trained with code that does not share them"
            )

    missing = tuple(official for official, name in table if name is not None and name not in own)
    known = {official for official, _ in table}
    for alias, name in own_aliases(layout).items():
        if name in own:
            own[alias] = own[name]
    used, left_over = (tuple(name for name in state if (name in known) == wanted) for wanted in (True, False))
    return own, ImportReport({}, used, missing, left_over)


def _without_standardising(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a head that predicts plain coefficients: mean and std are folded into its last layer."""
    mean, std = (state.get(f"heads.0.vector.vector_{name}") for name in ("center", "spread"))
    if mean is None or std is None:
        return dict(state)
    plain = {name: tensor for name, tensor in state.items() if ".vector.vector_" not in name}
    last = "heads.0.vector.layers.2."
    folded = {"weight": plain[f"{last}weight"] * std.unsqueeze(1), "bias": plain[f"{last}bias"] * std + mean}
    return {
        name: folded[name.rpartition(".")[2]] if ".vector.layers.2." in name else tensor
        for name, tensor in plain.items()
    }


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
