"""From a setting to a view: everything the codec explorer computes, and remembers so that a slider answers at once."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from solq_lab.codecs.base import MaskCodec
from solq_lab.studies.ceiling import bits_per_mask
from solq_lab.viz.widgets.codec_cache import MAX_COMPONENTS, CodecCache
from solq_lab.viz.widgets.codec_panels import Curve, Setting, View
from solq_lab.viz.widgets.objects import BoxedObject, ObjectFolder, OwnMask, Split
from solq_lab.viz.widgets.reconstruction import Reconstruction, Rule, decode_ious, reconstruct, term_order

VECTOR_DIMS = (1, 4, 9, 16, 25, 36, 49, 64, 81, 100, 121, 144, 169, 196, 225, 256, 300, 324, 361, 400, 576, 784)
CURVE_DIMS = (1, 4, 9, 16, 25, 36, 64, 100, 144, 196, 256, 324, 400, 784)
FEW_DIMS = (16, 64, 256)  # of the curves of codecs that are slow to encode, or fitted for every length
COMPARED = ("dct", "pca", "sparse", "flatten")  # the paper's, always drawn
NESTED = ("dct", "pca")  # a shorter vector is the beginning of a longer one
REMEMBERED = 64  # objects
OWN = "own mask"  # the data set of `OwnMask`


class ScoredObject(NamedTuple):
    """An object and the IoU it comes back with."""

    row: int
    iou: float


class CodecLab:
    """Objects of some data sets and what codecs make of them.

    Args:
        splits: the data sets by name; each is read when it is first looked at.
        cache: folder for fitted codecs.
        boundary_ratio: boundary width over the image's diagonal.
        report: is given a sentence before something takes seconds.

    Attributes:
        own: the user's own mask, the data set `OWN`. Its codecs are those fitted to the first of `splits`.
    """

    def __init__(
        self, splits: Mapping[str, Split], cache: Path, *, boundary_ratio: float, report: Callable[[str], None]
    ) -> None:
        self._splits, self._codec_folder, self._ratio, self._report = dict(splits), Path(cache), boundary_ratio, report
        self._folders: dict[str, ObjectFolder] = {}
        self.own = OwnMask()
        self._caches: dict[str, CodecCache] = {}
        self._read_image = lru_cache(8)(lambda name, image: self.folder(name).pixels(image))
        self._target = lru_cache(REMEMBERED)(lambda name, row, size: self.folder(name).box_masks([row], size)[0])
        self._vector = lru_cache(8 * REMEMBERED)(self._encode)
        self._curve = lru_cache(8 * REMEMBERED)(self._measure_curve)

    def folder(self, data_set: str) -> ObjectFolder | OwnMask:
        """The objects of a data set.

        Raises:
            DataError: it cannot be read, or has no object.
        """
        if data_set == OWN:
            return self.own
        if data_set not in self._folders:
            self._folders[data_set] = ObjectFolder(self._splits[data_set])
        return self._folders[data_set]

    def view(self, setting: Setting) -> View:
        """All that is shown for a setting.

        Raises:
            ValueError: there is no such codec, or the image cannot be read.
        """
        item = self.folder(setting.data_set)[setting.row]
        codec = self._cache_of(setting.data_set).codec(setting.method, setting.mask_size, setting.vector_dim)
        vector = self._vector(setting.data_set, setting.row, setting.method, setting.mask_size, setting.vector_dim)
        return View(
            setting,
            item,
            self.pixels(setting.data_set, item.image),
            self.reconstruction(setting),
            self._continued(setting, vector),
            term_order(codec, vector),
            self._curves(setting),
            self._bits(codec, setting),
        )

    def reconstruction(self, setting: Setting) -> Reconstruction:
        """The object's way through the codec. Raises as `view` does."""
        key = (setting.method, setting.mask_size, setting.vector_dim)
        codec = self._cache_of(setting.data_set).codec(*key)
        vector = self._vector(setting.data_set, setting.row, *key)
        return reconstruct(
            self.folder(setting.data_set)[setting.row],
            self._target(setting.data_set, setting.row, setting.mask_size),
            vector,
            codec,
            terms=setting.terms,
            rule=setting.rule,
            error=self._error(setting),
            step=self._step(setting),
            boundary_ratio=self._ratio,
        )

    def pixels(self, data_set: str, image: int) -> np.ndarray:
        """An image of a data set, (H, W, 3) uint8. Raises DataError where its file cannot be read."""
        return self._read_image(data_set, image)

    def compare_methods(self, setting: Setting) -> None:
        """Fit what the lines of all methods need at this setting's N, so that they are there from now on."""
        cache = self._cache_of(setting.data_set)
        most = min(MAX_COMPONENTS, len(cache.rows), setting.mask_size**2)
        cache.codec("pca", setting.mask_size, most)
        for count in FEW_DIMS:
            if count <= setting.mask_size**2:
                cache.codec("sparse", setting.mask_size, count)

    def worst(self, setting: Setting, *, least_side: float = 0.0) -> list[ScoredObject]:
        """The objects of the sample, those first that come back worst from this codec and threshold, without noise.

        Args:
            setting: its object, terms and noise do not matter.
            least_side: only objects whose box covers at least the square of this, pixels.

        Raises:
            ValueError: there is no such codec.
        """
        folder, cache = self.folder(setting.data_set), self._cache_of(setting.data_set)
        if isinstance(folder, OwnMask):
            raise ValueError("Your own mask is the only one; choose a data set to search.")
        codec = cache.codec(setting.method, setting.mask_size, setting.vector_dim)
        target = cache.sample(setting.mask_size)
        vectors = cache.vectors(setting.method, setting.mask_size, setting.vector_dim)
        large = folder.sides() >= least_side
        found = [
            ScoredObject(row, decode_ious(folder[row], target[place], vectors[place][None], codec, setting.rule)[0])
            for place, row in enumerate(cache.rows)
            if large[row]
        ]
        return sorted(found, key=lambda one: one.iou)

    def _cache_of(self, data_set: str) -> CodecCache:
        data_set = next(iter(self._splits)) if data_set == OWN else data_set
        if data_set not in self._caches:
            folder = self.folder(data_set)
            assert isinstance(folder, ObjectFolder)
            self._caches[data_set] = CodecCache(folder, self._codec_folder, self._report)
        return self._caches[data_set]

    @torch.inference_mode()
    def _encode(self, data_set: str, row: int, method: str, mask_size: int, vector_dim: int) -> Tensor:
        cache = self._cache_of(data_set)
        if method == "sparse" and data_set != OWN and row in cache.places:  # one by one they would take too long
            return cache.vectors(method, mask_size, vector_dim)[cache.places[row]]
        codec = cache.codec(method, mask_size, vector_dim)
        return codec.encode(self._target(data_set, row, mask_size)[None])[0]

    def _longest(self, setting: Setting) -> int:
        """Length of the longest vector that is shown for a nested codec."""
        most = (
            MAX_COMPONENTS
            if setting.method == "dct"
            else min(MAX_COMPONENTS, len(self._cache_of(setting.data_set).rows))
        )
        return max(setting.vector_dim, min(most, setting.mask_size**2))

    def _continued(self, setting: Setting, vector: Tensor) -> Tensor:
        if setting.method not in NESTED:
            return vector
        longest = self._longest(setting)
        return self._vector(setting.data_set, setting.row, setting.method, setting.mask_size, longest)

    def _std(self, setting: Setting) -> Tensor:
        """(D,) standard deviation of each entry over the data set."""
        vectors = self._cache_of(setting.data_set).vectors(setting.method, setting.mask_size, setting.vector_dim)
        return vectors.std(dim=0, correction=0)

    def _error(self, setting: Setting) -> Tensor | None:
        """(D,) a normal error, the same direction whatever its size."""
        if setting.error == 0:
            return None
        random = np.random.default_rng(setting.row)
        direction = torch.from_numpy(random.standard_normal(setting.vector_dim)).float()
        return setting.error * self._std(setting) * direction

    def _step(self, setting: Setting) -> float:
        return setting.step * float(self._std(setting).square().mean().sqrt()) if setting.step else 0.0

    def _bits(self, codec: MaskCodec, setting: Setting) -> float:
        symbols: list[np.ndarray | None] = []
        if step := self._step(setting):
            vectors = self._cache_of(setting.data_set).vectors(setting.method, setting.mask_size, setting.vector_dim)
            symbols.append((vectors / step).round().long().numpy())
        return bits_per_mask(codec, symbols)

    def _curves(self, setting: Setting) -> dict[str, Curve]:
        """The lines of the setting's method and of those that draw within a blink, as far as they are fitted."""
        curves = {}
        for method in dict.fromkeys((*COMPARED, setting.method)):
            counts = self._curve_dims(setting, method)
            if counts:
                key = (setting.data_set, setting.row, method, setting.mask_size, setting.rule, tuple(counts))
                curves[method] = Curve(counts, self._curve(*key))
        return curves

    def _curve_dims(self, setting: Setting, method: str) -> list[int]:
        cache, cells = self._cache_of(setting.data_set), setting.mask_size**2
        match method:
            case "flatten":
                return [count for count in CURVE_DIMS if count <= cells and math.isqrt(count) ** 2 == count]
            case _ if method not in NESTED:
                return [count for count in FEW_DIMS if count <= cells and cache.has(method, setting.mask_size, count)]
        longest = self._longest(setting._replace(method=method, vector_dim=1))
        known = cache.has(method, setting.mask_size, longest)
        return [count for count in CURVE_DIMS if count <= longest] if known else []

    def _measure_curve(
        self, data_set: str, row: int, method: str, mask_size: int, rule: Rule, counts: tuple[int, ...]
    ) -> list[float]:
        item, target = self.folder(data_set)[row], self._target(data_set, row, mask_size)
        cache = self._cache_of(data_set)
        if method in NESTED:
            vector = self._vector(data_set, row, method, mask_size, counts[-1])
            kept = torch.arange(len(vector)) < torch.tensor(counts)[:, None]  # (K, D)
            return decode_ious(item, target, vector * kept, cache.codec(method, mask_size, counts[-1]), rule)

        return [
            decode_ious(
                item,
                target,
                self._vector(data_set, row, method, mask_size, count)[None],
                cache.codec(method, mask_size, count),
                rule,
            )[0]
            for count in counts
        ]


def object_title(item: BoxedObject, place: int) -> str:
    """An object's name in a list of its image's objects."""
    x0, y0, x1, y1 = item.box.tolist()
    return f"{place}: {item.name}, {x1 - x0:.0f} x {y1 - y0:.0f}"
