"""The numbers of one evaluation, and how they are shown. Paper: section 4.1, tables 1 and 4."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

AP_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
AR_COLUMNS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_SHOWN = (*AP_COLUMNS, "AR100")


@dataclass(frozen=True)
class Evaluation:
    """What COCO evaluation says about one set of results.

    metrics: "<kind>.<number>" -> share in 0..1, kinds "box", "segm", "boundary", numbers AP_COLUMNS and AR_COLUMNS;
        NaN where no ground truth could have been found (for example no small object in any image). A codec's ceiling
        also has "segm.IoU", the mean IoU of its masks with the ground truth.
    per_class: class name -> "<kind>.<AP number>" -> share; NaN for a class without ground truth.
    area_sides: side in pixels below which an object is small, and below which it is medium (square roots of areas).
    boundary_ratio: boundary width over the image's diagonal.
    images: number of images looked at.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    area_sides: tuple[float, float]
    boundary_ratio: float
    images: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of overlap that were evaluated, in the order of the table."""
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.metrics))

    def table(self, *, ceiling: Evaluation | None = None) -> str:
        """The numbers in percent as aligned text, one row per kind; "-" where there is no ground truth.

        Args:
            ceiling: another evaluation, shown row by row below this one: what the mask code alone would allow.
        """
        rows = [["", *_SHOWN]]
        for kind in self.kinds:
            rows.append([kind, *(percent(self.metrics.get(f"{kind}.{column}")) for column in _SHOWN)])
            if ceiling is not None and kind in ceiling.kinds:
                rows.append(["  ceiling", *(percent(ceiling.metrics.get(f"{kind}.{column}")) for column in _SHOWN)])
        return "\n".join([*aligned(rows), self.legend])

    def class_table(self, kind: str = "segm") -> str:
        """AP of every class that has ground truth, in percent as aligned text, best class first.

        Raises:
            ValueError: this kind was not evaluated.
        """
        if kind not in self.kinds:
            raise ValueError(f"no {kind!r} in this evaluation; it has {', '.join(self.kinds) or 'nothing'}")
        present = {name: row for name, row in self.per_class.items() if not math.isnan(row[f"{kind}.AP"])}
        order = sorted(present, key=lambda name: -present[name][f"{kind}.AP"])
        body = [[name, *(percent(present[name][f"{kind}.{column}"]) for column in AP_COLUMNS)] for name in order]
        return "\n".join(aligned([[f"{kind}, class", *AP_COLUMNS], *body]))

    @property
    def legend(self) -> str:
        """One line that says what s, m, l and the boundary are."""
        small, medium = self.area_sides
        sizes = f"s: below {small:.4g}x{small:.4g} pixels, m: below {medium:.4g}x{medium:.4g}, l: the rest"
        boundary = f"; boundary: {100 * self.boundary_ratio:g} % of the diagonal" if "boundary" in self.kinds else ""
        return f"{self.images} images, percent; {sizes}{boundary}"

    def to_dict(self) -> dict:
        """The evaluation as JSON types; NaN becomes None, which strict JSON knows."""
        return {
            "metrics": _without_nan(self.metrics),
            "per_class": {name: _without_nan(row) for name, row in self.per_class.items()},
            "area_sides": list(self.area_sides),
            "boundary_ratio": self.boundary_ratio,
            "images": self.images,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)

    @classmethod
    def from_dict(cls, values: dict) -> Evaluation:
        """The evaluation that `to_dict` was taken of."""
        return cls(
            metrics=_with_nan(values["metrics"]),
            per_class={name: _with_nan(row) for name, row in values["per_class"].items()},
            area_sides=tuple(values["area_sides"]),
            boundary_ratio=values["boundary_ratio"],
            images=values["images"],
        )


def percent(share: float | None) -> str:
    """A share in percent with one digit; "-" where it is not defined."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a text table: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in rows]


def _without_nan(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def _with_nan(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in numbers.items()}
