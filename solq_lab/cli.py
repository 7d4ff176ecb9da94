"""The command line: `solq-lab run | train | evaluate | predict | make-shapes | import-weights | doctor | bench`.

Loads without torch; each command imports what it needs. A mistake of the user's is one message and exit status 2.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solq_lab.config import load_experiment
from solq_lab.launch import (
    REFUSALS,
    Interrupted,
    NotebookFailed,
    TrainingFailed,
    check_data_folder,
    follow_training,
    prepare_data,
    run_notebook,
    start_training,
    stop_training,
)
from solq_lab.parameters import NotebookError
from solq_lab.runs import Run, create_run, load_run, read_json

if TYPE_CHECKING:
    from solq_lab.data.classes import ClassMap
    from solq_lab.evaluation.summary import Evaluation
FAILED, REFUSED, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Segment objects by learning queries: train, evaluate and look into SOLQ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Notebook = Annotated[Path, typer.Argument(help="Notebook with one cell tagged `parameters`.")]
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the experiment.", metavar="SECTION.KEY=VALUE")]
RunsDir = Annotated[Path, typer.Option(help="Folder of run folders.")]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]


class Split(StrEnum):
    """Which pictures to evaluate on."""

    val = "val"
    train = "train"


class Level(StrEnum):
    """How hard the drawn shapes are."""

    easy = "easy"
    hard = "hard"


def main() -> None:
    """Run the command line: a user's mistake ends in one message and status 2, a failed work in 1, Ctrl-C in 130."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except Interrupted as stop:
        _exit(str(stop), INTERRUPTED)
    except NotebookFailed as failure:
        _exit(str(failure), REFUSED if failure.refused else FAILED)
    except TrainingFailed as failure:
        _exit(str(failure), FAILED)
    except Exception as error:
        if not REFUSALS & {base.__name__ for base in type(error).__mro__}:
            raise
        _exit(str(error), REFUSED)


@app.command()
def run(
    notebook: Notebook,
    experiment: ExperimentFile,
    overrides: Overrides = None,
    runs_dir: RunsDir = Path("runs"),
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="A further parameter of the notebook, name=value.")
    ] = None,
) -> None:
    """Execute a notebook for an experiment; the report appears in the run folder."""
    given = dict(_split_parameter(text) for text in parameter or [])
    executed = run_notebook(notebook, experiment, overrides or [], runs_dir, parameters=given)
    _print_results(load_run(executed.parent))
    typer.echo(f"\nnotebook  {executed}\nHTML      {executed.with_suffix('.html')}")


@app.command()
def train(experiment: ExperimentFile, overrides: Overrides = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Train an experiment without a notebook, or resume it; Ctrl-C saves and stops."""
    resolved = load_experiment(experiment, overrides or [])
    check_data_folder(resolved)
    trained = create_run(resolved, runs_dir)
    prepare_data(resolved)
    start_training(trained.folder)
    try:
        follow_training(trained.folder)
    except KeyboardInterrupt:
        raise Interrupted(stop_training(trained.folder)) from None
    _print_results(trained)
    typer.echo(f"\nweights   {trained.weights}")


@app.command()
def evaluate(
    run_folder: RunFolder,
    split: Annotated[Split, typer.Option(help="Pictures: validation, or those it was trained on.")] = Split.val,
    classes: Annotated[bool, typer.Option("--classes", help="Also print the mask AP of every class.")] = False,
) -> None:
    """Evaluate a finished run; numbers that are there already are only printed."""
    from solq_lab.evaluation.evaluator import evaluate_run, run_ceiling

    evaluated = load_run(run_folder)
    evaluation = evaluate_run(evaluated, split=split.value)
    ceiling = run_ceiling(evaluated, split=split.value)
    typer.echo(f"\n{evaluated.name}, {split.value} pictures\n{evaluation.table(ceiling=ceiling)}")
    if classes:
        typer.echo("\n" + evaluation.class_table("segm" if "segm" in evaluation.kinds else "box"))


@app.command()
def predict(
    weights: Annotated[Path, typer.Argument(help="Weights file, or the folder of a finished run.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures with their objects drawn in.")] = Path(
        "predictions"
    ),
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Objects below this score are left out.")] = 0.3,
) -> None:
    """Find the objects in pictures; draw them, and list class, score and box (x0 y0 x1 y1, pixels)."""
    import numpy as np

    from solq_lab.inference.predictor import Predictor, read_upright
    from solq_lab.viz.pictures import draw_detections

    predictor = Predictor(weights)
    for path in images:
        picture = read_upright(path)
        found = predictor.predict(picture).above(score)
        out.mkdir(parents=True, exist_ok=True)
        drawn = out / f"{path.stem}.png"
        draw_detections(np.asarray(picture), found, title=path.name).savefig(drawn)
        typer.echo(f"{path}: {len(found.names)} objects, drawn in {drawn}")
        for name, value, box in zip(found.names, found.scores.tolist(), found.boxes.tolist(), strict=True):
            typer.echo(f"  {value:.2f}  {name:<20} " + " ".join(f"{edge:7.1f}" for edge in box))


@app.command("make-shapes")
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


@app.command("import-weights")
def import_weights(
    source: Annotated[Path, typer.Argument(help="Released checkpoint (.pth); with --to-official, weights of ours.")],
    destination: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    to_official: Annotated[
        bool, typer.Option("--to-official", help="The way back: from ours to the released names.")
    ] = False,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations that name the classes; by default COCO's own names.")
    ] = None,
) -> None:
    """Turn released SOLQ or Deformable DETR weights into ours; nothing in the file is executed."""
    from solq_lab.models.weights import WeightMismatch, export_official, import_official

    if destination.exists():
        raise WeightMismatch(f"{destination}: exists already and is not written over; remove it or name another file")
    if to_official:
        export_official(source, destination)
        typer.echo(f"{destination}: written under the released names")
        return
    report = import_official(source, destination, _describer(destination.stem, annotations))
    typer.echo(str(report))
    for section, values in report.architecture.items():
        typer.echo(f"{section}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    typer.echo(f"{destination}: written; `solq-lab predict {destination} PICTURE` uses it")


@app.command()
def doctor() -> None:
    """Show what this machine offers, and check that every implementation of the operators gives the same numbers."""
    from solq_lab.doctor import examine

    report = examine()
    typer.echo(str(report))
    if not report.healthy:
        raise typer.Exit(FAILED)


@app.command()
def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="op, codec, targets, postprocess, matcher, loader, eval, infer, train; by default all."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="File for the numbers.")] = None,
    data: Annotated[Path | None, typer.Option(help="COCO folder for the parts that read pictures.")] = None,
) -> None:
    """Time each part against the plain way of doing the same, side by side, and check that both agree."""
    from solq_lab.bench import runner

    unknown = set(parts or []) - set(runner.PARTS)
    if unknown:
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; allowed are {', '.join(runner.PARTS)}")
    typer.echo(runner.run(parts or [], json_path, data=data).table())


def _exit(message: str, status: int) -> None:
    typer.echo(message, err=True)
    sys.exit(status)


def _split_parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise NotebookError(f"--parameter {text!r}: allowed is name=value, for example -p pictures=6")
    return name, value


def _print_results(run: Run) -> None:
    """The AP table of a run beside its mask code's ceiling; nothing where the run has no results."""
    from solq_lab.evaluation.summary import Evaluation

    if not run.results.exists():
        return
    results = read_json(run.results)
    table = Evaluation.from_dict(results).table(ceiling=_stored_ceiling(run, results))
    typer.echo(f"\n{run.name}, validation pictures\n{table}")


def _stored_ceiling(run: Run, results: dict) -> Evaluation | None:
    """The code's ceiling as the training measured it; None for a plain detector."""
    from solq_lab.evaluation.summary import Evaluation

    measured = [line["ceiling"] for line in run.metrics("start") if line["ceiling"]]
    return Evaluation.from_dict(results | {"metrics": measured[-1], "per_class": {}}) if measured else None


def _describer(name: str, annotations: Path | None) -> Callable[[dict[str, dict]], tuple[str, str]]:
    """From the sections inferred of released weights to their experiment (YAML) and class map (JSON)."""

    def describe(architecture: dict[str, dict]) -> tuple[str, str]:
        from solq_lab.config import validate_experiment

        plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-") or "imported"
        experiment = validate_experiment({"name": plain} | architecture, source="the imported experiment")
        return experiment.to_yaml(), _released_classes(architecture["data"]["num_classes"], annotations).to_json()

    return describe


def _released_classes(count: int, annotations: Path | None) -> ClassMap:
    """The class map of released weights, whose channels are category ids: COCO's own where there are 91 of them."""
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    from solq_lab.data.classes import UNUSED, ClassMap

    if annotations is not None:
        return ClassMap.from_annotations(annotations, "raw", count)
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id, with gaps
    names = ["" if name in ("N/A", "__background__") else name for name in coco]
    if len(names) != count:
        names = [f"category {channel}" for channel in range(count)]
    return ClassMap(tuple(names), tuple(channel if name else UNUSED for channel, name in enumerate(names)))
