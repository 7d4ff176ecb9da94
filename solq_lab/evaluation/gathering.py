"""What several processes find, on the main one while they find it: in bounded memory, and with nobody left waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, TypeVar

import torch.distributed as dist

from solq_lab import distributed

Piece = TypeVar("Piece")
Result = TypeVar("Result")

PIECES_PER_MEETING = 64  # of one process at most; a meeting holds that many of every process in memory
SECONDS_BETWEEN_MEETINGS = 2.0  # a process that goes faster waits for one piece of the slowest


class EvaluationStopped(Exception):
    """Some process was asked to stop; all of them raise this at their next meeting."""


class ProcessFailed(RuntimeError):
    """Another process failed; the message names it and its error."""


class _News(NamedTuple):
    """What a process tells all others at a meeting; `error` describes a failure."""

    state: Literal["working", "done", "stopped", "failed"]
    error: str = ""


def stream_to_main(pieces: Iterable[Piece], should_stop: Callable[[], bool] | None = None) -> Iterator[Piece]:
    """The pieces of all processes, on the main one and as they are made; nothing on the others.

    Every process of the group has to exhaust it. They meet every few pieces, at the latest after
    `SECONDS_BETWEEN_MEETINGS` and the piece in work: there the main one takes over what was made, and all hear who is
    done, stopped or failed. The order of the pieces depends on how fast each process is.

    Args:
        pieces: this process's share; made while it is iterated, and picklable. Shares may differ in length.
        should_stop: asked before each piece. True in any process stops all of them. None: never.

    Raises:
        EvaluationStopped: a process was asked to stop.
        ProcessFailed: making a piece failed in another process. Where it failed, the error itself is raised.
    """
    source = iter(pieces)
    news = _News("working")
    while True:
        parcel: list[Piece] = []
        failure: Exception | None = None
        if news.state == "working":
            try:
                news = _fill(parcel, source, should_stop)
            except Exception as error:
                news, failure = _News("failed", _describe(error)), error
        everyones = distributed.gather_objects(news)
        if failure is not None:
            raise failure
        _raise_bad_news(everyones)
        for share in _gather_on_main(parcel):
            yield from share
        if all(other.state == "done" for other in everyones):
            return


def share_from_main(compute: Callable[[], Result]) -> Result:
    """What the main process computes, on every process; no other one calls `compute`.

    Raises:
        EvaluationStopped: `compute` raised it.
        ProcessFailed: `compute` failed. On the main process the error itself is raised.
    """
    news, failure, result = _News("done"), None, None
    if distributed.is_main():
        try:
            result = compute()
        except EvaluationStopped as error:
            news, failure = _News("stopped"), error
        except Exception as error:
            news, failure = _News("failed", _describe(error)), error
    everyones = distributed.gather_objects((news, result))
    if failure is not None:
        raise failure
    _raise_bad_news([news for news, _ in everyones])
    return everyones[0][1]


def _fill(parcel: list[Piece], source: Iterator[Piece], should_stop: Callable[[], bool] | None) -> _News:
    """Put the pieces up to the next meeting into `parcel`."""
    until = time.monotonic() + SECONDS_BETWEEN_MEETINGS
    while len(parcel) < PIECES_PER_MEETING and time.monotonic() < until:
        if should_stop is not None and should_stop():
            return _News("stopped")
        try:
            parcel.append(next(source))
        except StopIteration:
            return _News("done")
    return _News("working")


def _raise_bad_news(everyones: list[_News]) -> None:
    for rank, news in enumerate(everyones):
        if news.state == "failed":
            raise ProcessFailed(f"process {rank} failed: {news.error}")
    if any(news.state == "stopped" for news in everyones):
        raise EvaluationStopped("a process was asked to stop")


def _gather_on_main(parcel: list[Piece]) -> list[list[Piece]]:
    """The parcels of all processes on the main one, nothing on the others."""
    if distributed.world_size() == 1:
        return [parcel]
    parcels: list | None = [None] * distributed.world_size() if distributed.is_main() else None
    dist.gather_object(parcel, parcels)
    return parcels or []


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
