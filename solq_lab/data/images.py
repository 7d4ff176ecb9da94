"""Image files: which are there, and reading them into uint8 RGB tensors."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from solq_lab.data.annotations import FIRST_FEW, DataError, shorten

LEAVES = (
    "is a link that leaves the image folder; put the file itself there, name the folder where it lies, or set "
    "data.allow_links: true"
)


def read_image(path: Path, image_id: int, size: tuple[int, int]) -> Tensor:
    """The image in a file as (3, H, W) uint8 RGB: grey is repeated, CMYK converted, transparency dropped.

    The EXIF rotation is ignored, as in COCO, whose boxes refer to the pixels as they are stored.

    Args:
        path: JPEG, PNG, GIF or WebP file.
        image_id: the id in the annotation file, for messages.
        size: (height, width) that the annotation file gives, pixels.

    Raises:
        DataError: the file is missing, truncated, no image, or of another size.
    """
    name = f"image id {image_id}: {path}"
    image = decode_bytes(read_file(path, name), name)
    check_size(image, size, name)
    return image


def read_file(path: Path, name: str) -> Tensor:
    """The bytes of a file (n,) uint8; `name` is for messages. Raises DataError where it cannot be read."""
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def decode_bytes(data: Tensor, name: str) -> Tensor:
    """The image (3, H, W) uint8 RGB in the bytes (n,) uint8 of a file. Raises DataError where it is not whole."""
    try:
        image = decode_image(data, mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        reason = re.sub(r"^\S+, \S+\.cpp:\d+, ", "", str(error).splitlines()[0]) if str(error) else "empty"
        raise DataError(
            f"{name}: not a whole image ({len(data)} bytes; {reason}); JPEG, PNG, GIF and WebP are read; "
            "fetch the file again or remove the image from the annotations"
        ) from None
    if image.ndim == 4:  # an animation: its first frame
        image = image[0]
    if image.dtype != torch.uint8:  # cameras use 12 of 16 bits: the upper 8 would be almost black
        raise DataError(f"{name}: more than 8 bits per channel; scale it to 0..255 first")
    return image


def check_size(image: Tensor, size: tuple[int, int], name: str) -> None:
    """Raise DataError where an image (3, H, W) is not of the size (height, width) that the annotations give."""
    if tuple(image.shape[1:]) != size:
        found = f"{image.shape[1]} x {image.shape[2]}"
        raise DataError(
            f"{name}: the image is {found} pixels (height x width), the annotations give {size[0]} x {size[1]}; "
            "correct the annotations or the file"
        )


def check_files(
    image_folder: Path, names: Sequence[str], image_ids: Sequence[int], *, allow_links: bool = False
) -> None:
    """Check that images are in their folder; each folder is listed once, no file is opened.

    Args:
        image_folder: folder that the names are relative to.
        names, image_ids: of I images.
        allow_links: links may lead out of the folder.

    Raises:
        DataError: images are missing, or a name is a link that leads out of the folder.
    """
    root = image_folder.resolve()
    links: dict[str, dict[str, bool]] = {}  # folder -> its files, and whether each is a link
    missing, leaving = [], []
    for name, image_id in zip(names, image_ids, strict=True):
        folder, file = os.path.split(name)
        if folder not in links:
            links[folder] = _list_files(image_folder / folder)
            if leaves_folder(image_folder / folder, root):
                leaving.append((name, image_id))
        if file not in links[folder]:
            missing.append((name, image_id))
        elif links[folder][file] and leaves_folder(image_folder / name, root):
            leaving.append((name, image_id))

    if leaving and not allow_links:
        name, image_id = leaving[0]
        raise DataError(f"{root}: file_name {shorten(name)} (image id {image_id}) {LEAVES}")
    if missing:
        first = [f"{describe_missing(image_folder, name)} (image id {key})" for name, key in missing[:FIRST_FEW]]
        first += ["..."] if len(missing) > FIRST_FEW else []
        cure = "fetch them or remove their entries"
        if len(missing) == len(names):
            cure = "do folder and annotations belong together?"
        count = f"{len(missing)} of the {len(names)} annotated images are missing"
        raise DataError(f"{image_folder}: {count}: {', '.join(first)}; {cure}")


def _list_files(folder: Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a link; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {}


def leaves_folder(path: Path, root: Path) -> bool:
    """Whether the links of a path lead out of the image folder, whose resolved path is `root`."""
    try:
        return not path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # no such name, or links in a circle: missing, not elsewhere
        return False


def describe_missing(image_folder: Path, name: str) -> str:
    """A missing file, with the file of the folder whose name differs in spelling only, if there is one.

    The spelling is: \\ for /, upper and lower case, %20 for a space, composed accents, and the folders before the name.
    """
    by_path, by_name = _spellings(image_folder, image_folder.stat().st_mtime_ns)
    key = _spell(name)
    found = by_path.get(key) or by_name.get(key.rpartition("/")[2])
    return shorten(name) + (f", while there is {shorten(found)}" if found else "")


@lru_cache(maxsize=2)
def _spellings(folder: Path, changed: int) -> tuple[dict[str, str], dict[str, str]]:
    """The files below a folder by their normalised paths, and by their normalised names; `changed` is its time."""
    by_path, by_name = {}, {}
    for place, _, files in os.walk(folder):
        for file in files:
            path = os.path.relpath(os.path.join(place, file), folder)
            by_path[_spell(path)] = by_name[_spell(file)] = path
    return by_path, by_name


def _spell(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
