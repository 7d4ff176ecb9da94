"""Errors of the machine, not of the training: the memory or the disk is at its end. What they mean and what helps."""

from __future__ import annotations

import errno
import shutil

import torch

from solq_lab.runs import Run
from solq_lab.workbench.deaths import advise_on_memory

MEGABYTE = 2**20
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")  # torch on the CPU
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


class OutOfMemory(RuntimeError):
    """Host or GPU have no more memory; the message says what takes less."""


class DiskFull(RuntimeError):
    """A file of the run could not be written; the message says how much room is left."""


def name_fault(error: Exception, run: Run) -> Exception:
    """A clearer exception for an error that memory or disk caused; any other error as it is."""
    said = " ".join(str(error).split())
    if _is_memory(error, said):
        return OutOfMemory(f"out of memory ({said or type(error).__name__}). {advise_on_memory(run.experiment)}")
    if _is_disk(error, said):
        free = shutil.disk_usage(run.folder).free / MEGABYTE
        cure = "make room, and the same command goes on from the last checkpoint"
        return DiskFull(f"{run.folder}: the disk is full ({said}; {free:.1f} MB are free); {cure}")
    return error


def _is_memory(error: Exception, said: str) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return type(error) is RuntimeError and any(text in said for text in _NO_MEMORY)


def _is_disk(error: Exception, said: str) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and any(text in said for text in _NO_ROOM)
