"""What experiments and commands name of the data: augmentations, orientations, image files. Loads without torch.

An augmentation is a dataclass with the method of `transforms.Transform`; its fields are keys of the section `data`. A
new one is one class and one entry here.
"""

from __future__ import annotations

from typing import Literal

Orientation = Literal["stored", "upright"]
ORIENTATIONS: tuple[Orientation, ...] = ("stored", "upright")
IMAGE_SUFFIXES = frozenset(  # of the files that `data.images` reads, in lower case
    [".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".jp2", ".avif"]
)

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
