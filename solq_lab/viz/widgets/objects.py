"""The images and objects of a COCO folder, for looking at one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solq_lab.data.classes import ClassMap
from solq_lab.data.folders import Split, find_splits
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.data.images import read_image
from solq_lab.data.kinds import Orientation
from solq_lab.data.shapes.writer import write_shapes


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
        _, self._folder, self.annotations, orientation = split
        self._truth = GroundTruth(self.annotations)
        self._orientation: Orientation = orientation or self._truth.orientation or "stored"
        self._classes = ClassMap.from_categories(self._truth.categories)
        self.images = len(self._truth.image_ids)
        if len(self) == 0:
            raise DataError(
                f"{self.annotations}: none of the {self.images} images has an object (crowds do not count); "
                "a codec needs masks to show: choose another data set"
            )

    def __len__(self) -> int:
        return len(self._truth)

    def __getitem__(self, row: int) -> BoxedObject:
        truth, image = self._truth, int(self._truth.image_rows[row])
        return BoxedObject(
            row,
            image=image,
            name=self._classes.names[self._classes.channel_of(int(truth.category_ids[row]))],
            box=torch.from_numpy(truth.boxes[row]),
            size=truth.size(image),
            rle=truth.rle(row),
        )

    def rows_of(self, image: int) -> range:
        """The rows of an image's objects."""
        return range(*self._truth.starts[image : image + 2].tolist())

    def pixels(self, image: int) -> np.ndarray:
        """An image, (H, W, 3) uint8.

        Raises:
            DataError: its file is missing or cannot be read.
        """
        truth = self._truth
        path = self._folder / truth.file_names[image]
        pixels = read_image(path, int(truth.image_ids[image]), truth.size(image), self._orientation)
        return pixels.permute(1, 2, 0).numpy()

    def sides(self) -> np.ndarray:
        """(A,) the square roots of all objects' box areas, pixels."""
        x0, y0, x1, y1 = self._truth.boxes.T
        return np.sqrt((x1 - x0) * (y1 - y0))

    def box_masks(self, rows: Sequence[int], mask_size: int) -> Tensor:
        """Masks (K, N, N) bool of objects, box frame."""
        return self._truth.box_masks(rows, mask_size)

    def evenly(self, most: int) -> list[int]:
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
        splits[f"{level} shapes"] = next(split for split in find_splits(folder) if split.name == "val")
    return splits
