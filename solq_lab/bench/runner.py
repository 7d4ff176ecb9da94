"""Runs the benchmark parts and reports them: a table for the screen, a JSON file for comparisons."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from solq_lab.bench import codecs, evaluation, gpu, loader, matcher, memory, network, op, postprocess, targets
from solq_lab.bench.memory import MemoryRow
from solq_lab.bench.timing import Row
from solq_lab.data.annotations import DataError
from solq_lab.environment import describe_software, processor_name
from solq_lab.files import write_json
from solq_lab.schema import DataSection

PARTS = ("op", "codec", "targets", "postprocess", "matcher", "loader", "eval", "infer", "train")
ON_GPU = ("gpu",)  # runs where there is one
BY_NAME = ("memory",)  # runs only where it is named: it takes many minutes and gigabytes


class Report(NamedTuple):
    """What was measured, and on what.

    machine: processor, cores and system.
    threads: torch's threads.
    versions: of Python and the packages.
    rows: the comparisons.
    """

    machine: dict[str, str | int]
    threads: int
    versions: dict[str, str]
    rows: list[Row | MemoryRow]

    def table(self) -> str:
        """The rows as aligned text."""
        lines = [f"{'part':<12}{'baseline':>12}{'ours':>12}{'ratio':>8}  equal  what"]
        for row in self.rows:
            equal = "yes" if row.equal else "NO"
            baseline, ours = row.cells()
            lines.append(f"{row.part:<12}{baseline:>12}{ours:>12}{row.ratio:>7.1f}x  {equal:<5}  {row.what}")
        return "\n".join([*lines, f"{self.machine['processor']}, {self.threads} threads; median times, peak memory"])

    def to_dict(self) -> dict:
        """The report as JSON types."""
        return self._asdict() | {"rows": [row.to_dict() for row in self.rows]}


def run(parts: Sequence[str] = (), json_path: str | Path | None = None, *, data: str | Path | None = None) -> Report:
    """Measures parts of the pipeline against the plain way of doing the same.

    Args:
        parts: names from `PARTS`, `ON_GPU` and `BY_NAME`, run in that order; none: all of `PARTS`, and where there is
            a GPU those of `ON_GPU`.
        json_path: file to write the report to.
        data: folder of a COCO data set; "targets" and "loader" then use its validation split. None: generated images.

    Raises:
        ValueError: an unknown part, or one that needs a GPU where there is none.
        DataError: `data` holds no COCO validation split.
    """
    check_parts(parts)
    images, annotations = (None, None) if data is None else _validation_split(Path(data))
    usual = PARTS + (ON_GPU if torch.cuda.is_available() else ())
    chosen = [part for part in PARTS + ON_GPU + BY_NAME if part in parts] or list(usual)
    rows: list[Row | MemoryRow] = []
    with tqdm(chosen, desc="bench", unit="part") as progress:
        for part in progress:
            progress.set_postfix_str(part)
            rows += _rows(part, images, annotations)
    report = Report(_describe_machine(), torch.get_num_threads(), describe_software()["versions"], rows)
    if json_path is not None:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        write_json(json_path, report.to_dict())
    return report


def check_parts(parts: Sequence[str]) -> None:
    """Raises ValueError where a part is unknown, or needs a GPU and there is none."""
    allowed = PARTS + ON_GPU + BY_NAME
    unknown = sorted(set(parts) - set(allowed))
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; allowed are {', '.join(allowed)}")
    if not torch.cuda.is_available() and set(parts) & set(ON_GPU):
        raise ValueError("part gpu needs an NVIDIA GPU that torch can use; `solq-lab doctor` says what there is")


def _rows(part: str, images: Path | None, annotations: Path | None) -> Iterator[Row] | Iterator[MemoryRow]:
    match part:
        case "op":
            return op.rows()
        case "codec":
            return codecs.rows()
        case "targets":
            return targets.rows(annotations)
        case "postprocess":
            return postprocess.rows()
        case "matcher":
            return matcher.rows()
        case "loader":
            return loader.rows(images, annotations)
        case "eval":
            return evaluation.rows()
        case "infer":
            return network.infer_rows()
        case "train":
            return network.train_rows()
        case "gpu":
            return gpu.rows()
        case "memory":
            return memory.rows()


def _validation_split(root: Path) -> tuple[Path, Path]:
    names = DataSection()
    images, annotations = root / names.val_images, root / names.val_annotations
    for path in (images, annotations):
        if not path.exists():
            raise DataError(f"{path}: not there; the benchmark's data folder needs it, or leave the folder out")
    return images, annotations


def _describe_machine() -> dict[str, str | int]:
    return {
        "processor": processor_name(),
        "cores": os.cpu_count() or 1,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
