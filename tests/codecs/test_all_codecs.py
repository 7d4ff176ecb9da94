"""The laws that all mask codecs share, and the fitted and the flat one against independent computations."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, sparse_encode

from solq_lab.bench.scenes import blob_masks
from solq_lab.codecs.base import FittedCodec, MaskCodec
from solq_lab.codecs.contour import PolarCodec
from solq_lab.codecs.dct import DCTCodec
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.codecs.pca import MAX_LABEL_NOISE, MIN_LABEL_NOISE, PCACodec, noise_moments
from solq_lab.codecs.sparse import SparseCodingCodec, duality_gap

SOFT = ["dct_blur", "dct_distance", "haar", "polar", "fourier", "autoencoder", "rvq"]
KINDS = ["dct", "learned dct", "pca", "centered", "released", "sparse", "flatten", *SOFT]
FITTED = ["pca", "centered", "released", "sparse", "autoencoder", "rvq"]
LINEAR_ENCODERS = ["dct", "learned dct", "pca", "flatten", "dct_blur", "haar"]
LINEAR_DECODERS = [*LINEAR_ENCODERS, "sparse", "dct_distance", "rvq"]
FLOAT32_ROUNDING = 1e-4  # of vectors up to a few hundred in size; the tables are float32

examples = settings(max_examples=15, deadline=None)


def new(kind: str, size: int, vector_dim: int) -> MaskCodec:
    match kind:
        case "dct":
            return DCTCodec(size, vector_dim)
        case "learned dct":
            return CODECS["dct"].build(size, vector_dim, learn_decoder=True)
        case "pca":
            return PCACodec(size, vector_dim)
        case "centered":
            return PCACodec(size, vector_dim, centered=True, whitened=True)
        case "released":
            return PCACodec.released(size, vector_dim)
        case "sparse":
            return SparseCodingCodec(size, vector_dim, beta=0.1)
        case "flatten":
            return FlattenCodec(size, math.isqrt(vector_dim) ** 2)
        case "polar":
            return PolarCodec(size, max(vector_dim, 3))
    return CODECS[kind].build(size, vector_dim)


def fitted(kind: str, size: int, vector_dim: int, masks: torch.Tensor) -> MaskCodec:
    codec = new(kind, size, vector_dim).eval()
    codec.fit(masks.split(7 if kind != "autoencoder" else len(masks)))  # which takes many steps on each batch
    return codec


def draw_masks(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random shapes with an empty mask, a full one and a single cell among them."""
    masks = blob_masks(seed, count=count, size=size)
    masks[0], masks[1], masks[2] = False, True, False
    masks[2, size // 2, size // 3] = True
    return masks


sizes = st.integers(2, 13)


@pytest.mark.parametrize("kind", KINDS)
@examples
@given(size=sizes, data=st.data())
def test_vectors_and_reconstructions_have_their_sizes_and_are_finite_for_any_mask(kind, size, data):
    masks = draw_masks(9, size)
    codec = fitted(kind, size, data.draw(st.integers(1, size**2)), masks)
    vectors = codec.encode(masks)
    assert vectors.shape == (9, codec.vector_dim)
    assert vectors.dtype == torch.float32
    decoded = codec.decode(vectors)
    assert decoded.shape == codec.binarize(decoded).shape == (9, size, size)
    assert vectors.isfinite().all()
    assert decoded.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_masks_give_no_vectors_and_no_vectors_no_masks(kind):
    codec = fitted(kind, 7, 16, draw_masks(20, 7))
    assert codec.encode(torch.zeros(0, 7, 7, dtype=torch.bool)).shape == (0, 16)
    decoded = codec.decode(torch.zeros(0, 16))
    assert decoded.shape == codec.binarize(decoded).shape == (0, 7, 7)


@pytest.mark.parametrize("kind", LINEAR_ENCODERS)
@examples
@given(size=sizes, data=st.data())
def test_encoding_is_linear(kind, size, data):
    codec = fitted(kind, size, data.draw(st.integers(1, size**2)), draw_masks(9, size))
    first, second = torch.rand(2, 4, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    mixed = codec.encode(2 * first - 3 * second)
    torch.testing.assert_close(mixed, 2 * codec.encode(first) - 3 * codec.encode(second))


@pytest.mark.parametrize("kind", LINEAR_DECODERS)
@examples
@given(size=sizes, data=st.data())
def test_decoding_is_linear(kind, size, data):
    codec = fitted(kind, size, data.draw(st.integers(1, size**2)), draw_masks(9, size))
    generator = torch.Generator().manual_seed(size)
    first, second = torch.randn(2, 4, codec.vector_dim, dtype=torch.float64, generator=generator)
    mixed = codec.decode(2 * first - 3 * second)
    torch.testing.assert_close(mixed, 2 * codec.decode(first) - 3 * codec.decode(second))


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_decoded_masks_are_those_of_the_vectors_of_isometric_codecs_alone(kind):
    masks = blob_masks(2, count=12, size=16)
    codec = fitted(kind, 16, 9, masks)
    vectors = torch.randn(len(masks), codec.vector_dim, dtype=torch.float64)
    decoded, targets = codec.decode(vectors).flatten(1), codec.encode(masks).double()
    products = (decoded * masks.flatten(1)).sum(1), decoded.square().sum(1)
    if codec.isometric:
        torch.testing.assert_close(products[0], (vectors * targets).sum(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(products[1], vectors.square().sum(1))
    assert codec.isometric == (kind in ("dct", "haar"))


@pytest.mark.parametrize("kind", ["dct", "pca", "centered", "flatten"])
@examples
@given(size=sizes)
def test_nothing_is_lost_when_nothing_is_cut(kind, size):
    masks = draw_masks(9, size)
    codec = fitted(kind, size, size**2, masks)
    torch.testing.assert_close(codec.decode(codec.encode(masks)), masks.float(), rtol=0, atol=1e-4)


def test_the_released_codec_loses_no_cell_of_its_training_masks_when_nothing_is_cut():
    masks = draw_masks(30, 8)
    codec = fitted("released", 8, 64, masks)
    assert torch.equal(codec.binarize(codec.decode(codec.encode(masks))), masks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masks_vector_does_not_depend_on_its_batch(kind):
    masks = draw_masks(40, 11).double()  # float32's rounding decides when the sparse solver finds a code good enough
    codec = fitted(kind, 11, 25, masks.bool())
    vectors = codec.encode(masks)
    alone = torch.cat([codec.encode(mask.unsqueeze(0)) for mask in masks])
    torch.testing.assert_close(vectors, alone)
    decoded_alone = torch.cat([codec.decode(vector.unsqueeze(0)) for vector in vectors])
    torch.testing.assert_close(codec.decode(vectors), decoded_alone)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_number(kind):
    masks = draw_masks(12, 9)
    codec = fitted(kind, 9, 16, masks)
    vectors = codec.encode(masks)
    decoded = codec.decode(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(masks), vectors)
        assert torch.equal(codec.decode(vectors), decoded)


@pytest.mark.parametrize("kind", KINDS)
def test_bool_and_float_masks_have_the_same_vectors_and_decoding_keeps_the_type(kind):
    masks = draw_masks(12, 9)
    codec = fitted(kind, 9, 16, masks)
    torch.testing.assert_close(codec.encode(masks), codec.encode(masks.float()), rtol=0, atol=1e-5)
    assert codec.encode(masks.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert codec.decode(torch.zeros(2, 16, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fourier"])  # which fills what it draws
def test_decoding_and_linear_encoding_are_differentiable(kind):
    codec = fitted(kind, 5, 9, draw_masks(12, 5))
    vectors = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.autograd.gradcheck(codec.decode, vectors)
    if kind in LINEAR_ENCODERS:
        masks = torch.rand(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.autograd.gradcheck(codec.encode, masks)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_the_numbers_of_the_cpu(kind):
    masks = draw_masks(30, 15)
    codec = fitted(kind, 15, 36, masks)
    there = copy.deepcopy(codec).to("cuda")
    vectors = codec.encode(masks)
    rounding = 1e-3 if kind == "sparse" else FLOAT32_ROUNDING  # steps end within a tolerance, rounding says where
    torch.testing.assert_close(there.encode(masks.cuda()).cpu(), vectors, rtol=0, atol=rounding)
    torch.testing.assert_close(there.decode(vectors.cuda()).cpu(), codec.decode(vectors), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_to_bits_is_decoding_and_cutting_under_both_rules(kind):
    masks = draw_masks(20, 9)
    codec = fitted(kind, 9, 16, masks)
    vectors = codec.encode(masks) + 0.1 * torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    for codec.threshold in ("middle", "half"):
        assert torch.equal(codec.decode_masks(vectors), codec.binarize(codec.decode(vectors)))


# Masks at the edge


@pytest.mark.parametrize("kind", [*LINEAR_ENCODERS, "sparse"])
def test_an_empty_mask_is_the_zero_vector_and_comes_back_empty_under_both_rules(kind):
    codec, empty = fitted(kind, 9, 16, draw_masks(20, 9)), torch.zeros(1, 9, 9, dtype=torch.bool)
    vector = codec.encode(empty)
    assert not vector.any()
    for codec.threshold in ("middle", "half"):
        assert not codec.binarize(codec.decode(vector)).any()


@pytest.mark.parametrize("codec", [FlattenCodec(9, 16), DCTCodec(9, 16), DCTCodec(128, 256)])
@pytest.mark.parametrize("threshold", ["middle", "half"])
def test_a_full_mask_comes_back_full_under_both_rules(codec, threshold):
    codec.threshold = threshold
    vector = codec.encode(torch.ones(1, codec.mask_size, codec.mask_size, dtype=torch.bool))
    assert codec.binarize(codec.decode(vector)).all()
    assert codec.decode_masks(vector).all()


def test_an_unknown_threshold_is_rejected_with_the_known_ones():
    codec = DCTCodec(4, 4)
    codec.threshold = "otsu"
    with pytest.raises(ValueError, match="threshold 'otsu': allowed are 'middle' and 'half'"):
        codec.binarize(torch.zeros(1, 4, 4))


@pytest.mark.parametrize(
    ("kind", "size", "vector_dim"), [*((kind, 8, 81) for kind in KINDS), ("dct", 8, 0), ("dct", 0, 1)]
)
def test_sizes_that_do_not_fit_are_rejected_with_what_is_allowed(kind, size, vector_dim):
    with pytest.raises(ValueError, match=rf"vector_dim {vector_dim} does not fit mask_size {size}: allowed are 1\.\."):
        new(kind, size, vector_dim)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_rejected_with_the_expected_ones(kind):
    codec = fitted(kind, 8, 9, draw_masks(12, 8))
    with pytest.raises(ValueError, match=r"masks have shape \(2, 9, 8\), expected \(K, 8, 8\)"):
        codec.encode(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match=r"mask vectors have shape \(2, 11\), expected \(K, 9\)"):
        codec.decode(torch.zeros(2, 11))


@pytest.mark.parametrize("kind", FITTED)
def test_a_codec_without_tables_refuses_to_work_and_says_how_to_get_them(kind):
    codec = new(kind, 8, 9)
    for attempt in (lambda: codec.encode(torch.zeros(1, 8, 8)), lambda: codec.decode(torch.zeros(1, 9))):
        with pytest.raises(ValueError, match=r"has no tables yet: fit it .*solq-lab fit-codec.* or load them"):
            attempt()
    with pytest.raises(ValueError, match="cannot be fitted to no masks at all"):
        codec.fit([torch.zeros(0, 8, 8, dtype=torch.bool)])
    codec.load_state_dict(new(kind, 8, 9).state_dict())
    assert not codec.fitted


@pytest.mark.parametrize("kind", FITTED)
def test_tables_travel_in_a_state_dict_and_in_a_copy(kind):
    masks = draw_masks(20, 8)
    codec = fitted(kind, 8, 9, masks)
    other = new(kind, 8, 9).eval()
    other.load_state_dict(codec.state_dict())
    for one in (other, copy.deepcopy(codec)):
        assert one.fitted
        assert torch.equal(one.encode(masks), codec.encode(masks))


@pytest.mark.parametrize("kind", ["dct", "flatten", "dct_blur", "dct_distance", "haar", "polar", "fourier"])
def test_a_state_dict_holds_no_tables_that_follow_from_the_sizes(kind):
    assert not isinstance(new(kind, 8, 9), FittedCodec)
    assert new(kind, 8, 9).state_dict() == {}


@pytest.mark.parametrize("kind", FITTED)
def test_fewer_masks_than_numbers_still_make_a_code(kind):
    masks = draw_masks(5, 8)
    codec = fitted(kind, 8, 40, masks)
    assert codec.encode(masks).isfinite().all()
    if kind in ("pca", "centered", "released"):
        assert torch.equal(codec.binarize(codec.decode(codec.encode(masks)))[2:], masks[2:])


# Principal components


def test_the_components_are_those_of_a_singular_value_decomposition():
    cells = (masks := blob_masks(1, count=300, size=12)).flatten(1).double()
    codec = fitted("pca", 12, 20, masks)
    _, _, components = torch.linalg.svd(cells, full_matrices=False)
    projected = cells @ components[:20].T @ components[:20]
    torch.testing.assert_close(codec.decode(codec.encode(masks.double())).flatten(1), projected, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.components @ codec.components.T, torch.eye(20), rtol=0, atol=1e-5)


def test_centered_and_whitened_vectors_are_those_of_scikit_learn():
    masks = blob_masks(2, count=300, size=12)
    codec, cells = fitted("centered", 12, 20, masks), masks.flatten(1).double().numpy()
    oracle = PCA(20, whiten=True, svd_solver="full").fit(cells)
    signs = np.sign((oracle.components_ * codec.components.numpy()).sum(axis=1))  # those of a component are arbitrary
    np.testing.assert_allclose(codec.encode(masks).numpy(), oracle.transform(cells) * signs, atol=1e-4)
    decoded = codec.decode(codec.encode(masks)).flatten(1).numpy()
    np.testing.assert_allclose(decoded, oracle.inverse_transform(oracle.transform(cells)), atol=1e-5)


def test_a_stream_of_more_masks_than_rows_are_kept_explains_as_much_as_all_of_them_at_once():
    masks = blob_masks(3, count=1500, size=24)
    codec = PCACodec(24, 8, centered=True)
    codec.fit(masks.split(100))
    assert 2 * 8 + 256 < 24 * 24  # so rows were let go
    cells = masks.flatten(1).numpy()
    best = PCA(8, svd_solver="full").fit(cells).explained_variance_.sum()
    kept = ((cells - cells.mean(0)) @ codec.components.numpy().T).var(axis=0, ddof=1).sum()
    assert 0.9999 * best < kept <= best * (1 + 1e-6)


def test_the_released_tables_are_those_of_logits_with_drawn_doubt():
    masks = blob_masks(4, count=4000, size=6)
    codec = fitted("released", 6, 5, masks)
    random = np.random.default_rng(0)
    doubt = np.maximum(MIN_LABEL_NOISE, MAX_LABEL_NOISE * random.random((4000, 36)))
    logits = np.where(masks.flatten(1).numpy(), np.log((1 - doubt) / doubt), np.log(doubt / (1 - doubt)))
    oracle = PCA(5, svd_solver="full").fit(logits)
    np.testing.assert_allclose(codec.scale.numpy(), np.sqrt(oracle.explained_variance_), rtol=0.01)
    np.testing.assert_allclose(codec.mean.numpy(), oracle.mean_, atol=0.05)
    kept = ((logits - logits.mean(0)) @ codec.components.numpy().T).var(axis=0, ddof=1).sum()
    assert kept > 0.995 * oracle.explained_variance_.sum()


def test_the_moments_of_the_doubt_are_those_of_many_draws():
    doubt = np.maximum(MIN_LABEL_NOISE, MAX_LABEL_NOISE * np.random.default_rng(0).random(1_000_000))
    logits = np.log((1 - doubt) / doubt)
    assert noise_moments() == pytest.approx((logits.mean(), logits.std()), abs=3e-3)


def test_in_training_the_released_codec_draws_its_doubt_around_the_vector_it_gives_otherwise():
    masks = draw_masks(20, 8)
    codec = fitted("released", 8, 9, masks)
    calm = codec.encode(masks)
    assert torch.equal(calm, codec.encode(masks))
    codec.train()
    torch.manual_seed(0)
    draws = torch.stack([codec.encode(masks) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(dim=0) / math.sqrt(400)
    assert ((draws.mean(dim=0) - calm).abs() < 5 * error + 1e-5).all()


def test_the_released_codec_names_its_loss_and_rule():
    codec = PCACodec.released()
    assert (codec.mask_size, codec.vector_dim, codec.loss, codec.threshold) == (28, 60, "l2_dice", "half")
    assert (PCACodec(8, 4).loss, SparseCodingCodec(8, 4).loss, FlattenCodec().loss) == ("l1", "l1", "l2_dice")


# Sparse coding


@pytest.fixture(scope="module")
def dictionary() -> SparseCodingCodec:
    codec = SparseCodingCodec(10, 30, beta=0.5, tolerance=1e-9)
    codec.fit(blob_masks(5, count=600, size=10).split(200))
    return codec


def objective(cells: torch.Tensor, atoms: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return (cells - code @ atoms).square().sum(1) / 2 + 0.5 * code.abs().sum(1)


def test_the_atoms_have_length_one(dictionary):
    torch.testing.assert_close(dictionary.atoms.norm(dim=1), torch.ones(30))


def test_codes_are_those_of_scikit_learns_lasso(dictionary):
    masks = draw_masks(40, 10, seed=6)
    cells, atoms = masks.flatten(1).double(), dictionary.atoms.double()
    codes = dictionary.encode(masks.double())
    oracle = sparse_encode(cells.numpy(), atoms.numpy(), algorithm="lasso_cd", alpha=0.5, max_iter=100_000)
    np.testing.assert_allclose(codes.numpy(), oracle, atol=1e-3)  # scikit-learn stops at a gap of 1e-4 ||m||^2
    assert (objective(cells, atoms, codes) <= objective(cells, atoms, torch.from_numpy(oracle)) + 1e-6).all()


def test_the_gap_bounds_how_far_a_codec_is_from_the_minimum(dictionary):
    cells, atoms = draw_masks(20, 10, seed=8).flatten(1).double(), dictionary.atoms.double()
    best = dictionary.encode(cells.unflatten(1, (10, 10)))
    poor = 0.7 * best + 0.1
    gap = duality_gap(poor, cells @ atoms.T, atoms @ atoms.T, cells.square().sum(1), beta=0.5)
    assert (gap >= objective(cells, atoms, poor) - objective(cells, atoms, best) - 1e-9).all()


def test_a_dearer_coefficient_leaves_fewer_of_them():
    masks = blob_masks(9, count=200, size=10)
    codec = fitted("sparse", 10, 30, masks)
    counts = []
    for codec.beta in (0.05, 0.5, 5.0):
        counts.append(int((codec.encode(masks) != 0).sum()))
    assert counts[0] > counts[1] > counts[2]


@pytest.mark.parametrize("arguments", [{"beta": 0.0}, {"tolerance": -1.0}])
def test_prices_and_tolerances_that_are_not_positive_are_rejected(arguments):
    with pytest.raises(ValueError, match="allowed are positive numbers"):
        SparseCodingCodec(8, 4, **arguments)


def test_fitting_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.decomposition", None)
    with pytest.raises(ValueError, match=r"needs scikit-learn: pip install 'solq-lab\[sparse\]'"):
        SparseCodingCodec(8, 4).start_fit()


# Flatten


@examples
@given(size=sizes, data=st.data())
def test_a_coarser_grid_averages_and_interpolates_as_torch_does(size, data):
    side = data.draw(st.integers(1, size))
    codec, masks = FlattenCodec(size, side**2), draw_masks(6, size)
    if size % side == 0:  # elsewhere adaptive pooling lets cells overlap
        pooled = F.adaptive_avg_pool2d(masks.float()[:, None], side).flatten(1)
        torch.testing.assert_close(codec.encode(masks), pooled)
    vectors = torch.rand(6, side**2, generator=torch.Generator().manual_seed(size))
    larger = F.interpolate(vectors.view(6, 1, side, side), size=size, mode="bilinear", align_corners=False).squeeze(1)
    torch.testing.assert_close(codec.decode(vectors), larger)
    torch.testing.assert_close(codec.encode(masks).mean(dim=1), masks.float().mean(dim=(1, 2)))


def test_a_grid_that_is_no_square_is_rejected_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"vector_dim 200 is no square number.*the nearest are 196 and 225"):
        FlattenCodec(28, 200)
