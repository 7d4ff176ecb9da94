"""An ONNX file of ours in onnxruntime, and images as it wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from solq_lab.data.transforms import Resize, TestResize, apply_to_image
from solq_lab.structures import ImageBatch

MAX_AT_ONCE = 2  # images in one batch where the file takes any number


class Session:
    """An ONNX file of ours in onnxruntime, on the CPU.

    Args:
        path: the file.

    Attributes:
        outputs: names of its outputs.
        size: (height, width) that its images must have, pixels; None: any.
        batch: number of images that it takes at once; None: any.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        batch, _, height, width = self._session.get_inputs()[0].shape
        self.size = (height, width) if isinstance(height, int) else None
        self.batch = batch if isinstance(batch, int) else None

    def run(self, images: ImageBatch) -> dict[str, Tensor]:
        """The outputs by name for uint8 images."""
        given = {"pixels": images.pixels.numpy(), "sizes": images.sizes.numpy()}
        answers = self._session.run(None, given)
        return {name: torch.from_numpy(answer) for name, answer in zip(self.outputs, answers, strict=True)}


def batches(session: Session, images: Sequence[np.ndarray], resize: TestResize) -> Iterator[ImageBatch]:
    """RGB images (H, W, 3) uint8 in batches that the file takes, uint8.

    Each is resized as `resize` says, or, where the file wants one size, to the largest that fits into it, and padded. A
    last batch too short for the file repeats its last image.
    """
    at_once = session.batch or MAX_AT_ONCE
    for first in range(0, len(images), at_once):
        some = list(images[first : first + at_once])
        if session.batch is not None:
            some += [some[-1]] * (at_once - len(some))
        yield ImageBatch.from_list([_resized(image, session.size, resize) for image in some], session.size)


def _resized(image: np.ndarray, room: tuple[int, int] | None, resize: TestResize) -> Tensor:
    """(3, h, w) uint8."""
    pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    before = (pixels.shape[1], pixels.shape[2])
    if room is None:
        return apply_to_image(resize.plan(before, np.random.default_rng()), pixels)
    share = min(room[0] / before[0], room[1] / before[1])
    after = (max(1, int(before[0] * share)), max(1, int(before[1] * share)))
    return apply_to_image([Resize(before, after)], pixels)
