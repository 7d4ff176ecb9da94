"""Runs the benchmark parts and reports them: a table for the screen, a JSON file for comparisons."""

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from solq_lab.bars import progress_bar
from solq_lab.bench import codec, evaluation, gpu, loader, matcher, memory, network, op, postprocess, targets
from solq_lab.bench.timing import Row
from solq_lab.data.folders import explain_missing, find_splits
from solq_lab.environment import describe_software, processor_name
from solq_lab.errors import UserError
from solq_lab.files import read_json, write_json
from solq_lab.ops.extension import instruction_set

Split = tuple[Path, Path] | None  # image folder and annotation file

PARTS: dict[str, Callable[[Split], Iterator[Row]]] = {
    "op": lambda split: op.rows(),
    "codec": lambda split: codec.rows(),
    "targets": lambda split: targets.rows(split[1] if split else None),
    "postprocess": lambda split: postprocess.rows(),
    "matcher": lambda split: matcher.rows(),
    "loader": lambda split: loader.rows(split),
    "eval": lambda split: evaluation.rows(),
    "infer": lambda split: network.infer_rows(),
    "train": lambda split: network.train_rows(),
    "gpu": lambda split: gpu.rows(),
    "memory": lambda split: memory.rows(),
}
BY_NAME = ("memory",)  # runs only where it is named: it takes many minutes and gigabytes

Report = dict[str, Any]  # as it is written to JSON: "machine", "threads", "versions" and "rows"


def run(parts: Sequence[str] = (), json_path: str | Path | None = None, *, data: str | Path | None = None) -> Report:
    """Measures parts of the pipeline against the plain way of doing the same.

    Args:
        parts: names from `PARTS`, run in that order; none: all but `BY_NAME`, and "gpu" only where there is one.
        json_path: file to write the report to.
        data: folder of a COCO data set; "targets" and "loader" then use its validation split. None: generated images.

    Returns:
        "machine" (processor, cores, system, instruction set of the operators), torch's "threads", "versions" of Python
        and the packages, and the "rows".

    Raises:
        UserError: an unknown part, or one that needs a GPU where there is none.
        DataError: `data` holds no COCO validation split.
    """
    check_parts(parts)
    split: Split = None
    if data is not None:
        found = next((some for some in find_splits(Path(data)) if some.name == "val"), None)
        if found is None:
            raise explain_missing(Path(data), "val")
        split = found.images, found.annotations

    usual = [part for part in PARTS if part not in BY_NAME and (part != "gpu" or torch.cuda.is_available())]
    rows: list[Row] = []
    with progress_bar([part for part in PARTS if part in (parts or usual)], desc="bench", unit="part") as progress:
        for part in progress:
            progress.set_postfix_str(part)
            rows += PARTS[part](split)

    report = {
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count() or 1,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "instruction_set": instruction_set(),
            "system": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        },
        "threads": torch.get_num_threads(),
        "versions": describe_software()["versions"],
        "rows": [row.to_dict() for row in rows],
    }
    if json_path is not None:
        write_json(json_path, report)
    return report


def run_builds(
    architectures: Sequence[str], parts: Sequence[str], json_path: Path | None = None, *, data: Path | None = None
) -> list[Report]:
    """The reports of builds of the CPU operators by SOLQ_CPU_ARCH, each measured as by `run` in its own process.

    Raises:
        UserError: an unknown part or architecture.
    """
    check_parts(parts)
    reports = []
    for architecture in architectures:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.json"
            command = [sys.executable, "-m", __name__, str(path), "" if data is None else str(data), *parts]
            child = subprocess.run(command, env=os.environ | {"SOLQ_CPU_ARCH": architecture})
            if child.returncode:
                raise RuntimeError(f"measuring with SOLQ_CPU_ARCH={architecture} failed; its error is above")
            reports.append(read_json(path))
    if json_path is not None:
        write_json(json_path, reports)
    return reports


def table(*reports: Report) -> str:
    """The rows as aligned text; those of several builds side by side, under their instruction sets."""
    names = [report["machine"]["instruction_set"] for report in reports] if len(reports) > 1 else [""]
    lines = ["".join([f"{'part':<12}", *(f"{'baseline':>12}{'ours':>12}{'ratio':>8}" for _ in names), "  equal  what"])]
    if len(reports) > 1:
        lines.insert(0, " " * 12 + "".join(f"{name:>32}" for name in names))
    for rows in zip(*(report["rows"] for report in reports), strict=True):
        numbers = "".join(_numbers(row) for row in rows)
        equal = "yes" if all(row["equal"] for row in rows) else "NO"
        lines.append(f"{rows[0]['part']:<12}{numbers}  {equal:<5}  {rows[-1]['what']}")
    machine = reports[0]["machine"]
    built = " and ".join(report["machine"]["instruction_set"] for report in reports)
    return "\n".join(
        [*lines, f"{machine['processor']}, {reports[0]['threads']} threads, {built}; median times, peak memory"]
    )


def _numbers(row: dict[str, Any]) -> str:
    unit, digits = ("ms", 1) if "ours_ms" in row else ("GiB", 2)
    baseline, ours = (row[f"{way}_{unit.lower()}"] for way in ("baseline", "ours"))
    return f"{f'{baseline:.{digits}f} {unit}':>12}{f'{ours:.2f} {unit}':>12}{row['ratio']:>7.1f}x"


def check_parts(parts: Sequence[str]) -> None:
    """Raises UserError where a part is unknown, or needs a GPU and there is none."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise UserError(f"no part {', '.join(unknown)}; allowed are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and "gpu" in parts:
        raise UserError("part gpu needs an NVIDIA GPU that torch can use; `solq-lab doctor` shows what there is")


if __name__ == "__main__":
    run(sys.argv[3:], sys.argv[1], data=sys.argv[2] or None)
