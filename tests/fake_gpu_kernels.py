"""Builds the CUDA kernels and their bindings for the CPU, and runs them in a process of their own, which a fault ends.

`cuda_on_cpu/` replaces the CUDA toolkit. The sources are those of `cuda/`, except for the syntax of a
launch, which no C++ compiler accepts, and for the device that the operators are registered for.
"""

import contextlib
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from solq_lab.ops.extension import SOURCES

HERE = Path(__file__).resolve().parent / "cuda_on_cpu"
COMPILER = shutil.which("g++")
KERNELS, BINDINGS = "ms_deform_attn_cuda.cu", "ms_deform_attn_bindings.cpp"
LAUNCH = re.compile(r"(\w+<[^<>;]*>)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
# Memory comes filled with bytes 0xff, which are NaN in every type; torch frees nothing when its process ends.
SANITIZER_OPTIONS = "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"


class Guard(NamedTuple):
    """A sanitizer for the kernels: flags of the compiler, and libraries that must be in the process first."""

    flags: tuple[str, ...]
    libraries: tuple[str, ...]


GUARDS = {
    # Addresses beyond a tensor, numbers at an odd address, overflows.
    "memory": Guard(
        ("-O0", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
        ("libasan.so", "libubsan.so"),
    ),
    # Two threads at one address; the callbacks are in cuda_on_cpu/races.cpp. Optimised, or every local variable counts.
    "races": Guard(("-O1", "-fsanitize=thread"), ()),
}


class KernelFault(RuntimeError):
    """The process that ran the kernels was ended by a fault; the text is its report."""


def reason_against() -> str:
    """Why the kernels cannot run here; '' where they can."""
    if COMPILER is None:
        return "no g++ here"
    if missing := [name for guard in GUARDS.values() for name in guard.libraries if not os.path.isabs(_library(name))]:
        return f"the g++ here has no {' and no '.join(missing)}"
    if subprocess.run([sys.executable, "-c", ""], env=_environment(GUARDS["memory"]), capture_output=True).returncode:
        return "AddressSanitizer does not start here"
    return ""


def _library(name: str) -> str:
    """The path of one of the compiler's libraries; the bare name where it has none of that name."""
    return subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


def _environment(guard: Guard) -> dict[str, str]:
    preload = " ".join(_library(name) for name in guard.libraries)
    return os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": SANITIZER_OPTIONS, "OMP_NUM_THREADS": "1"}


def kernels_for_the_cpu(source: str) -> str:
    """`kernel<...><<<grid, threads, bytes, stream>>>(arguments);` becomes a call of machine::launch.

    Raises:
        ValueError: a launch is written in another way.
    """
    translated, launches = LAUNCH.subn(r"machine::launch(\2, [&] { \1(\3); });", source)
    if launches != source.count("<<<") or not launches:
        raise ValueError(f"{launches} of {source.count('<<<')} kernel launches were understood")
    return translated


def bindings_for_the_cpu(source: str) -> str:
    """The operators are registered for tensors on the CPU."""
    return source.replace("torch::dispatch(c10::kCUDA,", "torch::dispatch(c10::kCPU,")


def build(
    folder: Path, *, guard: str, architecture: int, mutation: tuple[str, str, str] | None = None, name: str = "sound"
) -> Path:
    """Compiles the kernels as a GPU of `architecture` (800, 900) would run them; the path of the library.

    Args:
        folder: for all that is made; what several builds share is compiled once.
        guard: a name of `GUARDS`.
        mutation: (file, text, other text), an error planted in one of the two sources.
        name: of this build among those with the same guard and architecture.
    """
    library = folder / f"{guard}_{architecture}_{name}.so"
    translated = {
        KERNELS: kernels_for_the_cpu((SOURCES / KERNELS).read_text()),
        BINDINGS: bindings_for_the_cpu((SOURCES / BINDINGS).read_text()),
    }
    own = {KERNELS}
    if mutation:
        mutated, old, new = mutation
        if old not in translated[mutated]:
            raise ValueError(f"{mutated} has no {old!r} to plant an error in")
        translated[mutated] = translated[mutated].replace(old, new)
        own.add(mutated)
    from torch.utils.cpp_extension import include_paths  # slow to import

    flags = {
        KERNELS: [f"-D__CUDA_ARCH__={architecture}", *GUARDS[guard].flags],
        BINDINGS: ["-O0", *(f"-isystem{path}" for path in include_paths())],
    }
    jobs = []
    for source, text in translated.items():
        path = folder / f"{library.stem if source in own else 'sound'}_{Path(source).stem}.cpp"
        path.write_text(text)
        jobs.append((path, path.with_suffix(".o"), flags[source]))
    jobs += [(HERE / source, folder / f"{source}.o", ["-O2"]) for source in ("machine.cpp", "races.cpp")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: _compile(*job), [job for job in jobs if not job[1].exists()]))
    torch_libraries = Path(torch.__file__).parent / "lib"
    linked = [f"-L{torch_libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_libraries}"]
    sanitizers = GUARDS[guard].flags if GUARDS[guard].libraries else ()
    _call(["-shared", *sanitizers, "-o", library, *(result for _, result, _ in jobs), *linked])
    return library


def _compile(source: Path, result: Path, flags: list[str]) -> None:
    _call(["-std=c++20", "-fPIC", *flags, f"-I{HERE}", f"-I{SOURCES}", "-c", source, "-o", result])


def _call(arguments: list[str | Path]) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class EmulatedGpu:
    """The operators of one library that `build` made, each call in a process that is started again after a fault."""

    def __init__(self, library: Path) -> None:
        self._library, self._report = library, library.with_suffix(".report")
        self._process: subprocess.Popen | None = None

    def call(self, name: str, *arguments: Any, order: int = 0, deterministic: bool = False) -> Any:
        """What the operator of that name returns.

        Args:
            order: of the threads; 0 is the natural one.
            deterministic: as torch.use_deterministic_algorithms.

        Raises:
            KernelFault: a sanitizer found a fault.
            ValueError, RuntimeError: the operator's own.
        """
        process = self._process = self._process or self._begin()
        try:
            pickle.dump((name, arguments, order, deterministic), process.stdin)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            self.end()
            raise KernelFault(self._report.read_text()) from None
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait(timeout=60)

    def _begin(self) -> subprocess.Popen:
        guard = GUARDS[self._library.stem.partition("_")[0]]
        command = [sys.executable, HERE / "worker.py", self._library]
        with self._report.open("w") as report:
            return subprocess.Popen(
                command, env=_environment(guard), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=report
            )


@contextlib.contextmanager
def emulated(library: Path) -> Iterator[EmulatedGpu]:
    """The operators of a library that `build` made; their process ends with the context."""
    gpu = EmulatedGpu(library)
    try:
        yield gpu
    finally:
        gpu.end()
