"""Arguments that several commands share."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml

from solq_lab.config import ConfigError
from solq_lab.plain_yaml import load_yaml
from solq_lab.workbench.parameters import NOTEBOOKS

FAILED = 1  # exit status


def existing_path(path: Path | None) -> Path | None:
    """Reject a file or folder that does not exist, before any work."""
    if path is not None and not path.exists():
        raise typer.BadParameter(f"{path}: no such file or folder")
    return path


def file_to_write(path: Path | None) -> Path | None:
    """Reject a file that could not be written, before any work."""
    if path is not None and not path.parent.exists():
        raise typer.BadParameter(f"{path}: there is no folder {path.parent}; make it, or name another")
    return file_with_its_folder(path)


def file_with_its_folder(path: Path | None) -> Path | None:
    """The same for a command that also makes the file's folder."""
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"{path}: is a folder; name a file in it")
        _require_writable(_nearest_folder(path.parent), named=path)
    return path


def folder_to_write(path: Path | None) -> Path | None:
    """Reject a folder that could not be made or filled, before any work."""
    if path is not None:
        _require_writable(_nearest_folder(path), named=path)
    return path


def folder_to_read(path: Path) -> Path:
    """Reject a file in the place of a folder; a folder that does not exist counts as empty."""
    _nearest_folder(path)
    return path


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that exists."""
    nearest = path
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise typer.BadParameter(f"{path}: {'is a file' if nearest == path else f'{nearest} is a file'}; name a folder")
    return nearest


def _require_writable(folder: Path, *, named: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"{named}: {folder} cannot be written to; name another place")


ClusterKind = Literal["none", "local", "slurm"]
Split = Literal["val", "train"]

NotebookFile = Annotated[Path, typer.Argument(help=f"Notebook: its file, or the name of one in {NOTEBOOKS}.")]
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the experiment.", metavar="SECTION.KEY=VALUE")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the numbers.", callback=file_to_write)]
RunsDir = Annotated[Path, typer.Option(help="Folder of run folders.", callback=folder_to_read)]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
ClusterOptions = Annotated[
    list[str] | None,
    typer.Option("--cluster-option", help="For submitit, name=value, for example slurm_partition=gpu."),
]


def cluster_options(given: list[str] | None, cluster: ClusterKind) -> dict[str, Any]:
    """The values of `--cluster-option name=value`.

    Raises:
        ConfigError: not of this form, or without a cluster.
    """
    if given and cluster == "none":
        raise ConfigError("--cluster-option: needs --cluster slurm or --cluster local")
    pairs = [text.partition("=") for text in given or []]
    for name, equals, value in pairs:
        if not equals or not name:
            raise ConfigError(f"--cluster-option {name + value!r}: allowed is name=value, as in slurm_partition=gpu")
    try:
        return {name: load_yaml(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise ConfigError(f"--cluster-option: not plain YAML: {' '.join(str(error).split())}") from None
