"""From the last decoder layer to detections: best classes, decoded masks, pasted. Paper: section 3.2, inference.

No score threshold and no suppression of duplicates, as in the released models.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.codecs.base import MaskCodec, sharpness
from solq_lab.masks import encode_rle, paste_to_rle
from solq_lab.schema import EvaluationSection
from solq_lab.structures import Detections, ImageMasks, LayerPrediction, unpadded_sizes

PIXELS_PER_CHUNK = 2**22  # mask pixels at once, or one mask: 256 of 128 x 128, 16 MiB in float32


def decoding_of(settings: EvaluationSection) -> dict[str, Any]:
    """The arguments of `postprocess` beside `top_k` that an experiment gives."""
    return {"rescore": settings.rescore, "vector_dim": settings.vector_dim}


@torch.no_grad()
def postprocess(
    prediction: LayerPrediction,
    original_sizes: Sequence[tuple[int, int]],
    codec: MaskCodec | None,
    *,
    top_k: int = 100,
    class_names: Sequence[str],
    rescore: Literal["none", "sharpness"] = "none",
    vector_dim: int | None = None,
) -> list[Detections]:
    """The `top_k` best (query, class) pairs of every image, with their masks at original size.

    Selection and decoding run on the prediction's device; the selected numbers and, chunk by chunk, the binary masks
    are copied to the host. A query with several classes has its mask decoded and pasted once.

    Args:
        prediction: of the last decoder layer, B images.
        original_sizes: B sizes (height, width) of the images in their files, pixels.
        codec: turns vectors into masks, on the prediction's device; None for a plain detector, and for one with a mask
            branch, whose masks are in the prediction.
        top_k: detections per image; fewer where J * S is smaller.
        class_names: S names, one per class channel.
        vector_dim: decode this many first coefficients, as if the others were zero; None: all.
        rescore: "sharpness" multiplies the scores of the `top_k` by `sharpness` of their decoded vectors.

    Returns:
        B detections on the CPU, best score first.

    Raises:
        ValueError: sizes, names or codec do not fit the prediction, or the prediction is not finite.
    """
    _check_fit(prediction, original_sizes, codec, class_names)
    prediction = prediction.shortened(vector_dim)
    scores, labels, queries, boxes = (tensor.cpu() for tensor in _select_best(prediction, original_sizes, top_k=top_k))
    detections = []
    for image, size in enumerate(original_sizes):
        if not (scores[image].isfinite().all() and boxes[image].isfinite().all()):
            raise ValueError(f"image {image} of the batch: scores or boxes are not finite; the weights have diverged")

        masks, certainty = None, None
        if prediction.masks is not None:
            masks = cut_out_masks(prediction.masks, image, queries[image], size)
        elif codec is not None:
            assert prediction.vectors is not None  # `_check_fit` has looked
            masks, certainty = _decode_masks(
                prediction.vectors[image], queries[image], boxes[image], size, codec, measure=rescore == "sharpness"
            )
        names = [class_names[label] for label in labels[image].tolist()]
        found = Detections(scores[image], labels[image], boxes[image], queries[image], masks, names, size)
        if certainty is not None:
            rescored, order = (found.scores * certainty).sort(descending=True, stable=True)
            found = dataclasses.replace(found[order], scores=rescored)
        detections.append(found)
    return detections


def _select_best(
    prediction: LayerPrediction, original_sizes: Sequence[tuple[int, int]], *, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, labels and queries (B, k), and xyxy boxes (B, k, 4) in original pixels, of the best pairs."""
    logits, classes = prediction.logits, prediction.logits.shape[-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype).sigmoid().flatten(1)  # (B, J, S) -> (B, J*S)
    scores, best = scores.topk(min(top_k, scores.shape[1]), dim=1)
    queries, labels = best // classes, best % classes
    boxes = prediction.boxes.to(dtype).gather(1, queries[..., None].expand(-1, -1, 4))
    scale = torch.tensor([(width, height) * 2 for height, width in original_sizes], dtype=dtype)
    boxes = cxcywh_to_xyxy(boxes) * scale.view(-1, 1, 4).to(boxes.device, non_blocking=True)
    return scores.float(), labels, queries, boxes.float()


def _decode_masks(
    vectors: Tensor, queries: Tensor, boxes: Tensor, size: tuple[int, int], codec: MaskCodec, *, measure: bool
) -> tuple[list[dict], Tensor | None]:
    """The RLEs of one image's detections, and with `measure` the `sharpness` (k,) of their reconstructions.

    Of vectors (J, D) of all queries, queries (k,), boxes (k, 4) in pixels.
    """
    distinct, place = queries.unique(return_inverse=True)
    box_of = boxes.new_empty(len(distinct), 4).index_copy_(0, place, boxes)  # same query, same box: any will do
    vectors = vectors[distinct.to(vectors.device, non_blocking=True)]
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))

    # A codec may have a faster way to masks that gives no reconstructions.
    count = max(1, PIXELS_PER_CHUNK // codec.mask_size**2)
    rles, certainties = [], []
    for some_vectors, some_boxes in zip(vectors.split(count), box_of.split(count), strict=True):
        if measure:
            decoded = codec.decode(some_vectors)
            masks = codec.binarize(decoded)
            certainties.append(sharpness(decoded, masks).cpu())
        else:
            masks = codec.decode_masks(some_vectors)
        rles += paste_to_rle(masks.cpu(), some_boxes, size)

    copies = [dict(rles[row]) for row in place.tolist()]  # a caller may rewrite its RLE's counts
    return copies, torch.cat(certainties)[place] if measure else None


def cut_out_masks(masks: ImageMasks, image: int, queries: Tensor, size: tuple[int, int]) -> list[dict]:
    """The RLEs of one image's detections from masks in the image frame, where queries (k,) are the detections'.

    As released: upsampled to the padded image, thresholded, cropped to the image, and only then resized to `size`.
    """
    distinct, place = queries.unique(return_inverse=True)
    padding = masks.padding[image]
    ((height, width),) = unpadded_sizes(padding.unsqueeze(0)).tolist()
    logits = masks.logits[image, distinct.to(masks.logits.device, non_blocking=True)].unsqueeze(1)  # (k, 1, h, w)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    pixels = max(padding.numel(), size[0] * size[1])  # a photograph has many more than the network's input
    rles = []
    for some in logits.split(max(1, PIXELS_PER_CHUNK // pixels)):
        upsampled = F.interpolate(some, size=padding.shape, mode="bilinear")
        inside = (upsampled[..., :height, :width] > 0).byte()  # a sigmoid above one half
        rles += encode_rle(F.interpolate(inside, size=size).squeeze(1).bool())  # nearest
    return [dict(rles[row]) for row in place.tolist()]


def _check_fit(
    prediction: LayerPrediction,
    original_sizes: Sequence[tuple[int, int]],
    codec: MaskCodec | None,
    class_names: Sequence[str],
) -> None:
    batch, _, classes = prediction.logits.shape
    if len(original_sizes) != batch:
        raise ValueError(f"{len(original_sizes)} original sizes for predictions of {batch} images")
    if len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for {classes} class channels")
    if codec is not None:
        found = None if prediction.vectors is None else prediction.vectors.shape[-1]
        if found != codec.vector_dim:
            raise ValueError(
                f"the model predicts vectors of length {found}, the codec has {codec.vector_dim}; "
                "use the codec the model was trained with, or None for a plain detector"
            )
