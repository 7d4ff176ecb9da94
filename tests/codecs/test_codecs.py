"""The mask codecs: against scipy's transforms, against the released implementation, and against their own laws."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solq_lab.codecs import dct as dct_module
from solq_lab.codecs.dct import DCTCodec, zigzag

FLOAT32_ROUNDING = 2e-4  # of coefficients up to N = 128, each the sum of N products per axis


def random_masks(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, size, size, generator=torch.Generator().manual_seed(seed)) < 0.5


def walk(size: int) -> list[int]:
    """The zig-zag scan, one step after another: right, down-left to the edge, down, up-right to the edge, ..."""
    row = column = 0
    places = []
    while len(places) < size * size:
        places.append(row * size + column)
        upwards = (row + column) % 2 == 0
        if (upwards and column == size - 1) or (not upwards and row == size - 1):
            row, column = (row + 1, column) if upwards else (row, column + 1)
        elif (upwards and row == 0) or (not upwards and column == 0):
            row, column = (row, column + 1) if upwards else (row + 1, column)
        else:
            row, column = (row - 1, column + 1) if upwards else (row + 1, column - 1)
    return places


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 28])
def test_the_zigzag_walks_the_anti_diagonals_of_every_size_to_the_end(size):
    assert zigzag(size).tolist() == walk(size)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 24), data=st.data())
def test_vectors_are_the_first_coefficients_of_scipys_orthonormal_dct(size, data):
    vector_dim = data.draw(st.integers(1, size**2))
    masks = random_masks(3, size, seed=size)
    spectrum = scipy.fft.dctn(masks.numpy().astype(np.float64), axes=(1, 2), norm="ortho")
    expected = torch.from_numpy(spectrum).flatten(1)[:, walk(size)[:vector_dim]]
    torch.testing.assert_close(DCTCodec(size, vector_dim).encode(masks.double()), expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 24), data=st.data())
def test_decoding_is_scipys_inverse_of_the_zero_filled_spectrum(size, data):
    vector_dim = data.draw(st.integers(1, size**2))
    vectors = torch.randn(3, vector_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    spectrum = np.zeros((3, size * size))
    spectrum[:, walk(size)[:vector_dim]] = vectors.numpy()
    expected = scipy.fft.idctn(spectrum.reshape(3, size, size), axes=(1, 2), norm="ortho")
    decoded = DCTCodec(size, vector_dim).decode(vectors)
    torch.testing.assert_close(decoded, torch.from_numpy(expected), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70), share=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]), data=st.data())
def test_compiled_and_plain_products_agree_and_bits_are_the_binarized_reconstructions(size, share, data):
    codec = DCTCodec(size, data.draw(st.integers(1, min(size**2, 400))))
    masks = torch.rand(3, size, size, generator=torch.Generator().manual_seed(size)) < share
    vectors = codec.encode(masks)
    bits = codec.decode_masks(vectors)
    assert torch.equal(bits, codec.binarize(codec.decode(vectors)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dct_module, "cpu_operator", lambda name: None)
        torch.testing.assert_close(codec.encode(masks), vectors, rtol=0, atol=FLOAT32_ROUNDING)
        torch.testing.assert_close(codec.decode(vectors), codec.decode(vectors.double()).float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.decode(vectors), codec.decode(vectors.double()).float(), rtol=0, atol=1e-5)


def test_vectors_that_are_not_finite_decode_to_the_bits_that_binarize_gives():
    codec, vectors = DCTCodec(16, 30), torch.zeros(4, 30)
    vectors[torch.arange(4), torch.tensor([0, 3, 5, 29])] = torch.tensor([np.nan, np.inf, -np.inf, 1.0])
    assert torch.equal(codec.decode_masks(vectors), codec.binarize(codec.decode(vectors)))


def test_coefficients_are_computed_in_float64_where_float32_products_may_be_rounded():
    codec, masks = DCTCodec(128, 256), random_masks(4, 128)
    exact = codec.encode(masks.double())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(codec.encode(masks), exact.float())
        assert torch.equal(codec.decode(exact.float()), codec.decode(exact.float().double()).float())
    finally:
        torch.set_float32_matmul_precision(before)


def test_binarize_cuts_at_the_middle_of_each_masks_range_and_flat_ones_at_one_half():
    decoded = torch.tensor([[[0.0, 0.2], [0.3, 0.4]], [[0.7, 0.7], [0.7, 0.7]], [[0.3, 0.3], [0.3, 0.3]]])
    drawn = [[[False, False], [True, True]], [[True, True]] * 2, [[False, False]] * 2]
    assert DCTCodec(2, 4).binarize(decoded).tolist() == drawn


@pytest.mark.golden
@pytest.mark.parametrize("size", [64, 128])
def test_golden_parts_dct_vectors_and_masks_are_those_of_the_released_implementation(golden_root: Path, size):
    folder = golden_root / "parts_dct"
    facts = json.loads((folder / "fixture.json").read_text())
    arrays = np.load(folder / "fixture.npz")

    def mask_array(name: str) -> torch.Tensor:
        return torch.from_numpy(np.unpackbits(arrays[f"{name}_{size}"], axis=-1)[..., :size]).bool()

    assert zigzag(size).tolist() == arrays[f"zigzag_{size}"].tolist()
    codec, masks = DCTCodec(size, facts["n_keep"]), mask_array("binary")
    vectors = torch.from_numpy(arrays[f"vectors_{size}"])
    torch.testing.assert_close(codec.encode(masks), vectors, rtol=0, atol=FLOAT32_ROUNDING)

    decoded = codec.decode(vectors)
    spread = torch.stack([decoded.amin((1, 2)), decoded.amax((1, 2))], dim=1)
    torch.testing.assert_close(spread.double(), torch.from_numpy(arrays[f"decoded_range_{size}"]), rtol=0, atol=1e-5)
    assert torch.equal(codec.binarize(decoded), mask_array("decoded"))
    noisy = codec.decode(torch.from_numpy(arrays[f"noisy_vectors_{size}"]))
    assert torch.equal(codec.binarize(noisy), mask_array("noisy_decoded"))

    round_trip = codec.binarize(codec.decode(codec.encode(masks)))
    iou = (round_trip & masks).sum((1, 2)) / (round_trip | masks).sum((1, 2))
    assert iou.tolist() == pytest.approx(facts["iou_after_round_trip"][str(size)], abs=1e-4)
