"""Outlines of the drawn shapes: convex, concave, with holes, with thin parts.

A silhouette is a list of parts that are painted over each other, solid ones in and holes out. Coordinates lie in about
-1..1, x to the right and y down; scale, turn and shear are the scene's business.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Random = np.random.Generator


class Part(NamedTuple):
    """A polygon (P, 2) of (x, y) corners that adds to a silhouette, or cuts a hole into what is there."""

    corners: np.ndarray
    solid: bool = True


def _polygon(*corners: tuple[float, float], solid: bool = True) -> Part:
    return Part(np.array(corners, dtype=np.float64), solid)


def _arc(radius: float, start: float = 0, end: float = 2 * np.pi, center: tuple[float, float] = (0, 0)) -> np.ndarray:
    """(48, 2) points of a circle's arc; angles in radians, clockwise as y points down."""
    angles = np.linspace(start, end, 48)
    return np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1)


def _bar(x0: float, y0: float, x1: float, y1: float) -> Part:
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def ellipse(random: Random) -> list[Part]:
    return [Part(_arc(1))]


def box(random: Random) -> list[Part]:
    return [_bar(-0.9, -0.9, 0.9, 0.9)]


def triangle(random: Random) -> list[Part]:
    return [_polygon((random.uniform(-0.3, 0.3), -0.95), (0.95, 0.8), (-0.95, 0.8))]


def star(random: Random) -> list[Part]:
    radii = np.tile([1, random.uniform(0.4, 0.5)], 5)
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    return [Part(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))]


def cross(random: Random) -> list[Part]:
    arm = random.uniform(0.25, 0.36)
    return [_bar(-1, -arm, 1, arm), _bar(-arm, -1, arm, 1)]


def ring(random: Random) -> list[Part]:
    return [Part(_arc(1)), Part(_arc(random.uniform(0.45, 0.65)), solid=False)]


def heart(random: Random) -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 64)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [Part(np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 16)]


def moon(random: Random) -> list[Part]:
    """A crescent between two arcs that meet at its horns."""
    horn = random.uniform(0.75, 1.05)  # angle of the horns from the right, radians
    shift = random.uniform(0.45, 0.6)
    x, y = np.cos(horn), np.sin(horn)
    inner = np.hypot(x - shift, y)
    bend = np.arctan2(y, x - shift)
    outside = _arc(1, horn, 2 * np.pi - horn)
    return [Part(np.concatenate([outside, _arc(inner, 2 * np.pi - bend, bend, center=(shift, 0))]))]


def arrow(random: Random) -> list[Part]:
    shaft, neck = random.uniform(0.16, 0.28), random.uniform(-0.05, 0.25)
    return [_bar(-1, -shaft, neck + 0.05, shaft), _polygon((neck, -0.7), (1, 0), (neck, 0.7))]


def bolt(random: Random) -> list[Part]:
    lean = random.uniform(-0.1, 0.1)
    return [
        _polygon((0.15 + lean, -1), (-0.6, 0.15), (-0.1, 0.15), (-0.3 - lean, 1), (0.6, -0.25), (0.1, -0.25), (0.5, -1))
    ]


def gear(random: Random) -> list[Part]:
    teeth = int(random.integers(7, 12))
    root = random.uniform(0.72, 0.8)
    angles = (np.arange(teeth)[:, None] + np.array([0, 0.14, 0.36, 0.5])) * 2 * np.pi / teeth
    radii = np.broadcast_to([root, 1, 1, root], (teeth, 4))
    rim = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1).reshape(-1, 2)
    return [Part(rim), Part(_arc(random.uniform(0.25, 0.42)), solid=False)]


def leaf(random: Random) -> list[Part]:
    """A pointed blade with a saw-toothed rim on a thin stem."""
    t = np.linspace(0, 1, 25)
    half = random.uniform(0.5, 0.62) * np.sin(np.pi * t**0.8) * (1 - 0.12 * (np.arange(25) % 2))
    x = 1.55 * t - 0.55
    blade = np.concatenate([np.stack([x, -half], axis=1), np.stack([x, half], axis=1)[::-1]])
    return [Part(blade), _bar(-1, -0.06, -0.4, 0.06)]


def key(random: Random) -> list[Part]:
    first, second = random.uniform(0.35, 0.5), random.uniform(0.25, 0.4)
    bow = (-0.58, 0)
    return [
        Part(_arc(0.42, center=bow)),
        Part(_arc(0.22, center=bow), solid=False),
        _bar(-0.2, -0.09, 1, 0.09),
        _bar(0.82, 0, 1, first),
        _bar(0.48, 0, 0.66, second),
    ]


def fish(random: Random) -> list[Part]:
    tail = random.uniform(0.45, 0.6)
    body = _arc(1) * (0.75, 0.5) + (0.22, 0)
    return [
        Part(body),
        _polygon((-0.3, 0), (-1, -tail), (-0.8, 0), (-1, tail)),
        _polygon((0.1, -0.4), (-0.2, -0.75), (0.5, -0.45)),
        Part(_arc(0.09, center=(0.62, -0.12)), solid=False),
    ]


def letter_a(random: Random) -> list[Part]:
    stroke = random.uniform(0.28, 0.36)
    return [
        _polygon((-0.9, 1), (-0.2, -1), (0.2, -1), (0.9, 1), (0.9 - stroke, 1), (0, -0.6), (stroke - 0.9, 1)),
        _bar(-0.5, 0.2, 0.5, 0.5),
    ]


def mug(random: Random) -> list[Part]:
    handle = random.uniform(0.24, 0.32)
    return [
        Part(_arc(0.5, center=(0.45, 0))),
        Part(_arc(handle, center=(0.5, 0)), solid=False),
        _polygon((-0.85, -0.85), (0.45, -0.85), (0.38, 0.85), (-0.78, 0.85)),
    ]


# Class name -> outline; the order gives the category ids.
EASY: dict[str, Callable[[Random], list[Part]]] = {
    shape.__name__: shape for shape in (ellipse, box, triangle, star, cross, ring, heart, moon)
}
HARD = EASY | {shape.__name__: shape for shape in (arrow, bolt, gear, leaf, key, fish, letter_a, mug)}
