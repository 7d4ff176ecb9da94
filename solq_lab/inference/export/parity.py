"""Parity of an ONNX file with its model: the same images through onnxruntime and through torch.

The model runs as in `Predictor`, with its compiled kernels and `postprocess`, so that a mistake in the exported graph
cannot cancel out by being made twice.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from solq_lab.data.transforms import Resize, TestResize, apply_to_image
from solq_lab.inference.compare import Difference, Tolerance, compare_detections
from solq_lab.inference.postprocess import cut_out_masks
from solq_lab.inference.predictor import Predictor
from solq_lab.masks import paste_to_rle
from solq_lab.structures import Detections, ImageBatch, ImageMasks

TOLERANCE = Tolerance(score=1e-3, box=1e-3, mask_iou=0.99)  # box: share of the image's sides
MAX_BATCH = 2  # images at once where the file takes any number


class Session:
    """An ONNX file of ours in onnxruntime, on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        # (height, width) that its images must have, pixels, and how many it takes at once; None: any.
        batch, _, height, width = self._session.get_inputs()[0].shape
        self.size = (height, width) if isinstance(height, int) else None
        self.batch = batch if isinstance(batch, int) else None

    def run(self, images: ImageBatch) -> dict[str, Tensor]:
        """The outputs by name for uint8 images."""
        inputs = {"pixels": images.pixels.numpy(), "sizes": images.sizes.numpy()}
        outputs = self._session.run(None, inputs)
        return {name: torch.from_numpy(output) for name, output in zip(self.outputs, outputs, strict=True)}


def measure_parity(predictor: Predictor, path: Path, images: Sequence[np.ndarray]) -> Difference:
    """The difference of an ONNX file from its model on RGB images (H, W, 3) uint8, boxes as shares of the image.

    Each image has its test size, or the largest that fits into the file's.
    """
    session = Session(path)
    expected, found, sizes = [], [], []
    data = predictor.experiment.data
    for batch in _batches(session, images, TestResize(data.test_scale, data.max_size)):
        theirs = _detect_in_onnx(session, batch, predictor.classes.names)
        expected += predictor.detect(batch, batch.sizes.tolist(), top_k=len(theirs[0].scores))
        found += theirs
        sizes += batch.sizes.tolist()
    given = slice(len(images))  # a last batch may repeat an image
    return compare_detections(expected[given], found[given], sizes[given], TOLERANCE)


def _batches(session: Session, images: Sequence[np.ndarray], resize: TestResize) -> Iterator[ImageBatch]:
    """uint8 batches that the file takes; a last one too short for it repeats its last image."""
    count = session.batch or MAX_BATCH
    for first in range(0, len(images), count):
        some = list(images[first : first + count])
        if session.batch is not None:
            some += [some[-1]] * (count - len(some))
        yield ImageBatch.from_list([_resized(image, session.size, resize) for image in some], session.size)


def _resized(image: np.ndarray, room: tuple[int, int] | None, resize: TestResize) -> Tensor:
    """(3, h, w) uint8, resized as in a test, or to the largest size that fits into `room`."""
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    before = (pixels.shape[1], pixels.shape[2])
    if room is None:
        return apply_to_image(resize.plan(before, np.random.default_rng()), pixels)
    share = min(room[0] / before[0], room[1] / before[1])
    after = (max(1, int(before[0] * share)), max(1, int(before[1] * share)))
    return apply_to_image([Resize(before, after)], pixels)


def _detect_in_onnx(session: Session, images: ImageBatch, names: Sequence[str]) -> list[Detections]:
    """The file's detections in uint8 images, in their own pixels; `names` are those of the class channels."""
    outputs = session.run(images)
    detections = []
    for row, (height, width) in enumerate(images.sizes.tolist()):
        boxes = outputs["boxes"][row] * torch.tensor([width, height, width, height])
        masks = None
        if "masks" in outputs:
            masks = paste_to_rle(outputs["masks"][row], boxes, (height, width))
        elif "mask_logits" in outputs:
            kept = ImageMasks(outputs["mask_logits"], images.padding)
            masks = cut_out_masks(kept, row, torch.arange(len(boxes)), (height, width))
        scores, labels, queries = (outputs[name][row] for name in ("scores", "labels", "queries"))
        class_names = [names[label] for label in labels.tolist()]
        detections.append(Detections(scores, labels, boxes, queries, masks, class_names))
    return detections
