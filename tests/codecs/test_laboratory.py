"""Smooth, local, contour and learned codes against independent computations."""

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from scipy import ndimage

from solq_lab.bench.scenes import blob_masks
from solq_lab.codecs import autoencoder
from solq_lab.codecs.autoencoder import AutoencoderCodec
from solq_lab.codecs.contour import FourierContourCodec, PolarCodec, fill_contours, longest_contour
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.quantised import STAGES, WORDS, QuantisedCodec
from solq_lab.codecs.reconstruct import box_frame_iou, reconstruct
from solq_lab.codecs.soft import GAIN_OF_THE_LAST, BlurredDCTCodec, DistanceDCTCodec, signed_distance
from solq_lab.codecs.wavelet import HaarCodec, haar_basis


def disc(size: int, radius: float, x: float = 0.5, y: float = 0.5) -> torch.Tensor:
    """(1, size, size) bool; lengths in mask sides."""
    side = (torch.arange(size) + 0.5) / size
    return ((side[None] - x) ** 2 + (side[:, None] - y) ** 2 < radius**2)[None]


def mean_iou(codec, masks: torch.Tensor) -> float:
    return float(box_frame_iou(reconstruct(codec, masks).masks, masks).mean())


def test_the_signed_distance_is_that_of_all_pairs_of_pixels():
    masks = blob_masks(0, count=6, size=9).numpy()
    rows, columns = np.mgrid[:9, :9]
    for mask, found in zip(masks, signed_distance(masks), strict=True):
        for row, column in np.ndindex(9, 9):
            other = mask != mask[row, column]
            nearest = np.hypot(rows - row, columns - column)[other].min(initial=np.inf)
            expected = (nearest - 0.5) * (1 if mask[row, column] else -1)
            if other.any():
                assert found[row, column] == pytest.approx(expected)
            else:
                assert abs(found[row, column]) > 9


def test_the_code_of_the_distance_holds_more_of_an_outline_than_that_of_the_mask():
    masks = blob_masks(1, count=100, size=64)
    assert mean_iou(DistanceDCTCodec(64, 36), masks) > mean_iou(DCTCodec(64, 36), masks) + 0.02


def test_the_blur_is_gaussian_with_mirrored_edges():
    masks, codec = blob_masks(2, count=5, size=64).double(), BlurredDCTCodec(64, 36)
    highest = int((codec.kept // codec.column_basis.shape[0]).max())  # the frequency along one axis, 0 along the other
    sigma = np.sqrt(-2 * np.log(GAIN_OF_THE_LAST)) * 64 / (np.pi * highest)
    blurred = ndimage.gaussian_filter(masks.numpy(), sigma, mode="reflect", axes=(1, 2), truncate=8)
    expected = DCTCodec(64, 36).encode(torch.from_numpy(blurred))
    torch.testing.assert_close(codec.encode(masks), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_haar_matrix_is_orthonormal_with_coarse_rows_first(size):
    basis, scale = haar_basis(size)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
    assert (scale.diff() >= 0).all()


def test_the_first_haar_coefficients_are_averages_over_cells():
    masks = blob_masks(3, count=5, size=16)
    codec = HaarCodec(16, 16)
    cells = masks.double().reshape(5, 4, 4, 4, 4).mean((2, 4))
    decoded = codec.decode(codec.encode(masks.double()))
    torch.testing.assert_close(decoded, cells.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_a_discs_polar_code_is_its_centre_and_its_radius():
    vector = PolarCodec(64, 34).encode(disc(64, 0.3, x=0.45, y=0.6))[0]
    torch.testing.assert_close(vector[:2], torch.tensor([0.45, 0.6]), rtol=0, atol=2e-3)
    torch.testing.assert_close(vector[2:], torch.full((32,), 0.3), rtol=0, atol=1.5 / 64)


@pytest.mark.parametrize("codec", [PolarCodec(64, 66), FourierContourCodec(64, 32)], ids=["polar", "fourier"])
def test_an_outline_holds_a_disc_and_fills_a_ring(codec):
    whole = disc(64, 0.4)
    ring = whole & ~disc(64, 0.2)
    assert mean_iou(codec, whole) > 0.97
    decoded = reconstruct(codec, ring).masks
    assert float(box_frame_iou(decoded, whole)) > 0.97


def test_a_contour_code_keeps_the_largest_of_two_parts():
    large, small = disc(64, 0.2, x=0.3), disc(64, 0.1, x=0.8)
    decoded = reconstruct(FourierContourCodec(64, 32), large | small).masks
    assert float(box_frame_iou(decoded, large)) > 0.95
    assert not (decoded & small).any()


def test_filled_contours_are_those_of_matplotlib():
    random = np.random.default_rng(0)
    angle = np.sort(random.uniform(0, 2 * np.pi, (20, 30)), axis=1)
    radius = random.uniform(2, 14, (20, 30))  # some leave the frame
    contours = np.stack([12 + radius * np.cos(angle), 12 + radius * np.sin(angle)], axis=-1)
    centres = np.stack(np.meshgrid(np.arange(24) + 0.5, np.arange(24) + 0.5), axis=-1).reshape(-1, 2)
    expected = np.stack([Outline(contour).contains_points(centres).reshape(24, 24) for contour in contours])
    assert np.array_equal(fill_contours(torch.from_numpy(contours), 24).bool().numpy(), expected)


def test_the_longest_contour_draws_its_mask_again():
    masks = blob_masks(4, count=30, size=20)
    contours = torch.from_numpy(np.stack([longest_contour(mask) for mask in masks.numpy()]))
    drawn = fill_contours(torch.view_as_real(contours), 20).bool()
    filled = torch.from_numpy(np.stack([_largest_part_without_holes(mask) for mask in masks.numpy()]))
    assert float(box_frame_iou(drawn, filled).min()) > 0.97  # 256 points cut a few corners


def _largest_part_without_holes(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    filled = [ndimage.binary_fill_holes(parts == part) for part in range(1, count + 1)]
    return max(filled, key=np.sum, default=mask)


def test_the_autoencoder_learns_masks_it_has_not_seen(monkeypatch):
    monkeypatch.setattr(autoencoder, "STEPS", 100)
    codec = AutoencoderCodec(32, 32)
    codec.fit(blob_masks(5, count=1000, size=32).split(500), seed=1)
    unseen = blob_masks(6, count=200, size=32)
    assert mean_iou(codec, unseen) > 0.7
    spread = codec.encode(unseen).std(dim=0)
    assert 0.5 < float(spread.median()) < 2
    assert sum(table.nbytes for table in codec.state_dict().values()) < 2**20


def test_tokens_are_the_nearest_words_and_their_sum_is_the_vector():
    masks = blob_masks(7, count=2000, size=16)
    codec = QuantisedCodec(16, 20)
    codec.fit([masks] * 3)
    tokens, vectors = codec.tokens(masks[:50]), DCTCodec(16, 20).encode(masks[:50]).double()
    assert tokens.shape == (50, STAGES)
    rest = vectors
    for stage in range(STAGES):
        words = codec.words[stage].double()
        chosen = words[tokens[:, stage]]
        assert torch.equal(torch.cdist(rest, words).argmin(dim=1), tokens[:, stage])
        rest = rest - chosen
    torch.testing.assert_close(codec.encode(masks[:50]).double(), vectors - rest, rtol=0, atol=1e-4)
    assert tokens.max() < WORDS
    assert mean_iou(codec, masks) > 0.9 * mean_iou(DCTCodec(16, 20), masks)
