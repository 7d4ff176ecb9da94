"""Report of `solq-lab doctor`: versions, devices and tools; dispatch, accuracy and times of the operators."""

import platform
import shutil
import statistics
from functools import partial
from typing import NamedTuple

import torch

from solq_lab.bench.op import draw_inputs
from solq_lab.bench.timing import timer
from solq_lab.environment import first_line, processor_name
from solq_lab.ops.extension import ExtensionBuildError, cache_folder, instruction_set, load_extension
from solq_lab.ops.ms_deform_attn import (
    COMPILED,
    implementation_for,
    ms_deform_attn,
    ms_deform_attn_reference,
    use_implementation,
)
from solq_lab.ops.toolkit import find_compiler, find_cuda_toolkits, find_ninja

SHAPES = ((32, 54), (16, 27), (8, 14))
QUERIES = 600
TOLERANCE = 1e-4  # of the largest number; float32 sums differ by a few 1e-6
REPEATS = 5


class Implementation(NamedTuple):
    """One implementation on one device."""

    device: str
    name: str
    serves: bool  # whether calls on this device are dispatched to it
    note: str  # why it cannot be used, or empty
    # of outputs and gradients to float64, relative to the largest value; None where it was not run
    difference: float | None = None
    # forward_ms, backward_ms: medians for 600 queries, 8 heads of 48 channels, 3 levels, 4 points
    forward_ms: float | None = None
    backward_ms: float | None = None

    @property
    def healthy(self) -> bool:
        """Whether it agrees with the reference, or cannot be used."""
        return self.difference is None or self.difference <= TOLERANCE

    def __str__(self) -> str:
        role = "in use" if self.serves else "available"
        title = f"{self.name} on {self.device}"
        if self.difference is None:
            return f"{title:22}cannot be used: {self.note}"
        verdict = "" if self.healthy else f", NOT the same numbers (at most {TOLERANCE:g})"
        times = f"forward {self.forward_ms:.2f} ms, backward {self.backward_ms:.2f} ms"
        return f"{title:22}{role}, {times}, differs from float64 by {self.difference:.1e}{verdict}"


class Report(NamedTuple):
    """The machine as (topic, text) pairs, and the implementations of deformable attention."""

    machine: list[tuple[str, str]]
    implementations: list[Implementation]

    @property
    def healthy(self) -> bool:
        """Whether all usable implementations agree."""
        return all(implementation.healthy for implementation in self.implementations)

    def __str__(self) -> str:
        lines = [f"{topic:16}{text}" for topic, text in self.machine]
        return "\n".join([*lines, "", "deformable attention", *(f"  {each}" for each in self.implementations)])


def examine() -> Report:
    """Describe the machine, build missing extensions, and run every implementation."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = [_check(device, name) for device in devices for name in (device, "reference")]
    if "cuda" not in devices:
        driver = "no NVIDIA driver" if shutil.which("nvidia-smi") is None else "torch sees no NVIDIA GPU"
        note = f"{driver} on this machine" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        checks.append(Implementation("cuda", "cuda", False, note))
    return Report(_machine(), checks)


def _machine() -> list[tuple[str, str]]:
    built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    toolkits = ", ".join(map(str, find_cuda_toolkits())) or "none (the extra [cuda] installs one)"
    compiler = find_compiler()
    folder = cache_folder()
    capability = torch.backends.cpu.get_cpu_capability()
    gpus = [
        f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]

    return [
        ("torch", f"{torch.__version__}, {built_for}, Python {platform.python_version()}"),
        ("processor", f"{processor_name()}, {torch.get_num_threads()} threads, {capability}"),
        ("GPU", "; ".join(gpus) or "none"),
        (
            "C++ compiler",
            f"{compiler}, {first_line([compiler, '--version']) or 'unknown version'}" if compiler else "none",
        ),
        ("ninja", find_ninja() or "none"),
        ("CUDA toolkits", toolkits),
        ("CPU operators", instruction_set()),
        ("kept libraries", f"{len(list(folder.glob('*.so')))} in {folder}"),
    ]


def _check(device: str, name: str) -> Implementation:
    serves = implementation_for(device) == name
    if name in COMPILED:
        try:
            load_extension("cuda" if name == "cuda" else "cpu")
        except ExtensionBuildError as error:
            return Implementation(device, name, False, error.reason)

    inputs, gradient = draw_inputs(QUERIES, SHAPES, device=device)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    output = ms_deform_attn_reference(exact[0], SHAPES, *exact[1:])
    expected = [output.detach(), *torch.autograd.grad(output, exact, gradient.double().cpu())]

    timed, times = timer(torch.device(device)), []
    with use_implementation(name):
        for _ in range(REPEATS + 1):
            forward_ms, output = timed(lambda: ms_deform_attn(inputs[0], SHAPES, *inputs[1:]))
            backward_ms, gradients = timed(partial(torch.autograd.grad, output, inputs, gradient))
            times.append((forward_ms, backward_ms))
    medians = map(statistics.median, zip(*times[1:], strict=True))  # the first one warms up

    pairs = zip([output.detach(), *gradients], expected, strict=True)
    difference = max(float((ours.cpu() - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    return Implementation(device, name, serves, "", difference, *medians)
