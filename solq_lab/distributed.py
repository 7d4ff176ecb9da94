"""The processes of one training: who am I, how many are we, sum this over all of us, and who is missing.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process and every function is a no-op.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from solq_lab.heartbeat import RankWatch

EXCHANGE_TIMEOUT = datetime.timedelta(hours=2)  # an evaluation on rank 0 may keep the others waiting for long

_watch: RankWatch | None = None  # of this process, as the process group is torch's


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and log lines."""
    return rank() == 0


def device() -> torch.device:
    """This process's device: its own GPU where CUDA is available, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(*, rank_timeout: float, last_words: Callable[[str], None]) -> Iterator[None]:
    """Join the processes that torchrun started, NCCL on GPUs and gloo on CPUs, watch over them, and leave in order.

    Args:
        rank_timeout: seconds without a sign of life after which a process counts as lost (`solq_lab.heartbeat`).
        last_words: told the loss, on one process, before that ends although it still waits for another one.
    """
    global _watch
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=EXCHANGE_TIMEOUT)
    watch = RankWatch(
        _connect_to_store(rank_timeout),
        rank=rank(),
        world_size=world_size(),
        timeout=rank_timeout,
        last_words=last_words,
    )
    with watch:
        _watch = watch
        yield
        wait_for_all()  # leaving while another process is still in its last exchange aborts that one
    _watch = None
    dist.destroy_process_group()  # not after an error: it may wait for a process that is lost


def _connect_to_store(timeout: float) -> dist.TCPStore:
    """A second connection to the store of the process group: on the first one this process may wait for long."""
    patience = datetime.timedelta(seconds=timeout)
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)


def report_step(step: int) -> None:
    """Let the other processes know how many optimiser steps this one has done."""
    if _watch is not None:
        _watch.step = step


def blame(error: BaseException) -> BaseException:
    """What an error comes from: a `ProcessLost` where another process died or hangs, else the error itself.

    The other processes hear of an error of this one's own.
    """
    return error if _watch is None else _watch.blame(error)


def speaks_last() -> bool:
    """Whether this process writes how a broken-off training ended: the main one, or who found that one lost."""
    return is_main() if _watch is None else _watch.speaks_last()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `values` over all processes, on every one of them; the argument is not changed."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def sum_of_numbers(number: float, here: torch.device) -> float:
    """The sum of a number of the host over all processes, on every one of them.

    A process that is alone knows it already: a round trip to a GPU would wait for all that the GPU has yet to do.

    Args:
        number: of this process.
        here: this process's device.
    """
    if world_size() == 1:
        return float(number)
    return sum_over_processes(torch.tensor(float(number), device=here)).item()


def any_process(flag: bool, here: torch.device) -> bool:
    """Whether `flag` is true in any process; the same answer in all of them. `here` is this process's device."""
    return bool(sum_of_numbers(flag, here))


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors`, on every process, with those of the main one."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank, on every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Return when every process is here."""
    if world_size() > 1:
        # NCCL waits on a GPU, and would have to guess which one is this process's.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
