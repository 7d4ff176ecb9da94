"""The command line `solq-lab`: its commands by topic, and errors as messages with an exit status.

Loads without torch; each command imports what it needs.
"""

import io
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from solq_lab.errors import ExplainedError, UserError
from solq_lab.workbench.commands import codecs, data, finetune, machine, predict, runs, sweeps, weights

PANELS = {
    "Run": (finetune.finetune, runs.run, runs.train, runs.evaluate, runs.status, runs.replay),
    "Sweep": (sweeps.sweep, sweeps.table),
    "Model": (predict.predict, weights.download_weights, weights.import_weights, weights.export, weights.ship),
    "Data": (data.make_shapes, data.download_coco, data.check_data, data.convert_data),
    "Codec": (codecs.fit_codec, codecs.codec_ceiling),
    "Machine": (machine.doctor, machine.bench),
}


LOUDNESS = ("-q", "--quiet", "-v", "--verbose")


class _Panels(TyperGroup):
    """Lists the commands by panel in plain text; with rich, typer would also draw messages in boxes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # -q and -v may stand behind the command too.
        end = args.index("--") if "--" in args else len(args)
        chosen = [word for word in args[:end] if word in LOUDNESS]
        return super().parse_args(ctx, chosen + [word for word in args[:end] if word not in LOUDNESS] + args[end:])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        commands: dict[str, Any] = dict(self.commands)
        for title in PANELS:
            with formatter.section(f"{title} commands"):
                shown = {name: command for name, command in commands.items() if command.rich_help_panel == title}
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in shown.items()])


app = typer.Typer(
    cls=_Panels,
    help="Segment objects by learning queries: train, evaluate and look into SOLQ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
for panel, functions in PANELS.items():
    for function in functions:
        app.command(rich_help_panel=panel)(function)


def _print_version(show: bool) -> None:
    if show:
        typer.echo(f"solq-lab {version('solq-lab')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show warnings and results only, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show what is done in detail.")] = False,
) -> None:
    """Segment objects by learning queries: train, evaluate and look into SOLQ."""
    if quiet:
        logging.getLogger().setLevel(logging.WARNING)
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which commands do later
    if verbose:
        logging.getLogger("solq_lab").setLevel(logging.DEBUG)


def main() -> None:
    """Run the command line; status 2 is a mistake of the user, 1 a failure, 130 Ctrl-C."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files are bytes, not all of them UTF-8
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
