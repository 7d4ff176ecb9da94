"""From vectors to run-length codes: inside the boxes against full images."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_rle
from torch import Tensor

from solq_lab import masks
from solq_lab.bench.codec import MASK_SIZE, VECTOR_DIM, binarize_one_by_one, decode_one_by_one, zigzag_places
from solq_lab.bench.scenes import HEIGHT, WIDTH, blob_masks, boxes_xyxy
from solq_lab.bench.timing import Row, compare
from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.codecs.dct import DCTCodec
from solq_lab.inference.postprocess import postprocess
from solq_lab.structures import Detections, LayerPrediction

QUERIES, CLASSES, TOP_K = 300, 91, 100


def rows() -> Iterator[Row]:
    """Pasting alone, and everything after the network."""
    boxes, bits = boxes_xyxy(0, count=TOP_K), blob_masks(0, count=TOP_K, size=MASK_SIZE)
    yield compare(
        "postprocess",
        f"paste {TOP_K} masks to RLE, {HEIGHT}x{WIDTH}",
        lambda: encode_pasted(bits, boxes),
        lambda: masks.paste_to_rle(bits, boxes, (HEIGHT, WIDTH)),
        lambda expected, found: expected == found,
    )

    codec = DCTCodec(MASK_SIZE, VECTOR_DIM)
    prediction = _draw_prediction(codec)
    kept = zigzag_places(MASK_SIZE)[:VECTOR_DIM]
    names = [str(channel) for channel in range(CLASSES)]
    yield compare(
        "postprocess",
        f"all of it, {QUERIES} queries, top {TOP_K}, {HEIGHT}x{WIDTH}",
        lambda: postprocess_one_by_one(prediction, kept),
        lambda: postprocess(prediction, [(HEIGHT, WIDTH)], codec, top_k=TOP_K, class_names=names)[0],
        _same_detections,
    )


def encode_pasted(bits: Tensor, boxes: Tensor) -> list[dict]:
    """The plain way: each mask (N, N) sampled over its box into an image of its own, all images encoded."""
    images = np.zeros((HEIGHT, WIDTH, len(bits)), dtype=np.uint8, order="F")
    for number, (mask, (x0, y0, x1, y1)) in enumerate(zip(bits.float(), boxes, strict=True)):
        left, top = (int(low.floor().clamp(min=0)) for low in (x0, y0))
        right, bottom = int(x1.ceil().clamp(max=WIDTH)), int(y1.ceil().clamp(max=HEIGHT))
        if left >= right or top >= bottom:
            continue
        x = (torch.arange(left, right) + 0.5 - x0) / (x1 - x0) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).unsqueeze(0)
        sampled = F.grid_sample(mask[None, None], grid, align_corners=False)[0, 0]
        images[top:bottom, left:right, number] = (sampled >= 0.5).numpy()
    return coco_rle.encode(images)


def postprocess_one_by_one(prediction: LayerPrediction, kept: np.ndarray) -> Detections:
    """The plain way from one image's predictions to detections."""
    scores, best = prediction.logits[0].sigmoid().flatten().topk(TOP_K)
    queries, labels = best // CLASSES, best % CLASSES
    center, side = prediction.boxes[0][queries].split(2, dim=-1)
    boxes = torch.cat([center - side / 2, center + side / 2], dim=-1) * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert prediction.vectors is not None, "the bench measures networks with mask vectors"
    decoded = decode_one_by_one(prediction.vectors[0][queries].double().numpy(), kept, MASK_SIZE)
    rles = encode_pasted(binarize_one_by_one(decoded), boxes)
    return Detections(scores, labels, boxes, queries, rles, [str(label) for label in labels.tolist()])


def _draw_prediction(codec: DCTCodec) -> LayerPrediction:
    generator = torch.Generator().manual_seed(0)
    relative = boxes_xyxy(1, count=QUERIES) / torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    vectors = codec.encode(blob_masks(1, count=QUERIES, size=MASK_SIZE))
    vectors += 0.1 * torch.randn(vectors.shape, generator=generator)
    logits = torch.randn(1, QUERIES, CLASSES, generator=generator) - 4
    return LayerPrediction(logits, xyxy_to_cxcywh(relative).unsqueeze(0), vectors.unsqueeze(0))


def _same_detections(expected: Detections, found: Detections) -> bool:
    """Equal scores, classes and queries, boxes to a thousandth of a pixel, masks to a mean IoU of 0.999."""
    assert expected.masks is not None
    assert found.masks is not None
    ious = [coco_rle.iou([one], [other], [0])[0, 0] for one, other in zip(expected.masks, found.masks, strict=True)]
    numbers = all(
        torch.equal(getattr(expected, name), getattr(found, name)) for name in ("scores", "labels", "queries")
    )
    return numbers and (expected.boxes - found.boxes).abs().max().item() < 1e-3 and float(np.mean(ious)) >= 0.999
