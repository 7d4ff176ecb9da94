"""Commands as jobs of a cluster, by submitit: SLURM, or this machine by the same code. Loads without torch.

A job is a command line that writes files and resumes when it is called again. SLURM signals it before its time limit
and before preemption; it then saves, stops, and is queued again.
"""

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
MINUTES = 3 * 24 * 60  # default time limit of a job; a run that needs more is queued again
SECONDS_TO_SAVE = 300  # default time between SLURM's signal and the end of a job
POLL_SECONDS = 0.5
MAX_REQUEUES = 100  # of a job that runs into its time limit
STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}  # of clusters


class Command:
    """A command line that clusters pickle and call: it runs the command to its end and forwards stop signals.

    The command's output is appended to `log_file`.
    """

    def __init__(self, arguments: Sequence[str], log_file: str | Path) -> None:
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
                start_new_session=True,  # so that Ctrl-C reaches it only once, through `_stop`
                preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),  # inherited as blocked
            )

    def __call__(self) -> int:
        """Run the command and return its exit status."""
        # Handlers must not raise: they could interrupt `checkpoint`, which the cluster's own signal calls.
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            # Block signals until the child is known: an earlier one could not be forwarded.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            try:
                self._child = self.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            if self._stopping:  # the signal came before the child's start
                self._child.send_signal(signal.SIGINT)
            return self._child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def checkpoint(self) -> Any:
        """Let the command save and stop, and return it for submitit to queue again."""
        from submitit.helpers import DelayedSubmission

        self._stop(signal.SIGINT, None)
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):  # reaped by `__call__`, which this interrupts
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        again = Command(self._arguments, self._log_file)
        again._folder = self._folder
        return DelayedSubmission(again)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Forward the first stop signal to the command."""
        if not self._stopping and self._child is not None:
            self._child.send_signal(signal.SIGINT)
        self._stopping = True


class Submitted:
    """A submitted job."""

    def __init__(self, job: Any, log_file: Path) -> None:
        self._job, self._log_file = job, log_file
        self.job_id: str = job.job_id  # the cluster's

    def status(self) -> int | None:
        """Its exit status; None while it waits or runs. The reason of a lost job is appended to the log file."""
        if not self._job.done():
            return None
        problem = self._job.exception()
        if problem is None:
            return self._job.result()
        with self._log_file.open("a", encoding="utf-8") as file:
            file.write(f"job {self.job_id}: {problem}\n")
        return LOST

    def stop(self) -> None:
        """Signal the job to save and to stop; it is not queued again."""
        self._job.cancel()


class Cluster:
    """Submits commands."""

    def __init__(self, kind: Literal["local", "slurm"], folder: Path, options: Mapping[str, Any] | None = None) -> None:
        """Check that jobs can be submitted.

        Args:
            kind: "slurm", or "local" for processes of this machine.
            folder: for submitit's files; shared by all machines.
            options: arguments of submitit's `update_parameters`, for example `slurm_partition` or `timeout_min`.

        Raises:
            ConfigError: submitit or SLURM is missing, or an option is unknown.
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
            self._executor = submitit.AutoExecutor(
                self._folder, cluster=kind, **{f"{kind}_max_num_timeout": MAX_REQUEUES}
            )
            self._executor.update_parameters(**(defaults | self._options))
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            raise ConfigError(f"cluster {kind}: {error}") from None

    def submit(self, command: Command, log_file: Path, *, name: str, **resources: int) -> Submitted:
        """Submit a command, or find the job of an earlier call that has not ended yet.

        Args:
            command: the command.
            log_file: of the command; the job's id is kept beside it.
            name: of the job.
            resources: submitit's `nodes`, `gpus_per_node` and the like; options override them.

        Raises:
            ConfigError: the cluster cannot give these resources.
        """
        log_file.parent.mkdir(parents=True, exist_ok=True)
        record = log_file.with_suffix(".job.json")
        if self._resumable and record.is_file():
            earlier: Any = self._resumable(self._folder, read_json(record)["job_id"])
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
    """Show the progress of a training's job until it ends, requeues included.

    Raises:
        TrainingFailed: it ended without a trained model.
        Interrupted: Ctrl-C; the job has saved and stopped.
    """
    progress = Progress(run)
    try:
        with status_line() as show:
            while submitted.status() is None:
                show(progress.read())
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        submitted.stop()
        while submitted.status() is None or run.is_training():
            time.sleep(POLL_SECONDS)
        message = f"{run.folder}: job {submitted.job_id} stopped at step {run.status()['step']}"
        raise Interrupted(f"{message}; re-running resumes it there") from None

    status = run.status()
    if status["state"] != "finished":
        how = f"{status['state']} {status['message']}".strip()
        raise TrainingFailed(
            f"{run.folder}: job {submitted.job_id} ended at step {status['step']}, {how}; see {run.log_file}. "
            "Re-running resumes it"
        )
