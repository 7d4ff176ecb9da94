"""The map of masks, neighbours and the way between two masks."""

import io
import re
from base64 import b64decode
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from solq_lab.bench.scenes import blob_masks
from solq_lab.codecs.dct import DCTCodec
from solq_lab.viz.mask_map import mask_map, neighbours, project, save_way
from solq_lab.viz.style import colours_of

CODEC = DCTCodec(16, 30)
MASKS = blob_masks(0, count=20, size=16)
VECTORS = CODEC.encode(MASKS)
NAMES = ["cat & <dog>", *["leaf"] * 19]


def test_the_map_shows_the_two_main_directions():
    places, share = project(VECTORS)
    oracle = PCA(2, svd_solver="full").fit(VECTORS.numpy())
    expected = oracle.transform(VECTORS.numpy())
    np.testing.assert_allclose(places.abs(), np.abs(expected), atol=1e-4)  # signs are arbitrary
    assert share == pytest.approx(oracle.explained_variance_ratio_.sum(), abs=1e-5)


def test_pointing_at_an_object_shows_its_own_mask():
    svg = mask_map(project(VECTORS)[0], MASKS, NAMES, colours_of(map(NAMES.index, NAMES)))
    tree = ElementTree.fromstring(svg)
    points = tree.findall(".//{*}g[@class='point']")
    assert len(points) == 20
    assert points[0].find("{*}text").text == "cat & <dog>"
    for point, mask in zip(points, MASKS, strict=True):
        data = b64decode(point.find("{*}image").get("href").split(",")[1])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), mask.numpy())
    fills = re.findall(r'fill="(#[0-9A-F]{6})"', svg)
    assert len(set(fills)) == 2


def test_neighbours_are_the_nearest_vectors():
    figure = neighbours(VECTORS, MASKS, [str(index) for index in range(20)], [3, 7], count=4)
    panels = [axes.get_title().split("\n")[0] for axes in figure.axes]
    for row, index in enumerate((3, 7)):
        expected = torch.cdist(VECTORS[index][None], VECTORS)[0].argsort()[:5].tolist()
        assert panels[5 * row : 5 * row + 5] == [str(place) for place in expected]


def test_the_way_starts_at_one_mask_ends_at_the_other_and_comes_back(tmp_path):
    save_way(CODEC, VECTORS[[3, 7]], tmp_path / "new" / "way.gif", frames=6, side=16)
    with Image.open(tmp_path / "new" / "way.gif") as way:
        frames = []
        for index in range(way.n_frames):
            way.seek(index)
            frames.append(np.asarray(way.convert("L")) > 127)
        assert max(way.convert("L").getextrema()) < 255  # not as white as the page
    ends = CODEC.decode_masks(VECTORS[[3, 7]]).numpy()
    assert np.array_equal(frames[0], ends[0])
    assert any(np.array_equal(frame, ends[1]) for frame in frames)
    assert np.array_equal(frames[-1], ends[0])
