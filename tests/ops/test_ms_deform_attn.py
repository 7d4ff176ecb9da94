"""Deformable attention: the sums, their gradients and the registration with torch, for each implementation."""

import json

import numpy as np
import pytest
import torch
from attention_arguments import SHAPES, example
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from solq_lab.ops.extension import ExtensionBuildError, load_extension
from solq_lab.ops.ms_deform_attn import (
    implementation_for,
    implementations,
    ms_deform_attn,
    ms_deform_attn_reference,
    use_implementation,
)


@pytest.fixture
def cpu_kernel():
    """Every call inside the test runs the C++ kernel; skips where it cannot be built."""
    try:
        load_extension("cpu")
    except ExtensionBuildError as error:
        pytest.skip(f"no compiled operator here: {error.reason}")
    with use_implementation("cpu"):
        yield


@pytest.fixture
def cuda_kernel():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    with use_implementation("cuda"):
        yield


def outcome(function, value, shapes, locations, weights, *, seed=1):
    """The output and the three gradients for one random gradient of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    output = function(leaves[0], shapes, leaves[1], leaves[2])
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad_output = grad_output.to(output.dtype).to(output.device)
    if not output.requires_grad:  # the reference touched nothing: no queries, or only empty levels
        return [output, *(torch.zeros_like(leaf) for leaf in leaves)]
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output, materialize_grads=True)]


def assert_like_the_reference(arguments, *, atol=None, rtol=None):
    actual = outcome(ms_deform_attn, *arguments)
    expected = outcome(ms_deform_attn_reference, *arguments)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)


@pytest.mark.golden
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_output_and_gradients_equal_the_released_kernel(golden_root, case, implementation):
    folder = golden_root / "parts_ms_deform_attn"
    arrays = np.load(folder / "fixture.npz")
    shapes = json.loads((folder / "fixture.json").read_text())["cases"][case]["spatial_shapes"]
    inputs = {name: torch.from_numpy(arrays[f"{name}_{case}"]) for name in ("value", "locations", "weights")}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    try:
        with use_implementation(implementation):
            output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
            gradients = torch.autograd.grad(output, leaves, torch.from_numpy(arrays[f"grad_output_{case}"]))
    except ExtensionBuildError as error:
        pytest.skip(f"no compiled operator here: {error.reason}")

    torch.testing.assert_close(output, torch.from_numpy(arrays[f"output_{case}"]), rtol=0, atol=1e-12)
    for name, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(gradient, torch.from_numpy(arrays[f"grad_{name}_{case}"]), rtol=0, atol=1e-10)


def test_a_sample_at_the_centre_of_a_cell_is_that_cell():
    value = torch.arange(6.0).view(1, 6, 1, 1)
    centres = torch.tensor([[(column + 0.5) / 3, (row + 0.5) / 2] for row in range(2) for column in range(3)])
    locations = centres.view(1, 6, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(2, 3)], locations, torch.ones(1, 6, 1, 1, 1))
    torch.testing.assert_close(output.flatten(), torch.arange(6.0))


def gradients_hold(*, device="cpu", width=3):
    value, shapes, locations, weights = example(
        shapes=((4, 5), (2, 3)), batch=1, heads=2, width=width, queries=3, points=2, dtype=torch.float64, device=device
    )
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    reorder = 0.0 if device == "cpu" else 1e-12  # a GPU adds what falls into one cell in any order
    return torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, shapes, x, w), leaves, nondet_tol=reorder)


def test_reference_gradients_equal_numerical_ones():
    with use_implementation("reference"):
        assert gradients_hold()


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.usefixtures("cpu_kernel")
def test_cpu_gradients_equal_numerical_ones(width):
    assert gradients_hold(width=width)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6),
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 2, 5, 12, 16, 20, 24, 32, 48, 64, 130]),
    queries=st.integers(0, 9),
    points=st.sampled_from([0, 1, 4, 7, 70]),
    seed=st.integers(0, 1000),
)
def test_cpu_equals_the_reference_for_any_sizes(shapes, batch, heads, width, queries, points, seed):
    sizes = {"batch": batch, "heads": heads, "width": width, "queries": queries, "points": points}
    arguments = example(shapes=shapes, **sizes, dtype=torch.float64, seed=seed)
    try:
        with use_implementation("cpu"):
            assert_like_the_reference(arguments, atol=1e-10, rtol=1e-10)
    except ExtensionBuildError as error:
        pytest.skip(f"no compiled operator here: {error.reason}")


# Half-precision outputs carry their rounding, 2^-11 and 2^-8; sums before it are float32 in both implementations.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("width", [2, 12, 16, 24, 32, 48, 64, 40])
@pytest.mark.usefixtures("cpu_kernel")
def test_cpu_equals_the_reference_in_every_type(dtype, tolerance, width):
    arguments = example(width=width, queries=40, dtype=dtype)
    assert ms_deform_attn(*arguments).dtype == dtype
    assert_like_the_reference(arguments, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize("empty", ["batch", "queries", "points", "width", "heads"])
def test_reference_takes_empty_sizes(empty):
    with use_implementation("reference"):
        assert_like_the_reference(example(**{"width": 16, empty: 0}))


@pytest.mark.usefixtures("cpu_kernel")
def test_cpu_takes_inputs_that_are_not_contiguous():
    value, shapes, locations, weights = example(width=16)
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        shapes,
        locations.transpose(1, 4).contiguous().transpose(1, 4),
        weights.expand(2, *weights.shape[1:]).flip(0).flip(0),
    )
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(ms_deform_attn(*strided), ms_deform_attn(value, shapes, locations, weights))
    output = ms_deform_attn(value.requires_grad_(), shapes, locations, weights)
    output.sum().backward()  # the gradient of a sum is expanded: strides of zero
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_far_away_locations_give_zero_and_no_gradient(implementation, request):
    if implementation == "cpu":
        request.getfixturevalue("cpu_kernel")
    value, shapes, locations, weights = example(width=16)
    beyond = torch.where(locations > 0.5, 3e8, -40.0)
    output, grad_value, grad_locations, grad_weights = outcome(ms_deform_attn, value, shapes, beyond, weights)
    for tensor in (output, grad_value, grad_locations, grad_weights):
        assert not tensor.any()


@pytest.mark.usefixtures("cpu_kernel")
def test_cpu_ignores_locations_that_are_not_finite():
    value, shapes, locations, weights = example(width=16)
    locations[:, 0] = torch.nan
    locations[:, 1] = torch.inf
    output, grad_value, *_ = outcome(ms_deform_attn, value, shapes, locations, weights)
    assert not output[:, :2].any()
    assert grad_value.isfinite().all()


@pytest.mark.usefixtures("cpu_kernel")
def test_cpu_results_do_not_depend_on_the_number_of_threads():
    arguments = example(shapes=((20, 30), (10, 15)), width=48, queries=300, heads=4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outcome(ms_deform_attn, *arguments)
        torch.set_num_threads(4)
        together = outcome(ms_deform_attn, *arguments)
    finally:
        torch.set_num_threads(before)
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second)


class Attention(torch.nn.Module):
    """The smallest module that uses the operator."""

    def forward(self, value, locations, weights):
        return ms_deform_attn(value * 2, SHAPES, locations, weights.softmax(-1)).sin()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_module_compiles_without_a_graph_break(dynamic):
    module, (value, _, locations, weights) = Attention(), example(width=16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    expected = module(*leaves)
    output = compiled(*leaves)
    torch.testing.assert_close(output, expected)
    gradients = torch.autograd.grad(output.sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_module_exports_with_the_operator_inside():
    module, (value, _, locations, weights) = Attention(), example(width=16)
    program = torch.export.export(module, (value, locations, weights))
    assert torch.ops.solq_lab.ms_deform_attn.default in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(value, locations, weights), module(value, locations, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_finds_the_operator_well_registered(dtype):
    value, shapes, locations, weights = example(dtype=dtype)
    flat = [side for shape in shapes for side in shape]
    leaves = (value.requires_grad_(), flat, locations.requires_grad_(), weights.requires_grad_())
    torch.library.opcheck(torch.ops.solq_lab.ms_deform_attn.default, leaves)


def test_autocast_halves_the_values_and_keeps_the_locations():
    value, shapes, locations, weights = example(width=16)
    value.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ms_deform_attn(value, shapes, locations, weights.bfloat16())
    assert output.dtype == torch.bfloat16
    rounded = ms_deform_attn(value.bfloat16(), shapes, locations, weights.bfloat16().float())
    assert torch.equal(output, rounded)
    assert torch.autograd.grad(output.sum(), value)[0].dtype == torch.float32


def test_flops_are_four_multiply_adds_per_sampled_channel_and_twice_that_back():
    value, shapes, locations, weights = example(batch=2, heads=3, width=8, queries=5, points=4)
    sampled_channels = 2 * 5 * 3 * len(shapes) * 4 * 8
    with FlopCounterMode(display=False) as forward:
        output = ms_deform_attn(value.requires_grad_(), shapes, locations, weights)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert forward.get_total_flops() == 8 * sampled_channels
    assert backward.get_total_flops() == 16 * sampled_channels


def bad_arguments():
    value, shapes, locations, weights = example()
    cuts = {
        "three": (value[0], shapes, locations, weights),
        "tokens": (value[:, 1:], shapes, locations, weights),
        "levels": (value, [*shapes, (0, 1)], locations, weights),
        "none": (value, [], locations, weights),
        "triple": (value, [(1, 2, 3)], locations, weights),
        "tensor": (value, torch.tensor(shapes), locations, weights),
        "weights": (value, shapes, locations, weights[..., :2]),
        "integers": (value.long(), shapes, locations, weights),
        "half": (value, shapes, locations.half(), weights),
        "device": (value, shapes, locations.to("meta"), weights),
    }
    messages = {
        "three": r"value must be \(B, S, M, D\), got \(89, 3, 8\)",
        "tokens": r"hold 89 tokens, value has 88",
        "levels": r"sampling_locations must be \(B=2, Q, M=3, L=4, P, 2\).* got \(2, 5, 3, 3, 4, 2\)",
        "none": r"at least one level",
        "triple": r"\(height, width\) pairs of integers, got \[\(1, 2, 3\)\]",
        "tensor": r"\(height, width\) pairs of integers, got tensor",
        "weights": r"attention_weights must be \(2, 5, 3, 3, 4\) like the locations, got \(2, 5, 3, 3, 2\)",
        "integers": r"value must be float64, float32, float16 or bfloat16, got torch.int64",
        "half": r"sampling_locations must be float32 or float64, got torch.float16.*compute the locations in float32",
        "device": r"value is on cpu, sampling_locations on meta, attention_weights on cpu; all must share one device",
    }
    return [pytest.param(cuts[name], messages[name], id=name) for name in cuts]


@pytest.mark.parametrize(("arguments", "message"), bad_arguments())
def test_arguments_that_do_not_fit_are_rejected_with_their_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*arguments)


@pytest.mark.usefixtures("cpu_kernel")
def test_the_compiled_kernel_checks_sizes_itself():
    value, _, locations, weights = example()
    with pytest.raises(ValueError, match=r"hold 6 cells, value has 89"):
        torch.ops.solq_lab.ms_deform_attn_cpu(value, [2, 3], locations, weights)
    flat = [side for shape in SHAPES for side in shape]
    with pytest.raises(ValueError, match=r"must be Float for values of type Float, got Double"):
        torch.ops.solq_lab.ms_deform_attn_cpu(value, flat, locations.double(), weights)


def test_an_implementation_is_chosen_by_name_for_a_while():
    before = implementation_for("cpu")
    with use_implementation("reference"):
        assert implementation_for("cpu") == "reference"
    assert implementation_for("cpu") == before
    assert implementations()[-1] == "reference"
    assert before in implementations()


def test_an_unknown_implementation_is_rejected_with_the_known_ones():
    with (
        pytest.raises(ValueError, match=r"no implementation 'gpu'.* there are cuda, cpu, reference"),
        use_implementation("gpu"),
    ):
        pass


@pytest.mark.usefixtures("cpu_kernel")
def test_an_implementation_for_another_device_is_rejected():
    with pytest.raises(ValueError, match=r"'cpu' was chosen by name, but the tensors are on 'meta'"):
        implementation_for("meta")


# What needs a GPU.

CUDA_TYPES = [(torch.float64, 1e-10), (torch.float32, 5e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]


@pytest.mark.cuda
@pytest.mark.parametrize("width", [3, 12, 32, 48])
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_gradients_equal_numerical_ones(width):
    assert gradients_hold(device="cuda", width=width)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), CUDA_TYPES)
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_equals_the_reference(dtype, tolerance):
    for width in (1, 5, 16, 20, 32, 48, 64, 130):
        for points in (1, 4, 5):
            arguments = example(width=width, points=points, queries=40, dtype=dtype, device="cuda")
            assert_like_the_reference(arguments, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("empty", ["batch", "queries", "points"])
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_takes_empty_sizes(empty):
    assert_like_the_reference(example(width=32, device="cuda", **{empty: 0}))


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_rejects_tensors_of_another_device():
    value, shapes, locations, weights = example(device="cuda")
    flat = [side for shape in shapes for side in shape]
    with pytest.raises(ValueError, match=r"sampling_locations must be on cuda:0 like the value, got cpu"):
        torch.ops.solq_lab.ms_deform_attn_cuda(value, flat, locations.cpu(), weights)


@pytest.mark.cuda
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_takes_one_to_six_levels(levels):
    shapes = [(9 - level, 11 - level) for level in range(levels)]
    assert_like_the_reference(example(shapes=shapes, width=48, device="cuda"), atol=1e-4, rtol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_gradients_are_bit_equal_when_torch_is_deterministic(dtype):
    arguments = example(shapes=((20, 30), (3, 2)), width=48, queries=2000, dtype=dtype, device="cuda")
    expected = outcome(ms_deform_attn_reference, *arguments)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [outcome(ms_deform_attn, *arguments) for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-1
    for ours, theirs in zip(runs[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_deterministic_gradients_of_bad_numbers_are_bad_numbers():
    value, shapes, locations, weights = example(width=32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        leaf = value.requires_grad_()
        output = ms_deform_attn(leaf, shapes, locations, weights)
        (gradient,) = torch.autograd.grad(output, leaf, torch.full_like(output, torch.inf))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not gradient.isfinite().any(), "a scaler of losses looks for these"


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_forward_and_backward_replay_from_a_graph():
    value, shapes, locations, weights = example(width=48, queries=64, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def step():
        output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
        return output, torch.autograd.grad(output.square().sum(), leaves)

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    with torch.no_grad():
        leaves[0].copy_(torch.randn_like(leaves[0]))
    graph.replay()
    expected, expected_gradients = step()
    torch.testing.assert_close(output, expected)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_never_waits_for_the_gpu_nor_reads_from_it():
    value, shapes, locations, weights = example(width=48, queries=64, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    for mode in ("default", "error"):  # the first round loads what is loaded lazily
        torch.cuda.set_sync_debug_mode(mode)
        try:
            output = ms_deform_attn(leaves[0], shapes, leaves[1], leaves[2])
            torch.autograd.grad(output.square().sum(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernel")
def test_cuda_runs_on_the_current_stream():
    value, shapes, locations, weights = example(width=48, queries=3000, device="cuda")
    expected = ms_deform_attn(value, shapes, locations, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(value)
        torch.cuda._sleep(100_000_000)  # cycles; on any other stream the kernel would read zeros
        late.copy_(value)
        output = ms_deform_attn(late, shapes, locations, weights)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(output, expected)
