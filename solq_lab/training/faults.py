"""Errors of the machine, not of the training: memory or disk is full. Loads without torch."""

from __future__ import annotations

import errno
import shutil

from solq_lab.config import Experiment
from solq_lab.errors import ExplainedError
from solq_lab.runs import Run

MEGABYTE = 2**20
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")  # torch on the CPU
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


class OutOfMemory(ExplainedError):
    """Host or GPU have no more memory; the message says what takes less."""


class DiskFull(ExplainedError):
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


def advise_on_memory(experiment: Experiment) -> str:
    """What to change when host or GPU have no more memory, by its settings here."""
    train, data = experiment.train, experiment.data
    per_process = train.batch_size // train.gpus
    share = per_process // train.accumulate
    more = next((parts for parts in range(train.accumulate + 1, per_process + 1) if per_process % parts == 0), None)
    cures = [] if more is None else [f"train.accumulate={more} (the same batch in smaller passes)"]
    cures += [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    cures += [f"a smaller data.max_size (now {data.max_size})"]
    cures += [f"if it is the host's memory, a smaller data.workers (now {data.workers})"] if data.workers else []
    cures += ["data.cache=false"] if data.cache else []
    return (
        f"train.batch_size {train.batch_size} puts {share} images into a pass (gpus {train.gpus}, accumulate "
        f"{train.accumulate}); less memory take: {'; '.join(cures)}. Re-running resumes from the last checkpoint"
    )


def _is_memory(error: Exception, said: str) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return type(error) is RuntimeError and any(text in said for text in _NO_MEMORY)


def _is_disk(error: Exception, said: str) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__name__ == "SafetensorError" and any(text in said for text in _NO_ROOM)
