"""Description of software and hardware, for environment.json, the benchmarks and the doctor. Loads without torch."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

MODELS = ("torch", "torchvision", "timm", "safetensors")
PACKAGES = ("solq-lab", *MODELS, "numpy", "scipy", "pycocotools", "faster-coco-eval")


def describe_software() -> dict[str, Any]:
    """Python, packages, the repository's git commit, host and command, as JSON types."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)

    git = ["git", "-C", str(Path(__file__).parent)]  # outside a checkout there is no commit
    commit = first_line([*git, "rev-parse", "HEAD"])
    modified = commit and first_line([*git, "status", "--porcelain", "--untracked-files=no"]) is not None
    return {
        "versions": versions,
        "git": commit and {"commit": commit, "modified": modified},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def describe_hardware() -> dict[str, Any]:
    """Processor, memory, GPUs and their libraries, as JSON types. Loads torch.

    Returns:
        "processor" (its name), "cores" (that this process may use), "memory_gb", "gpus" (a name each), and the versions
        of the NVIDIA "driver", "cuda", "cudnn" and "nccl", None where there is none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_gpu else [],
        "driver": first_line(driver) if has_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else None,
    }


def processor_name() -> str:
    """The processor's name."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def processor_features() -> str:
    """Model and instruction sets of the processor: what -march=native stands for."""
    kept = {line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join(sorted(kept)) or platform.processor()


def first_line(command: list[str]) -> str | None:
    """The first line that a command prints; None where it fails or prints nothing."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(printed.strip().splitlines()), None)


def _cpuinfo() -> list[str]:
    """Linux's description of the processor, which `platform` does not read; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
