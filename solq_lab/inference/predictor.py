"""A trained model and everything around it: from a picture to its objects in one call."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from torch import Tensor

from solq_lab.build import build_codec, build_model
from solq_lab.config import Experiment, validate_experiment
from solq_lab.data.annotations import DataError
from solq_lab.data.classes import ClassMap
from solq_lab.data.transforms import TestResize, apply_to_picture
from solq_lab.inference.postprocess import postprocess
from solq_lab.models.weights import WeightMismatch, load_state, read_weights
from solq_lab.runs import Run, RunError
from solq_lab.structures import Detections, ImageBatch

EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class Predictor:
    """Finds objects in single pictures with a trained model.

    Everything but the weights comes out of the weight file too: the experiment (network, codec, test size) and the
    class names. Building a predictor fetches nothing.

    Args:
        weights_or_run: a weight file that this project wrote or imported, or a finished run or its folder.
        device: where the model runs; None: the first CUDA device, or the CPU where there is none.
        top_k: detections per picture; None: as many as the experiment evaluates.

    Attributes:
        model: the network, in evaluation mode.
        codec: its mask code, None for a plain detector.
        classes: names and category ids of the class channels.
        experiment: how the model was trained.
        device: where the model runs.

    Raises:
        RunError: a folder that is no run, or a run without a finished model.
        WeightMismatch: a file that holds no weights, no experiment, or weights of another network.
    """

    def __init__(
        self, weights_or_run: str | Path | Run, *, device: torch.device | str | None = None, top_k: int | None = None
    ) -> None:
        path = _find_weights(weights_or_run)
        state, self.experiment, self.classes = _read(path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.top_k = top_k or self.experiment.evaluation.top_k
        self.model = build_model(self.experiment, len(self.classes))
        load_state(self.model, state, source=str(path))
        self.model.to(self.device).eval()
        self.codec = build_codec(self.experiment)
        if self.codec is not None:
            self.codec.to(self.device)

    @torch.inference_mode()
    def predict(self, image: str | Path | Image.Image | np.ndarray) -> Detections:
        """The objects in one picture, with boxes and masks in its pixels.

        A file is turned upright by its EXIF orientation, as `read_upright` does. The pixels of a PIL image or an array
        are taken as they lie; so does our evaluation, because COCO's annotations ignore the orientation.

        Args:
            image: path of a picture file, PIL image, or uint8 array (H, W, 3) in RGB.

        Raises:
            DataError: no such file, no picture, or an array of another type or shape.
        """
        pixels = _to_tensor(image)
        height, width = pixels.shape[1:]
        resize = TestResize(self.experiment.data.test_scale, self.experiment.data.max_size)
        steps = resize.plan((height, width), np.random.default_rng())
        resized = apply_to_picture(steps, pixels).unsqueeze(0)  # (1, 3, h, w)
        padding = torch.zeros(1, *resized.shape[2:], dtype=torch.bool)
        batch = ImageBatch(resized, padding).to(self.device).normalised()
        last = self.model(batch).layers[-1]
        return postprocess(last, [(height, width)], self.codec, top_k=self.top_k, class_names=self.classes.names)[0]


def read_upright(path: str | Path) -> Image.Image:
    """The picture in a file as 8-bit RGB, turned as its EXIF orientation says: what a viewer would show.

    Raises:
        DataError: no such file, no picture, or more than 8 bits per channel.
    """
    try:
        with Image.open(path) as opened:
            return _to_rgb(ImageOps.exif_transpose(opened), name=str(path))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # what PIL's readers raise
        reason = "a format unknown to Pillow" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(f"{path}: not a picture that can be read ({reason}); JPEG, PNG and the like are") from None


def _to_tensor(image: str | Path | Image.Image | np.ndarray) -> Tensor:
    """(3, H, W) uint8."""
    match image:
        case str() | Path():
            pixels = np.asarray(read_upright(image))
        case Image.Image():
            pixels = np.asarray(_to_rgb(image, name="the PIL image"))
        case np.ndarray():
            pixels = _checked_array(image)
        case _:
            raise DataError(
                f"a picture cannot be a {type(image).__name__}; allowed are a path, a PIL image, "
                "and a uint8 array (H, W, 3) in RGB"
            )
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


def _to_rgb(image: Image.Image, *, name: str) -> Image.Image:
    if image.mode not in EIGHT_BIT_MODES:
        raise DataError(f"{name}: mode {image.mode} has more than 8 bits per channel; scale it to 0..255 first")
    return image.convert("RGB")


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


def _find_weights(weights_or_run: str | Path | Run) -> Path:
    """The weight file that is meant: the path itself, or the finished model of a run."""
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


def _read(path: Path) -> tuple[dict[str, Tensor], Experiment, ClassMap]:
    weights = read_weights(path)
    if weights.experiment is None or weights.classes is None:
        missing = "experiment" if weights.experiment is None else "class map"
        raise WeightMismatch(
            f"{path}: the file holds weights but no {missing}, so the network cannot be rebuilt; "
            "turn it into one that does with `solq-lab import-weights`"
        )
    experiment = validate_experiment(yaml.safe_load(weights.experiment), source=f"{path} (stored experiment)")
    return weights.state, experiment, ClassMap.from_json(weights.classes)
