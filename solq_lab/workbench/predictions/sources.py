"""The images and videos that are named on the command line: files, folders, patterns and addresses. Without torch."""

import glob
import logging
import os
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from solq_lab.data.kinds import IMAGE_SUFFIXES, count_endings
from solq_lab.errors import UserError
from solq_lab.files import files_below

logger = logging.getLogger(__name__)

VIDEOS = frozenset([".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"])
FORMATS = ("drawn", "coco", "masks", "polygons", "yolo", "csv")
OUTPUTS = {  # per image, {} is the path of the image without its suffix
    "drawn": ["{}.png"],
    "masks": ["masks/{}.png", "masks/{}_classes.png"],
    "polygons": ["polygons/{}.json"],
    "yolo": ["labels/{}.txt"],
}
FIXED = {  # per folder of outputs
    "coco": ["coco.json", "coco_bbox.json", "coco_segm.json"],
    "masks": ["masks/classes.txt"],
    "yolo": ["data.yaml"],
    "csv": ["objects.csv"],
}


class Source(NamedTuple):
    """An image or a video."""

    name: str  # as it was named or found: a path or an address
    stem: str  # path in the folder of the outputs, without suffix; of each source another

    @property
    def suffix(self) -> str:
        """The ending, in small letters."""
        return os.path.splitext(urlsplit(self.name).path if is_address(self.name) else self.name)[1].lower()

    @property
    def is_video(self) -> bool:
        """Whether it is a video, by its ending."""
        return self.suffix in VIDEOS


def is_address(name: str) -> bool:
    """Whether this is an address of the web, not a path."""
    return name.startswith(("http://", "https://"))


def find_sources(given: Sequence[str], out: Path, formats: Sequence[str], *, recursive: bool = False) -> list[Source]:
    """The images and videos that are named, that lie in named folders or fit a pattern, each once.

    Outputs lie in `out` as the files lie in the common folder of all that was named. Their names are chosen so that
    neither an input nor the output of another one is written over, and no file at all where inputs lie in `out`, as in
    a data set's own folder; earlier outputs are no inputs.

    Raises:
        UserError: `out` is a named folder, no such file or folder, a folder without images, a pattern that nothing
            fits, or a file like data.yaml that would be written over beside inputs.
    """
    if any(os.path.isdir(name) and os.path.realpath(name) == os.path.realpath(out) for name in given):
        raise UserError(
            f"--out {out}: is the folder of the inputs, whose drawings would be inputs; give another folder"
        )
    expanded = [path for name in given for path in _expand(name, out)]
    found: dict[str, str] = {}
    for name in expanded:
        inside = _files_in(Path(name), out, recursive=recursive) if os.path.isdir(name) else [name]
        for file in inside:
            found.setdefault(file if is_address(file) else os.path.abspath(file), file)

    local = [os.path.abspath(name if os.path.isdir(name) else Path(name).parent) for name in expanded]
    local = [folder for name, folder in zip(expanded, local, strict=True) if not is_address(name)]
    common = os.path.commonpath(local) if local else "."
    taken = {os.path.realpath(path) for path in found if not is_address(path)}
    own = {os.path.dirname(path) for path in taken}  # where the user's files lie, others than the inputs too
    beside = any(Path(folder).is_relative_to(out.resolve()) for folder in own)
    fixed = [out / name for kind in formats for name in FIXED.get(kind, []) if beside and (out / name).exists()]
    if fixed:
        raise UserError(f"--out {out}: inputs lie in it, and {fixed[0]} would be written over; give an empty folder")
    sources = []
    for path, name in found.items():
        wished = unquote(Path(urlsplit(name).path).name) or "image" if is_address(name) else path
        wished = wished.replace("/", "_") if is_address(name) else os.path.relpath(wished, common)
        source = Source(name, os.path.splitext(wished)[0])
        stems = chain([source.stem], (f"{source.stem}_{number}" for number in count(2)))
        for stem in stems:
            outputs = {os.path.realpath(path) for path in output_paths(out, stem, formats, video=source.is_video)}
            others = {path for path in outputs if beside or os.path.dirname(path) in own}
            if not any(map(os.path.exists, others)) and not outputs & taken:
                break
        taken |= outputs
        sources.append(source._replace(stem=stem))
    return sources


def output_paths(out: Path, stem: str, formats: Iterable[str], *, video: bool = False) -> list[Path]:
    """The files of one image, or of one video, whose frames lie in folders of its name."""
    paths = []
    for kind in formats:
        for pattern in OUTPUTS.get(kind, []):
            folder, _, ending = pattern.partition("{}")
            frames = "" if video and kind != "drawn" else ".mp4" if video else ending
            paths.append(out / f"{folder}{stem}{frames}")
    return paths


def _expand(name: str, out: Path) -> list[str]:
    if is_address(name) or os.path.exists(name):
        return [name]
    if not glob.has_magic(name):
        hint = "; standard input is not read: append names by xargs" if name == "-" else ""
        raise UserError(f"{name}: no such file or folder{hint}")
    fitting = [path for path in sorted(glob.glob(name, recursive=True)) if os.path.isfile(path)]
    outside = [path for path in fitting if out.resolve() not in Path(path).resolve().parents]
    if not outside:
        found = f"all that fits lies in --out {out}; give another folder" if fitting else "no file fits this pattern"
        raise UserError(f"{name}: {found}; ** stands for folders of any depth")
    return _known_of(name, outside) or outside


def _files_in(folder: Path, out: Path, *, recursive: bool) -> list[str]:
    """The images and videos in a folder, without hidden ones and those of an output folder within it."""
    inside = sorted(files_below(folder) if recursive else (path for path in folder.iterdir() if not path.is_dir()))
    inside = [file for file in inside if not file.name.startswith(".")]
    drawn = out.resolve()
    if folder.resolve() in drawn.parents:
        inside = [file for file in inside if drawn not in file.resolve().parents]
    if known := _known_of(str(folder), list(map(str, inside))):
        return known
    allowed, found = ", ".join(sorted(IMAGE_SUFFIXES | VIDEOS)), count_endings(inside) or "no file"
    hint = "" if recursive else "; --recursive looks into its folders too"
    raise UserError(f"{folder}: no images in this folder ({allowed}), but {found}{hint}")


def _known_of(name: str, paths: Sequence[str]) -> list[str]:
    """The images and videos among files, by their endings; the others are counted on the screen."""
    known = [path for path in paths if Path(path).suffix.lower() in IMAGE_SUFFIXES | VIDEOS]
    if known and len(known) < len(paths):
        others = sorted({*paths} - {*known})
        logger.warning("%s: files left out by their ending: %s", name, count_endings(map(Path, others)))
    return known
