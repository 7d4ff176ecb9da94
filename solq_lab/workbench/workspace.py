"""The folder that a notebook's relative paths start from, and the trained runs in it."""

import os
from collections.abc import Sequence
from pathlib import Path

from solq_lab.config import load_experiment
from solq_lab.data_folder import prepare_data
from solq_lab.runs import Run, RunError, create_run, load_run, working_copy

WORKSPACE = "SOLQ_LAB_WORKSPACE"  # environment variable: the workspace of a launched notebook
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "photographs"  # three that come with the project, annotated
CHECKOUT = ("experiments", "notebooks")  # the folders that make a folder a workspace


def enter_workspace() -> Path:
    """Change to the folder that relative paths start from, and return it.

    That is the folder `solq-lab run` was called in; for a notebook opened in JupyterLab, whose kernel starts beside it,
    the nearest folder above with `experiments` and `notebooks`.
    """
    here = Path.cwd()
    checkouts = (folder for folder in (here, *here.parents) if all((folder / name).is_dir() for name in CHECKOUT))
    launched = os.environ.get(WORKSPACE)
    workspace = Path(launched) if launched else next(checkouts, here)
    os.chdir(workspace)
    return workspace


def open_run(folder: str | Path, runs_dir: str | Path = "runs", *, with_data: bool = True) -> Run:
    """A finished run and, unless `with_data` is False, its data; missing shapes are drawn.

    A run that comes with the project is only read: the result is its copy in `runs_dir` (`runs.working_copy`).

    Raises:
        RunError: no such run, or one without trained weights.
        ConfigError: its data folder is missing.
        DataError: its data folder holds shapes of other settings.
    """
    run = load_run(folder)
    if not run.weights.is_file():
        raise RunError(f"{run.folder}: no {run.weights.name} ({run.status()['state']}); finish the training first")
    if with_data:
        prepare_data(run.experiment)
    return working_copy(run, runs_dir)


def run_folder(experiment_path: str | Path, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> Path:
    """The folder of an experiment's run, whether it exists or not.

    That is the folder of the experiment file where it holds trained weights (a run that comes with the project) and no
    override makes another experiment of it; otherwise the experiment's folder in `runs_dir`.

    Raises:
        ConfigError: the experiment is not valid.
    """
    experiment, beside = load_experiment(experiment_path, overrides), Path(experiment_path).parent
    shipped = (beside / "weights.safetensors").is_file() and not load_run(beside).differences(experiment)
    return beside if shipped else Path(runs_dir) / experiment.name


def experiment_run(experiment_path: str | Path, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> Run:
    """The run of an experiment, made where it is missing; of one that comes with the project its copy in `runs_dir`.

    Raises:
        ConfigError, RunError: as `create_run`.
    """
    folder = run_folder(experiment_path, overrides, runs_dir)
    if folder.resolve() == Path(experiment_path).parent.resolve():
        return working_copy(load_run(folder), runs_dir)
    return create_run(load_experiment(experiment_path, overrides), runs_dir)


def trained_run(experiment_path: str | Path, overrides: Sequence[str] = (), runs_dir: str | Path = "runs") -> Run:
    """The finished run of an experiment (`run_folder`, `open_run`).

    Raises:
        ConfigError: the experiment is not valid, or its data folder is missing.
        RunError: no such run, or one without trained weights.
    """
    return open_run(run_folder(experiment_path, overrides, runs_dir), runs_dir)
