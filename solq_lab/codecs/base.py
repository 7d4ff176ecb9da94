"""The interface of mask codecs: a map from N x N binary masks to short vectors and back. Paper: section 3.2."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Threshold = Literal["middle", "half"]
FLAT = 1e-3  # range below which a reconstruction is constant up to rounding, also in half precision


class MaskCodec(nn.Module, ABC):
    """A codec for binary masks in the box frame.

    It is a module so that its tables move with `.to(device)` and are part of a state dict; it has no parameters.

    Attributes:
        mask_size: side N of the masks, mask pixels.
        vector_dim: length D (n_k in the paper) of the vectors.
        loss: the loss its vectors are trained with: "l1" (eq. 5) or "l2_dice" (table 3a, flatten; the released PCA).
        threshold: of `binarize`: the "middle" of each reconstruction's range, as released, or "half" (0.5).
        isometric: encoding multiplies by orthonormal rows, and decoding by their transpose: sums over products of a
            decoded mask with itself or with a mask are those of their vectors (Parseval). Subclasses do not inherit it.
        token_bits: bits of a stored mask where a vector follows from tokens; None where it is D real numbers.
    """

    loss: Literal["l1", "l2_dice"] = "l1"
    threshold: Threshold = "middle"
    isometric: bool = False
    token_bits: int | None = None

    def __init_subclass__(cls) -> None:
        cls.isometric = cls.__dict__.get("isometric", False)

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__()
        if mask_size < 1 or not 1 <= vector_dim <= mask_size**2:
            raise ValueError(
                f"vector_dim {vector_dim} does not fit mask_size {mask_size}: "
                f"allowed are 1..{max(mask_size, 1) ** 2} (mask_size squared); lower vector_dim or raise mask_size"
            )
        self.mask_size = mask_size
        self.vector_dim = vector_dim

    @classmethod
    def from_options(cls, mask_size: int, vector_dim: int, **options: Any) -> MaskCodec:
        """A codec built from the keys of an experiment's section `codec` (`CodecSpec.options`)."""
        return cls(mask_size, vector_dim, **options)

    def fit(self, masks: Iterable[Tensor], *, seed: int = 0) -> None:
        """Learn the codec's tables from batches of masks (K, N, N) bool. Analytic codecs ignore it."""

    @abstractmethod
    def encode(self, masks: Tensor) -> Tensor:
        """Vectors (K, D) of masks (K, N, N), bool or 0/1 floats: float32, or float64 where the masks are. K may be 0.

        Raises:
            ValueError: the masks are not N x N, or a fitted codec has no tables yet.
        """

    @abstractmethod
    def decode(self, vectors: Tensor) -> Tensor:
        """Real-valued reconstructions (K, N, N) of vectors (K, D), in the vectors' dtype. K may be 0.

        Raises:
            ValueError: the vectors are not D long, or a fitted codec has no tables yet.
        """

    def binarize(self, decoded: Tensor) -> Tensor:
        """Binary masks (K, N, N) bool of reconstructions (K, N, N): pixels strictly above the threshold.

        The released implementation cuts at the middle of each reconstruction's range, (max + min) / 2. A full mask has
        a flat reconstruction, whose range is rounding noise: it is cut at 0.5.

        Raises:
            ValueError: `threshold` is neither "middle" nor "half".
        """
        match self.threshold:
            case "half":
                return decoded > 0.5
            case "middle":
                return decoded > middle_of_range(decoded)[:, None, None]
        raise ValueError(f"threshold {self.threshold!r}: allowed are 'middle' and 'half'")

    def decode_masks(self, vectors: Tensor) -> Tensor:
        """Masks (K, N, N) bool of vectors (K, D): `binarize(decode(vectors))`, or a faster equivalent."""
        return self.binarize(self.decode(vectors))

    def check_masks(self, masks: Tensor) -> None:
        """Raises ValueError where masks are not (K, N, N)."""
        if masks.ndim != 3 or masks.shape[1:] != (self.mask_size, self.mask_size):
            raise ValueError(f"masks have shape {tuple(masks.shape)}, expected (K, {self.mask_size}, {self.mask_size})")

    def check_vectors(self, vectors: Tensor) -> None:
        """Raises ValueError where vectors are not (K, D)."""
        if vectors.ndim != 2 or vectors.shape[1] != self.vector_dim:
            raise ValueError(f"mask vectors have shape {tuple(vectors.shape)}, expected (K, {self.vector_dim})")


class CodecFit(ABC):
    """Fit of a codec's tables, batch after batch; it can stop after any batch and resume from its state.

    Attributes:
        batch_size: number of masks of one `update`.
    """

    batch_size: int

    @abstractmethod
    def update(self, masks: Tensor) -> None:
        """Learn from masks (K, N, N) bool, K at least 1."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The state of the fit; a fresh fit that restores it continues identically."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the `state` of another fit."""

    @abstractmethod
    def tables(self) -> dict[str, Tensor]:
        """The codec's tables as a state dict, after one `update` at least."""


class FittedCodec(MaskCodec):
    """A codec whose tables are learnt from masks. Until then they are zero, and encoding and decoding raise.

    Attributes:
        method: name of the kind, in files and experiments.
        fitted: whether there are tables.
    """

    method: str

    def __init__(self, mask_size: int, vector_dim: int) -> None:
        super().__init__(mask_size, vector_dim)
        self.fitted = False
        self.register_load_state_dict_post_hook(_mark_fitted)

    @property
    def settings(self) -> dict[str, bool | float]:
        """The keyword arguments, besides the sizes, that the tables depend on."""
        return {}

    @abstractmethod
    def start_fit(self, seed: int = 0) -> CodecFit:
        """A new fit; `load_state_dict(fit.tables())` finishes it."""

    def fit(self, masks: Iterable[Tensor], *, seed: int = 0) -> None:
        """Learn the tables from batches of masks (K, N, N) bool, each read once.

        Raises:
            ValueError: there is no mask at all.
        """
        fit, seen = self.start_fit(seed), 0
        for batch in masks:
            self.check_masks(batch)
            if len(batch):
                fit.update(batch)
                seen += len(batch)
        if not seen:
            raise ValueError(f"{type(self).__name__} cannot be fitted to no masks at all")
        self.load_state_dict(fit.tables())

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ValueError(
                f"this {type(self).__name__} has no tables yet: fit it (codec.fit, or `solq-lab fit-codec EXPERIMENT`) "
                "or load them (codec.load_state_dict, `codecs.artifact.load_codec`)"
            )


def describe_codec(codec: MaskCodec | None) -> dict[str, Any] | None:
    """The identity of a codec as JSON types; None without a codec.

    Returns:
        Its "kind", "mask_size", "vector_dim", "threshold", and the "sha256" of its tables.
    """
    if codec is None:
        return None
    tables = hashlib.sha256()
    for name, table in sorted(codec.named_buffers()):
        tables.update(name.encode() + table.cpu().contiguous().numpy().tobytes())
    return {
        "kind": type(codec).__name__,
        "mask_size": codec.mask_size,
        "vector_dim": codec.vector_dim,
        "threshold": codec.threshold,
        "sha256": tables.hexdigest(),
    }


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`dtype`, or float64 where float32 products may round their factors (TF32, bf16)."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return dtype if backend.matmul.fp32_precision in ("none", "ieee") else torch.float64


def middle_of_range(decoded: Tensor) -> Tensor:
    """(K,) middles of the ranges of reconstructions (K, N, N), 0.5 where one is flat."""
    if decoded.shape[0] == 0:  # not len(), which would pin the number of masks in an exported graph
        return decoded.new_zeros(0)
    pixels = decoded.flatten(1)  # (K, N, N) -> (K, N*N)
    low, high = pixels.amin(dim=1), pixels.amax(dim=1)
    return torch.where(high - low < FLAT, 0.5, (high + low) / 2)


def sharpness(decoded: Tensor, masks: Tensor) -> Tensor:
    """(K,) mean of reconstructions (K, N, N), clamped to 0..1, inside their masks times the mean of 1 - them outside.

    A codec trained by distances answers an uncertain shape with a blurred one. The masks (K, N, N) bool are `binarize`
    of the reconstructions; 0 for an empty one.
    """
    certain, inside = decoded.clamp(0, 1).flatten(1), masks.flatten(1).to(decoded.dtype)
    found, area = (certain * inside).sum(1), inside.sum(1)
    leaked, rest = certain.sum(1) - found, inside.shape[1] - area
    return (found / area.clamp(min=1)) * (1 - leaked / rest.clamp(min=1))


def _mark_fitted(codec: FittedCodec, _incompatible: object) -> None:
    """Set `fitted` after loading; the tables of a codec that was never fitted are zero."""
    codec.fitted = any(bool(table.any()) for table in codec.state_dict().values())
