"""Small, medium and large objects, by area as COCO defines them; an experiment sets the bounds."""

from collections.abc import Sequence

import numpy as np

SIZES = ("small", "medium", "large")
MAX_AREA = 1e10  # pixels; COCO's own upper end


def area_ranges(area_sides: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Size -> smallest and largest area, pixels; an area on a bound belongs to both sizes, as in COCO's numbers.

    Args:
        area_sides: square roots of the areas, pixels, between small and medium and between medium and large objects.
    """
    small, medium = (float(side) ** 2 for side in area_sides)
    return dict(zip(SIZES, ((0.0, small), (small, medium), (medium, MAX_AREA)), strict=True))


def select_by_size(areas: np.ndarray, area_sides: tuple[float, float]) -> dict[str, np.ndarray]:
    """Size -> which of the areas (A,), pixels, have it: (A,) bool."""
    return {size: (low <= areas) & (areas <= high) for size, (low, high) in area_ranges(area_sides).items()}


def size_of(area: float, area_sides: tuple[float, float]) -> int:
    """The one size of an object, an index of `SIZES`; an area on a bound has the larger one."""
    return int(np.searchsorted(np.square(area_sides), area, side="right"))


def describe_sizes(area_sides: tuple[float, float], names: Sequence[str] = SIZES) -> str:
    """What the three names of sizes stand for, for people."""
    small, medium = (f"{side:.4g}x{side:.4g}" for side in area_sides)
    return f"{names[0]}: below {small} pixels, {names[1]}: below {medium}, {names[2]}: the rest"
