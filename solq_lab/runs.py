"""Run folders: all files of one experiment, readable while it trains. Loads without torch.

runs/<name>/
    experiment.yaml      the resolved experiment; only keys of Role.MAY_CHANGE ever change
    environment.json     versions, git commit, operator implementation, fingerprints of data set and codec, command
    status.json          last reported state: created, training, preempted, failed, finished
    metrics.jsonl        one JSON object per line: "start", "train" and "evaluation" lines
    train.log            the training's log lines
    trainer.lock         locked by the training process, whose id and host it holds
    train.pid            the process that was started to train, until it locks the folder
    checkpoints/step_XXXXXXX/{weights.safetensors, state.pt, sha256.json}
    flight/step_XXXXXXX/ a training step that was not finite, for `solq-lab replay`
    weights.safetensors  the trained model
    best.safetensors     the same after the step with the best AP on the validation images
    detections.json.gz, results.json, ceiling.json, figures/, <notebook>.ipynb, <notebook>.html
    shipped.json         only in a run that comes with the project: fingerprint of its weights, see `working_copy`
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from solq_lab.config import ConfigError, Experiment, read_yaml, validate_experiment
from solq_lab.environment import describe_software
from solq_lab.errors import UserError
from solq_lab.files import read_json, write_json, write_text
from solq_lab.schema import keys_with
from solq_lab.sections import Role

log = logging.getLogger(__name__)

State = Literal["created", "training", "preempted", "failed", "finished"]

SHIPPED = "shipped.json"


class RunError(UserError):
    """A run folder that cannot be used: the message names the folder, what was found and the cure."""


class Run:
    """One run folder.

    Attributes:
        folder, name: the folder, and its name, which is the experiment's.
        experiment: the resolved experiment.
        weights, best, detections, results, environment, metrics_file, log_file, pid_file, checkpoints, figures: paths
            of the files and folders above; `weights` exist once the training is finished, detections and results once
            it is evaluated.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open an existing run folder.

        Raises:
            RunError: there is no such folder, or it holds no valid experiment.
        """
        self.folder = Path(folder)
        self.name = self.folder.name
        path = self.folder / "experiment.yaml"
        if not path.is_file():
            neighbours = sorted(found.parent.name for found in self.folder.parent.glob("*/experiment.yaml"))
            hint = f"runs there: {', '.join(neighbours)}" if neighbours else f"no runs in {self.folder.parent}"
            raise RunError(f"{self.folder}: not a run folder (no experiment.yaml); {hint}")
        try:
            self.experiment = validate_experiment(read_yaml(path), source=str(path))
        except ConfigError as error:
            raise RunError(str(error)) from None

        self.weights = self.folder / "weights.safetensors"
        self.best = self.folder / "best.safetensors"
        self.detections = self.folder / "detections.json.gz"
        self.results = self.folder / "results.json"
        self.environment = self.folder / "environment.json"
        self.metrics_file = self.folder / "metrics.jsonl"
        self.log_file = self.folder / "train.log"
        self.pid_file = self.folder / "train.pid"
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"
        self._lock_file = self.folder / "trainer.lock"

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.status()['state']})"

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first; only those of one `kind` where it is given.

        An incomplete line, which is being written or was torn by a kill, is left out with a log line.
        """
        lines, _ = _read_lines(self.metrics_file)
        return [line for line in lines if kind is None or line.get("kind") == kind]

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; readers see all of it or none."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed training writes again, and unreadable ones."""
        lines, unreadable = _read_lines(self.metrics_file)
        kept = [line for line in lines if line.get("step", 0) <= step]
        if unreadable or len(kept) < len(lines):
            forgotten = len(lines) - len(kept)
            log.info("%s: %d lines after step %d will be written again", self.metrics_file, forgotten, step)
            write_text(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def status(self) -> dict[str, Any]:
        """The last report of the training: "state", "step", "message", "pid", "host", "time" (seconds since 1970).

        After a kill -9 the state stays "training": `trainer` and `is_training` say whether the process runs.
        """
        path = self.folder / "status.json"
        return read_json(path) if path.exists() else {"state": "created", "step": 0, "message": ""}

    def write_status(self, state: State, *, step: int, message: str = "", exit_status: int | None = None) -> None:
        """Write the state of the training; `exit_status` of a failed one is 2 for a mistake of the user."""
        status = {"state": state, "step": step, "message": message, "time": time.time()}
        status |= {"pid": os.getpid(), "host": socket.gethostname()}
        if exit_status is not None:
            status["exit_status"] = exit_status
        write_json(self.folder / "status.json", status)

    def differences(self, experiment: Experiment) -> list[str]:
        """Every key in which another experiment differs, with both values."""
        return _differences(self.experiment.model_dump(mode="json"), experiment.model_dump(mode="json"))

    def trainer(self) -> dict[str, Any] | None:
        """The process that holds the folder's lock ("pid", "host"), or None.

        Must not be called by that process itself: closing the file would release its lock.

        Raises:
            RunError: the file system has no locks.
        """
        try:
            with self._lock_file.open("rb") as file:
                return None if _try_lock(file, fcntl.LOCK_SH) else _read_owner(file)
        except FileNotFoundError:
            return None

    def is_training(self) -> bool:
        """Whether a process holds the folder's lock."""
        return self.trainer() is not None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for training. The kernel releases the lock when the process ends, however it ends.

        Raises:
            RunError: another process trains here, or the file system has no locks.
        """
        # A POSIX record lock: unlike flock, it is not inherited by loader processes, which may outlive a kill -9.
        with self._lock_file.open("a+b") as file:
            # Several times in a second: `Run.trainer` of another process holds the lock for an instant.
            for _ in range(5):
                if _try_lock(file, fcntl.LOCK_EX):
                    break
                time.sleep(0.2)
            else:
                owner = _read_owner(file)
                raise RunError(
                    f"{self.folder}: process {owner.get('pid')} on {owner.get('host')} is training here; "
                    "wait for it, stop it, or give the new run another name=..."
                )
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            file.flush()
            yield

    def record_environment(self, facts: dict[str, Any]) -> None:
        """Add facts to environment.json; they replace those of the same name."""
        known = read_json(self.environment) if self.environment.exists() else {}
        write_json(self.environment, known | facts)


def create_run(experiment: Experiment, runs_dir: str | Path = "runs") -> Run:
    """The run folder of an experiment, made if it is missing, opened if it holds the same experiment.

    As long as the run is not finished, keys with `Role.MAY_CHANGE` may differ: the next process takes the new values.

    Raises:
        RunError: the folder belongs to a different experiment, or is no run folder; nothing is written.
        ConfigError: a new run would start from a file that does not exist.
    """
    folder = Path(runs_dir) / experiment.name
    path = folder / "experiment.yaml"
    if path.exists():
        return _open_for(experiment, folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists but is not a run folder (no experiment.yaml); choose another name=...")
    for key, file in experiment.starting_files.items():
        if not Path(file).exists():  # a file, or the folder of a run
            cure = "; `solq-lab fit-codec EXPERIMENT` writes it" if key == "codec.artifact" else ""
            raise ConfigError(f"{key}: found {file}, which does not exist{cure}")

    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, experiment.to_yaml())
    run = Run(folder)
    run.record_environment(describe_software())
    run.write_status("created", step=0)
    return run


def _open_for(experiment: Experiment, folder: Path) -> Run:
    run = Run(folder)
    differences = run.differences(experiment)
    if not differences:
        return run

    allowed = keys_with(Role.MAY_CHANGE) if run.status()["state"] != "finished" else frozenset()
    rejected = [difference for difference in differences if difference.split()[0] not in allowed]
    if rejected:
        raise RunError(
            f"{folder}: this run belongs to another experiment; it differs in {'; '.join(rejected)}. "
            "Give the new one another name (name=...), or remove the folder"
        )
    log.info("%s: continues with other settings: %s", folder, "; ".join(differences))
    write_text(folder / "experiment.yaml", experiment.to_yaml())
    return Run(folder)


def load_run(folder: str | Path) -> Run:
    """The run in an existing folder.

    Raises:
        RunError: there is no such folder, or it holds no usable experiment.
    """
    return Run(folder)


def list_runs(runs_dir: str | Path = "runs") -> list[Run]:
    """All runs in a folder, by name; one whose experiment cannot be read is left out with a log line."""
    runs = []
    for path in sorted(Path(runs_dir).glob("*/experiment.yaml")):
        try:
            runs.append(Run(path.parent))
        except RunError as error:
            log.warning("left out: %s", error)
    return runs


def label_runs(runs: Sequence[Run]) -> list[str]:
    """The names of runs; of those with one name also the folder that each run folder is in."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else f"{run.folder.parent.name}/{run.name}" for run in runs]


def working_copy(run: Run, runs_dir: str | Path = "runs") -> Run:
    """The run itself, or a writable copy in `runs_dir`/shipped of a run that comes with the project.

    The copy is made on first use, and again when the project's weights have changed.

    Raises:
        RunError: the place of the copy holds something else.
    """
    shipped = run.folder / SHIPPED
    copy = Path(runs_dir) / "shipped" / run.name
    if not shipped.is_file() or run.folder.resolve() == copy.resolve():
        return run

    if copy.exists():
        if not (copy / SHIPPED).is_file():
            raise RunError(f"{copy}: is no copy of {run.folder} (no {SHIPPED}); move it away, or give another runs_dir")
        if (copy / SHIPPED).read_bytes() == shipped.read_bytes():
            return Run(copy)

    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{copy.name}-", dir=copy.parent) as unfinished:
        shutil.copytree(run.folder, Path(unfinished) / copy.name)
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(Path(unfinished) / copy.name, copy)
    return Run(copy)


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The readable lines of a file of JSON objects, and the number of others, each with a log line."""
    if not path.exists():
        return [], 0

    lines: list[dict[str, Any]] = []
    *whole, rest = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step", 0), int):
                raise ValueError("not an object with a whole step")
            lines.append(line)
        except ValueError as error:
            log.warning("%s: line %d is damaged and left out: %s", path, number, error)

    if rest:  # being written, or torn by a kill
        log.info("%s: line %d is incomplete and left out", path, len(whole) + 1)
    return lines, len(whole) - len(lines) + bool(rest)


def _read_owner(file: BinaryIO) -> dict[str, Any]:
    """The process in a lock file; empty in the instant before it is written."""
    file.seek(0)
    try:
        return json.loads(file.read())
    except ValueError:
        return {}


def _try_lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise RunError(
            f"{file.name}: cannot be locked ({error.strerror}), so that two trainings could write here; put the runs "
            "on a file system with locks, --runs-dir FOLDER"
        ) from None
    return True


def _differences(stored: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in stored | other:
        before, after = stored.get(key), other.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key} (there {before!r}, asked {after!r})")
    return found
