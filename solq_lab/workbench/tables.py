"""What came out of a sweep, beside the paper: mean and spread over seeds, as text, Markdown, CSV and JSON.

A run's numbers come from its folder (`results.json`), or, where that is missing, from the table that the project
carries (`experiments/results/<sweep>.json`, which `ResultTable.to_dict` wrote). Loads without torch.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solq_lab.config import load_sweep
from solq_lab.files import read_json
from solq_lab.runs import Run, RunError, load_run
from solq_lab.schema import Role, keys_with
from solq_lab.workbench.paper import PAPER_RESULTS, PaperTable, paper_table
from solq_lab.workbench.sweeps import Job, find_sweep, plan

RESULTS = Path("experiments/results")


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of one finished run.

    name: of the run.
    seed: its seed.
    metrics: "<kind>.<number>" -> share in 0..1, as in results.json; NaN where there is no ground truth.
    images: images it was scored on.
    commit: git commit it was made with, as far as known.
    """

    name: str
    seed: int
    metrics: dict[str, float]
    images: int
    commit: str | None = None


@dataclass(frozen=True)
class TableRow:
    """One row of a sweep: its finished runs, the names of those that are missing, the paper's numbers in percent."""

    name: str
    runs: tuple[RunNumbers, ...]
    missing: tuple[str, ...]
    paper_name: str | None
    paper: Mapping[str, float | None]

    def values(self, metric: str) -> list[float]:
        """What each finished run reached, percent; runs without this number are left out."""
        found = (run.metrics.get(metric, math.nan) for run in self.runs)
        return [100 * share for share in found if not math.isnan(share)]

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds, percent; None where no run has this number."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def spread(self, metric: str) -> float | None:
        """Standard deviation over the seeds (of the sample), percent; None for fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class ResultTable:
    """A sweep's results beside the paper's.

    name: of the sweep.
    metrics: the columns, as in results.json.
    rows: in the sweep's order.
    paper: the paper's table, or None.
    command: what makes the missing runs.
    notes: runs whose settings are not the sweep's, one line each.
    """

    name: str
    metrics: tuple[str, ...]
    rows: tuple[TableRow, ...]
    paper: PaperTable | None
    command: str
    notes: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the runs that are not finished."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.missing))

    def ranked(self, metric: str) -> list[TableRow]:
        """The rows that have this number, best mean first."""
        known = [row for row in self.rows if row.mean(metric) is not None]
        return sorted(known, key=lambda row: -row.mean(metric))

    def text(self) -> str:
        """Aligned text: ours as mean ± spread, the paper's number in brackets; below it what is missing."""
        return "\n".join([*_aligned(self._cells()), *self._remarks()])

    def markdown(self) -> str:
        """The same as a Markdown table."""
        header, *body = self._cells()
        rule = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]
        return "\n".join([*lines, "", *(f"{remark}  " for remark in self._remarks())])

    def csv(self) -> str:
        """One line per row and metric: mean, spread, number of runs, the paper's number; percent."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["row", "metric", "mean", "spread", "runs", "paper_row", "paper"])
        for row in self.rows:
            for metric in self.metrics:
                mean, spread, paper = row.mean(metric), row.spread(metric), row.paper.get(metric)
                numbers = ["" if value is None else f"{value:.2f}" for value in (mean, spread)]
                printed = "" if paper is None else paper
                writer.writerow([row.name, metric, *numbers, len(row.values(metric)), row.paper_name or "", printed])
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """What a file of `experiments/results` holds, JSON types: sweep, rows, and each finished run's numbers.

        Means, spreads and the paper's numbers are left out: they are computed, and read from where they stand.
        """
        rows = [{"name": row.name, "runs": [_run_to_dict(run) for run in row.runs]} for row in self.rows]
        return {"sweep": self.name, "rows": rows}

    def _cells(self) -> list[list[str]]:
        header = ["", *self.metrics, "seeds"]
        return [
            header,
            *([row.name, *(_cell(row, metric) for metric in self.metrics), _seeds(row)] for row in self.rows),
        ]

    def _remarks(self) -> list[str]:
        against = f"; in brackets the paper's ({self.paper.title})" if self.paper else ""
        remarks = [f"percent, mean ± standard deviation over seeds{against}"]
        if self.missing:
            count = len(self.missing)
            remarks.append(f"{count} run{'s' if count > 1 else ''} not finished; `{self.command}` makes them")
        return [*remarks, *self.notes]


def read_table(
    sweep_file: str | Path,
    *,
    runs_dir: str | Path = "runs",
    results_dir: str | Path = RESULTS,
    paper_results: str | Path = PAPER_RESULTS,
) -> ResultTable:
    """The results of a sweep as far as they are there.

    Args:
        sweep_file: the sweep: a YAML file, or the name of one.
        runs_dir: folder of run folders.
        results_dir: folder of the tables that the project carries.
        paper_results: file of the paper's numbers.

    Raises:
        ConfigError: the sweep, or the paper's row it names, cannot be used.
        RunError: a results file cannot be read.
    """
    path = find_sweep(sweep_file)
    sweep = load_sweep(path)
    paper = None if sweep.paper is None else paper_table(sweep.paper, paper_results)
    carried = _carried_runs(Path(results_dir) / f"{sweep.name}.json")
    jobs = plan(sweep, runs_dir=runs_dir)
    rows, notes = [], []
    for row in sweep.rows:
        found, missing = [], []
        for job in (job for job in jobs if job.row == row.name):
            numbers = _finished_run(job, notes) or carried.get((row.name, job.seed))
            found.append(numbers) if numbers else missing.append(job.run)
        printed = paper.row(row.paper) if paper and row.paper else {}
        rows.append(TableRow(row.name, tuple(found), tuple(missing), row.paper, printed))
    return ResultTable(sweep.name, tuple(sweep.metrics), tuple(rows), paper, f"solq-lab sweep {path}", tuple(notes))


def summarise_runs(runs: Sequence[Run]) -> str:
    """Runs as aligned text: state, steps, and the APs of the final evaluation in percent."""
    kinds = ("box", "segm", "boundary")
    rows = [["run", "state", "step", *(f"{kind}.AP" for kind in kinds)]]
    for run in runs:
        status = run.status()
        state = "training" if run.is_training() else status["state"]
        metrics = read_json(run.results)["metrics"] if run.results.is_file() else {}
        shares = [metrics.get(f"{kind}.AP") for kind in kinds]
        rows.append([run.name, state, str(status["step"]), *("-" if x is None else f"{100 * x:.1f}" for x in shares)])
    if not runs:
        return "no runs yet; `solq-lab run notebooks/train.ipynb EXPERIMENT` makes one"
    return "\n".join(_aligned(rows))


def _finished_run(job: Job, notes: list[str]) -> RunNumbers | None:
    """The numbers in a run folder, or None; `notes` gets a line where the run has other settings than the sweep."""
    if not (job.folder / "results.json").is_file():
        return None
    run = load_run(job.folder)
    found = run.differences(job.experiment())
    differences = [difference for difference in found if difference.split()[0] not in keys_with(Role.MACHINE)]
    if differences:
        notes.append(f"{run.folder}: differs from the sweep in {'; '.join(differences)}")
    results, environment = read_json(run.results), read_json(run.environment)
    commit = (environment.get("git") or {}).get("commit")
    return _run_from_dict({"name": run.name, "seed": job.seed, "commit": commit} | results, run.results)


def _carried_runs(path: Path) -> dict[tuple[str, int], RunNumbers]:
    """The runs in a table that the project carries, by row and seed; nothing where there is no such file."""
    if not path.is_file():
        return {}
    document = read_json(path)
    try:
        entries = [(row["name"], entry) for row in document["rows"] for entry in row["runs"]]
    except (KeyError, TypeError) as error:
        raise RunError(f"{path}: not a table of results ({error!r}); `solq-lab table --json` writes one") from None
    return {(name, entry["seed"]): _run_from_dict(entry, path) for name, entry in entries}


def _run_from_dict(entry: Mapping[str, Any], source: Path) -> RunNumbers:
    try:
        metrics = {name: math.nan if value is None else value for name, value in entry["metrics"].items()}
        return RunNumbers(entry["name"], entry["seed"], metrics, entry["images"], entry.get("commit"))
    except (KeyError, AttributeError) as error:
        raise RunError(f"{source}: no {error} of a run; remove the file and evaluate again") from None


def _run_to_dict(run: RunNumbers) -> dict[str, Any]:
    metrics = {name: None if math.isnan(value) else round(value, 5) for name, value in run.metrics.items()}
    return {"name": run.name, "seed": run.seed, "images": run.images, "commit": run.commit, "metrics": metrics}


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _cell(row: TableRow, metric: str) -> str:
    mean, spread, printed = row.mean(metric), row.spread(metric), row.paper.get(metric)
    ours = "-" if mean is None else f"{mean:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
    return ours if printed is None else f"{ours} ({printed:.1f})"


def _seeds(row: TableRow) -> str:
    return f"{len(row.runs)} of {len(row.runs) + len(row.missing)}"
