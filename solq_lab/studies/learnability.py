"""What trainings reached of what their codec can hold: AP, its ceiling, and their quotient."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from solq_lab.files import read_json
from solq_lab.runs import list_runs
from solq_lab.studies.codec_benchmark import CodecBenchmark, make_grid

NUMBERS = ("segm.AP", "boundary.AP")

# Rows of stored results whose codecs are known: table and row, and kind, N and n_k of the codec.
STORED = {
    ("shapes_table3a", "DCT"): ("dct", 64, 64),
    ("shapes_table3a", "flatten"): ("flatten", 28, 784),
    ("shapes_table3a", "PCA"): ("pca", 28, 60),
    ("shapes_table3e", "36"): ("dct", 64, 36),
    ("shapes_table3e", "75"): ("dct", 64, 75),
    ("shapes_table3e", "100"): ("dct", 64, 100),
}


def learnt_by_tables(results_dir: str | Path, benchmark: CodecBenchmark) -> pd.DataFrame:
    """The rows `STORED` of the project's result files (`experiments/results`), means over their seeds.

    Args:
        results_dir: folder of the files.
        benchmark: measures the ceilings; its data should be of the kind that the runs were trained on.

    Returns:
        A row per codec: number of seeds, and AP in percent, ceiling in percent and quotient of mask and boundary AP.
    """
    found = []
    for (table, name), (kind, side, length) in STORED.items():
        rows = {row["name"]: row["runs"] for row in read_json(Path(results_dir) / f"{table}.json")["rows"]}
        (ceiling,) = benchmark.measure(make_grid([kind], [side], [length], pca="released"))
        reached = pd.DataFrame([run["metrics"] for run in rows[name]])[list(NUMBERS)].mean()
        about = {"codec": kind, "N": side, "n_k": length, "seeds": len(rows[name])}
        found.append(about | _quotients(reached, ceiling.evaluation.metrics))
    return pd.DataFrame(found).set_index(["codec", "N", "n_k"])


def learnt_by_runs(*folders: str | Path) -> pd.DataFrame:
    """The same for finished runs in folders, each beside the ceiling that its training measured on its own data."""
    found = []
    for run in (run for folder in folders for run in list_runs(folder)):
        results, ceiling = run.folder / "results.json", run.folder / "ceiling.json"
        if results.exists() and ceiling.exists():
            codec = run.experiment.codec
            numbers = _quotients(read_json(results)["metrics"], read_json(ceiling)["metrics"])
            found.append(
                {"run": run.name, "codec": codec.kind, "N": codec.mask_size, "n_k": codec.vector_dim} | numbers
            )
    return pd.DataFrame(found, columns=None if found else ["run", "codec", "N", "n_k"]).set_index("run")


def _quotients(reached: Mapping[str, Any], ceiling: Mapping[str, Any]) -> dict[str, float]:
    row = {}
    for number in NUMBERS:
        name = number.replace(".", " ")
        row[name], row[f"{name} ceiling"] = 100 * reached[number], 100 * ceiling[number]
        row[f"{name} quotient"] = reached[number] / ceiling[number] if ceiling[number] else float("nan")
    return row
