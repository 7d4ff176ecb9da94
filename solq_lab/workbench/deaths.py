"""Why a training ended without a trained model, and what helps."""

from __future__ import annotations

import shutil
import signal

from solq_lab.config import Experiment
from solq_lab.runs import Run
from solq_lab.workbench.errors import REFUSALS, TrainingFailed, TrainingRefused
from solq_lab.workbench.processes import exit_status

LOG_LINES_SHOWN = 15
NO_ROOM = 2**20  # bytes: with less left, a disk is the likely cause of a training's death


def explain_death(run: Run) -> TrainingRefused | TrainingFailed:
    """What to raise for a training that ended without finishing."""
    status = run.status()
    kind, _, message = status["message"].partition(": ")
    if status["state"] == "failed" and kind in REFUSALS:
        return TrainingRefused(message)
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


def advise_on_memory(experiment: Experiment) -> str:
    """What to change when host or GPU have no more memory, by its settings here."""
    train, data = experiment.train, experiment.data
    per_process = train.batch_size // train.gpus
    share = per_process // train.accumulate
    more = next((parts for parts in range(train.accumulate + 1, per_process + 1) if per_process % parts == 0), None)
    cures = [] if more is None else [f"train.accumulate={more} (the same batch in smaller passes)"]
    cures += [] if train.gradient_checkpointing else ["train.gradient_checkpointing=true"]
    cures += [f"a smaller data.max_size (now {data.max_size})"]
    cures += [f"if it is the host's memory, a smaller data.workers (now {data.workers})"] if data.workers else []
    cures += ["data.cache=false"] if data.cache else []
    return (
        f"train.batch_size {train.batch_size} puts {share} images into a pass (gpus {train.gpus}, accumulate "
        f"{train.accumulate}); less memory take: {'; '.join(cures)}. The run goes on from its last checkpoint"
    )


def _describe_exit(run: Run) -> str:
    """How the process ended that could not say so itself."""
    status = exit_status(run)
    if status is None:
        return "a status that only the process that started it knows; a kill from outside leaves no other trace"
    if status >= 0:
        return f"exit status {status}"
    cause = f" (often: out of memory. {advise_on_memory(run.experiment)})" if status == -signal.SIGKILL else ""
    return f"signal {signal.Signals(-status).name}{cause}"
