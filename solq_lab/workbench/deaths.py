"""Why a training ended without a trained model, and what helps."""

from __future__ import annotations

import shutil
import signal

from solq_lab.errors import ExplainedError, UserError
from solq_lab.runs import Run, RunError
from solq_lab.training.faults import advise_on_memory
from solq_lab.workbench.processes import exit_status

LOG_LINES_SHOWN = 15
NO_ROOM = 2**20  # bytes: with less left, a disk is the likely cause of a training's death


class TrainingFailed(ExplainedError):
    """The training process ended without a trained model; the message holds how, and the last lines of its log."""


class TrainingRefused(RunError):
    """The training stopped at a mistake of the user before it began."""


def explain_death(run: Run) -> TrainingRefused | TrainingFailed:
    """What to raise for a training that ended without finishing."""
    status = run.status()
    if status["state"] == "failed" and status.get("exit_status") == UserError.exit_status:
        return TrainingRefused(status["message"].partition(": ")[2])
    if status["state"] == "preempted":
        return TrainingFailed(f"{run.folder}: stopped at step {status['step']}; run again to resume it there")
    how = status["message"] if status["state"] == "failed" else _describe_exit(run)
    free = shutil.disk_usage(run.folder).free
    if free < NO_ROOM:
        how += f"; the disk is full ({free / 2**20:.1f} MB are free)"
    lines = run.log_file.read_text(encoding="utf-8", errors="replace").splitlines() if run.log_file.exists() else []
    message = [
        f"{run.folder}: the training ended at step {status['step']} with {how}; run again to resume it",
        f"Last lines of {run.log_file}:",
        *(f"  {line}" for line in lines[-LOG_LINES_SHOWN:]),
    ]
    return TrainingFailed("\n".join(message))


def _describe_exit(run: Run) -> str:
    """How the process ended that could not say so itself."""
    status = exit_status(run)
    if status is None:
        return "a status that only the process that started it knows; a kill from outside leaves no other trace"
    if status >= 0:
        return f"exit status {status}"
    cause = f" (often: out of memory. {advise_on_memory(run.experiment)})" if status == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-status).name}{cause}"
