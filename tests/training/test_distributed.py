"""Several processes train as one does, detect lost ranks, and stop together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from losses_and_weights import write_losses_and_weights
from processes import in_process_group
from tiny import tiny_experiment, write_tiny_dataset
from training_runs import ENVIRONMENT, new_run, wait_for

from solq_lab import distributed
from solq_lab.build import build_model
from solq_lab.heartbeat import Failure, Heartbeat, HeartbeatMonitor, ProcessLost
from solq_lab.shared_memory import CHUNK, COUNTERS, SharedMemory
from solq_lab.training import torchrun
from solq_lab.training.checkpoint import step_folders
from solq_lab.training.step import share_gradients
from solq_lab.training.trainer import train_run
from solq_lab.workbench.trainings import training_command

# ---------------------------------------------------------------------------------------------------- the same numbers


def four_steps(run, *, processes=1, frozen):
    in_process_group(write_losses_and_weights, run.folder, run.folder / "found.pt", frozen, processes=processes)
    return torch.load(run.folder / "found.pt", weights_only=True)


@pytest.mark.parametrize(
    ("processes", "train"),
    [
        (2, {"gpus": 0}),
        (2, {"gpus": 2, "accumulate": 2}),
        pytest.param(4, {"gpus": 4}, marks=pytest.mark.slow),
        pytest.param(2, {"gpus": 2, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_as_one_even_where_a_batch_has_no_object(data_root, tmp_path, processes, train):
    frozen = "accumulate" in train  # a batch norm sees the images of one pass
    runs = [
        new_run(data_root, tmp_path / name, model={"dropout": 0.0}, train={"batch_size": 8, **settings})
        for name, settings in (("whole", {}), ("parts", train))
    ]
    alone, found = four_steps(runs[0], frozen=frozen), four_steps(runs[1], processes=processes, frozen=frozen)
    if processes == 4 or frozen:
        assert any(0 in share for step in found["objects"] for share in step)
    for step, expected in zip(found["losses"], alone["losses"], strict=True):
        assert step == pytest.approx(expected, rel=1e-11)  # float64, summed in another order
    for name, weights in alone["weights"].items():
        assert torch.allclose(found["weights"][name], weights, rtol=0, atol=1e-10), name


SUMMED = [((), torch.float64), ((3, 2), torch.float32), ((700_000,), torch.float32), ((0,), torch.float32)]  # two turns


def test_sums_in_shared_memory_are_those_of_all_processes_and_end_with_a_lost_one(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    memory, monitor = np.zeros(2 * (COUNTERS + 2 * CHUNK), dtype=np.uint8), SimpleNamespace(failure=None)
    parts = [[torch.randn(size, dtype=dtype) for size, dtype in SUMMED] for _ in range(2)]
    sums = [first + second for first, second in zip(*parts, strict=True)]
    members = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        members.append(SharedMemory(memory, monitor))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda member, own: [member.all_reduce(part) for part in own], members, parts))
    for own in parts:
        assert all(map(torch.equal, own, sums))
    with ThreadPoolExecutor() as pool, pytest.raises(RuntimeError, match=r"different sizes: \[4, 8\] bytes"):
        list(pool.map(lambda member, size: member.all_reduce(torch.ones(size)), members, (1, 2)))
    monitor.failure = Failure(1, "rank 1 died", 0)
    with pytest.raises(ProcessLost, match="rank 1 died"):
        members[0].all_reduce(torch.ones(1))


@pytest.mark.parametrize(("backbone", "sent"), [("small", False), ("resnet50", False), ("timm:resnet18", True)])
def test_buffers_are_sent_where_batch_norms_see_the_images_of_one_process(monkeypatch, backbone, sent):
    model = build_model(tiny_experiment(".", model={"backbone": backbone, "pretrained": "none"}), 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    try:
        assert share_gradients(model, torch.device("cpu"), micro_batches=1).broadcast_buffers is sent
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ the monitor by itself

TIMEOUT = 3.0


@pytest.fixture
def store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def monitoring(store, rank, *, world_size=2, timeout=TIMEOUT):
    own = dist.TCPStore("localhost", store.port, is_master=False, timeout=timedelta(seconds=timeout))
    with HeartbeatMonitor(own, rank=rank, world_size=world_size, timeout=timeout, on_fatal=pytest.fail) as monitor:
        yield monitor


def beat(store, rank, pid, *, node=None, finished=False):
    """Write a heartbeat of a rank without a monitor; its node is this machine's unless another one is given."""
    host = socket.gethostname()
    store.set(f"heartbeat/0/{rank}", json.dumps(Heartbeat(host, pid, node or f"{host} None", 17, 1, finished)))


def failure_of(monitor) -> Failure:
    wait_for(lambda: monitor.failure is not None, seconds=20)
    return monitor.failure


def test_a_rank_with_heartbeats_is_never_lost_however_long_it_works(store):
    with monitoring(store, 0) as first, monitoring(store, 1) as second:
        time.sleep(2 * TIMEOUT)
        assert first.failure is None
        assert second.failure is None


def test_a_process_that_died_is_named_with_its_step(store):
    dead = subprocess.Popen(["true"])
    with monitoring(store, 0) as monitor:
        beat(store, 1, os.getpid())
        wait_for(lambda: monitor._seen)
        beat(store, 1, dead.pid)
        wait_for(lambda: monitor._seen[1][0].pid == dead.pid)
        dead.wait()
        failure = failure_of(monitor)
        who = f"rank 1 of 2 ({socket.gethostname()}, process {dead.pid})"
        assert failure.message == f"{who} died, killed from outside or out of memory; it had done 17 steps"
        assert isinstance(monitor.diagnose(dist.DistBackendError("connection closed")), ProcessLost)


def test_a_process_that_left_in_order_is_not_lost(store):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with monitoring(store, 0) as monitor:
        beat(store, 1, gone.pid, finished=True)
        time.sleep(2 * TIMEOUT)
        assert monitor.failure is None


@pytest.mark.parametrize(("node", "killed"), [(None, True), ("another machine", False)])
def test_a_silent_process_is_named_and_killed_where_it_is_on_this_node(store, node, killed):
    silent = subprocess.Popen(["sleep", "60"])
    try:
        with monitoring(store, 0) as monitor:
            beat(store, 1, silent.pid, node=node)
            assert "sent no heartbeat for" in failure_of(monitor).message
            wait_for(monitor._failed.is_set)
            if killed:
                assert silent.wait(10) == -signal.SIGKILL
            else:
                assert silent.poll() is None
    finally:
        silent.kill()
        silent.wait()


def test_an_error_of_one_rank_stays_an_error_and_is_published_to_the_others(store):
    with monitoring(store, 0) as first, monitoring(store, 1) as second:
        error = ValueError("an image is missing")
        assert second.diagnose(error) is error
        failure = failure_of(first)
        assert failure.rank == 1
        assert "failed: ValueError: an image is missing" in failure.message
        assert first.is_reporting_rank()
        assert not second.is_reporting_rank()
        assert str(first.diagnose(dist.DistBackendError("connection closed"))) == failure.message


def test_where_rank_0_is_lost_its_reporter_writes_the_status(store):
    with monitoring(store, 1, world_size=3) as second, monitoring(store, 2, world_size=3) as third:
        beat(store, 0, os.getpid(), node="another machine")
        failures = failure_of(second), failure_of(third)
        assert failures[0] == failures[1]
        assert [second.is_reporting_rank(), third.is_reporting_rank()].count(True) == 1


def test_a_monitor_that_was_itself_stopped_reports_no_failure(store):
    with monitoring(store, 0, timeout=60.0) as monitor:
        beat(store, 1, os.getpid(), node="another machine")
        wait_for(lambda: monitor._seen)
        monitor._seen[1] = (monitor._seen[1][0], time.monotonic() - 100.0)
        monitor._last_check = time.monotonic() - 100.0
        time.sleep(3.0)
        assert monitor.failure is None


# -------------------------------------------------------------------------------------------------- the rendezvous


@pytest.mark.parametrize(("backend", "devices"), [("nccl", [1]), ("gloo", None)])
def test_processes_wait_for_each_other_on_the_gpu_that_is_their_own(backend, devices, monkeypatch):
    waited = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dist, "barrier", lambda device_ids: waited.append(device_ids))
    distributed.wait_for_all()
    assert waited == [devices]


def test_the_rendezvous_is_a_free_port_here_unless_given():
    assert torchrun.rendezvous_options(["--nproc-per-node=2"], {}) == ["--standalone"]
    assert torchrun.rendezvous_options(["--nproc-per-node=2"], {"SLURM_STEP_NUM_NODES": "1"}) == ["--standalone"]
    assert torchrun.rendezvous_options(["--nnodes=2", "--rdzv_endpoint=a:1"], {"SLURM_STEP_NUM_NODES": "2"}) == []


def test_the_rendezvous_of_a_slurm_step_is_on_its_first_machine(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] && printf "gpu07\\ngpu08\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "1234567"}
    here = torchrun.rendezvous_options(["--nproc-per-node=8"], step)
    assert here == ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1234567.0", "--rdzv-endpoint=gpu07:24567"]
    again = torchrun.rendezvous_options([], step | {"SLURM_RESTART_COUNT": "3"})
    assert "--rdzv-id=1234567.3" in again


# ------------------------------------------------------------------------------------------------------------- faults


def children_of(pid):
    return [child.pid for child in psutil.Process(pid).children()]


def is_open(port):
    with socket.socket() as visitor:
        return visitor.connect_ex(("localhost", port)) == 0


def rank_of(pid):
    return int(psutil.Process(pid).environ()["RANK"])


class Started:
    """A training of several processes that has done some steps."""

    def __init__(self, run, processes, *, until):
        self.run = run
        with run.log_file.open("ab") as output:
            self.launcher = subprocess.Popen(
                training_command(run, processes), env=ENVIRONMENT, stderr=output, start_new_session=True
            )
        wait_for(lambda: self.launcher.poll() is not None or until(run))
        assert self.launcher.poll() is None, run.log_file.read_text()
        self.ranks = sorted(children_of(self.launcher.pid), key=rank_of)
        assert len(self.ranks) == processes

    def wait(self, seconds=60.0):
        """The launcher's exit status, once it and all processes are gone."""
        status = self.launcher.wait(seconds)
        wait_for(lambda: not any(map(psutil.pid_exists, self.ranks)), seconds)
        return status


def newest_checkpoint(run):
    return max((int(path.name.removeprefix("step_")) for path in step_folders(run.checkpoints)), default=0)


@pytest.fixture
def start(data_root, tmp_path):
    started = []

    def start_training(processes, *, until=lambda run: newest_checkpoint(run) >= 5, data_root=data_root, **train):
        settings = {"gpus": processes, "steps": 5000, "save_every": 5, "rank_timeout": 8.0} | train
        run = new_run(data_root, tmp_path / "parts", model={"dropout": 0.0}, train=settings)
        started.append(Started(run, processes, until=until))
        return started[-1]

    yield start_training
    for one in started:
        for pid in (one.launcher.pid, *one.ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.launcher.wait()


@pytest.mark.slow
def test_kill_9_of_one_of_four_ends_the_others_and_the_run_resumes(start):
    training = start(4, steps=40)
    os.kill(training.ranks[2], signal.SIGKILL)
    assert training.wait() == 1
    run, status = training.run, training.run.status()
    assert status["state"] == "failed"
    assert f"ProcessLost: rank 2 of 4 ({socket.gethostname()}, process {training.ranks[2]}) died" in status["message"]
    assert newest_checkpoint(run) >= 5
    assert train_run(run) == "finished"  # one process that takes all four passes
    assert [line["step"] for line in run.metrics("train")] == list(range(1, 41))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_is_detected_named_and_killed(start, rank):
    training = start(2)
    os.kill(training.ranks[rank], signal.SIGSTOP)
    assert training.wait() == 1
    status = training.run.status()
    assert status["state"] == "failed"
    assert (
        f"rank {rank} of 2 ({socket.gethostname()}, process {training.ranks[rank]}) sent no heartbeat"
        in status["message"]
    )
    assert newest_checkpoint(training.run) >= 5


@pytest.mark.slow
def test_without_their_launcher_the_processes_save_and_stop(start):
    training = start(2)
    os.kill(training.launcher.pid, signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL
    status = training.run.status()
    assert status["state"] == "preempted"
    assert newest_checkpoint(training.run) == status["step"]
    reason = f"the launcher, process {training.launcher.pid} on {socket.gethostname()}, is gone"
    assert reason in training.run.log_file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["the first machine", "the second machine"])
def test_a_lost_machine_ends_the_training_on_the_other_with_a_message(data_root, tmp_path, lost):
    run = new_run(data_root, tmp_path, train={"gpus": 2, "steps": 5000, "save_every": 5, "rank_timeout": 8.0})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = f"--rdzv-endpoint=localhost:{port}"
    command = [*training_command(run, 1, nodes=2)[:-1], "--nnodes=2", "--rdzv-backend=c10d", meeting, str(run.folder)]
    with run.log_file.open("ab") as output:
        launchers = [subprocess.Popen(command, env=ENVIRONMENT, stderr=output)]
        wait_for(lambda: is_open(port))  # the first machine is the rendezvous
        launchers.append(subprocess.Popen(command, env=ENVIRONMENT, stderr=output))
    try:
        wait_for(lambda: newest_checkpoint(run) >= 5)
        gone, left = launchers if lost == "the first machine" else reversed(launchers)
        for pid in (gone.pid, *children_of(gone.pid)):
            os.kill(pid, signal.SIGKILL)
        assert left.wait(60) == 1
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()
    assert run.status()["state"] == "failed"
    assert run.status()["message"].startswith("ProcessLost: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_lets_all_save_and_end_with_status_0(start, number):
    with socket.socket() as taken, contextlib.suppress(OSError):
        taken.bind(("localhost", 29500))  # torchrun's usual port is not needed
    training = start(2)
    os.kill(training.launcher.pid, number)
    assert training.wait() == 0
    status = training.run.status()
    assert (status["state"], status["message"]) == ("preempted", number.name)
    assert newest_checkpoint(training.run) == status["step"]


@pytest.mark.slow
def test_a_stop_of_one_process_stops_all_and_fewer_resume_to_the_same_end(start, data_root, tmp_path):
    training = start(2, steps=40)
    os.kill(training.ranks[1], signal.SIGTERM)
    assert training.wait() == 0
    run = training.run
    assert (run.status()["state"], run.status()["message"]) == ("preempted", "another process was stopped")
    assert run.status()["step"] < 40
    assert train_run(run) == "finished"  # one process, two passes per step
    whole = new_run(data_root, tmp_path / "whole", model={"dropout": 0.0}, train={"gpus": 2, "steps": 40})
    train_run(whole)
    for line, expected in zip(run.metrics("train"), whole.metrics("train"), strict=True):
        assert line["total"] == pytest.approx(expected["total"], rel=0.02)  # float32, and AdamW enlarges rounding


@pytest.mark.slow
def test_a_stop_during_an_evaluation_of_two_processes_ends_it_and_saves(start, tmp_path):
    many = write_tiny_dataset(tmp_path / "many", val=600)
    training = start(2, until=lambda run: newest_checkpoint(run) == 3, data_root=many, evaluate_every=1)
    os.kill(training.launcher.pid, signal.SIGTERM)
    assert training.wait() == 0
    status = training.run.status()
    assert (status["state"], status["step"], status["message"]) == ("preempted", 3, "SIGTERM")
    assert training.run.metrics("evaluation") == []
