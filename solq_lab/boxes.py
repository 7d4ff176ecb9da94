"""Boxes: two spellings, and generalised IoU. Paper: eq. 2, L_giou."""

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) boxes from (cx, cy, w, h) to (x0, y0, x1, y1), same unit and frame."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(..., 4) boxes from (x0, y0, x1, y1) to (cx, cy, w, h), same unit and frame."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of boxes (..., 4) given as (x0, y0, x1, y1), element by element with broadcasting.

    For all pairs give `first[:, None]` and `second[None]`.

    Returns:
        (...) in -1..1: IoU minus the share of the enclosing box that neither box covers.
    """
    area_first = (first[..., 2] - first[..., 0]) * (first[..., 3] - first[..., 1])
    area_second = (second[..., 2] - second[..., 0]) * (second[..., 3] - second[..., 1])
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    overlap = overlap.clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = area_first + area_second - intersection
    enclosing = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    hull = enclosing[..., 0] * enclosing[..., 1]
    return intersection / union - (hull - union) / hull
