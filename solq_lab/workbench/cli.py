"""The command line `solq-lab`: every command by its name, and what a mistake looks like.

Loads without torch; each command imports what it needs. A mistake of the user's is one message and exit status 2.
"""

from __future__ import annotations

import logging
import sys

import typer

from solq_lab.errors import ExplainedError, UserError
from solq_lab.workbench.commands import codecs, data, flight, machine, runs, sweeps, weights

app = typer.Typer(
    help="Segment objects by learning queries: train, evaluate and look into SOLQ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command()(runs.run)
app.command()(runs.train)
app.command()(runs.evaluate)
app.command()(runs.status)
app.command()(flight.replay)
app.command()(sweeps.sweep)
app.command()(sweeps.table)
app.command()(weights.predict)
app.command()(data.make_shapes)
app.command()(data.download_coco)
app.command()(data.check_data)
app.command()(data.convert_data)
app.command()(codecs.fit_codec)
app.command()(codecs.codec_ceiling)
app.command()(weights.import_weights)
app.command()(weights.export)
app.command()(weights.ship)
app.command()(machine.doctor)
app.command()(machine.bench)


def main() -> None:
    """Run the command line: a user's mistake ends in one message and status 2, a failed work in 1, Ctrl-C in 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except ExplainedError as error:
        _exit(str(error), error.exit_status)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{error.filename2 or error.filename}: {error.strerror}", UserError.exit_status)  # named by the user


def _exit(message: str, status: int) -> None:
    typer.echo(message, err=True)
    sys.exit(status)
