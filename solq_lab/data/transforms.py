"""Training and test transforms: first a plan from the image's size, then the plan applied to image and boxes.

A plan is a list of steps (mirror, resize, crop) and needs no pixels, so that its arithmetic is tested alone. Masks are
not transformed: an object's final box is mapped back through the steps (`boxes_before`) and the object is rasterised
there, in the original image. The released route, nearest-resized full bitmaps, is `apply_to_bitmaps`.

Paper: section 4.2 (training); the details follow the released code, which resizes training images twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

JITTER = (0.1, 2.0)  # scales of the large-scale jitter


class Mirror(NamedTuple):
    """Left becomes right in an image `width` pixels wide."""

    width: int


class Resize(NamedTuple):
    """From one (height, width) to another, pixels."""

    before: tuple[int, int]
    after: tuple[int, int]


class Crop(NamedTuple):
    """Cut out a rectangle, pixels."""

    top: int
    left: int
    height: int
    width: int


Step = Mirror | Resize | Crop


class Transform(Protocol):
    """Plans the steps of a sample."""

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        """The steps for an image of (height, width) pixels; all randomness comes from `random`."""


@dataclass(frozen=True)
class TestResize:
    """Resize to the test scale, nothing random."""

    __test__ = False  # pytest: not a test case

    test_scale: int  # length of the shorter side, pixels
    max_size: int  # longest allowed longer side, pixels

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        return _resize(size, self.test_scale, self.max_size)


@dataclass(frozen=True)
class FlipOnly(TestResize):
    """Mirror with probability 1/2, then resize to the test scale."""

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        return [*_mirror(size, random), *super().plan(size, random)]


@dataclass(frozen=True)
class ReleasedAugmentation:
    """The augmentation of the released models: mirror, resize, then one more resize or a crop between two more.

    The first resize always happens, also before the crop; it is not in the paper.
    """

    train_scales: Sequence[int]  # lengths of the shorter side to draw from, pixels
    max_size: int  # longest allowed longer side, pixels
    # lengths of the shorter side before the crop, pixels; the longer side is not limited there
    crop_scales: Sequence[int]
    # smallest and largest side of the crop, pixels; an image smaller than the smallest limits it
    crop_size: tuple[int, int]

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        steps = _mirror(size, random)
        steps += _resize(size, random.choice(self.train_scales), self.max_size)
        if random.random() < 0.5:
            steps += _resize(size_after(steps, size), random.choice(self.crop_scales), None)
            height, width = size_after(steps, size)
            smallest, largest = self.crop_size
            crop_height = int(random.integers(min(smallest, height), min(height, largest), endpoint=True))
            crop_width = int(random.integers(min(smallest, width), min(width, largest), endpoint=True))
            top = int(random.integers(height - crop_height, endpoint=True))
            left = int(random.integers(width - crop_width, endpoint=True))
            steps.append(Crop(top, left, crop_height, crop_width))
        return steps + _resize(size_after(steps, size), random.choice(self.train_scales), self.max_size)


@dataclass(frozen=True)
class LargeScaleJitter:
    """Mirror, resize to a tenth up to twice the largest size, cut out what exceeds it (Simple Copy-Paste, LSJ)."""

    max_size: int  # longest allowed side, pixels; the image fits a square of this side at scale 1

    def plan(self, size: tuple[int, int], random: np.random.Generator) -> list[Step]:
        steps, longest = _mirror(size, random), self.max_size * random.uniform(*JITTER)
        after = tuple(max(1, round(side * longest / max(size))) for side in size)
        height, width = (min(side, self.max_size) for side in after)
        top, left = (int(random.integers(a - b, endpoint=True)) for a, b in zip(after, (height, width), strict=True))
        return [*steps, Resize(size, (after[0], after[1])), Crop(top, left, height, width)]


def resized_size(size: tuple[int, int], short: int, longest: int | None) -> tuple[int, int]:
    """(height, width) after a resize of the shorter side to `short`, or less where the longer would exceed `longest`.

    The rounding is the released one: where `longest` binds, the shorter side is rounded first and the longer follows
    from it, rounded down, so that it misses `longest` by a pixel or, in very long images, a few.

    Args:
        size: (height, width), pixels.
        short: wanted length of the shorter side, pixels.
        longest: limit of the longer side, pixels; None: no limit.
    """
    small, large = min(size), max(size)
    if longest is not None and large / small * short > longest:
        short = max(1, round(longest * small / large))
    if small == short:
        return size
    long = int(short * large / small)
    return (short, long) if size[0] == small else (long, short)


def size_after(steps: Sequence[Step], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image of `size` after the steps, pixels."""
    for step in reversed(steps):
        match step:
            case Resize():
                return step.after
            case Crop():
                return step.height, step.width
    return size


def mirrored(steps: Sequence[Step]) -> bool:
    """Whether left and right have changed places after the steps."""
    return sum(isinstance(step, Mirror) for step in steps) % 2 == 1


def apply_to_image(steps: Sequence[Step], image: Tensor) -> Tensor:
    """The image (3, H, W) uint8 after the steps; resizing is bilinear with antialiasing, on uint8 as in PIL."""
    for step in steps:
        match step:
            case Mirror():
                image = image.flip(-1)
            case Resize(after=after):
                image = TF.resize(image, list(after), interpolation=InterpolationMode.BILINEAR, antialias=True)
            case Crop(top, left, height, width):
                image = image[:, top : top + height, left : left + width]
    return image


def apply_to_bitmaps(steps: Sequence[Step], bitmaps: Tensor) -> Tensor:
    """Full-image masks (K, H, W) bool after the steps, the released way: nearest neighbour at every resize.

    Each resize samples at the upper left corners of the new pixels and so moves a mask by up to half an old one.
    """
    for step in steps:
        match step:
            case Mirror():
                bitmaps = bitmaps.flip(-1)
            case Resize(after=after):
                bitmaps = F.interpolate(bitmaps[:, None].byte(), size=after, mode="nearest")[:, 0].bool()
            case Crop(top, left, height, width):
                bitmaps = bitmaps[:, top : top + height, left : left + width]
    return bitmaps


def apply_to_boxes(steps: Sequence[Step], boxes: np.ndarray) -> np.ndarray:
    """Boxes (K, 4) (x0, y0, x1, y1) in pixels after the steps, clipped to each crop: a box that left has no area.

    Boxes are clipped, not tightened to the mask's remainder, as in the released code.
    """
    for step in steps:
        match step:
            case Mirror(width):
                boxes = _mirror_boxes(boxes, width)
            case Resize(before, after):
                boxes = boxes * _scale(before, after)
            case Crop(top, left, height, width):
                boxes = np.clip(boxes - (left, top, left, top), 0, (width, height, width, height))
    return boxes


def boxes_before(steps: Sequence[Step], boxes: np.ndarray) -> np.ndarray:
    """Where boxes (K, 4) (x0, y0, x1, y1), given after the steps, lay in the original image, pixels."""
    for step in reversed(steps):
        match step:
            case Mirror(width):
                boxes = _mirror_boxes(boxes, width)
            case Resize(before, after):
                boxes = boxes * _scale(after, before)
            case Crop(top, left, _, _):
                boxes = boxes + np.array((left, top, left, top))
    return boxes


def _mirror(size: tuple[int, int], random: np.random.Generator) -> list[Step]:
    return [Mirror(size[1])] if random.random() < 0.5 else []


def _resize(size: tuple[int, int], short: int, longest: int | None) -> list[Step]:
    after = resized_size(size, int(short), longest)
    return [] if after == size else [Resize(size, after)]


def _mirror_boxes(boxes: np.ndarray, width: int) -> np.ndarray:
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)


def _scale(before: tuple[int, int], after: tuple[int, int]) -> tuple[float, float, float, float]:
    """Factors for (x, y, x, y)."""
    x, y = after[1] / before[1], after[0] / before[0]
    return x, y, x, y
