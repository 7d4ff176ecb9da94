"""Work on independent pieces in several processes, with the same numbers however many there are."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")
Shared = TypeVar("Shared")

_inherited: list[Any] = []  # in a worker: what the pieces share


def in_processes(
    work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], processes: int
) -> Generator[Result, None, None]:
    """work(shared, piece) of every piece, in order.

    Workers are forked: they see `shared` in the parent's memory, so that a large data set is neither sent nor copied.
    Each piece is worked on by one thread, here as there: the sums of a matrix product may depend on their number.

    Args:
        work: a function of a module (it travels by name); it must not use a GPU where there are several processes.
        shared: what all pieces need.
        pieces: small values, each an independent piece of work.
        processes: how many; 1 works here.

    Raises:
        ValueError: `processes` is not positive.
        RuntimeError: a worker was killed.
    """
    if processes < 1:
        raise ValueError(f"processes {processes}: allowed are 1 and more")
    if processes == 1:
        for piece in pieces:
            yield _on_one_thread(work, shared, piece)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_become_worker, initargs=(shared,))
    try:
        futures = deque(pool.submit(_work_here, work, piece) for piece in pieces)
        while futures:  # each result is let go before the next one is fetched
            yield futures.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"one of {processes} worker processes was killed, probably for lack of memory; try fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    torch.set_num_threads(1)  # also because the parent's pool of threads does not survive a fork
    _inherited[:] = [shared]


def _work_here(work: Callable, piece: Any) -> Any:
    return work(_inherited[0], piece)


def _on_one_thread(work: Callable, shared: Any, piece: Any) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(shared, piece)
    finally:
        torch.set_num_threads(threads)
