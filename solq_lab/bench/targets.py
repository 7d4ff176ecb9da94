"""Target masks: drawn inside their boxes against full-image bitmaps, resized and cropped by ROI-align."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from solq_lab import masks
from solq_lab.bench.scenes import coco_document
from solq_lab.bench.timing import Row, compare
from solq_lab.codecs.reconstruct import box_frame_iou
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data.transforms import resized_size

MASK_SIZE = 128
CROWDED = 16  # objects per image on average; twice as many in the most crowded one
SHORT, MAX_SIDE = 800, 1333
MEAN_IOU = 0.998  # with ROI-align of the full bitmap at the original resolution


def rows(annotations: Path | None = None) -> Iterator[Row]:
    """All targets of one crowded image.

    Equal means: mean IoU of at least 0.998 with the full bitmaps cropped at the original resolution. The baseline
    itself is further away, because it resizes the bitmaps first.

    Args:
        annotations: COCO annotation file; its image with the most objects is taken. None: a generated one.
    """
    truth = GroundTruth(coco_document(0, num_images=20, objects=CROWDED) if annotations is None else annotations)
    crowded = int(np.diff(truth.starts).argmax())
    size, objects = truth.size(crowded), truth.rows_of(crowded)
    segmentations, boxes = truth.segmentations(objects), torch.from_numpy(truth.boxes[objects]).float()
    bitmaps = torch.stack([masks.decode_rle([masks.segmentation_to_rle(one, size)])[0] for one in segmentations])
    exact = masks.crop_and_resize(bitmaps, boxes, MASK_SIZE) >= 0.5
    yield compare(
        "targets",
        f"{len(boxes)} objects of one image at {SHORT}/{MAX_SIDE}, {MASK_SIZE}x{MASK_SIZE}",
        lambda: crop_full_bitmaps(segmentations, boxes, size).flip(-1),
        lambda: masks.rasterize_in_box(segmentations, boxes, size, MASK_SIZE).flip(-1),
        lambda _, found: box_frame_iou(exact, found.flip(-1)).mean().item() >= MEAN_IOU,
    )


def crop_full_bitmaps(segmentations: list, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The plain way: every object as a bitmap of the whole image, resized, cropped by ROI-align: (K, N, N) bool."""
    bitmaps = masks.decode_rle([masks.segmentation_to_rle(segmentation, size) for segmentation in segmentations])
    resized = F.interpolate(bitmaps[None].float(), size=resized_size(size, SHORT, MAX_SIDE), mode="nearest")[0]
    scale = torch.tensor([resized.shape[2] / size[1], resized.shape[1] / size[0]]).repeat(2)
    rois = torch.cat([torch.arange(len(boxes)).unsqueeze(1), boxes.float() * scale], dim=1)  # which bitmap, its box
    return roi_align(resized.unsqueeze(1), rois, MASK_SIZE, 1.0, 0, aligned=True).squeeze(1) >= 0.5
