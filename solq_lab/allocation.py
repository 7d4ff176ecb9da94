"""Memory that is not given back at once: glibc's malloc keeps that of freed tensors, and garbage waits.

By default glibc returns every large block to the system, which clears each page again at its first touch: up to a fifth
of a training step on a CPU.
"""

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_DEFAULT = 32 * 2**20  # bytes; where glibc's own, growing thresholds end, twice that for trimming
_NEVER = 2**30  # bytes; a larger block is the system's in any case


def keep_freed_memory(keep: bool = True) -> bool:
    """Keep the memory of freed tensors, or with False return large blocks to the system, which is glibc's default.

    Returns:
        Whether the C library can do so: glibc can, others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trimmed = libc.mallopt(_TRIM_THRESHOLD, _NEVER if keep else 2 * _DEFAULT)
    return bool(trimmed and libc.mallopt(_MMAP_THRESHOLD, _NEVER if keep else _DEFAULT))


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Meanwhile the collector searches nothing; afterwards as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
