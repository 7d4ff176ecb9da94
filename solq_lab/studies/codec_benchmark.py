"""Upper bounds of many codecs on one data set: a grid of settings, each measured once. Paper: table 3(a), (d), (e)."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from solq_lab.bars import progress_bar
from solq_lab.build import build_codec
from solq_lab.codecs.artifact import stored_path
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.config import ConfigError, Experiment, validate_experiment
from solq_lab.data.annotations import DataError
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.coco import DEFAULTS
from solq_lab.evaluation.sizes import select_by_size
from solq_lab.evaluation.summary import MAX_DETECTIONS, Evaluation
from solq_lab.files import hash_file, read_json, replacing, write_json
from solq_lab.fitting import fit_codec
from solq_lab.schema import EvaluationSection
from solq_lab.studies.ceiling import Noise, codec_ceiling, max_objects_of_a_class

NUMBERS = tuple(f"{kind}{size}" for kind in ("segm.IoU", "segm.AP", "boundary.AP") for size in ("", "s", "m", "l"))

_VERSION = 1  # of the measurement: with another number, no stored result is used


@dataclasses.dataclass(frozen=True)
class CodecSetting:
    """A codec and the errors added to its boxes and vectors."""

    # kind, mask_size, vector_dim: a name in `CODECS`, N and n_k
    kind: str
    mask_size: int
    vector_dim: int
    pca: Literal["plain", "released"] = "plain"  # "plain" or "released", for kind "pca" only
    beta: float = 1.0  # price of a coefficient, for kind "sparse" only
    threshold: Literal["middle", "half"] | None = None  # "middle", "half", or None: the codec's own
    # box_noise, vector_noise, step: as in `Noise`
    box_noise: float = 0.0
    vector_noise: float = 0.0
    step: float = 0.0
    seed: int = 0  # of the errors, and of the fit

    @property
    def method(self) -> str:
        """The codec's name for people, with what its numbers depend on besides the sizes."""
        match self.kind:
            case "pca" if self.pca == "released":
                return "pca, released"
            case "sparse":
                return f"sparse, beta {self.beta:g}"
        return self.kind


@dataclasses.dataclass(frozen=True)
class UpperBound:
    """The numbers of a setting; seconds: how long they took, without the fit."""

    setting: CodecSetting
    evaluation: Evaluation
    seconds: float

    def row(self) -> dict[str, Any]:
        """The setting, the twelve numbers, shares in 0..1, and the bits of a mask, as JSON types.

        None stands where there is no such object.
        """
        metrics = self.evaluation.metrics
        numbers = {name: None if math.isnan(metrics[name]) else metrics[name] for name in NUMBERS}
        numbers["bits"] = metrics.get("segm.bits")  # 0.2.0 stored none
        return dataclasses.asdict(self.setting) | {"images": self.evaluation.images} | numbers


def make_grid(
    kinds: Sequence[str],
    mask_sizes: Sequence[int],
    vector_dims: Sequence[int],
    *,
    box_noises: Sequence[float] = (0.0,),
    vector_noises: Sequence[float] = (0.0,),
    steps: Sequence[float] = (0.0,),
    threshold: Literal["middle", "half"] | None = None,
    pca: Literal["plain", "released"] = "plain",
    beta: float = 1.0,
    seed: int = 0,
) -> list[CodecSetting]:
    """Every combination, in the order of the arguments.

    A codec whose vectors have square lengths takes the largest square number up to each of `vector_dims`.

    Raises:
        ConfigError: an unknown kind, or a value that does not fit; the message names it.
    """
    for name, values in (("box noise", box_noises), ("vector noise", vector_noises), ("step", steps)):
        for value in values:
            if not 0 <= value < math.inf:
                raise ConfigError(f"{name} {value}: allowed are finite numbers from 0 on")

    settings = []
    for kind in kinds:
        if kind not in CODECS:
            raise ConfigError(f"codec {kind!r}: allowed are {', '.join(CODECS)}")
        codec = CODECS[kind]
        for side, length, box, vector, step in product(mask_sizes, vector_dims, box_noises, vector_noises, steps):
            if side < 1 or not 1 <= length <= side**2:
                raise ConfigError(
                    f"vector_dim {length} does not fit mask_size {side}: allowed are 1..{max(side, 1) ** 2} "
                    "(mask_size squared); lower vector_dim or raise mask_size"
                )
            variant: Literal["plain", "released"] = pca if "pca" in codec.options else "plain"
            price = beta if "beta" in codec.options else 1.0
            errors = (box, vector, step, seed)
            settings.append(CodecSetting(kind, side, codec.allowed_length(length), variant, price, threshold, *errors))
    return list(dict.fromkeys(settings))


class CodecBenchmark:
    """A data set to measure codecs on, and the folder that stores the results.

    Every finished setting is written at once, to `settings/` of the folder, under a name made from all that the numbers
    depend on; fitted codecs are stored in `codecs/`. Re-running, after an interruption or with a larger grid, reads
    what is stored and measures the rest.
    """

    def __init__(
        self,
        annotations: str | Path,
        folder: str | Path,
        *,
        fit_annotations: str | Path | None = None,
        fit_objects: int | None = None,
        area_sides: tuple[float, float] | None = None,
        boundary_ratio: float = DEFAULTS.boundary_ratio,
        max_images: int | None = None,
        processes: int = 1,
    ) -> None:
        """Read and check the annotations.

        Args:
            annotations: COCO instances file whose objects are encoded and decoded.
            folder: where results are stored; made when it is missing.
            fit_annotations: instances file that PCA and sparse coding are fitted to. None: they are rejected.
            fit_objects: fit to so many of its objects, drawn at random. None: all.
            area_sides: as in `codec_ceiling`. None: info.area_sides of the file, otherwise COCO's 32 and 96.
            boundary_ratio, max_images, processes: as in `codec_ceiling`.

        Raises:
            DataError: the annotations cannot be used, or there is no object in the images.
        """
        self.truth = GroundTruth(annotations, keep="all")
        self.folder = Path(folder)
        self.fit_annotations = None if fit_annotations is None else Path(fit_annotations)
        self.fit_objects, self.processes = fit_objects, processes
        if area_sides is None:  # drawn shapes say themselves what is small and medium
            info = self.truth.info if isinstance(self.truth.info, dict) else {}
            area_sides = info.get("area_sides", DEFAULTS.area_sides)
        sides = (float(area_sides[0]), float(area_sides[1]))
        self.settings = EvaluationSection(area_sides=sides, boundary_ratio=boundary_ratio, max_images=max_images)

        self._image_ids = self.truth.image_ids.tolist()[:max_images]
        rows = self.truth.rows(self._image_ids)
        if len(rows) == 0:
            raise DataError(
                f"{annotations}: no object in the {len(self._image_ids)} measured images (crowds and objects "
                "without area do not count), so there is nothing to measure; check the split, or measure more images"
            )
        self._areas = self.truth.areas_of(rows)
        self._max_objects = max_objects_of_a_class(self.truth, rows)

        if self.fit_annotations is not None and not self.fit_annotations.is_file():
            raise DataError(
                f"{self.fit_annotations}: no such annotation file to fit PCA and sparse coding to; "
                "name another (--fit-on)"
            )
        self._sha256 = hash_file(self.truth.source)
        fit_sha256 = None if self.fit_annotations is None else hash_file(self.fit_annotations)
        self._fit = {"sha256": fit_sha256, "objects": fit_objects}

    def __str__(self) -> str:
        counts = [
            f"{which.sum()} {size}" for size, which in select_by_size(self._areas, self.settings.area_sides).items()
        ]
        return f"{self.truth.source}: {len(self._image_ids)} images, {len(self._areas)} objects, {', '.join(counts)}"

    def measure(self, settings: Iterable[CodecSetting]) -> list[UpperBound]:
        """The upper bound of each setting, in order; stored ones are only read.

        Raises:
            ConfigError: a setting does not fit, or its codec has to be fitted and there is nothing to fit it to.
        """
        settings = list(settings)
        for setting in settings:
            self._experiment(setting)  # reject a wrong one before the work on the first
        (self.folder / "settings").mkdir(parents=True, exist_ok=True)
        return [self._measure_one(setting) for setting in progress_bar(settings, desc="settings", unit="setting")]

    def codec(self, setting: CodecSetting) -> MaskCodec:
        """The codec of a setting on the CPU, fitted where that is needed and has not been done yet."""
        experiment = self._experiment(setting)
        if experiment.codec.is_fitted and not Path(experiment.codec.artifact).exists():
            fit_codec(experiment, max_objects=self.fit_objects)
        codec = build_codec(experiment)
        assert codec is not None  # no setting is a plain detector
        return codec

    def _measure_one(self, setting: CodecSetting) -> UpperBound:
        about = self._about(setting)
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        path = self.folder / "settings" / f"{_file_name(setting)}-{digest}.json"
        if path.exists():
            stored = read_json(path)
            if stored["about"] == about:
                return UpperBound(setting, Evaluation.from_dict(stored), stored["seconds"])

        codec, started = self.codec(setting), time.perf_counter()
        noise = Noise(setting.box_noise, setting.vector_noise, setting.seed, setting.step)
        evaluation = codec_ceiling(self.truth, codec, self.settings, noise=noise, processes=self.processes)
        seconds = time.perf_counter() - started
        write_json(path, {"about": about, "seconds": seconds} | evaluation.to_dict())
        return UpperBound(setting, evaluation, seconds)

    def _experiment(self, setting: CodecSetting) -> Experiment:
        """The setting as the experiment that builds and fits its codec."""
        codec = {"kind": setting.kind, "mask_size": setting.mask_size, "vector_dim": setting.vector_dim}
        codec |= {"pca": setting.pca, "beta": setting.beta, "threshold": setting.threshold}
        data = {}
        if CODECS[setting.kind].fitted:
            if self.fit_annotations is None:
                raise ConfigError(
                    f"codec {setting.kind!r} has to be fitted, and no training annotations are named to fit it to; "
                    "name them (--fit-on FILE), or leave this codec out"
                )
            facts = {"fit": self._fit | {"seed": setting.seed}, "pca": setting.pca, "beta": setting.beta}
            codec["artifact"] = str(stored_path(self.folder / "codecs", _file_name(setting), **facts))
            data["train_annotations"] = str(self.fit_annotations.absolute())
        values = {"name": "ceiling", "seed": setting.seed, "codec": codec, "data": data}
        return validate_experiment(values, source=f"setting {setting.method}")

    def _about(self, setting: CodecSetting) -> dict[str, Any]:
        """All that the numbers depend on, as JSON types."""
        about: dict[str, Any] = {
            "version": _VERSION,
            # Results from before quantisers stay valid.
            "setting": {k: v for k, v in dataclasses.asdict(setting).items() if k != "step" or v},
            "annotations": self._sha256,
            "fit": self._fit | {"seed": setting.seed} if CODECS[setting.kind].fitted else None,
            "area_sides": list(self.settings.area_sides),
            "boundary_ratio": self.settings.boundary_ratio,
            "max_images": self.settings.max_images,
        }
        # 0.1.0 scored 100 objects of a class in an image: its numbers are not those of more.
        return about if self._max_objects <= MAX_DETECTIONS else about | {"max_objects": self._max_objects}


def ceiling_frame(bounds: Sequence[UpperBound]) -> pd.DataFrame:
    """Mean IoU, mask AP and boundary AP in percent, each overall and by object size, one row per setting.

    The index names the setting, so that rounding the numbers leaves it as it is; errors are in it where one is added.
    """
    noises = ("box_noise", "vector_noise", "step")
    varied = [name for name in noises if any(getattr(bound.setting, name) for bound in bounds)]
    named = {"codec": "codec", "mask_size": "N", "vector_dim": "n_k"} | {
        name: name.replace("_", " ") for name in varied
    }
    rows = []
    for bound in bounds:
        row = {"codec": bound.setting.method} | dataclasses.asdict(bound.setting)
        numbers = {_heading(name): 100 * bound.evaluation.metrics[name] for name in NUMBERS}
        bits = {"bits": round(bound.evaluation.metrics["segm.bits"], 1)} if "step" in varied else {}
        rows.append({title: row[name] for name, title in named.items()} | bits | numbers)
    index = [*named.values(), *(["bits"] if "step" in varied else [])]
    return pd.DataFrame(rows, columns=[*index, *map(_heading, NUMBERS)]).set_index(index)


def ceiling_table(bounds: Sequence[UpperBound]) -> str:
    """`ceiling_frame` as text, with its legend."""
    shares = dict.fromkeys(("box noise", "vector noise", "step"), "{:g}".format)
    frame = ceiling_frame(bounds).reset_index()
    text = frame.to_string(index=False, float_format="{:.1f}".format, na_rep="-", formatters=shares)
    return "\n".join([text, *(bound.evaluation.legend for bound in bounds[:1])])


def length_for(bounds: Sequence[UpperBound], number: str, share: float) -> float:
    """The vector length n_k at which a number reaches a share, between measured lengths by interpolation.

    Args:
        bounds: one codec at rising lengths.
        number: "segm.IoU", "segm.IoUl", ...
        share: in 0..1.

    Returns:
        n_k; NaN where the longest vector does not reach it, or there is no such object.
    """
    lengths = [bound.setting.vector_dim for bound in bounds]
    values = [bound.evaluation.metrics[number] for bound in bounds]
    if not max(values) >= share:  # nor where one of them is NaN
        return math.nan
    return float(np.exp2(np.interp(share, np.maximum.accumulate(values), np.log2(lengths))))


def size_gap_frame(bounds: Sequence[UpperBound]) -> pd.DataFrame:
    """What a fixed vector length costs large objects more than small ones. Paper: appendix A.1.

    Args:
        bounds: one codec at rising lengths, without errors.

    Returns:
        A row per n_k: the IoU of "small" and "large" objects, percent, and "n_k for large", the length at which large
        objects reach the IoU of the small ones; NaN where the longest vector does not, or there are no such objects.
    """
    rows = []
    for bound in bounds:
        small, large = (bound.evaluation.metrics[f"segm.IoU{size}"] for size in "sl")
        needed = length_for(bounds, "segm.IoUl", small)
        rows.append([bound.setting.vector_dim, 100 * small, 100 * large, needed])
    return pd.DataFrame(rows, columns=["n_k", "small", "large", "n_k for large"]).set_index("n_k")


def write_csv(path: Path, bounds: Sequence[UpperBound]) -> None:
    """Write the rows of upper bounds for other programs: shares in 0..1, empty where there is no such object."""
    rows = [bound.row() for bound in bounds]
    with replacing(path) as temporary:
        pd.DataFrame(rows, columns=None if rows else ["kind"]).to_csv(temporary, index=False)


def _heading(name: str) -> str:
    return name.removeprefix("segm.") if "IoU" in name else name.replace(".", " ")


def _file_name(setting: CodecSetting) -> str:
    variant = "_released" if setting.pca == "released" else ""
    return f"{setting.kind}{variant}-N{setting.mask_size}-D{setting.vector_dim}"
