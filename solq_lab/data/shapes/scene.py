"""One drawn image: textured shapes, one over the other, on a cluttered background, and their visible masks.

Everything is painted three times too large and averaged down, so that edges are smooth. This module needs numpy and
Pillow only: the processes that draw start quickly.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from solq_lab.data.shapes.silhouettes import EASY, HARD, Part, Random

OVERSAMPLING = 3
TEXTURES = ("plain", "stripes", "checker", "gradient", "noise")
MIN_VISIBLE = 0.4  # share of an object's own area that later objects and the image's edge may not take away
COLOUR_TRIES, PLACE_TRIES = 6, 10


@dataclass(frozen=True)
class Level:
    """How difficult the images are."""

    side: int  # of the square image, pixels
    classes: tuple[str, ...]  # class names, in the order of their category ids
    objects: tuple[int, int]  # smallest and largest number of objects
    # shortest and longest longer side of an object's box before occlusion, pixels; log-uniform
    object_side: tuple[float, float]
    rotation: float  # largest turn either way, degrees
    clutter: tuple[int, int]  # smallest and largest number of lines, arcs and specks in the background
    occlusion: float  # share of the objects that are put against another one
    contrast: float  # RGB distance (channels in 0..1) of an object to what lies below it, where it can be had
    overhang: float  # largest share of an object's side that may stick out of the image


LEVELS = {
    "easy": Level(
        side=96,
        classes=tuple(EASY),
        objects=(1, 4),
        object_side=(24, 63),
        rotation=20,
        clutter=(2, 10),
        occlusion=0.35,
        contrast=0.6,
        overhang=0.0,
    ),
    "hard": Level(
        side=128,
        classes=tuple(HARD),
        objects=(1, 6),
        object_side=(14, 88),
        rotation=180,
        clutter=(4, 15),
        occlusion=0.45,
        contrast=0.45,
        overhang=0.2,
    ),
}


class Scene(NamedTuple):
    """An image and its objects."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    classes: list[int]  # K indices into `Level.classes`
    masks: np.ndarray  # (K, H, W) bool, the visible part of each object; they do not overlap


def draw_scene(level: Level, random: Random) -> Scene:
    """Draw one image; the same state of `random` gives the same image."""
    stage = _Stage(level, random)
    for _ in range(int(random.integers(*level.objects, endpoint=True))):
        stage.add_object(random)
    return stage.develop(random)


class _Stage:
    """An image in the making, `OVERSAMPLING` times too large; objects come one by one, each over the earlier ones."""

    def __init__(self, level: Level, random: Random) -> None:
        self.level = level
        self.side = level.side * OVERSAMPLING
        self.pixels = _background(self.side, random)  # (3, side, side) float32 in 0..1
        _scatter_clutter(self.pixels, int(random.integers(*level.clutter, endpoint=True)), random)
        self.light = _direction(random.uniform(0, 2 * np.pi)).tolist()  # (dy, dx), where it comes from
        self.owner = np.zeros((self.side, self.side), dtype=np.uint8)  # k where object k is on top, 0: background
        self.classes: list[int] = []
        self.cutouts: list[_Cutout] = []
        self.centers: list[np.ndarray] = []

    def add_object(self, random: Random) -> None:
        """Place and paint one object, unless it finds no place."""
        class_index = int(random.integers(len(self.level.classes)))
        cutout = _cut_out(self.level, HARD[self.level.classes[class_index]](random), random)
        center = self._find_place(cutout, random)
        if center is None:
            return
        cover = cutout.at(center, self.side)
        window = cutout.window(center, self.side)
        _paint(self.pixels[:, *window], cover[window], cutout.softness, self.light, self.level.contrast, random)
        self.classes.append(class_index)
        self.cutouts.append(cutout)
        self.centers.append(center)
        self.owner[cover] = len(self.classes)

    def develop(self, random: Random) -> Scene:
        """Average down to the final size and add the camera's noise."""
        size, count = self.level.side, len(self.classes)
        small = _shrink(self.pixels, np.float32) / OVERSAMPLING**2
        small += random.uniform(0, 0.04) * random.standard_normal(small.shape, dtype=np.float32)
        image = (np.clip(small, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
        masks = np.zeros((count, size, size), dtype=bool)
        for number, mask in enumerate(masks, start=1):
            np.greater(_shrink(self.owner == number, np.uint8), OVERSAMPLING**2 // 2, out=mask)
        seen = np.flatnonzero(masks.any(axis=(1, 2)))
        return Scene(image, [self.classes[row] for row in seen], masks[seen])

    def _find_place(self, cutout: _Cutout, random: Random) -> np.ndarray | None:
        """A centre (y, x) that leaves this and all earlier objects visible enough, None where the tries find none.

        Some objects are to cover another one, the rest to stand free; a place of the other kind is second choice.
        """
        occluding = bool(self.centers) and random.random() < self.level.occlusion
        low = cutout.size * (0.5 - self.level.overhang)
        high = self.side - low
        visible = self._pixels_of_objects(self.owner.ravel())
        needed = [MIN_VISIBLE * other.area for other in self.cutouts]

        second_choice = None
        for _ in range(PLACE_TRIES):
            center = (
                np.clip(self._beside_another(cutout, random), low, high) if occluding else random.uniform(low, high)
            )
            cover = cutout.at(center, self.side)
            taken = self._pixels_of_objects(self.owner[cover])
            if cover.sum() < MIN_VISIBLE * cutout.area or (visible - taken < needed).any():
                continue
            if taken.any() == occluding:
                return center
            second_choice = center
        return second_choice

    def _pixels_of_objects(self, owner: np.ndarray) -> np.ndarray:
        """How many of the pixels `owner` (P,) show each object, (K,) int64."""
        return np.bincount(owner, minlength=len(self.classes) + 1)[1:]

    def _beside_another(self, cutout: _Cutout, random: Random) -> np.ndarray:
        """A centre (y, x) at which the object reaches over one that stands already."""
        other = int(random.integers(len(self.centers)))
        reach = (cutout.size + self.cutouts[other].size) / 2
        return self.centers[other] + random.uniform(0.5, 0.9) * reach * _direction(random.uniform(0, 2 * np.pi))


@dataclass(frozen=True)
class _Cutout:
    """A silhouette of final size and turn, its box's centre at the origin."""

    polygons: list[np.ndarray]  # (P, 2) corners (x, y) of each part, oversampled pixels
    solid: list[bool]  # for each part, whether it adds or cuts out
    size: np.ndarray  # (height, width) of the box, oversampled pixels
    area: int  # oversampled pixels when nothing covers it

    def at(self, center: np.ndarray, side: int) -> np.ndarray:
        """(side, side) bool, True where the silhouette lies when its box's centre is at (y, x)."""
        return _fill(self.polygons, self.solid, center, (side, side))

    @property
    def softness(self) -> float:
        """Width of the rounded edge and of the shadow, oversampled pixels."""
        return max(2.0, 0.06 * float(self.size.max()))

    def window(self, center: np.ndarray, side: int) -> tuple[slice, slice]:
        """The box and a margin for its shadow, cut off at the canvas."""
        margin = 3 * self.softness
        low = np.clip(center - self.size / 2 - margin, 0, side).astype(int)
        high = np.clip(center + self.size / 2 + margin, 0, side).astype(int)
        return slice(low[0], high[0]), slice(low[1], high[1])


def _fill(polygons: list[np.ndarray], solid: list[bool], center: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool of polygons around `center` (y, x), painted over each other in and out."""
    layer = Image.new("L", size[::-1])
    pen = ImageDraw.Draw(layer)
    for polygon, adds in zip(polygons, solid, strict=True):
        pen.polygon((polygon + center[::-1]).ravel().tolist(), fill=int(adds))
    return np.asarray(layer).view(np.bool_)


def _shrink(large: np.ndarray, dtype: type) -> np.ndarray:
    """Sums over blocks of OVERSAMPLING x OVERSAMPLING pixels, (..., H, W) from (..., H, W) oversampled."""
    *channels, height, width = large.shape
    rows = large.reshape(*channels, height // OVERSAMPLING, OVERSAMPLING, width).sum(axis=-2, dtype=dtype)
    return rows.reshape(*rows.shape[:-1], width // OVERSAMPLING, OVERSAMPLING).sum(axis=-1, dtype=dtype)


def _direction(angle: float) -> np.ndarray:
    """(dy, dx) of length 1."""
    return np.array([np.sin(angle), np.cos(angle)])


def _colour(random: Random, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    """(3, 1) float32 RGB in 0..1, of any hue."""
    rgb = colorsys.hsv_to_rgb(random.random(), random.uniform(*saturation), random.uniform(*value))
    return np.array(rgb, np.float32)[:, None]


def _cloud(height: int, width: int, cells: int, random: Random) -> np.ndarray:
    """(height, width) float32 in 0..1, smooth noise that changes over height / cells pixels."""
    grid = Image.fromarray(random.random((cells, cells), dtype=np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _pattern(kind: str, height: int, width: int, random: Random) -> np.ndarray:
    """(height, width) float32 in 0..1: how much of the second colour a texture shows."""
    if kind == "plain":
        return np.zeros((height, width), np.float32)
    if kind == "noise":
        return _cloud(height, width, int(random.integers(4, 9)), random)
    dy, dx = _direction(random.uniform(0, np.pi)).astype(np.float32)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    along, across = y * dy + x * dx, x * dy - y * dx
    if kind == "gradient":
        return (along - along.min()) / (np.ptp(along) + 1e-6)
    period = random.uniform(4, 9) * OVERSAMPLING
    stripes = np.floor(along / period).astype(np.int32)
    if kind == "checker":
        stripes += np.floor(across / period).astype(np.int32)
    return (stripes & 1).astype(np.float32)


def _background(side: int, random: Random) -> np.ndarray:
    """(3, side, side) float32 in 0..1: two muted colours that drift into each other, half of the time textured."""
    first, second = (_colour(random, (0.05, 0.4), (0.15, 0.95))[..., None] for _ in range(2))
    drift = _cloud(side, side, int(random.integers(2, 5)), random)
    canvas = first + (second - first) * drift
    if random.random() < 0.5:
        kind = TEXTURES[int(random.integers(1, len(TEXTURES)))]
        canvas += random.uniform(-0.12, 0.12) * _pattern(kind, side, side, random)
    return np.clip(canvas, 0, 1, out=canvas)


def _scatter_clutter(canvas: np.ndarray, count: int, random: Random) -> None:
    """Paint lines, arcs and specks that belong to no object, half transparent."""
    side = canvas.shape[-1]
    for _ in range(count):
        layer = Image.new("L", (side, side))
        pen = ImageDraw.Draw(layer)
        x0, y0, x1, y1 = random.uniform(0, side, 4)
        thickness = int(random.integers(1, 3) * OVERSAMPLING)
        match random.choice(("line", "arc", "speck")):
            case "line":
                pen.line((x0, y0, x1, y1), fill=255, width=thickness)
            case "arc":
                radius, start = random.uniform(0.08, 0.35) * side, random.uniform(0, 360)
                frame = (x0 - radius, y0 - radius, x0 + radius, y0 + radius)
                pen.arc(frame, start, start + random.uniform(60, 200), fill=255, width=thickness)
            case "speck":
                pen.ellipse((x0, y0, x0 + 2 * thickness, y0 + 2 * thickness), fill=255)

        box = layer.getbbox()
        if box is not None:
            left, top, right, bottom = box
            cover = np.asarray(layer.crop(box), np.float32) / 255 * random.uniform(0.3, 0.8)
            region = canvas[:, top:bottom, left:right]
            region += (_colour(random, (0.1, 0.7), (0.1, 1.0))[..., None] - region) * cover


def _cut_out(level: Level, parts: list[Part], random: Random) -> _Cutout:
    """One silhouette at random size, turn, shear and aspect."""
    turn = np.deg2rad(random.uniform(-level.rotation, level.rotation))
    stretch = np.exp(random.uniform(-0.15, 0.15))
    shear = np.array([[1, random.uniform(-0.15, 0.15)], [0, 1]]) * (stretch, 1 / stretch)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ shear

    polygons = [part.corners @ matrix.T for part in parts]
    corners = np.concatenate([polygon for polygon, part in zip(polygons, parts, strict=True) if part.solid])
    low, high = corners.min(axis=0), corners.max(axis=0)
    longest = np.exp(random.uniform(*np.log(level.object_side))) * OVERSAMPLING
    scale = longest / (high - low).max()
    polygons = [(polygon - (low + high) / 2) * scale for polygon in polygons]
    solid = [part.solid for part in parts]
    size = ((high - low) * scale)[::-1]
    height, width = (np.ceil(size).astype(int) + 2).tolist()
    area = int(_fill(polygons, solid, np.array([height / 2, width / 2]), (height, width)).sum())
    return _Cutout(polygons, solid, size, area)


def _paint(
    region: np.ndarray, inside: np.ndarray, softness: float, light: list[float], contrast: float, random: Random
) -> None:
    """Paint an object into a region (3, h, w): textured, its rounded edge lit from `light`, over its soft shadow."""
    relief = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(softness))
    toward_y, toward_x = (softness * component for component in light)
    down, right = np.asarray(np.gradient(np.asarray(relief, np.float32) / 255))
    shading = 1 - 0.8 * (toward_y * down[inside] + toward_x * right[inside])  # bright where the edge falls to the light
    shadow = relief.transform(relief.size, Image.Transform.AFFINE, (1, 0, toward_x, 0, 1, toward_y))

    below = region[:, inside].mean(axis=1, keepdims=True)
    colour = _contrasting_colour(below, contrast, random)
    accent = np.clip(colour * random.uniform(0.5, 0.8) + random.integers(2) * np.float32(0.3), 0, 1)
    kind = TEXTURES[int(random.integers(len(TEXTURES)))]
    height, width = inside.shape
    pattern = _pattern(kind, height, width, random)[inside]
    surface = colour + (accent - colour) * pattern  # (3, n) for the n pixels inside

    region *= 1 - np.asarray(shadow, np.float32) * (0.4 / 255)
    region[:, inside] = np.clip(surface * shading, 0, 1)


def _contrasting_colour(below: np.ndarray, contrast: float, random: Random) -> np.ndarray:
    """A strong colour at least `contrast` away from the colour `below`, or the farthest of a few tries."""
    best = _colour(random, (0.45, 0.95), (0.45, 1.0))
    for _ in range(COLOUR_TRIES - 1):
        if np.linalg.norm(best - below) > contrast:
            break
        other = _colour(random, (0.45, 0.95), (0.45, 1.0))
        best = max(best, other, key=lambda colour: float(np.linalg.norm(colour - below)))
    return best
