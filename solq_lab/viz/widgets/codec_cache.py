"""The codecs of one data set, fitted to its masks when they are first asked for, and kept on disk."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from solq_lab.codecs.artifact import load_or_fit, stored_path
from solq_lab.codecs.base import FittedCodec, MaskCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.codecs.pca import PCACodec
from solq_lab.viz.widgets.objects import ObjectFolder

METHODS = tuple(CODECS)
MAX_COMPONENTS = 400  # of one principal component analysis; shorter vectors are its first entries
MAX_MASKS = 512  # that a codec is fitted to: seconds, not minutes


class CodecCache:
    """codecs by method and sizes.

    Args:
        objects: whose masks the codecs are fitted to.
        folder: where fitted tables are kept.
        report: is given a sentence before something takes seconds.

    Attributes:
        rows: the sample, rows of `objects`.
        places: the place of each row in the sample.
    """

    def __init__(self, objects: ObjectFolder, folder: Path, report: Callable[[str], None]) -> None:
        self._objects, self._folder, self._report = objects, folder, report
        self._codecs: dict[tuple[str, int, int], MaskCodec] = {}
        self._samples: dict[int, Tensor] = {}
        self._vectors: dict[tuple[str, int, int], Tensor] = {}
        self._fingerprint = hashlib.sha256(objects.annotations.read_bytes()).hexdigest()[:12]
        self.rows = objects.evenly(MAX_MASKS)
        self.places = {row: place for place, row in enumerate(self.rows)}

    def codec(self, method: str, mask_size: int, vector_dim: int) -> MaskCodec:
        """The codec of these sizes.

        Raises:
            ValueError: there is none, for example with more principal components than masks; the message says why.
        """
        key = (method, mask_size, vector_dim)
        if key not in self._codecs:
            self._codecs[key] = self._make(*key)
        return self._codecs[key]

    def has(self, method: str, mask_size: int, vector_dim: int) -> bool:
        """Whether the codec can be had without fitting it."""
        needed = self._tables_key(method, mask_size, vector_dim)
        return not CODECS[method].fitted or needed in self._codecs or self._file(*needed).exists()

    def sample(self, mask_size: int) -> Tensor:
        """(K, N, N) bool masks of at most `MAX_MASKS` objects, those in `rows`."""
        if mask_size not in self._samples:
            self._samples[mask_size] = self._objects.box_masks(self.rows, mask_size)
        return self._samples[mask_size]

    @torch.inference_mode()
    def vectors(self, method: str, mask_size: int, vector_dim: int) -> Tensor:
        """(K, D) vectors of the sample. Raises as `codec` does."""
        key = (method, mask_size, vector_dim)
        if key not in self._vectors:
            codec, sample = self.codec(*key), self.sample(mask_size)
            if method == "sparse":
                self._report(f"Encoding {len(sample)} masks, {method}, N = {mask_size}, n_k = {vector_dim} ...")
            self._vectors[key] = torch.cat([codec.encode(some) for some in sample.split(64)])
        return self._vectors[key]

    def _make(self, method: str, mask_size: int, vector_dim: int) -> MaskCodec:
        if method not in CODECS:
            raise ValueError(f"method {method!r}: allowed are {', '.join(METHODS)}")
        codec = CODECS[method].build(mask_size, vector_dim)
        if isinstance(codec, PCACodec):
            return self._first_components(codec)
        return self._fitted(codec, method) if isinstance(codec, FittedCodec) else codec

    def _first_components(self, codec: PCACodec) -> PCACodec:
        """The first rows of one analysis with as many components as can be had."""
        most = self._components(codec.mask_size)
        if codec.vector_dim > most:
            raise ValueError(
                f"PCA: n_k = {codec.vector_dim} asks for more components than there are: {len(self.rows)} masks of "
                f"{codec.mask_size} x {codec.mask_size} pixels were looked at, and at most {MAX_COMPONENTS} components "
                f"are kept. Lower n_k to {most}"
            )

        key = ("pca", codec.mask_size, most)
        if key not in self._codecs:
            self._codecs[key] = self._fitted(PCACodec(codec.mask_size, most), "pca")
        tables = dict(self._codecs[key].state_dict())
        for name in ("components", "scale"):
            tables[name] = tables[name][: codec.vector_dim]
        codec.load_state_dict(tables)
        return codec

    def _fitted(self, codec: FittedCodec, method: str) -> FittedCodec:
        def fit() -> None:
            batches = self.sample(codec.mask_size).split(max(256, codec.vector_dim))
            what = f"Fitting {method}, N = {codec.mask_size}, n_k = {codec.vector_dim}, the first time only"
            codec.fit(self._reported(batches, what))

        return load_or_fit(codec, self._file(method, codec.mask_size, codec.vector_dim), fit)

    def _reported(self, batches: Sequence[Tensor], what: str) -> Iterator[Tensor]:
        for number, batch in enumerate(batches):
            self._report(f"{what}: {100 * number // len(batches)} % of the masks read ...")
            yield batch
        self._report(f"{what}: computing ...")

    def _tables_key(self, method: str, mask_size: int, vector_dim: int) -> tuple[str, int, int]:
        return (method, mask_size, self._components(mask_size) if method == "pca" else vector_dim)

    def _components(self, mask_size: int) -> int:
        return min(MAX_COMPONENTS, len(self.rows), mask_size**2)

    def _file(self, method: str, mask_size: int, vector_dim: int) -> Path:
        return stored_path(self._folder, f"{method}_{mask_size}_{vector_dim}", masks=self._fingerprint)
