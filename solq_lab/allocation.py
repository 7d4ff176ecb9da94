"""Where the memory of a dead tensor goes on a CPU: back to the system, or to the next tensor.

glibc takes every large block from the system and gives it back when it is freed. The system clears each page of the
next block again, at its first touch: on a CPU that is up to a fifth of a training step.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_SETTLED = 32 * 2**20  # bytes; where glibc's own, growing thresholds end, twice that for trimming
_NEVER = 2**30  # bytes; a larger block is the system's in any case


def keep_freed_memory(keep: bool = True) -> bool:
    """Ask the C library to keep the memory of freed tensors for new ones, up to the largest need of this process.

    Args:
        keep: False takes large blocks from the system again, as glibc does by itself.

    Returns:
        Whether the C library can do so: glibc can, others stay as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trimmed = libc.mallopt(_TRIM_THRESHOLD, _NEVER if keep else 2 * _SETTLED)
    return bool(trimmed and libc.mallopt(_MMAP_THRESHOLD, _NEVER if keep else _SETTLED))
