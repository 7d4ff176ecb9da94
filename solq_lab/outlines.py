"""Exact outlines of masks, found from their run lengths: memory and time grow with the outline, not with the image.

Outlines follow the borders of pixels: pixel (row i, column j) covers [j, j+1) x [i, i+1), vertices are integers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solq_lab.masks import runs_of_rle

BLOCK = 1024  # edges compared at once


class _Edges(NamedTuple):
    """Vertical borders between pixels of a mask and others, E of them, by rising x, then y."""

    points: np.ndarray  # (E, 2, 2) int64, upper and lower end as (x, y)
    inside_right: np.ndarray  # (E,) bool, whether the mask is on the right
    following: np.ndarray  # (E,) int64, the next edge along the outline


def trace_parts(rle: dict) -> list[list[np.ndarray]]:
    """The outlines of the parts of a mask, a compressed COCO RLE: of each its outer ring, then those of its holes.

    Pixels that only touch at a corner belong to different parts, so no ring crosses itself. Rings with the mask on
    their left and right, seen along them, are outer ones and holes.

    Returns:
        Rings (n, 2) int64 as (x, y), image pixels; the last vertex is joined to the first. Empty for an empty mask.
    """
    edges = _find_edges(*_column_intervals(rle))
    following = edges.following.tolist()
    ring_of = np.full(len(following), -1)
    part_of: list[int] = []  # of each ring
    parts: list[list[np.ndarray]] = []
    for first in range(len(following)):
        if ring_of[first] >= 0:
            continue
        along, edge = [first], following[first]
        while edge != first:
            along.append(edge)
            edge = following[edge]

        # Edges come by rising x: the first of a ring is its leftmost, and what lies left of a hole is known.
        part = len(parts)
        if not edges.inside_right[first]:
            part = part_of[ring_of[_edge_left_of(first, edges)]]
        else:
            parts.append([])
        ring_of[along] = len(part_of)
        part_of.append(part)
        down = edges.inside_right[along]
        ring = np.where(down[:, None, None], edges.points[along], edges.points[along][:, ::-1])
        parts[part].append(ring.reshape(-1, 2))
    return parts


def join_rings(rings: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon (n, 2) of several rings, by cuts of no width between their nearest vertices.

    It fills what the rings fill by the even-odd rule: formats that know neither holes nor parts hold it.
    """
    polygon = rings[0]
    for ring in rings[1:]:
        nearest = int(np.abs(polygon - ring[0]).sum(axis=1).argmin())
        polygon = np.concatenate([polygon[: nearest + 1], ring, ring[:1], polygon[nearest:]])
    return polygon


def _edge_left_of(edge: int, edges: _Edges) -> int:
    """The nearest edge to the left that crosses the row of another edge's upper end."""
    row = edges.points[edge, 0, 1]
    for stop in range(edge, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        top, bottom = edges.points[start:stop, :, 1].T
        crossing = np.flatnonzero((top <= row) & (row < bottom))
        if len(crossing):
            return start + int(crossing[-1])
    raise AssertionError("a hole lies in a mask, which has an edge on its left")


def _column_intervals(rle: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, first row and end row of all runs of a mask within one column, by rising column and row."""
    height = rle["size"][0]
    ends = np.cumsum(runs_of_rle(rle["counts"]))
    starts, stops = ends[: len(ends) // 2 * 2 : 2], ends[1::2]
    starts, stops = starts[starts < stops], stops[starts < stops]
    apart = starts[1:] != stops[:-1]
    starts, stops = starts[np.r_[True, apart][: len(starts)]], stops[np.r_[apart, True][: len(stops)]]

    first, last = starts // height, (stops - 1) // height
    count = last - first + 1
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... within each run
    column = np.repeat(first, count) + offset
    top = np.where(offset == 0, np.repeat(starts - first * height, count), 0)
    bottom = np.where(column == np.repeat(last, count), np.repeat(stops - last * height, count), height)
    return column, top, bottom


def _find_edges(column: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> _Edges:
    # Each interval has its corners on the lines left and right of its column.
    points = np.stack([np.r_[column, column, column + 1, column + 1], np.r_[top, bottom, top, bottom]], axis=1)
    count = len(column)
    is_right, is_top = np.arange(4 * count) < 2 * count, np.arange(4 * count) // max(count, 1) % 2 == 0
    order = np.lexsort((points[:, 1], points[:, 0]))
    points, is_right, is_top = points[order], is_right[order], is_top[order]

    # Where both columns begin or both end, the border runs straight on; where one begins and one ends, two parts touch.
    double = np.flatnonzero((points[1:] == points[:-1]).all(axis=1))
    straight = double[is_top[double] == is_top[double + 1]]
    kept = np.ones(len(points), dtype=bool)
    kept[straight] = kept[straight + 1] = False
    points, inside_right = points[kept], (is_right == is_top)[kept]
    second = np.zeros(len(kept), dtype=bool)
    second[double + 1] = True
    tie = second[kept] == inside_right  # the upper edge goes to the left where the lower right pixel is inside

    # Along a line through corners, borders connect the first with the second, the third with the fourth, ...
    across = np.lexsort((tie, points[:, 0], points[:, 1]))
    partner = np.empty(len(points), dtype=np.int64)
    partner[across[::2]], partner[across[1::2]] = across[1::2], across[::2]
    inside_right = inside_right[::2]
    ends = np.arange(0, len(points), 2) + inside_right  # down where the mask is on the right
    return _Edges(points.reshape(-1, 2, 2), inside_right, partner[ends] // 2)
