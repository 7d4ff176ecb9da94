"""The command predict: the objects in images and videos are listed, drawn, and written in formats of other tools."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count, islice
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from solq_lab.bars import progress_bar
from solq_lab.errors import UserError
from solq_lab.files import read_json
from solq_lab.workbench.commands.arguments import FAILED, existing_path, folder_to_write
from solq_lab.workbench.download.transfer import fetch
from solq_lab.workbench.predictions.sources import (
    FORMATS,
    Source,
    find_sources,
    is_address,
    output_paths,
)
from solq_lab.workbench.predictions.video import require_pyav

if TYPE_CHECKING:
    from solq_lab.data.kinds import Orientation
    from solq_lab.structures import Detections
    from solq_lab.workbench.predictions.outputs import InputImage

MAX_BYTES, MAX_SECONDS = 2 * 10**9, 600.0  # of an address


def predict(
    weights: Annotated[
        Path, typer.Argument(help="Weights file, or the folder of a finished run.", callback=existing_path)
    ],
    images: Annotated[list[str], typer.Argument(help="Images, videos, folders, patterns and web addresses.")],
    out: Annotated[Path, typer.Option(help="Folder for what is written.", callback=folder_to_write)] = Path(
        "predictions"
    ),
    save: Annotated[
        str, typer.Option(help=f"What is written, with commas between: {', '.join(FORMATS)}; or none.")
    ] = "drawn",
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Objects below this score are left out.")] = 0.3,
    recursive: Annotated[bool, typer.Option("--recursive", help="Images in folders of the folders too.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; they are padded to a common size.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; by default a GPU if there is one.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO file with the ids of the images.", callback=existing_path)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="COCO results on standard output, one line per image; the list on stderr.")
    ] = False,
) -> None:
    """Find objects in images and videos, draw and list them. A line has class, score and box (x0 y0 x1 y1)."""
    formats = _read_formats(save)
    sources = find_sources(images, out, formats, recursive=recursive)
    ids = _image_ids(sources, annotations)
    if any(source.is_video for source in sources):
        require_pyav()

    from tqdm.auto import tqdm

    from solq_lab.inference.predictor import Predictor
    from solq_lab.workbench.predictions.outputs import json_line, open_outputs, require_masks

    predictor = Predictor(weights, device=device)
    skipped: list[str] = []
    videos: dict[Source, Counter[str]] = {}
    listed = sys.stderr if as_json else sys.stdout
    with ExitStack() as opened:
        outputs = open_outputs(formats, out, predictor.classes)
        for output in outputs:
            opened.callback(output.close)

        read = _read_images(sources, ids, predictor.orientation, skipped)
        while chunk := list(islice(read, batch)):
            predicted = predictor.predict([image.pixels for image in chunk], batch=batch)
            for image, everything in zip(chunk, predicted, strict=True):
                require_masks(formats, everything)
                for output in outputs:
                    output.write(image, everything.above(score))
                found = everything.above(score).clipped()

                # A video gets one line at the end, an image its list of objects.
                drawings = output_paths(out, image.source.stem, {"drawn"} & {*formats}, video=image.source.is_video)
                if image.frame is not None:
                    videos.setdefault(image.source, Counter()).update(frames=1, objects=len(found))
                else:
                    best = everything.scores.max().item()
                    tqdm.write(_list_objects(image.source.name, drawings, found, best=best, least=score), file=listed)
                if as_json:
                    tqdm.write(json_line(image, found, predictor.classes, drawings), file=sys.stdout)

    for source, counts in videos.items():
        drawings = output_paths(out, source.stem, {"drawn"} & {*formats}, video=True)
        drawn = "".join(f", drawn in {path}" for path in drawings)
        typer.echo(f"{source.name}: {counts['frames']} frames, {counts['objects']} objects{drawn}", file=listed)
    others = [name for name in formats if name != "drawn"]
    if others:
        typer.echo(f"{', '.join(others)} in {out}", file=listed)
    if skipped:
        names = ", ".join(skipped)
        typer.echo(f"{len(skipped)} of {len(sources)} images could not be read and were skipped: {names}", err=True)
        raise typer.Exit(FAILED)


def _read_formats(text: str) -> list[str]:
    """The formats of `--save`, in the order of `FORMATS`."""
    given = [name.strip() for name in text.split(",")]
    for name in given:
        if name not in (*FORMATS, "none"):
            raise typer.BadParameter(f"{name!r}: allowed are {', '.join(FORMATS)}, or none", param_hint="--save")
    return [name for name in FORMATS if name in given]


def _image_ids(sources: Sequence[Source], annotations: Path | None) -> list[int]:
    """The ids of the images in COCO files: their place in the list from 1 on, or those of an annotation file.

    Raises:
        UserError: an image that the annotations do not know, or whose id is no whole number.
    """
    if annotations is None:
        return list(range(1, len(sources) + 1))
    document = read_json(annotations)
    entries = document.get("images") if isinstance(document, dict) else None
    known = {str(entry.get("file_name")): entry.get("id") for entry in entries or [] if isinstance(entry, dict)}

    # The longest end of a path that the annotations name.
    ids = []
    for source in sources:
        parts = PurePath(source.name).parts
        ends = (str(PurePath(*parts[first:])) for first in range(len(parts)))
        image_id = next((known[end] for end in ends if end in known), None)
        if image_id is None:
            raise UserError(f"{source.name}: not among the {len(known)} images of {annotations}; leave the image out")
        if not isinstance(image_id, int):
            raise UserError(f"{annotations}: {source.name} has the id {image_id!r}; needed is a whole number")
        ids.append(image_id)
    return ids


def _read_images(
    sources: Sequence[Source], ids: Sequence[int], orientation: Orientation, skipped: list[str]
) -> Iterator[InputImage]:
    """The images and frames; what is damaged is named on the screen and in `skipped`, and costs nothing else."""
    from tqdm.auto import tqdm

    from solq_lab.inference.predictor import read_pixels
    from solq_lab.workbench.predictions.outputs import InputImage
    from solq_lab.workbench.predictions.video import read_frames

    further = count(max(ids, default=0) + 1)  # ids of frames
    bar = sources if len(sources) == 1 else progress_bar(sources, desc="predicting", unit="image")
    for source, image_id in zip(bar, ids, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(source.name)
            try:
                if is_address(source.name):
                    path = Path(folder, f"download{source.suffix}")
                    fetch(source.name, path, retries=1, timeout=30.0, max_bytes=MAX_BYTES, max_seconds=MAX_SECONDS)
                if not source.is_video:
                    yield InputImage(source, image_id, read_pixels(path, orientation))
                    continue
                frames = progress_bar(read_frames(path, source.name), desc=source.name, unit="frame")
                for number, frame in enumerate(frames):
                    yield InputImage(source, next(further), frame.pixels, frame, number)
            except UserError as error:
                tqdm.write(str(error).replace(str(path), source.name), file=sys.stderr)
                skipped.append(source.name)


def _list_objects(name: str, drawings: Sequence[Path], found: Detections, *, best: float, least: float) -> str:
    drawn = "".join(f", drawn in {path}" for path in drawings)
    lines = [f"{name}: {len(found)} {'object' if len(found) == 1 else 'objects'}{drawn}"]
    if not len(found):
        lines.append(f"  none with a score of at least {least:g}; the best has {best:.2f}, a lower --score shows it")
    for one in found:
        lines.append(f"  {one.score:.2f}  {one.name:<20} " + " ".join(f"{edge:7.1f}" for edge in one.box))
    return "\n".join(lines)
