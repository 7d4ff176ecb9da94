"""Arguments that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from solq_lab.config import ConfigError
from solq_lab.plain_yaml import load_yaml

FAILED, REFUSED, INTERRUPTED = 1, 2, 130  # exit statuses

Notebook = Annotated[Path, typer.Argument(help="Notebook with one cell tagged `parameters`.")]
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the experiment.", metavar="SECTION.KEY=VALUE")]
RunsDir = Annotated[Path, typer.Option(help="Folder of run folders.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
ClusterOptions = Annotated[
    list[str] | None,
    typer.Option("--cluster-option", help="For submitit, name=value, for example slurm_partition=gpu."),
]


class Where(StrEnum):
    """What runs a job."""

    none = "none"
    local = "local"
    slurm = "slurm"


def cluster_options(given: list[str] | None, cluster: Where) -> dict[str, Any]:
    """The values of `--cluster-option name=value`.

    Raises:
        ConfigError: not of this form, or without a cluster.
    """
    if given and cluster is Where.none:
        raise ConfigError("--cluster-option: needs --cluster slurm or --cluster local")
    pairs = [text.partition("=") for text in given or []]
    for name, equals, value in pairs:
        if not equals or not name:
            raise ConfigError(f"--cluster-option {name + value!r}: allowed is name=value, as in slurm_partition=gpu")
    try:
        return {name: load_yaml(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise ConfigError(f"--cluster-option: not plain YAML: {' '.join(str(error).split())}") from None
