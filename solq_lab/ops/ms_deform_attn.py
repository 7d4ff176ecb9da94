"""Multi-scale deformable attention: every query samples a few points of every level and sums them up.

Paper: section 3.1 (Deformable DETR, eq. 2). For a query q and a head m the result is the sum over levels l and points
p of `weight[q, m, l, p] * value_l[m](location[q, m, l, p])`, where `value_l[m](x, y)` interpolates level l bilinearly,
zero outside the image.

`solq_lab::ms_deform_attn` is one operator with three implementations: "cuda" and "cpu" in C++ (folder `cuda/`, compiled
at the first call), and "reference" in plain torch. The compiled one of a tensor's device runs where it can be built,
elsewhere the reference; the environment variable SOLQ_OPS=reference and `use_implementation` override that.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from solq_lab.errors import UserError
from solq_lab.ops.extension import ExtensionBuildError, load_extension

logger = logging.getLogger(__name__)

COMPILED = ("cuda", "cpu")  # each for the device of its name

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MULTIPLY_ADD = 2  # FLOPs; the convention of torch's own counter


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Samples `value` at the locations and returns the weighted sums, one row of M*D channels per query.

    Under autocast the values go to the autocast type like those of a linear layer; locations and weights stay float32,
    because a half-precision coordinate misses by up to half a cell on a level of 167 columns.

    Args:
        value: (B, S, M, D) float; the tokens of all levels in one row, S = sum of H*W.
        spatial_shapes: (H, W) of each of the L levels, in tokens.
        sampling_locations: (B, Q, M, L, P, 2) float32 or float64 as (x, y), 0..1 over each level, any value beyond.
        attention_weights: (B, Q, M, L, P) float, usually a softmax over the last two axes.

    Returns:
        (B, Q, M*D), the type of `value`.

    Raises:
        ValueError: shapes, types or devices do not fit together.
        ExtensionBuildError: the implementation chosen by name cannot be built.
    """
    _check_arguments(value, spatial_shapes, sampling_locations, attention_weights)
    flat_shapes = [side for shape in spatial_shapes for side in shape]
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    return torch.ops.solq_lab.ms_deform_attn(
        value, flat_shapes, sampling_locations.to(exact), attention_weights.to(exact)
    )


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same sums in plain torch, differentiated by torch: the oracle of the other implementations.

    Args and Returns: as `ms_deform_attn`.
    """
    batch, _, heads, width = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    exact = torch.promote_types(value.dtype, sampling_locations.dtype)
    sums = value.new_zeros((batch * heads, width, queries), dtype=exact)
    maps = _level_maps(value.to(exact), spatial_shapes)
    for level, level_map in enumerate(maps):
        weights = _heads_first(attention_weights[:, :, :, level]).to(exact)  # (B*M, Q, P)
        if level_map.numel() and queries and points:
            sampled = _sample(level_map, sampling_locations[:, :, :, level].to(exact))
            sums = sums + (sampled * weights.unsqueeze(1)).sum(-1)
    return sums.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype)


def _reference_backward(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the reference for value, locations and weights; written out, as operators do not see autograd."""
    batch, queries, heads, _, points, _ = sampling_locations.shape
    width = value.shape[3]
    exact = sampling_locations.dtype
    grad_sums = grad_output.to(exact).transpose(1, 2).reshape(batch * heads, width, queries, 1)
    grad_maps, grad_locations, grad_weights = [], [], []

    for level, level_map in enumerate(_level_maps(value.to(exact), _pairs(flat_shapes))):
        locations = sampling_locations[:, :, :, level]
        weights = _heads_first(attention_weights[:, :, :, level])  # (B*M, Q, P)
        if level_map.numel() and queries and points:
            sampled = _sample(level_map, locations)
            grad_weight = (grad_sums * sampled).sum(1)
            grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad_sums * weights.unsqueeze(1), level_map, _grid(locations), 0, 0, False, [True, True]
            )
        else:
            grad_map, grad_weight = torch.zeros_like(level_map), torch.zeros_like(weights)
            grad_grid = weights.new_zeros((*weights.shape, 2))

        grad_maps.append(grad_map.flatten(2))  # (B*M, D, H*W)
        grad_weights.append(grad_weight.view(batch, heads, queries, points))
        # The grid runs from -1 to 1, twice as far as the locations.
        grad_locations.append(2 * grad_grid.view(batch, heads, queries, points, 2))

    grad_value = torch.cat(grad_maps, dim=2).view(batch, heads, width, value.shape[1]).permute(0, 3, 1, 2)
    return (
        grad_value.to(value.dtype).contiguous(),
        torch.stack(grad_locations, dim=3).transpose(1, 2).contiguous(),
        torch.stack(grad_weights, dim=3).transpose(1, 2).contiguous(),
    )


def _level_maps(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """(B, S, M, D) tokens as one map (B*M, D, H, W) per level."""
    batch, _, heads, width = value.shape
    rows = value.permute(0, 2, 3, 1).reshape(batch * heads, width, value.shape[1])
    levels = rows.split([height * columns for height, columns in spatial_shapes], dim=2)
    return [level.unflatten(2, tuple(shape)) for level, shape in zip(levels, spatial_shapes, strict=True)]


def _heads_first(level: Tensor) -> Tensor:
    """(B, Q, M, ...) to (B*M, Q, ...)."""
    return level.transpose(1, 2).flatten(0, 1)


def _grid(locations: Tensor) -> Tensor:
    """Locations (B, Q, M, P, 2) in 0..1 as the grid (B*M, Q, P, 2) in -1..1 of `grid_sample`."""
    return _heads_first(2 * locations - 1)


def _sample(level_map: Tensor, locations: Tensor) -> Tensor:
    """Bilinear samples (B*M, D, Q, P) of a map (B*M, D, H, W) at the locations (B, Q, M, P, 2)."""
    return F.grid_sample(level_map, _grid(locations), mode="bilinear", padding_mode="zeros", align_corners=False)


def _check_arguments(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must be (B, S, M, D), got {tuple(value.shape)}")
    if isinstance(spatial_shapes, Tensor) or any(len(shape) != 2 or min(shape) < 0 for shape in spatial_shapes):
        raise ValueError(
            f"spatial_shapes must be a sequence of (height, width) pairs of integers, got {spatial_shapes!r}"
        )
    if len(spatial_shapes) == 0:
        raise ValueError("spatial_shapes is empty, deformable attention needs at least one level")
    tokens = sum(height * width for height, width in spatial_shapes)
    if tokens != value.shape[1]:
        raise ValueError(f"spatial_shapes {list(spatial_shapes)} hold {tokens} tokens, value has {value.shape[1]}")

    batch, _, heads, _ = value.shape
    found = tuple(sampling_locations.shape)
    if len(found) != 6 or (found[0], found[2], found[3], found[5]) != (batch, heads, len(spatial_shapes), 2):
        raise ValueError(
            f"sampling_locations must be (B={batch}, Q, M={heads}, L={len(spatial_shapes)}, P, 2) "
            f"for value {tuple(value.shape)}, got {found}"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must be {found[:-1]} like the locations, got {tuple(attention_weights.shape)}"
        )

    for name, tensor in (("value", value), ("attention_weights", attention_weights)):
        if tensor.dtype not in FLOATING:
            raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if sampling_locations.dtype not in FLOATING[:2]:
        raise ValueError(
            f"sampling_locations must be float32 or float64, got {sampling_locations.dtype}, whose spacing near 1 is "
            "up to half a cell; compute the locations in float32"
        )
    if not value.device == sampling_locations.device == attention_weights.device:
        raise ValueError(
            f"value is on {value.device}, sampling_locations on {sampling_locations.device}, "
            f"attention_weights on {attention_weights.device}; all must share one device"
        )


# Dispatch.


class _Implementation(NamedTuple):
    """Both directions, with the arguments of the operators below."""

    name: str
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_forced: str | None = None  # process-wide, as backward passes run in threads of their own


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Within the context, every call of this process runs "cuda", "cpu" or "reference", or fails.

    Raises:
        ValueError: no such implementation.
        ExtensionBuildError: it cannot be built here.
    """
    global _forced
    _by_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def implementations() -> tuple[str, ...]:
    """Names of the implementations that work on this machine; builds what was not built yet."""
    working = []
    for name in (*COMPILED, "reference"):
        if name != "cuda" or torch.cuda.is_available():
            with suppress(ExtensionBuildError):
                working.append(_by_name(name).name)
    return tuple(working)


def implementation_for(device_type: str) -> str:
    """Name of the implementation that runs for tensors on "cpu", "cuda", ... now."""
    return _implementation(device_type).name


def _implementation(device_type: str) -> _Implementation:
    if _forced is None:
        return _automatic(device_type)
    if _forced in COMPILED and _forced != device_type:
        raise ValueError(f"implementation {_forced!r} was chosen by name, but the tensors are on {device_type!r}")
    return _by_name(_forced)


@functools.cache
def _automatic(device_type: str) -> _Implementation:
    wanted = os.environ.get("SOLQ_OPS", "")
    if wanted not in ("", "reference"):
        raise UserError(f"SOLQ_OPS={wanted!r} is unknown; set it to 'reference' for plain torch, or unset it")
    if wanted == "reference":
        logger.info("deformable attention on %s: plain torch, because SOLQ_OPS=reference", device_type)
    elif device_type in COMPILED:
        try:
            return _by_name(device_type)
        except ExtensionBuildError as error:
            logger.warning("deformable attention on %s runs in plain torch, slower: %s", device_type, error.reason)
    return _by_name("reference")


@functools.cache
def _by_name(name: str) -> _Implementation:
    if name == "reference":
        return _Implementation(name, _reference_forward, _reference_backward)
    if name not in COMPILED:
        raise ValueError(
            f"no implementation {name!r} of deformable attention; there are {', '.join(COMPILED)}, reference"
        )
    load_extension("cuda" if name == "cuda" else "cpu")
    operators = torch.ops.solq_lab
    forward, backward = f"ms_deform_attn_{name}", f"ms_deform_attn_backward_{name}"
    return _Implementation(name, getattr(operators, forward).default, getattr(operators, backward).default)


def _reference_forward(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_reference(value, _pairs(flat_shapes), locations, weights).contiguous()


# The operator. Its arguments are those of `ms_deform_attn` with the level shapes in one row (H0, W0, H1, W1, ...), so
# that a compiler may hold them as symbols; locations and weights are float64 for float64 values and float32 otherwise.

torch.library.define(
    "solq_lab::ms_deform_attn",
    "(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "solq_lab::ms_deform_attn_backward",
    "(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
    " -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _pairs(flat_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat_shapes[::2], flat_shapes[1::2], strict=True))


@torch.library.impl("solq_lab::ms_deform_attn", "default")
def _forward(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return _implementation(value.device.type).forward(value, flat_shapes, locations, weights)


@torch.library.impl("solq_lab::ms_deform_attn_backward", "default")
def _backward(
    grad_output: Tensor, value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(value.device.type).backward(grad_output, value, flat_shapes, locations, weights)


@torch.library.register_fake("solq_lab::ms_deform_attn")
def _forward_fake(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    return value.new_empty((batch, locations.shape[1], heads * width))


@torch.library.register_fake("solq_lab::ms_deform_attn_backward")
def _backward_fake(
    grad_output: Tensor, value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.flat_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.solq_lab.ms_deform_attn_backward(
        grad_output, value, ctx.flat_shapes, locations, weights
    )
    return grad_value, None, grad_locations, grad_weights


torch.library.register_autograd("solq_lab::ms_deform_attn", _differentiate, setup_context=_save_for_backward)


def _autocast_rule(device_type: str) -> None:
    """Registers: values in the autocast type, locations and weights untouched."""

    def cast_values(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
        with torch.autocast(device_type, enabled=False):
            return torch.ops.solq_lab.ms_deform_attn(value, flat_shapes, locations, weights)

    torch.library.impl("solq_lab::ms_deform_attn", f"Autocast{device_type.upper()}")(cast_values)


_autocast_rule("cpu")
_autocast_rule("cuda")


@register_flop_formula(torch.ops.solq_lab.ms_deform_attn)
def _forward_flops(value: Any, shapes: Any, locations: Any, weights: Any, **_: Any) -> int:
    """Four corners of every sample, each one multiply-add per channel."""
    return 4 * MULTIPLY_ADD * math.prod(weights) * value[3]


@register_flop_formula(torch.ops.solq_lab.ms_deform_attn_backward)
def _backward_flops(grad_output: Any, value: Any, shapes: Any, locations: Any, weights: Any, **_: Any) -> int:
    """Four corners of every sample: one multiply-add per channel to read it, one to write its gradient."""
    return 8 * MULTIPLY_ADD * math.prod(weights) * value[3]
