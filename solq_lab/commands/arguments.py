"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FAILED, REFUSED, INTERRUPTED = 1, 2, 130  # exit statuses

Notebook = Annotated[Path, typer.Argument(help="Notebook with one cell tagged `parameters`.")]
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the experiment.", metavar="SECTION.KEY=VALUE")]
RunsDir = Annotated[Path, typer.Option(help="Folder of run folders.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
