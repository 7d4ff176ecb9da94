"""Which process trains a run: the holder of the run's lock; before it takes the lock, the child recorded in train.pid.

A process is identified by its id and its start time: safe against pid reuse, and against changes of the clock.
"""

import socket
import subprocess
from collections.abc import Mapping
from typing import Any

import psutil

from solq_lab.files import FileError, read_json, write_json
from solq_lab.runs import Run

TOLERANCE = 2.0  # seconds: the kernel's own time of boot moves by up to one

_children: dict[int, subprocess.Popen[bytes]] = {}  # trainings that this process started, for their exit status


def record_child(run: Run, child: subprocess.Popen[bytes]) -> None:
    """Write into the run folder which child of this process trains the run."""
    _children[child.pid] = child
    process = {"pid": child.pid, "host": socket.gethostname(), "birth": start_time(child.pid)}
    write_json(run.pid_file, process)


def exit_status(run: Run) -> int | None:
    """Exit status of the child that trained the run; None while it runs, or where another process started it."""
    child = _children.get(_recorded(run).get("pid", 0))
    return None if child is None else child.poll()


def is_alive(run: Run) -> bool:
    """Whether a process trains the run, whichever process started it."""
    return is_running(_recorded(run)) or run.is_training()


def find_trainer(run: Run) -> dict[str, Any]:
    """The process to stop ("pid", "host"): the recorded child, which may be torchrun, else the lock's holder."""
    recorded = _recorded(run)
    return recorded if is_running(recorded) else (run.trainer() or recorded)


def describe_trainer(run: Run) -> str:
    """The process that trains the run, in words."""
    trainer = find_trainer(run)
    return f"process {trainer.get('pid')} on {trainer.get('host')}"


def is_running(recorded: Mapping[str, Any]) -> bool:
    """Whether a recorded process ("pid", "host", "birth") of this machine still runs."""
    if not recorded or recorded["host"] != socket.gethostname():
        return False
    started, birth = start_time(recorded["pid"]), recorded["birth"]
    return started is not None and isinstance(birth, float) and abs(started - birth) < TOLERANCE


def start_time(pid: int) -> float | None:
    """Start of a process, seconds after boot; None where it has ended."""
    try:
        process = psutil.Process(pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return None if ended else process.create_time() - psutil.boot_time()
    except psutil.NoSuchProcess:
        return None


def _recorded(run: Run) -> dict[str, Any]:
    try:
        recorded = read_json(run.pid_file)
    except FileError:
        return {}
    return recorded if isinstance(recorded, dict) else {}  # older versions wrote the process id alone
