"""Results of a sweep beside the paper's: mean and standard deviation over seeds. Loads without torch.

A run's numbers come from its folder (`results.json`), or, where that is missing, from the table that comes with the
project (`experiments/results/<sweep>.json`, which `ResultTable.to_dict` wrote).
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solq_lab.config import load_sweep
from solq_lab.files import read_json
from solq_lab.runs import Run, RunError, label_runs, load_run
from solq_lab.schema import keys_with
from solq_lab.sections import Role
from solq_lab.workbench.paper import PaperTable, paper_table
from solq_lab.workbench.sweeps import Job, find_sweep, plan

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path("experiments/results")

# Of one finished run: "name", "seed", "images", "commit", "minutes" of training (None where that is not known) and
# "metrics", shares in 0..1 as in results.json.
RunNumbers = dict[str, Any]


@dataclass(frozen=True)
class TableRow:
    """One row of a sweep: its finished runs, the names of those that are missing, the paper's numbers in percent."""

    name: str
    runs: tuple[RunNumbers, ...]
    missing: tuple[str, ...]
    paper_name: str | None
    paper: Mapping[str, float | None]

    def values(self, metric: str) -> list[float]:
        """The number of each finished run that has it, percent."""
        found = (run["metrics"].get(metric) for run in self.runs)
        return [100 * share for share in found if share is not None]

    def mean(self, metric: str) -> float | None:
        """Mean over the seeds, percent; None where no run has this number."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def std(self, metric: str) -> float | None:
        """Standard deviation over the seeds (of the sample), percent; None for fewer than two."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def gain(self, base: TableRow, metric: str) -> float | None:
        """Mean difference to another row over the seeds that both have, points; None without one."""
        before = {run["seed"]: run["metrics"].get(metric) for run in base.runs}
        pairs = [(run["metrics"].get(metric), before.get(run["seed"])) for run in self.runs]
        gains = [100 * (after - share) for after, share in pairs if after is not None and share is not None]
        return statistics.fmean(gains) if gains else None

    @property
    def minutes(self) -> float | None:
        """Mean training time of the runs, evaluations not counted; None where no run has it."""
        known = [run["minutes"] for run in self.runs if run["minutes"] is not None]
        return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class ResultTable:
    """A sweep's results beside the paper's."""

    name: str  # of the sweep
    metrics: tuple[str, ...]  # the columns, as in results.json
    rows: tuple[TableRow, ...]  # in the sweep's order
    paper: PaperTable | None  # the paper's table, or None
    command: str  # the command that makes the missing runs
    notes: tuple[str, ...] = ()  # runs whose settings are not the sweep's, one line each

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the runs that are not finished."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.missing))

    def ranked(self, metric: str) -> list[TableRow]:
        """The rows that have this number, best mean first."""
        means = [(mean, row) for row in self.rows if (mean := row.mean(metric)) is not None]
        return [row for _, row in sorted(means, key=lambda pair: -pair[0])]

    def with_numbers(self, metric: str) -> ResultTable:
        """The table without the rows that have no such number, neither ours nor the paper's."""
        return replace(
            self, rows=tuple(row for row in self.rows if row.values(metric) or row.paper.get(metric) is not None)
        )

    def frame(self) -> pd.DataFrame:
        """The table to read: mean ± standard deviation in percent, the paper's number in brackets."""
        import pandas as pd

        rows = {}
        for row in self.rows:
            cells = []
            for name in self.metrics:
                mean, std, printed = row.mean(name), row.std(name), row.paper.get(name)
                ours = "-" if mean is None else f"{mean:.1f}" + ("" if std is None else f" ± {std:.1f}")
                cells.append(ours if printed is None else f"{ours} ({printed:.1f})")
            rows[row.name] = [*cells, f"{len(row.runs)} of {len(row.runs) + len(row.missing)}"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=[*self.metrics, "seeds"])

    def text(self) -> str:
        """`frame` as aligned text; below it what is missing."""
        return f"{self.frame().to_string()}\n{self.remarks}"

    def markdown(self) -> str:
        """The same as a Markdown table."""
        frame = self.frame()
        rule = ["---", *["---:"] * len(frame.columns)]
        lines = [f"| {' | '.join(cells)} |" for cells in (["", *frame.columns], rule, *frame.itertuples(name=None))]
        return "\n".join([*lines, "", *(f"{remark}  " for remark in self.remarks.splitlines())])

    def csv(self) -> str:
        """One line per row and metric: mean, standard deviation, number of runs, the paper's number; percent."""
        import pandas as pd

        columns = ["row", "metric", "mean", "spread", "runs", "paper_row", "paper"]
        lines = [
            (row.name, name, row.mean(name), row.std(name), len(row.values(name)), row.paper_name, row.paper.get(name))
            for row in self.rows
            for name in self.metrics
        ]
        frame = pd.DataFrame(lines, columns=columns).astype({"mean": float, "spread": float})
        return frame.round({"mean": 2, "spread": 2}).to_csv(index=False, lineterminator="\n")

    def to_dict(self) -> dict[str, Any]:
        """The content of a file of `experiments/results`: the numbers of each finished run, without means."""

        def rounded(run: RunNumbers) -> RunNumbers:
            metrics = {name: None if share is None else round(share, 5) for name, share in run["metrics"].items()}
            return run | {"metrics": metrics}

        rows = [{"name": row.name, "runs": list(map(rounded, row.runs))} for row in self.rows]
        return {"sweep": self.name, "rows": rows}

    @property
    def remarks(self) -> str:
        """What the numbers are, and what is missing: a line each."""
        remarks = ["percent, mean ± standard deviation over seeds"]
        if self.paper:
            remarks.append(f"in brackets the paper's: {self.paper.title}")
        if self.missing:
            count = len(self.missing)
            remarks.append(f"{count} run{'s' if count > 1 else ''} not finished; `{self.command}` runs the rest")
        return "\n".join([*remarks, *self.notes])


def read_table(
    sweep_file: str | Path, *, runs_dir: str | Path = "runs", results_dir: str | Path = RESULTS
) -> ResultTable:
    """The results of a sweep, given by its file or name, as far as its runs are finished.

    Raises:
        ConfigError: the sweep, or the paper's row it names, cannot be used.
        RunError: a results file cannot be read.
    """
    path = find_sweep(sweep_file)
    sweep = load_sweep(path)
    paper = None if sweep.paper is None else paper_table(sweep.paper)
    carried = _carried_runs(Path(results_dir) / f"{sweep.name}.json")
    jobs = plan(sweep, runs_dir=runs_dir)

    rows: list[TableRow] = []
    notes: list[str] = []
    for row in sweep.rows:
        found, missing = [], []
        for job in (job for job in jobs if job.row == row.name):
            numbers = _finished_run(job, notes) or carried.get((row.name, job.seed))
            found.append(numbers) if numbers else missing.append(job.run)
        printed = paper.row(row.paper) if paper and row.paper else {}
        rows.append(TableRow(row.name, tuple(found), tuple(missing), row.paper, printed))
    return ResultTable(
        sweep.name, tuple(sweep.metrics), tuple(rows), paper, f"solq-lab sweep {shlex.quote(str(path))}", tuple(notes)
    )


def runs_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """State, step and final APs in percent of each run."""
    import pandas as pd

    rows = []
    for label, run in zip(label_runs(runs), runs, strict=True):
        status = run.status()
        state = "training" if run.is_training() else status["state"]
        metrics = read_json(run.results)["metrics"] if run.results.is_file() else {}
        shares = {f"{kind}.AP": metrics.get(f"{kind}.AP") for kind in ("box", "segm", "boundary")}
        percents = {name: math.nan if share is None else 100 * share for name, share in shares.items()}
        rows.append({"run": label, "state": state, "step": status["step"]} | percents)
    return pd.DataFrame(rows).set_index("run") if rows else pd.DataFrame()


def _finished_run(job: Job, notes: list[str]) -> RunNumbers | None:
    """The numbers in a run folder, or None; adds a line to `notes` where the run's settings are not the sweep's."""
    if not (job.folder / "results.json").is_file():
        return None

    run = load_run(job.folder)
    found = run.differences(job.experiment())
    differences = [difference for difference in found if difference.split()[0] not in keys_with(Role.MACHINE)]
    if differences:
        notes.append(f"{run.folder}: differs from the sweep in {'; '.join(differences)}")

    results, environment = read_json(run.results), read_json(run.environment)
    about = {"name": run.name, "seed": job.seed, "commit": (environment.get("git") or {}).get("commit")}
    steps = run.metrics("train")
    if steps:
        about["minutes"] = round(steps[-1]["seconds"] / 60, 2)
    return _run_from_dict(about | results, run.results)


def _carried_runs(path: Path) -> dict[tuple[str, int], RunNumbers]:
    """The runs in a table that comes with the project, by row and seed; empty without such a file."""
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
        known = {key: entry[key] for key in ("name", "seed", "images")}
        known |= {key: entry.get(key) for key in ("commit", "minutes")}
        return known | {"metrics": dict(entry["metrics"])}
    except (KeyError, TypeError) as error:
        raise RunError(f"{source}: no {error} of a run; remove the file and evaluate again") from None
