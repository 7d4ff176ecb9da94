"""Graceful shutdown on SIGTERM, SIGUSR1 and SIGINT. Loads without torch.

The step under way ends, then the training saves and ends as "preempted". Where there is no step to end - in start-up,
while waiting for images, in an evaluation - it stops at once. A second Ctrl-C, later than `FORWARDED_SECONDS` after the
first signal, skips the saving: it costs the steps since the last checkpoint.
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; kill and torchrun; SLURM before its time limit
FORWARDED_SECONDS = 1.0  # within these a second signal is the same one: a terminal sends it, and torchrun once more
SECONDS_TO_DIE = 5.0  # for killed children; one that waits for a broken disk takes longer, and is not waited for
_PR_SET_CHILD_SUBREAPER = 36  # prctl.h


class Stopped(BaseException):
    """A stop signal where there is no step to end; the message is the signal's name.

    Like KeyboardInterrupt it is no `Exception`: code that handles errors and carries on must not swallow it.
    """


class StopRequest:
    """Records the first of `STOP_SIGNALS` that comes while its `with` block runs.

    Loader processes are forked inside the block and so survive a Ctrl-C in the terminal, which reaches them as well.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the first signal
        self._when = 0.0
        self._at_once = False

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a stop signal raises `Stopped`, once; so does one that came before."""
        self._at_once = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child; its parent ends it
            return
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > FORWARDED_SECONDS:
            raise KeyboardInterrupt
        if self._at_once:
            self._at_once = False
            raise Stopped(self.received)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, so that `end_children` finds them.

    A build that is stopped kills ninja, for example, but not ninja's compilers.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def interrupted_by(stop: StopRequest) -> contextlib.AbstractContextManager[None]:
    """Within, a stop signal interrupts the evaluation of a single process; several stop together between images."""
    from solq_lab import distributed  # loads torch, before which the handlers are set

    return stop.at_once() if distributed.world_size() == 1 else contextlib.nullcontext()


def end_children() -> None:
    """Kill every process that this one has started or adopted."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while (children := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, timeout=max(0.0, deadline - time.monotonic()))
