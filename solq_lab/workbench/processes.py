"""Which process trains a run, and whether it still lives: our child, another's child, or the holder of the run's lock.

A process that has got the id of a dead one is not taken for it, and no clock is asked.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solq_lab.files import FileError, read_json, write_json
from solq_lab.runs import Run

_children: dict[int, subprocess.Popen[bytes]] = {}  # trainings that this process started: their exit status is ours


def record_child(run: Run, child: subprocess.Popen[bytes]) -> None:
    """Keep in mind, and write into the run folder, that a child of this process trains the run."""
    _children[child.pid] = child
    write_json(_pid_file(run), {"pid": child.pid, "host": socket.gethostname(), "birth": _birth(child.pid)})


def exit_status(run: Run) -> int | None:
    """How the child that trained the run ended; None where it lives, or where somebody else started it."""
    child = _children.get(_recorded(run).get("pid", 0))
    return None if child is None else child.poll()


def is_alive(run: Run) -> bool:
    """Whether somebody trains the run: our child, whom another one started, or the holder of its lock."""
    recorded = _recorded(run)
    child = _children.get(recorded.get("pid", 0))
    if child is not None and child.poll() is None:
        return True
    return _lives(recorded) or run.is_training()


def find_trainer(run: Run) -> dict[str, Any]:
    """Whom to ask to stop ("pid", "host"): torchrun where it was started from here, else the lock's holder."""
    recorded = _recorded(run)
    return recorded if _lives(recorded) else (run.trainer() or recorded)


def describe_trainer(run: Run) -> str:
    """In words, the process that trains the run."""
    trainer = find_trainer(run)
    return f"process {trainer.get('pid')} on {trainer.get('host')}"


def _recorded(run: Run) -> dict[str, Any]:
    """The process that was recorded last ("pid", "host", "birth"); empty where there is none."""
    try:
        recorded = read_json(_pid_file(run))
    except FileError:
        return {}
    return recorded if isinstance(recorded, dict) else {}  # older versions wrote the process id alone


def _lives(recorded: Mapping[str, Any]) -> bool:
    """Whether a recorded process still exists: a later one that has got its id has another birth."""
    if not recorded or recorded["host"] != socket.gethostname():
        return False
    birth = _birth(recorded["pid"])
    return birth is not None and birth == recorded["birth"]


def _birth(pid: int) -> str | None:
    """When a process began, by the kernel's count that no clock moves: boot, and ticks since. None: it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {fields[18]}"


def _pid_file(run: Run) -> Path:
    return run.folder / "train.pid"
