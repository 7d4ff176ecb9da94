"""The images and objects of a COCO folder, for looking at one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pycocotools import mask as coco_rle
from torch import Tensor

from solq_lab.data.classes import ClassMap
from solq_lab.data.folders import Split, find_splits
from solq_lab.data.ground_truth import DataError, GroundTruth
from solq_lab.data.images import read_image
from solq_lab.data.kinds import Orientation
from solq_lab.data.shapes.writer import write_shapes
from solq_lab.masks import decode_rle, encode_rle, rasterize_in_box
from solq_lab.viz.widgets.chooser import list_objects


class BoxedObject(NamedTuple):
    """One object of a data set."""

    row: int  # its place in the data set
    image: int  # place of its image
    name: str  # of its class
    box: Tensor  # (4,) float64 xyxy, image pixels
    size: tuple[int, int]  # (height, width) of the image, pixels
    rle: dict  # its mask, as a compressed RLE of the image's size


class ObjectFolder:
    """All objects of a data set that are no crowd, by image. Images and masks are read when they are asked for.

    Attributes:
        annotations: path of the annotation file.
        file_names: of the images, with objects or without.
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
        self.file_names = self._truth.file_names
        if len(self) == 0:
            raise DataError(
                f"{self.annotations}: none of the {len(self.file_names)} images has an object (crowds do not count); "
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

    def table(self) -> pd.DataFrame:
        """The objects as `list_objects` gives them."""
        return list_objects(self._truth, self._classes)

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


class OwnMask:
    """The mask that was drawn or uploaded last, in place of an `ObjectFolder`.

    Its row, and its image's, count the masks, so that nothing remembered of an earlier one is shown for it.
    """

    file_names = ("own mask",)

    def __init__(self) -> None:
        self._item: BoxedObject | None = None

    def set(self, mask: np.ndarray) -> None:
        """Take another mask (H, W) bool.

        Raises:
            DataError: it is empty.
        """
        if not mask.any():
            raise DataError("the mask is empty: draw one with the mouse, or upload an image of a light shape on black")
        row = 0 if self._item is None else self._item.row + 1
        (rle,) = encode_rle(torch.from_numpy(np.ascontiguousarray(mask))[None])
        x, y, width, height = coco_rle.toBbox(rle).tolist()
        box = torch.tensor([x, y, x + width, y + height], dtype=torch.float64)
        self._item = BoxedObject(row, row, "own mask", box, mask.shape, rle)

    def __getitem__(self, row: int) -> BoxedObject:
        if self._item is None:
            raise DataError("no mask of your own yet: draw one with the mouse, or upload an image of one")
        return self._item

    def rows_of(self, image: int) -> range:
        """The row of the mask."""
        return range(self[0].row, self[0].row + 1)

    def table(self) -> pd.DataFrame:
        """No objects to search in."""
        return pd.DataFrame(columns=["id", "image", "row", "class", "size"])

    def pixels(self, image: int) -> np.ndarray:
        """The mask as an image, (H, W, 3) uint8."""
        return np.repeat(np.where(decode_rle([self[0].rle])[0], 255, 70).astype(np.uint8)[..., None], 3, axis=2)

    def box_masks(self, rows: Sequence[int], mask_size: int) -> Tensor:
        """(1, N, N) bool: the mask in its box."""
        item = self[0]
        return rasterize_in_box([item.rle], item.box[None], item.size, mask_size)


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
