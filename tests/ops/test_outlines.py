"""Outlines from run lengths: filled again by pycocotools they give the mask, and scipy counts as many parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_rle
from scipy.ndimage import label

from solq_lab.outlines import join_rings, trace_parts


def rle_of(mask: np.ndarray) -> dict:
    return coco_rle.encode(np.asfortranarray(mask, dtype=np.uint8))


def fill(polygons: list[np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    """By COCO's own rasteriser."""
    rles = coco_rle.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *size)
    return coco_rle.decode(coco_rle.merge(rles)).astype(bool)


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_outlines_filled_again_are_the_mask(height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    parts = trace_parts(rle_of(mask))
    assert len(parts) == label(mask)[1]
    if not mask.any():
        return
    np.testing.assert_array_equal(fill([join_rings(rings) for rings in parts], mask.shape), mask)
    np.testing.assert_array_equal(fill([join_rings([ring for rings in parts for ring in rings])], mask.shape), mask)

    # The shoelace formula: outer rings run one way round and holes the other, and no vertex is superfluous.
    for rings in parts:
        areas = [np.linalg.det(np.stack([ring, np.roll(ring, -1, axis=0)], axis=1)).sum() for ring in rings]
        assert [area < 0 for area in areas] == [True] + [False] * (len(rings) - 1)
        assert all(((ring != np.roll(ring, 1, axis=0)).sum(axis=1) == 1).all() for ring in rings)
    assert (
        sum(len(rings) - 1 for rings in parts) == label(np.pad(~mask, 1, constant_values=True), np.ones((3, 3)))[1] - 1
    )


@pytest.mark.parametrize("counts", [[4, 2, 0, 3, 11], [0, 20], [20], [3, 1, 16, 0]])
def test_any_spelling_of_run_lengths_is_read(counts):
    rle = coco_rle.frPyObjects({"size": [5, 4], "counts": counts}, 5, 4)
    mask = coco_rle.decode(rle).astype(bool)
    polygons = [join_rings(rings) for rings in trace_parts(rle)]
    assert polygons or not mask.any()
    if polygons:
        np.testing.assert_array_equal(fill(polygons, mask.shape), mask)
