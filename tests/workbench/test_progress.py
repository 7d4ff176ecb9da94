"""The progress line: right numbers, no torn lines, an estimate once there is something to estimate from."""

import time

import pytest
from tqdm.auto import tqdm

from solq_lab import bars
from solq_lab.config import Experiment
from solq_lab.progress import Progress, describe_duration, status_line
from solq_lab.runs import create_run


@pytest.fixture
def run(tmp_path):
    return create_run(Experiment(name="a", train={"batch_size": 10, "epochs": 2}), tmp_path)


def train_line(step: int, speed: float = 5.0) -> dict:
    return {"kind": "train", "step": step, "total": 12.345, "images_per_second": speed}


START = {"kind": "start", "total_steps": 100}
APS = {"kind": "evaluation", "step": 5, "metrics": {"box.AP": 0.25, "segm.AP": 0.125}}


@pytest.mark.parametrize(
    ("lines", "ending"),
    [
        ([], "a: starting"),
        ([START, train_line(10)], "a: step 10 of 100 (10 %), loss 12.35, 5.0 images/s"),  # too early to guess the rest
        ([START, train_line(40)], "5.0 images/s, 2 min left"),  # 60 steps of 10 images
        ([APS, train_line(6)], "5.0 images/s, box AP 25.0, segm AP 12.5"),
        ([APS | {"metrics": {"box.AP": None}}, train_line(6)], "5.0 images/s"),  # an AP that does not exist is left out
    ],
)
def test_the_line_tells_steps_loss_speed_time_left_and_the_last_ap(run, lines, ending):
    for line in lines:
        run.append_metrics(line)
    assert Progress(run).read().endswith(ending)


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 0), (0.6, 3)])
def test_a_bar_in_a_log_file_is_a_line_now_and_then_of_long_work(monkeypatch, capsys, seconds, lines):
    monkeypatch.setattr(bars, "SECONDS_BETWEEN_LINES", 0.2)
    for _ in bars.progress_bar(range(100), desc="work"):
        time.sleep(seconds / 100)
        tqdm.write("a line of its own")
    assert abs(capsys.readouterr().err.count("work") - lines) <= seconds * 2


def test_only_whole_lines_count(run):
    progress = Progress(run)
    run.append_metrics(train_line(1))
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    assert "step 1," in progress.read()
    with run.metrics_file.open("a") as file:
        file.write('ep": 2, "total": 1, "images_per_second": 1}\n')
    assert "step 2," in progress.read()


def test_lines_that_a_resumed_training_took_back_are_forgotten(run):
    progress = Progress(run)
    for step in (1, 2, 3):
        run.append_metrics(train_line(step))
    assert "step 3," in progress.read()
    run.rewind_metrics(1)
    assert "step 1," in progress.read()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (600, "10 min"), (18720, "5.2 h"), (129600, "1.5 days")],
)
def test_a_duration_is_told_in_the_unit_a_person_would_choose(seconds, said):
    assert describe_duration(seconds) == said


@pytest.mark.parametrize(
    ("texts", "written"), [([f"line {n}" for n in range(1000)], "line 0\nline 999\n"), (["once"] * 2, "once\n")]
)
def test_a_log_file_gets_the_first_and_the_last_text_and_none_twice(capsys, texts, written):
    with status_line() as show:
        for text in texts:
            show(text)
    assert capsys.readouterr().err == written
