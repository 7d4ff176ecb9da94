"""One object's way through a codec and back, and what is left of it. Paper: section 3.2."""

from typing import Literal, NamedTuple

import torch
from faster_coco_eval.core import mask as rle_api
from torch import Tensor

from solq_lab.codecs.base import MaskCodec, middle_of_range
from solq_lab.codecs.reconstruct import paste_and_compare
from solq_lab.codecs.sparse import SparseCodingCodec
from solq_lab.masks import rle_iou
from solq_lab.viz.widgets.objects import BoxedObject

Rule = Literal["codec", "middle", "half", "best"]
RULES: dict[str, Rule] = {
    "the codec's own": "codec",
    "middle of the range": "middle",
    "one half": "half",
    "best for this object": "best",
}


class Reconstruction(NamedTuple):
    """What became of a mask."""

    target: Tensor  # (N, N) bool, the mask in its box
    vector: Tensor  # (D,) its mask vector
    received: Tensor  # (D,) what is decoded: after noise and rounding, zero where terms are left out
    decoded: Tensor  # (N, N) float32
    threshold: float  # values above it belong to the mask
    binary: Tensor  # (N, N) bool
    rle: dict  # `binary` pasted into the box, in pixels of the image
    # iou, boundary_iou: with the true mask in the image, 0 where both are empty
    iou: float
    boundary_iou: float


@torch.inference_mode()
def reconstruct(
    item: BoxedObject,
    target: Tensor,
    vector: Tensor,
    codec: MaskCodec,
    *,
    terms: int | None = None,
    rule: Rule = "codec",
    error: Tensor | None = None,
    step: float = 0.0,
    boundary_ratio: float = 0.02,
) -> Reconstruction:
    """Decode an object's vector, make it binary and paste it.

    Args:
        item: the object.
        target: (N, N) its mask in the box.
        vector: (D,) its mask vector.
        codec: the codec.
        terms: how many entries of the vector are kept, the rest is zero: the first ones, or the largest ones of a
            sparse vector, whose atoms have no order. None: all.
        rule: the threshold.
        error: (D,) what is added to the vector; None: nothing.
        step: then every entry is rounded to a multiple of this; 0: none is.
        boundary_ratio: boundary width over the image's diagonal.
    """
    received = vector if error is None else vector + error
    if step > 0:
        received = (received / step).round() * step
    if terms is not None and terms < len(vector):
        received = received.clone()
        received[term_order(codec, vector)[terms:]] = 0

    decoded = codec.decode(received[None])
    threshold = thresholds(decoded, target[None], codec, rule)
    binary = decoded > threshold[:, None, None]
    (rle,), (iou,) = paste_and_compare(binary, item.box[None], item.size, [item.rle], both_empty=0.0)
    boundaries = [[rle_api.rleToBoundary(one, boundary_ratio)] for one in (item.rle, rle)]
    boundary_iou = float(rle_iou(*boundaries, both_empty=0.0)[0])
    return Reconstruction(
        target, vector, received, decoded[0], float(threshold), binary[0], rle, float(iou), boundary_iou
    )


@torch.inference_mode()
def decode_ious(item: BoxedObject, target: Tensor, vectors: Tensor, codec: MaskCodec, rule: Rule) -> list[float]:
    """IoU of an object, whose mask in its box is `target` (N, N), with what each of K vectors (K, D) decodes to."""
    decoded = codec.decode(vectors)
    binary = decoded > thresholds(decoded, target.expand(decoded.shape), codec, rule)[:, None, None]
    boxes, true_rles = item.box.expand(len(vectors), 4), [item.rle] * len(vectors)
    return paste_and_compare(binary, boxes, item.size, true_rles, both_empty=0.0)[1].tolist()


def term_order(codec: MaskCodec, vector: Tensor) -> Tensor:
    """(D,) int64: the entries of a vector in the order of their importance."""
    if isinstance(codec, SparseCodingCodec):
        return vector.abs().argsort(descending=True, stable=True)
    return torch.arange(len(vector))


def thresholds(decoded: Tensor, target: Tensor, codec: MaskCodec, rule: Rule) -> Tensor:
    """(K,) values that part reconstructions (K, N, N) into mask and background; target (K, N, N) are the true masks."""
    flat = decoded.flatten(1)  # (K, N, N) -> (K, N*N)
    match codec.threshold if rule == "codec" else rule:
        case "half":
            return flat.new_full((len(flat),), 0.5)
        case "middle":
            return middle_of_range(decoded)
        case "best":
            return best_thresholds(flat, target.flatten(1))
    raise ValueError(f"threshold rule {rule!r}: allowed are {', '.join(RULES.values())}")


def best_thresholds(values: Tensor, target: Tensor) -> Tensor:
    """(K,) thresholds of values (K, M) with the highest IoU of {value > threshold} and target (K, M).

    The pixels are taken one by one in falling order of their values; each number of taken pixels has an IoU.
    """
    ordered, order = values.sort(dim=1, descending=True)
    hits = target.gather(1, order).cumsum(dim=1)
    taken = torch.arange(1, values.shape[1] + 1)
    iou = hits / (taken + target.sum(dim=1, keepdim=True) - hits)
    following = torch.cat([ordered[:, 1:], ordered[:, -1:] - 1], dim=1)
    iou[following == ordered] = -1  # no threshold parts equal values
    best = iou.argmax(dim=1, keepdim=True)
    return ((ordered.gather(1, best) + following.gather(1, best)) / 2).squeeze(1)
