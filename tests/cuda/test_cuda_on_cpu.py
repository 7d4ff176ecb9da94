"""The CUDA kernels and their bindings, emulated on the CPU under sanitizers, for machines without a GPU.

`fake_gpu_kernels.py` builds them, `cuda_on_cpu/` replaces the CUDA toolkit. Speed is not tested here.
"""

import itertools

import pytest
import torch
from attention_arguments import example
from fake_gpu_kernels import BINDINGS, KERNELS, KernelFault, build, emulated, kernels_for_the_cpu, reason_against

from solq_lab.ops.ms_deform_attn import _reference_backward, _reference_forward

TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUNDINGS = 64  # a result may miss by, in the type of sums: of its tensor's largest number, as numbers cancel in sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's libraries are built, if they can be."""
    if reason := reason_against():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(scope="module")
def gpu(folder):
    """A GPU of the present generation that watches every address."""
    with emulated(build(folder, guard="memory", architecture=900)) as gpu:
        yield gpu


def flat(shapes):
    return [side for shape in shapes for side in shape]


def outcome(gpu, value, shapes, locations, weights, *, order=0, deterministic=False):
    """The output and the three gradients, as the kernels compute them."""
    arguments = (value, flat(shapes), locations, weights)
    options = {"order": order, "deterministic": deterministic}
    output = gpu.call("ms_deform_attn_cuda", *arguments, **options)
    return [output, *gpu.call("ms_deform_attn_backward_cuda", slope(output), *arguments, **options)]


def slope(output):
    """One random gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def expected_outcome(value, shapes, locations, weights):
    """The same of the reference, with all its arithmetic in float64."""
    exact = (value.double(), flat(shapes), locations.double(), weights.double())
    output = _reference_forward(*exact)
    return [output, *_reference_backward(slope(output.to(value.dtype)).double(), *exact)]


def assert_like_the_reference(gpu, arguments, **options):
    actual = outcome(gpu, *arguments, **options)
    value, _, locations, weights = arguments
    for ours, theirs, like in zip(
        actual, expected_outcome(*arguments), (value, value, locations, weights), strict=True
    ):
        assert ours.dtype == like.dtype
        unit = torch.finfo(locations.dtype).eps
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(
            ours.double(), theirs, rtol=torch.finfo(ours.dtype).eps / 2, atol=ROUNDINGS * unit * largest
        )


def assert_both_ways_like_the_reference(gpu, arguments):
    assert_like_the_reference(gpu, arguments)
    assert_like_the_reference(gpu, arguments, deterministic=True)


def assert_bit_equal(first, second):
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", TYPES)
def test_output_and_gradients_equal_the_reference_in_every_type(gpu, dtype):
    for width, points in itertools.product((5, 20, 32, 40, 48, 64), (4, 2)):
        arguments = example(width=width, points=points, queries=9, dtype=dtype, seed=width)
        assert_like_the_reference(gpu, arguments, order=width)


@pytest.mark.parametrize("dtype", TYPES)
def test_deterministic_gradients_equal_the_reference_and_know_no_order_of_threads(gpu, dtype):
    for width, points in ((5, 4), (20, 4), (32, 4), (48, 4), (64, 4), (48, 3)):
        # Few cells and many samples: every cell gets the gradients of many threads.
        arguments = example(shapes=((3, 4), (2, 1)), width=width, points=points, queries=37, dtype=dtype, seed=width)
        assert_like_the_reference(gpu, arguments, deterministic=True)
        first = outcome(gpu, *arguments, deterministic=True)
        for order in (1, 2):
            assert_bit_equal(outcome(gpu, *arguments, order=order, deterministic=True), first)


def test_the_order_of_threads_is_seen_without_determinism(gpu):
    arguments = example(shapes=((3, 4), (2, 1)), width=48, queries=100)
    first = outcome(gpu, *arguments)
    others = [outcome(gpu, *arguments, order=order) for order in (1, 2, 3)]
    assert any(not torch.equal(other[1], first[1]) for other in others)
    for other in others:
        assert_bit_equal([other[0], *other[2:]], [first[0], *first[2:]])  # these have one writer each


@pytest.mark.parametrize("empty", ["batch", "queries", "points", "width", "heads"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_sizes_give_empty_or_zero_tensors(gpu, empty, deterministic):
    arguments = example(**{"width": 32, empty: 0})
    for ours, theirs in zip(
        outcome(gpu, *arguments, deterministic=deterministic), expected_outcome(*arguments), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("shapes", [[(0, 3)], [(0, 0), (5, 0)], [(0, 4), (3, 2), (1, 0)], [(1, 1)]])
def test_levels_without_cells_count_as_zero(gpu, shapes, deterministic):
    assert_like_the_reference(gpu, example(shapes=shapes, width=32), deterministic=deterministic)


def on_grid(positions, *, sides=(4, 8), dtype=torch.float32):
    """Samples of one level at all pairs of these positions, exact in every type: 0 and 1 are the borders of the map."""
    places = torch.tensor(list(itertools.product(positions, repeat=2)), dtype=dtype)
    value, shapes, _, _ = example(shapes=[sides], batch=1, heads=2, width=32, dtype=dtype)
    locations = places.view(1, 1, 1, 1, -1, 2).expand(1, 3, 2, 1, len(places), 2).contiguous()
    weights = torch.rand(locations.shape[:-1], generator=torch.Generator().manual_seed(3), dtype=dtype)
    return value, shapes, locations, weights


def test_samples_on_borders_and_on_the_centres_of_cells_equal_the_reference(gpu):
    assert_like_the_reference(gpu, on_grid([0.0, 0.0625, 0.125, 0.1875, 0.5, 0.875, 0.9375, 1.0]))


def test_samples_one_cell_beyond_the_map_and_farther_touch_nothing(gpu):
    value, shapes, locations, weights = on_grid([-0.125, 1.125, -1.0, 3e8, -3e38, torch.inf, -torch.inf, torch.nan])
    for tensor in outcome(gpu, value, shapes, locations, weights):
        assert not tensor.any()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_view_at_an_odd_offset_and_strides_of_any_kind_are_taken(gpu, deterministic):
    arguments = value, shapes, locations, weights = example(width=32)
    slopes = slope(torch.empty(2, 5, 96))

    def odd(tensor):
        return torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    def strided(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    expected = gpu.call("ms_deform_attn_backward_cuda", slopes, value, flat(shapes), locations, weights)
    expected_output = gpu.call("ms_deform_attn_cuda", value, flat(shapes), locations, weights)
    for changed in (odd, strided):
        views = [changed(tensor) for tensor in (slopes, value, locations, weights)]
        moved = (*views[:2], flat(shapes), *views[2:])
        assert_bit_equal([gpu.call("ms_deform_attn_cuda", *moved[1:])], [expected_output])
        for ours, theirs in zip(
            gpu.call("ms_deform_attn_backward_cuda", *moved, deterministic=deterministic), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    flat_slope = torch.ones(1).expand(2, 5, 96)  # the gradient of a sum
    for tensor in gpu.call("ms_deform_attn_backward_cuda", flat_slope, *arguments[:1], flat(shapes), *arguments[2:]):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_numbers_round_as_torch_rounds_them(gpu, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    centre = torch.full((1, 1, 1, 1, 1, 2), 0.5)

    def scaled(factor):
        weights = torch.full((1, 1, 1, 1, 1), factor)
        return gpu.call("ms_deform_attn_cuda", every.view(1, 1, 1, -1), [1, 1], centre, weights).flatten()

    for factor in (1.0, 1 / 3, 0.5, 2**-9, 3.0):
        torch.testing.assert_close(scaled(factor), (every.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_deterministic_gradients_of_bad_numbers_are_bad_numbers(gpu):
    value, shapes, locations, weights = example(width=32)
    for bad in (torch.inf, torch.nan):
        slopes = torch.full((2, 5, 96), bad)
        gradient, *_ = gpu.call(
            "ms_deform_attn_backward_cuda", slopes, value, flat(shapes), locations, weights, deterministic=True
        )
        assert not gradient.isfinite().any(), "a scaler of losses looks for these"


@pytest.mark.parametrize(
    ("dtype", "gradient", "weight"),
    [
        (torch.float32, 1e30, 1e30),  # a product beyond float32, though each factor is within
        (torch.float32, 1e-20, 1e-10),
        (torch.float64, 1e200, 1e-200),
        (torch.float64, 1e-150, 1e-150),  # a product whose best unit would be beyond float64
    ],
)
def test_deterministic_sums_of_huge_and_tiny_products_are_those_of_floating_point(gpu, dtype, gradient, weight):
    value = torch.ones(1, 1, 1, 4, dtype=dtype)
    centres = torch.full((1, 2, 1, 1, 1, 2), 0.5, dtype=dtype)
    weights, gradients = torch.full((1, 2, 1, 1, 1), weight, dtype=dtype), torch.full((1, 2, 4), gradient, dtype=dtype)
    arguments = (gradients, value, [1, 1], centres, weights)
    plain, *_ = gpu.call("ms_deform_attn_backward_cuda", *arguments)
    orderless, *_ = gpu.call("ms_deform_attn_backward_cuda", *arguments, deterministic=True)
    torch.testing.assert_close(orderless, plain, rtol=1e-6, atol=0)


def too_much():
    value, _, locations, weights = example(batch=1, heads=1, queries=1, points=1, shapes=[(1, 1)])
    levels = example(batch=1, shapes=[(1, 1)] * 9)
    # Strides of zero: tensors of any size that fill no memory.
    images = value.expand(65536, 1, 1, 8), [1, 1], locations.expand(65536, -1, -1, -1, -1, -1)
    cells = value.expand(1, 2**26, 1, 8), [2**13, 2**13], locations, weights
    queries = value, [1, 1], locations.expand(1, 2**26, 1, 1, 1, 2), weights.expand(1, 2**26, 1, 1, 1)
    return {
        r"at most 8 levels, got 9": (levels[0], flat(levels[1]), *levels[2:]),
        r"at most 65535 images times heads, got 65536 x 1": (*images, weights.expand(65536, -1, -1, -1, -1)),
        r"value \[1, 67108864, 1, 8\] has 2\^29 numbers per image or more": cells,
        r"too many queries: 67108864 of 8 channels": queries,
        r"must be Float for values of type Float, got Double": (value, [1, 1], locations.double(), weights),
        r"value must be float64, .* got Int": (value.int(), [1, 1], locations, weights),
    }


@pytest.mark.parametrize("message", too_much())
def test_what_the_kernels_cannot_count_is_rejected(gpu, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        gpu.call("ms_deform_attn_cuda", *too_much()[message])


def test_a_launch_that_is_not_understood_is_rejected():
    with pytest.raises(ValueError, match="1 of 2 kernel launches were understood"):
        kernels_for_the_cpu("one<1><<<2, 32, 0, stream>>>(3); (which ? one<1> : two<2>)<<<2, 32, 0, stream>>>(3);")


@pytest.mark.slow
@pytest.mark.parametrize(("guard", "architecture"), [("memory", 800), ("memory", 900), ("races", 900)])
def test_every_size_and_type_equals_the_reference(folder, guard, architecture):
    with emulated(build(folder, guard=guard, architecture=architecture)) as gpu:
        for dtype, width, points in itertools.product(TYPES, (5, 20, 32, 40, 48, 64, 130), (1, 2, 4, 5, 8)):
            seed = width + points
            sizes = {"batch": 1 + 2 * (seed % 2), "heads": 1 + seed % 3, "queries": (1, 7, 11)[points % 3]}
            levels = 1 + seed % 6
            shapes = [(9 - level, 11 - level) for level in range(levels)]
            arguments = example(shapes=shapes, width=width, points=points, dtype=dtype, seed=seed, **sizes)
            assert_like_the_reference(gpu, arguments, order=seed)
            if points in (4, 5):  # one with kernels of its own, one without
                assert_like_the_reference(gpu, arguments, order=seed, deterministic=True)
        shapes = ((20, 30), (10, 15), (5, 8), (3, 4))
        assert_like_the_reference(gpu, example(shapes=shapes, width=48, queries=300, heads=2), order=1)


MUTANTS = {
    "threads beyond the last query go on": (
        "memory",
        (KERNELS, "if (query >= problem.queries) return;", ""),
        "heap-buffer-overflow",
    ),
    "a lane leaves before its shuffle": (
        "memory",
        (KERNELS, "  sums.prepare();\n\n  // Where", "  if (!real_query) return;\n  // Where"),
        r"block .*, a shuffle without all lanes: thread \d+ has ended, thread \d+ waits",
    ),
    "odd addresses are taken as they are": (
        "memory",
        (BINDINGS, "% 16 == 0 ? dense", "% 16 < 16 ? dense"),
        "misaligned address",
    ),
    "the last query's output is not written": (
        "memory",
        (KERNELS, "if (query >= problem.queries) return;", "if (query + 1 >= problem.queries) return;"),
        "Tensor-likes are not close",
    ),
    "sums over half of the lanes": (
        "memory",
        (KERNELS, "int distance = kGroup / 2;", "int distance = kGroup / 4;"),
        "not close",
    ),
    "threads beyond the last query write its gradients": (
        "races",
        (KERNELS, "if (real_query && lane == 0)", "if (lane == 0)"),
        "a race at .*: written by thread .*, written by another",
    ),
    "cells are added to without an atomic operation": (
        "races",
        (KERNELS, "atomicAdd(row + i, share * gradient[i]);", "row[i] += share * gradient[i];"),
        "a race at .*: read by thread .*, written by another",
    ),
    "a grid without a block": (
        "memory",
        (KERNELS, "int(count < 1024 * kThreads ? (count + kThreads - 1) / kThreads : 1024)", "0"),
        "no GPU takes a grid of 0 x 1 x 1 blocks",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", MUTANTS)
def test_a_planted_error_is_found(folder, error):
    guard, mutation, report = MUTANTS[error]
    value, *rest = example(width=32, queries=9)
    if error == "odd addresses are taken as they are":
        value = torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape)
    library = build(folder, guard=guard, architecture=800, mutation=mutation, name=error.replace(" ", "_"))
    with emulated(library) as gpu, pytest.raises((KernelFault, AssertionError), match=report):
        assert_both_ways_like_the_reference(gpu, (value, *rest))
