"""Finds the tools that compile the operators: the C++ compiler, ninja, and a CUDA toolkit that fits this torch."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch


class CudaToolkit(NamedTuple):
    """One installation of nvcc."""

    home: Path  # the folder with bin/nvcc and include/
    version: tuple[int, int]  # (major, minor)
    runtime: Path  # its libcudart shared library

    def __str__(self) -> str:
        return f"CUDA {self.version[0]}.{self.version[1]} in {self.home}"


def find_compiler() -> str | None:
    """The C++ compiler that torch would call: $CXX, else c++; None where it is not on the PATH."""
    return shutil.which(os.environ.get("CXX", "c++"))


def find_ninja() -> str | None:
    """ninja on the PATH, or beside the Python that runs (a virtual environment need not be activated)."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def find_cuda_toolkits() -> list[CudaToolkit]:
    """Complete toolkits of this machine, the one that fits torch best first.

    Looked for in $CUDA_HOME and $CUDA_PATH, among the installed Python packages, in /usr/local, and around the nvcc on
    the PATH. A folder counts when it has nvcc, the runtime's headers and its library; an nvcc alone may be a wrapper.
    """
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package else []:
        homes += sorted(Path(folder).glob("cu[0-9]*"))
    homes += sorted(Path("/usr/local").glob("cuda*"))
    if on_path := shutil.which("nvcc"):
        homes.append(Path(on_path).resolve().parent.parent)

    toolkits: dict[Path, CudaToolkit] = {}
    for home in homes:
        if home.resolve() not in toolkits and (toolkit := _inspect(home)):
            toolkits[home.resolve()] = toolkit
    wanted = cuda_version_of_torch()
    return sorted(toolkits.values(), key=lambda toolkit: (toolkit.version != wanted, toolkit.version[:1] != wanted[:1]))


def cuda_version_of_torch() -> tuple[int, ...]:
    """(major, minor) of the CUDA that this torch was built with; empty for a CPU build."""
    return tuple(int(part) for part in torch.version.cuda.split(".")[:2]) if torch.version.cuda else ()


def _inspect(home: Path) -> CudaToolkit | None:
    nvcc = home / "bin" / "nvcc"
    runtimes = [library for folder in ("lib64", "lib") for library in sorted((home / folder).glob("libcudart.so*"))]
    if not nvcc.is_file() or not (home / "include" / "cuda_runtime.h").is_file() or not runtimes:
        return None
    try:
        printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+)\.(\d+)", printed)
    return CudaToolkit(home, (int(release[1]), int(release[2])), runtimes[0]) if release else None
