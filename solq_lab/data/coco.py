"""A folder of images with a COCO annotation file, as pairs of image and target."""

import logging
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from solq_lab import masks
from solq_lab.boxes import xyxy_to_cxcywh
from solq_lab.data.annotations import DataError, first_few, shorten
from solq_lab.data.classes import ClassMap
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.data.images import check_files, read_image
from solq_lab.data.kinds import Orientation
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

logger = logging.getLogger(__name__)

SAME_NAMES = "several categories are called {}, and are learnt as different classes; give them one id, or other names"
SNAP = 1e-6  # pixels: rounding of a box moved forth and back; a larger difference is a crop


class Cached(NamedTuple):
    """One image and its objects' masks before any transform, kept in memory."""

    image: Tensor  # (3, H, W) uint8
    # (K, N, N / 8 rounded up) uint8, packed bits in the box frame, or None where no masks are wanted
    masks: np.ndarray | None


class CocoDataset(Dataset):
    """Images and targets of a COCO-format folder; images without objects are kept, crowds are no targets.

    `dataset[epoch, index]` is the image (3, H, W) uint8 and its `Target`; `dataset[index]` is that of epoch 0. The
    same (seed, epoch, index) always gives the same sample, in whatever process and order.

    Attributes:
        annotations: path of the annotation file.
        truth: the annotations of the images; with masks where targets have any.
        classes: the class map.
        image_ids: the image ids, by rising id; the order of `index`.
        mask_size: side N of the targets' masks, or None.
        orientation: whether images are turned by their EXIF orientation.
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
        allow_links: bool = False,
        orientation: Orientation | None = None,
    ) -> None:
        """Read and check the annotation file; no image is opened yet.

        Args:
            images: folder of the images.
            annotations: COCO annotation file.
            classes: class map to use, for example that of the training set; None: that of this annotation file.
            class_ids, num_classes: how to make the map where `classes` is None, see `ClassMap.from_categories`.
            mask_size: side N of the targets' masks, cells; None: targets without masks.
            with_bitmaps: targets carry full-image masks too, moved through every step as the released code does.
            transform: plans the steps of each sample; None leaves images as they are.
            seed: of the transform's randomness.
            mask_route: "window" rasterises each object inside its box in the original image; "bitmap" moves
                full-image bitmaps through every step and crops them by ROI-align, as the released code does.
            cache: keep decoded images, and the masks of uncropped boxes, in the memory of each loader process.
            allow_links: images may be links that leave the folder.
            orientation: see `read_image`; None: as the annotation file says, or as stored.

        Raises:
            DataError: the folder or the file cannot be used.
        """
        self.images, self.annotations = Path(images), Path(annotations)
        self.mask_size, self.transform, self.seed, self.mask_route = mask_size, transform, seed, mask_route
        self.with_bitmaps = with_bitmaps
        if not self.images.is_dir():
            raise DataError(f"{self.images}: no such image folder; check data.root and the names in the data section")

        self.truth = GroundTruth(self.annotations, with_masks=mask_size is not None or with_bitmaps)
        self.orientation: Orientation = orientation or self.truth.orientation or "stored"
        self.image_ids: list[int] = self.truth.image_ids.tolist()
        self.classes = classes or ClassMap.from_categories(
            self.truth.categories, class_ids, num_classes, source=str(self.annotations)
        )
        if same := self.classes.same_names():
            logger.warning("%s: %s", self.annotations, SAME_NAMES.format(first_few(same)))
        check_files(self.images, self.truth.file_names, self.image_ids, allow_links=allow_links)
        if classes is not None:
            _check_names(self.truth, classes)
        self._labels = _channels(self.truth, self.classes)
        self.cache = cache
        self._cached_images: dict[int, Cached] = {}

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Target]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)} images")
        original_size = self.truth.size(index)
        steps = self._plan(epoch, index)
        height, width = size_after(steps, original_size)
        # Before the masks: those of a size that the file does not have could take all memory.
        image = self._cached(index).image.clone() if self.cache else self._read_image(index)

        rows = self.truth.rows_of(index)
        boxes = apply_to_boxes(steps, self.truth.boxes[rows])
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
        sizes = [size_after(self._plan(epoch, index), self.truth.size(index)) for index in range(len(self))]
        return np.array([width / height for height, width in sizes])

    def file_name(self, image_id: int) -> str:
        """The file of an image, relative to the folder."""
        return self.truth.file_names[self.image_ids.index(image_id)]

    def objects(self, index: int) -> Detections:
        """The true objects of an image as detections of score 1, with boxes and masks in pixels of its file.

        Crowds are left out. The masks are the annotations' own, without transform or codec.

        Raises:
            ValueError: the data set was built without masks.
        """
        if self.mask_size is None:
            raise ValueError("this data set was built without masks; give it a mask_size")
        rows = self.truth.rows_of(index)
        labels = torch.from_numpy(self._labels[rows])
        boxes = torch.from_numpy(self.truth.boxes[rows]).float()
        rles = [self.truth.rle(row) for row in range(rows.start, rows.stop)]
        names = [self.classes.names[label] for label in labels.tolist()]
        return Detections(torch.ones(len(labels)), labels, boxes, torch.arange(len(labels)), rles, names)

    def _plan(self, epoch: int, index: int) -> list[Step]:
        """The steps of a sample, drawn from (seed, epoch, index) alone."""
        if self.transform is None:
            return []
        return self.transform.plan(self.truth.size(index), np.random.default_rng((self.seed, epoch, index)))

    def _masks(self, index: int, kept: np.ndarray, boxes: np.ndarray, steps: list[Step]) -> Tensor:
        """Masks (K, N, N) bool of the kept objects, whose boxes (K, 4) xyxy pixels are given after the steps."""
        assert self.mask_size is not None
        if self.mask_route == "bitmap":
            bitmaps = self._bitmaps(index, kept, steps)
            return masks.crop_and_resize(bitmaps, torch.from_numpy(boxes).float(), self.mask_size) >= 0.5

        original = self.truth.boxes[self.truth.starts[index] + kept]
        windows = boxes_before(steps, boxes)
        windows = np.where(np.abs(windows - original) < SNAP, original, windows)
        if not self.cache:
            box_masks = self._rasterize(index, kept, windows)
        else:
            packed = self._cached(index).masks
            assert packed is not None
            box_masks = torch.from_numpy(np.unpackbits(packed[kept], axis=-1, count=self.mask_size).view(np.bool_))
            cropped = np.flatnonzero((windows != original).any(axis=1))
            if len(cropped):
                box_masks[torch.from_numpy(cropped)] = self._rasterize(index, kept[cropped], windows[cropped])
        return box_masks.flip(-1) if mirrored(steps) else box_masks

    def _rasterize(self, index: int, kept: np.ndarray, windows: np.ndarray) -> Tensor:
        assert self.mask_size is not None
        segmentations = self.truth.segmentations(self.truth.starts[index] + kept)
        return masks.rasterize_in_box(segmentations, torch.from_numpy(windows), self.truth.size(index), self.mask_size)

    def _bitmaps(self, index: int, kept: np.ndarray, steps: list[Step]) -> Tensor:
        """Full-image masks (K, H, W) bool of the kept objects after the steps."""
        size = self.truth.size(index)
        if len(kept) == 0:
            return torch.zeros(0, *size_after(steps, size), dtype=torch.bool)
        rles = [self.truth.rle(row) for row in (self.truth.starts[index] + kept).tolist()]
        return apply_to_bitmaps(steps, masks.decode_rle(rles))

    def _read_image(self, index: int) -> Tensor:
        path = self.images / self.truth.file_names[index]
        try:
            return read_image(path, self.image_ids[index], self.truth.size(index), self.orientation)
        except DataError as error:
            raise DataError(f"{self.annotations}: {error}") from None

    def _cached(self, index: int) -> Cached:
        if index not in self._cached_images:
            packed = None
            if self.mask_size is not None and self.mask_route == "window":
                first, end = self.truth.starts[index : index + 2]
                whole = self._rasterize(index, np.arange(end - first), self.truth.boxes[first:end])
                packed = np.packbits(whole.numpy(), axis=-1)
            self._cached_images[index] = Cached(self._read_image(index), packed)
        return self._cached_images[index]


def _check_names(truth: GroundTruth, classes: ClassMap) -> None:
    """Raise DataError where a category is another one of the class map, which scores would silently mix up."""
    own = ClassMap.from_categories(truth.categories, source=str(truth.source))
    learnt = dict(zip(classes.category_ids, classes.names, strict=True))
    differing = []
    for category_id, name in zip(own.category_ids, own.names, strict=True):
        if learnt.get(category_id, name) == name:
            continue
        differing.append(f"{category_id} is {shorten(name)} here and {shorten(learnt[category_id])} there")
        if name in classes.names:
            raise DataError(
                f"{truth.source}: category ids do not mean what they mean in the training: {differing[-1]}; give "
                "every category the same id in both files"
            )
    if differing:
        logger.warning("%s: categories have other names than in the training: %s", truth.source, first_few(differing))


def _channels(truth: GroundTruth, classes: ClassMap) -> np.ndarray:
    """(A,) int64 class channels of the objects."""
    categories, first_rows, inverse = np.unique(truth.category_ids, return_index=True, return_inverse=True)
    channels = []
    for category_id, row in zip(categories.tolist(), first_rows.tolist(), strict=True):
        try:
            channels.append(classes.channel_of(category_id))
        except DataError as error:
            raise DataError(
                f"{truth.source}: annotation id {truth.ids[row]}: {error}; add the category to the file that the map "
                "was made from, or remove the annotation"
            ) from None
    return np.array(channels, dtype=np.int64)[inverse]
