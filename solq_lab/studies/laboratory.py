"""Ceilings of many mask codes on one data set: a grid of settings, each measured once. Paper: table 3(a), (d), (e)."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from solq_lab.build import build_codec
from solq_lab.codecs.base import MaskCodec
from solq_lab.codecs.kinds import CODECS
from solq_lab.config import ConfigError, Experiment, validate_experiment
from solq_lab.data.annotations import DataError
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.evaluation.coco import DEFAULTS
from solq_lab.evaluation.summary import Evaluation, aligned, percent
from solq_lab.files import hash_file, read_json, replacing, write_json
from solq_lab.fitting import fit_codec
from solq_lab.studies.ceiling import Noise, codec_ceiling, of_size

logger = logging.getLogger(__name__)

NUMBERS = tuple(f"{kind}{size}" for kind in ("segm.IoU", "segm.AP", "boundary.AP") for size in ("", "s", "m", "l"))

_VERSION = 1  # of the measurement: another number, and nothing kept from before is used


@dataclasses.dataclass(frozen=True)
class Setting:
    """One mask code and the errors it has to bear.

    kind, mask_size, vector_dim: the code, its N and its n_k.
    pca: "plain" or "released", for kind "pca" only.
    beta: price of a coefficient, for kind "sparse" only.
    threshold: "middle", "half", or None: the code's own.
    box_noise, vector_noise: as in `Noise`.
    seed: of the errors, and of the fit.
    """

    kind: str
    mask_size: int
    vector_dim: int
    pca: Literal["plain", "released"] = "plain"
    beta: float = 1.0
    threshold: Literal["middle", "half"] | None = None
    box_noise: float = 0.0
    vector_noise: float = 0.0
    seed: int = 0

    @property
    def method(self) -> str:
        """The code's name for people, with what its numbers depend on besides the sizes."""
        match self.kind:
            case "pca" if self.pca == "released":
                return "pca, released"
            case "sparse":
                return f"sparse, beta {self.beta:g}"
        return self.kind


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """A setting and what came out; seconds: how long it took, without the fit."""

    setting: Setting
    evaluation: Evaluation
    seconds: float

    def row(self) -> dict[str, Any]:
        """The setting and the twelve numbers, shares in 0..1, as JSON types; None where there is no such object."""
        metrics = self.evaluation.metrics
        numbers = {name: None if math.isnan(metrics[name]) else metrics[name] for name in NUMBERS}
        return dataclasses.asdict(self.setting) | {"images": self.evaluation.images} | numbers


def make_grid(
    kinds: Sequence[str],
    mask_sizes: Sequence[int],
    vector_dims: Sequence[int],
    *,
    box_noises: Sequence[float] = (0.0,),
    vector_noises: Sequence[float] = (0.0,),
    threshold: Literal["middle", "half"] | None = None,
    pca: Literal["plain", "released"] = "plain",
    beta: float = 1.0,
    seed: int = 0,
) -> list[Setting]:
    """Every combination, in the order of the arguments.

    A kind that needs a square number takes the largest one up to each of `vector_dims`.

    Raises:
        ConfigError: an unknown kind, or a value that does not fit; the message names it.
    """
    settings = []
    for kind in kinds:
        if kind not in CODECS:
            raise ConfigError(f"codec {kind!r}: allowed are {', '.join(CODECS)}")
        for side in mask_sizes:
            for length in vector_dims:
                if side < 1 or not 1 <= length <= side**2:
                    raise ConfigError(
                        f"vector_dim {length} does not fit mask_size {side}: allowed are 1..{max(side, 1) ** 2} "
                        "(mask_size squared); lower vector_dim or raise mask_size"
                    )
                code = Setting(
                    kind,
                    side,
                    CODECS[kind].allowed_length(length),
                    pca=pca if "pca" in CODECS[kind].options else "plain",
                    beta=beta if "beta" in CODECS[kind].options else 1.0,
                    threshold=threshold,
                    seed=seed,
                )
                settings += [
                    dataclasses.replace(code, box_noise=box, vector_noise=vector)
                    for box in box_noises
                    for vector in vector_noises
                ]
    for setting in settings:
        if not (0 <= setting.box_noise < math.inf and 0 <= setting.vector_noise < math.inf):
            raise ConfigError(
                f"noise {setting.box_noise}, {setting.vector_noise}: allowed are finite numbers from 0 on"
            )
    return list(dict.fromkeys(settings))


class Laboratory:
    """A data set to measure codes on, and the folder that keeps what was measured.

    Every finished setting is written at once, to `settings/` of the folder, under a name made from all that the numbers
    depend on; fitted codes are kept in `codecs/`. Who asks again, after an interruption or with a larger grid, gets
    what is there and waits only for the rest.
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
            annotations: COCO instances file whose objects are sent through the codes.
            folder: where results are kept; made when it is missing.
            fit_annotations: instances file that PCA and sparse coding are fitted to. None: they are refused.
            fit_objects: fit to so many of its objects, drawn at random. None: all.
            area_sides: as in `codec_ceiling`. None: as the file says in info.area_sides, otherwise COCO's 32 and 96.
            boundary_ratio, max_images, processes: as in `codec_ceiling`.

        Raises:
            DataError: the annotations cannot be used, or there is no object in the images looked at.
        """
        self.truth = truth = GroundTruth(annotations, keep="all")
        self.folder = Path(folder)
        self.fit_annotations = None if fit_annotations is None else Path(fit_annotations)
        self.fit_objects, self.processes = fit_objects, processes
        self.area_sides = _area_sides(truth.info) if area_sides is None else area_sides
        self.boundary_ratio, self.max_images = boundary_ratio, max_images
        self._image_ids = truth.image_ids.tolist()[:max_images]
        rows = truth.rows(self._image_ids)
        if len(rows) == 0:
            raise DataError(
                f"{annotations}: no object in the {len(self._image_ids)} images looked at (crowds and objects "
                "without area do not count), so there is nothing to measure; check the split, or look at more images"
            )
        self._areas = truth.areas_of(rows)
        self._sha256 = hash_file(truth.source)
        self._fit_sha256 = None if self.fit_annotations is None else hash_file(_existing(self.fit_annotations))

    def __str__(self) -> str:
        counts = {size: int(which.sum()) for size, which in of_size(self._areas, self.area_sides).items()}
        return (
            f"{self.truth.source}: {len(self._image_ids)} images, {len(self._areas)} objects, "
            f"{counts['s']} small, {counts['m']} medium, {counts['l']} large"
        )

    def measure(self, settings: Iterable[Setting]) -> list[Ceiling]:
        """The ceiling of each setting, in order; what is there already is only read.

        Raises:
            ConfigError: a setting does not fit, or its code has to be fitted and there is nothing to fit it to.
        """
        settings = list(settings)
        for setting in settings:
            self._experiment(setting)  # refuse a wrong one before the work on the first
        (self.folder / "settings").mkdir(parents=True, exist_ok=True)
        return [self._measured(setting) for setting in tqdm(settings, desc="settings", unit="setting", delay=2)]

    def codec(self, setting: Setting) -> MaskCodec:
        """The code of a setting on the CPU, fitted where that is needed and has not been done yet."""
        experiment = self._experiment(setting)
        if CODECS[setting.kind].fitted and not Path(experiment.codec.artifact).exists():
            fit_codec(experiment, max_objects=self.fit_objects)
        return build_codec(experiment)

    def _measured(self, setting: Setting) -> Ceiling:
        about = self._about(setting)
        path = self.folder / "settings" / f"{_file_name(setting)}-{_digest(about)}.json"
        if path.exists():
            stored = read_json(path)
            if stored["about"] == about:
                return Ceiling(setting, Evaluation.from_dict(stored), stored["seconds"])
        codec, started = self.codec(setting), time.perf_counter()
        evaluation = codec_ceiling(
            self.truth,
            codec,
            area_sides=self.area_sides,
            boundary_ratio=self.boundary_ratio,
            max_images=self.max_images,
            noise=Noise(setting.box_noise, setting.vector_noise, setting.seed),
            processes=self.processes,
        )
        seconds = time.perf_counter() - started
        write_json(path, {"about": about, "seconds": seconds} | evaluation.to_dict())
        return Ceiling(setting, evaluation, seconds)

    def _experiment(self, setting: Setting) -> Experiment:
        """What the builder and the fitting understand."""
        code = {"kind": setting.kind, "mask_size": setting.mask_size, "vector_dim": setting.vector_dim}
        code |= {"pca": setting.pca, "beta": setting.beta, "threshold": setting.threshold}
        data = {}
        if CODECS[setting.kind].fitted:
            if self.fit_annotations is None:
                raise ConfigError(
                    f"codec {setting.kind!r} has to be fitted, and no training annotations are named to fit it to; "
                    "name them (--fit-on FILE), or leave this code out"
                )
            tables = _digest({"fit": self._fit(setting), "pca": setting.pca, "beta": setting.beta})
            code["artifact"] = str(self.folder / "codecs" / f"{_file_name(setting)}-{tables}.safetensors")
            data["train_annotations"] = str(self.fit_annotations.absolute())
        values = {"name": "ceiling", "seed": setting.seed, "codec": code, "data": data}
        return validate_experiment(values, source=f"setting {setting.method}")

    def _fit(self, setting: Setting) -> dict[str, Any]:
        return {"sha256": self._fit_sha256, "objects": self.fit_objects, "seed": setting.seed}

    def _about(self, setting: Setting) -> dict[str, Any]:
        """All that the numbers depend on, as JSON types."""
        return {
            "version": _VERSION,
            "setting": dataclasses.asdict(setting),
            "annotations": self._sha256,
            "fit": self._fit(setting) if CODECS[setting.kind].fitted else None,
            "area_sides": list(self.area_sides),
            "boundary_ratio": self.boundary_ratio,
            "max_images": self.max_images,
        }


def ceiling_table(ceilings: Sequence[Ceiling]) -> str:
    """Ceilings as aligned text in percent: mean IoU, mask AP and boundary AP, each overall and by object size.

    Errors have a column only where one is given.
    """
    varied = [name for name in ("box_noise", "vector_noise") if any(getattr(c.setting, name) for c in ceilings)]
    sizes = ["s", "m", "l"]
    rows = [["method", "N", "n_k", *(name.replace("_", " ") for name in varied)]]
    rows[0] += ["IoU", *sizes, "segm AP", *sizes, "boundary AP", *sizes]
    for ceiling in ceilings:
        setting, metrics = ceiling.setting, ceiling.evaluation.metrics
        noise = [f"{getattr(setting, name):g}" for name in varied]
        numbers = [percent(metrics[name]) for name in NUMBERS]
        rows.append([setting.method, str(setting.mask_size), str(setting.vector_dim), *noise, *numbers])
    return "\n".join([*aligned(rows), *(ceilings[0].evaluation.legend for _ in ceilings[:1])])


def length_for(ceilings: Sequence[Ceiling], number: str, share: float) -> float:
    """The vector length n_k at which a number reaches a share, between measured lengths by interpolation.

    Args:
        ceilings: one code at rising lengths.
        number: "segm.IoU", "segm.IoUl", ...
        share: in 0..1.

    Returns:
        n_k; NaN where the longest vector does not reach it, or there is no such object.
    """
    lengths = [ceiling.setting.vector_dim for ceiling in ceilings]
    values = [ceiling.evaluation.metrics[number] for ceiling in ceilings]
    for place, value in enumerate(values):
        if value >= share and place == 0:
            return float(lengths[0])
        if value >= share:
            way = (share - values[place - 1]) / (value - values[place - 1])
            return lengths[place - 1] * (lengths[place] / lengths[place - 1]) ** way  # evenly on a logarithmic scale
    return math.nan


def describe_size_gap(ceilings: Sequence[Ceiling]) -> str:
    """What a fixed vector length costs large objects more than small ones, one line per length. Paper: appendix A.1.

    Args:
        ceilings: one code at rising lengths, without errors.
    """
    lines = []
    for ceiling in ceilings:
        small, large = (ceiling.evaluation.metrics[f"segm.IoU{size}"] for size in "sl")
        needed = length_for(ceilings, "segm.IoUl", small)
        if math.isnan(small) or math.isnan(large):
            verdict = "no objects of both sizes to compare"
        elif large >= small:
            verdict = "large objects are kept as well"
        elif math.isnan(needed):
            verdict = f"to be kept as well, large ones need more than {ceilings[-1].setting.vector_dim} numbers"
        else:
            verdict = f"to be kept as well, large ones need about {needed:.0f} numbers"
        length = ceiling.setting.vector_dim
        lines.append(
            f"n_k = {length:>4}: IoU of small objects {percent(small)}, of large ones {percent(large)}; {verdict}"
        )
    return "\n".join(lines)


def write_csv(path: Path, ceilings: Sequence[Ceiling]) -> None:
    """Ceilings as a table for other programs: one line each, shares in 0..1, empty where there is no such object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [ceiling.row() for ceiling in ceilings]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["kind"])
        writer.writeheader()
        writer.writerows(rows)


def _area_sides(info: Any) -> tuple[float, float]:
    """What the file itself calls small and medium, as drawn shapes do; COCO's sides otherwise."""
    sides = info.get("area_sides") if isinstance(info, dict) else None
    return DEFAULTS.area_sides if sides is None else (float(sides[0]), float(sides[1]))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"{path}: no such annotation file to fit PCA and sparse coding to; name another (--fit-on)")
    return path


def _file_name(setting: Setting) -> str:
    variant = "_released" if setting.pca == "released" else ""
    return f"{setting.kind}{variant}-N{setting.mask_size}-D{setting.vector_dim}"


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
