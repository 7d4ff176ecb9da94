"""A folder of images with a COCO annotation file, as pairs of image and target."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from solq_lab import masks
from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.data.annotations import (
    FIRST_FEW,
    DataError,
    Images,
    Objects,
    read_annotations,
    shorten,
    tabulate_images,
    tabulate_objects,
)
from solq_lab.data.classes import ClassMap
from solq_lab.data.image_files import read_image
from solq_lab.data.transforms import (
    Step,
    Transform,
    apply_to_bitmaps,
    apply_to_boxes,
    apply_to_image,
    boxes_before,
    mirrored,
    size_after,
)
from solq_lab.structures import Detections, Target

__all__ = ["CocoDataset", "DataError"]

SNAP = 1e-6  # pixels: a box moved forth and back comes home within this; what is closer was not cropped


class Cached(NamedTuple):
    """One image and its objects' masks before any transform, kept in memory.

    image: (3, H, W) uint8.
    masks: (K, N, N / 8 rounded up) uint8, packed bits in the box frame, or None where no masks are wanted.
    """

    image: Tensor
    masks: np.ndarray | None


class CocoDataset(Dataset):
    """Images and targets of a COCO-format folder; images without objects are kept, crowds are no targets.

    `dataset[epoch, index]` is the image (3, H, W) uint8 and its `Target`; `dataset[index]` is that of epoch 0. The
    same (seed, epoch, index) always gives the same sample, in whatever process and order.

    Attributes:
        annotations: path of the annotation file.
        classes: the class map.
        image_ids: the image ids, by rising id; the order of `index`.
        mask_size: side N of the targets' masks, or None.
    """

    def __init__(
        self,
        images: Path | str,
        annotations: Path | str,
        *,
        classes: ClassMap | None = None,
        class_ids: Literal["contiguous", "raw"] = "contiguous",
        num_classes: int | None = None,
        mask_size: int | None = None,
        with_bitmaps: bool = False,
        transform: Transform | None = None,
        seed: int = 0,
        mask_route: Literal["window", "bitmap"] = "window",
        cache: bool = False,
    ) -> None:
        """Read and check the annotation file; no image is opened yet.

        Args:
            images: folder of the images.
            annotations: COCO annotation file.
            classes: class map to use, for example that of the training set; None: that of this annotation file.
            class_ids, num_classes: how to make the map where `classes` is None, see `ClassMap.from_annotations`.
            mask_size: side N of the targets' masks, cells; None: targets without masks.
            with_bitmaps: targets carry full-image masks too, moved through every step as the released code does.
            transform: plans the steps of each sample; None leaves images as they are.
            seed: of the transform's chance.
            mask_route: "window" rasterises each object inside its box in the original image; "bitmap" moves
                full-image bitmaps through every step and crops them by ROI-align, as the released code does.
            cache: keep decoded images, and the masks of uncropped boxes, in the memory of each loader process.

        Raises:
            DataError: the folder or the file cannot be used.
        """
        self.images, self.annotations = Path(images), Path(annotations)
        self.mask_size, self.transform, self.seed, self.mask_route = mask_size, transform, seed, mask_route
        self.with_bitmaps = with_bitmaps
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such image folder; check data.root and the names in the data section")
        document = read_annotations(self.annotations)
        self.classes = classes or ClassMap.from_annotations(
            document, class_ids, num_classes, source=str(self.annotations)
        )
        self._images = tabulate_images(document, self.annotations)
        _check_files(self.images, self._images)
        with_masks = mask_size is not None or with_bitmaps
        self._objects = tabulate_objects(document, self.annotations, self._images, with_masks=with_masks)
        self._labels = _channels(self._objects, self.classes, self.annotations)
        self.image_ids: list[int] = self._images.ids.tolist()
        self._cache: dict[int, Cached] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        original_size = self._size(index)
        steps = self._plan(epoch, index)
        height, width = size_after(steps, original_size)
        image = self._image(index)  # first: masks of a size that the file does not have could take all memory

        rows = slice(*self._objects.starts[index : index + 2])
        boxes = apply_to_boxes(steps, self._objects.boxes[rows])
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))  # by box area alone: a mask may be empty
        boxes = boxes[kept]
        relative = torch.from_numpy(boxes / (width, height, width, height)).float()
        target = Target(
            image_id=self.image_ids[index],
            labels=torch.from_numpy(self._labels[rows][kept]),
            boxes=xyxy_to_cxcywh(relative),
            masks=None if self.mask_size is None else self._masks(index, kept, boxes, steps),
            image_size=(height, width),
            original_size=original_size,
            bitmaps=self._bitmaps(index, kept, steps) if self.with_bitmaps else None,
        )
        return apply_to_image(steps, image), target

    def aspects(self, epoch: int) -> np.ndarray:
        """Width over height of every image after its transform in this epoch, (I,); no image is opened.

        It takes 40 microseconds an image: 5 s for an epoch of COCO.
        """
        sizes = [size_after(self._plan(epoch, index), self._size(index)) for index in range(len(self))]
        return np.array([width / height for height, width in sizes])

    def file_name(self, image_id: int) -> str:
        """The file of an image, relative to the folder."""
        return self._images.names[self.image_ids.index(image_id)]

    def objects(self, index: int) -> Detections:
        """The true objects of an image as detections of score 1, with boxes and masks in pixels of its file.

        Crowds are left out. The masks are the annotations' own, no transform or mask code has touched them.

        Raises:
            ValueError: the data set was built without masks.
        """
        if self.mask_size is None:
            raise ValueError("this data set was built without masks; give it a mask_size")
        rows = slice(*self._objects.starts[index : index + 2])
        labels = torch.from_numpy(self._labels[rows])
        boxes = torch.from_numpy(self._objects.boxes[rows]).float()
        segmentations = self._segmentations(index, np.arange(len(labels)))
        rles = [masks.segmentation_to_rle(segmentation, self._size(index)) for segmentation in segmentations]
        names = [self.classes.names[label] for label in labels.tolist()]
        return Detections(torch.ones(len(labels)), labels, boxes, torch.arange(len(labels)), rles, names)

    def _plan(self, epoch: int, index: int) -> list[Step]:
        """The steps of a sample; all its chance is drawn from (seed, epoch, index)."""
        if self.transform is None:
            return []
        return self.transform.plan(self._size(index), np.random.default_rng((self.seed, epoch, index)))

    def _size(self, index: int) -> tuple[int, int]:
        height, width = self._images.sizes[index].tolist()
        return height, width

    def _segmentations(self, index: int, kept: np.ndarray) -> list:
        rows = self._objects.order[self._objects.starts[index] + kept]
        return [self._objects.segmentations[row] for row in rows.tolist()]

    def _masks(self, index: int, kept: np.ndarray, boxes: np.ndarray, steps: list[Step]) -> Tensor:
        """Masks (K, N, N) bool of the kept objects, whose boxes (K, 4) xyxy pixels are given after the steps."""
        if self.mask_route == "bitmap":
            return self._masks_by_bitmap(index, kept, boxes, steps)
        original = self._objects.boxes[self._objects.starts[index] + kept]
        windows = boxes_before(steps, boxes)
        windows = np.where(np.abs(windows - original) < SNAP, original, windows)
        if self._cache is None:
            box_masks = self._rasterize(index, kept, windows)
        else:
            box_masks = self._cached_masks(index)[torch.from_numpy(kept)]
            cropped = np.flatnonzero((windows != original).any(axis=1))
            if len(cropped):
                box_masks[torch.from_numpy(cropped)] = self._rasterize(index, kept[cropped], windows[cropped])
        return box_masks.flip(-1) if mirrored(steps) else box_masks

    def _rasterize(self, index: int, kept: np.ndarray, windows: np.ndarray) -> Tensor:
        segmentations = self._segmentations(index, kept)
        return masks.rasterize_in_box(segmentations, torch.from_numpy(windows), self._size(index), self.mask_size)

    def _masks_by_bitmap(self, index: int, kept: np.ndarray, boxes: np.ndarray, steps: list[Step]) -> Tensor:
        bitmaps = self._bitmaps(index, kept, steps)
        return masks.crop_and_resize(bitmaps, torch.from_numpy(boxes).float(), self.mask_size) >= 0.5

    def _bitmaps(self, index: int, kept: np.ndarray, steps: list[Step]) -> Tensor:
        """Full-image masks (K, H, W) bool of the kept objects after the steps."""
        size = self._size(index)
        if len(kept) == 0:
            return torch.zeros(0, *size_after(steps, size), dtype=torch.bool)
        rles = [masks.segmentation_to_rle(segmentation, size) for segmentation in self._segmentations(index, kept)]
        return apply_to_bitmaps(steps, masks.decode_rle(rles))

    def _image(self, index: int) -> Tensor:
        return self._read_image(index) if self._cache is None else self._cached(index).image.clone()

    def _read_image(self, index: int) -> Tensor:
        path = self.images / self._images.names[index]
        try:
            return read_image(path, self.image_ids[index], self._size(index))
        except DataError as error:
            raise DataError(f"{self.annotations}: {error}") from None

    def _cached_masks(self, index: int) -> Tensor:
        """Masks (K, N, N) bool of all objects of an image in their whole boxes."""
        bits = np.unpackbits(self._cached(index).masks, axis=-1, count=self.mask_size)
        return torch.from_numpy(bits.view(np.bool_))

    def _cached(self, index: int) -> Cached:
        if index not in self._cache:
            packed = None
            if self.mask_size is not None and self.mask_route == "window":
                first, end = self._objects.starts[index : index + 2]
                whole = self._rasterize(index, np.arange(end - first), self._objects.boxes[first:end])
                packed = np.packbits(whole.numpy(), axis=-1)
            self._cache[index] = Cached(self._read_image(index), packed)
        return self._cache[index]


def _check_files(image_folder: Path, images: Images) -> None:
    """Refuse images that are not in the folder, or lead out of it; each folder is listed once, no file is opened."""
    root = image_folder.resolve()
    links: dict[str, dict[str, bool]] = {}  # folder -> its files, and whether each is a link
    missing = []
    for row, name in enumerate(images.names):
        folder, file = os.path.split(name)
        if folder not in links:
            links[folder] = _list_files(image_folder / folder)
            _check_inside(image_folder / folder, root, row, images)
        if file not in links[folder]:
            missing.append(row)
        elif links[folder][file]:
            _check_inside(image_folder / name, root, row, images)
    if missing:
        first = ", ".join(f"{shorten(images.names[row])} (image id {images.ids[row]})" for row in missing[:FIRST_FEW])
        first += ", ..." if len(missing) > FIRST_FEW else ""
        none_there = len(missing) == len(images.names)
        cure = "do folder and annotations belong together?" if none_there else "fetch them or remove their entries"
        raise DataError(
            f"{image_folder}: {len(missing)} of the {len(images.names)} annotated images are missing: {first}; {cure}"
        )


def _list_files(folder: Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a link; nothing where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return {}


def _check_inside(path: Path, root: Path, row: int, images: Images) -> None:
    """Refuse a path of image `row` whose links lead out of the image folder `root`."""
    try:
        inside = path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # no such name, or links in a circle: missing, not elsewhere
        return
    if not inside:
        raise DataError(
            f"{root}: file_name {shorten(images.names[row])} (image id {images.ids[row]}) is a link that leaves "
            "the image folder; put the file itself there, or name the folder where it lies"
        )


def _channels(objects: Objects, classes: ClassMap, path: Path) -> np.ndarray:
    """(A,) int64 class channels of the objects."""
    categories, first_rows, inverse = np.unique(objects.categories, return_index=True, return_inverse=True)
    channels = []
    for category_id, row in zip(categories.tolist(), first_rows.tolist(), strict=True):
        try:
            channels.append(classes.channel_of(category_id))
        except DataError as error:
            raise DataError(
                f"{path}: annotation id {objects.ids[row]}: {error}; add the category to the file that the map "
                "was made from, or remove the annotation"
            ) from None
    return np.array(channels, dtype=np.int64)[inverse]
