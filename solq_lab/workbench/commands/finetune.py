"""The command finetune: choices made from data and device, an experiment file, and its training."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from solq_lab.data_folder import open_folder
from solq_lab.workbench.commands.arguments import Overrides, RunsDir, existing_path
from solq_lab.workbench.commands.runs import train


def finetune(
    data: Annotated[Path, typer.Argument(help="Folder of your images.", callback=existing_path)],
    overrides: Overrides = None,
    start: Annotated[
        str,
        typer.Option("--from", help="A file, a run, Hugging Face's folder, or a name of download-weights."),
    ] = "",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="How long it may take; speed is measured.")] = None,
    name: Annotated[str, typer.Option(help="Of the run; by default the folder's.")] = "",
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the training.")] = False,
) -> None:
    """Train on your own images. Chooses each setting that is not given, says why, and writes the experiment."""
    found = open_folder(data, overrides or [])  # before torch is loaded, which takes seconds
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: the speed is measured as a training runs
    from solq_lab.workbench.finetuning import described_choices, planned_experiment

    path = planned_experiment(found, overrides or [], start=start, minutes=minutes, name=name, runs_dir=runs_dir)
    again = f"solq-lab train {shlex.quote(str(path))}"
    typer.echo(f"{described_choices(path)}\n\nexperiment  {path}; edit it if you like, and run it with  {again}")
    if not dry_run:
        train(path, runs_dir=runs_dir)
