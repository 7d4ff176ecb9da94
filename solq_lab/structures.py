"""Data classes shared by model, data and evaluation: images and targets, predictions and detections.

Shape letters, here and everywhere: B batch, J queries, K objects, S classes, C channels, H W image, N mask side,
D vector_dim, L levels, P points, M heads. Frames: *image pixels*, *normalised image* (0..1 over the unpadded image),
*box frame* (N x N cells over an object's box).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_rle
from torch import Tensor

from solq_lab.masks import decode_rle
from solq_lab.outlines import join_rings, trace_parts

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

PIXEL_MEAN = (0.485, 0.456, 0.406)  # RGB mean of ImageNet, on the 0..1 scale
PIXEL_STD = (0.229, 0.224, 0.225)


class ImageBatch(NamedTuple):
    """Images of one batch, padded bottom and right to a common size."""

    pixels: Tensor  # (B, 3, H, W) RGB; uint8 as the loader gives them, or float once `normalised`
    padding: Tensor  # (B, H, W) bool, True on padded cells

    @classmethod
    def from_list(cls, images: Sequence[Tensor], size: tuple[int, int] | None = None) -> ImageBatch:
        """Pad images (3, h, w) uint8 with zeros to `size` (height, width), by default their largest sides."""
        height, width = size or (max(image.shape[1] for image in images), max(image.shape[2] for image in images))
        pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        padding = torch.ones(len(images), height, width, dtype=torch.bool)
        for row, image in enumerate(images):
            pixels[row, :, : image.shape[1], : image.shape[2]] = image
            padding[row, : image.shape[1], : image.shape[2]] = False
        return cls(pixels, padding)

    @property
    def sizes(self) -> Tensor:
        """(B, 2) int64 (height, width) of the images without their padding, pixels."""
        return unpadded_sizes(self.padding)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on `device`; the copy does not block when the memory is pinned."""
        return ImageBatch._make(tensor.to(device, non_blocking=True) for tensor in self)

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory; the DataLoader's pinning thread calls this."""
        return ImageBatch(self.pixels.pin_memory(), self.padding.pin_memory())

    def normalised(self) -> ImageBatch:
        """The input of the network: ImageNet-normalised float32, zero on padded cells."""
        mean = filled(PIXEL_MEAN, dtype=torch.float32, device=self.pixels.device).view(1, 3, 1, 1)
        std = filled(PIXEL_STD, dtype=torch.float32, device=self.pixels.device).view(1, 3, 1, 1)
        pixels = (self.pixels.float() / 255 - mean) / std
        return ImageBatch(pixels.masked_fill(self.padding.unsqueeze(1), 0.0), self.padding)


class Target(NamedTuple):
    """Ground truth of one image after its transforms."""

    image_id: int  # the id in the annotation file
    labels: Tensor  # (K,) int64 class channels (not category ids)
    boxes: Tensor  # (K, 4) float32 (cx, cy, w, h), normalised image
    masks: Tensor | None  # (K, N, N) bool in the box frame, or None without masks
    image_size: tuple[int, int]  # (height, width) of the network input before padding, pixels
    original_size: tuple[int, int]  # (height, width) of the image in the file, pixels
    # (K, height, width) bool, the masks in the image frame at `image_size`, or None without them
    bitmaps: Tensor | None = None

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on `device`."""
        return Target._make(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)


class ImageMasks(NamedTuple):
    """Masks of all queries in the image frame, coarse; output of the mask branch of the SQR baseline."""

    logits: Tensor  # (B, J, h, w) over the whole padded images, one sigmoid each
    padding: Tensor  # (B, H, W) bool of those images, True on padded cells


class LayerPrediction(NamedTuple):
    """Predictions of the queries after one decoder layer."""

    logits: Tensor  # (B, J, S) class logits, one sigmoid each
    boxes: Tensor  # (B, J, 4) (cx, cy, w, h), normalised image
    vectors: Tensor | None  # (B, J, D) mask vectors, or None for a plain detector
    masks: ImageMasks | None = None  # of the last layer of a model with a mask branch, else None
    # (B, J, 4) the same boxes, their gradient reaching no other layer than this; of a query head
    next_anchor: Tensor | None = None

    def queries(self, places: slice) -> LayerPrediction:
        """Classes, boxes and mask vectors of some queries."""
        vectors = None if self.vectors is None else self.vectors[:, places]
        return LayerPrediction(self.logits[:, places], self.boxes[:, places], vectors)

    def shortened(self, length: int | None) -> LayerPrediction:
        """The same with zeros for all but the first `length` coefficients of mask vectors; None keeps all."""
        if length is None or self.vectors is None:
            return self
        kept = torch.arange(self.vectors.shape[-1], device=self.vectors.device) < length
        return self._replace(vectors=self.vectors * kept)


class Guests(NamedTuple):
    """Copies of a batch's objects with noise, in groups; training puts G of them per image in front of the queries."""

    labels: Tensor  # (B, G) int64 classes to start from, some of them wrong
    boxes: Tensor  # (B, G, 4) boxes (cx, cy, w, h) to start from, moved and scaled; normalised image
    real: Tensor  # (B, G) bool, False at places without an object
    # (3, T) int64: image, place 0..G-1 and object of each guest; objects are counted through the whole batch
    pairs: Tensor
    groups: int  # their number; each has G / groups places, and at most one guest per object

    def to(self, device: torch.device | str) -> Guests:
        """The same guests on `device`."""
        return Guests._make(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in self)


class Predictions(NamedTuple):
    """All decoder layers, first to last, and the encoder's proposals where queries come from them."""

    layers: list[LayerPrediction]
    # a `LayerPrediction` over all encoder tokens (B, T, ...) without vectors, or None
    proposals: LayerPrediction | None
    # whether their logits are those of the classes; otherwise channel 0 stands for any object
    proposals_have_classes: bool = False
    # guests, guest_layers: the guests that were given, and all decoder layers (B, G, ...) for them
    guests: Guests | None = None
    guest_layers: Sequence[LayerPrediction] = ()


class Detection(NamedTuple):
    """One object of an image."""

    name: str  # of its class
    score: float  # in 0..1
    box: tuple[float, float, float, float]  # x0, y0, x1, y1, pixels of the original image, not clipped
    label: int  # class channel
    query: int  # the query it came from
    mask: dict | None  # compressed COCO RLE at original size, or None for a plain detector


@dataclass(frozen=True, repr=False, eq=False)
class Detections:
    """The objects found in one image, best score first: a sequence of `Detection`.

    `len` counts objects, a slice, a list of rows or a bool tensor selects some of them, a number gives one.

    Attributes:
        scores: (K,) float32 in 0..1.
        labels: (K,) int64 class channels.
        boxes: (K, 4) float32 (x0, y0, x1, y1), pixels of the original image, not clipped.
        queries: (K,) int64, the query each object came from; one query may predict several classes.
        masks: K compressed COCO RLEs ({"size": [H, W], "counts": bytes}) at original size; None for a plain detector.
        names: K class names, parallel to labels.
        image_size: (H, W) of the original image, pixels; None where nobody gave it.
        category_ids: K category ids of the annotation file, parallel to labels; None where nobody gave them.
        image: as the predictor was given it, for `plot`; None elsewhere.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor
    masks: list[dict] | None
    names: list[str]
    image_size: tuple[int, int] | None = None
    category_ids: list[int] | None = None
    image: Any = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, rows: int) -> Detection: ...
    @overload
    def __getitem__(self, rows: slice | Sequence[int] | Tensor | np.ndarray) -> Detections: ...
    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor | np.ndarray) -> Detection | Detections:
        if isinstance(rows, int | np.integer):
            x0, y0, x1, y1 = self.boxes[rows].tolist()
            mask = None if self.masks is None else self.masks[rows]
            score, label, query = (values[rows].item() for values in (self.scores, self.labels, self.queries))
            return Detection(self.names[rows], score, (x0, y0, x1, y1), int(label), int(query), mask)
        kept = torch.from_numpy(np.arange(len(self))[rows if isinstance(rows, slice | list) else np.asarray(rows)])

        def select(values: Any) -> Any:
            return None if values is None else [values[row] for row in kept.tolist()]

        tensors = (self.scores[kept], self.labels[kept], self.boxes[kept], self.queries[kept])
        lists = {name: select(getattr(self, name)) for name in ("masks", "names", "category_ids")}
        return Detections(*tensors, **lists, image_size=self.image_size, image=self.image)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        scores = f", scores {self.scores.min():.2f} to {self.scores.max():.2f}" if len(self) else ""
        size = "" if self.image_size is None else f", image {self.image_size[1]} x {self.image_size[0]}"
        return f"<Detections: {counts or 'no objects'}{scores}{'' if self.masks is None else ', with masks'}{size}>"

    def above(self, score: float) -> Detections:
        """Only the objects whose score is at least `score`."""
        return self[self.scores >= score]

    def clipped(self) -> Detections:
        """The same objects, their boxes cut at the borders of the image, whose size is known."""
        height, width = self._size()
        limits = self.boxes.new_tensor([width, height] * 2)
        return dataclasses.replace(self, boxes=self.boxes.clamp(min=0).minimum(limits))

    def masks_array(self) -> np.ndarray:
        """(K, H, W) bool; a large image with many objects needs much memory.

        Raises:
            ValueError: a plain detector's objects, which have no masks.
        """
        if not self._masks():
            return np.zeros((0, *self._size()), dtype=bool)
        return decode_rle(self._masks()).numpy()

    def polygons(self) -> list[list[np.ndarray]]:
        """The exact outlines of the masks: K lists of one polygon (n, 2) int64 per part, as (x, y), image pixels.

        Holes are joined to the outside by cuts of no width. Pixel (row i, column j) covers [j, j+1) x [i, i+1).

        Raises:
            ValueError: a plain detector's objects, which have no masks.
        """
        return [[join_rings(rings) for rings in trace_parts(rle)] for rle in self._masks()]

    def to_coco(self, image_id: int = 0) -> list[dict]:
        """COCO results, best score first; channels without a category give none: no evaluation could count them.

        Args:
            image_id: the image's id in its annotation file.

        Returns:
            Per object "image_id", "category_id", "bbox" (x, y, w, h) in pixels, "score", and "segmentation" (compressed
            RLE whose counts are text, as JSON needs them) where there are masks.

        Raises:
            ValueError: objects without category ids.
        """
        if self.category_ids is None:
            raise ValueError("COCO results need category_ids; a predictor gives them")

        results = []
        columns = zip(self.category_ids, self.boxes.tolist(), self.scores.tolist(), strict=True)
        for row, (category_id, (x0, y0, x1, y1), score) in enumerate(columns):
            if category_id < 0:
                continue
            result: dict[str, Any] = {"image_id": image_id, "category_id": category_id}
            result |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
            if self.masks is not None:
                size, counts = self.masks[row]["size"], self.masks[row]["counts"]
                counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
                result["segmentation"] = {"size": list(size), "counts": counts}
            results.append(result)
        return results

    def frame(self) -> pd.DataFrame:
        """A table with one row per object: name, score, x0, y0, x1, y1, area (pixels of its mask), label and query."""
        import pandas as pd

        columns = {"name": self.names, "score": self.scores.tolist()}
        columns |= dict(zip(("x0", "y0", "x1", "y1"), self.boxes.T.tolist(), strict=True))
        if self.masks is not None:
            columns["area"] = [int(coco_rle.area(rle)) for rle in self.masks]
        return pd.DataFrame(columns | {"label": self.labels.tolist(), "query": self.queries.tolist()})

    def to_supervision(self) -> Any:
        """The objects as `supervision.Detections`, for its trackers and annotators.

        Raises:
            ModuleNotFoundError: supervision is not installed.
        """
        import supervision

        masks = None if self.masks is None else self.masks_array()
        numbers: dict[str, Any] = {
            "xyxy": self.boxes.numpy(),
            "confidence": self.scores.numpy(),
            "class_id": self.labels.numpy(),
        }
        return supervision.Detections(**numbers, mask=masks, data={"class_name": np.array(self.names)})

    def plot(self, image: Any = None) -> Image.Image:
        """The image at its own size with the objects drawn in, each in its colour.

        Args:
            image: path, PIL image, uint8 array (H, W, 3) or tensor (3, H, W), RGB; None: the image they were found in.

        Raises:
            ValueError: nobody gave the image.
        """
        from solq_lab.viz.images import paint_detections

        if image is None and self.image is None:
            raise ValueError("these objects do not know their image; plot(image) draws them into one")
        return paint_detections(self.image if image is None else image, self)

    def _masks(self) -> list[dict]:
        if self.masks is None:
            raise ValueError("a plain detector's objects have boxes, but no masks")
        return self.masks

    def _size(self) -> tuple[int, int]:
        if self.image_size is None and not self.masks:
            raise ValueError("the size of the image is not known; give image_size=(height, width)")
        return self.image_size or tuple(self._masks()[0]["size"])


def padding_at(shapes: Sequence[tuple[int, int]], padding: Tensor) -> list[Tensor]:
    """The padding (B, H, W) bool of pixels at the cells of maps of other shapes: (B, h, w) bool each, the nearest."""
    pixels = padding.unsqueeze(1).to(torch.uint8)
    return [F.interpolate(pixels, size=shape).squeeze(1).bool() for shape in shapes]


def unpadded_sizes(padding: Tensor) -> Tensor:
    """(B, 2) int64 (height, width) of the unpadded parts; `padding` is (B, H, W) bool, bottom and right."""
    real = ~padding
    return torch.stack([real[:, :, 0].sum(1), real[:, 0, :].sum(1)], dim=1)


def filled(values: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers (K,) on the device, K > 0, without a copy from the host: a CUDA graph cannot hold one."""
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
