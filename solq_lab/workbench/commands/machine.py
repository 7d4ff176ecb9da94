"""Commands about this machine: doctor, bench."""

from pathlib import Path
from typing import Annotated

import typer

from solq_lab.workbench.commands.arguments import FAILED, JsonFile


def doctor() -> None:
    """Show what this machine offers, and check the operators. All implementations have to give the same numbers."""
    from solq_lab.workbench.doctor import examine

    report = examine()
    typer.echo(str(report))
    if not report.healthy:
        raise typer.Exit(FAILED)


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="op, codec, targets, postprocess, matcher, loader, eval, infer, train; by default all, and gpu where "
            "there is one. And memory."
        ),
    ] = None,
    json_path: JsonFile = None,
    data: Annotated[Path | None, typer.Option(help="COCO folder for the parts that read images.")] = None,
    arch: Annotated[
        str | None,
        typer.Option(help="Level of x86-64 (v2, v3, v4) whose build is measured beside the one of this processor."),
    ] = None,
) -> None:
    """Measure each part against the plain way of doing it. Both are run side by side, and have to agree."""
    from solq_lab.bench import runner
    from solq_lab.ops.extension import cpu_architecture

    if arch is None:
        reports = [runner.run(parts or [], json_path, data=data)]
    else:
        reports = runner.run_builds([cpu_architecture(), cpu_architecture(arch)], parts or [], json_path, data=data)
    typer.echo(runner.table(*reports))
