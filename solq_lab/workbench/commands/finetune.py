"""The command finetune: choices made from data and device, an experiment file, and its training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from solq_lab.workbench.commands.arguments import RunsDir, existing_paths
from solq_lab.workbench.commands.runs import train


def _existing(path: Path) -> Path:
    return existing_paths([path])[0]


def finetune(
    data: Annotated[Path, typer.Argument(help="Folder of your images, in any layout.", callback=_existing)],
    start: Annotated[
        str,
        typer.Option(
            "--from",
            help="A file, a run, Hugging Face's folder, or a name of download-weights.",
            metavar="WEIGHTS",
        ),
    ] = "",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="How long it may take; speed is measured.")] = None,
    name: Annotated[str, typer.Option(help="Of the run; by default the folder's.")] = "",
    runs_dir: RunsDir = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before the training.")] = False,
) -> None:
    """Train on your own images. Chooses every setting from data and device, says why, and writes the experiment."""
    from solq_lab.workbench.finetuning import default_name, is_planned, plan_finetuning

    options = {"--from": start, "--minutes": "" if minutes is None else f"{minutes:g}", "--name": name}
    words = ["solq-lab", "finetune", str(data), *(word for pair in options.items() if pair[1] for word in pair)]
    command = shlex.join(words)
    path = runs_dir / f"{name or default_name(data)}.yaml"

    if is_planned(path, command):
        typer.echo(f"{path}: planned earlier, used as it stands; remove it to plan anew")
    else:
        plan = plan_finetuning(data, start=start, minutes=minutes, name=name, runs_dir=runs_dir)
        plan.write(path, command)
        typer.echo(f"{plan}\n\nexperiment  {path}; edit it, and run it with  solq-lab train {shlex.quote(str(path))}")
    if not dry_run:
        train(path, runs_dir=runs_dir)
