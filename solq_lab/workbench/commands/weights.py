"""Commands for weights: download-weights, import-weights, export, ship."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from solq_lab.errors import Interrupted
from solq_lab.workbench.commands.arguments import (
    Overrides,
    RunFolder,
    file_to_write,
    file_with_its_folder,
    folder_to_write,
)


def download_weights(
    name: Annotated[str | None, typer.Argument(help="Which; --list shows them.", show_default=False)] = None,
    mirror: Annotated[
        str | None, typer.Option(help="Another server: address of a folder with the files under their names here.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show what can be fetched, and the cache folder.")] = False,
    retries: Annotated[int, typer.Option(min=0, help="Attempts in a row that may bring nothing new.")] = 8,
) -> None:
    """Fetch weights to start from. Backbones, SOLQ, Deformable DETR; re-running resumes, and verifies what is there."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    from solq_lab.models.released import DETECTORS, weights_folder
    from solq_lab.workbench.download import weights as download

    if listing or name is None:
        typer.echo(f"{download.weights_frame().to_string(max_colwidth=None)}\n\ncache folder  {weights_folder()}")
        return
    try:
        with logging_redirect_tqdm():
            path = download.download_weights(name, mirror=mirror, retries=retries)
    except KeyboardInterrupt:
        raise Interrupted(f"{name}: stopped; what has arrived is kept, re-running resumes") from None
    typer.echo(path)
    if name in DETECTORS:
        typer.echo(f"use it:  solq-lab import-weights {shlex.quote(str(path))} {name}.safetensors")


def import_weights(
    source: Annotated[Path, typer.Argument(help="Released or Hugging Face's checkpoint; --to-official: ours.")],
    destination: Annotated[Path, typer.Argument(help="File to write; it must not exist.", callback=file_to_write)],
    to_official: Annotated[
        bool, typer.Option("--to-official", help="Convert from our names to the released ones.")
    ] = False,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations that name the classes; by default COCO's own names.")
    ] = None,
) -> None:
    """Convert released weights to ours. SOLQ's, SQR's, Deformable DETR's and Hugging Face's; no code in them runs."""
    from solq_lab.models.weights import WeightMismatch, export_official
    from solq_lab.workbench.released import import_released

    if destination.exists():
        raise WeightMismatch(f"{destination}: exists already and is not written over; remove it or name another file")
    if to_official:
        export_official(source, destination)
        typer.echo(f"{destination}: written under the released names")
        return
    report = import_released(source, destination, annotations)
    typer.echo(str(report))
    for section, values in report.architecture.items():
        typer.echo(f"{section}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
    typer.echo(f"{destination}: written; `solq-lab predict {shlex.quote(str(destination))} IMAGE` uses it")


def export(
    weights: Annotated[Path, typer.Argument(help="Weights file, or the folder of a finished run.")],
    destination: Annotated[
        Path, typer.Argument(help="File to write: .onnx, or .safetensors to share.", callback=file_with_its_folder)
    ],
    height: Annotated[
        int | None, typer.Option(min=1, help="ONNX: height of every image, pixels; without: any.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="ONNX: width of every image, pixels.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="ONNX: images per call; without: any number.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="ONNX: detections per image; without: the experiment's.")
    ] = None,
    images: Annotated[list[Path] | None, typer.Option(help="ONNX: images to compare with; repeatable.")] = None,
) -> None:
    """Write a model as ONNX, or as one file to share. ONNX is compared with the original on images."""
    from solq_lab.config import ConfigError
    from solq_lab.inference.export.onnx_file import export_onnx
    from solq_lab.inference.export.packaging import share

    if (height is None) != (width is None):
        raise ConfigError(f"--height {height} with --width {width}: give both, or neither for images of any size")
    size = None if height is None or width is None else (height, width)
    match destination.suffix:
        case ".onnx":
            report = export_onnx(weights, destination, size=size, batch=batch, top_k=top_k, images=images or ())
            typer.echo(f"{report}\nthe whole comparison is in {destination.with_suffix('.parity.json')}")
        case ".safetensors":
            classes = [name for name in share(weights, destination).classes.names if name]
            typer.echo(f"{destination}: {destination.stat().st_size / 1e6:.1f} MB, {len(classes)} classes, ", nl=False)
            typer.echo(f"codec and experiment inside; `solq-lab predict {shlex.quote(str(destination))} IMAGE` uses it")
        case suffix:
            raise ConfigError(f"{destination}: ending {suffix!r}: allowed are .onnx and .safetensors")


def ship(
    run_folder: RunFolder,
    destination: Annotated[
        Path, typer.Argument(help="Folder to write; an earlier shipped run is replaced.", callback=folder_to_write)
    ],
    overrides: Overrides = None,
) -> None:
    """Make a finished run small. It keeps half-precision weights and its record; the detections are compared."""
    from solq_lab.config import load_experiment
    from solq_lab.data_folder import prepare_data
    from solq_lab.inference.export.packaging import package_run
    from solq_lab.runs import load_run

    run = load_run(run_folder)
    changes = [*(overrides or []), f"name={destination.name}"]
    experiment = load_experiment(run.folder / "experiment.yaml", changes)
    prepare_data(experiment)
    typer.echo(str(package_run(run, destination, experiment)))
    size = sum(path.stat().st_size for path in destination.iterdir())
    typer.echo(f"{destination}: {size / 1e6:.1f} MB; `solq-lab predict {shlex.quote(str(destination))} IMAGE` uses it")
