"""What a training runs on, for environment.json: numbers differ between processors, and people ask later."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import torch

from solq_lab.workbench.doctor import processor_name


def describe_hardware() -> dict[str, Any]:
    """Processor, memory, GPUs and their libraries, as JSON types.

    Returns:
        "processor" (its name), "cores" (that this process may use), "memory_gb", "gpus" (a name each), and the versions
        of the NVIDIA "driver", "cuda", "cudnn" and "nccl", None where there is none.
    """
    has_gpu = torch.cuda.is_available()
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if has_gpu else [],
        "driver": _driver() if has_gpu else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else None,
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return answer[0] if answer else None
