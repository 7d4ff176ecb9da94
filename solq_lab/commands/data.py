"""Commands around data sets: make-shapes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Level(StrEnum):
    """How hard the drawn shapes are."""

    easy = "easy"
    hard = "hard"


def make_shapes(
    root: Annotated[Path, typer.Argument(help="Folder to write: pictures and COCO annotations.")],
    level: Annotated[Level, typer.Option(help="Small upright shapes, or any size and rotation.")] = Level.easy,
    train_pictures: Annotated[int, typer.Option("--train", min=1, help="Training pictures.")] = 6000,
    val_pictures: Annotated[int, typer.Option("--val", min=1, help="Validation pictures.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="Drawing processes.")] = 2,
) -> None:
    """Draw a data set of overlapping, textured shapes in COCO format."""
    from solq_lab.data.shapes import write_shapes

    write_shapes(root, level=level.value, train=train_pictures, val=val_pictures, seed=seed, processes=processes)
    typer.echo(f"{train_pictures} + {val_pictures} pictures in {root}")
