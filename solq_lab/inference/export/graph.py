"""The graph of an ONNX file: from images to the best detections, masks decoded, in plain torch.

Paper: section 3.2, inference. The mask vectors of the kept detections are decoded by the codec's own matrix products
(for the DCT two thin ones per mask), so that running the file needs neither the codec nor its tables.
"""

import torch
from torch import Tensor, nn

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.codecs.base import MaskCodec, sharpness
from solq_lab.errors import UserError
from solq_lab.models.solq import SOLQ
from solq_lab.structures import ImageBatch

INPUTS = ("pixels", "sizes")
DETECTIONS = ("scores", "labels", "boxes", "queries")  # every model's outputs; those with masks have one more


class DetectionGraph(nn.Module):
    """A network, its mask codec and the choice of the best detections as one module of tensors in, tensors out.

    Args:
        model: the network in evaluation mode; a plain detector, SOLQ or the baseline with a mask branch.
        codec: its mask codec, None for models without mask vectors.
        top_k: K, detections per image; fewer where J * S is smaller.
        rescore, vector_dim: as in `postprocess`.

    Attributes:
        outputs: names of what `forward` returns.
    """

    def __init__(
        self, model: SOLQ, codec: MaskCodec | None, top_k: int, *, rescore: str = "none", vector_dim: int | None = None
    ) -> None:
        super().__init__()
        self.model, self.codec, self.top_k = model, codec, top_k
        self.rescore, self.vector_dim = rescore, vector_dim
        masks = ("masks",) if codec is not None else ("mask_logits",) if hasattr(model, "mask_branch") else ()
        self.outputs = (*DETECTIONS, *masks)

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """The best (query, class) pairs of every image, best score first.

        Args:
            pixels: (B, 3, H, W) uint8 RGB; smaller images are padded at the right and the bottom, with anything.
            sizes: (B, 2) int64 (height, width) of each image without its padding, pixels.

        Returns:
            scores (B, K) float32 in 0..1; labels (B, K) int64 class channels; boxes (B, K, 4) float32
            (x0, y0, x1, y1) as shares of the image's width and height, not clipped; queries (B, K) int64; then of a
            SOLQ masks (B, K, N, N) bool in the box frame, binarized as the codec does, or of a model with a mask
            branch mask_logits (B, K, h, w) float32 over the whole padded image.

        Raises:
            UserError: within `torch.jit.trace`, which dies of an internal assertion.
        """
        if torch.jit.is_tracing():
            raise UserError("torch.jit.trace cannot follow this model; `solq-lab export` and torch.export can, exactly")
        last = self.model(ImageBatch(pixels, _padding(pixels, sizes)).normalised()).layers[-1]
        last = last.shortened(self.vector_dim)

        classes = last.logits.shape[-1]
        pairs = last.logits.sigmoid().flatten(1)  # (B, J, S) -> (B, J*S)
        scores, best = pairs.topk(min(self.top_k, pairs.shape[1]), dim=1)
        queries, labels = best // classes, best % classes
        boxes = cxcywh_to_xyxy(_rows(last.boxes, queries))
        if last.masks is not None:
            masks = _rows(last.masks.logits.flatten(2), queries).unflatten(2, last.masks.logits.shape[2:])
            return scores, labels, boxes, queries, masks
        if self.codec is None:
            return scores, labels, boxes, queries

        assert last.vectors is not None  # a codec comes with a model that has mask vectors
        decoded = self.codec.decode(_rows(last.vectors, queries).flatten(0, 1))  # (B, K, D) -> (B*K, N, N)
        binary = self.codec.binarize(decoded)
        masks = binary.unflatten(0, queries.shape)
        if self.rescore == "sharpness":
            certainty = sharpness(decoded, binary).unflatten(0, queries.shape)
            scores, order = (scores * certainty).topk(scores.shape[1], dim=1)
            labels, queries, boxes = labels.gather(1, order), queries.gather(1, order), _rows(boxes, order)
            masks = _rows(masks.flatten(2), order).view_as(masks)
        return scores, labels, boxes, queries, masks


def _padding(pixels: Tensor, sizes: Tensor) -> Tensor:
    """(B, H, W) bool, True beyond each image."""
    height, width = pixels.shape[-2:]
    below = torch.arange(height, device=sizes.device) >= sizes[:, :1]  # (B, H)
    right = torch.arange(width, device=sizes.device) >= sizes[:, 1:]  # (B, W)
    return below.unsqueeze(2) | right.unsqueeze(1)


def _rows(values: Tensor, queries: Tensor) -> Tensor:
    """(B, K, F) of values (B, J, F) and queries (B, K)."""
    return values.gather(1, queries.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
