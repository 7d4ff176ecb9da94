"""Collects the results of several processes on the main one while they are computed, in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from solq_lab import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_SIZE = 64  # items of one process at most; a sync round holds that many of every process in memory
SECONDS_BETWEEN_ROUNDS = 2.0  # a faster process waits for one item of the slowest
WORKING, DONE, STOPPED = "working", "done", "stopped"  # status of a process; any other one describes an error


class EvaluationStopped(Exception):
    """A process was stopped; all of them raise this in the same sync round."""


class ProcessFailed(RuntimeError):
    """Another process failed; the message names it and its error."""


def stream_to_main(items: Iterable[Item], should_stop: Callable[[], bool] | None = None) -> Iterator[Item]:
    """The items of all processes, on the main one and as they are computed; nothing on the others.

    Every process of the group has to exhaust it. In sync rounds, after a chunk of items each, the main process receives
    the chunks, and all exchange their status. The order of the items depends on how fast each process is.

    Args:
        items: this process's share, computed while it is iterated, and picklable. Shares may differ in length.
        should_stop: called before each item. True in any process stops all of them. None: never.

    Raises:
        EvaluationStopped: a process was stopped.
        ProcessFailed: computing an item failed in another process. Where it failed, the error itself is raised.
    """
    chunks = _chunks(items, should_stop)
    while True:
        chunk: list[Item] | None = None
        error: Exception | None = None
        try:
            chunk = next(chunks, None)  # None again and again, until the other processes are done too
        except Exception as caught:
            error = caught
        gathered = distributed.gather_objects(_status(error) or (DONE if chunk is None else WORKING))
        _raise_errors(gathered, error)
        for part in distributed.gather_on_main(chunk or []):
            yield from part
        if all(status == DONE for status in gathered):
            return


def share_from_main(compute: Callable[[], Result]) -> Result:
    """What the main process computes, on every process; the others do not call `compute`.

    Raises:
        EvaluationStopped: `compute` raised it.
        ProcessFailed: `compute` failed. On the main process the error itself is raised.
    """
    result: Result | None = None
    error: Exception | None = None
    if distributed.is_main():
        try:
            result = compute()
        except Exception as caught:
            error = caught
    gathered = distributed.gather_objects((_status(error) or DONE, result))
    _raise_errors([status for status, _ in gathered], error)
    return gathered[0][1]


def _chunks(items: Iterable[Item], should_stop: Callable[[], bool] | None) -> Iterator[list[Item]]:
    """The items in lists that are full, or took `SECONDS_BETWEEN_ROUNDS`."""
    source = iter(items)
    chunk: list[Item] = []
    until = time.monotonic() + SECONDS_BETWEEN_ROUNDS
    while True:
        if should_stop is not None and should_stop():
            raise EvaluationStopped("a process was stopped")
        try:
            chunk.append(next(source))
        except StopIteration:
            break

        # Also after some seconds, so that the other processes do not wait long for a slow one.
        if len(chunk) == CHUNK_SIZE or time.monotonic() > until:
            yield chunk
            chunk, until = [], time.monotonic() + SECONDS_BETWEEN_ROUNDS
    if chunk:
        yield chunk


def _status(error: Exception | None) -> str:
    if error is None:
        return ""
    return STOPPED if isinstance(error, EvaluationStopped) else f"{type(error).__name__}: {error}"


def _raise_errors(statuses: list[str], own: Exception | None) -> None:
    """Raise the error of this process, else the failure of another one, else the stop of any."""
    if own is not None and not isinstance(own, EvaluationStopped):
        raise own
    for rank, status in enumerate(statuses):
        if status not in (WORKING, DONE, STOPPED):
            raise ProcessFailed(f"process {rank} failed: {status}")
    if STOPPED in statuses:
        raise EvaluationStopped("a process was stopped")
