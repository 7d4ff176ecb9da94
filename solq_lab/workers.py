"""Independent pieces of work in several processes; the results do not depend on their number."""

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

_inherited: list[Any] = []  # in a worker: the shared value


def in_processes(
    work: Callable[[Shared, Piece], Result], shared: Shared, pieces: Iterable[Piece], processes: int
) -> Generator[Result, None, None]:
    """work(shared, piece) of every piece, in order.

    Workers are forked: they read `shared` in the parent's memory, so that a large data set is neither sent nor copied.
    Each piece uses one thread, in this process too: sums in a matrix product may depend on the number of threads.

    Args:
        work: a function of a module, pickled by name; with several processes it must not use a GPU.
        shared: data that all pieces need.
        pieces: small values, each an independent piece of work.
        processes: number of processes; 1 works in this process.

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
        while futures:  # frees each result before the next one is fetched
            yield futures.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"one of {processes} worker processes was killed, probably for lack of memory; try fewer processes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _become_worker(shared: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to the whole group; the parent ends its workers
    torch.set_num_threads(1)  # also because the parent's pool of threads does not survive a fork
    _inherited[:] = [shared]


def _work_here(work: Callable[[Any, Any], Any], piece: Any) -> Any:
    return work(_inherited[0], piece)


def _on_one_thread(work: Callable[[Any, Any], Any], shared: Any, piece: Any) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return work(shared, piece)
    finally:
        torch.set_num_threads(threads)
