"""Detects dead or hung ranks and aborts the job.

A thread of every process writes a heartbeat to torchrun's store and reads those of the others; it keeps running while
the main thread compiles, evaluates or writes. A dead process is detected within two seconds on its own machine, a
stopped or cut off one after `timeout` seconds without a heartbeat. The first rank to detect it publishes the failure,
and all processes end. A process that loses its launcher saves and stops, as after a signal.
"""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

import psutil
import torch.distributed as dist

from solq_lab.errors import ExplainedError

Error = TypeVar("Error", bound=BaseException)

log = logging.getLogger(__name__)

INTERVAL = 1.0  # seconds between heartbeats
MAX_PAUSE = 5.0  # seconds; a monitor that did not run for longer was itself stopped, and cannot judge others
SECONDS_AFTER_ERROR = 5.0  # instead of `timeout`, once a collective operation has failed
SECONDS_TO_END = 20.0  # after a failure, to end in order; a main thread that waits on a GPU for a lost rank never would
SECONDS_TO_SAVE = 600.0  # after the launcher was lost, to save and to stop

_PREFIX = f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # restarts share one store
_FAILURE_KEY = f"{_PREFIX}/failure"


class ProcessLost(ExplainedError):
    """Another process of the training died, hangs or failed; the message names its rank, host, process id and step."""


class Heartbeat(NamedTuple):
    """The latest sign of life of a process."""

    # host, pid: where it runs
    host: str
    pid: int
    node: str  # machine and launcher; the processes of one node see each other's ids
    step: int  # optimiser steps done
    number: int  # of this heartbeat, from 1
    finished: bool  # whether it has left in order


class Failure(NamedTuple):
    """The failure that ends the job: of which rank, a message that names it, and the rank that reported it."""

    rank: int
    message: str
    reporter: int


class HeartbeatMonitor(threading.Thread):
    """Monitors all other ranks on behalf of one; used as a context manager.

    Args:
        store: the processes' common store, over a connection of its own: the training's may block.
        rank, world_size: which of how many processes this is.
        timeout: seconds without a heartbeat after which a process counts as lost.
        on_fatal: receives the failure, on one rank, where the main thread is still blocked as the process is ended.

    Attributes:
        step: optimiser steps done, part of the heartbeat; the training sets it.
        failure: what ends the job, once that is known.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout: float, on_fatal: Callable[[str], None]
    ) -> None:
        super().__init__(name="heartbeat monitor", daemon=True)
        self.step = 0
        self.failure: Failure | None = None
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._on_fatal = on_fatal
        self._launcher, self._host = os.getppid(), socket.gethostname()
        self._node = f"{self._host} {os.environ.get('GROUP_RANK')}"  # torchrun's number of its launcher
        self._count = 0
        self._seen: dict[int, tuple[Heartbeat, float]] = {}  # by rank: its newest heartbeat, and when it came
        self._last_check = time.monotonic()
        self._failed, self._finished = threading.Event(), threading.Event()
        self._suspicious = self._diagnosed = False
        self._disconnected = ""  # why no rank can be monitored any more
        self._deadline = math.inf  # when to abort, once something has failed

    def __enter__(self) -> Self:
        self._beat()
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.diagnose(error)  # the thread stays: the way out may block on a lost process
            return
        self._finished.set()
        self.join()
        if not self._disconnected:
            with contextlib.suppress(RuntimeError):  # the store is gone, and so are its readers
                self._beat(finished=True)

    def diagnose(self, error: Error) -> Error | ProcessLost:
        """The cause of an error of this process: a `ProcessLost`, or `error` itself, which is then published."""
        if isinstance(error, ProcessLost) or self._diagnosed:
            return error
        self._diagnosed = True

        gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()  # its errors have no class of their own
        if not gloo and not isinstance(error, dist.DistError):
            with contextlib.suppress(RuntimeError):  # without the store, others see failed collective operations
                ended = "failed" if isinstance(error, Exception) else "was stopped"
                self._publish(self._rank, f"{ended}: {type(error).__name__}: {error}")
            return error

        # A collective operation fails as soon as a peer is gone, before the peer's heartbeat is missed.
        self._suspicious = True
        self._failed.wait(SECONDS_AFTER_ERROR + 5 * INTERVAL)
        lost = self.failure.message if self.failure else self._disconnected
        return ProcessLost(lost) if lost else error

    def is_reporting_rank(self) -> bool:
        """Whether this process writes how the training ended: rank 0, or the reporter of rank 0's failure.

        Where the store is gone, nothing is known about the others, and every rank reports the same.
        """
        reporter = self.failure.reporter if self.failure and self.failure.rank == 0 else 0
        return self._rank == reporter or bool(self._disconnected)

    def run(self) -> None:
        """Write heartbeats and check the others' until the process leaves."""
        while not self._finished.wait(INTERVAL):
            if not self._disconnected:
                self._check()
            if time.monotonic() > self._deadline:  # the main thread is blocked
                message = self.failure.message if self.failure else self._disconnected
                if self.is_reporting_rank() and not self._diagnosed:
                    self._on_fatal(f"{ProcessLost.__name__}: {message}")
                log.error("rank %d: aborted: %s", self._rank, message)
                logging.shutdown()
                os._exit(1)

    def _check(self) -> None:
        if os.getppid() != self._launcher:
            self._save_and_stop(f"the launcher, process {self._launcher} on {self._host}, is gone")
            return
        try:
            self._beat()
            if self.failure is None and self._store.check([_FAILURE_KEY]):
                self._handle(Failure(*json.loads(self._store.get(_FAILURE_KEY))))
            if self.failure is None:
                self._check_others()
        except RuntimeError as error:  # after waiting for `timeout` seconds, or as the connection is broken for good
            self._save_and_stop(f"the first launcher cannot be reached, {str(error).splitlines()[0]}")

    def _beat(self, *, finished: bool = False) -> None:
        self._count += 1
        heartbeat = Heartbeat(self._host, os.getpid(), self._node, self.step, self._count, finished)
        self._store.set(_key(self._rank), json.dumps(heartbeat))

    def _check_others(self) -> None:
        """Read the others' heartbeats, and publish the first failure found."""
        # Before the heartbeats are read: a process that leaves in order says so first, and is gone only then.
        seen = {rank: heartbeat for rank, (heartbeat, _) in self._seen.items()}
        gone = {rank for rank, beat in seen.items() if beat.node == self._node and not psutil.pid_exists(beat.pid)}

        others = [rank for rank in range(self._world_size) if rank != self._rank]
        started = [rank for rank in others if rank in seen or self._store.check([_key(rank)])]
        texts = self._store.multi_get([_key(rank) for rank in started])
        now = time.monotonic()
        paused, self._last_check = now - self._last_check > MAX_PAUSE, now
        timeout = min(self._timeout, SECONDS_AFTER_ERROR) if self._suspicious else self._timeout

        for rank, text in zip(started, texts, strict=True):
            heartbeat = Heartbeat(*json.loads(text))
            if paused or heartbeat != seen.get(rank):
                self._seen[rank] = (heartbeat, now)
            silent = now - self._seen[rank][1]
            if rank in gone and not heartbeat.finished:
                self._publish(rank, "died, killed from outside or out of memory")
            elif silent > timeout and not heartbeat.finished:
                self._publish(rank, f"sent no heartbeat for {silent:.0f} s, stopped or cut off")

    def _publish(self, rank: int, what: str) -> None:
        """Publish a failure to all ranks; where another one was published first, that counts."""
        step, host, pid = self.step, self._host, os.getpid()
        if rank != self._rank:
            heartbeat, _ = self._seen[rank]
            step, host, pid = heartbeat.step, heartbeat.host, heartbeat.pid
        message = f"rank {rank} of {self._world_size} ({host}, process {pid}) {what}; it had done {step} steps"
        first = self._store.compare_set(_FAILURE_KEY, "", json.dumps(Failure(rank, message, self._rank)))
        self._handle(Failure(*json.loads(first)))

    def _handle(self, failure: Failure) -> None:
        """Take over the failure that ends the job, and give the main thread a while to end in order."""
        if self.failure is not None:
            return
        self.failure = failure
        self._deadline = time.monotonic() + SECONDS_TO_END
        if failure.rank != self._rank:
            log.error("rank %d: %s", self._rank, failure.message)

        # A rank that another one reported is dead or hangs; a stopped process reacts to SIGKILL only.
        if failure.reporter != failure.rank and failure.rank in self._seen:
            heartbeat, _ = self._seen[failure.rank]
            if heartbeat.node == self._node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(heartbeat.pid, signal.SIGKILL)
        self._failed.set()

    def _save_and_stop(self, why: str) -> None:
        """Stop this process as a signal does: all ranks agree on a step, save and end."""
        log.error("rank %d: %s; saving and stopping", self._rank, why)
        self._disconnected = why
        self._deadline = time.monotonic() + SECONDS_TO_SAVE
        os.kill(os.getpid(), signal.SIGTERM)


def _key(rank: int) -> str:
    return f"{_PREFIX}/{rank}"
