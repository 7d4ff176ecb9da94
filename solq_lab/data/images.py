"""Image files: which are there, and reading them into uint8 RGB tensors."""

import io
import os
import re
import struct
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from solq_lab.data.kinds import IMAGE_FORMATS, IMAGE_SUFFIXES, Orientation
from solq_lab.errors import FIRST_FEW, DataError, shorten
from solq_lab.files import other_than_file, require_file

TORCH_FORMATS = ("JPEG", "MPO", "GIF", "WEBP")  # which torchvision decodes, faster than Pillow; a damaged PNG kills it
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, struct.error)

ORIENTATION = 0x0112  # the EXIF tag
LYING = (5, 6, 7, 8)  # orientations whose upright image has the sides swapped
# orientation -> axes that a stored image (3, H, W) is flipped along to stand upright, once its sides are swapped
TURNS: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (1, 2), 4: (1,), 5: (), 6: (2,), 7: (1, 2), 8: (1,)}

PAGE = "a web page, no image: fetch it again"
STAND_INS = {
    b"version https://git-lfs": "a Git LFS pointer, no image: run git lfs pull",
    b"<!doctype": PAGE,
    b"<html": PAGE,
}
SMALL = 4096  # bytes, up to which a file of a data set may be such a stand-in

LEAVES = (
    "is a link that leaves the image folder; put the file itself there, name the folder where it lies, or set "
    "data.allow_links: true"
)


class Header(NamedTuple):
    """What a file says of its image before the pixels: size and EXIF orientation."""

    size: tuple[int, int]  # (height, width) as stored, pixels
    turn: int  # the EXIF orientation, 1 to 8; 1 is an image that is stored upright, or a TIFF, which is always read so

    def size_as(self, orientation: Orientation) -> tuple[int, int]:
        """(height, width) of the stored or the upright image, pixels."""
        height, width = self.size
        return (width, height) if orientation == "upright" and self.turn in LYING else (height, width)


def read_image(path: Path, image_id: int, size: tuple[int, int], orientation: Orientation = "stored") -> Tensor:
    """The image in a file as (3, H, W) uint8 RGB: grey is repeated, CMYK converted, transparency dropped.

    Args:
        path: image file.
        image_id: the id in the annotation file, for messages.
        size: (height, width) that the annotation file gives, pixels.
        orientation: "stored": pixels as in the file, whatever its EXIF orientation, as COCO's boxes count them;
            "upright": turned by it, as viewers and most annotation tools show images.

    Raises:
        DataError: the file is missing, truncated, no image, or of another size.
    """
    name = f"image id {image_id}: {path}"
    data = read_file(path, name)
    image = decode_bytes(data, name, orientation)
    check_size((image.shape[1], image.shape[2]), size, name, data, orientation)
    return image


def read_file(path: Path, name: str) -> Tensor:
    """The bytes of a file (n,) uint8; `name` is for messages. Raises DataError where it cannot be read."""
    require_file(path, "image", name)
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from None


def read_header(source: Path | Tensor, name: str) -> Header:
    """The header of an image file, or of its bytes (n,) uint8; `name` is for messages.

    Raises:
        DataError: no image, one of too many pixels, or no such file.
    """
    with _opened(source, name) as opened:
        return _header_of(opened)


def decode_bytes(data: Tensor, name: str, orientation: Orientation = "stored") -> Tensor:
    """The image (3, H, W) uint8 RGB in the bytes (n,) uint8 of a file; of an animation the first frame.

    A pixel's channels lie together in memory, as in the file: that is resized ten times faster than channel by channel.

    Raises:
        DataError: not whole, of more than 8 bits per channel, or of too many pixels; `name` is for the message.
    """
    with _opened(data, name) as opened:
        turn = _header_of(opened).turn if orientation == "upright" else 1
        moving = opened.format == "WEBP" and getattr(opened, "is_animated", False)  # torchvision reads still ones only
        # Cameras use 12 of 16 bits: of three such channels Pillow takes the upper 8, almost black.
        deep = opened.mode not in EIGHT_BIT_MODES or re.search(r";16[BLN]", str(getattr(opened, "tile", "")))
        if deep:
            raise DataError(f"{name}: more than 8 bits per channel; scale it to 0..255 first")
        if opened.format in TORCH_FORMATS and not moving:
            image = decode_image(data, mode=ImageReadMode.RGB)
            image = image[0] if image.ndim == 4 else image
        else:
            image = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)
    image = image.transpose(1, 2) if turn in LYING else image
    return image.flip(TURNS[turn]) if TURNS[turn] else image


@contextmanager
def _opened(source: Path | Tensor, name: str) -> Iterator[Image.Image]:
    """An image opened by Pillow, which reads its header only; all that its readers raise becomes DataError."""
    if isinstance(source, Path):
        require_file(source, "image", name)
    file = io.BytesIO(source.numpy().data) if isinstance(source, Tensor) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of many pixels, of which twice as many are an error, and of broken EXIF
            with Image.open(file, formats=list(IMAGE_FORMATS)) as opened:  # others run programs: EPS starts Ghostscript
                yield opened
    except DataError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise DataError(f"{name}: an image of more than {limit:.0f} megapixels; cut or shrink it") from None
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except DAMAGED as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        first = "a format unknown here" if unknown else next(iter(str(error).splitlines()), "") or "empty"
        reason = re.sub(r"^\S+, \S+\.cpp:\d+, ", "", first)

        cure = "fetch the file again or leave the image out"
        if unknown and (what := _stand_in(source)):
            cure = f"it is {what}"
        elif name.rpartition("/")[2].startswith("._"):
            cure = "it is no image but what macOS adds to archives: leave it out"
        formats, size = ", ".join(IMAGE_FORMATS), len(source) if isinstance(source, Tensor) else source.stat().st_size
        raise DataError(f"{name}: not a whole image ({size} bytes; {reason}); {formats} are read; {cure}") from None


def _stand_in(source: Path | Tensor) -> str | None:
    """What lies in the place of an image that was not fetched, by the first bytes of its file."""
    if isinstance(source, Tensor):
        start = bytes(source[:64].tolist())
    else:
        with source.open("rb") as file:
            start = file.read(64)
    start = start.lstrip().lower()
    return next((what for first, what in STAND_INS.items() if start.startswith(first)), None)


def _header_of(opened: Image.Image) -> Header:
    # Pillow decodes all of a PNG to look for a tag behind its pixels, where no camera writes it; it turns a TIFF.
    in_front = "exif" in opened.info or "XML:com.adobe.xmp" in opened.info
    tagged = in_front if opened.format == "PNG" else opened.format != "TIFF"
    turn = opened.getexif().get(ORIENTATION, 1) if tagged else 1
    return Header((opened.height, opened.width), turn if turn in TURNS else 1)


def check_size(
    found: tuple[int, int], size: tuple[int, int], name: str, source: Path | Tensor, orientation: Orientation
) -> None:
    """Raise DataError where an image is not of the size that the annotations give; both (height, width).

    Args:
        found: of the image, read in this orientation.
        size: of the annotations.
        name: of the image, for the message.
        source: its file, or the bytes of it.
        orientation: how the data set is read.
    """
    if found == size:
        return
    cure, header = "correct the annotations or the file", read_header(source, name)
    other: Orientation = "upright" if orientation == "stored" else "stored"
    if header.turn == 1 and found == size[::-1]:
        cure = "exchange height and width in the annotations"
    elif header.turn != 1 and header.size_as(other) == size:
        cure = f"this image is turned by EXIF (orientation {header.turn}); set data.orientation={other}"
        cure += f" (of evaluate: --orientation {other})"
    raise DataError(
        f"{name}: the image is {found[0]} x {found[1]} pixels (height x width), the annotations give {size[0]} x "
        f"{size[1]}; {cure}"
    )


def check_files(
    image_folder: Path, names: Sequence[str], image_ids: Sequence[int], *, allow_links: bool = False
) -> None:
    """Check that images are in their folder; each folder is listed once, and only tiny files are opened.

    Args:
        image_folder: folder that the names are relative to.
        names, image_ids: of I images.
        allow_links: links may lead out of the folder.

    Raises:
        DataError: images are missing or were not fetched, or a name is a link that leads out of the folder.
    """
    root = image_folder.resolve()
    listed: dict[str, dict[str, os.DirEntry]] = {}  # by folder and name
    missing, leaving = [], []
    for name, image_id in zip(names, image_ids, strict=True):
        folder, file = os.path.split(name)
        if folder not in listed:
            listed[folder] = _list_files(image_folder / folder)
            if leaves_folder(image_folder / folder, root):
                leaving.append((name, image_id))
        entry = listed[folder].get(file)
        if entry is None or (entry.is_symlink() and not os.path.isfile(entry.path)):
            missing.append((name, image_id))
        elif entry.is_symlink() and leaves_folder(image_folder / name, root):
            leaving.append((name, image_id))
        elif entry.stat().st_size <= SMALL and _stand_in(Path(entry.path)):
            missing.append((name, image_id))

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


def _list_files(folder: Path) -> dict[str, os.DirEntry]:
    """The files of a folder by name; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry for entry in entries if entry.is_symlink() or entry.is_file()}
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

    The spelling is: \\ for /, upper and lower case, %20 for a space, composed accents, the folders before the name, its
    ending, and the eight digits that Label Studio puts in front of it.
    """
    path = image_folder / name
    if what := other_than_file(path):
        return f"{shorten(name)}, {what}"
    if os.path.isfile(path) and (what := _stand_in(path)):
        return f"{shorten(name)}, {what}"
    if os.path.islink(path):
        return f"{shorten(name)}, a link that leads to no file"
    spellings = _spellings(image_folder, image_folder.stat().st_mtime_ns)
    found = next((there[key] for there, key in zip(spellings, _keys(name), strict=True) if key in there), None)
    return shorten(name) + (f", while there is {shorten(found)}" if found else "")


@lru_cache(maxsize=2)
def _spellings(folder: Path, changed: int) -> tuple[dict[str, str], ...]:
    """The files below a folder by each of their `_keys`; `changed` is its time."""
    spellings: tuple[dict[str, str], ...] = ({}, {}, {})
    for place, _, files in os.walk(folder):
        for file in files:
            path = os.path.relpath(os.path.join(place, file), folder)
            for there, key in zip(spellings, _keys(path), strict=True):
                there[key] = path
    return spellings


def _keys(name: str) -> tuple[str, str, str]:
    """The normalised path, the name in it, and that without ending and Label Studio's digits."""
    path = unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
    last = path.rpartition("/")[2]
    stem, _, ending = last.strip().rpartition(".")
    return path, last, re.sub(r"^[0-9a-f]{8}-", "", stem if f".{ending}" in IMAGE_SUFFIXES else last.strip())
