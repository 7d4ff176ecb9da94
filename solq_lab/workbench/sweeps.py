"""Sweeps: rows times seeds of an experiment, each one the run of a notebook, here or on a cluster. Loads without torch.

A job is the command `solq-lab run NOTEBOOK EXPERIMENT OVERRIDES`, whoever starts it: a child process of this one, or a
cluster's. What it leaves is a run folder, so a sweep keeps no state of its own: finished runs are skipped, stopped ones
are resumed. Logs: <runs>/_sweeps/<sweep>/<run>.log
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from solq_lab.config import ConfigError, Experiment, Sweep, load_experiment
from solq_lab.data_folder import check_data_folder, prepare_data
from solq_lab.errors import Interrupted
from solq_lab.files import FileError, read_json
from solq_lab.progress import Progress, describe_duration, status_line
from solq_lab.runs import RunError, load_run
from solq_lab.workbench.cluster import Cluster, Command
from solq_lab.workbench.parameters import check_parameters

log = logging.getLogger(__name__)

SWEEPS = Path("experiments/ablations")  # where a sweep is found by its name
LINES_SHOWN = 8  # of the log of a failed job
SECONDS_BETWEEN_LOOKS = 0.5


class Job(NamedTuple):
    """One run of a sweep.

    sweep, row, seed: what it is.
    run: name of the run.
    notebook, experiment_path, overrides, runs_dir: what `solq-lab run` is told.
    """

    sweep: str
    row: str
    seed: int
    run: str
    notebook: Path
    experiment_path: Path
    overrides: tuple[str, ...]
    runs_dir: Path

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs_dir / self.run

    @property
    def log_file(self) -> Path:
        """What the job prints."""
        return self.runs_dir / "_sweeps" / self.sweep / f"{self.run}.log"

    @property
    def arguments(self) -> list[str]:
        """What follows `solq-lab` in the command that makes this run."""
        return ["run", str(self.notebook), str(self.experiment_path), *self.overrides, "--runs-dir", str(self.runs_dir)]

    def experiment(self) -> Experiment:
        """The resolved experiment.

        Raises:
            ConfigError: it cannot be used; the message names the row.
        """
        try:
            return load_experiment(self.experiment_path, self.overrides)
        except ConfigError as error:
            raise ConfigError(f"sweep {self.sweep}, row {self.row}: {error}") from None

    def is_finished(self) -> bool:
        """Whether the notebook has been executed to its end for this run, without an error."""
        try:
            executed = read_json(self.folder / self.notebook.name)
        except FileError:  # not there, or torn by a kill
            return False
        papermill = executed["metadata"].get("papermill", {})
        # Where a kernel was killed, papermill notes an end all the same, but of a cell that was not executed it knows
        # neither that there was an exception nor that there was none.
        notes = [cell["metadata"].get("papermill", {}) for cell in executed.get("cells", [])]
        known = all(note.get("exception") is not None for note in notes)
        return bool(papermill.get("end_time")) and not papermill.get("exception") and known


class Outcome(NamedTuple):
    """How a job ended: its exit status, seconds, and the last lines it printed."""

    job: Job
    status: int
    seconds: float
    last_lines: tuple[str, ...]


class Running(Protocol):
    """A job that has been started somewhere."""

    def status(self) -> int | None:
        """Its exit status; None while it runs."""

    def stop(self) -> None:
        """Ask it, once, to save and to stop."""


Starter = Callable[[Job], Running]


def find_sweep(named: str | Path) -> Path:
    """The file of a sweep that is named by its path, or by the name of one in `SWEEPS`.

    Raises:
        ConfigError: there is none of this name.
    """
    named = Path(named)
    if named.suffix == ".yaml":
        return named
    path = SWEEPS / f"{named}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
        nearest = difflib.get_close_matches(str(named), known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known) or 'none'}"
        raise ConfigError(f"no sweep {named} in {SWEEPS}; {hint}")
    return path


def plan(sweep: Sweep, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> list[Job]:
    """The jobs of a sweep: all rows with the first seed, then all rows with the next.

    A sweep that is stopped early therefore has whole tables of fewer seeds.

    Args:
        sweep: the sweep.
        overrides: further `section.key=value` changes of every row.
        runs_dir: folder of run folders.
    """
    jobs = []
    for seed in sweep.seeds:
        for row in sweep.rows:
            run = f"{row.run or f'{sweep.name}-{row.name}'}-s{seed}"
            changes = (*sweep.overrides, *row.overrides, *overrides, f"name={run}", f"seed={seed}")
            path = Path(row.experiment or sweep.experiment)
            jobs.append(Job(sweep.name, row.name, seed, run, Path(sweep.notebook), path, changes, Path(runs_dir)))
    return jobs


def check(jobs: Sequence[Job]) -> None:
    """Refuse what would fail later: an experiment, a data folder, a notebook, a run folder of other settings.

    Raises:
        ConfigError: a row's experiment or its data folder cannot be used, or two rows share a run but no settings.
        NotebookError: the notebook cannot be used.
        RunError: a run folder belongs to another experiment.
    """
    shared: dict[str, Experiment] = {}
    for job in jobs:
        experiment = job.experiment()
        if shared.setdefault(job.run, experiment) != experiment:
            raise ConfigError(f"sweep {job.sweep}, row {job.row}: another row calls its run {job.run} too; rename one")
        check_data_folder(experiment)
        check_parameters(job.notebook, {"experiment": "", "overrides": [], "runs_dir": ""})
        differences = load_run(job.folder).differences(experiment) if job.folder.exists() else []
        if differences:
            raise RunError(
                f"{job.folder}: this run belongs to another experiment than row {job.row} of sweep {job.sweep}; it "
                f"differs in {'; '.join(differences)}. Remove the folder, or give another --runs-dir"
            )


def run_sweep(jobs: Sequence[Job], *, start: Starter | None = None, at_once: int = 1) -> list[Outcome]:
    """Run the jobs that are not finished; one that fails does not stop the others.

    Data sets that are drawn on demand are drawn first, and mask codes fitted whose artifact is missing.

    Args:
        jobs: as `plan` gives them, checked.
        start: where to run them. None: in child processes of this one.
        at_once: jobs under way at the same time.

    Returns:
        How each job that was not finished ended, in the order of their ends.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every running job has saved and stopped, the same sweep resumes them.
    """
    waiting = list({job.run: job for job in jobs if not job.is_finished()}.values())
    _prepare(waiting)
    start, total = start or start_process, len(waiting)
    running: dict[Job, _Started] = {}
    outcomes: list[Outcome] = []
    with _stop_signals(), status_line() as show:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = _Started(job, start(job))
                for job, started in list(running.items()):
                    status = started.process.status()
                    if status is not None:
                        del running[job]
                        outcomes.append(_report(Outcome(job, status, started.seconds(), _last_lines(job))))
                show(_describe(total, outcomes, running))
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except KeyboardInterrupt:
            raise Interrupted(_stop_all(running)) from None
    return outcomes


# ------------------------------------------------------------------------------------------------- where jobs run


def job_command(job: Job) -> list[str]:
    """What makes a job's run, by the interpreter that runs this."""
    return [sys.executable, "-m", "solq_lab", *job.arguments]


def _command(job: Job) -> Command:
    return Command(job_command(job), job.log_file)


class _Process:
    """A job in a child process."""

    def __init__(self, child: subprocess.Popen) -> None:
        self._child = child

    def status(self) -> int | None:
        return self._child.poll()

    def stop(self) -> None:
        self._child.send_signal(signal.SIGINT)


def start_process(job: Job) -> Running:
    """Start a job in a child process of this one."""
    return _Process(_command(job).start())


class ClusterStarter:
    """Submits jobs to a cluster; with "local" they become processes of this machine, by the same code."""

    def __init__(
        self, cluster: Literal["local", "slurm"], runs_dir: str | Path, options: Mapping[str, Any] | None = None
    ) -> None:
        """Look whether jobs can be submitted.

        Args:
            cluster, options: as `solq_lab.workbench.cluster.Cluster` takes them.
            runs_dir: folder of run folders; submitit's files go below it. Every machine has to see it.

        Raises:
            ConfigError: submitit or SLURM is missing, or there is no such option.
        """
        self._cluster = Cluster(cluster, Path(runs_dir) / "_sweeps" / "submitit", options)

    def __call__(self, job: Job) -> Running:
        """Submit a job, or find the one that an earlier sweep submitted and that has not ended yet."""
        gpus = job.experiment().train.gpus
        return self._cluster.submit(_command(job), job.log_file, name=job.run, gpus_per_node=gpus)


# ------------------------------------------------------------------------------------------------------- details


def _prepare(jobs: Sequence[Job]) -> None:
    """Make what several jobs would otherwise make at once: drawn data sets, and the tables of fitted mask codes."""
    experiments = [job.experiment() for job in jobs]
    for experiment in {experiment.data.root: experiment for experiment in experiments}.values():
        prepare_data(experiment)
    missing = {experiment.codec.artifact: experiment for experiment in experiments}
    for artifact, experiment in missing.items():
        if artifact and not Path(artifact).exists():
            from solq_lab.fitting import fit_codec

            log.info("%s: fitting it to the training masks first", artifact)
            fit_codec(experiment)


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt.

    SIGINT too, because a shell starts background jobs deaf to it, and their children would inherit that.
    """
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Started:
    """A job under way: its process, how it goes, since when."""

    def __init__(self, job: Job, process: Running) -> None:
        self.process = process
        self._folder, self._since = job.folder, time.monotonic()
        self._progress: Progress | None = None

    def seconds(self) -> float:
        return time.monotonic() - self._since

    def describe(self) -> str:
        if self._progress is None:
            try:
                self._progress = Progress(load_run(self._folder))
            except RunError:  # no run folder yet
                return f"{self._folder.name}: starting"
        return self._progress.read()


def _describe(total: int, outcomes: Sequence[Outcome], running: Mapping[Job, _Started]) -> str:
    """One line: how many jobs are done, and how the running ones stand."""
    failed = sum(outcome.status != 0 for outcome in outcomes)
    done = f"{len(outcomes)} of {total} done" + (f", {failed} failed" if failed else "")
    return " | ".join([done, *(started.describe() for started in running.values())])


def _report(outcome: Outcome) -> Outcome:
    if outcome.status == 0:
        log.info("%s: finished in %s", outcome.job.run, describe_duration(outcome.seconds))
    else:
        about = f"{outcome.job.run}: failed with status {outcome.status}; the end of {outcome.job.log_file}:"
        log.error("\n".join([about, *(f"  {line}" for line in outcome.last_lines)]))
    return outcome


def _last_lines(job: Job) -> tuple[str, ...]:
    """The end of a job's log."""
    if not job.log_file.is_file():
        return ()
    lines = job.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    return tuple(line.rstrip() for line in lines if line.strip())[-LINES_SHOWN:]


def _stop_all(running: Mapping[Job, _Started]) -> str:
    """Stop all jobs, wait until each has saved, and say where they stand."""
    log.info("stopping %d runs; each saves first", len(running))
    for started in running.values():
        started.process.stop()
    while any(started.process.status() is None for started in running.values()) or any(map(_is_training, running)):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    standing = [next(iter(_last_lines(job)[-1:]), f"{job.run}: stopped") for job in running]
    return "\n".join([*standing, "The same sweep goes on from here"])


def _is_training(job: Job) -> bool:
    """Whether its training still lives: a cluster may end the job before the training has saved."""
    return job.folder.exists() and load_run(job.folder).is_training()
