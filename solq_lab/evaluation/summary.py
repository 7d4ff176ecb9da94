"""The numbers of one evaluation, and how they are shown. Paper: section 4.1, tables 1 and 4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from solq_lab.evaluation.sizes import describe_sizes

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AR_COLUMNS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_SHOWN = (*AP_COLUMNS, "AR100")
MAX_DETECTIONS = 100  # of a class in an image that are scored; COCO's rule


@dataclass(frozen=True)
class Evaluation:
    """The numbers of COCO evaluation for one set of results."""

    # "<kind>.<number>" -> share in 0..1, kinds "box", "segm", "boundary", numbers AP_COLUMNS and AR_COLUMNS; NaN where
    # no ground truth could have been found (for example no small object in any image). A codec's ceiling also has
    # "segm.IoU", the mean IoU of its masks with the ground truth
    metrics: dict[str, float]
    # class name -> "<kind>.<AP number>" -> share; NaN for a class without ground truth
    per_class: dict[str, dict[str, float]]
    # side in pixels below which an object is small, and below which it is medium (square roots of areas)
    area_sides: tuple[float, float]
    boundary_ratio: float  # boundary width over the image's diagonal
    images: int  # number of images evaluated
    max_detections: int = MAX_DETECTIONS  # of a class in an image that were scored, the best ones

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of overlap that were evaluated, in the order of the table."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.metrics))

    def frame(self, *, ceiling: Evaluation | None = None) -> pd.DataFrame:
        """The numbers in percent, one row per kind; NaN where there is no ground truth.

        The rows "<kind> ceiling", of the evaluation of a codec alone, stand below the ones they bound.
        """
        rows = {}
        for kind in self.kinds:
            rows[kind] = _percents(self.metrics, kind, _SHOWN)
            if ceiling is not None and kind in ceiling.kinds:
                rows[f"{kind} ceiling"] = _percents(ceiling.metrics, kind, _SHOWN)
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(_SHOWN))

    def class_frame(self, kind: str = "segm") -> pd.DataFrame:
        """AP of every class that has ground truth, in percent, best class first.

        Raises:
            ValueError: this kind was not evaluated.
        """
        if kind not in self.kinds:
            raise ValueError(f"no {kind!r} in this evaluation; it has {', '.join(self.kinds) or 'nothing'}")
        rows = {name: _percents(row, kind, AP_COLUMNS) for name, row in self.per_class.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(AP_COLUMNS)).dropna(subset="AP")
        return frame.sort_values("AP", ascending=False, kind="stable").rename_axis(columns=f"{kind}, class")

    def table(self, *, ceiling: Evaluation | None = None) -> str:
        """`frame` as text, with its legend."""
        return f"{to_text(self.frame(ceiling=ceiling))}\n{self.legend}"

    def class_table(self, kind: str = "segm") -> str:
        """`class_frame` as text."""
        frame = self.class_frame(kind)
        return to_text(frame) if len(frame) else "no class has ground truth here"

    @property
    def legend(self) -> str:
        """One line that explains the sizes and the boundary, and how many detections count, where not COCO's 100."""
        sizes = describe_sizes(self.area_sides, "sml")
        boundary = f"; boundary: {100 * self.boundary_ratio:g} % of the diagonal" if "boundary" in self.kinds else ""
        limit = ""
        if self.max_detections != MAX_DETECTIONS:
            limit = f"; at most {self.max_detections} detections of a class in an image"
        return f"{self.images} images, percent; {sizes}{boundary}{limit}"

    def to_dict(self) -> dict:
        """The evaluation as JSON types; NaN becomes None, which strict JSON knows."""
        return {
            "metrics": _without_nan(self.metrics),
            "per_class": {name: _without_nan(row) for name, row in self.per_class.items()},
            "area_sides": list(self.area_sides),
            "boundary_ratio": self.boundary_ratio,
            "images": self.images,
            "max_detections": self.max_detections,
        }

    @classmethod
    def from_dict(cls, values: dict) -> Evaluation:
        """The evaluation that `to_dict` described."""
        return cls(
            metrics=_with_nan(values["metrics"]),
            per_class={name: _with_nan(row) for name, row in values["per_class"].items()},
            area_sides=tuple(values["area_sides"]),
            boundary_ratio=values["boundary_ratio"],
            images=values["images"],
            max_detections=values.get("max_detections", MAX_DETECTIONS),  # files of 0.1.0 lack it
        )


def to_text(frame: pd.DataFrame) -> str:
    """A frame of percentages as aligned text with one digit; "-" where a number is not defined."""
    return frame.to_string(float_format="{:.1f}".format, na_rep="-")


def _percents(numbers: dict[str, float], kind: str, columns: tuple[str, ...]) -> list[float]:
    return [100 * numbers.get(f"{kind}.{column}", math.nan) for column in columns]


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}
