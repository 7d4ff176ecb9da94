"""Starting work and watching it: notebooks by papermill, training as a detached child process. Loads without torch.

The kernel of a notebook never trains. Training runs in a session of its own and writes files; closing the browser,
losing the kernel or the terminal loses nothing, and any notebook or terminal can follow it again.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from solq_lab.config import ConfigError, Experiment, load_experiment
from solq_lab.parameters import check_parameters
from solq_lab.progress import Progress, status_line
from solq_lab.runs import Run, RunError, create_run, load_run, read_json, replacing, working_copy, write_json

log = logging.getLogger(__name__)

WORKSPACE = (
    "SOLQ_LAB_WORKSPACE"  # environment variable: the folder that relative paths of a launched notebook start from
)
LOG_LINES_SHOWN = 15
NO_ROOM = 2**20  # bytes: with less left, a disk is the likely cause of a training's death
QUIET_KERNEL = ["--IPKernelApp.log_level=CRITICAL"]  # it reports unencrypted local sockets, and its own shutdown
# Mistakes of the user: one clear message and exit status 2, no traceback. By name, because naming them loads no torch.
REFUSALS = frozenset(
    [
        "ConfigError",
        "DataError",
        "ExtensionBuildError",
        "NotebookError",
        "RunError",
        "TrainingRefused",
        "WeightMismatch",
    ]
)
# What went wrong outside of this program, or diverged: the message says it all, no traceback. By name too.
EXPLAINED = frozenset(["DiskFull", "LoaderError", "NonFiniteError", "OutOfMemory", "ProcessLost", "SaveError"])

_children: dict[int, subprocess.Popen[bytes]] = {}  # trainings that this process started: their exit status is ours


class NotebookFailed(RuntimeError):
    """A cell of an executed notebook raised.

    Attributes:
        refused: the cell named a mistake of the user's, such as a missing folder; nothing of ours broke.
    """

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class TrainingFailed(RuntimeError):
    """The training process ended without a trained model; the message holds how, and the last lines of its log."""


class TrainingRefused(RunError):
    """The training named a mistake of the user's before it began."""


class Interrupted(RuntimeError):
    """Ctrl-C, after the training was asked to save and to stop; the message says where it stands."""


# ---------------------------------------------------------------------------------------------------------- notebooks


def run_notebook(
    notebook: str | Path,
    experiment_path: str | Path,
    overrides: Sequence[str] = (),
    runs_dir: str | Path = "runs",
    *,
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Execute a notebook for an experiment; it is written into the run folder cell by cell, and as HTML at the end.

    Everything that can be checked without work is checked first: the parameters, the experiment, the data folder.

    Args:
        notebook: a notebook with one cell tagged `parameters` that declares experiment, overrides and runs_dir.
        experiment_path: the experiment's YAML file.
        overrides: `section.key=value` changes to it.
        runs_dir: folder of run folders.
        parameters: further parameters of the notebook; text is converted to the declared type.

    Returns:
        The executed notebook, in the run folder; the HTML lies beside it.

    Raises:
        NotebookError: the notebook or a parameter cannot be used.
        ConfigError: the experiment cannot be used, or its data folder is missing.
        RunError: the run folder belongs to another experiment.
        NotebookFailed: a cell raised; the full traceback is in the executed notebook.
        Interrupted: Ctrl-C; a training of this run has been asked to save and to stop.
    """
    notebook = Path(notebook)
    shared = {
        "experiment": str(Path(experiment_path).absolute()),
        "overrides": list(overrides),
        "runs_dir": str(Path(runs_dir).absolute()),
    }
    values = check_parameters(notebook, dict(parameters or {}) | shared)
    experiment = load_experiment(experiment_path, list(overrides))
    check_data_folder(experiment)
    run = create_run(experiment, runs_dir)
    execution = _Execution(notebook, run.folder / notebook.name, values)
    try:
        execution.start()
        _watch(execution, run)
    except KeyboardInterrupt:
        was_training = _is_alive(run)
        message = stop_training(run.folder)
        if was_training:  # the cell that followed it ends by itself, and papermill saves the notebook
            execution.join(timeout=30.0)
        raise Interrupted(message) from None
    return execution.finish()


def run_report(
    notebook: str | Path, runs_dir: str | Path = "runs", *, parameters: Mapping[str, Any] | None = None
) -> Path:
    """Execute a notebook about several runs, one that declares no experiment; it is written into `runs_dir`/_reports.

    Args:
        notebook: a notebook with one cell tagged `parameters` that declares runs_dir.
        runs_dir: folder of run folders.
        parameters: further parameters of the notebook; text is converted to the declared type.

    Returns:
        The executed notebook; the HTML lies beside it.

    Raises:
        NotebookError: the notebook or a parameter cannot be used.
        NotebookFailed: a cell raised; the full traceback is in the executed notebook.
        Interrupted: Ctrl-C.
    """
    notebook, folder = Path(notebook), Path(runs_dir) / "_reports"
    values = check_parameters(notebook, dict(parameters or {}) | {"runs_dir": str(Path(runs_dir).absolute())})
    folder.mkdir(parents=True, exist_ok=True)
    execution = _Execution(notebook, folder / notebook.name, values)
    try:
        execution.start()
        _watch(execution)
    except KeyboardInterrupt:
        raise Interrupted(f"{notebook}: interrupted; the same command starts it again") from None
    return execution.finish()


def export_html(notebook: Path) -> Path:
    """Write an executed notebook as one HTML file beside it, and return that file's path."""
    from nbconvert import HTMLExporter

    logging.getLogger("traitlets").setLevel(logging.ERROR)  # it warns about figures without a description
    html, _ = HTMLExporter().from_filename(str(notebook))
    target = notebook.with_suffix(".html")
    with replacing(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def check_data_folder(experiment: Experiment) -> None:
    """Refuse an experiment whose data folder is not there, unless it is one that is drawn on demand.

    Raises:
        ConfigError: data.root is empty or missing, or lacks a file or folder that the experiment names.
    """
    data = experiment.data
    if data.generate != "none":
        return
    if not data.root:
        raise ConfigError("data.root: found '', allowed is a folder with images and annotations; add data.root=FOLDER")
    _require("data.root", Path(data.root))
    for key in ("train_images", "train_annotations", "val_images", "val_annotations"):
        _require(f"data.{key}", Path(data.root) / getattr(data, key))


def prepare_data(experiment: Experiment) -> None:
    """Draw the experiment's shapes where they are missing; any other data folder only has to be there.

    Raises:
        ConfigError: the data folder is missing, or lacks a file or folder that the experiment names.
        DataError: the folder holds shapes of other settings.
    """
    check_data_folder(experiment)
    data = experiment.data
    if data.generate == "none":
        return
    from solq_lab.data.shapes import write_shapes

    write_shapes(Path(data.root), level=data.generate, train=data.generate_train, val=data.generate_val)


def open_run(folder: str | Path, runs_dir: str | Path = "runs") -> Run:
    """A finished run to look into, with its pictures: drawn shapes appear on first use.

    What is computed from a run that comes with the project goes into a copy of it in `runs_dir`; its own folder is
    only read (`runs.working_copy`).

    Raises:
        RunError: no such run, or one without trained weights.
        ConfigError: its data folder is missing.
        DataError: its data folder holds shapes of other settings.
    """
    run = load_run(folder)
    if not run.weights.is_file():
        raise RunError(f"{run.folder}: no {run.weights.name} ({run.status()['state']}); finish the training first")
    prepare_data(run.experiment)
    return working_copy(run, runs_dir)


def trained_run(experiment_path: str | Path, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> Run:
    """The finished run of an experiment, opened to look into (`open_run`).

    It is the folder that the experiment file lies in where that holds trained weights, as one that comes with the
    project does; otherwise the experiment's folder in `runs_dir`.

    Raises:
        ConfigError: the experiment cannot be used, or its data folder is missing.
        RunError: no such run, or one without trained weights.
    """
    experiment, beside = load_experiment(experiment_path, list(overrides)), Path(experiment_path).parent
    shipped = (beside / "weights.safetensors").is_file()
    return open_run(beside if shipped else Path(runs_dir) / experiment.name, runs_dir)


def enter_workspace() -> Path:
    """Go to the folder that relative paths start from, and return it.

    That is the folder `solq-lab run` was called in; for a notebook opened in JupyterLab, whose kernel starts beside it,
    the nearest folder above that holds `experiments` and `notebooks`.
    """
    here = Path.cwd()
    checkouts = (folder for folder in (here, *here.parents) if {"experiments", "notebooks"} <= set(os.listdir(folder)))
    launched = os.environ.get(WORKSPACE)
    workspace = Path(launched) if launched else next(checkouts, here)
    os.chdir(workspace)
    return workspace


# ----------------------------------------------------------------------------------------------------------- training


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
    if _is_alive(run):
        log.info("%s: %s is training already", run.folder, _describe_trainer(run))
        return None
    with run.log_file.open("ab") as output:
        child = subprocess.Popen(
            training_command(run, processes or run.experiment.train.gpus),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # neither Ctrl-C in a terminal nor the end of a kernel reaches it
        )
    _children[child.pid] = child
    write_json(_pid_file(run), {"pid": child.pid, "host": socket.gethostname(), "birth": _birth(child.pid)})
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
        while _is_alive(run):
            show(progress.read())
            time.sleep(interval)
        show(progress.read())
    if run.status()["state"] != "finished":
        raise _explain_death(run)
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
    target = _trainer(run) if _is_alive(run) else {}
    if not target:
        return f"{run.folder}: no training was running; the same command goes on from here"
    if target["host"] != socket.gethostname():
        return f"{run.folder}: {_describe_trainer(run)} is training; stop it there: kill {target['pid']}"
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(target["pid"], signal.SIGTERM)
    deadline = time.monotonic() + patience
    try:
        while _is_alive(run) and time.monotonic() < deadline:
            time.sleep(0.2)
    except KeyboardInterrupt:
        log.info("not waiting any longer")
    if _is_alive(run):
        return f"{run.folder}: process {target['pid']} is still saving; it will stop by itself"
    return f"{run.folder}: stopped at step {run.status()['step']}; the same command resumes the training there"


def describe_trainings(runs: Sequence[Run]) -> str:
    """One line for each training that lives, whoever started it, and for each that died without saying so."""
    lines = []
    for run in runs:
        if _is_alive(run):
            pid = _trainer(run).get("pid")
            lines.append(f"{run.folder}: {_describe_trainer(run)} is training; kill {pid} lets it save and stop")
        elif run.status()["state"] == "training":
            step = run.status()["step"]
            lines.append(f"{run.folder}: died, its last checkpoint is of step {step}; the same command resumes it")
    return "\n".join(lines)


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
        f"train.batch_size {train.batch_size} puts {share} pictures into a pass (gpus {train.gpus}, accumulate "
        f"{train.accumulate}); less memory take: {'; '.join(cures)}. The run goes on from its last checkpoint"
    )


# ------------------------------------------------------------------------------------------------------------ details


class _Execution(threading.Thread):
    """Papermill in a thread, so that Ctrl-C reaches the main thread and not papermill's event loop."""

    def __init__(self, notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        os.environ[WORKSPACE] = str(Path.cwd())  # the kernel inherits it
        self.notebook, self.executed, self._parameters = notebook, executed, parameters
        self.error: Exception | None = None

    def run(self) -> None:
        import papermill

        logging.getLogger("papermill").setLevel(logging.ERROR)
        try:
            papermill.execute_notebook(
                str(self.notebook),
                str(self.executed),
                self._parameters,
                progress_bar=False,
                extra_arguments=QUIET_KERNEL,
            )
        except Exception as error:  # handed to the main thread, which explains it
            self.error = error

    def finish(self) -> Path:
        """Write the HTML of the executed notebook and return the notebook's path; raise what a cell has raised."""
        if self.executed.exists():
            export_html(self.executed)
        if self.error is not None:
            raise _explain_failure(self.notebook, self.executed, self.error)
        return self.executed


def _watch(execution: _Execution, run: Run | None = None) -> None:
    """Show in the terminal how the training of a notebook goes, or how many cells are done, until the notebook ends."""
    progress = None if run is None else Progress(run)
    with status_line() as show:
        while execution.is_alive():
            execution.join(timeout=1.0)
            show(progress.read() if progress and run.is_training() else _describe_cells(execution.executed))


def _describe_cells(executed: Path) -> str:
    """How far papermill has come, by the marks it leaves in the notebook that it writes."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):  # not there yet, or being written
        return f"{executed.name}: starting"
    done = sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in cells)
    return f"{executed.name}: {done} of {len(cells)} cells done"


def _explain_failure(notebook: Path, executed: Path, error: Exception) -> Exception:
    """What to raise for an error of papermill: failed cell and dead kernel in a few lines, anything else as it is."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, DeadKernelError):
        cure = "a training it followed goes on; the same command takes it up again"
        return NotebookFailed(f"{notebook}: its kernel was killed (often: out of memory); {cure}", refused=False)
    if not isinstance(error, PapermillExecutionError):
        return error
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    arrow = re.search(r"^-+> *\d+ (.*)$", plain, re.MULTILINE)  # IPython points at the line of the cell that failed
    where = f" at: {arrow.group(1).strip()}" if arrow else ""
    message = "\n".join(
        [
            f"{notebook}: cell {error.exec_count} failed{where}",
            f"{error.ename}: {error.evalue}",
            f"The full traceback is in {executed}",
        ]
    )
    return NotebookFailed(message, refused=error.ename in REFUSALS)


def _explain_death(run: Run) -> Exception:
    """What to raise for a training that ended without finishing."""
    status = run.status()
    kind, _, message = status["message"].partition(": ")
    if status["state"] == "failed" and kind in REFUSALS:
        return TrainingRefused(message)
    child = _children.get(_recorded(run).get("pid", 0))
    code = None if child is None else child.poll()
    if status["state"] == "preempted":
        return TrainingFailed(f"{run.folder}: stopped at step {status['step']}; run again to resume it there")
    if status["state"] == "failed":
        how = status["message"]
    elif code is None:
        how = "a status that only the process that started it knows; a kill from outside leaves no other trace"
    elif code < 0:
        how = f"signal {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += f" (often: out of memory. {advise_on_memory(run.experiment)})"
    else:
        how = f"exit status {code}"
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


def _is_alive(run: Run) -> bool:
    """Whether somebody trains the run: our child, whom another one started, or the holder of its lock."""
    recorded = _recorded(run)
    child = _children.get(recorded.get("pid", 0))
    if child is not None and child.poll() is None:
        return True
    return _lives(recorded) or run.is_training()


def _trainer(run: Run) -> dict[str, Any]:
    """Whom to ask to stop ("pid", "host"): torchrun where it was started from here, else the lock's holder."""
    recorded = _recorded(run)
    return recorded if _lives(recorded) else (run.trainer() or recorded)


def _describe_trainer(run: Run) -> str:
    trainer = _trainer(run)
    return f"process {trainer.get('pid')} on {trainer.get('host')}"


def _recorded(run: Run) -> dict[str, Any]:
    """The process that `start_training` started last ("pid", "host", "birth"); empty where there is none."""
    try:
        recorded = read_json(_pid_file(run))
    except RunError:
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


def _require(key: str, path: Path) -> None:
    """Refuse a path that is not there, naming the nearest that is."""
    if path.exists():
        return
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(os.listdir(folder))
    missing = path.relative_to(folder).parts[0]
    nearest = difflib.get_close_matches(missing, names, n=1)
    hint = f"did you mean {folder / nearest[0]}?" if nearest else f"{folder} holds {', '.join(names[:8]) or 'nothing'}"
    raise ConfigError(f"{key}: found {path}, which does not exist; {hint}; set {key}=...")
