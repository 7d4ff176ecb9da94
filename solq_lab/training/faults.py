"""Errors of the machine, memory or disk full, and the last status of a failed training. Loads without torch."""

import errno
import logging
import shutil

from solq_lab.config import Experiment
from solq_lab.errors import ExplainedError
from solq_lab.runs import Run, State

log = logging.getLogger(__name__)

MEGABYTE = 2**20
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")  # torch on the CPU
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


class OutOfMemory(ExplainedError):
    """Host or GPU have no more memory; the message says what takes less."""


class DiskFull(ExplainedError):
    """A file of the run could not be written; the message says how much room is left."""


def explain_fault(error: Exception, run: Run) -> Exception:
    """A clearer exception for an error that a full memory or disk caused; any other error unchanged."""
    import torch

    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        no_memory = error.errno == errno.ENOMEM
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
    else:  # torch on the CPU and safetensors have no error classes for these
        no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        no_memory |= type(error) is RuntimeError and any(sign in text for sign in _NO_MEMORY)
        no_room = type(error).__name__ == "SafetensorError" and any(sign in text for sign in _NO_ROOM)

    if no_memory:
        return OutOfMemory(f"out of memory ({text or type(error).__name__}). {advise_on_memory(run.experiment)}")
    if no_room:
        free = shutil.disk_usage(run.folder).free / MEGABYTE
        cure = "make room; re-running resumes from the last checkpoint"
        return DiskFull(f"{run.folder}: the disk is full ({text}; {free:.1f} MB are free); {cure}")
    return error


def advise_on_memory(experiment: Experiment) -> str:
    """The settings of an experiment that take less memory of host or GPU."""
    train, data = experiment.train, experiment.data
    per_process = train.batch_size // max(train.gpus, 1)
    images = per_process // train.accumulate
    more = next((parts for parts in range(train.accumulate + 1, per_process + 1) if per_process % parts == 0), None)
    cures = [] if more is None else [f"train.accumulate={more} (the same batch in smaller micro-batches)"]
    cures += [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    cures += [f"a smaller data.max_size (now {data.max_size})"]
    cures += [f"if it is the host's memory, a smaller data.workers (now {data.workers})"] if data.workers else []
    cures += ["data.cache=false"] if data.cache else []
    return (
        f"train.batch_size {train.batch_size} gives micro-batches of {images} images (gpus {train.gpus}, accumulate "
        f"{train.accumulate}); less memory take: {'; '.join(cures)}. Re-running resumes from the last checkpoint"
    )


def write_last_status(run: Run, state: State, message: str, exit_status: int | None = None) -> None:
    """Write how the training ended, or log an error if the disk is full; the step is that of the last checkpoint."""
    try:
        run.write_status(state, step=run.status()["step"], message=message, exit_status=exit_status)
    except OSError as error:
        log.error("%s: %s could not be written: %s", run.folder, state, error)
