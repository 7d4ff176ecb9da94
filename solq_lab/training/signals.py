"""Stopping politely: a signal asks, the training answers as soon as it stands well. Loads without torch.

SIGTERM, SIGUSR1 and Ctrl-C let the step under way end; then the training saves and says "preempted". Where there is no
step to end - in start-up, while waiting for images, in an evaluation - it stops at once. A second Ctrl-C, later than
`FORWARDED_SECONDS` after the first signal, does not wait for the saving: it costs the steps since the last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; kill and torchrun; SLURM before its time limit
FORWARDED_SECONDS = 1.0  # within these a second signal is the same one: a terminal sends it, and torchrun once more
SECONDS_TO_DIE = 5.0  # for killed children; one that waits for a dead disk takes longer, and is not waited for
_PR_SET_CHILD_SUBREAPER = 36  # prctl.h


class Stopped(BaseException):
    """A stop signal came where there is nothing to wait for; the message is the signal's name.

    Like KeyboardInterrupt it is no `Exception`: what catches errors and carries on must not swallow it.
    """


class StopRequest:
    """Remembers that one of `STOP_SIGNALS` came while its `with` block runs.

    Loader processes are forked inside the block and so survive a Ctrl-C in the terminal, which reaches them as well.

    Attributes:
        received: name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when = 0.0
        self._at_once = False

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block a stop signal does not wait: it raises `Stopped`, once; so does one that came before."""
        try:
            self._at_once = True
            if self.received is not None:
                self._stop()
            yield
        finally:
            self._at_once = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child; its parent ends it
            return
        if self.received is None:
            self.received, self._when = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._when > FORWARDED_SECONDS:
            raise KeyboardInterrupt
        self._stop()

    def _stop(self) -> None:
        if self._at_once:
            self._at_once = False
            raise Stopped(self.received)


def adopt_orphans() -> None:
    """Let processes whose parent dies become children of this one, their ancestor: `end_children` finds them then.

    A build that is stopped kills ninja, for example, and ninja's compilers would go on.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_children() -> None:
    """Kill every process that this one has started or adopted, because it ends itself."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while (children := _children()) and time.monotonic() < deadline:
        for child in children:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)


def _children() -> list[int]:
    return [int(child) for file in Path("/proc/self/task").glob("*/children") for child in file.read_text().split()]
