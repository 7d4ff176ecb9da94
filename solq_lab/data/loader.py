"""Batches of a data set, read ahead by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from solq_lab.data.annotations import DataError
from solq_lab.errors import ExplainedError
from solq_lab.structures import ImageBatch, Target

logger = logging.getLogger(__name__)

PATIENCE = 600.0  # seconds to wait for a batch: longer than any disk is slow
POLL = 5.0  # seconds between looks for dead workers
SUBSTITUTES = 8  # unreadable images in a row that are replaced; more are a lost disk, not a damaged file
_STOPS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
_CAUSES = {
    "SIGKILL": "for lack of memory as a rule; lower data.workers, or turn data.cache off",
    "SIGBUS": "shared memory (/dev/shm) is full as a rule; enlarge it or lower data.workers",
}

Sample = tuple[Tensor, Target]
Batch = tuple[ImageBatch, list[Target]]


class LoaderError(ExplainedError):
    """A loader process ended or hangs; the message names it and the cure."""


def collate(samples: list[Sample]) -> Batch:
    """One batch of samples (image (3, H, W) uint8, target), padded bottom and right to the largest sides."""
    return ImageBatch.from_list([image for image, _ in samples]), [target for _, target in samples]


class BatchLoader:
    """An iterator over the batches (ImageBatch, list of Target) of a data set, read ahead by worker processes.

    The workers start at once, run until the last batch, and compute with one thread each. They ignore stop signals,
    which the reading process handles. Images are in page-locked memory where there is a CUDA device.

    Attributes:
        replaced: unreadable images that were replaced by others, so far.

    Raises, while iterating:
        DataError: an image cannot be read; the message names file, image id and annotation file.
        LoaderError: a worker ended, or no batch arrived in time.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Iterable[list],
        workers: int,
        *,
        substitutes: int = 0,
        patience: float = PATIENCE,
    ) -> None:
        """Start the workers.

        Args:
            dataset: gives the sample of a key, or raises DataError.
            batches: lists of keys, for example a `BatchStream`.
            workers: loader processes; 0 loads in this process.
            substitutes: how many unreadable images in a row may be replaced by those after them, each with an error
                in the log. 0: the first one ends the iteration with its DataError.
            patience: seconds to wait for a batch.
        """
        self.replaced = 0
        self._patience, self._poll = patience, min(POLL, patience)
        loader = DataLoader(
            _Readable(dataset, substitutes),
            batch_sampler=batches,
            collate_fn=_collate_readings,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            timeout=self._poll if workers else 0,
        )

        others = multiprocessing.active_children()
        with _signals_kept():
            self._readings = iter(loader)
        started = [process for process in multiprocessing.active_children() if process not in others]
        self._workers = sorted(started, key=lambda process: process.pid or 0)
        # At its end Python sends SIGTERM to its children and waits for them; workers ignore it, so kill them before.
        self._end = partial(_kill, self._workers)
        atexit.register(self._end)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            reading = self._wait() if self._workers else next(self._readings)
            if reading.batch is None:
                more = f" ({len(reading.faults) - 1} more could not be read)" if len(reading.faults) > 1 else ""
                raise DataError(reading.faults[0] + more)
        except BaseException:  # the end of the batches too
            self.close()
            raise
        for fault in reading.faults:
            self.replaced += 1
            logger.error("%s; the next image takes its place (%d replaced so far)", fault, self.replaced)
        return reading.batch

    def close(self) -> None:
        """Kill the workers."""
        atexit.unregister(self._end)
        self._end()

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self.close()

    def _wait(self) -> _Reading:
        """The next batch of the workers, waited for at most `patience` seconds."""
        for _ in range(math.ceil(self._patience / self._poll)):  # a clock would count suspended time
            try:
                return next(self._readings)
            except (RuntimeError, OSError, EOFError) as error:  # also a batch whose worker ended before it was fetched
                timed_out = str(error).startswith("DataLoader timed out")
                self._check_workers(timeout=0.0 if timed_out else 1.0)
                if not timed_out:
                    raise
        pids = ", ".join(str(process.pid) for process in self._workers)
        raise LoaderError(
            f"no images for {self._patience:.0f} s from {len(self._workers)} loader processes (pids {pids}): they were "
            "stopped by a signal, or the disk hangs; look at the image folder, then run the same command again"
        )

    def _check_workers(self, timeout: float) -> None:
        """Raise LoaderError for a worker that has ended, or ends within `timeout` seconds."""
        ended = wait([process.sentinel for process in self._workers], timeout=timeout)
        for number, process in enumerate(self._workers, start=1):
            if process.sentinel in ended:
                process.join(timeout=1.0)
                code = process.exitcode or 0
                cause = f"ended with exit status {code}; its last lines are in the log"
                if code < 0:
                    name = signal.Signals(-code).name
                    cause = f"was killed by {name}" + (f", {_CAUSES[name]}" if name in _CAUSES else "")
                raise LoaderError(
                    f"loader process {number} of {len(self._workers)} (pid {process.pid}) {cause}; re-running the "
                    "training resumes from its last checkpoint"
                )


class _Reading(NamedTuple):
    """A batch, None where an image of it could not be read, and the reasons why images could not."""

    batch: Batch | None
    faults: list[str]


class _Readable(Dataset):
    """Samples with the reasons why images could not be read: an exception would lose its type on its way."""

    def __init__(self, dataset: Dataset, substitutes: int) -> None:
        self.dataset, self.substitutes = dataset, substitutes

    def __getitem__(self, key: Any) -> tuple[Sample | None, list[str]]:
        faults: list[str] = []
        for _ in range(self.substitutes + 1):
            try:
                return self.dataset[key], faults
            except DataError as error:
                faults.append(str(error))
                if self.substitutes:
                    epoch, index = key
                    key = epoch, (index + 1) % len(self.dataset)  # type: ignore[arg-type]  # it has a length
        return None, faults


def _collate_readings(readings: list[tuple[Sample | None, list[str]]]) -> _Reading:
    samples = [sample for sample, _ in readings if sample is not None]
    # The faults of the image that could not be replaced come first.
    faults = [fault for _, some in sorted(readings, key=lambda reading: reading[0] is not None) for fault in some]
    return _Reading(collate(samples) if len(samples) == len(readings) else None, faults)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Processes that start within ignore stop signals; this one gets them afterwards, and keeps its handlers.

    PyTorch's handler for SIGCHLD would raise wherever the program is, even while a checkpoint is saved.
    """
    blocked, handler = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS), signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=1.0)  # one that waits for a lost disk ends later
