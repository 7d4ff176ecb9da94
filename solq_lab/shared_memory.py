"""Sums over the processes of one machine in shared memory: microseconds, gloo's sockets take far longer."""

import contextlib
import os
import platform
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from solq_lab.heartbeat import HeartbeatMonitor, ProcessLost

CHUNK = 2**20  # bytes of each process; longer tensors take several turns
COUNTERS = 64  # bytes of each process: a cache line of its own
SPINS = 1000  # looks at the counters, about a millisecond, before a waiting process sleeps between them
PAUSE = 1e-4  # seconds


class SharedMemory:
    """Memory of the default group's processes, all on this machine.

    A process writes its values and then its counter, waits for the counters of all, and adds up. There are two sets of
    values, for even and odd turns: whoever writes one has seen that all are done with it, for they are a turn further.
    `memory` are bytes, the same for all processes; the monitor knows whether one that is waited for will not come.
    """

    def __init__(self, memory: np.ndarray, monitor: HeartbeatMonitor) -> None:
        processes = dist.get_world_size()
        counters, values = np.split(memory, [processes * COUNTERS])
        self._rank, self._monitor, self._turn = dist.get_rank(), monitor, 0
        lines = counters.view(np.int64).reshape(processes, -1)
        self._counters, self._sizes = lines[:, 0], lines[:, 1:3]  # sizes of the values in even and odd turns
        self._values = torch.from_numpy(values).view(2, processes, CHUNK)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a contiguous tensor by its sum over the processes, which is the same bit for bit on all of them."""
        for chunk in tensor.view(-1).split(CHUNK // tensor.element_size()):
            self._turn += 1
            values = self._values[self._turn % 2, :, : chunk.nbytes].view(chunk.dtype)
            values[self._rank] = chunk
            self._sizes[self._rank, self._turn % 2] = chunk.nbytes
            self._counters[self._rank] = self._turn
            self._wait()

            sizes = self._sizes[:, self._turn % 2]
            if (sizes != chunk.nbytes).any():  # the processes do not do the same: their sum would mean nothing
                raise RuntimeError(f"the processes would add up tensors of different sizes: {sizes.tolist()} bytes")
            torch.sum(values, dim=0, out=chunk)

    def _wait(self) -> None:
        spins = SPINS if len(os.sched_getaffinity(0)) >= len(self._counters) else 0
        while self._counters.min() < self._turn:
            spins -= 1
            if spins < 0:
                if self._monitor.failure is not None:
                    raise ProcessLost(self._monitor.failure.message)
                time.sleep(PAUSE)


def share_memory(monitor: HeartbeatMonitor) -> SharedMemory | None:
    """Memory for all processes; None on several machines, or without /dev/shm, or where stores may change order.

    The last are other processors than x86-64: there another process could see a counter before the values.
    """
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if not alone or sys.platform != "linux" or platform.machine() != "x86_64":
        return None

    size = dist.get_world_size() * (COUNTERS + 2 * CHUNK)
    with contextlib.ExitStack() as stack:
        names: list[str | None] = [None]
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # a full one would kill whoever writes to it
                file = stack.enter_context(tempfile.NamedTemporaryFile(dir="/dev/shm"))
                os.posix_fallocate(file.fileno(), 0, size)
                names = [file.name]
        dist.broadcast_object_list(names)
        if names[0] is None:
            return None

        memory = np.asarray(np.memmap(names[0], mode="r+", shape=size))
        dist.barrier()  # the file's name goes once all have opened it
    return SharedMemory(memory, monitor)
