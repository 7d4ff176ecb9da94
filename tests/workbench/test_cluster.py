"""Commands as jobs: they end with their status, save and stop when asked, and are queued again when preempted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_experiment, write_tiny_dataset
from training_runs import ENVIRONMENT, wait_for, what_was_learned
from typer.testing import CliRunner

from solq_lab.files import read_json
from solq_lab.runs import create_run, load_run
from solq_lab.workbench import cli
from solq_lab.workbench.cluster import Cluster, Command
from solq_lab.workbench.trainings import training_command

# Counts its turns; works until Ctrl-C in the first one, and then says that it has saved.
STAND_IN = """
import signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.2)
    print("saved", flush=True)
    sys.exit(0)

signal.signal(signal.SIGINT, save)
with Path("turns").open("a") as file:
    print("turn", file=file)
if Path("turns").read_text() == "turn\\n":
    time.sleep(60)
print("finished", flush=True)
sys.exit(3)
"""


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """The stand-in as a job that has begun to work."""
    monkeypatch.chdir(tmp_path)
    command = Command([sys.executable, "-S", "-c", STAND_IN], "log.txt")
    job = Cluster("local", tmp_path / "submitit").submit(command, tmp_path / "log.txt", name="job")
    wait_for(Path("turns").exists)
    assert job.status() is None
    return job


def tell_its_task(job_id, *numbers):
    """Send signals to the process that runs the command, as SLURM does; its parent stands for SLURM here."""
    (task,) = Path(f"/proc/{job_id}/task/{job_id}/children").read_text().split()
    for number in numbers:
        os.kill(int(task), number)


@pytest.mark.parametrize(
    "signals", [(signal.SIGUSR2,), (signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)]
)
def test_a_job_that_has_to_give_way_saves_once_and_is_queued_again(submitted, signals):
    tell_its_task(submitted.job_id, *signals)
    wait_for(lambda: submitted.status() is not None)
    assert submitted.status() == 3
    assert Path("log.txt").read_text().splitlines() == ["saved", "finished"]


def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(submitted):
    tell_its_task(submitted.job_id, signal.SIGTERM)
    wait_for(lambda: submitted.status() is not None)
    assert submitted.status() == 0
    assert Path("log.txt").read_text().splitlines() == ["saved"]


@pytest.mark.slow
def test_a_job_that_its_cluster_lost_has_failed_and_the_log_says_so(submitted):
    tell_its_task(submitted.job_id, signal.SIGKILL)
    wait_for(lambda: submitted.status() is not None)
    assert submitted.status() == 1
    assert f"job {submitted.job_id}: " in Path("log.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2"], "--nodes 2: needs --cluster slurm"),
        (["--nodes", "2", "--cluster", "slurm"], "train.gpus=1 does not divide by it; add --gpus-per-node"),
        (["--gpus-per-node", "3"], "--gpus-per-node (3 processes): train: batch_size 4 does not divide"),
        (["--cluster-option", "timeout_min=9"], "--cluster-option: needs --cluster"),
        (["--cluster", "local", "--cluster-option", "x"], "--cluster-option 'x': allowed is name=value"),
        (["--cluster", "local", "--cluster-option", "timeout_mni=9"], "timeout_mni"),
    ],
)
def test_a_training_that_cannot_be_submitted_is_rejected_before_any_work(tmp_path, arguments, said):
    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(tiny_experiment(write_tiny_dataset(tmp_path / "images")).to_yaml())
    runner = CliRunner().invoke(cli.app, ["train", str(experiment), "--runs-dir", str(tmp_path / "runs"), *arguments])
    assert said in str(runner.exception)
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


@pytest.mark.slow
def test_a_preempted_training_of_two_processes_comes_to_the_same_end(tmp_path):
    images = write_tiny_dataset(tmp_path / "images")
    settings = tiny_experiment(images, train={"gpus": 2, "steps": 24, "save_every": 10})
    whole = create_run(settings, tmp_path / "whole")
    subprocess.run(training_command(whole, 2), env=ENVIRONMENT, check=True, capture_output=True)

    experiment = tmp_path / "tiny.yaml"
    experiment.write_text(settings.to_yaml())
    command = [sys.executable, "-m", "solq_lab", "train", str(experiment), "--runs-dir", str(tmp_path / "parts")]
    follower = subprocess.Popen([*command, "--cluster", "local"], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE)
    folder = tmp_path / "parts" / "tiny"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and load_run(folder).metrics("train")[5:])
    tell_its_task(read_json(folder / "train.job.json")["job_id"], signal.SIGUSR2)
    output, _ = follower.communicate(timeout=180)
    assert follower.returncode == 0
    assert f"weights   {folder / 'weights.safetensors'}" in output
    assert "saved at step" in (folder / "train.log").read_text()
    assert what_was_learned(load_run(folder)) == what_was_learned(whole)
