"""Compiles the operators in `cuda/` at their first use and keeps the libraries for every later process.

A library's name carries a hash of everything that it depends on: sources, flags, torch, Python, processor and GPU
architectures. It is built in a folder of its own and moved to its place whole, under a lock that the operating system
releases when its process is killed; so there is never half a library, nor a lock without an owner.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from solq_lab.environment import processor_features
from solq_lab.errors import UserError
from solq_lab.ops.toolkit import CudaToolkit, cuda_version_of_torch, find_compiler, find_cuda_toolkits, find_ninja

Kind = Literal["cpu", "cuda"]

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# An installed package has them inside, a checkout beside it. Beside an installed one lies NVIDIA's `cuda`, if any.
SOURCES = PACKAGE / "cuda" if (PACKAGE / "cuda").is_dir() else PACKAGE.parent / "cuda"
SOURCE_PATTERNS = {"cpu": ("*_cpu.cpp",), "cuda": ("*_cuda.cu", "*_bindings.cpp")}
# Without -fopenmp torch's parallel loops are serial, silently. The last two let loops with comparisons vectorise.
CPU_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
BINDING_FLAGS = ("-O2",)
NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr")
DEFAULT_ARCHITECTURES = "8.0;9.0"  # where no GPU is in sight: A100 and H100/H200
SHOWN_LINES = 20  # of the compiler's output in an error
# Values of SOLQ_CPU_ARCH, each with what a processor must have beyond the one before, in the words of /proc/cpuinfo.
CPU_ARCHITECTURES = {
    "x86-64-v2": "cx16 popcnt sse4_1 sse4_2 ssse3",
    "x86-64-v3": "abm avx avx2 bmi1 bmi2 f16c fma movbe",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}

_lock = threading.Lock()
_outcomes: dict[str, ExtensionBuildError | None] = {}  # of loading each kind in this process


class ExtensionBuildError(UserError):
    """The compiled operators cannot be had here. `reason` is one sentence with the cause and the cure."""

    def __init__(self, reason: str, compiler_output: str = "") -> None:
        self.reason = reason
        lines = compiler_output.strip().splitlines()[-SHOWN_LINES:]
        super().__init__("\n".join([reason, *lines]))


class Recipe(NamedTuple):
    """All that makes one library what it is."""

    kind: Kind
    sources: list[Path]
    flags: tuple[str, ...]
    cuda_flags: tuple[str, ...]
    library: Path


def load_extension(kind: Kind) -> None:
    """Makes the operators of `cuda/*_cpu.cpp` ("cpu") or of the CUDA kernels ("cuda") callable as torch.ops.solq_lab.*.

    The first call on a machine compiles, later ones load the kept library; in one process only the first does anything.
    The libraries lie in $TORCH_EXTENSIONS_DIR/solq_lab, by default in ~/.cache/torch_extensions/solq_lab.

    Raises:
        ExtensionBuildError: no compiler, no writable cache, an error in the sources, ...; the same again at every call.
        UserError: SOLQ_CPU_ARCH is unknown, or beyond this processor.
    """
    with _lock:
        if kind not in _outcomes:
            try:
                recipe = _recipe(kind)
                if recipe.library.exists() or not _build(recipe):
                    torch.ops.load_library(recipe.library)
                _outcomes[kind] = None
            except OSError as error:
                reason = f"the kept library {recipe.library} does not load ({error}); remove it to build it anew"
                _outcomes[kind] = ExtensionBuildError(reason)
            except ExtensionBuildError as error:
                _outcomes[kind] = error
        if failure := _outcomes[kind]:
            raise failure


@functools.cache
def cpu_operator(name: str) -> Callable[..., Any] | None:
    """The compiled torch.ops.solq_lab.<name> for tensors on the CPU, or None where plain torch has to do.

    That is where the environment variable SOLQ_OPS=reference demands it or the operators cannot be built here.
    """
    if os.environ.get("SOLQ_OPS") == "reference":
        return None
    try:
        load_extension("cpu")
    except ExtensionBuildError as error:
        logger.warning("%s runs in plain torch, slower: %s", name, error.reason)
        return None
    return getattr(torch.ops.solq_lab, name).default


def cpu_architecture(wanted: str | None = None) -> str:
    """The -march of the CPU operators: "native", or a level of x86-64 such as "x86-64-v3".

    Args:
        wanted: that, or v3 for short. None: $SOLQ_CPU_ARCH, by default "native".

    Raises:
        UserError: an unknown one, or one that this processor cannot run.
    """
    wanted = wanted or os.environ.get("SOLQ_CPU_ARCH") or "native"
    name = f"x86-64-{wanted}" if wanted in ("v2", "v3", "v4") else wanted
    if name == "native":
        return name
    levels = list(CPU_ARCHITECTURES)
    if name not in levels:
        allowed = ", ".join(["native", *levels])
        raise UserError(f"SOLQ_CPU_ARCH={wanted!r} is unknown; allowed are {allowed} and the short v2, v3, v4")

    needed = " ".join(CPU_ARCHITECTURES[level] for level in levels[: levels.index(name) + 1]).split()
    found = processor_features().split()
    if missing := [feature for feature in needed if feature not in found]:
        raise UserError(
            f"SOLQ_CPU_ARCH={wanted!r}: this {platform.machine()} processor lacks {', '.join(missing)}; "
            "choose a lower level, or unset it for the processor's own"
        )
    return name


def instruction_set() -> str:
    """The instruction set and the architecture of the CPU operators, "AVX2 (x86-64-v3)"; or "plain torch"."""
    operator = cpu_operator("cpu_instruction_set")
    return f"{operator()} ({cpu_architecture()})" if operator else "plain torch"


def cache_folder() -> Path:
    """Where the compiled libraries are kept."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "solq_lab"


def _recipe(kind: Kind) -> Recipe:
    sources = sorted(path for pattern in SOURCE_PATTERNS[kind] for path in SOURCES.glob(pattern))
    if not sources:
        raise ExtensionBuildError(
            f"the operators' sources are not at {SOURCES}; install solq_lab from a checkout: pip install -e ."
        )
    flags = (*CPU_FLAGS, f"-march={cpu_architecture()}") if kind == "cpu" else BINDING_FLAGS
    cuda_flags = (*NVCC_FLAGS, *_architecture_flags()) if kind == "cuda" else ()

    digest = hashlib.sha256()
    for path in [*sources, *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.name.encode() + path.read_bytes())
    # A build for a named level is the same on every processor that runs it: a cluster shares it.
    processor = processor_features() if "-march=native" in flags else platform.machine()
    environment = (torch.__version__, sys.implementation.cache_tag, processor)
    digest.update(repr((flags, cuda_flags, environment)).encode())
    return Recipe(kind, sources, flags, cuda_flags, cache_folder() / f"{kind}-{digest.hexdigest()[:16]}.so")


def _architecture_flags() -> tuple[str, ...]:
    """nvcc's flags for $TORCH_CUDA_ARCH_LIST, else for the GPUs of this machine, else for `DEFAULT_ARCHITECTURES`."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not wanted and torch.cuda.is_available():
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        wanted = ";".join(f"{major}.{minor}" for major, minor in capabilities)

    flags = set()
    for name in (wanted or DEFAULT_ARCHITECTURES).replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise ExtensionBuildError(
                f"TORCH_CUDA_ARCH_LIST names {name!r}; give numbers such as 9.0, 8.0;9.0 or 9.0+PTX"
            )
        flags.add(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.add(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(sorted(flags))


def _build(recipe: Recipe) -> bool:
    """Compiles and loads the library and moves it to its place; False when another process did so meanwhile."""
    if find_compiler() is None:
        compiler = os.environ.get("CXX", "c++")
        raise ExtensionBuildError(f"no C++ compiler ({compiler}) is on the PATH; install one (g++, or gxx of conda)")
    ninja = find_ninja()
    if ninja is None:
        raise ExtensionBuildError("ninja is neither on the PATH nor beside Python; install it: pip install ninja")
    toolkit = _fitting_toolkit() if recipe.kind == "cuda" else None

    folder, prefix = recipe.library.parent, f"{recipe.library.stem}.building-"
    lock = FileLock(recipe.library.with_suffix(".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.info("another process compiles the operators; waiting for it")
            lock.acquire()
        if recipe.library.exists():
            return False
        for abandoned in folder.glob(f"{prefix}*"):  # their builders were killed: this process holds the lock
            shutil.rmtree(abandoned, ignore_errors=True)
        build_folder = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        try:
            os.replace(_compile(recipe, build_folder, ninja, toolkit), recipe.library)
        finally:
            shutil.rmtree(build_folder, ignore_errors=True)
    except (OSError, NotImplementedError) as error:  # the second: a file system without locks
        raise ExtensionBuildError(
            f"compiled operators cannot be kept in {folder} ({error}); set TORCH_EXTENSIONS_DIR to a writable folder"
        ) from error
    finally:
        lock.release()
    return True


def _compile(recipe: Recipe, build_folder: Path, ninja: str, toolkit: CudaToolkit | None) -> Path:
    """Compiles and loads the library; the path to it in `build_folder`."""
    from torch.utils import cpp_extension  # slow to import, and only a build needs it

    logger.info("compiling the %s operators, once on this machine (about half a minute)", recipe.kind)
    started = time.monotonic()
    name = f"solq_lab_{build_folder.name.rpartition('-')[2]}"  # torch numbers the builds of one name in one process
    ld_flags = ["-fopenmp"] if "-fopenmp" in recipe.flags else []
    if toolkit is not None:
        # The runtime among the Python packages has no libcudart.so, the name that the linker looks for.
        (build_folder / "libcudart.so").symlink_to(toolkit.runtime)
        ld_flags = [f"-L{shlex.quote(str(build_folder))}"]

    try:
        with _tools(cpp_extension, ninja, toolkit):
            cpp_extension.load(
                name=name,
                sources=[str(path) for path in recipe.sources],
                extra_cflags=list(recipe.flags),
                extra_cuda_cflags=list(recipe.cuda_flags),
                extra_ldflags=ld_flags,
                build_directory=str(build_folder),
                is_python_module=False,
                with_cuda=toolkit is not None,
            )
    except (RuntimeError, OSError, ValueError) as error:
        names = ", ".join(path.name for path in recipe.sources)
        reason = f"compiling {names} failed; fix what the compiler reports, or set SOLQ_OPS=reference to do without"
        raise ExtensionBuildError(reason, str(error)) from error
    logger.info("compiled the %s operators in %.0f s", recipe.kind, time.monotonic() - started)
    return build_folder / f"{name}.so"


def _fitting_toolkit() -> CudaToolkit:
    wanted = cuda_version_of_torch()
    if not wanted:
        raise ExtensionBuildError(f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch")
    toolkits = find_cuda_toolkits()
    cure = f"install one from the package index (pip install 'solq-lab[cuda]') or set CUDA_HOME to CUDA {wanted[0]}.x"
    if not toolkits:
        raise ExtensionBuildError(
            f"no CUDA toolkit (nvcc, headers and libcudart in one folder) is on this machine; {cure}"
        )
    if toolkits[0].version[0] != wanted[0]:
        found = ", ".join(map(str, toolkits))
        raise ExtensionBuildError(f"torch is built for CUDA {torch.version.cuda}, but here is only {found}; {cure}")
    return toolkits[0]


@contextmanager
def _tools(cpp_extension: Any, ninja: str, toolkit: CudaToolkit | None) -> Iterator[None]:
    """Within: torch's builder finds ninja and the toolkit, and quotes its library folder for the linker.

    It guesses the toolkit when it is imported, and may have found a wrapper of nvcc instead. A library folder with a
    space in its path would reach the linker as two.
    """
    before = os.environ.get("PATH", ""), cpp_extension.CUDA_HOME, cpp_extension.TORCH_LIB_PATH
    os.environ["PATH"] = os.pathsep.join([str(Path(ninja).parent), before[0]])
    cpp_extension.CUDA_HOME = str(toolkit.home) if toolkit else before[1]
    cpp_extension.TORCH_LIB_PATH = shlex.quote(before[2])
    try:
        yield
    finally:
        os.environ["PATH"], cpp_extension.CUDA_HOME, cpp_extension.TORCH_LIB_PATH = before
