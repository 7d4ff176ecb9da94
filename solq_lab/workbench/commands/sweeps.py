"""Commands for sweeps: sweep, table."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from solq_lab.config import load_sweep
from solq_lab.files import write_json, write_text
from solq_lab.runs import load_run
from solq_lab.workbench.commands.arguments import (
    FAILED,
    ClusterKind,
    ClusterOptions,
    JsonFile,
    Overrides,
    RunsDir,
    cluster_options,
    file_to_write,
)
from solq_lab.workbench.sweeps import SWEEPS, check, cluster_starter, find_sweep, plan, run_sweep
from solq_lab.workbench.tables import RESULTS, read_table

SweepFile = Annotated[Path, typer.Argument(help=f"Sweep: a YAML file, or the name of one in {SWEEPS}.")]


def sweep(
    sweep_file: SweepFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at the same time; by default 1, on SLURM all.")] = None,
    cluster: Annotated[ClusterKind, typer.Option(help="Submit the runs by submitit; local tries that here.")] = "none",
    cluster_option: ClusterOptions = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs and the state of each.")] = False,
) -> None:
    """Run the rows and seeds of a sweep that are not finished. Re-running resumes it."""
    planned = plan(load_sweep(find_sweep(sweep_file)), overrides or [], runs_dir)
    check(planned)
    if dry_run:
        for job in planned:
            step = load_run(job.folder).status()["step"] if job.folder.exists() else None
            state = "new" if step is None else f"at step {step}" if step else "started"
            state = "finished" if job.is_finished() else state
            typer.echo(f"{state:<20} solq-lab {shlex.join(job.arguments)}")
        return

    options = cluster_options(cluster_option, cluster)
    start = None if cluster == "none" else cluster_starter(cluster, runs_dir, options)
    outcomes = run_sweep(planned, start=start, at_once=jobs or (len(planned) if cluster == "slurm" else 1))
    typer.echo(read_table(sweep_file, runs_dir=runs_dir).text())
    failed = [outcome.job.run for outcome in outcomes if outcome.status != 0]
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(FAILED)


def table(
    sweep_file: SweepFile,
    runs_dir: RunsDir = Path("runs"),
    results_dir: Annotated[Path, typer.Option(help="Folder of the results that the project carries.")] = RESULTS,
    json_path: JsonFile = None,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="File for means and standard deviations.", callback=file_to_write)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print as Markdown.")] = False,
) -> None:
    """Print a sweep's results beside the paper's numbers. They are means and standard deviations over its seeds."""
    results = read_table(sweep_file, runs_dir=runs_dir, results_dir=results_dir)
    typer.echo(results.markdown() if markdown else results.text())
    if json_path is not None:
        write_json(json_path, results.to_dict())
    if csv_path is not None:
        write_text(csv_path, results.csv())
