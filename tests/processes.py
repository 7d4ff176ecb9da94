"""A function in processes of its own, forked from one that has torch and the trainer loaded: imports take seconds."""

import multiprocessing
import os
import socket
from collections.abc import Callable

import torch

from solq_lab import distributed

multiprocessing.set_forkserver_preload(["solq_lab.training.trainer"])


def in_process_group(act: Callable[..., None], *arguments: object, processes: int) -> None:
    """Call act(*arguments) in one process, or in each of a group as torchrun starts them; their errors are raised."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _act_as_rank, (act, arguments, processes, port), nprocs=processes, start_method="forkserver"
    )


def _act_as_rank(rank: int, act: Callable[..., None], arguments: tuple, processes: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(rank_timeout=60.0, on_fatal=print):
        act(*arguments)
