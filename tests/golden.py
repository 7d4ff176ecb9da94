"""Rebuilds what a golden model folder describes: weights from their rule, images, targets, our model for its `args`.

The folder's own README states the rules (weights are not stored but drawn from a seed per tensor name). Shared by the
tests of the model, of the losses and of the post-processing.
"""

import json
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from solq_lab.structures import PIXEL_MEAN, PIXEL_STD, ImageBatch, Target


def fixtures(root: Path) -> list[Path]:
    """Folders under `root` that hold a model, sorted; the part fixtures are left out."""
    folders = sorted(path.parent for path in root.glob("*/fixture.json"))
    return [folder for folder in folders if not folder.name.startswith("parts_")]


class Fixture:
    """One golden model folder.

    Attributes:
        args: the released implementation's configuration, names as on its command line.
        record: everything in fixture.json.
        arrays: everything in fixture.npz.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = folder.name
        self.record: dict[str, Any] = json.loads((folder / "fixture.json").read_text())
        self.args: dict[str, Any] = self.record["args"]
        with np.load(folder / "fixture.npz") as stored:
            self.arrays: dict[str, np.ndarray] = {name: stored[name] for name in stored.files}

    def official_state(self) -> dict[str, Tensor]:
        """The released model's state dict: its names and order, float32; aliases are one tensor under several names."""
        drawn: dict[str, Tensor] = {}
        state = {}
        for name, shape, _, canonical in self.record["state_dict"]:
            if canonical not in drawn:
                drawn[canonical] = _draw(canonical.removeprefix("detr."), tuple(shape))
            state[name] = drawn[canonical]
        return state

    @cached_property
    def inputs(self) -> list[np.ndarray]:
        """Normalised images (3, H, W) float32, one per input, before batch padding."""
        return [self._image(number, described) for number, described in enumerate(self.record["inputs"])]

    def _image(self, number: int, described: dict[str, Any]) -> np.ndarray:
        if described["kind"] == "tiny_coco":
            unit = self.arrays[f"image{number}_uint8"].astype(np.float32) / np.float32(255)
            image = (unit - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
            return np.ascontiguousarray(image.transpose(2, 0, 1))
        height, width = described["height"], described["width"]
        random = np.random.RandomState(zlib.crc32(f"image:{described['tag']}".encode()) & 0x7FFFFFFF)
        low = random.standard_normal((3, -(-height // 16), -(-width // 16))).astype(np.float32)
        noise = random.standard_normal((3, height, width)).astype(np.float32)
        image = low.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width] + np.float32(0.5) * noise
        np.testing.assert_allclose(image.ravel()[:8], described["image_first8"], rtol=1e-6)
        return image

    @property
    def noise(self) -> dict[str, Any]:
        """How far the released model in float32 is from itself in float64; SQR has r50_small's numbers."""
        if "float64_check" in self.record:
            return self.record["float64_check"]
        return json.loads((self.folder.parent / "r50_small" / "fixture.json").read_text())["float64_check"]

    @property
    def trainable(self) -> list[str]:
        """Released names of the trained parameters."""
        return [name for name, gradient in self.record["gradients"].items() if gradient is not None]

    def images(self, dtype: torch.dtype = torch.float32) -> ImageBatch:
        """The normalised batch, padded bottom and right with zeros to the largest height and width."""
        height = max(image.shape[1] for image in self.inputs)
        width = max(image.shape[2] for image in self.inputs)
        pixels = torch.zeros(len(self.inputs), 3, height, width, dtype=dtype)
        padding = torch.ones(len(self.inputs), height, width, dtype=torch.bool)
        for row, image in enumerate(self.inputs):
            pixels[row, :, : image.shape[1], : image.shape[2]] = torch.from_numpy(image)
            padding[row, : image.shape[1], : image.shape[2]] = False
        return ImageBatch(pixels, padding)

    @property
    def targets(self) -> list[Target]:
        """Ground truth per image, without masks (`bitmaps` has them)."""
        return [
            Target(
                image_id=number,
                labels=torch.tensor(described["targets"]["labels"], dtype=torch.int64),
                boxes=torch.tensor(described["targets"]["boxes_cxcywh"], dtype=torch.float32).reshape(-1, 4),
                masks=None,
                image_size=self.inputs[number].shape[1:],
                original_size=tuple(described["orig_size"]),
            )
            for number, described in enumerate(self.record["inputs"])
        ]

    def bitmaps(self, number: int) -> Tensor:
        """Masks (K, H, W) uint8 of image `number` at network-input size."""
        codes = self.record["inputs"][number]["targets"]["masks"]
        height, width = self.inputs[number].shape[1:]
        if not codes:
            return torch.zeros(0, height, width, dtype=torch.uint8)
        return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(codes).transpose(2, 0, 1)))

    def boxes_xyxy(self, number: int) -> Tensor:
        """Boxes (K, 4) float32 (x0, y0, x1, y1) of image `number`, pixels of the network input."""
        return torch.tensor(self.record["inputs"][number]["targets"]["boxes_xyxy"], dtype=torch.float32).reshape(-1, 4)

    @property
    def num_classes(self) -> int:
        """Class channels of the released model."""
        return next(shape[0] for name, shape, *_ in self.record["state_dict"] if name.endswith("class_embed.0.bias"))

    def build_model(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """Our model for `args` with this fixture's weights, in evaluation mode (dropout off)."""
        from solq_lab.models.weights import translate_official_state

        model = build_untrained(self.args, self.num_classes)
        model.load_state_dict(translate_official_state(self.official_state())[0])
        return model.to(dtype).eval()


def build_untrained(args: dict[str, Any], num_classes: int) -> torch.nn.Module:
    """Our SOLQ or SQR detector for a released configuration, freshly initialised, no ImageNet weights."""
    from solq_lab.models.backbone import ResNetBackbone, SwinBackbone
    from solq_lab.models.solq import SOLQ
    from solq_lab.models.sqr import SQRDetector

    if args["position_embedding"] != "sine":
        raise ValueError(f"position_embedding {args['position_embedding']!r} is not part of the library: only sine is")
    c5_only = args["num_feature_levels"] == 1
    if args["backbone"].startswith("swin"):
        name = args["backbone"].removesuffix("_p4w7")
        backbone = SwinBackbone(name, c5_only=c5_only)
    else:
        backbone = ResNetBackbone(args["backbone"], dilation=args["dilation"], c5_only=c5_only)
    sizes = {
        "width": args["hidden_dim"],
        "heads": args["nheads"],
        "levels": args["num_feature_levels"],
        "encoder_layers": args["enc_layers"],
        "decoder_layers": args["dec_layers"],
        "encoder_points": args["enc_n_points"],
        "decoder_points": args["dec_n_points"],
        "feedforward": args["dim_feedforward"],
        "vector_hidden": args["vector_hidden_dim"],
        "queries": args["num_queries"],
        "dropout": args["dropout"],
        "activation": args["activation"],
        "refine_boxes": args["with_box_refine"],
        "two_stage": args["two_stage"],
    }
    if args["meta_arch"] == "deformable_detr" and args["masks"]:
        return SQRDetector(backbone, num_classes, **sizes)
    return SOLQ(backbone, num_classes, vector_dim=args["n_keep"] if args["with_vector"] else None, **sizes)


def digest(tensor: Tensor) -> dict[str, Any]:
    """The summary that the fixtures store of a tensor: shape, moments, range, length and 48 evenly spread values."""
    flat = tensor.detach().to(torch.float64).contiguous().reshape(-1).numpy()
    return {
        "shape": list(tensor.shape),
        "mean": float(flat.mean()),
        "std": float(flat.std(ddof=1)),
        "min": float(flat.min()),
        "max": float(flat.max()),
        "l2": float(np.sqrt((flat**2).sum())),
        "sample": flat[np.linspace(0, flat.size - 1, 48).astype(np.int64)].tolist(),
    }


def _draw(canonical: str, shape: tuple[int, ...]) -> Tensor:
    """One tensor by the README's rule; every step is in float32."""
    if canonical.endswith("relative_position_index"):
        return _relative_position_index(int(shape[0] ** 0.5))
    random = np.random.RandomState(zlib.crc32(canonical.encode()) & 0x7FFFFFFF)
    value = random.standard_normal(shape).astype(np.float32)
    return torch.from_numpy(np.asarray(_scale(canonical, value), dtype=np.float32))


def _scale(name: str, value: np.ndarray) -> np.ndarray:
    fan_in = np.prod(value.shape[1:])
    if name.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(value)
    if name.endswith("running_mean"):
        return np.float32(0.1) * value
    if name.endswith("sampling_offsets.bias"):
        return 2 * value
    if name.startswith("class_embed.") and name.endswith(".bias"):
        return np.float32(-4.6) + np.float32(0.02) * value
    if name.endswith("bias"):
        return np.float32(0.02) * value
    if value.ndim == 1:
        return 1 + np.float32(0.1) * value
    if name in ("query_embed.weight", "transformer.level_embed"):
        return value
    if name.startswith("vector_embed.") and name.endswith("layers.2.weight"):
        rows = np.arange(value.shape[0], dtype=np.float64)[:, None]
        return value * (16 * (1 + rows) ** -0.8 / np.sqrt(fan_in)).astype(np.float32)
    if name.startswith("bbox_attention."):
        return value * np.float32(3 / np.sqrt(fan_in))
    return value * np.float32(1 / np.sqrt(fan_in))


def _relative_position_index(window: int) -> Tensor:
    """Swin's table index (window^2, window^2): row of the bias table for each pair of cells in a window."""
    y, x = np.divmod(np.arange(window**2), window)
    rows = (y[:, None] - y[None] + window - 1) * (2 * window - 1) + (x[:, None] - x[None] + window - 1)
    return torch.from_numpy(rows.astype(np.int64))
