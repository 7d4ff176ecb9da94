"""Commands about training steps that were not finite: replay."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from solq_lab.workbench.commands.arguments import FAILED


def replay(
    record: Annotated[Path, typer.Argument(help="Flight record, RUN/flight/step_XXXXXXX.")],
    autocast: Annotated[
        Literal["none", "bf16", "fp16"] | None, typer.Option(help="Precision, instead of the recorded one.")
    ] = None,
) -> None:
    """Repeat a training step that was not finite. Needs its record alone; status 1 when it does not happen again."""
    from solq_lab.training.replay import replay_record

    repeated = replay_record(record, autocast=autocast)
    typer.echo(repeated.report())
    if not repeated.reproduced:
        raise typer.Exit(FAILED)
