"""Stopping politely: a signal asks, the training loop answers between two steps."""

from __future__ import annotations

import logging
import signal
from types import FrameType, TracebackType
from typing import Self

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; kill and torchrun; SLURM before its time limit


class StopRequest:
    """Remembers that one of `STOP_SIGNALS` came while its `with` block runs.

    Loader processes are forked inside the block and so survive a Ctrl-C in the terminal, which reaches them as well.

    Attributes:
        received: name of the signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
