"""Commands around data sets: make-shapes, download-coco."""

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


class CocoSplit(StrEnum):
    """Parts of COCO 2017."""

    train = "train"
    val = "val"
    test = "test"


def download_coco(
    folder: Annotated[Path, typer.Argument(help="Data folder to fill.")],
    split: Annotated[list[CocoSplit], typer.Option(help="Pictures to fetch; several times for several splits.")] = [
        CocoSplit.train,
        CocoSplit.val,
    ],  # noqa: B006  # typer copies it
    base_url: Annotated[str | None, typer.Option(help="Another server with COCO's archives, http or https.")] = None,
    sums: Annotated[
        Path | None, typer.Option(help="File of MD5 or SHA-256 sums, for a server with other archives than COCO's.")
    ] = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="Leave the zip files in .download.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Attempts in a row that may bring nothing new.")] = 8,
) -> None:
    """Fetch COCO 2017, verify and unpack it; goes on after any interruption, and skips what is complete."""
    from solq_lab.data import download
    from solq_lab.launch import Interrupted

    splits = list(dict.fromkeys(part.value for part in split))
    try:
        download.download_coco(
            folder,
            splits,
            base_url=base_url or download.BASE_URL,
            sums=None if sums is None else download.read_sums(sums),
            keep_archives=keep_archives,
            retries=retries,
        )
    except KeyboardInterrupt:
        raise Interrupted(f"{folder}: stopped; what has arrived is kept, and the same command goes on") from None
    typer.echo(f"{', '.join(splits)} of COCO 2017 in {folder}")
