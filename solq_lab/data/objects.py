"""The objects of an annotation file as box-frame masks, in any order and without opening an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from solq_lab import masks
from solq_lab.data.annotations import DataError, read_annotations, tabulate_images, tabulate_objects

__all__ = ["DataError", "ObjectMasks"]


class ObjectMasks:
    """Ground-truth masks in their boxes, drawn when they are asked for: COCO's 850 000 need no more memory than one.

    Rows count the objects grouped by image, by rising image id. Crowds and objects without area are left out.

    Attributes:
        images: the images of the file.
        objects: its objects; `objects.boxes`, `.ids` and `.categories` are in the order of rows.
        mask_size: side N of the masks, cells.
    """

    def __init__(self, annotations: str | Path | dict, mask_size: int) -> None:
        """Read and check the annotations.

        Args:
            annotations: COCO instances file, or its parsed content.
            mask_size: N.

        Raises:
            DataError: the annotations cannot be used.
        """
        source = Path("annotations") if isinstance(annotations, dict) else Path(annotations)
        document = annotations if isinstance(annotations, dict) else read_annotations(source)
        self.mask_size = mask_size
        self.images = tabulate_images(document, source)
        self.objects = tabulate_objects(document, source, self.images, with_masks=True)
        self._owners = np.repeat(np.arange(len(self.images.ids)), np.diff(self.objects.starts))

    def __len__(self) -> int:
        return len(self.objects.ids)

    def image_id(self, row: int) -> int:
        """Id of the image that an object is in."""
        return int(self.images.ids[self._owners[row]])

    def image_size(self, row: int) -> tuple[int, int]:
        """(H, W) of that image, pixels."""
        height, width = self.images.sizes[self._owners[row]].tolist()
        return height, width

    def segmentation(self, row: int) -> masks.Segmentation:
        """What COCO wrote for an object: polygons in image pixels, or a compressed RLE."""
        return self.objects.segmentations[int(self.objects.order[row])]

    def masks(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Masks (K, N, N) bool of the given rows; an object too small to fill half a cell has an empty one."""
        drawn = [
            masks.rasterize_in_box(
                [self.segmentation(row)],
                torch.from_numpy(self.objects.boxes[row : row + 1]),
                self.image_size(row),
                self.mask_size,
            )
            for row in map(int, rows)
        ]
        return torch.cat(drawn) if drawn else torch.zeros(0, self.mask_size, self.mask_size, dtype=torch.bool)

    def batches(self, size: int, *, order: Sequence[int] | np.ndarray | None = None) -> Iterator[Tensor]:
        """Masks of all rows, or of the rows in `order`, `size` at a time (the last batch may be smaller)."""
        order = np.arange(len(self)) if order is None else order
        for start in range(0, len(order), size):
            yield self.masks(order[start : start + size])
