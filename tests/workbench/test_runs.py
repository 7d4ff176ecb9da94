"""Run folders: opened, compared, locked, and read while they are written."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

from solq_lab.config import Experiment, validate_experiment
from solq_lab.files import replacing, write_json
from solq_lab.runs import RunError, create_run, list_runs, load_run


def experiment(**values) -> Experiment:
    return validate_experiment({"name": "tiny", **values}, source="test")


def test_a_created_run_gives_its_experiment_back(tmp_path):
    asked = experiment(optim={"lr": 3e-4}, data={"root": "somewhere"})
    run = create_run(asked, tmp_path)
    assert run.folder == tmp_path / "tiny"
    assert load_run(run.folder).experiment == asked
    environment = json.loads(run.environment.read_text())
    assert environment["versions"]["torch"]
    assert environment["command"] == sys.argv
    assert run.status()["state"] == "created"


def test_creating_the_same_run_again_opens_it(tmp_path):
    first = create_run(experiment(), tmp_path)
    first.append_metrics({"kind": "train", "step": 1})
    assert create_run(experiment(), tmp_path).metrics() == [{"kind": "train", "step": 1}]


def test_another_experiment_in_the_same_folder_is_rejected_by_its_differing_keys(tmp_path):
    create_run(experiment(), tmp_path)
    with pytest.raises(RunError) as error:
        create_run(experiment(optim={"lr": 1e-3}, seed=7), tmp_path)
    message = str(error.value)
    assert "optim.lr (there 0.0002, asked 0.001)" in message
    assert "seed (there 42, asked 7)" in message
    assert "another name (name=...), or remove the folder" in message
    assert load_run(tmp_path / "tiny").experiment == experiment()


def test_a_run_may_start_from_another_runs_folder_and_goes_on_when_that_is_gone(tmp_path):
    first = create_run(Experiment(name="first"), tmp_path)
    experiment = Experiment(name="second", train={"finetune_from": str(first.folder)})
    create_run(experiment, tmp_path)
    shutil.rmtree(first.folder)
    assert create_run(experiment, tmp_path).experiment == experiment


def test_a_folder_of_something_else_is_not_written_into(tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"not a run folder .*another name=|not a run folder.*name="):
        create_run(experiment(), tmp_path)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["thesis.tex"]


def test_a_missing_run_names_the_runs_that_exist(tmp_path):
    create_run(experiment(), tmp_path)
    with pytest.raises(RunError, match=r"nope: not a run folder .*runs there: tiny"):
        load_run(tmp_path / "nope")
    with pytest.raises(RunError, match="no runs in"):
        load_run(tmp_path / "empty" / "nope")


def test_runs_are_listed_by_name_and_a_damaged_one_is_named(tmp_path, caplog):
    for name in ("b", "a", "broken"):
        create_run(experiment(name=name), tmp_path)
    (tmp_path / "broken" / "experiment.yaml").write_text("modle: {}\nname: broken\n")
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b"]
    assert "unknown key modle; did you mean model?" in caplog.text
    assert list_runs(tmp_path / "nowhere") == []


def test_a_torn_last_line_is_left_out_and_named(tmp_path, caplog):
    run = create_run(experiment(), tmp_path)
    run.append_metrics({"kind": "start"})
    run.append_metrics({"kind": "train", "step": 10})
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    with caplog.at_level(logging.INFO):
        assert run.metrics() == [{"kind": "start"}, {"kind": "train", "step": 10}]
    assert "line 3 is incomplete" in caplog.text
    assert run.metrics("train") == [{"kind": "train", "step": 10}]


def test_rewinding_forgets_what_a_resumed_training_writes_again(tmp_path):
    run = create_run(experiment(), tmp_path)
    for line in ({"kind": "start"}, {"kind": "train", "step": 10}, {"kind": "train", "step": 20}):
        run.append_metrics(line)
    with run.metrics_file.open("a") as file:
        file.write('{"torn')
    run.rewind_metrics(10)
    run.append_metrics({"kind": "train", "step": 11})
    assert [line.get("step") for line in run.metrics()] == [None, 10, 11]


def test_metrics_of_a_run_that_has_not_started_are_empty(tmp_path):
    run = create_run(experiment(), tmp_path)
    assert run.metrics() == []
    run.rewind_metrics(0)
    assert not run.metrics_file.exists()


HOLD_THE_LOCK = """
import os, sys, time
from solq_lab.runs import Run
run = Run(sys.argv[1])
with run.locked():
    run.write_status("training", step=0)
    if os.fork() == 0:  # a loader process outlives its killed parent for a while
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_trainer_is_rejected_and_a_killed_one_leaves_no_lock(tmp_path):
    run = create_run(experiment(), tmp_path)
    assert not run.is_training()
    holder = subprocess.Popen([sys.executable, "-c", HOLD_THE_LOCK, run.folder], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert run.is_training()
        rejection = rf"process {holder.pid} on .* is training here; .*another name=\.\.\."
        with pytest.raises(RunError, match=rejection), run.locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not run.is_training()
    with run.locked():
        pass


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written that could take its place
    with pytest.raises(OSError, match=r"value\.json"), replacing(path):
        raise OSError(28, "No space left on device")  # as writes raise it, without a name
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["value.json"]
