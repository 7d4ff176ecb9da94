"""Names of the weights in the released implementation, and ours.

One table per architecture, in the released order, serves both directions. Released files hold some tensors under
several names: the mask-vector head once per layer, the box heads once more inside the decoder, and without box
refinement every head once per layer. Here each such name points to the one that we keep. In a released detector with a
mask branch (SQR) the detector's names begin with `detr.`; the tables are without it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from solq_lab.errors import UserError
from solq_lab.models.hugging_face import is_hugging_face, to_released_names

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
SWIN_BLOCKS = {"swin_t": (2, 2, 6, 2), "swin_s": (2, 2, 18, 2), "swin_b": (2, 2, 18, 2), "swin_l": (2, 2, 18, 2)}
SWIN_WIDTHS = {"swin_t": 96, "swin_s": 96, "swin_b": 128, "swin_l": 192}
SWIN_INDEX = "relative_position_index"  # stored by the released Swin, computed by ours
DEFAULT_HEADS = 8  # all released models; tensor shapes do not determine it
WEIGHT_BIAS = ("weight", "bias")
BODY = "backbone.0.body."
DETECTOR = "detr."  # before a released detector's names where it has a mask branch
MASK_BRANCH = ("bbox_attention.", "mask_head.", "seg_input_proj.")  # how the released names of the branch itself begin


class WeightMismatch(UserError):
    """Weights that do not fit: the message names the file, the tensor, found and expected shapes, and the cure."""


class Layout(NamedTuple):
    """The choices that decide which tensors a model has, not their sizes.

    `backbone` is a name, `vectors` whether it is SOLQ, `mask_branch` whether it is SQR; plain detectors are neither.
    """

    backbone: str
    levels: int
    encoder_layers: int
    decoder_layers: int
    refine_boxes: bool
    two_stage: bool
    vectors: bool
    mask_branch: bool = False


def released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under released names: without the prefixes of wrappers, and translated from Hugging Face's names.

    Wrappers are parallel training (`module.`) and the mask branch (`detr.`).
    """
    if is_hugging_face(state):
        return to_released_names(state)
    return {name.removeprefix("module.").removeprefix(DETECTOR): tensor for name, tensor in state.items()}


def with_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `released_names`: with a mask branch the released detector is a submodule named `detr`."""
    if not any(name.startswith(MASK_BRANCH) for name in state):
        return dict(state)
    return {name if name.startswith(MASK_BRANCH) else DETECTOR + name: tensor for name, tensor in state.items()}


def is_official(names: Iterable[str]) -> bool:
    """Whether these are released names of a whole detector, prefixes stripped."""
    return "transformer.level_embed" in names


def official_layout(state: Mapping[str, Tensor], *, source: str = "state dict") -> Layout:
    """The layout of a state dict in released naming, prefixes stripped.

    Raises:
        WeightMismatch: it is not a detector of this family.
    """
    if not is_official(state):
        raise WeightMismatch(
            f"{source}: no tensor transformer.level_embed (found {_some(state)}); allowed are released SOLQ and "
            "Deformable DETR checkpoints, and Hugging Face's"
        )

    decoder_layers = _count(state, r"transformer\.decoder\.layers\.(\d+)\.")
    two_stage = "transformer.enc_output.weight" in state
    return Layout(
        backbone=_backbone_name(state, source),
        levels=state["transformer.level_embed"].shape[0],
        encoder_layers=_count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=decoder_layers,
        refine_boxes=two_stage
        or "transformer.decoder.bbox_embed.0.layers.0.weight" in state
        or _differ(state, [f"bbox_embed.{layer}.layers.2.bias" for layer in range(decoder_layers)]),
        two_stage=two_stage,
        vectors=any(name.startswith("vector_embed.") for name in state),
        mask_branch=any(name.startswith(MASK_BRANCH) for name in state),
    )


def own_layout(state: Mapping[str, Tensor], *, source: str = "state dict") -> Layout:
    """The layout of a state dict in our naming.

    A model with a single decoder layer counts as refining its boxes.

    Raises:
        WeightMismatch: it is not one of our models, or its backbone has no released counterpart.
    """
    if "level_embedding" not in state:
        raise WeightMismatch(f"{source}: no tensor level_embedding (found {_some(state)}); allowed are SOLQ weights")

    decoder_layers = _count(state, r"decoder\.(\d+)\.")
    two_stage = "proposal_projection.weight" in state
    if (two_stage and "query_embedding" in state) or any(".look." in name or name == "mask_decoder" for name in state):
        raise WeightMismatch(
            f"{source}: model.mixed_queries, model.mask_look and codec.learn_decoder have no released counterpart; "
            "give weights trained without them"
        )
    backbone = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    released = {BODY + name.removeprefix("backbone."): tensor for name, tensor in backbone.items()}
    biases = [f"heads.{layer}.box.layers.2.bias" for layer in range(decoder_layers)]
    return Layout(
        backbone=_backbone_name(released, source),
        levels=state["level_embedding"].shape[0],
        encoder_layers=_count(state, r"encoder\.(\d+)\."),
        decoder_layers=decoder_layers,
        refine_boxes=two_stage or decoder_layers == 1 or _differ(state, biases),
        two_stage=two_stage,
        vectors="heads.0.vector.layers.0.weight" in state,
        mask_branch=any(name.startswith("mask_branch.") for name in state),
    )


def name_table(layout: Layout) -> list[tuple[str, str | None]]:
    """(released name, our name) of every tensor, in the released order; None where ours is computed, not stored."""
    return [*_detector_names(layout), *(_mask_branch_names() if layout.mask_branch else ())]


def own_aliases(layout: Layout) -> dict[str, str]:
    """Our names of shared tensors -> the one of them that `name_table` uses."""
    aliases: dict[str, str] = {}
    for layer in range(1, layout.decoder_layers):
        if layout.vectors:
            aliases |= {f"heads.{layer}.vector.{name}": f"heads.0.vector.{name}" for name in _MLP}
        if not layout.refine_boxes:
            aliases |= {
                f"heads.{layer}.{name}": f"heads.0.{name}"
                for name in (*_linears("classify"), *(f"box.{part}" for part in _MLP))
            }
    return aliases


def infer_architecture(
    state: Mapping[str, Tensor], args: Mapping[str, Any] | None = None, *, source: str = "state dict"
) -> dict[str, dict[str, Any]]:
    """The sections `model`, `codec` and `data` of the experiment that fits a state dict in released naming.

    Tensor shapes determine nearly everything. What they leave open (heads, dilation, activation, mask size, the query
    count of a two-stage model) is taken from `args`, the released configuration that checkpoints carry; without it
    heads are the released 8 and the rest is left to the schema's defaults.

    Raises:
        WeightMismatch: it is not a detector of this family, a tensor is missing, or a size does not divide by heads and
            levels.
    """
    state, args = released_names(state), args or {}
    layout = official_layout(state, source=source)
    table = [(name, own) for name, own in name_table(layout) if own is not None]
    found = {own: state[name] for name, own in table if name in state}
    absent = next((name for name, own in table if own not in found), None)
    if absent is not None:
        raise WeightMismatch(
            f"{source}: no tensor {absent}, which a model with its other tensors has; is the file whole?"
        )

    heads = args.get("nheads", DEFAULT_HEADS)
    model: dict[str, Any] = {
        "backbone": layout.backbone,
        "pretrained": "none",
        "levels": layout.levels,
        "width": found["level_embedding"].shape[1],
        "heads": heads,
        "encoder_layers": layout.encoder_layers,
        "decoder_layers": layout.decoder_layers,
        "decoder_points": _points(found, "decoder.0.cross_attention", heads, layout.levels, source),
        "feedforward": found["decoder.0.feedforward.linear1.bias"].shape[0],
        "refine_boxes": layout.refine_boxes,
        "two_stage": layout.two_stage,
    }
    if layout.encoder_layers:
        model["encoder_points"] = _points(found, "encoder.0.attention", heads, layout.levels, source)
    if layout.vectors:
        model["vector_hidden"] = found["heads.0.vector.layers.0.bias"].shape[0]
    if not layout.two_stage:
        model["queries"] = found["query_embedding"].shape[0]
    elif "num_queries" in args:
        model["queries"] = args["num_queries"]
    for key in ("dilation", "activation", "dropout"):
        if key in args:
            model[key] = args[key]
    if layout.mask_branch:
        model["mask_branch"] = "sqr"

    codec: dict[str, Any] = {"kind": "none"}
    if layout.vectors:
        codec = {"kind": "dct", "vector_dim": found["heads.0.vector.layers.2.bias"].shape[0]}
        if "gt_mask_len" in args:
            codec["mask_size"] = args["gt_mask_len"]
    # The released code uses COCO's category id as the class channel.
    data = {"class_ids": "raw", "num_classes": found["heads.0.classify.bias"].shape[0]}
    return {"model": model, "codec": codec, "data": data}


def swin_position_index(window: int) -> Tensor:
    """Row of a Swin's bias table for each pair of cells in a window: (window^2, window^2) int64."""
    cell = torch.arange(window**2)
    y, x = cell // window, cell % window
    rows = (y.unsqueeze(1) - y + window - 1) * (2 * window - 1)
    return rows + (x.unsqueeze(1) - x + window - 1)


def own_swin_name(name: str) -> str:
    """Our name of a tensor in the released Swin, without `backbone` prefixes.

    A stage's down-sampling closes the stage before it there, and opens the stage after it here and in timm.
    """
    name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.", name)
    return re.sub(r"^norm([123])\.", r"norms.\1.", name)


def _detector_names(layout: Layout) -> Iterator[tuple[str, str | None]]:
    yield "transformer.level_embed", "level_embedding"
    for stack, count, parts in (
        ("encoder", layout.encoder_layers, _ENCODER_LAYER),
        ("decoder", layout.decoder_layers, _DECODER_LAYER),
    ):
        for layer in range(count):
            yield from ((f"transformer.{stack}.layers.{layer}.{name}", f"{stack}.{layer}.{own}") for name, own in parts)

    # Our head module behind each number of the released lists `class_embed` and `bbox_embed`.
    heads = [f"heads.{layer if layout.refine_boxes else 0}" for layer in range(layout.decoder_layers)]
    heads += ["proposal_head"] if layout.two_stage else []
    classes: list[tuple[str, str]] = []
    boxes: list[tuple[str, str]] = []
    for number, head in enumerate(heads):
        classes += _pairs(f"class_embed.{number}.", f"{head}.classify.", WEIGHT_BIAS)
        boxes += _pairs(f"bbox_embed.{number}.", f"{head}.box.", _MLP)

    # The decoder's copies of the heads, then the heads themselves.
    if layout.refine_boxes:
        yield from ((f"transformer.decoder.{name}", own) for name, own in boxes)
    if layout.two_stage:
        yield from ((f"transformer.decoder.{name}", own) for name, own in classes)
        for official, own in _TWO_STAGE.items():
            yield from _pairs(f"transformer.{official}.", f"{own}.", WEIGHT_BIAS)
    else:
        yield from _pairs("transformer.reference_points.", "reference_points.", WEIGHT_BIAS)
    yield from classes
    yield from boxes
    if layout.vectors:
        for number in range(len(heads)):
            yield from _pairs(f"vector_embed.{number}.", "heads.0.vector.", _MLP)

    if not layout.two_stage:
        yield "query_embed.weight", "query_embedding"
    for level in range(layout.levels):
        yield from _pairs(f"input_proj.{level}.", f"projections.{level}.", _linears("0", "1"))
    if layout.backbone in RESNET_BLOCKS:
        yield from _pairs(BODY, "backbone.", _resnet_names(layout.backbone))
    else:
        for name in _swin_names(SWIN_BLOCKS[layout.backbone], norms=(3,) if layout.levels == 1 else (1, 2, 3)):
            yield BODY + name, None if name.endswith(SWIN_INDEX) else f"backbone.{own_swin_name(name)}"


def _mask_branch_names() -> Iterator[tuple[str, str]]:
    names = {"bbox_attention.q_linear": "attention.query", "bbox_attention.k_linear": "attention.key"}
    for block in range(5):
        names |= {f"mask_head.lay{block + 1}": f"blocks.{block}.0", f"mask_head.gn{block + 1}": f"blocks.{block}.1"}
    names["mask_head.out_lay"] = "answer"
    names |= {f"mask_head.adapter{number + 1}": f"adapters.{number}" for number in range(3)}
    names |= {f"seg_input_proj.{number}": f"pyramid.{number}" for number in range(3)}
    for official, own in names.items():
        yield from _pairs(f"{official}.", f"mask_branch.{own}.", WEIGHT_BIAS)


def _pairs(official: str, own: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((official + name, own + name) for name in names)


def _linears(*modules: str) -> list[str]:
    return [f"{module}.{part}" for module in modules for part in WEIGHT_BIAS]


_TWO_STAGE = {
    "enc_output": "proposal_projection",
    "enc_output_norm": "proposal_norm",
    "pos_trans": "query_projection",
    "pos_trans_norm": "query_norm",
}
_MLP = _linears("layers.0", "layers.1", "layers.2")
_DEFORMABLE = _linears("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_ENCODER_LAYER = [
    *_pairs("self_attn.", "attention.", _DEFORMABLE),
    *_pairs("norm1.", "attention_norm.", WEIGHT_BIAS),
    *_pairs("", "feedforward.", _linears("linear1", "linear2")),
    *_pairs("norm2.", "feedforward.norm.", WEIGHT_BIAS),
]
_DECODER_LAYER = [
    *_pairs("cross_attn.", "cross_attention.", _DEFORMABLE),
    *_pairs("norm1.", "cross_norm.", WEIGHT_BIAS),
    *_pairs("self_attn.", "self_attention.", ["in_proj_weight", "in_proj_bias", *_linears("out_proj")]),
    *_pairs("norm2.", "self_norm.", WEIGHT_BIAS),
    *_pairs("", "feedforward.", _linears("linear1", "linear2")),
    *_pairs("norm3.", "feedforward.norm.", WEIGHT_BIAS),
]


def _resnet_names(name: str) -> list[str]:
    """torchvision's names without the classifier's; frozen batch norms count no batches."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    return [name for name in state if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")]


def _swin_names(blocks: tuple[int, ...], norms: tuple[int, ...]) -> Iterator[str]:
    yield from _linears("patch_embed.proj", "patch_embed.norm")
    for stage, count in enumerate(blocks):
        for block in range(count):
            prefix = f"layers.{stage}.blocks.{block}."
            index = [f"attn.{name}" for name in ("relative_position_bias_table", SWIN_INDEX)]
            after = _linears("attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            yield from (prefix + name for name in (*_linears("norm1"), *index, *after))
        if stage + 1 < len(blocks):
            yield f"layers.{stage}.downsample.reduction.weight"
            yield from _linears(f"layers.{stage}.downsample.norm")
    yield from _linears(*(f"norm{stage}" for stage in norms))


def _backbone_name(state: Mapping[str, Tensor], source: str) -> str:
    if f"{BODY}layer1.0.conv3.weight" in state:
        blocks = tuple(_count(state, rf"{re.escape(BODY)}layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        known = {blocks: name for name, blocks in RESNET_BLOCKS.items()}
        if blocks in known:
            return known[blocks]
    elif f"{BODY}patch_embed.proj.bias" in state:
        width = state[f"{BODY}patch_embed.proj.bias"].shape[0]
        blocks = tuple(_count(state, rf"{re.escape(BODY)}layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
        for name in SWIN_BLOCKS:
            if (SWIN_WIDTHS[name], SWIN_BLOCKS[name]) == (width, blocks):
                return name
    raise WeightMismatch(
        f"{source}: its backbone has no released name; allowed are {', '.join([*RESNET_BLOCKS, *SWIN_BLOCKS])}"
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Number of different values of the pattern's group among the names it opens."""
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _differ(state: Mapping[str, Tensor], names: list[str]) -> bool:
    present = [state[name] for name in names if name in state]
    return any(not torch.equal(present[0], other) for other in present[1:])


def _points(state: Mapping[str, Tensor], attention: str, heads: int, levels: int, source: str) -> int:
    """P of a deformable attention in our naming, from the rows of its weights: one per head, level and point."""
    rows = state[f"{attention}.attention_weights.bias"].shape[0]
    if rows % (heads * levels):
        raise WeightMismatch(
            f"{source}: {attention} has {rows} attention weights, not a multiple of {heads} heads x {levels} levels; "
            "the model has another number of heads, which tensors do not determine (`nheads` in the checkpoint's args)"
        )
    return rows // (heads * levels)


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) or "nothing"
