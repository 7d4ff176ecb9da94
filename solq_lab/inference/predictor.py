"""A trained model with everything around it: from an image to its objects in one call."""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solq_lab.build import build_codec, build_model
from solq_lab.config import Experiment, parse_experiment
from solq_lab.data.annotations import DataError
from solq_lab.data.classes import ClassMap
from solq_lab.data.images import EIGHT_BIT_MODES, decode_bytes, read_file
from solq_lab.data.kinds import Orientation
from solq_lab.data.transforms import TestResize, apply_to_image
from solq_lab.errors import UserError
from solq_lab.inference.folding import prepare_for_inference
from solq_lab.inference.graphs import GraphedForward
from solq_lab.inference.postprocess import decoding_of, postprocess
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import WeightFile, WeightMismatch, load_state, read_weights
from solq_lab.precision import check_autocast
from solq_lab.runs import Run, RunError
from solq_lab.structures import Detections, ImageBatch, LayerPrediction

MIN_SIDE = 32  # pixels; an image that is thinner after resizing is padded, or backbones would have nothing left of it
ImageSource = str | Path | Image.Image | np.ndarray | Tensor


class DeviceError(UserError):
    """A device that this machine does not have."""


class Predictor:
    """Detects objects in single images with a trained model.

    The experiment (network, codec, test size) and the class names are read from the weights file too. Building a
    predictor downloads nothing.

    Args:
        weights_or_run: a weight file that this project wrote or imported, or a finished run or its folder.
        device: where the model runs; None: the first CUDA device, or the CPU where there is none.
        top_k: detections per image; None: as many as the experiment evaluates.
        bucket: the resized image is padded, right and bottom, until its sides are multiples of this, pixels. On a GPU
            each of the few sizes that are left is captured as a CUDA graph when it first occurs. The padding changes
            the results slightly, as in a batch. None: no padding, no graphs.
        autocast: "bf16" multiplies in bfloat16, for processors that are fast at it; "none" stays in float32.

    Attributes:
        model: the network after `prepare_for_inference`, in evaluation mode and with batch norms folded.
        codec: its mask codec, None for a plain detector.
        classes: names and category ids of the class channels.
        experiment: how the model was trained.
        device: where the model runs.
        orientation: whether image files are turned upright: as the model's data set says, upright where it does not.

    Raises:
        RunError: a folder that is no run, or a run without a finished model.
        WeightMismatch: a file that holds no weights, no experiment, or weights of another network.
        DeviceError: a device that this machine does not have.
        ValueError: a bucket or autocast that does not exist.
    """

    def __init__(
        self,
        weights_or_run: str | Path | Run,
        *,
        device: torch.device | str | None = None,
        top_k: int | None = None,
        bucket: int | None = None,
        autocast: Literal["none", "bf16"] = "none",
    ) -> None:
        if bucket is not None and bucket < 1:
            raise ValueError(f"bucket {bucket}: allowed are positive numbers of pixels, and None for no padding")
        self.device = _find_device(device)
        path = find_weights(weights_or_run)
        weights, self.experiment, self.classes = read_trained(path)
        self.orientation: Orientation = self.experiment.data.orientation or "upright"
        self.top_k = top_k or self.experiment.evaluation.top_k
        self.bucket, self.autocast = bucket, autocast
        check_autocast(autocast, self.device)

        model = build_model(self.experiment, len(self.classes))
        load_state(model, weights.state, source=str(path))
        self.model = prepare_for_inference(model.to(self.device))
        self.codec = build_codec(self.experiment, tables=weights.codec)
        if self.codec is not None:
            self.codec.to(self.device)

        self._graphed = None
        if bucket is not None and self.device.type == "cuda":
            self._graphed = GraphedForward(partial(predict_last_layer, self.model, autocast=autocast), self.device)

    def __repr__(self) -> str:
        codec = "no codec" if self.codec is None else f"{self.experiment.codec.kind} codec"
        return f"<Predictor {self.experiment.name}: {len(self.classes)} classes, {codec}, on {self.device}>"

    @overload
    def predict(self, image: ImageSource) -> Detections: ...
    @overload
    def predict(self, image: list[ImageSource], *, batch: int = 1) -> list[Detections]: ...
    def predict(self, image: ImageSource | list[ImageSource], *, batch: int = 1) -> Detections | list[Detections]:
        """The objects in one image, or in each of a list, with boxes and masks in its pixels.

        A file is turned upright by its EXIF orientation, as `read_pixels` does, unless the model's data.orientation is
        "stored". The pixels of a PIL image, an array or a tensor are used as they are.

        Args:
            image: path of an image file, PIL image, uint8 array (H, W, 3) or uint8 tensor (3, H, W), channels in the
                order red, green, blue (of OpenCV's: `array[..., ::-1]`).
            batch: images of a list that the network is given at once, fewer where their shapes differ much; they are
                padded to a common size, which changes the results slightly.

        Raises:
            DataError: no such file, no image, or an array of another type or shape.
        """
        if not isinstance(image, list):
            return self._predict_batch([image])[0]
        chunks = (image[start : start + batch] for start in range(0, len(image), batch))
        return [found for chunk in chunks for found in self._predict_batch(chunk)]

    @torch.inference_mode()
    def _predict_batch(self, images: list[ImageSource]) -> list[Detections]:
        resize = TestResize(self.experiment.data.test_scale, self.experiment.data.max_size)
        if self.orientation == "stored":
            images = [read_pixels(image, "stored") if isinstance(image, str | Path) else image for image in images]
        resized, sizes = [], []
        for image in images:
            pixels = np.require(as_pixels(image), requirements=["C", "W"])  # as torch wants them; a view as a rule
            height, width = pixels.shape[:2]
            steps = resize.plan((height, width), np.random.default_rng())
            resized.append(apply_to_image(steps, torch.from_numpy(pixels).permute(2, 0, 1)))
            sizes.append((height, width))

        found: dict[int, Detections] = {}
        for places in group_alike([(image.shape[1], image.shape[2]) for image in resized]):
            some, multiple = [resized[place] for place in places], self.bucket or 1
            sides = [max(MIN_SIDE, *(image.shape[axis] for image in some)) for axis in (1, 2)]
            height, width = (-(-side // multiple) * multiple for side in sides)
            batch = ImageBatch.from_list(some, (height, width))
            found |= zip(places, self.detect(batch, [sizes[place] for place in places]), strict=True)
        return [dataclasses.replace(found[place], image=image) for place, image in enumerate(images)]

    @torch.inference_mode()
    def detect(
        self, images: ImageBatch, sizes: Sequence[tuple[int, int]], *, top_k: int | None = None
    ) -> list[Detections]:
        """The objects in uint8 images as the network takes them, in pixels of files of `sizes` (height, width)."""
        forward = self._graphed or partial(predict_last_layer, self.model, autocast=self.autocast)
        last, decoding = forward(images.to(self.device)), decoding_of(self.experiment.evaluation)
        names, ids, top_k = self.classes.names, self.classes.category_ids, self.top_k if top_k is None else top_k
        every = postprocess(last, sizes, self.codec, top_k=top_k, class_names=names, **decoding)
        return [dataclasses.replace(one, category_ids=[ids[label] for label in one.labels.tolist()]) for one in every]


def group_alike(sizes: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Places of images (height, width), in groups that become batches of no more padding than image."""
    sides = [(max(height, MIN_SIDE), max(width, MIN_SIDE)) for height, width in sizes]
    group: list[int] = []
    for place in sorted(range(len(sides)), key=sides.__getitem__):
        heights, widths = zip(*(sides[other] for other in (*group, place)), strict=True)
        own = sum(height * width for height, width in zip(heights, widths, strict=True))
        if len(heights) * max(heights) * max(widths) > 2 * own:
            yield group
            group = []
        group.append(place)
    yield group


def read_pixels(path: str | Path, orientation: Orientation = "upright") -> np.ndarray:
    """(H, W, 3) uint8 of the image in a file, turned by its EXIF orientation as a viewer shows it, or as it is stored.

    Raises:
        DataError: no such file, no image, or more than 8 bits per channel.
    """
    data = read_file(Path(path), str(path))
    return decode_bytes(data, str(path), orientation).permute(1, 2, 0).contiguous().numpy()


def predict_last_layer(model: SOLQ, images: ImageBatch, *, autocast: str) -> LayerPrediction:
    """Prediction of the last decoder layer for uint8 images.

    Args:
        model: on the device of the images.
        images: as a loader gives them.
        autocast: "none" or "bf16".
    """
    # No cache of cast weights: within a CUDA graph its memory would be reused by the graph.
    with torch.autocast(images.pixels.device.type, torch.bfloat16, enabled=autocast == "bf16", cache_enabled=False):
        return model(images.normalised()).layers[-1]


def _find_device(device: torch.device | str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise DeviceError(f"device {device}: {str(error).splitlines()[0]}; allowed are cpu, cuda, cuda:1") from None
    return found


def as_pixels(image: ImageSource) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image as `Predictor.predict` takes it.

    Raises:
        DataError: as there.
    """
    match image:
        case str() | Path():
            return read_pixels(image)
        case Image.Image():
            if image.mode not in EIGHT_BIT_MODES:
                raise DataError(
                    f"the PIL image: mode {image.mode} has more than 8 bits per channel; scale it to 0..255 first"
                )
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        case np.ndarray():
            return _checked_array(image)

        case Tensor() if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel():
            return image.permute(1, 2, 0).cpu().numpy()
        case Tensor():
            raise DataError(
                f"tensor {tuple(image.shape)} of {image.dtype}; allowed is (3, H, W) of uint8, RGB: scale it to "
                "0..255, convert it with .to(torch.uint8), and give several images as a list"
            )
        case _:
            raise DataError(
                f"an image cannot be a {type(image).__name__}; allowed are a path, a PIL image, "
                "a uint8 array (H, W, 3) and a uint8 tensor (3, H, W) in RGB"
            )


def _checked_array(array: np.ndarray) -> np.ndarray:
    found = f"array {array.shape} of {array.dtype}; allowed is (H, W, 3) of uint8, RGB"
    if array.dtype != np.uint8:
        raise DataError(f"{found}: scale it to 0..255 and convert it with .astype(np.uint8)")
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        raise DataError(f"{found}: move the channels last with .transpose(1, 2, 0)")
    if array.ndim != 3 or array.shape[2] != 3:
        raise DataError(f"{found}: convert it, for example with np.asarray(Image.fromarray(array).convert('RGB'))")
    if 0 in array.shape:
        raise DataError(f"{found}, with at least one pixel")
    return array


def find_weights(weights_or_run: str | Path | Run) -> Path:
    """The path of a weights file, or of the finished model of a run.

    Raises:
        RunError: a folder that is no run, or a run without a finished model.
    """
    if isinstance(weights_or_run, Run):
        run = weights_or_run
    elif Path(weights_or_run).is_dir():
        run = Run(weights_or_run)
    else:
        return Path(weights_or_run)
    if run.weights.is_file():
        return run.weights

    saved = sorted(run.checkpoints.glob("*/weights.safetensors"))
    if saved:
        cure = f"finish the training, or give its last checkpoint, {saved[-1]}"
    else:
        inside = ", ".join(sorted(entry.name for entry in run.folder.iterdir()))
        cure = f"no checkpoint either (found: {inside}); train it first"
    raise RunError(f"{run.folder}: this run has no {run.weights.name} yet; {cure}")


def read_trained(path: Path) -> tuple[WeightFile, Experiment, ClassMap]:
    """A weights file with the experiment and the class map stored in it.

    Raises:
        WeightMismatch: no weights file, or one without experiment or classes.
        ConfigError, DataError: experiment or classes cannot be read.
    """
    weights = read_weights(path)
    if weights.experiment is None or weights.classes is None:
        missing = "experiment" if weights.experiment is None else "class map"
        raise WeightMismatch(
            f"{path}: the file holds weights but no {missing}, so the network cannot be rebuilt; "
            "turn it into one that does with `solq-lab import-weights`"
        )
    experiment = parse_experiment(weights.experiment, source=f"{path} (stored experiment)")
    return weights, experiment, ClassMap.from_json(weights.classes)
