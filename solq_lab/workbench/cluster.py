"""Commands as jobs of a cluster, by submitit: SLURM, or this machine by the same code. Loads without torch.

A job is a command line that writes files and goes on where it stood when it is called again. SLURM tells it before its
time limit, or before it gives the machines to somebody else; it then saves, stops, and is queued again by itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from solq_lab.config import ConfigError
from solq_lab.errors import Interrupted
from solq_lab.files import read_json, write_json
from solq_lab.progress import Progress, status_line
from solq_lab.runs import Run
from solq_lab.workbench.trainings import TrainingFailed, training_command

log = logging.getLogger(__name__)

LOST = 1  # exit status of a job that its cluster lost
MINUTES = 3 * 24 * 60  # a job's time limit where none is given; a run that needs more is queued again
SECONDS_TO_SAVE = 300  # between SLURM's signal and the end of a job, where no option says otherwise
SECONDS_BETWEEN_LOOKS = 0.5
TURNS = 100  # how often a job that ran into its time limit is queued again
HEARD = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}  # what clusters ask a job to stop with


class Command:
    """A command line. Called, it runs to its end and passes on a request to stop; clusters pickle and call it."""

    def __init__(self, arguments: Sequence[str], log_file: str | Path) -> None:
        """Describe the command.

        Args:
            arguments: the command line.
            log_file: its output is added there.
        """
        self._arguments, self._folder = list(arguments), Path.cwd()
        self._log_file = self._folder / log_file
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command in the background."""
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._log_file.open("ab") as output:
            return subprocess.Popen(
                self._arguments,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal reaches it once, by way of `_stop`
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD),  # or it would be deaf to them
            )

    def __call__(self) -> int:
        """Run the command and return its exit status."""
        # Handlers that raise would break into `checkpoint`, which the cluster's own signal calls.
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # A signal between the child's start and the next line would find nobody, and queue the job a second time.
            signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
            try:
                self._child = self.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
            if self._stopping:  # the signal came before there was somebody to pass it on to
                self._child.send_signal(signal.SIGINT)
            return self._child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def checkpoint(self) -> Any:
        """Let the command save and stop, and return what submitit is to queue again: this command."""
        from submitit.helpers import DelayedSubmission

        self._stop(signal.SIGINT, None)
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):  # `__call__`, which this interrupts, has seen its end already
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        again = Command(self._arguments, self._log_file)
        again._folder = self._folder
        return DelayedSubmission(again)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ask the command, once, to save and to stop."""
        if not self._stopping and self._child is not None:
            self._child.send_signal(signal.SIGINT)
        self._stopping = True


class Submitted:
    """A job in a cluster's hands.

    Attributes:
        job_id: the cluster's name of it.
    """

    def __init__(self, job: Any, log_file: Path) -> None:
        self._job, self._log_file = job, log_file
        self.job_id: str = job.job_id

    def status(self) -> int | None:
        """Its exit status; None while it waits or runs. What the cluster says of a lost job goes to the log file."""
        if not self._job.done():
            return None
        problem = self._job.exception()
        if problem is None:
            return self._job.result()
        with self._log_file.open("a", encoding="utf-8") as file:
            file.write(f"job {self.job_id}: {problem}\n")
        return LOST

    def stop(self) -> None:
        """Ask it, once, to save and to stop; it is not queued again."""
        self._job.cancel()


class Cluster:
    """Submits commands."""

    def __init__(self, kind: Literal["local", "slurm"], folder: Path, options: Mapping[str, Any] | None = None) -> None:
        """Look whether jobs can be submitted.

        Args:
            kind: "slurm", or "local": processes of this machine.
            folder: for submitit's files. Every machine has to see it.
            options: what submitit's `update_parameters` takes, for example `slurm_partition` or `timeout_min`.

        Raises:
            ConfigError: submitit or SLURM is missing, or there is no such option.
        """
        try:
            import submitit
        except ImportError:
            raise ConfigError(
                f"cluster {kind} needs submitit, which is not installed: pip install 'solq-lab[slurm]'"
            ) from None
        defaults: dict[str, Any] = {"timeout_min": MINUTES}
        if kind == "slurm":
            defaults["slurm_signal_delay_s"] = SECONDS_TO_SAVE
        self.kind, self._options, self._folder = kind, dict(options or {}), folder.absolute()
        self._resumable = submitit.SlurmJob if kind == "slurm" else None
        try:
            self._executor = submitit.AutoExecutor(self._folder, cluster=kind, **{f"{kind}_max_num_timeout": TURNS})
            self._executor.update_parameters(**(defaults | self._options))
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"cluster {kind}: {error}") from None

    def submit(self, command: Command, log_file: Path, *, name: str, **resources: int) -> Submitted:
        """Submit a command, or find the job of an earlier call that has not ended yet.

        Args:
            command: what to run.
            log_file: of the command; the job's id is kept beside it.
            name: what the cluster calls the job.
            resources: submitit's `nodes`, `gpus_per_node` and the like, unless the options say otherwise.

        Raises:
            ConfigError: the cluster cannot give these resources.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        record = log_file.with_suffix(".job.json")
        if self._resumable and record.is_file():
            earlier = self._resumable(self._folder, read_json(record)["job_id"])
            if not earlier.done(force_check=True):
                log.info("%s: job %s, submitted earlier, has not ended yet", name, earlier.job_id)
                return Submitted(earlier, log_file)
        try:
            self._executor.update_parameters(name=name, **(resources | self._options))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"cluster {self.kind}: {error}") from None
        job = self._executor.submit(command)
        write_json(record, {"job_id": job.job_id})
        return Submitted(job, log_file)


def submit_training(cluster: Cluster, run: Run, *, nodes: int, gpus_per_node: int) -> Submitted:
    """Submit the training of a run, `gpus_per_node` processes on each of `nodes` machines, or find its earlier job.

    Raises:
        ConfigError: the cluster cannot give these resources.
    """
    command = Command(training_command(run, gpus_per_node, nodes=nodes), run.log_file)
    resources = {"nodes": nodes, "tasks_per_node": 1, "gpus_per_node": gpus_per_node}
    submitted = cluster.submit(command, run.log_file, name=run.name, **resources)
    log.info("%s: job %s on %s, log in %s", run.folder, submitted.job_id, cluster.kind, run.log_file)
    return submitted


def follow_job(submitted: Submitted, run: Run) -> None:
    """Show how a training's job goes until it ends, through all of its turns.

    Raises:
        TrainingFailed: it ended without a trained model.
        Interrupted: Ctrl-C; the job has been asked to save and to stop.
    """
    progress = Progress(run)
    try:
        with status_line() as show:
            while submitted.status() is None:
                show(progress.read())
                time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        submitted.stop()
        while submitted.status() is None or run.is_training():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        message = f"{run.folder}: job {submitted.job_id} stopped at step {run.status()['step']}"
        raise Interrupted(f"{message}; the same command resumes the training there") from None
    status = run.status()
    if status["state"] != "finished":
        how = f"{status['state']} {status['message']}".strip()
        raise TrainingFailed(
            f"{run.folder}: job {submitted.job_id} ended at step {status['step']}, {how}; see {run.log_file}. "
            "The same command resumes the training"
        )
