"""Launching: rejections before any work, notebooks that fail clearly, and trainings that outlive their launcher.

The training processes here are stand-ins that write a run folder as a training does, without importing torch.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from notebook import SHARED, write_notebook
from training_runs import wait_for
from typer.testing import CliRunner

from solq_lab.config import ConfigError, Experiment, load_experiment
from solq_lab.data_folder import check_data_folder
from solq_lab.files import read_json, write_json
from solq_lab.runs import RunError, create_run, load_run
from solq_lab.schema import TrainSection
from solq_lab.workbench import processes, trainings
from solq_lab.workbench.cli import app
from solq_lab.workbench.notebooks import NotebookFailed, run_notebook
from solq_lab.workbench.parameters import NotebookError
from solq_lab.workbench.processes import find_trainer, is_alive
from solq_lab.workbench.trainings import (
    TrainingFailed,
    TrainingRejected,
    describe_trainings,
    follow_training,
    start_training,
    stop_training,
)
from solq_lab.workbench.workspace import WORKSPACE, enter_workspace

STAND_IN = """
import signal, sys, time
from solq_lab.runs import load_run
run = load_run(sys.argv[1])
def stop(*_):
    time.sleep(0.3)  # saving
    run.write_status("preempted", step=7, message="SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
with run.locked():
    run.write_status("training", step=1)
    run.append_metrics({{"kind": "train", "step": 1, "total": 2.0, "images_per_second": 3.0}})
    print("a line of the log", flush=True)
    {body}
"""


@pytest.fixture
def run(tmp_path):
    return create_run(Experiment(name="a", model={"pretrained": "none"}, train={"steps": 10}), tmp_path / "runs")


@pytest.fixture
def stand_in(monkeypatch):
    """Let `start_training` start a process of our own; what it leaves running is killed afterwards."""

    def use(body: str) -> None:
        script = STAND_IN.format(body=body)
        monkeypatch.setattr(
            trainings, "training_command", lambda run, processes: [sys.executable, "-c", script, str(run.folder)]
        )

    yield use
    for child in processes._children.values():
        child.kill()
        child.wait()
    processes._children.clear()


# ---- training


def test_a_training_is_followed_to_its_end(run, stand_in, capsys):
    stand_in('run.write_status("finished", step=10)')
    pid = start_training(run.folder)
    assert follow_training(run.folder, interval=0.05).status()["state"] == "finished"
    assert read_json(run.folder / "train.pid")["pid"] == pid
    assert "a line of the log" in run.log_file.read_text()
    assert "a: step 1 of 10" in capsys.readouterr().err


def test_warnings_in_the_log_of_a_training_are_shown(run, stand_in, caplog):
    stand_in(
        'time.sleep(0.3); print("now WARNING 3 of 4 objects cannot be learnt"); run.write_status("finished", step=10)'
    )
    start_training(run.folder)
    follow_training(run.folder, interval=0.05)
    assert "now WARNING 3 of 4 objects cannot be learnt" in caplog.messages
    assert not any("a line of the log" in message for message in caplog.messages)


def test_a_finished_run_is_not_trained_again_and_another_folder_is_rejected(run, stand_in, tmp_path):
    stand_in("1 / 0")
    with pytest.raises(RunError, match="not a run folder"):
        start_training(tmp_path)
    run.write_status("finished", step=10)
    assert start_training(run.folder) is None
    assert follow_training(run.folder).name == "a"


def test_a_training_lives_in_a_session_of_its_own_and_is_started_once(run, stand_in):
    stand_in("time.sleep(60)")
    pid = start_training(run.folder)
    assert os.getsid(pid) == pid != os.getsid(0)
    assert start_training(run.folder) is None
    wait_for(run.is_training)
    processes._children.clear()  # as another process, or a new kernel, sees it
    assert start_training(run.folder) is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_process_that_has_got_the_id_of_a_dead_training_is_not_taken_for_it(run, stand_in):
    stand_in('run.write_status("finished", step=10)')
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "birth": processes.start_time(os.getpid())}
    write_json(run.folder / "train.pid", mine)
    assert start_training(run.folder) is None  # as long as it is the same process
    (run.folder / "train.pid").write_text(f"{os.getpid()}\n")  # as older versions wrote it
    assert not is_alive(run)
    write_json(run.folder / "train.pid", mine | {"birth": mine["birth"] - 60})
    assert start_training(run.folder) is not None
    follow_training(run.folder, interval=0.05)


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_clock_that_jumps_changes_nothing(run, stand_in, monkeypatch, jump):
    stand_in("time.sleep(60)")
    start_training(run.folder)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    processes._children.clear()  # as a new launcher sees it
    assert start_training(run.folder) is None  # perhaps before it holds its lock
    wait_for(run.is_training)
    assert start_training(run.folder) is None
    os.kill(find_trainer(run)["pid"], signal.SIGKILL)
    wait_for(lambda: not is_alive(run))
    assert start_training(run.folder) is not None


def test_a_training_whose_launcher_was_killed_goes_on_and_is_known_to_the_next_one(run, stand_in):
    body = 'open(run.folder / "alive", "w").close(); time.sleep(60)'
    launcher = (
        "import os, signal, sys; from solq_lab.workbench import trainings\n"
        f"trainings.training_command = lambda run, processes: {[sys.executable, '-c', STAND_IN.format(body=body)]!r} "
        "+ [str(run.folder)]\n"
        "trainings.start_training(sys.argv[1]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    died = subprocess.run([sys.executable, "-c", launcher, run.folder])
    assert died.returncode == -signal.SIGKILL
    wait_for((run.folder / "alive").exists)
    trainer = run.trainer()
    said = f"{run.folder}: process {trainer['pid']} on {socket.gethostname()} is training; kill {trainer['pid']} makes"
    assert said in describe_trainings([run])
    listed = CliRunner().invoke(app, ["status", "--runs-dir", str(run.folder.parent)]).output
    assert re.search(r"^a +training +1 ", listed, re.MULTILINE)
    assert said in listed
    assert start_training(run.folder) is None
    assert "stopped at step 7" in stop_training(run.folder)
    assert describe_trainings([run]) == ""


def test_a_training_that_was_killed_is_listed_with_the_cure(run):
    run.write_status("training", step=5)
    assert describe_trainings([run]).endswith("killed; re-running resumes it at step 5, its last checkpoint")


def test_a_training_of_another_machine_is_stopped_there(run, monkeypatch):
    monkeypatch.setattr(type(run), "trainer", lambda self: {"pid": 4711, "host": "node7"})
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("that process is not ours"))
    assert "process 4711 on node7 is training; stop it there: kill 4711" in stop_training(run.folder)


def test_ctrl_c_while_it_saves_ends_the_waiting_and_not_the_saving(run, stand_in, monkeypatch):
    stand_in("time.sleep(60)")
    child = processes._children[start_training(run.folder)]
    wait_for(lambda: run.status()["state"] == "training")
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
        message = stop_training(run.folder)
    assert f"process {child.pid} is still saving and stops after that" in message
    assert child.wait(30) == 0
    assert run.status()["state"] == "preempted"


def test_another_process_follows_a_training_that_it_did_not_start(run, stand_in):
    stand_in('time.sleep(1); run.write_status("finished", step=10)')
    child = processes._children[start_training(run.folder)]
    processes._children.clear()
    threading.Thread(target=child.wait).start()  # the parent that reaps it, be it init
    assert follow_training(run.folder, interval=0.05).status()["state"] == "finished"


def test_stopping_sends_one_signal_and_waits_for_the_checkpoint(run, stand_in):
    stand_in("time.sleep(60)")
    start_training(run.folder)
    wait_for(run.is_training)
    wait_for(lambda: run.status()["state"] == "training")
    message = stop_training(run.folder)
    assert "stopped at step 7; re-running resumes it there" in message
    with pytest.raises(TrainingFailed, match="stopped at step 7; re-running resumes it there"):
        follow_training(run.folder)


def test_stopping_what_does_not_run_says_so(run):
    assert "no training was running" in stop_training(run.folder)


def test_a_killed_training_is_reported_with_its_signal_and_its_last_words(run, stand_in):
    stand_in("import os; os.kill(os.getpid(), signal.SIGKILL)")
    start_training(run.folder)
    with pytest.raises(TrainingFailed) as caught:
        follow_training(run.folder, interval=0.05)
    message = str(caught.value)
    assert "SIGKILL" in message
    assert "often: out of memory. train.batch_size 32 gives micro-batches of 32 images" in message
    assert "train.accumulate=2 (the same batch in smaller micro-batches)" in message
    assert "a line of the log" in message


def test_a_death_on_a_full_disk_names_the_disk(run, stand_in, monkeypatch):
    stand_in("raise SystemExit(1)")
    start_training(run.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(TrainingFailed, match=r"exit status 1; the disk is full \(0\.0 MB are free\)"):
        follow_training(run.folder, interval=0.05)


@pytest.mark.parametrize(
    ("state", "message", "said"),
    [
        ("failed", "OSError: no space left", "ended at step 4 with OSError: no space left"),
        ("training", "", "ended at step 4 with an unknown exit status"),  # somebody else started it, and it died
    ],
)
def test_a_training_that_ended_before_it_is_followed_is_reported_too(run, state, message, said):
    run.write_status(state, step=4, message=message)
    with pytest.raises(TrainingFailed, match=said):
        follow_training(run.folder)


def test_a_rejected_training_is_the_users_mistake_and_nothing_else(run, stand_in):
    stand_in(
        'run.write_status("failed", step=0, message="DataError: train.json: not COCO", exit_status=2); sys.exit(2)'
    )
    start_training(run.folder)
    with pytest.raises(TrainingRejected) as caught:
        follow_training(run.folder, interval=0.05)
    assert str(caught.value) == "train.json: not COCO"


def test_several_processes_are_started_by_torchrun(run):
    assert trainings.training_command(run, 1)[1:] == ["-m", "solq_lab.training", str(run.folder)]
    several = trainings.training_command(run, 3)
    assert several[1:] == ["-m", "solq_lab.training.torchrun", "--nproc-per-node=3", str(run.folder)]
    assert trainings.training_command(run, 1, nodes=2)[2:4] == ["solq_lab.training.torchrun", "--nproc-per-node=1"]


@pytest.mark.parametrize(
    ("train", "cores", "gpus", "processes"),
    [
        ({"gpus": 0, "batch_size": 8}, 2, [], 2),
        ({"gpus": 0, "batch_size": 8}, 1, [], 1),
        ({"gpus": 0, "batch_size": 8}, 16, ["a GPU"], 1),
        ({"gpus": 0, "batch_size": 6, "accumulate": 2}, 2, [], 1),
        ({"gpus": 4, "batch_size": 8}, 1, [], 4),
    ],
)
def test_gpus_0_starts_two_processes_where_a_cpu_has_the_cores(monkeypatch, train, cores, gpus, processes):
    monkeypatch.setattr(trainings, "describe_hardware", lambda: {"cores": cores, "gpus": gpus})
    assert trainings.suitable_processes(TrainSection(**train)) == processes


# ---- data


@pytest.fixture
def coco_folder(tmp_path):
    root = tmp_path / "coco"
    for name in ("train2017", "val2017", "annotations"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}2017.json").write_text("{}")
    return root


def test_data_folders_that_can_be_used_are_accepted(coco_folder):
    check_data_folder(Experiment(name="a", data={"root": str(coco_folder)}))
    check_data_folder(Experiment(name="a", data={"root": f"{coco_folder}/none", "generate": "easy"}))  # to be drawn


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "data.root: found ''.* data.root=FOLDER"),
        ({"generate": "easy"}, "data.root: found '', allowed is a folder to draw the shapes into"),
        ({"root": "cocoo"}, "data.root: found cocoo, .* did you mean coco?"),
        ({"root": "coco/deep/er"}, "coco holds annotations, train2017, val2017"),
        (
            {"root": "coco", "val_annotations": "annotations/instances_val2014.json"},
            "data.val_annotations: found .* did you mean .*instances_val2017.json?",
        ),
    ],
)
def test_another_data_folder_is_rejected_by_its_key_with_what_is_there(coco_folder, monkeypatch, data, said):
    monkeypatch.chdir(coco_folder.parent)
    with pytest.raises(ConfigError, match=said):
        check_data_folder(Experiment(name="a", data=data))


# ---- workspace


def test_a_notebook_in_jupyterlab_works_from_the_checkout(tmp_path, monkeypatch):
    for name in ("experiments", "notebooks"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.chdir(tmp_path / "notebooks")
    assert enter_workspace() == tmp_path
    assert os.getcwd() == str(tmp_path)


def test_folders_above_that_may_be_entered_but_not_listed_do_not_matter(tmp_path, monkeypatch):
    """As /home on many shared machines."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail(f"{path} may not be listed"))
    monkeypatch.chdir(tmp_path)
    assert enter_workspace() == tmp_path


def test_a_launched_notebook_works_from_where_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    monkeypatch.chdir("/")
    assert enter_workspace() == tmp_path


# ---- notebooks


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, str(tmp_path))  # run_notebook sets it; afterwards it is as before
    path = tmp_path / "mine.yaml"
    path.write_text("{model: {pretrained: none}, data: {generate: easy, root: none}}")
    return path


def test_a_notebook_runs_in_the_run_folder_and_becomes_html(tmp_path, experiment):
    notebook = write_notebook(
        tmp_path / "look.ipynb", "print(overrides, deep, runs_dir)", parameters=f"{SHARED}\ndeep: int = 1"
    )
    executed = run_notebook(notebook, experiment, ["seed=3"], parameters={"deep": "5"})
    assert executed.resolve() == tmp_path / "runs" / "mine" / "look.ipynb"
    assert f"['seed=3'] 5 {tmp_path / 'runs'}" in executed.read_text()
    assert "['seed=3'] 5" in executed.with_suffix(".html").read_text().replace("&#39;", "'")
    assert load_experiment(executed.with_name("experiment.yaml")).seed == 3


@pytest.mark.parametrize("data", ["", "/somewhere/mine"])
def test_a_notebook_about_a_data_set_files_its_report_under_the_data(tmp_path, experiment, data):
    notebook = write_notebook(tmp_path / "look.ipynb", "1", parameters=f'{SHARED}\nfolder: str = ""')
    executed = run_notebook(notebook, experiment, parameters={"folder": data})
    assert executed == Path("runs/look") / Path(data).name / "look.ipynb"
    assert not (tmp_path / "runs" / "mine").exists()


def test_a_report_opens_with_a_summary_folds_code_and_needs_no_kernel(tmp_path, experiment):
    cells = ["import ipywidgets\nipywidgets.IntSlider()", "import os\nprint(os.getcwd() + '/here')"]
    cells.append(
        "kind = 'application/vnd.jupyter.widget-' 'view+json'\ndisplay({kind: {}, 'image/png': 'aaaa'}, raw=True)"
    )
    notebook = write_notebook(tmp_path / "look.ipynb", *cells, parameters=f"{SHARED}\ndeep: int = 1")
    run = create_run(load_experiment(experiment, ["seed=3"]), tmp_path / "runs")
    write_json(run.results, {"metrics": {"segm.AP": 0.649, "box.AP": 0.766}, "images": 100})
    run.record_environment({"device": "a fast one"})
    page = run_notebook(notebook, experiment, ["seed=3"], parameters={"deep": "5"}).with_suffix(".html").read_text()
    body = page[page.index("<main") :]
    assert body.index("box 76.6, segm 64.9 (100 images)") < body.index("IntSlider")
    assert "a fast one" in body
    assert "solq-lab run look.ipynb mine.yaml seed=3 -p deep=5" in body
    assert body.count("<details>") == 5  # the parameters, those that were given, three cells
    assert str(tmp_path) not in page
    assert "widget-view" not in body
    assert "data:image/png;base64,aaaa" in body
    assert "a view to work with in JupyterLab" in body


def test_a_failing_cell_is_told_in_a_few_lines_and_its_traceback_kept_in_the_notebook(tmp_path, experiment):
    notebook = write_notebook(tmp_path / "look.ipynb", "before = 1", "seen = before\nseen / 0", "after = 2")
    with pytest.raises(NotebookFailed) as caught:
        run_notebook(notebook, experiment)
    message = str(caught.value)
    assert "failed at: seen / 0" in message
    assert "ZeroDivisionError: division by zero" in message
    assert len(message.splitlines()) == 3
    assert caught.value.exit_status == 1
    executed = tmp_path / "runs" / "mine" / "look.ipynb"
    assert "Traceback" in executed.read_text()
    assert "ZeroDivisionError" in executed.with_suffix(".html").read_text()


def test_a_killed_kernel_is_named_and_does_not_look_like_a_crash_of_ours(tmp_path, experiment):
    cell = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(NotebookFailed, match=r"its kernel was killed .*re-running follows it again"):
        run_notebook(write_notebook(tmp_path / "look.ipynb", cell), experiment)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"parameters": {"pictres": "3"}}, NotebookError, "unknown parameter pictres"),
        ({"declared": "x: int = 1"}, NotebookError, "unknown parameter experiment; allowed are x"),
        ({"overrides": ["train.stesp=3"]}, ConfigError, "unknown key train.stesp; did you mean steps?"),
        ({"overrides": ["data.generate=none"]}, ConfigError, "data.root: found none, which does not exist"),
    ],
)
def test_mistakes_are_rejected_before_anything_is_written(tmp_path, experiment, change, error, said):
    notebook = write_notebook(tmp_path / "look.ipynb", "1 / 0", parameters=change.get("declared", SHARED))
    with pytest.raises(error, match=said):
        run_notebook(notebook, experiment, change.get("overrides", []), parameters=change.get("parameters"))
    assert not (tmp_path / "runs").exists()


def test_a_notebook_about_several_runs_leaves_its_report_beside_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    notebook = write_notebook(
        tmp_path / "all.ipynb", "print(runs_dir, 'x' * deep)", parameters='runs_dir: str = "runs"\ndeep: int = 1'
    )
    executed = run_notebook(notebook, runs_dir="mine", parameters={"deep": "3"})
    assert executed == Path("mine/_reports/all.ipynb")
    assert f"{tmp_path / 'mine'} xxx" in executed.read_text()
    assert executed.with_suffix(".html").exists()
    with pytest.raises(NotebookError, match="unknown parameter deeep; did you mean deep"):
        run_notebook(notebook, runs_dir="mine", parameters={"deeep": "3"})


def test_another_experiment_under_the_same_name_is_rejected_with_what_differs(tmp_path, experiment):
    notebook = write_notebook(tmp_path / "look.ipynb")
    folder = create_run(load_experiment(experiment), tmp_path / "runs").folder
    before = (folder / "experiment.yaml").read_bytes()
    with pytest.raises(RunError, match=r"differs in seed \(there 42, asked 3\)"):
        run_notebook(notebook, experiment, ["seed=3"])
    assert (folder / "experiment.yaml").read_bytes() == before


FOLLOWING = """
from solq_lab import config, runs
from solq_lab.workbench import trainings
trainings.training_command = lambda run, processes: [{python!r}, "-c", {script!r}, str(run.folder)]
run = runs.create_run(config.load_experiment(experiment, overrides), runs_dir)
trainings.start_training(run.folder)
trainings.follow_training(run.folder, interval=0.1)
"""


def test_nothing_of_a_trainings_log_goes_through_the_kernel_and_a_finished_one_is_not_repeated(tmp_path, experiment):
    body = 'print("once more", "log line\\n" * 9999, flush=True); run.write_status("finished", step=10)'
    cell = FOLLOWING.format(python=sys.executable, script=STAND_IN.format(body=body))
    notebook = write_notebook(tmp_path / "look.ipynb", cell)
    for _ in range(2):
        executed = run_notebook(notebook, experiment)
        outputs = json.loads(executed.read_text())["cells"][-1]["outputs"]
        assert "log line" not in json.dumps(outputs)
        assert len(json.dumps(outputs)) < 1000
        log = executed.with_name("train.log").read_text()
        assert log.count("log line") == 9999
        assert log.count("once more") == 1


@pytest.fixture
def followed(tmp_path, experiment):
    """A command in a process of its own, running a notebook that follows a stand-in for a training."""
    script = STAND_IN.format(body="time.sleep(60)")
    notebook = write_notebook(tmp_path / "look.ipynb", FOLLOWING.format(python=sys.executable, script=script))
    command = [sys.executable, "-m", "solq_lab", "run", str(notebook), str(experiment)]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A background job of a shell ignores Ctrl-C, and its children inherit that: these tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    folder = tmp_path / "runs" / "mine"
    try:
        wait_for(lambda: (folder / "status.json").exists() and '"training"' in (folder / "status.json").read_text(), 60)
        yield process, folder
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(read_json(folder / "train.pid")["pid"], signal.SIGKILL)


def test_ctrl_c_stops_the_training_once_says_how_to_resume_and_ends_with_130(followed):
    process, folder = followed
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step 7; re-running resumes it there" in output
    assert "Traceback" not in output
    assert json.loads((folder / "status.json").read_text())["message"] == "SIGTERM"


def test_a_lost_terminal_leaves_the_training_running(followed):
    process, folder = followed
    process.kill()
    process.wait()
    time.sleep(1.5)  # long enough for the kernel to notice
    assert load_run(folder).is_training()
