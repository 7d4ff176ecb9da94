"""Commands for run folders: run, train, evaluate, status, replay."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from solq_lab.config import ConfigError, change_experiment, load_experiment
from solq_lab.data.folders import Split as OtherSplit
from solq_lab.data.folders import find_splits
from solq_lab.data.kinds import Orientation
from solq_lab.data_folder import check_data_folder, prepare_data
from solq_lab.errors import Interrupted
from solq_lab.files import read_json
from solq_lab.runs import Run, create_run, list_runs, load_run
from solq_lab.workbench.cluster import Cluster, follow_job, submit_training
from solq_lab.workbench.commands.arguments import (
    FAILED,
    ClusterKind,
    ClusterOptions,
    ExperimentFile,
    NotebookFile,
    Overrides,
    RunFolder,
    RunsDir,
    Split,
    cluster_options,
)
from solq_lab.workbench.download.weights import fetch_starting_weights
from solq_lab.workbench.notebooks import run_notebook
from solq_lab.workbench.parameters import NotebookError, find_notebook, read_parameters
from solq_lab.workbench.trainings import describe_trainings, follow_training, start_training, stop_training
from solq_lab.workbench.workspace import open_run


def run(
    notebook: NotebookFile,
    experiment: Annotated[
        Path | None, typer.Argument(help="Experiment, a YAML file; by default the one that the notebook names.")
    ] = None,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="A further parameter of the notebook, name=value.")
    ] = None,
) -> None:
    """Execute a notebook for an experiment. The report appears beside its figures, as a rule in the run folder."""
    given = {}
    for text in parameter or []:
        name, equals, given[name] = text.partition("=")
        if not equals or not name:
            raise NotebookError(f"--parameter {text!r}: allowed is name=value, for example -p images=6")
    if experiment is not None and "=" in experiment.name and not experiment.exists():
        raise ConfigError(f"{experiment}: changes an experiment; name the experiment's file before it")

    # What is about several runs has no experiment.
    notebook = find_notebook(notebook)
    declared = read_parameters(notebook).get("experiment")
    path = experiment or (declared and declared.default)
    executed = run_notebook(notebook, path, overrides or [], runs_dir, parameters=given)
    if path is not None and (executed.parent / "experiment.yaml").is_file():
        _print_results(load_run(executed.parent))
    typer.echo(f"\nnotebook  {executed}\nHTML      {executed.with_suffix('.html')}")


def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    cluster: Annotated[ClusterKind, typer.Option(help="Submit it by submitit; local tries that here.")] = "none",
    nodes: Annotated[int, typer.Option(min=1, help="Machines, on SLURM.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Training processes per machine; by default, train.gpus in all.")
    ] = None,
    cluster_option: ClusterOptions = None,
) -> None:
    """Train an experiment without a notebook, or resume it. Ctrl-C saves and stops."""
    # Check the resources, and everything else that can be checked, before any work.
    options = cluster_options(cluster_option, cluster)
    if nodes > 1 and cluster != "slurm":
        raise ConfigError(f"--nodes {nodes}: needs --cluster slurm, or solq_lab.training.torchrun on each of them")
    resolved = load_experiment(experiment, overrides or [])
    if gpus_per_node is not None:
        # A run that has begun keeps train.gpus: its processes accumulate instead.
        processes, folder = nodes * gpus_per_node, runs_dir / resolved.name
        gpus = load_run(folder).experiment.train.gpus if (folder / "experiment.yaml").is_file() else processes
        source = f"--gpus-per-node ({processes} processes)"
        resolved = change_experiment(resolved, {"train.gpus": gpus}, source=source)
    elif resolved.train.gpus % nodes:
        raise ConfigError(
            f"--nodes {nodes}: train.gpus={resolved.train.gpus} does not divide by it; add --gpus-per-node"
        )
    per_node = gpus_per_node or resolved.train.gpus // nodes
    check_data_folder(resolved)
    fetch_starting_weights(resolved, runs_dir / resolved.name)

    trained = create_run(resolved, runs_dir)
    prepare_data(resolved)
    if cluster == "none":
        start_training(trained.folder, per_node)
        try:
            follow_training(trained.folder)
        except KeyboardInterrupt:
            raise Interrupted(stop_training(trained.folder)) from None
    elif trained.status()["state"] != "finished":
        submitter = Cluster(cluster, trained.folder / "submitit", options)
        follow_job(submit_training(submitter, trained, nodes=nodes, gpus_per_node=per_node or 1), trained)

    _print_results(trained)
    typer.echo(f"\nweights   {trained.weights}")
    if trained.best.exists():
        from solq_lab.training.best import describe_best

        typer.echo(f"best      {trained.best}, {describe_best(trained)}")


def evaluate(
    run_folder: RunFolder,
    split: Annotated[Split, typer.Option(help="Images: validation, or those it was trained on.")] = "val",
    annotations: Annotated[Path | None, typer.Option(help="Annotations of other images to evaluate on.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of their images, where it is not found.")] = None,
    orientation: Annotated[
        Orientation | None, typer.Option(help="How they count pixels of images turned by EXIF; by default as the run.")
    ] = None,
    classes: Annotated[bool, typer.Option("--classes", help="Also print the mask AP of every class.")] = False,
    budget: Annotated[
        bool, typer.Option("--budget", help="Also print the AP it had if scores, boxes or mask vectors were perfect.")
    ] = False,
) -> None:
    """Evaluate a finished run. Numbers that are there already are only printed."""
    evaluated = open_run(run_folder, with_data=annotations is None)  # before torch is loaded, which takes seconds
    if annotations is None and (images or orientation) is not None:
        raise ConfigError("--images and --orientation are those of other images: add --annotations FILE")
    chosen: OtherSplit | Split = split
    title = f"{split} images"
    if annotations is not None:
        chosen, *more = find_splits(annotations, images, orientation=orientation)
        title = str(annotations)
        if more:
            raise ConfigError(f"--annotations {annotations}: {1 + len(more)} splits; name the annotation file of one")

    from solq_lab.evaluation.evaluator import evaluate_run
    from solq_lab.studies.ceiling import run_ceiling

    evaluation = evaluate_run(evaluated, split=chosen)
    ceiling = run_ceiling(evaluated, split=chosen)
    typer.echo(f"\n{evaluated.name}, {title}\n{evaluation.table(ceiling=ceiling)}")
    if classes:
        typer.echo("\n" + evaluation.class_table("segm" if "segm" in evaluation.kinds else "box"))
    if budget:
        from solq_lab.evaluation.summary import to_text
        from solq_lab.studies.budget import run_budget

        perfect = run_budget(evaluated, split=chosen)
        typer.echo(f"\n{to_text(perfect.frame())}")
        if classes:
            typer.echo(f"\n{to_text(perfect.class_frame())}")


def status(runs_dir: RunsDir = Path("runs")) -> None:
    """List the runs: state, step, AP and training processes."""
    from solq_lab.workbench.tables import runs_frame

    runs = list_runs(runs_dir)
    if not runs:
        typer.echo("no runs yet; `solq-lab run train EXPERIMENT` makes one")
        return
    typer.echo(runs_frame(runs).to_string(float_format="{:.1f}".format, na_rep="-", index_names=False))
    if trainings := describe_trainings(runs):
        typer.echo(f"\n{trainings}")


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


def _print_results(run: Run) -> None:
    """The AP table of a run beside its codec's ceiling, if the run has results."""
    from solq_lab.evaluation.summary import Evaluation

    if not run.results.exists():
        return
    results = read_json(run.results)
    measured = [line["ceiling"] for line in run.metrics("start") if line["ceiling"]]  # a plain detector has none
    ceiling = Evaluation.from_dict(results | {"metrics": measured[-1], "per_class": {}}) if measured else None
    typer.echo(f"\n{run.name}, validation images\n{Evaluation.from_dict(results).table(ceiling=ceiling)}")
