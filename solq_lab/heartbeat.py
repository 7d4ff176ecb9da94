"""Watching over the processes of one training: who died, who hangs, and that nobody waits for them in vain.

Every process (rank) has a thread that leaves a sign of life in the store that torchrun's processes share, and looks at
those of the others. A thread, because the main one may compile, evaluate or write for long: whoever has a running
thread is alive, whatever else it does. A process that died is missed within two seconds by those of its machine; one
that is stopped, or on a machine that is cut off, after `timeout` seconds without a sign. Whoever misses a process
first posts its name, and all end. Without their launcher they save and stop, as at a signal.
"""

from __future__ import annotations

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
from typing import NamedTuple, Self

import torch.distributed as dist

from solq_lab.errors import ExplainedError

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_ASLEEP = 5.0  # a watch that did not look for so long was itself stopped, and can say nothing about others
SECONDS_OF_SUSPICION = 5.0  # instead of `timeout`, once an exchange with some process has failed
SECONDS_TO_END = 20.0  # after a loss, to end in order; a main thread that waits on a GPU for the lost one never would
SECONDS_TO_SAVE = 600.0  # after the launcher was lost, to save and to stop


class ProcessLost(ExplainedError):
    """Another process of the training died, hangs or failed; the message names its rank, host, process id and step."""


class Sign(NamedTuple):
    """A process's sign of life.

    host, pid: where it is.
    node: machine and launcher; the processes of one node see each other's ids.
    step: optimiser steps done.
    count: signs given.
    left: whether it left in order.
    """

    host: str
    pid: int
    node: str
    step: int
    count: int
    left: bool


class Verdict(NamedTuple):
    """The one loss that ends a training.

    rank: whose.
    text: who that is, and what happened.
    hangs: whether its process still exists.
    teller: the rank that posted it.
    """

    rank: int
    text: str
    hangs: bool
    teller: int


class RankWatch(threading.Thread):
    """The watch of one process over all others.

    Attributes:
        step: optimiser steps done, for the others to know; the training sets it.
    """

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout: float, last_words: Callable[[str], None]
    ) -> None:
        """Prepare the watch; `with` runs it.

        Args:
            store: the processes' common store, over a connection of its own: on the training's others may wait.
            rank, world_size: which of how many processes this is.
            timeout: seconds without a sign of life after which a process counts as lost.
            last_words: told the loss before this process ends although its main thread still waits for something.
        """
        super().__init__(name="rank watch", daemon=True)
        self.step = 0
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._last_words = last_words
        self._launcher = os.getppid()
        self._host = socket.gethostname()
        self._node = f"{self._host} {os.environ.get('GROUP_RANK')}"  # torchrun's number of its launcher
        self._signs_given = 0
        self._seen: dict[int, tuple[Sign, float]] = {}  # by rank: its newest sign, and when it came
        self._looked = time.monotonic()
        self._verdict: Verdict | None = None
        self._heard, self._left = threading.Event(), threading.Event()
        self._suspicious = self._told = False
        self._alone = ""  # why nobody can be watched any more
        self._deadline = math.inf  # when to end at the latest, once something is lost

    def __enter__(self) -> Self:
        self._give_sign()
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.blame(error)  # the thread stays: the way out may lead past a lost process
            return
        self._left.set()
        self.join()
        if not self._alone:
            with contextlib.suppress(RuntimeError):  # the store is gone, and so is everybody who would read this
                self._give_sign(left=True)

    def blame(self, error: BaseException) -> BaseException:
        """What an error of this process comes from: the loss of another one, or itself, which the others then hear of.

        Returns:
            A `ProcessLost`, or `error`.
        """
        if isinstance(error, ProcessLost) or self._told:
            return error
        self._told = True
        if not _is_failed_exchange(error):
            with contextlib.suppress(RuntimeError):  # the store is gone: the others learn it from failed exchanges
                ended = "failed" if isinstance(error, Exception) else "was stopped"
                self._post(self._rank, f"{ended}: {type(error).__name__}: {error}")
            return error
        self._suspicious = True
        self._heard.wait(SECONDS_OF_SUSPICION + 5 * SECONDS_BETWEEN_SIGNS)
        lost = self._alone if self._verdict is None else self._verdict.text
        return ProcessLost(lost) if lost else error

    def speaks_last(self) -> bool:
        """Whether this process writes how the training ended: the main one, or who found that one lost.

        Where the store is gone too, nobody knows who is left, and all say the same.
        """
        if self._alone:
            return True
        speaker = 0 if self._verdict is None or self._verdict.rank != 0 else self._verdict.teller
        return self._rank == speaker

    def run(self) -> None:
        """Give signs and look around until the process leaves."""
        while not self._left.wait(SECONDS_BETWEEN_SIGNS):
            if not self._alone:
                self._watch_once()
            if time.monotonic() > self._deadline:
                self._end()

    def _watch_once(self) -> None:
        if os.getppid() != self._launcher:
            self._stop_politely(f"the launcher, process {self._launcher} on {self._host}, is gone")
            return
        try:
            self._give_sign()
            self._look_around()
        except RuntimeError as error:  # it has waited for `timeout` seconds, or the connection is broken for good
            self._stop_politely(f"the first launcher cannot be reached, {str(error).splitlines()[0]}")

    def _give_sign(self, *, left: bool = False) -> None:
        self._signs_given += 1
        sign = Sign(self._host, os.getpid(), self._node, self.step, self._signs_given, left)
        self._store.set(_key(self._rank), json.dumps(sign))

    def _look_around(self) -> None:
        """Read the others' signs, and post the first loss that shows."""
        if self._verdict is None and self._store.check([_VERDICT]):
            self._heed(Verdict(*json.loads(self._store.get(_VERDICT))))
        if self._verdict is not None:
            return
        ranks = [rank for rank in range(self._world_size) if rank != self._rank]
        if len(self._seen) < len(ranks):
            ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
        # Before the signs are read: whoever leaves in order says so first, and is gone only then.
        gone = {rank for rank in ranks if rank in self._seen and self._is_gone(self._seen[rank][0])}
        signs = [Sign(*json.loads(text)) for text in self._store.multi_get([_key(rank) for rank in ranks])]
        now = time.monotonic()
        asleep, self._looked = now - self._looked > SECONDS_ASLEEP, now
        patience = min(self._timeout, SECONDS_OF_SUSPICION) if self._suspicious else self._timeout
        for rank, sign in zip(ranks, signs, strict=True):
            if asleep or rank not in self._seen or sign != self._seen[rank][0]:
                self._seen[rank] = (sign, now)
            silent = now - self._seen[rank][1]
            if rank in gone and not sign.left:
                self._post(rank, "died, killed from outside or for want of memory")
            elif silent > patience and not sign.left:
                self._post(rank, f"gave no sign of life for {silent:.0f} s, stopped or cut off", hangs=True)

    def _is_gone(self, sign: Sign) -> bool:
        """Whether a process of this machine exists no more; of others nobody here can say."""
        if sign.node != self._node:
            return False
        try:
            os.kill(sign.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def _post(self, rank: int, what: str, *, hangs: bool = False) -> None:
        """Tell everybody of a loss; where another one was posted first, that counts."""
        step, host, pid = self.step, self._host, os.getpid()
        if rank != self._rank:
            sign, _ = self._seen[rank]
            step, host, pid = sign.step, sign.host, sign.pid
        text = f"rank {rank} of {self._world_size} ({host}, process {pid}) {what}; it had done {step} steps"
        posted = self._store.compare_set(_VERDICT, "", json.dumps(Verdict(rank, text, hangs, self._rank)))
        self._heed(Verdict(*json.loads(posted)))

    def _heed(self, verdict: Verdict) -> None:
        """Take note of the loss that ends the training, and give the main thread a while to end in order."""
        if self._verdict is not None:
            return
        self._verdict = verdict
        self._deadline = time.monotonic() + SECONDS_TO_END
        if verdict.rank != self._rank:
            log.error("rank %d: %s", self._rank, verdict.text)
        if verdict.hangs and verdict.rank in self._seen and self._seen[verdict.rank][0].node == self._node:
            with contextlib.suppress(ProcessLookupError):  # a stopped process hears no other signal
                os.kill(self._seen[verdict.rank][0].pid, signal.SIGKILL)
        self._heard.set()

    def _stop_politely(self, why: str) -> None:
        """Let this process ask for a stop, as if somebody had sent the signal: all agree, save and end."""
        log.error("rank %d: %s; saving and stopping", self._rank, why)
        self._alone = why
        self._deadline = time.monotonic() + SECONDS_TO_SAVE
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self) -> None:
        """End this process while its main thread waits for something that will not come."""
        text = self._alone if self._verdict is None else self._verdict.text
        if self.speaks_last() and not self._told:
            self._last_words(f"{ProcessLost.__name__}: {text}")
        log.error("rank %d: ends without waiting any longer: %s", self._rank, text)
        logging.shutdown()
        os._exit(1)


_RESTART = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a restarted training shares the store of the one before
_VERDICT = f"watch/{_RESTART}/verdict"


def _key(rank: int) -> str:
    return f"watch/{_RESTART}/{rank}"


def _is_failed_exchange(error: BaseException) -> bool:
    """Whether an error came out of an exchange with other processes; gloo's are plain runtime errors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
