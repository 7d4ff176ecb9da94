"""The compiled operators on other processors: levels of x86-64 by SOLQ_CPU_ARCH, and Arm."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils.cpp_extension import include_paths

from solq_lab.errors import UserError
from solq_lab.ops import extension
from solq_lab.ops.extension import CPU_ARCHITECTURES, ExtensionBuildError, cpu_architecture

TESTS = Path(__file__).resolve().parents[1]
KERNEL_TESTS = ["ops/test_ms_deform_attn.py", "ops/test_masks.py", "codecs/test_codecs.py"]
INSTRUCTION_SETS = {"x86-64-v2": "SSE", "x86-64-v3": "AVX2"}


@pytest.fixture
def processor_with_everything(monkeypatch):
    monkeypatch.setattr(extension, "processor_features", lambda: " ".join(CPU_ARCHITECTURES.values()))


@pytest.mark.usefixtures("processor_with_everything")
@pytest.mark.parametrize(
    ("wanted", "name"),
    [("", "native"), ("native", "native"), ("v2", "x86-64-v2"), ("v3", "x86-64-v3"), ("x86-64-v4", "x86-64-v4")],
)
def test_the_architecture_is_that_of_the_environment_and_joins_the_librarys_name(monkeypatch, wanted, name):
    monkeypatch.delenv("SOLQ_CPU_ARCH", raising=False)
    native = extension._recipe("cpu")
    monkeypatch.setenv("SOLQ_CPU_ARCH", wanted)
    assert cpu_architecture() == name
    recipe = extension._recipe("cpu")
    assert f"-march={name}" in recipe.flags
    assert (recipe.library == native.library) == (name == "native")

    monkeypatch.setattr(extension, "processor_features", lambda: f"another {' '.join(CPU_ARCHITECTURES.values())}")
    elsewhere = extension._recipe("cpu")
    assert (recipe.library == elsewhere.library) == (name != "native")


def test_an_unknown_architecture_is_rejected_with_the_allowed_ones(monkeypatch):
    monkeypatch.setenv("SOLQ_CPU_ARCH", "avx2")
    message = "SOLQ_CPU_ARCH='avx2' is unknown; allowed are native, x86-64-v2, x86-64-v3, x86-64-v4 and the short v2"
    with pytest.raises(UserError, match=message):
        extension._recipe("cpu")


def test_an_architecture_beyond_the_processor_is_rejected_with_what_is_missing(monkeypatch):
    monkeypatch.setattr(extension, "processor_features", lambda: f"flags: {CPU_ARCHITECTURES['x86-64-v2']} avx")
    monkeypatch.setenv("SOLQ_CPU_ARCH", "v2")
    assert cpu_architecture() == "x86-64-v2"
    monkeypatch.setenv("SOLQ_CPU_ARCH", "v3")
    with pytest.raises(UserError, match=r"SOLQ_CPU_ARCH='v3'.* lacks abm, avx2, .*choose a lower level, or unset it"):
        cpu_architecture()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", INSTRUCTION_SETS)
def test_every_level_of_x86_passes_the_tests_of_the_operators(monkeypatch, architecture):
    monkeypatch.setenv("SOLQ_CPU_ARCH", architecture)
    try:
        library = extension._recipe("cpu").library
    except (UserError, ExtensionBuildError) as error:
        pytest.skip(f"cannot run {architecture} here: {error}")
    script = "from solq_lab.ops.extension import instruction_set; print(instruction_set())"
    built = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert built.stdout.strip() == f"{INSTRUCTION_SETS[architecture]} ({architecture})", built.stderr
    if shutil.which("objdump"):
        assembly = subprocess.run(["objdump", "-d", library], capture_output=True, text=True).stdout
        assert "%xmm" in assembly
        assert "%zmm" not in assembly
        assert ("%ymm" in assembly) == (architecture == "x86-64-v3")

    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", *KERNEL_TESTS], cwd=TESTS, capture_output=True, text=True
    )
    assert tests.returncode == 0, tests.stdout


CPP_OF_TORCH_2_11 = "-std=c++17"
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture
def arm_tools():
    """Skips without the cross compiler and the emulator: Debian's g++-aarch64-linux-gnu and qemu-user."""
    for tool in (ARM_COMPILER, EMULATOR, "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not on the PATH")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_kernels_are_what_the_oldest_torch_compiles():
    """Without torch, whose newer headers want C++20."""
    alone = Path(__file__).parent / "kernels_alone"
    sources = [extension.SOURCES / f"{name}_cpu.cpp" for name in ("crop", "dct", "paste", "reframe")]
    run("g++", CPP_OF_TORCH_2_11, "-fsyntax-only", f"-I{alone}", f"-I{extension.SOURCES}", *sources)


@pytest.mark.slow
@pytest.mark.usefixtures("arm_tools")
def test_the_kernels_give_the_same_numbers_on_arm(tmp_path):
    """Without torch, of which there is none for Arm here, by `kernels_alone/main.cpp` in an emulator."""
    alone = Path(__file__).parent / "kernels_alone"
    sources = [alone / "main.cpp", *(extension.SOURCES / f"{name}_cpu.cpp" for name in ("dct", "paste", "crop"))]
    flags = [CPP_OF_TORCH_2_11, "-static", f"-I{alone}", f"-I{extension.SOURCES}", *extension.CPU_FLAGS]
    flags[flags.index("-fopenmp")] = "-fopenmp-simd"
    run("g++", "-march=native", *flags, *sources, "-o", tmp_path / "here")
    run(ARM_COMPILER, *flags, *sources, "-o", tmp_path / "arm")

    expected, found = run(tmp_path / "here").splitlines(), run(EMULATOR, tmp_path / "arm").splitlines()
    assert found[0] == "NEON"
    for line, arm_line in zip(expected[1:], found[1:], strict=True):
        (name, *numbers), (arm_name, *arm_numbers) = line.split(), arm_line.split()
        assert arm_name == name
        exact = name in ("paste", "crop")
        np.testing.assert_allclose(
            np.array(arm_numbers, float), np.array(numbers, float), rtol=0, atol=0 if exact else 1e-4, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.usefixtures("arm_tools")
@pytest.mark.parametrize("source", sorted(extension.SOURCES.glob("*_cpu.cpp")), ids=lambda path: path.name)
def test_the_operators_compile_for_arm(source):
    run(ARM_COMPILER, "-std=c++20", "-fsyntax-only", *(f"-I{path}" for path in include_paths()), source)
