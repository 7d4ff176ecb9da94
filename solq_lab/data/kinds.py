"""What experiments and commands name of the data: augmentations, orientations, image files. Loads without torch.

An augmentation is a dataclass with the method of `transforms.Transform`; its fields are keys of the section `data`. A
new one is one class and one entry here.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath
from typing import Literal

Orientation = Literal["stored", "upright"]
ORIENTATIONS: tuple[Orientation, ...] = ("stored", "upright")
IMAGE_FORMATS: dict[str, tuple[str, ...]] = {  # that `data.images` reads, by Pillow's name: endings in lower case
    "JPEG": (".jpg", ".jpeg", ".jfif", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
IMAGE_SUFFIXES = frozenset(itertools.chain.from_iterable(IMAGE_FORMATS.values()))

_MODULE = "solq_lab.data.transforms"

AUGMENTATIONS: dict[str, str] = {  # "module:class"
    "released": f"{_MODULE}:ReleasedAugmentation",
    "flip": f"{_MODULE}:FlipOnly",
    "lsj": f"{_MODULE}:LargeScaleJitter",
    "none": f"{_MODULE}:TestResize",
    "mosaic": f"{_MODULE}:ReleasedAugmentation",
    "copy_paste": f"{_MODULE}:LargeScaleJitter",
}
MIXED: dict[str, str] = {  # whose samples are made of several images, after the augmentation of each
    "mosaic": "solq_lab.data.mixing:MosaicDataset",
    "copy_paste": "solq_lab.data.mixing:CopyPasteDataset",
}


def count_endings(paths: Iterable[PurePath]) -> str:
    """How many files have which ending, for messages: "2 .heic, 1 without ending"."""
    counts = Counter(path.suffix.lower() or "without ending" for path in paths)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(8))
