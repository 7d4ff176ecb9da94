"""Sweeps: rows times seeds of an experiment, each one the run of a notebook, here or on a cluster. Loads without torch.

A job is the command `solq-lab run NOTEBOOK EXPERIMENT OVERRIDES` in a child process or on a cluster. A sweep keeps no
state but the run folders: finished runs are skipped, stopped ones are resumed. Logs: <runs>/_sweeps/<sweep>/<run>.log
"""

import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from solq_lab.config import ConfigError, Experiment, Sweep, load_experiment
from solq_lab.data_folder import check_data_folder, prepare_data
from solq_lab.errors import Interrupted, did_you_mean
from solq_lab.files import FileError, last_lines, read_json
from solq_lab.progress import Progress, describe_duration, status_line
from solq_lab.runs import RunError, load_run
from solq_lab.workbench.cluster import Cluster, Command
from solq_lab.workbench.parameters import check_parameters

log = logging.getLogger(__name__)

SWEEPS = Path("experiments/ablations")  # where a sweep is found by its name
LINES_SHOWN = 8  # of the log of a failed job
POLL_SECONDS = 0.5


class Job(NamedTuple):
    """One run of a sweep."""

    # sweep, row, seed: its place in the sweep
    sweep: str
    row: str
    seed: int
    run: str  # name of the run
    # notebook, experiment_path, overrides, runs_dir: arguments of `solq-lab run`
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
        """The job's output."""
        return self.runs_dir / "_sweeps" / self.sweep / f"{self.run}.log"

    @property
    def arguments(self) -> list[str]:
        """The arguments of `solq-lab` that make this run."""
        return ["run", str(self.notebook), str(self.experiment_path), *self.overrides, "--runs-dir", str(self.runs_dir)]

    def experiment(self) -> Experiment:
        """The resolved experiment.

        Raises:
            ConfigError: it is not valid; the message names the row.
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

        # After a killed kernel papermill notes an end all the same, but for a cell that was not executed it notes
        # neither that there was an exception nor that there was none.
        papermill = executed["metadata"].get("papermill", {})
        notes = [cell["metadata"].get("papermill", {}) for cell in executed.get("cells", [])]
        executed_all = all(note.get("exception") is not None for note in notes)
        return bool(papermill.get("end_time")) and not papermill.get("exception") and executed_all


class Outcome(NamedTuple):
    """Exit status of a job, its seconds and the last lines of its log."""

    job: Job
    status: int
    seconds: float
    last_lines: tuple[str, ...]


class Running:
    """A started job."""

    def __init__(self, job: Job, status: Callable[[], int | None], stop: Callable[[], object]) -> None:
        self.status = status  # its exit status, None while it runs
        self.stop = stop  # signals it to save and to stop
        self.since = time.monotonic()
        self._folder = job.folder
        self._progress: Progress | None = None

    def describe(self) -> str:
        """Its progress, in a few words."""
        if self._progress is None:
            try:
                self._progress = Progress(load_run(self._folder))
            except RunError:  # no run folder yet
                return f"{self._folder.name}: starting"
        return self._progress.read()


Starter = Callable[[Job], Running]


def find_sweep(named: str | Path) -> Path:
    """The file of a sweep that is given by its path, or by the name of one in `SWEEPS`.

    Raises:
        ConfigError: there is none of this name.
    """
    named = Path(named)
    if named.suffix == ".yaml":
        return named
    path = SWEEPS / f"{named}.yaml"
    if not path.is_file():
        known = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
        raise ConfigError(f"no sweep {named} in {SWEEPS}; {did_you_mean(str(named), known, 'there are')}")
    return path


def plan(sweep: Sweep, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> list[Job]:
    """The jobs of a sweep: all rows with the first seed, then all rows with the next.

    A sweep that is stopped early thus has complete tables with fewer seeds. `overrides` are further `section.key=value`
    changes of every row.
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
    """Check what would fail later: experiments, data folders, notebooks, and run folders with other settings.

    Raises:
        ConfigError: a row's experiment or data folder is not valid, or two rows of one run have different settings.
        NotebookError: the notebook is not valid.
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

    Shapes that are missing are drawn first, and missing artifacts of codecs fitted.

    Args:
        jobs: from `plan`, checked.
        start: starts a job. None: in a child process.
        at_once: number of jobs that run at the same time.

    Returns:
        The outcomes of the jobs that were not finished, in the order of their ends.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; every running job has saved and stopped, re-running resumes them.
    """
    waiting = list({job.run: job for job in jobs if not job.is_finished()}.values())
    _prepare(waiting)

    start, total = start or _start_here, len(waiting)
    running: dict[Job, Running] = {}
    outcomes: list[Outcome] = []
    # A shell's background jobs and their children ignore SIGINT.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    with status_line() as show:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[job] = start(job)

                for job, started in list(running.items()):
                    status = started.status()
                    if status is not None:
                        del running[job]
                        printed, seconds = last_lines(job.log_file, LINES_SHOWN), time.monotonic() - started.since
                        outcomes.append(Outcome(job, status, seconds, tuple(printed)))
                        if status == 0:
                            log.info("%s: finished in %s", job.run, describe_duration(seconds))
                        else:
                            about = f"{job.run}: failed with status {status}; the end of {job.log_file}:"
                            log.error("\n".join([about, *(f"  {line}" for line in printed)]))

                failed = sum(outcome.status != 0 for outcome in outcomes)
                done = f"{len(outcomes)} of {total} done" + (f", {failed} failed" if failed else "")
                show(" | ".join([done, *(started.describe() for started in running.values())]))
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            raise Interrupted(_stop_all(running)) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return outcomes


def job_command(job: Job) -> list[str]:
    """The command of a job, by the running interpreter."""
    return [sys.executable, "-m", "solq_lab", *job.arguments]


def _start_here(job: Job) -> Running:
    """Start a job in a child process."""
    child = Command(job_command(job), job.log_file).start()
    return Running(job, child.poll, partial(child.send_signal, signal.SIGINT))


def cluster_starter(
    kind: Literal["local", "slurm"], runs_dir: str | Path, options: Mapping[str, Any] | None = None
) -> Starter:
    """A function that submits a job, or finds it where an earlier sweep has submitted it and it has not ended yet.

    Args:
        kind, options: as for `Cluster`.
        runs_dir: folder of run folders, with submitit's files below it; shared by all machines.

    Raises:
        ConfigError: submitit or SLURM is missing, or an option is unknown.
    """
    cluster = Cluster(kind, Path(runs_dir) / "_sweeps" / "submitit", options)

    def submit(job: Job) -> Running:
        gpus, command = job.experiment().train.gpus or 1, Command(job_command(job), job.log_file)
        submitted = cluster.submit(command, job.log_file, name=job.run, gpus_per_node=gpus)
        return Running(job, submitted.status, submitted.stop)

    return submit


def _prepare(jobs: Sequence[Job]) -> None:
    """Make what several jobs would otherwise make at the same time: drawn data sets, and tables of fitted codecs."""
    experiments = [job.experiment() for job in jobs]
    for experiment in {experiment.data.root: experiment for experiment in experiments}.values():
        prepare_data(experiment)
    for artifact, experiment in {experiment.codec.artifact: experiment for experiment in experiments}.items():
        if artifact and not Path(artifact).exists():
            from solq_lab.fitting import fit_codec

            log.info("%s: fitting it to the training masks first", artifact)
            fit_codec(experiment)


def _stop_all(running: Mapping[Job, Running]) -> str:
    """Stop all jobs, wait until each has saved, and return the last line of each."""
    log.info("stopping %d runs; each saves first", len(running))
    for started in running.values():
        started.stop()

    def is_training(job: Job) -> bool:
        return job.folder.exists() and load_run(job.folder).is_training()

    # A cluster may end a job before its training has saved.
    while any(started.status() is None for started in running.values()) or any(map(is_training, running)):
        time.sleep(POLL_SECONDS)

    messages = [next(iter(last_lines(job.log_file, 1)), f"{job.run}: stopped") for job in running]
    return "\n".join([*messages, "Re-running the sweep resumes them"])
