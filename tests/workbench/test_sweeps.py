"""Sweeps: finished runs are skipped, failed ones reported without stopping others, and a cluster gives the same table.

Most jobs here are stand-ins that leave a run folder as a training notebook does, without a kernel and without torch.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import papermill
import pytest
from conftest import REPOSITORY
from nbclient.exceptions import DeadKernelError
from notebook import SHARED, write_notebook
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.config import ConfigError, Experiment, load_experiment, load_sweep
from solq_lab.errors import Interrupted
from solq_lab.files import read_json, write_json
from solq_lab.runs import RunError, create_run
from solq_lab.workbench import sweeps
from solq_lab.workbench.paper import paper_table
from solq_lab.workbench.sweeps import check, cluster_starter, find_sweep, plan, run_sweep
from solq_lab.workbench.tables import read_table
from solq_lab.workbench.workspace import WORKSPACE

PAPER = """
table3b:
  title: made up
  columns: [segm.AP, box.AP]
  rows: {"1": [27.2, 39.7], "3": [29.7, null]}
"""
SWEEP = """
experiment: base.yaml
overrides: [train.steps=2]
rows:
  - {name: one, overrides: [loss.vector_weight=1], paper: "1"}
  - {name: three, overrides: [loss.vector_weight=3], paper: "3"}
seeds: [5, 6]
notebook: look.ipynb
paper: table3b
"""
# Imports nothing of ours, which saves the half second that each would take; `weight` tells the rows apart.
STAND_IN = """
import json, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, lambda *_: (print("saved at step 1", flush=True), sys.exit(130)))
folder, notebook, experiment, weight, seed = Path(sys.argv[1]), *sys.argv[2:4], *map(float, sys.argv[4:])
folder.mkdir(parents=True, exist_ok=True)
(folder / "part").write_text(experiment)
(folder / "part").rename(folder / "experiment.yaml")  # whole or not at all, as a real run
with open("executions", "a") as file:
    file.write(folder.name + "\\n")
print("about to work", flush=True)
{body}
metrics = {{"segm.AP": 0.2 + weight / 100 + seed / 1000, "box.AP": 0.4}}
(folder / "environment.json").write_text("{{}}")
(folder / "results.json").write_text(json.dumps({{"metrics": metrics, "images": 4}}))
(folder / notebook).write_text(json.dumps({{"metadata": {{"papermill": {{"end_time": "now", "exception": None}}}}}}))
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a sweep of two rows and two seeds, its experiment, notebook, and the paper's numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "paper_results.yaml").write_text(PAPER)
    (tmp_path / "base.yaml").write_text("data: {root: drawn, generate: easy}")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    write_notebook(tmp_path / "look.ipynb")
    monkeypatch.setattr(sweeps, "prepare_data", lambda experiment: None)
    monkeypatch.setattr(sweeps, "POLL_SECONDS", 0.02)
    return tmp_path


@pytest.fixture
def stand_in(workspace, monkeypatch):
    """Let jobs be stand-ins; `body` is what one does before it has results."""

    script = workspace / "stand_in.py"

    def command(job: sweeps.Job) -> list[str]:
        experiment = job.experiment()
        values = (job.notebook.name, experiment.to_yaml(), experiment.loss.vector_weight, experiment.seed)
        return [sys.executable, "-S", str(script), str(job.folder), *map(str, values)]

    def use(body: str = "") -> None:
        script.write_text(STAND_IN.format(body=body))
        monkeypatch.setattr(sweeps, "job_command", command)

    return use


def executions() -> list[str]:
    path = Path("executions")
    return path.read_text().split() if path.exists() else []


def jobs_of(path: str = "sweep.yaml") -> list[sweeps.Job]:
    return plan(load_sweep(path))


# ---- files


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds: [5, 6]", "seed: [5]"), "unknown key seed; did you mean seeds?"),
        (("name: three", "nmae: three"), "unknown key rows.1.nmae; did you mean name?"),
        (("name: three", "name: one"), "rows: one comes more than once"),
        (("seeds: [5, 6]", "seeds: [5, 5]"), "seeds: 5 comes more than once"),
        (("name: three", "name: a/b"), "rows.1.name"),
        (("experiment: base.yaml", ""), "experiment: Field required"),
    ],
)
def test_a_sweep_file_is_strict(workspace, change, said):
    Path("sweep.yaml").write_text(SWEEP.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_sweep("sweep.yaml")
    assert said in str(caught.value)


def test_a_sweep_is_found_by_its_name_and_an_unknown_one_rejected_with_the_nearest(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert find_sweep("table3b") == Path("experiments/ablations/table3b.yaml")
    assert find_sweep("other/mine.yaml") == Path("other/mine.yaml")
    with pytest.raises(ConfigError, match=r"no sweep table3x in experiments/ablations; did you mean table3"):
        find_sweep("table3x")


# ---- the paper's sweeps, and their shapes twins

FILES = sorted((REPOSITORY / "experiments" / "ablations").glob("*.yaml"))
IDS = [path.stem for path in FILES]


@pytest.fixture
def checkout(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_its_rows_load_and_the_paper_has_them(path, checkout):
    sweep = load_sweep(path)
    assert [job.experiment().seed for job in plan(sweep)] == [seed for seed in sweep.seeds for _ in sweep.rows]
    if sweep.paper is None:  # an ablation of our own
        assert all(row.paper is None for row in sweep.rows)
        return
    paper = paper_table(sweep.paper)
    assert set(sweep.metrics) <= set(paper.columns)
    for row in sweep.rows:
        assert row.paper is None or paper.row(row.paper)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_says_what_to_expect_how_long_it_takes_and_the_command(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "Expect" in header or "expect" in header
    assert "Time:" in header
    assert f"solq-lab sweep {path.stem}" in header


def test_every_row_of_the_papers_own_is_swept(checkout):
    swept = {name: {row.paper for row in load_sweep(find_sweep(name)).rows} for name in IDS if "shapes" not in name}
    assert swept["table1"] == {name for name in paper_table("table1").rows if name.startswith("SOLQ")}
    assert swept["table2"] == {
        name for name in paper_table("table2").rows if "R-CNN" not in name and name != "D-DETR, R50"
    }
    for part in "abcde":
        assert swept[f"table3{part}"] == set(paper_table(f"table3{part}").rows)
    assert swept["table4"] == {"SOLQ"}


def test_rows_that_share_a_run_ask_for_the_same_settings(checkout):
    """What several tables show is trained once: what all of table 3's twins vary from, and one layer of 3b and 3c."""
    jobs = [job for path in FILES for job in plan(load_sweep(path))]
    experiments: dict[str, Experiment] = {}
    for job in jobs:
        assert experiments.setdefault(job.run, job.experiment()) == job.experiment(), job.run
    rows = defaultdict(set)
    for job in jobs:
        rows[job.run].add(f"{job.sweep}.{job.row}")
    assert rows["shapes_table3_one_layer-s42"] == {"shapes_table3b.3", "shapes_table3c.1-of-3"}
    assert rows["shapes_table2_uqr-s42"] == {
        "shapes_table2.UQR",
        "shapes_table4.UQR",
        "shapes_table3a.DCT",
        "shapes_table3c.3-of-3",
        "shapes_table3d.64",
        "shapes_table3e.64",
    }


def test_the_rows_of_a_twin_differ_in_what_the_table_varies_only(checkout):
    varied = {"b": "loss", "c": "loss", "d": "codec", "e": "codec"}
    for part, section in varied.items():
        for name in (f"table3{part}", f"shapes_table3{part}"):
            rows = [job.experiment().model_dump(exclude={"name", "seed"}) for job in plan(load_sweep(find_sweep(name)))]
            without = [{key: value for key, value in row.items() if key != section} for row in rows]
            assert all(row == without[0] for row in without), name


@pytest.mark.parametrize("name", ["table2", "shapes_table2"])
def test_table_2_compares_ways_to_a_mask_at_equal_width_batch_and_length(name, checkout):
    rows = [job.experiment() for job in plan(load_sweep(find_sweep(name)))]
    assert len({(row.model.width, row.train.batch_size, row.train.epochs, row.train.steps) for row in rows}) == 1
    assert {(row.codec.kind, row.model.mask_branch) for row in rows} == {
        ("none", "none"),
        ("none", "sqr"),
        ("dct", "none"),
    }


# ---- planning


def test_rows_times_seeds_become_runs_seed_by_seed(workspace):
    jobs = jobs_of()
    assert [job.run for job in jobs] == ["sweep-one-s5", "sweep-three-s5", "sweep-one-s6", "sweep-three-s6"]
    experiment = jobs[3].experiment()
    assert (experiment.name, experiment.seed) == ("sweep-three-s6", 6)
    assert (experiment.train.steps, experiment.loss.vector_weight) == (2, 3.0)


def test_a_rows_mistake_is_rejected_by_its_name_before_any_work(workspace):
    Path("sweep.yaml").write_text(SWEEP.replace("vector_weight=3", "vector_wieght=3"))
    with pytest.raises(ConfigError, match=r"sweep sweep, row three: .*did you mean vector_weight"):
        check(jobs_of())
    assert not Path("runs").exists()


def test_a_run_folder_of_other_settings_is_rejected(workspace):
    check(jobs_of())
    job = jobs_of()[0]
    create_run(load_experiment(job.experiment_path, [*job.overrides, "train.steps=9"]))
    with pytest.raises(RunError, match=r"row one of sweep sweep; it differs in train.steps \(there 9, asked 2\)"):
        check(jobs_of())


def test_rows_may_share_a_run_only_with_the_same_settings(workspace, stand_in):
    shared = SWEEP.replace("name: one,", "name: one, run: same,").replace("name: three,", "name: three, run: same,")
    Path("sweep.yaml").write_text(shared)
    with pytest.raises(ConfigError, match="row three: another row calls its run same-s5 too"):
        check(jobs_of())
    Path("sweep.yaml").write_text(shared.replace("vector_weight=3", "vector_weight=1"))
    check(jobs_of())
    stand_in()
    run_sweep(jobs_of())
    assert executions() == ["same-s5", "same-s6"]


# ---- running


def test_what_is_finished_is_not_executed_again(stand_in):
    stand_in()
    assert [outcome.status for outcome in run_sweep(jobs_of())] == [0, 0, 0, 0]
    assert len(executions()) == 4
    assert run_sweep(jobs_of()) == []
    assert len(executions()) == 4


def test_a_notebook_whose_kernel_was_killed_is_not_finished(workspace):
    """Papermill notes an end of such a notebook, and no exception."""
    write_notebook(workspace / "look.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "after = 2")
    job, survivor, *_ = jobs_of()
    for folder in (job.folder, survivor.folder):
        folder.mkdir(parents=True)
    with pytest.raises(DeadKernelError):
        papermill.execute_notebook(job.notebook, job.folder / job.notebook.name, progress_bar=False)
    write_notebook(workspace / "look.ipynb", "after = 2")
    papermill.execute_notebook(survivor.notebook, survivor.folder / survivor.notebook.name, progress_bar=False)
    assert not job.is_finished()
    assert survivor.is_finished()


def test_a_failing_row_is_reported_and_stops_no_other(stand_in, caplog):
    stand_in('if weight == 3 and seed == 5: print("the last word", flush=True); sys.exit(3)')
    outcomes = run_sweep(jobs_of())
    assert {outcome.job.run: outcome.status for outcome in outcomes} == {
        "sweep-one-s5": 0,
        "sweep-three-s5": 3,
        "sweep-one-s6": 0,
        "sweep-three-s6": 0,
    }
    assert "sweep-three-s5: failed with status 3" in caplog.text
    assert "  the last word" in caplog.text
    stand_in()  # mended: only the failed one is repeated
    run_sweep(jobs_of())
    assert sorted(executions()) == sorted([*(job.run for job in jobs_of()), "sweep-three-s5"])


def test_two_jobs_run_at_the_same_time(stand_in):
    meeting = 'Path(f"here-{weight}").touch()\nwhile not Path(f"here-{4.0 - weight}").exists(): time.sleep(0.02)'
    stand_in(meeting)  # each waits for the other; alone it would wait for ever
    assert [outcome.status for outcome in run_sweep(jobs_of()[:2], at_once=2)] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_every_job_save_and_re_running_resumes(stand_in, number):
    stand_in("Path(folder.name).touch()\ntime.sleep(60)")

    def stop_when_both_work() -> None:
        while not (Path("sweep-one-s5").exists() and Path("sweep-three-s5").exists()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_both_work).start()
    with pytest.raises(Interrupted) as caught:
        run_sweep(jobs_of(), at_once=2)
    assert str(caught.value).splitlines() == ["saved at step 1"] * 2 + ["Re-running the sweep resumes them"]
    assert len(executions()) == 2
    stand_in()
    assert len(run_sweep(jobs_of())) == 4


def test_a_job_that_is_killed_counts_as_failed(stand_in):
    stand_in("import os; os.kill(os.getpid(), signal.SIGKILL)")
    (outcome,) = run_sweep(jobs_of()[:1])
    assert outcome.status == -signal.SIGKILL
    assert outcome.last_lines == ("about to work",)


def test_submitit_gives_the_same_table_by_the_same_code(stand_in):
    stand_in('if weight == 3 and seed == 5: print("the last word", flush=True); sys.exit(3)')
    here = [outcome.status for outcome in run_sweep(jobs_of(), at_once=2)]
    expected = read_table("sweep.yaml")
    submitted = [job._replace(runs_dir=Path("cluster")) for job in jobs_of()]
    outcomes = run_sweep(submitted, start=cluster_starter("local", "cluster"), at_once=2)
    assert sorted(outcome.status for outcome in outcomes) == sorted(here) == [0, 0, 0, 3]
    assert [outcome.last_lines[-1] for outcome in outcomes if outcome.status] == ["the last word"]
    assert read_table("sweep.yaml", runs_dir="cluster").csv() == expected.csv()


def test_an_option_that_a_cluster_does_not_know_is_rejected(workspace):
    with pytest.raises(ConfigError, match=r"cluster local: .*timeout_mni"):
        cluster_starter("local", "runs", {"timeout_mni": 3})


def test_a_machine_without_slurm_says_so(workspace, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="cluster slurm: "):
        cluster_starter("slurm", "runs")


# ---- tables


def test_a_table_has_mean_and_spread_beside_the_paper(stand_in):
    stand_in()
    run_sweep(jobs_of()[:3])  # three is missing its second seed
    table = read_table("sweep.yaml")
    one, three = table.rows
    assert one.mean("segm.AP") == pytest.approx(100 * (0.2 + 0.01 + 0.0055))
    assert one.std("segm.AP") == pytest.approx(0.1 / 2**0.5)
    assert three.std("segm.AP") is None
    assert table.missing == ("sweep-three-s6",)
    header, first, second, *remarks = table.text().splitlines()
    assert header.split() == ["segm.AP", "box.AP", "seeds"]
    assert first.split(maxsplit=1)[1].split("  ") == ["21.6 ± 0.1 (27.2)", "40.0 ± 0.0 (39.7)", "2 of 2"]
    assert "(29.7)" in second
    assert remarks[-1] == "1 run not finished; `solq-lab sweep sweep.yaml` runs the rest"
    assert table.csv().splitlines()[1] == "one,segm.AP,21.55,0.07,2,1,27.2"
    assert table.markdown().startswith("|  | segm.AP | box.AP | seeds |\n| --- | ---: | ---: | ---: |\n| one | 21.6 ±")


def test_without_any_run_a_table_shows_the_paper_and_the_command(workspace):
    table = read_table("sweep.yaml")
    assert table.rows[0].mean("segm.AP") is None
    assert table.rows[0].paper == {"segm.AP": 27.2, "box.AP": 39.7}
    assert "- (27.2)" in table.text()
    assert "4 runs not finished; `solq-lab sweep sweep.yaml` runs the rest" in table.text()


def test_a_carried_table_stands_in_for_runs_that_are_not_here_and_a_run_here_wins(stand_in):
    stand_in()
    run_sweep(jobs_of())
    before = read_table("sweep.yaml")
    Path("carried").mkdir()
    write_json("carried/sweep.json", before.to_dict())
    elsewhere = read_table("sweep.yaml", runs_dir="none", results_dir="carried")
    assert elsewhere.csv() == before.csv()
    assert elsewhere.to_dict() == read_json("carried/sweep.json")
    results = Path("runs/sweep-one-s5/results.json")
    results.write_text(json.dumps({"metrics": {"segm.AP": 0.9, "box.AP": None}, "images": 4}))
    mixed = read_table("sweep.yaml", results_dir="carried").rows[0]
    assert mixed.values("segm.AP") == pytest.approx([90.0, 21.6])
    assert len(mixed.values("box.AP")) == 1


def test_a_table_knows_how_long_its_runs_have_trained_also_where_it_is_carried(stand_in):
    stand_in()
    run_sweep(jobs_of())
    for seed, seconds in ((5, (30, 90)), (6, (150,))):
        lines = [json.dumps({"kind": "train", "seconds": second}) for second in seconds]
        Path(f"runs/sweep-one-s{seed}/metrics.jsonl").write_text("\n".join(lines) + "\n")
    here = read_table("sweep.yaml")
    assert [row.minutes for row in here.rows] == [2.0, None]
    Path("carried").mkdir()
    write_json("carried/sweep.json", here.to_dict())
    assert [row.minutes for row in read_table("sweep.yaml", runs_dir="none", results_dir="carried").rows] == [2.0, None]


def test_a_run_of_other_settings_is_pointed_out(stand_in):
    stand_in()
    run_sweep(plan(load_sweep("sweep.yaml"), ["train.steps=7", "train.gpus=2"])[:1])
    (note,) = read_table("sweep.yaml").notes
    assert note.endswith("sweep-one-s5: differs from the sweep in train.steps (there 7, asked 2)")
    assert note in read_table("sweep.yaml").text()


def test_a_broken_results_file_is_rejected(workspace):
    Path("carried").mkdir()
    Path("carried/sweep.json").write_text('{"rows": [{}]}')
    with pytest.raises(RunError, match=r"carried/sweep.json: not a table of results .*solq-lab table"):
        read_table("sweep.yaml", results_dir="carried")


def test_a_row_that_the_paper_does_not_have_is_rejected(workspace):
    Path("sweep.yaml").write_text(SWEEP.replace('paper: "3"', 'paper: "33"'))
    with pytest.raises(ConfigError, match=r"no row '33' .*did you mean '3'\?"):
        read_table("sweep.yaml")


# ---- commands


@pytest.fixture
def command(workspace, command_line):
    return command_line


def test_a_dry_run_lists_the_runs_and_makes_nothing(command, stand_in):
    stand_in()
    run_sweep(jobs_of()[:1])
    status, output = command("sweep", "sweep.yaml", "--dry-run")
    assert status == 0
    lines = output.splitlines()
    assert lines[0].startswith("finished ")
    assert lines[1].split(maxsplit=1)[0] == "new"
    assert "solq-lab run look.ipynb base.yaml train.steps=2 loss.vector_weight=3 name=sweep-three-s5 seed=5" in lines[1]
    assert len(executions()) == 1


def test_the_exit_status_tells_of_a_failure_and_the_table_is_printed_all_the_same(command, stand_in):
    stand_in("if weight == 3: sys.exit(3)")
    status, output = command("sweep", "sweep.yaml", "--jobs", "2")
    assert status == 1
    assert "failed: sweep-three-s5, sweep-three-s6" in output
    assert "21.6 ± 0.1 (27.2)" in output
    stand_in()
    assert command("sweep", "sweep.yaml", "--cluster", "local", "--cluster-option", "timeout_min=5")[0] == 0
    status, output = command("table", "sweep.yaml", "--json", "out.json", "--csv", "out.csv", "--markdown")
    assert status == 0
    assert "| one | 21.6 ± 0.1 (27.2) |" in output
    assert [len(row["runs"]) for row in read_json("out.json")["rows"]] == [2, 2]
    assert Path("out.csv").read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sweep", "none.yaml"), "none.yaml: no such"),
        (("table", "nothing"), "no sweep nothing in experiments/ablations"),
        (("sweep", "sweep.yaml", "--cluster-option", "a=1"), "needs --cluster"),
        (("sweep", "sweep.yaml", "--cluster", "local", "--cluster-option", "a"), "allowed is name=value"),
        (("sweep", "sweep.yaml", "data.generate=none"), "data.root: found drawn, which does not exist"),
    ],
)
def test_mistakes_are_rejected(command, arguments, said):
    status, output = command(*arguments)
    assert status == 2
    assert said in output
    assert executions() == []


def test_a_real_notebook_is_run_for_each_row_and_only_the_failed_one_again(workspace, command):
    cells = (
        "from solq_lab.files import write_json\nfrom solq_lab.runs import create_run\n"
        "from solq_lab.config import load_experiment",
        "run = create_run(load_experiment(experiment, overrides), runs_dir)",
        "open('executions', 'a').write(run.name + '\\n')\nrun.experiment.loss.vector_weight / fuel(run)",
        "numbers = {'metrics': {'segm.AP': 0.5}, 'per_class': {}, 'area_sides': [1, 2], 'boundary_ratio': 0.02}",
        "write_json(run.results, numbers | {'images': 1})",
    )
    fuel = "from pathlib import Path\ndef fuel(run): return 1 if Path('full').exists() or 'one' in run.name else 0"
    write_notebook(workspace / "look.ipynb", fuel, *cells, parameters=SHARED)
    Path("sweep.yaml").write_text(SWEEP.replace("[5, 6]", "[5]"))
    status, output = command("sweep", "sweep.yaml", "--jobs", "2")
    assert status == 1
    assert "ZeroDivisionError" in Path("runs/_sweeps/sweep/sweep-three-s5.log").read_text()
    Path("full").touch()
    status, output = command("sweep", "sweep.yaml")
    assert status == 0, output
    assert sorted(executions()) == ["sweep-one-s5", "sweep-three-s5", "sweep-three-s5"]


@pytest.mark.slow
def test_real_trainings_give_the_same_table_by_submitit_and_a_fitted_code_is_fitted_first(workspace, command):
    root = write_tiny_dataset(workspace / "images")
    (workspace / "base.yaml").write_text(tiny_experiment(root, train={"steps": 4}).to_yaml())
    pca = "codec.kind=pca, codec.artifact=codes/pca.safetensors"
    rows = f"rows: [{{name: none, overrides: [codec.kind=none]}}, {{name: pca, overrides: [{pca}]}}]"
    notebook = REPOSITORY / "notebooks" / "train.ipynb"
    (workspace / "sweep.yaml").write_text(f"experiment: base.yaml\nnotebook: {notebook}\n{rows}\n")
    status, output = command("sweep", "sweep.yaml", "--jobs", "2")
    assert status == 0, output
    assert Path("codes/pca.safetensors").exists()
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    assert command("sweep", "sweep.yaml")[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*") if path.is_file()}
    status, output = command("sweep", "sweep.yaml", "--cluster", "local", "--jobs", "2", "--runs-dir", "cluster")
    assert status == 0, output
    here, there = (read_table("sweep.yaml", runs_dir=folder) for folder in ("runs", "cluster"))
    assert there.csv() == here.csv()
    assert not here.missing
    assert [len(row.values("box.AP")) for row in here.rows] == [1, 1]
