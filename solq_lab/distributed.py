"""Rank, world size and collective operations of the processes of one training.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process and every function is a no-op.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from solq_lab.heartbeat import Error, HeartbeatMonitor, ProcessLost
from solq_lab.shared_memory import SharedMemory, share_memory

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # an evaluation on rank 0 may keep the others waiting for long

# One per process, as torch's process group is.
_monitor: HeartbeatMonitor | None = None
_memory: SharedMemory | None = None


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
def process_group(*, rank_timeout: float, on_fatal: Callable[[str], None]) -> Iterator[None]:
    """Join the processes that torchrun started, NCCL on GPUs and gloo on CPUs, monitor them, and leave in order.

    Args:
        rank_timeout: seconds without a heartbeat after which a process counts as lost (`solq_lab.heartbeat`).
        on_fatal: receives the failure, on one rank, where that is ended while its main thread is blocked.
    """
    global _monitor, _memory
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return

    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)

    # A second connection to the process group's store: on the first one the main thread may block for long.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=rank_timeout))
    with HeartbeatMonitor(
        store, rank=rank(), world_size=world_size(), timeout=rank_timeout, on_fatal=on_fatal
    ) as _monitor:
        _memory = None if here.type == "cuda" else share_memory(_monitor)
        yield
        wait_for_all()  # leaving while another process is still in its last exchange aborts that one
    _monitor = _memory = None
    dist.destroy_process_group()  # not after an error: it may wait for a process that is lost


def report_step(step: int) -> None:
    """Put the number of optimiser steps done into this process's heartbeat."""
    if _monitor is not None:
        _monitor.step = step


def diagnose(error: Error) -> Error | ProcessLost:
    """The cause of an error: a `ProcessLost` where another process died or hangs, else the error itself.

    An error of this process itself is published to the others.
    """
    return error if _monitor is None else _monitor.diagnose(error)


def is_reporting_rank() -> bool:
    """Whether this process writes how an aborted training ended: rank 0, or the one that reported it lost."""
    return is_main() if _monitor is None else _monitor.is_reporting_rank()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The elementwise sum of `values` over all processes, on every one of them; the argument is not changed."""
    if world_size() == 1:
        return values
    total = values.detach().clone(memory_format=torch.contiguous_format)
    if _memory is None:
        dist.all_reduce(total)
    else:
        _memory.all_reduce(total)
    return total


def has_shared_memory() -> bool:
    """Whether sums over the processes take microseconds."""
    return _memory is not None


def sum_of_numbers(number: float, here: torch.device) -> float:
    """The sum of a number of the host over all processes, on every one of them.

    `here` is this process's device.
    """
    # With one process, skip the all-reduce: it would force a GPU sync.
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


def gather_on_main(value: Any) -> list[Any]:
    """`value` of every process, by rank, on the main one; an empty list on the others."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered)
    return gathered or []


def wait_for_all() -> None:
    """Barrier: return when every process has reached it."""
    if world_size() > 1:
        # NCCL's barrier runs on a GPU, and would have to guess which one is this process's.
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
