"""Training as a detached child process: started, followed and stopped by any notebook or terminal.

The kernel of a notebook never trains. Training runs in a session of its own and writes files; closing the browser,
losing the kernel or the terminal loses nothing, and any notebook or terminal can follow it again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from solq_lab.progress import Progress, status_line
from solq_lab.runs import Run, load_run
from solq_lab.workbench.deaths import explain_death
from solq_lab.workbench.processes import describe_trainer, find_trainer, is_alive, record_child

log = logging.getLogger(__name__)


def start_training(run_folder: str | Path, processes: int | None = None) -> int | None:
    """Start, or resume, the training of a run in a child process that outlives this one.

    Args:
        run_folder: the run; what the child prints goes to its train.log, who it is to train.pid.
        processes: training processes, by default the experiment's train.gpus; several are started by torchrun.

    Returns:
        The child's process id, or None when there is nothing to start: the run is finished, or is being trained.

    Raises:
        RunError: there is no such run.
    """
    run = load_run(run_folder)
    if run.status()["state"] == "finished":
        log.info("%s: finished at step %s, nothing to train", run.folder, run.status()["step"])
        return None
    if is_alive(run):
        log.info("%s: %s is training already", run.folder, describe_trainer(run))
        return None
    with run.log_file.open("ab") as output:
        child = subprocess.Popen(
            training_command(run, processes or run.experiment.train.gpus),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C in a terminal nor the end of a kernel reaches it
        )
    record_child(run, child)
    log.info("%s: training in process %d, log in %s", run.folder, child.pid, run.log_file)
    return child.pid


def training_command(run: Run, processes: int, *, nodes: int = 1) -> list[str]:
    """What trains a run: Python itself for one process; torchrun for several, called on each of `nodes` machines."""
    if processes * nodes == 1:
        return [sys.executable, "-m", "solq_lab.training", str(run.folder)]
    return [sys.executable, "-m", "solq_lab.training.torchrun", f"--nproc-per-node={processes}", str(run.folder)]


def follow_training(run_folder: str | Path, *, interval: float = 1.0) -> Run:
    """Show the progress of a training until it ends; any process may follow, at any time, as often as it likes.

    Interrupting leaves the training alone: `stop_training` stops it.

    Args:
        run_folder: the run.
        interval: seconds between two looks.

    Returns:
        The finished run.

    Raises:
        TrainingRefused: the training named a mistake of the user's.
        TrainingFailed: the training died; the message names its signal and the last lines of its log.
    """
    run = load_run(run_folder)
    progress = Progress(run)
    with status_line() as show:
        while is_alive(run):
            show(progress.read())
            time.sleep(interval)
        show(progress.read())
    if run.status()["state"] != "finished":
        raise explain_death(run)
    return run


def stop_training(run_folder: str | Path, *, patience: float = 600.0) -> str:
    """Ask a training once to save and to stop, and wait until it has; Ctrl-C ends the waiting, not the saving.

    Args:
        run_folder: the run.
        patience: seconds to wait for the checkpoint.

    Returns:
        One sentence about where the run stands.
    """
    run = load_run(run_folder)
    target = find_trainer(run) if is_alive(run) else {}
    if not target:
        return f"{run.folder}: no training was running; the same command goes on from here"
    if target["host"] != socket.gethostname():
        return f"{run.folder}: {describe_trainer(run)} is training; stop it there: kill {target['pid']}"
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(target["pid"], signal.SIGTERM)
    deadline = time.monotonic() + patience
    try:
        while is_alive(run) and time.monotonic() < deadline:
            time.sleep(0.2)
    except KeyboardInterrupt:
        log.info("not waiting any longer")
    if is_alive(run):
        return f"{run.folder}: process {target['pid']} is still saving; it will stop by itself"
    return f"{run.folder}: stopped at step {run.status()['step']}; the same command resumes the training there"


def describe_trainings(runs: Sequence[Run]) -> str:
    """One line for each training that lives, whoever started it, and for each that died without saying so."""
    lines = []
    for run in runs:
        if is_alive(run):
            pid = find_trainer(run).get("pid")
            lines.append(f"{run.folder}: {describe_trainer(run)} is training; kill {pid} lets it save and stop")
        elif run.status()["state"] == "training":
            step = run.status()["step"]
            lines.append(f"{run.folder}: died, its last checkpoint is of step {step}; the same command resumes it")
    return "\n".join(lines)
