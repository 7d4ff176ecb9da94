"""Masks between the image frame and the box frame, and their run-length encodings.

Paper: section 3.2, the mask as an N x N bitmap inside its object's box. Image pixels: pixel (row i, column j) covers
[j, j+1) x [i, i+1), boxes are (x0, y0, x1, y1). Box frame: N x N mask pixels that divide the box.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_rle
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from solq_lab.ops.extension import cpu_operator

Segmentation = Sequence[Sequence[float] | np.ndarray] | dict  # COCO's: polygons in image pixels, or an RLE
ROI_ALIGN_CHUNK = 16  # full-size float bitmaps at once; bounds the memory on images with hundreds of objects


# Image frame -> box frame


def rasterize_in_box(
    segmentations: Sequence[Segmentation], boxes: Tensor, image_size: tuple[int, int], mask_size: int
) -> Tensor:
    """Box-frame masks of COCO objects, drawn inside their boxes only: no polygon becomes a bitmap of the whole image.

    Equals ROI-align of the full bitmap at a threshold of one half (`crop_and_resize`) but for the rounding of exact
    ties: polygons fill the pixels that COCO's rasteriser fills, and ROI-align, being separable, is two matrix products.

    Args:
        segmentations: K objects, each a list of polygons [x, y, x, y, ...] or an RLE.
        boxes: (K, 4) xyxy, image pixels of the original image; a window smaller than the object crops it.
        image_size: (H, W) of the original image, pixels.
        mask_size: N.

    Returns:
        (K, N, N) bool. A box without area, or outside the image, gives an empty mask.

    Raises:
        ValueError: counts differ, a polygon has an odd number of coordinates, or an RLE is of another image size.
    """
    if boxes.shape != (len(segmentations), 4):
        raise ValueError(f"{len(segmentations)} segmentations cannot have boxes {tuple(boxes.shape)}, expected (K, 4)")
    boxes = boxes.float().cpu()
    compiled = cpu_operator("crop_codes")
    if compiled is not None:
        return _crop_compiled(compiled, segmentations, boxes, image_size, mask_size)

    masks = torch.zeros(len(segmentations), mask_size, mask_size, dtype=torch.bool)
    height, width = image_size
    for mask, segmentation, (x0, y0, x1, y1) in zip(masks, segmentations, boxes.numpy(), strict=True):
        down, across = _sample_axis(y0, y1, mask_size, height), _sample_axis(x0, x1, mask_size, width)
        if down is None or across is None:
            continue
        bitmap = _window_bitmap(segmentation, (down.start, across.start, down.stop, across.stop), image_size)
        sums = down.weights @ bitmap.float() @ across.weights.T  # (N, h) @ (h, w) @ (w, N)
        torch.ge(sums, down.samples * across.samples / 2, out=mask)  # half of the cell's samples
    return masks


def crop_and_resize(masks: Tensor, boxes: Tensor, size: int) -> Tensor:
    """The share of each of size x size cells of a box that its mask covers, by ROI-align of the full bitmap.

    The released implementation's route to its targets, which are these values thresholded at >= 0.5: aligned (pixel
    centres at half), and each cell averages ceil(cell side) bilinear samples per axis.

    Args:
        masks: (K, H, W) bool or 0/1 float, one per box.
        boxes: (K, 4) xyxy, pixels of the masks.
        size: cells per side.

    Returns:
        (K, size, size) float32 in 0..1; zero for boxes without area.

    Raises:
        ValueError: masks and boxes differ in number.
    """
    _check_pairs(masks, boxes)
    cells = [masks.new_zeros((0, size, size), dtype=torch.float32)]
    for some_masks, some_boxes in zip(masks.split(ROI_ALIGN_CHUNK), boxes.split(ROI_ALIGN_CHUNK), strict=True):
        index = torch.arange(len(some_boxes), dtype=torch.float32, device=boxes.device).unsqueeze(1)
        rois = torch.cat([index, some_boxes.float()], dim=1)  # (k, 5): which bitmap, then its box
        cells.append(roi_align(some_masks.float().unsqueeze(1), rois, size, 1.0, 0, aligned=True).squeeze(1))
    return torch.cat(cells)


class _AxisSampling(NamedTuple):
    """ROI-align along one axis: cell i of the box is weights[i] @ pixels[start:stop] / samples, samples per cell."""

    start: int
    stop: int
    weights: Tensor  # (N, stop - start) float32, the summed bilinear weights of each cell's samples
    samples: int


def _sample_axis(low: np.float32, high: np.float32, cells: int, length: int) -> _AxisSampling | None:
    """How `cells` cells of low..high, pixels, sample an axis of `length` pixels; None where none lies on it."""
    side = (high - low) / np.float32(cells)
    if not 0 < side < np.inf:
        return None
    samples = int(np.ceil(side))
    steps = np.arange(cells * samples) + 0.5
    position = (low - np.float32(0.5)) + steps * (side / samples)  # (N * samples,) in units of pixel centres
    inside = (position >= -1) & (position <= length)
    if not inside.any():
        return None

    position = position.clip(0, length - 1)  # the outermost pixels reach half a pixel further
    first = position.astype(np.int64)
    second = np.minimum(first + 1, length - 1)
    after = position - first
    start, stop = int(first[0]), int(second[-1]) + 1
    row = np.arange(cells * samples) // samples * (stop - start) - start  # of the flat (N, stop - start) weights
    weights = np.bincount(
        np.concatenate([row + first, row + second]),
        weights=np.concatenate([(1 - after) * inside, after * inside]),
        minlength=cells * (stop - start),
    )
    return _AxisSampling(start, stop, torch.from_numpy(weights.reshape(cells, -1).astype(np.float32)), samples)


def _window_bitmap(
    segmentation: Segmentation, window: tuple[int, int, int, int], image_size: tuple[int, int]
) -> Tensor:
    """(h, w) uint8 pixels of an object inside a window (top, left, bottom, right) of its image."""
    top, left, bottom, right = window
    rle, x_shift, y_shift = _window_rle(segmentation, window, image_size)
    return torch.from_numpy(coco_rle.decode(rle)[top - y_shift : bottom - y_shift, left - x_shift : right - x_shift])


def _window_rle(
    segmentation: Segmentation, window: tuple[int, int, int, int], image_size: tuple[int, int]
) -> tuple[dict, int, int]:
    """An RLE that holds an object's pixels inside a window (top, left, bottom, right), and its first pixel's (x, y)."""
    top, left, bottom, right = window
    if isinstance(segmentation, dict):
        return segmentation_to_rle(segmentation, image_size), 0, 0
    polygons = _checked_polygons(segmentation)
    if not polygons:
        return segmentation_to_rle([], image_size), 0, 0
    # COCO's rasteriser rounds vertices to fifths of a pixel, where coordinates of one decimal are ties. Rounding before
    # the shift by whole pixels keeps the ties.
    fifths = [np.trunc(5 * polygon + 0.5) for polygon in polygons]
    low = np.min([polygon.min(axis=0) for polygon in fifths], axis=0) // 5
    x_shift, y_shift = shift = np.maximum(np.minimum(low, (left, top)), 0).astype(int)
    shifted = [polygon - 5 * shift for polygon in fifths]
    shifted = [((polygon - (polygon < 0)) / 5).ravel().tolist() for polygon in shifted]  # it truncates towards zero
    rles = coco_rle.frPyObjects(shifted, bottom - y_shift, right - x_shift)
    return coco_rle.merge(rles) if len(rles) > 1 else rles[0], int(x_shift), int(y_shift)


def _crop_compiled(
    crop_codes: Callable[..., Tensor],
    segmentations: Sequence[Segmentation],
    boxes: Tensor,
    image_size: tuple[int, int],
    mask_size: int,
) -> Tensor:
    """`rasterize_in_box` by the C++ operator."""
    height, width = image_size
    # The last pixel of a window only has to lie behind all samples; polygons are drawn no further than that.
    corners = boxes.nan_to_num(0, 0, 0).double().numpy()
    first = np.clip(np.floor(corners[:, :2]) - 1, 0, (width, height)).astype(int)
    last = np.clip(np.ceil(corners[:, 2:]) + 2, first + 1, (width, height)).astype(int)

    codes, heights, shifts = [], [], []
    for segmentation, (left, top), (right, bottom) in zip(segmentations, first.tolist(), last.tolist(), strict=True):
        rle, *shift = _window_rle(segmentation, (top, left, bottom, right), image_size)
        codes.append(rle["counts"])
        heights.append(rle["size"][0])
        shifts.append(shift)
    places = torch.tensor(heights, dtype=torch.int64), torch.tensor(shifts, dtype=torch.int64).view(-1, 2)
    return crop_codes(*join_codes(codes), *places, boxes.contiguous(), height, width, mask_size)


def _checked_polygons(polygons: Sequence[Sequence[float] | np.ndarray]) -> list[np.ndarray]:
    """The polygons that have an area, each as vertices (n, 2) float64."""
    for polygon in polygons:
        if len(polygon) % 2:
            raise ValueError(f"a polygon has {len(polygon)} coordinates, expected pairs x, y")
    # pycocotools would read four numbers as a box
    return [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in polygons if len(polygon) >= 6]


# Box frame -> image frame


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Full-image masks of box-frame masks: each pixel centre is mapped into the box and the mask sampled there.

    Bilinear between cell centres, zero outside the mask, kept at >= 0.5: what the released implementation does, in the
    arithmetic of `grid_sample` on a CPU, spelled out so that every device and `paste_to_rle` agree on exact ties.

    Args:
        masks: (K, N, N) bool, or float reconstructions.
        boxes: (K, 4) xyxy, image pixels; any part may lie outside the image.
        image_size: (H, W), pixels.

    Returns:
        (K, H, W) bool; empty for boxes without area.

    Raises:
        ValueError: masks and boxes differ in number.
    """
    _check_pairs(masks, boxes)
    images = masks.new_zeros((len(masks), *image_size), dtype=torch.bool)
    for image, mask, box in zip(images, masks, boxes.float().cpu(), strict=True):
        top, left, bottom, right = window = _paste_window(box, image_size)
        image[top:bottom, left:right] = _paste_inside(mask, box, window)
    return images


def paste_to_rle(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> list[dict]:
    """Compressed COCO RLEs of pasted masks, byte for byte `encode_rle(paste_masks(...))`, drawn inside the boxes only.

    Args:
        masks: (K, N, N) bool.
        boxes: (K, 4) xyxy, image pixels; any part may lie outside the image.
        image_size: (H, W), pixels.

    Returns:
        K dicts {"size": [H, W], "counts": bytes}; an empty mask for boxes without area.

    Raises:
        ValueError: masks and boxes differ in number, or the masks are not bool.
    """
    _check_pairs(masks, boxes)
    if masks.dtype != torch.bool:
        raise ValueError(f"masks are {masks.dtype}, expected bool; binarize the reconstructions first")
    masks, boxes = masks.cpu(), boxes.float().cpu()
    compiled = cpu_operator("paste_to_rle")
    if compiled is not None:
        height, width = image_size
        codes = compiled(masks, boxes, height, width)
        return [{"size": [height, width], "counts": counts.encode()} for counts in codes]
    rles = []
    for mask, box in zip(masks, boxes, strict=True):
        window = _paste_window(box, image_size)
        rles.append(_rle_of_window(_paste_inside(mask, box, window).numpy(), window[:2], image_size))
    return rles


def _paste_window(box: Tensor, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the pixels that a box can touch, one more on each side; all zero where none."""
    height, width = image_size
    x0, y0, x1, y1 = box.tolist()
    if not (x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1)))):
        return 0, 0, 0, 0
    left, top = max(math.floor(x0) - 1, 0), max(math.floor(y0) - 1, 0)
    right, bottom = min(math.ceil(x1) + 1, width), min(math.ceil(y1) + 1, height)
    return (top, left, bottom, right) if top < bottom and left < right else (0, 0, 0, 0)


def _paste_inside(mask: Tensor, box: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """(h, w) bool: `mask` (N, N) in `box`, sampled at the pixel centres of a window (top, left, bottom, right)."""
    top, left, bottom, right = window
    x0, y0, x1, y1 = box.to(mask.device, non_blocking=True)
    row, north, south = _bilinear_cells(y0, y1, mask.shape[0], top, bottom)
    column, west, east = _bilinear_cells(x0, x1, mask.shape[1], left, right)
    row, north, south = row.unsqueeze(1), north.unsqueeze(1), south.unsqueeze(1)
    cells = F.pad(mask.float(), (2, 2, 2, 2))
    value = cells[row, column] * (west * north)
    value += cells[row, column + 1] * (east * north)
    value += cells[row + 1, column] * (west * south)
    value += cells[row + 1, column + 1] * (east * south)
    return value >= 0.5


def _bilinear_cells(low: Tensor, high: Tensor, cells: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the centres of the pixels start..stop fall between `cells` cells that divide low..high.

    Returns:
        The lower neighbouring cell (stop - start,) int64, counted with a border of two, and both cells' weights.
    """
    centers = torch.arange(start, stop, dtype=torch.float32, device=low.device) + 0.5
    grid = (centers - low) / (high - low) * 2 - 1  # to -1..1 and back: the roundings of `grid_sample`
    position = (grid + 1) * (cells / 2) - 0.5
    first = position.floor()
    upper = position - first
    return first.clamp(-2, cells).long() + 2, 1 - upper, upper


def _rle_of_window(inside: np.ndarray, corner: tuple[int, int], image_size: tuple[int, int]) -> dict:
    """The RLE of an image that is empty but for the pixels `inside` (h, w) bool, whose corner is at (top, left)."""
    (top, left), (height, width) = corner, image_size
    columns = np.pad(inside.T, ((0, 0), (1, 1))).astype(np.int8)  # (w, h + 2): RLEs run down the columns
    change = np.diff(columns, axis=1)  # (w, h + 1)
    column, row = np.nonzero(change)
    edges = (left + column) * height + top + row  # starts and ends of runs, in turn
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])  # a run that reaches the bottom continues in the next column
    edges = np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    edges = np.concatenate([[0], edges, [height * width]])
    counts = np.diff(edges if len(edges) == 2 or edges[-1] != edges[-2] else edges[:-1])
    return coco_rle.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


# Run-length encodings


def join_codes(codes: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Compressed counts of K RLEs for the C++ operators: one after another (bytes,) uint8, and where each ends (K,)."""
    ends = torch.tensor([len(code) for code in codes], dtype=torch.int64).cumsum(0)
    return torch.frombuffer(bytearray(b"".join(codes) or b" "), dtype=torch.uint8), ends


def encode_rle(masks: Tensor) -> list[dict]:
    """Compressed COCO RLEs {"size": [H, W], "counts": bytes} of masks (K, H, W) bool. K may be 0."""
    columns_first = masks.transpose(1, 2).to("cpu", torch.uint8).contiguous().numpy()  # (K, W, H)
    return coco_rle.encode(columns_first.T) if len(masks) else []  # (H, W, K) in Fortran order, as pycocotools wants


def decode_rle(rles: Sequence[dict]) -> Tensor:
    """Masks (K, H, W) bool of compressed COCO RLEs of one image; (0, 0, 0) for none.

    Raises:
        ValueError: the RLEs differ in size.
    """
    if not rles:
        return torch.zeros(0, 0, 0, dtype=torch.bool)
    sizes = sorted({tuple(rle["size"]) for rle in rles})
    if len(sizes) > 1:
        raise ValueError(f"RLEs of one image must share one size, found {sizes}")
    return torch.from_numpy(coco_rle.decode(list(rles))).permute(2, 0, 1).bool()  # (H, W, K) -> (K, H, W)


def rle_iou(first: Sequence[dict], second: Sequence[dict], *, both_empty: float = 1.0) -> np.ndarray:
    """(K,) float64 IoU of mask k of two lists of K compressed RLEs; `both_empty` where neither has a pixel."""
    ious = np.zeros(len(first))
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        empty = not coco_rle.area(one) and not coco_rle.area(other)
        ious[row] = both_empty if empty else coco_rle.iou([one], [other], [0])[0, 0]
    return ious


def runs_of_rle(counts: bytes | str) -> np.ndarray:
    """The lengths (R,) int64 of a compressed RLE's runs, pixels: background, object, background, ... down the columns.

    A run is written in groups of five bits, lowest first, one character each from "0" on; the sixth bit marks that more
    follow, the fifth of the last one is the sign. From the fourth run on it is the difference to the last but one.

    Raises:
        ValueError: the text is empty, breaks off, or has other characters. Lengths may be negative all the same.
    """
    code = counts.encode() if isinstance(counts, str) else counts
    characters = np.frombuffer(code, dtype=np.uint8).astype(np.int64) - ord("0")  # (bytes,)
    if len(characters) == 0 or characters.min() < 0 or characters.max() > 63:
        raise ValueError("counts are characters from '0' to 'o', at least one")

    last = np.flatnonzero((characters & 32) == 0)  # (R,) where runs end
    if len(last) == 0 or last[-1] != len(characters) - 1:
        raise ValueError("the counts break off in the middle of a run")
    first = np.concatenate([[0], last[:-1] + 1])
    groups = last - first + 1
    if groups.max() > 7:
        raise ValueError("a run is longer than 32 bits")
    place = np.arange(len(characters)) - np.repeat(first, groups)
    runs = np.add.reduceat((characters & 31) << (5 * place), first)
    runs -= np.where(characters[last] & 16, 1 << (5 * groups), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def segmentation_to_rle(segmentation: Segmentation, image_size: tuple[int, int]) -> dict:
    """The compressed RLE of a COCO segmentation.

    Args:
        segmentation: polygons [x, y, x, y, ...], image pixels, or a compressed or uncompressed RLE.
        image_size: (H, W) of the image, pixels.

    Raises:
        ValueError: the RLE is of another image size, or a polygon has an odd number of coordinates.
    """
    height, width = image_size
    if isinstance(segmentation, dict):
        size = list(segmentation["size"])
        if size != [height, width]:
            raise ValueError(f"an RLE of size {size} does not fit its image of {[height, width]} (height, width)")
        if isinstance(segmentation["counts"], list):
            return coco_rle.frPyObjects(segmentation, height, width)
        counts = segmentation["counts"]
        return {"size": [height, width], "counts": counts.encode() if isinstance(counts, str) else counts}
    polygons = _checked_polygons(segmentation)
    if not polygons:
        return coco_rle.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
    return coco_rle.merge(coco_rle.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width))


def _check_pairs(masks: Tensor, boxes: Tensor) -> None:
    if masks.ndim != 3 or boxes.shape != (len(masks), 4):
        raise ValueError(f"masks {tuple(masks.shape)} and boxes {tuple(boxes.shape)} must be (K, H, W) and (K, 4)")
