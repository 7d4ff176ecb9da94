"""Training as a detached child process, which any notebook or terminal can start, follow and stop.

The training runs in its own session and writes files: it continues when the browser, kernel or terminal is closed.
"""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from solq_lab.environment import describe_hardware
from solq_lab.errors import ExplainedError, UserError
from solq_lab.files import last_lines
from solq_lab.progress import Progress, live_output, status_line
from solq_lab.runs import Run, RunError, load_run
from solq_lab.schema import TrainSection
from solq_lab.training.faults import advise_on_memory
from solq_lab.workbench.download.weights import fetch_starting_weights
from solq_lab.workbench.processes import describe_trainer, exit_status, find_trainer, is_alive, record_child

log = logging.getLogger(__name__)

LOG_LINES_SHOWN = 15
SECONDS_TO_STOP = 600.0  # of a training that was told to save and stop
MIN_FREE_BYTES = 2**20  # with less free, a full disk is the likely cause of a failure


class TrainingFailed(ExplainedError):
    """The training process ended without a trained model; the message says how, with the last lines of its log."""


class TrainingRejected(RunError):
    """The training rejected the experiment, its data or its weights before it began."""


def start_training(run_folder: str | Path, processes: int | None = None) -> int | None:
    """Start, or resume, the training of a run in a child process that outlives this one.

    Args:
        run_folder: the run; the child's output goes to its train.log, its process id to train.pid.
        processes: training processes, by default the experiment's train.gpus; several are started by torchrun.

    Returns:
        The child's process id, or None when there is nothing to start: the run is finished, or is being trained.

    Raises:
        RunError: there is no such run.
        DataError: the ImageNet weights that it starts from cannot be had.
    """
    run = load_run(run_folder)
    if run.status()["state"] == "finished":
        log.info("%s: finished at step %s, nothing to train", run.folder, run.status()["step"])
        return None
    if is_alive(run):
        log.info("%s: %s is training already", run.folder, describe_trainer(run))
        return None

    fetch_starting_weights(run.experiment, run.folder)
    with run.log_file.open("ab") as output:
        child = subprocess.Popen(
            training_command(run, processes or suitable_processes(run.experiment.train)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C in a terminal nor the end of a kernel reaches it
        )
    record_child(run, child)
    log.info("%s: training in process %d, log in %s", run.folder, child.pid, run.log_file)
    return child.pid


def suitable_processes(train: TrainSection) -> int:
    """`train.gpus`, or where that is 0, what suits this machine: one process on a GPU, or two on a CPU of two cores.

    A step of a small network is thousands of short operators, in which a second thread is no help.
    """
    if train.gpus:
        return train.gpus
    hardware, divides = describe_hardware(), train.batch_size % (2 * train.accumulate) == 0
    return 2 if divides and hardware["cores"] > 1 and not hardware["gpus"] else 1


def training_command(run: Run, processes: int, *, nodes: int = 1) -> list[str]:
    """The command that trains a run: torchrun for several processes, to be called on each of `nodes` machines."""
    if processes * nodes == 1:
        return [sys.executable, "-m", "solq_lab.training", str(run.folder)]
    return [sys.executable, "-m", "solq_lab.training.torchrun", f"--nproc-per-node={processes}", str(run.folder)]


def follow_training(
    run_folder: str | Path, *, interval: float = 1.0, curves: Callable[[list[dict[str, Any]]], Any] | None = None
) -> Run:
    """Show the progress of a training until it ends, and the warnings in its log.

    Interrupting does not stop the training (`stop_training` does).

    Args:
        run_folder: the run.
        interval: seconds between two readings.
        curves: in a notebook, draws a figure of the lines of metrics.jsonl, which is shown anew every half
            minute and taken away at the end.

    Returns:
        The finished run.

    Raises:
        TrainingRejected: the training rejected the experiment, its data or its weights.
        TrainingFailed: the training ended otherwise.
    """
    run = load_run(run_folder)
    progress = Progress(run)
    run.log_file.touch()
    draw = None if curves is None else lambda: curves(run.metrics())
    log_lines = run.log_file.open(encoding="utf-8", errors="replace")
    with log_lines as lines, status_line() as show, live_output(draw) as redraw:
        lines.seek(0, os.SEEK_END)
        alive = True
        while alive:
            alive = is_alive(run)  # read the log and the progress once more after the end
            for line in lines:
                if " WARNING " in line:
                    log.warning("%s", line.rstrip())
            show(progress.read())
            redraw()
            if alive:
                time.sleep(interval)

    if run.status()["state"] != "finished":
        raise diagnose_exit(run)
    return run


def stop_training(run_folder: str | Path) -> str:
    """Send a training SIGTERM, so that it saves and stops, and wait for that; Ctrl-C ends only the waiting.

    Returns:
        One sentence about where the run stands.
    """
    run = load_run(run_folder)
    target = find_trainer(run) if is_alive(run) else {}
    if not target:
        return f"{run.folder}: no training was running; re-running resumes it"
    if target["host"] != socket.gethostname():
        return f"{run.folder}: {describe_trainer(run)} is training; stop it there: kill {target['pid']}"

    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(target["pid"], signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_STOP
    try:
        while is_alive(run) and time.monotonic() < deadline:
            time.sleep(0.2)
    except KeyboardInterrupt:
        log.info("not waiting any longer")

    if is_alive(run):
        return f"{run.folder}: process {target['pid']} is still saving and stops after that"
    return f"{run.folder}: stopped at step {run.status()['step']}; re-running resumes it there"


def describe_trainings(runs: Sequence[Run]) -> str:
    """One line for each training that runs, and for each that was killed."""
    lines = []
    for run in runs:
        if is_alive(run):
            pid = find_trainer(run).get("pid")
            lines.append(f"{run.folder}: {describe_trainer(run)} is training; kill {pid} makes it save and stop")
        elif run.status()["state"] == "training":
            step = run.status()["step"]
            lines.append(f"{run.folder}: killed; re-running resumes it at step {step}, its last checkpoint")
    return "\n".join(lines)


def diagnose_exit(run: Run) -> TrainingRejected | TrainingFailed:
    """The exception for a training that ended without finishing."""
    status = run.status()
    if status["state"] == "failed" and status.get("exit_status") == UserError.exit_status:
        return TrainingRejected(status["message"].partition(": ")[2])
    if status["state"] == "preempted":
        return TrainingFailed(f"{run.folder}: stopped at step {status['step']}; re-running resumes it there")

    # A process that was killed left no message: its exit status says how, and the disk perhaps why.
    how = status["message"] if status["state"] == "failed" else _describe_exit(run)
    free = shutil.disk_usage(run.folder).free
    if free < MIN_FREE_BYTES:
        how += f"; the disk is full ({free / 2**20:.1f} MB are free)"

    message = [
        f"{run.folder}: the training ended at step {status['step']} with {how}; re-running resumes it",
        f"Last lines of {run.log_file}:",
        *(f"  {line}" for line in last_lines(run.log_file, LOG_LINES_SHOWN)),
    ]
    return TrainingFailed("\n".join(message))


def _describe_exit(run: Run) -> str:
    status = exit_status(run)
    if status is None:
        return "an unknown exit status (another process started it)"
    if status >= 0:
        return f"exit status {status}"
    cause = f" (often: out of memory. {advise_on_memory(run.experiment)})" if status == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-status).name}{cause}"
