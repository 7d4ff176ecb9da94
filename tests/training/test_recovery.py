"""Trainings that are stopped, killed, or out of disk or memory: the cause is named and nothing is lost."""

import ast
import contextlib
import errno
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPOSITORY
from tiny import tiny_experiment
from training_runs import ENVIRONMENT, before_each_step, signal_after, training, wait_for, what_was_learned

from solq_lab.config import load_experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.runs import RunError, create_run
from solq_lab.training import signals
from solq_lab.training import trainer as module
from solq_lab.training.checkpoint import SaveError, step_folders
from solq_lab.training.faults import DiskFull, OutOfMemory, explain_fault
from solq_lab.training.trainer import Trainer, train_run
from solq_lab.workbench.trainings import follow_training, start_training

WITH_EVERY_STATE = {"ema": 0.9, "accumulate": 2, "evaluate_every": 2}  # what a resumed training could forget


@pytest.fixture(scope="module")
def whole(data_root, tmp_path_factory):
    """Weights and metrics of a training that nothing happened to."""
    run = create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE), tmp_path_factory.mktemp("whole"))
    train_run(run)
    return what_was_learned(run)


@pytest.fixture
def run(data_root, tmp_path):
    return create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE), tmp_path / "runs")


def interrupt(number=signal.SIGTERM):
    """Send this process a signal, then block for a minute."""
    os.kill(os.getpid(), number)
    time.sleep(60)


def stopped_within(seconds, run):
    """The status of a run that stops itself, within some seconds."""
    started = time.monotonic()
    assert train_run(run) == "preempted"
    assert time.monotonic() - started < seconds
    assert run.status()["state"] == "preempted"
    return run.status()


def assert_resumes(run, whole):
    """The run goes on to the same end as one that nothing happened to."""
    assert train_run(run) == "finished"
    assert what_was_learned(run) == whole


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("phase", ["prepare_data", "build_model", "measure_start", "build_optimizer"])
def test_a_stop_in_start_up_ends_at_once_and_leaves_nothing_half_done(run, whole, monkeypatch, phase):
    with monkeypatch.context() as patch:
        patch.setattr(module, phase, lambda *_, **__: interrupt())
        assert stopped_within(30, run)["message"] == "SIGTERM"
    assert step_folders(run.checkpoints) == []
    assert_resumes(run, whole)


def test_a_stop_while_resuming_leaves_the_checkpoint_for_the_next_time(run, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(CocoDataset, "__getitem__", interrupted_after(12 + 9))
        step = stopped_within(30, run)["step"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_restore", lambda *_: interrupt(signal.SIGUSR1))
        assert stopped_within(30, run) | {"time": 0} == run.status() | {"time": 0}
        assert (run.status()["step"], run.status()["message"]) == (step, "SIGUSR1")
    assert_resumes(run, whole)


def test_a_stop_in_an_evaluation_saves_and_resuming_repeats_the_evaluation(run, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_model", lambda *_, **__: interrupt())
        assert stopped_within(30, run)["step"] == 6
    assert run.metrics("evaluation") == []
    assert_resumes(run, whole)


def test_a_stop_in_the_last_evaluation_leaves_only_that_to_do(run, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_run", lambda *_, **__: interrupt(signal.SIGINT))
        assert stopped_within(30, run)["step"] == 8
    assert not run.results.exists()
    before_each_step(monkeypatch, lambda *_: pytest.fail("all steps were done"))
    assert_resumes(run, whole)


def interrupted_after(images):
    """A data set whose next image after so many takes a minute to read, while a signal arrives.

    The 12 images of the training set are read once before the first step, for the statistics of their vectors.
    """
    read, count = CocoDataset.__getitem__, iter(range(images))

    def slow(self, key):
        if next(count, None) is None:
            os.kill(os.getppid() if torch.utils.data.get_worker_info() else os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return read(self, key)

    return slow


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_while_a_slow_disk_is_waited_for_does_not_wait(data_root, tmp_path, whole, monkeypatch, workers):
    run = create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE, data={"workers": workers}), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(CocoDataset, "__getitem__", interrupted_after(12 + 9))
        assert stopped_within(30, run)["step"] in (range(3) if workers else [2])  # a worker reads ahead
    assert_resumes(run, whole)


@pytest.mark.parametrize("numbers", [[signal.SIGINT, signal.SIGINT, signal.SIGTERM], [signal.SIGUSR1]])
def test_a_signal_that_torchrun_sends_once_more_is_no_second_one(run, monkeypatch, numbers):
    signal_after(monkeypatch, 4, *numbers)
    assert train_run(run) == "preempted"
    assert run.status()["message"] == numbers[0].name
    assert step_folders(run.checkpoints)[-1].name == "step_0000004"


def test_a_second_ctrl_c_does_not_wait_for_the_saving_and_costs_the_steps_since(run, whole, monkeypatch):
    monkeypatch.setattr(signals, "FORWARDED_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        signal_after(patch, 5, signal.SIGINT, signal.SIGINT, pause=0.1)
        with pytest.raises(KeyboardInterrupt):
            train_run(run)
    status = run.status()
    expected = ("preempted", 3, "a second Ctrl-C, without saving")
    assert (status["state"], status["step"], status["message"]) == expected
    assert [path.name for path in step_folders(run.checkpoints)] == ["step_0000003"]
    assert_resumes(run, whole)


# ------------------------------------------------------------------------------------------- disk, memory, clock, files


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"only root may mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, leave):
    """Fill a disk but for `leave` bytes, and return the file that does it."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - leave))
    return filler


def test_a_full_disk_is_named_and_costs_no_checkpoint(data_root, small_disk, whole, monkeypatch):
    run = create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE), small_disk)
    save, fillers = module.save_checkpoint, []

    def save_on_a_full_disk(folder, checkpoint, **about):
        if checkpoint.step == 6:
            fillers.append(fill(small_disk, leave=100_000))
        save(folder, checkpoint, **about)

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_checkpoint", save_on_a_full_disk)
        with pytest.raises(SaveError, match=r"step_0000006 could not be written .* 0\.1 MB are free; step_0000003"):
            train_run(run)
    assert run.status()["state"] == "failed"
    assert "Make room; re-running resumes from the last checkpoint" in run.status()["message"]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_0000003"]
    fillers[0].unlink()
    assert_resumes(run, whole)


def test_on_a_disk_without_any_room_not_even_the_status_can_be_written_and_nothing_is_lost(
    data_root, small_disk, whole, monkeypatch, caplog
):
    run = create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE), small_disk)
    append, fillers = type(run).append_metrics, []

    def append_on_a_full_disk(self, line):
        if line["step"] == 5:
            fillers.append(fill(small_disk, leave=0))
        append(self, line)

    with monkeypatch.context() as patch:
        patch.setattr(type(run), "append_metrics", append_on_a_full_disk)
        with pytest.raises((SaveError, DiskFull), match=r"No space left on device.* 0\.0 MB are free"):
            train_run(run)
    assert f"{run.folder}: failed could not be written" in caplog.text
    assert (run.status()["state"], run.status()["step"]) == ("training", 3)
    assert not run.is_training()
    fillers[0].unlink()
    assert_resumes(run, whole)


def test_a_full_disk_is_distinguished_from_other_errors(run):
    full = explain_fault(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), run)
    assert isinstance(full, DiskFull)
    assert f"{run.folder}: the disk is full ([Errno 28] No space left on device: 'metrics.jsonl'; " in str(full)
    assert "make room; re-running resumes from the last checkpoint" in str(full)
    for other in (OSError(errno.EIO, "Input/output error"), RuntimeError("shapes differ"), ValueError("out of memory")):
        assert explain_fault(other, run) is other


def test_a_file_that_may_not_grow_is_a_disk_without_room(tmp_path):
    """Without the right to mount: the limit of a process's files, in a child."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from solq_lab.training.checkpoint import *\n"
        "folder = Path(sys.argv[1])\n"
        "save_checkpoint(folder, Checkpoint(1, {'a': torch.ones(9)}, {}), experiment='', classes='')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save_checkpoint(folder, Checkpoint(2, {'a': torch.ones(99_999)}, {}), experiment='', classes='')\n"
        "except SaveError as error: print(error, load_newest_checkpoint(folder).step)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, env=ENVIRONMENT)
    assert "step_0000002 could not be written" in done.stdout, done.stderr
    assert done.stdout.endswith("resumes from the last checkpoint 1\n")
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]


def ask_a_gpu_for_too_much():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("exhaust", [lambda: bytearray(2**62), lambda: torch.empty(2**45), ask_a_gpu_for_too_much])
def test_out_of_memory_names_the_settings_that_take_less(run, whole, monkeypatch, exhaust):
    with monkeypatch.context() as patch:
        before_each_step(patch, lambda trainer, batches: exhaust() if trainer.step == 4 else None)
        with pytest.raises(OutOfMemory) as caught:
            train_run(run)
    message = str(caught.value)
    assert message.startswith("out of memory (")
    assert "train.batch_size 4 gives micro-batches of 2 images (gpus 1, accumulate 2)" in message
    assert "train.accumulate=4 (the same batch in smaller micro-batches); train.gradient_checkpointing=true" in message
    assert run.status()["message"] == f"OutOfMemory: {message}"
    assert_resumes(run, whole)


def test_after_out_of_memory_a_run_resumes_with_smaller_micro_batches(data_root, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_after(patch, 4, signal.SIGTERM)
        train_run(run)
    smaller = tiny_experiment(data_root, train=WITH_EVERY_STATE | {"accumulate": 4})
    run = create_run(smaller, tmp_path / "runs")
    assert run.experiment.train.accumulate == 4
    assert train_run(run) == "finished"
    assert [line["step"] for line in run.metrics("train")] == list(range(1, 9))
    with pytest.raises(RunError, match=r"differs in train\.accumulate \(there 4, asked 2\)"):  # finished with 4
        create_run(tiny_experiment(data_root, train=WITH_EVERY_STATE), tmp_path / "runs")


def test_a_damaged_line_of_metrics_is_named_and_the_training_resumes(run, whole, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        signal_after(patch, 4, signal.SIGTERM)
        train_run(run)
    first, second, *others = run.metrics_file.read_bytes().splitlines(keepends=True)
    for damage in (b"\0" * 80, b'{"kind": "train", "step": "x"}', b"[3]", second[:30]):
        run.metrics_file.write_bytes(b"".join([first, damage + b"\n", *others, b'{"torn']))
        caplog.clear()
        run.metrics()
        assert f"{run.metrics_file}: line 2 is damaged and left out" in caplog.text
    assert train_run(run) == "finished"
    lines, learned = what_was_learned(run)
    assert learned == whole[1]
    assert lines == [whole[0][0], *whole[0][2:]]  # all but the damaged one


def test_a_clock_that_jumps_changes_nothing(run, whole, monkeypatch):
    jumps = iter(range(10**6))
    clock = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + (-1) ** next(jumps) * 86400.0)
        signal_after(patch, 5, signal.SIGTERM)
        assert train_run(run) == "preempted"
        assert not run.is_training()
    assert_resumes(run, whole)
    seconds = [line["seconds"] for line in run.metrics("train")]
    assert 0 < seconds[0] < seconds[-1] < 600
    assert seconds == sorted(seconds)
    assert all(line["images_per_second"] > 0 for line in run.metrics("train"))


# ------------------------------------------------------------------------------------------------ the table of faults


def test_every_test_in_the_table_of_faults_exists_and_every_fault_has_one():
    table = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith(("| fault", "|---"))]
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            parsed = ast.parse((REPOSITORY / "tests" / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in parsed.body if isinstance(node, ast.FunctionDef)}, row


# -------------------------------------------------------------------------------------------- processes of their own


def handles(pid, number):
    """Whether a process has a handler for a signal."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def descendants(process):
    return psutil.Process(process.pid).children(recursive=True)


def name_of(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()


def is_running(process):
    """Whether a process exists and is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_stop_while_torch_is_imported_is_handled(run):
    with training(run) as process:
        wait_for(lambda: handles(process.pid, signal.SIGTERM), process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert run.status()["state"] == "preempted"
    assert run.metrics() == []


def test_a_second_trainer_is_rejected_with_the_first_ones_process_and_host(run):
    with run.locked(), training(run) as process:
        assert process.wait(60) == 2
        said = process.stderr.read()
    assert f"process {os.getpid()} on {os.uname().nodename} is training here" in said
    assert "Traceback" not in said
    assert run.status()["state"] == "created"  # the rejected one has written nothing


def test_a_lock_file_of_a_dead_process_locks_nothing(run):
    (run.folder / "trainer.lock").write_text(json.dumps({"pid": 1, "host": os.uname().nodename}))  # 1 always lives
    assert not run.is_training()
    with run.locked():
        assert json.loads((run.folder / "trainer.lock").read_text())["pid"] == os.getpid()


def test_the_loader_processes_of_a_killed_trainer_end(data_root, tmp_path):
    run = create_run(tiny_experiment(data_root, train={"steps": 1000}, data={"workers": 2}), tmp_path)
    with training(run) as process:
        wait_for(lambda: run.metrics("train"), process=process)
        loaders = descendants(process)
        assert len(loaders) >= 2
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_running, loaders)), 30)


def test_a_stop_while_shapes_are_drawn_leaves_no_half_data_set_and_no_process(data_root, tmp_path):
    drawn = tmp_path / "drawn"
    names = {
        f"{split}_{what}": name
        for split in ("train", "val")
        for what, name in (("images", split), ("annotations", f"annotations/instances_{split}.json"))
    }
    data = {"root": str(drawn), "generate": "easy", "generate_train": 20_000} | names
    run = create_run(tiny_experiment(data_root, data=data), tmp_path / "runs")
    with training(run) as process:
        wait_for(lambda: any(tmp_path.glob(".drawn-*/train/000002.png")), process=process)
        drawing = descendants(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
    assert run.status()["state"] == "preempted"
    assert not drawn.exists()
    assert not list(tmp_path.glob(".drawn-*"))
    assert not any(map(is_running, drawing))


@pytest.mark.slow
def test_a_stop_while_the_operators_are_compiled_leaves_no_half_library_and_no_compiler(run, tmp_path):
    cache = tmp_path / "extensions"
    with training(run, TORCH_EXTENSIONS_DIR=str(cache)) as process:
        wait_for(lambda: "cc1plus" in map(name_of, descendants(process)), process=process)
        compiling = descendants(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stderr.read()
    assert run.status()["state"] == "preempted"
    assert not list(cache.glob("*/*.so"))
    assert not list(cache.glob("*/*building*"))
    wait_for(lambda: not any(map(is_running, compiling)), 10)


@pytest.mark.slow
def test_a_port_in_use_is_not_used(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = create_run(tiny_experiment(data_root, train={"steps": 2, "gpus": 2}), tmp_path)
    with socket.socket() as usual:
        usual.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # somebody else has it, which is as good
            usual.bind(("", 29500))
            usual.listen()
        start_training(run.folder)
        assert follow_training(run.folder, interval=0.2).status()["state"] == "finished"


def interrupted_at(run, steps, numbers):
    """Train a run in child processes that get a signal after each of `steps`; return how each of them ended."""
    ends = []
    for step, number in zip(steps, numbers, strict=True):
        with training(run) as process:
            wait_for(
                lambda process=process: run.status()["pid"] == process.pid, process=process
            )  # it has begun its steps
            wait_for(lambda step=step: any(line["step"] >= step for line in run.metrics("train")), process=process)
            process.send_signal(number)
            ends.append(process.wait(60))
    with training(run) as process:
        assert process.wait(180) == 0, process.stderr.read()
    return ends


def assert_five_interruptions_change_nothing(experiment, folder):
    """Two kill -9 and each of the stop signals, at random steps: the same bytes in the end."""
    whole, parts = create_run(experiment, folder / "whole"), create_run(experiment, folder / "parts")
    with training(whole) as process:
        assert process.wait(180) == 0, process.stderr.read()
    seed = random.randrange(10**6)
    drawn = random.Random(seed)
    steps = sorted(drawn.sample(range(2, experiment.train.steps - 2), 5))
    numbers = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    drawn.shuffle(numbers)
    ends = interrupted_at(parts, steps, numbers)
    about = f"seed {seed}: {[f'{number.name} after step {step}' for number, step in zip(numbers, steps, strict=True)]}"
    assert ends == [-number if number == signal.SIGKILL else 0 for number in numbers], about
    assert what_was_learned(parts) == what_was_learned(whole), about


@pytest.mark.slow
def test_five_interruptions_change_no_bit_of_a_training_on_shapes(tmp_path):
    overrides = [
        *(f"data.root={tmp_path / 'shapes'}", "data.generate_train=100", "data.generate_val=8", "data.workers=1"),
        *("model.encoder_layers=1", "model.decoder_layers=2", "model.queries=10", "model.dropout=0.1"),
        *("train.steps=40", "train.batch_size=4", "train.accumulate=2", "train.ema=0.99", "train.save_every=7"),
        *("train.evaluate_every=1", "train.log_every=1", "train.threads=1"),
    ]
    experiment = load_experiment(REPOSITORY / "experiments" / "shapes.yaml", overrides)
    assert experiment.data.augment != "none"
    assert_five_interruptions_change_nothing(experiment, tmp_path)


@pytest.mark.slow
def test_five_interruptions_change_no_bit_of_a_training_on_coco_images(coco_tiny, tmp_path):
    overrides = [
        *(f"data.root={coco_tiny}", "data.augment=released", "data.train_scales=[96, 128]", "data.max_size=192"),
        *("data.crop_scales=[100, 120]", "data.crop_size=[64, 100]", "data.workers=1", "data.cache=false"),
        *("model.encoder_layers=1", "model.decoder_layers=2", "model.queries=20", "model.dropout=0.1"),
        *("train.steps=30", "train.batch_size=4", "train.accumulate=2", "train.ema=0.99", "train.save_every=7"),
        *("train.evaluate_every=2", "train.log_every=1", "train.threads=1", "evaluation.max_images=6"),
    ]
    experiment = load_experiment(REPOSITORY / "experiments" / "coco_small.yaml", overrides)
    assert_five_interruptions_change_nothing(experiment, tmp_path)
