"""The command predict: the objects in images are listed, drawn, and written as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solq_lab.data.kinds import IMAGE_SUFFIXES
from solq_lab.errors import UserError
from solq_lab.workbench.commands.arguments import FAILED, existing_paths, folder_to_write

if TYPE_CHECKING:
    from solq_lab.data.classes import ClassMap
    from solq_lab.structures import Detections


def predict(
    weights: Annotated[Path, typer.Argument(help="Weights file, or the folder of a finished run.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.", callback=existing_paths)],
    out: Annotated[
        Path, typer.Option(help="Folder for the images with their objects drawn in.", callback=folder_to_write)
    ] = Path("predictions"),
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Objects below this score are left out.")] = 0.3,
    recursive: Annotated[bool, typer.Option("--recursive", help="Images in folders of the folders too.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="COCO results on standard output, one line per image; the list on stderr.")
    ] = False,
) -> None:
    """Find the objects in images, draw and list them. A line has class, score and box (x0 y0 x1 y1, pixels)."""
    paths = _find_images(images, out, recursive=recursive)
    drawings = _name_drawings(paths, images, out)

    import numpy as np
    from tqdm.auto import tqdm

    from solq_lab.data.annotations import DataError
    from solq_lab.inference.predictor import Predictor, read_upright
    from solq_lab.viz.images import paint_detections

    predictor = Predictor(weights)
    skipped = []
    hidden = True if len(paths) == 1 else None  # None: shown in a terminal only
    for number, path in enumerate(tqdm(paths, desc="predicting", unit="image", disable=hidden, leave=False)):
        # A damaged image must not cost those that follow it.
        try:
            image = read_upright(path, predictor.orientation)
        except DataError as error:
            tqdm.write(str(error), file=sys.stderr)
            skipped.append(path)
            continue
        everything = predictor.predict(image)
        found = everything.above(score).clipped()

        drawings[number].parent.mkdir(parents=True, exist_ok=True)
        paint_detections(np.asarray(image), found).save(drawings[number], compress_level=1)
        text = _list_objects(path, drawings[number], found, best=everything.scores.max().item(), least=score)
        tqdm.write(text, file=sys.stderr if as_json else sys.stdout)
        if as_json:
            entry = {"id": number + 1, "file_name": str(path), "width": image.width, "height": image.height}
            entry |= {"drawing": str(drawings[number]), "detections": _results(found, number + 1, predictor.classes)}
            tqdm.write(json.dumps(entry), file=sys.stdout)

    if skipped:
        names = ", ".join(map(str, skipped))
        typer.echo(f"{len(skipped)} of {len(paths)} images could not be read and were skipped: {names}", err=True)
        raise typer.Exit(FAILED)


def _find_images(given: list[Path], out: Path, *, recursive: bool) -> list[Path]:
    """The images that are named or lie in named folders, each once; the drawings of an earlier call are left out.

    Raises:
        UserError: a folder without images.
    """
    found: dict[str, Path] = {}
    drawn = out.resolve()
    for path in given:
        inside = [path]
        if path.is_dir():
            folders = os.walk(path) if recursive else [next(os.walk(path))]
            inside = sorted(Path(folder, name) for folder, _, names in folders for name in names)
            inside = [
                file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            ]
            if path.resolve() in drawn.parents:
                inside = [file for file in inside if drawn not in file.resolve().parents]
            if not inside:
                hint = "" if recursive else "; --recursive looks into its folders too"
                raise UserError(f"{path}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))}){hint}")

        for file in inside:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _name_drawings(paths: list[Path], given: list[Path], out: Path) -> list[Path]:
    """Where each image is drawn: in `out`, as it lies in the common folder of all that was named.

    Neither an image of the user nor the drawing of another image of this name is written over.
    """
    common = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in given])
    taken = {path.resolve() for path in paths}
    drawings = []
    for path in paths:
        stem = out / os.path.splitext(os.path.relpath(os.path.abspath(path), common))[0]
        names = chain([f"{stem.name}.png"], (f"{stem.name}_{number}.png" for number in count(2)))
        drawing = next(stem.parent / name for name in names if (stem.parent / name).resolve() not in taken)
        taken.add(drawing.resolve())
        drawings.append(drawing)
    return drawings


def _list_objects(path: Path, drawing: Path, found: Detections, *, best: float, least: float) -> str:
    lines = [f"{path}: {len(found)} {'object' if len(found) == 1 else 'objects'}, drawn in {drawing}"]
    if not found:
        lines.append(f"  none with a score of at least {least:g}; the best has {best:.2f}, a lower --score shows it")
    for one in found:
        lines.append(f"  {one.score:.2f}  {one.name:<20} " + " ".join(f"{edge:7.1f}" for edge in one.box))
    return "\n".join(lines)


def _results(found: Detections, image_id: int, classes: ClassMap) -> list[dict]:
    """COCO results of an image, with the names of their categories."""
    from solq_lab.evaluation.results import detections_to_results

    names = dict(zip(classes.category_ids, classes.names, strict=True))
    results = detections_to_results(found, image_id, classes)
    return [result | {"category_name": names[result["category_id"]]} for result in results]
