"""Commands about training steps that were not finite: replay."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from solq_lab.workbench.commands.arguments import FAILED


class Autocast(StrEnum):
    """What a network multiplies in."""

    none = "none"
    bf16 = "bf16"
    fp16 = "fp16"


def replay(
    record: Annotated[Path, typer.Argument(help="Flight record, RUN/flight/step_XXXXXXX.")],
    autocast: Annotated[Autocast | None, typer.Option(help="Multiply in this instead of what was recorded.")] = None,
) -> None:
    """Repeat a training step that was not finite. Needs its record alone; status 1 when it does not happen again."""
    from solq_lab.training.replay import replay_record

    repeated = replay_record(record, autocast=None if autocast is None else autocast.value)
    typer.echo(repeated.report())
    if not repeated.reproduced:
        raise typer.Exit(FAILED)
