"""Collects the results of several processes on the main one while they are computed, in bounded memory."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from solq_lab import distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK_SIZE = 64  # items of one process at most; a sync round holds that many of every process in memory
SECONDS_BETWEEN_ROUNDS = 2.0  # a faster process waits for one item of the slowest


class EvaluationStopped(Exception):
    """A process was stopped; all of them raise this in the same sync round."""


class ProcessFailed(RuntimeError):
    """Another process failed; the message names it and its error."""


def stream_to_main(items: Iterable[Item], should_stop: Callable[[], bool] | None = None) -> Iterator[Item]:
    """The items of all processes, on the main one and as they are computed; nothing on the others.

    Every process of the group has to exhaust it. In sync rounds the main process receives a chunk of items of each
    process. The order of the items depends on how fast each process is.

    Args:
        items: this process's share, computed while it is iterated, and picklable. Shares may differ in length.
        should_stop: called before each item. True in any process stops all of them. None: never.

    Raises:
        EvaluationStopped: a process was stopped.
        ProcessFailed: computing an item failed in another process. Where it failed, the error itself is raised.
    """
    source = iter(items)
    chunk: list[Item] = []

    def compute_chunk() -> bool:
        chunk.clear()
        # Full, or after some seconds, so that the other processes do not wait long for a slow one.
        until = time.monotonic() + SECONDS_BETWEEN_ROUNDS
        while len(chunk) < CHUNK_SIZE and time.monotonic() < until:
            if should_stop is not None and should_stop():
                raise EvaluationStopped("a process was stopped")
            try:
                chunk.append(next(source))
            except StopIteration:  # again and again, until the other processes are done too
                break
        return bool(chunk)

    while any(_in_all_processes(compute_chunk)):
        for part in distributed.gather_on_main(chunk):
            yield from part


def share_from_main(compute: Callable[[], Result]) -> Result:
    """What the main process computes, on every process; the others do not call `compute`.

    Raises:
        EvaluationStopped: `compute` raised it.
        ProcessFailed: `compute` failed. On the main process the error itself is raised.
    """
    return _in_all_processes(lambda: compute() if distributed.is_main() else None)[0]


def _in_all_processes(compute: Callable[[], Any]) -> list[Any]:
    """The results of all processes, by rank; where one fails, all raise: its own error, ProcessFailed or a stop."""
    result = None
    error: Exception | None = None
    failure = ""
    try:
        result = compute()
    except EvaluationStopped as stop:
        error = stop
    except Exception as caught:
        error, failure = caught, f"{type(caught).__name__}: {caught}"

    gathered = distributed.gather_objects((result, failure, error is not None))
    if error is not None and failure:
        raise error
    for rank, (_, failed, _) in enumerate(gathered):
        if failed:
            raise ProcessFailed(f"process {rank} failed: {failed}")
    if any(ended for _, _, ended in gathered):
        raise EvaluationStopped("a process was stopped")
    return [result for result, _, _ in gathered]
