"""The pictures and objects of a COCO folder, for looking at one after the other."""

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
from solq_lab.data.objects import ObjectMasks
from solq_lab.data.pictures import read_picture
from solq_lab.data.shapes import write_shapes


class Split(NamedTuple):
    """Where the pictures and the annotations of a data set are."""

    pictures: Path
    annotations: Path


class BoxedObject(NamedTuple):
    """One object of a data set.

    row: its place in the data set.
    picture: place of its picture.
    name: of its class.
    box: (4,) float64 xyxy, image pixels.
    size: (height, width) of the picture, pixels.
    rle: its mask, as a compressed RLE of the picture's size.
    """

    row: int
    picture: int
    name: str
    box: Tensor
    size: tuple[int, int]
    rle: dict


def find_splits(root: Path | str) -> dict[str, Split]:
    """The data sets of a folder laid out like COCO: annotations/instances_NAME.json beside a folder NAME of pictures.

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
            "with the pictures"
        )
    return found


class ObjectFolder:
    """All objects of a data set that are no crowd, by picture. Pictures and masks are read when they are asked for.

    Attributes:
        annotations: path of the annotation file.
        pictures: how many pictures there are, with objects or without.
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
        self.pictures = len(self._masks.pictures.ids)
        if len(self) == 0:
            raise DataError(
                f"{self.annotations}: none of the {self.pictures} pictures has an object (crowds do not count); "
                "a mask code needs masks to show: choose another data set"
            )

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, row: int) -> BoxedObject:
        objects, size = self._masks.objects, self._masks.picture_size(row)
        return BoxedObject(
            row,
            picture=int(np.searchsorted(objects.starts, row, side="right")) - 1,
            name=self._classes.names[self._classes.channel_of(int(objects.categories[row]))],
            box=torch.from_numpy(objects.boxes[row]),
            size=size,
            rle=masks.segmentation_to_rle(self._masks.segmentation(row), size),
        )

    def rows_of(self, picture: int) -> range:
        """The rows of a picture's objects."""
        return range(*self._masks.objects.starts[picture : picture + 2].tolist())

    def pixels(self, picture: int) -> np.ndarray:
        """A picture, (H, W, 3) uint8.

        Raises:
            DataError: its file is missing or cannot be read.
        """
        pictures = self._masks.pictures
        size = tuple(pictures.sizes[picture].tolist())
        image = read_picture(self._folder / pictures.names[picture], int(pictures.ids[picture]), size)
        return image.permute(1, 2, 0).numpy()

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


def draw_splits(root: Path | str, *, pictures: int = 200) -> dict[str, Split]:
    """Two data sets of shapes, easy and hard ones, drawn into a folder where they are missing.

    Raises:
        DataError: the folder holds something else.
    """
    splits = {}
    for level in ("easy", "hard"):
        folder = Path(root) / level
        write_shapes(folder, level=level, train=1, val=pictures)
        splits[f"{level} shapes"] = find_splits(folder)["val"]
    return splits
