"""The images and objects of a COCO folder, for looking at one after the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solq_lab import masks
from solq_lab.data.annotations import DataError, read_annotations
from solq_lab.data.classes import ClassMap
from solq_lab.data.image_files import read_image
from solq_lab.data.objects import ObjectMasks
from solq_lab.data.shapes import write_shapes


class Split(NamedTuple):
    """Where the images and the annotations of a data set are."""

    images: Path
    annotations: Path


class BoxedObject(NamedTuple):
    """One object of a data set.

    row: its place in the data set.
    image: place of its image.
    name: of its class.
    box: (4,) float64 xyxy, image pixels.
    size: (height, width) of the image, pixels.
    rle: its mask, as a compressed RLE of the image's size.
    """

    row: int
    image: int
    name: str
    box: Tensor
    size: tuple[int, int]
    rle: dict


def find_splits(root: Path | str) -> dict[str, Split]:
    """The data sets of a folder laid out like COCO: annotations/instances_NAME.json beside a folder NAME of images.

    Raises:
        DataError: there is none.
    """
    root = Path(root)
    found = {}
    for file in sorted(root.glob("annotations/instances_*.json")):
        name = re.sub("^instances_", "", file.stem)
        if (root / name).is_dir():
            found[name] = Split(root / name, file)
    if not found:
        raise DataError(
            f"{root}: no data set in COCO's layout; needed are annotations/instances_NAME.json and a folder NAME "
            "with the images"
        )
    return found


class ObjectFolder:
    """All objects of a data set that are no crowd, by image. Images and masks are read when they are asked for.

    Attributes:
        annotations: path of the annotation file.
        images: how many images there are, with objects or without.
    """

    def __init__(self, split: Split) -> None:
        """Read and check the annotation file.

        Raises:
            DataError: the file cannot be used, or holds no object.
        """
        self._folder, self.annotations = split
        document = read_annotations(self.annotations)
        self._masks = ObjectMasks(document, mask_size=1)
        self._classes = ClassMap.from_annotations(document)
        self.images = len(self._masks.images.ids)
        if len(self) == 0:
            raise DataError(
                f"{self.annotations}: none of the {self.images} images has an object (crowds do not count); "
                "a mask code needs masks to show: choose another data set"
            )

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, row: int) -> BoxedObject:
        objects, size = self._masks.objects, self._masks.image_size(row)
        return BoxedObject(
            row,
            image=int(np.searchsorted(objects.starts, row, side="right")) - 1,
            name=self._classes.names[self._classes.channel_of(int(objects.categories[row]))],
            box=torch.from_numpy(objects.boxes[row]),
            size=size,
            rle=masks.segmentation_to_rle(self._masks.segmentation(row), size),
        )

    def rows_of(self, image: int) -> range:
        """The rows of an image's objects."""
        return range(*self._masks.objects.starts[image : image + 2].tolist())

    def pixels(self, image: int) -> np.ndarray:
        """An image, (H, W, 3) uint8.

        Raises:
            DataError: its file is missing or cannot be read.
        """
        images = self._masks.images
        size = tuple(images.sizes[image].tolist())
        pixels = read_image(self._folder / images.names[image], int(images.ids[image]), size)
        return pixels.permute(1, 2, 0).numpy()

    def sides(self) -> np.ndarray:
        """(A,) the square roots of all objects' box areas, pixels."""
        x0, y0, x1, y1 = self._masks.objects.boxes.T
        return np.sqrt((x1 - x0) * (y1 - y0))

    def bits(self, rows: Sequence[int], mask_size: int) -> Tensor:
        """Masks (K, N, N) bool of objects, box frame."""
        self._masks.mask_size = mask_size
        return self._masks.masks(rows)

    def spread(self, most: int) -> list[int]:
        """At most `most` rows, evenly over the data set."""
        return np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int)).tolist()


def draw_splits(root: Path | str, *, images: int = 200) -> dict[str, Split]:
    """Two data sets of shapes, easy and hard ones, drawn into a folder where they are missing.

    Raises:
        DataError: the folder holds something else.
    """
    splits = {}
    for level in ("easy", "hard"):
        folder = Path(root) / level
        write_shapes(folder, level=level, train=1, val=images)
        splits[f"{level} shapes"] = find_splits(folder)["val"]
    return splits
