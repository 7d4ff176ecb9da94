"""The experiment files: each one loads, says what to expect, and gives a command that works."""

import re
import shlex

import pytest
import yaml
from conftest import REPOSITORY

from solq_lab.config import Experiment, load_experiment
from solq_lab.workbench.parameters import check_parameters

FOLDERS = (REPOSITORY / "experiments", REPOSITORY / "experiments" / "plus")
FILES = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml") if path.stem != "paper_results")
IDS = [path.stem for path in FILES]


def header(path) -> str:
    lines = path.read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines[: [*map(is_comment, lines), False].index(False)])


def is_comment(line: str) -> bool:
    return line.startswith("#")


def leaves(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_loads_under_its_own_name(path):
    assert load_experiment(path).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_opens_with_what_to_expect_the_time_and_the_command(path):
    text = header(path)
    assert len(text.splitlines()) >= 3
    if path.stem != "defaults":
        assert re.search(r"Expect|Published", text)
        assert "Time:" in text
        assert "Command" in text


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_the_command_in_its_header_is_valid(path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    commands = [line for line in header(path).splitlines() if line.startswith("solq-lab run")]
    assert len(commands) == (path.stem != "defaults")
    for command in commands:
        _, _, notebook, experiment, *overrides = shlex.split(command)
        check_parameters(notebook, {"experiment": experiment, "overrides": overrides, "runs_dir": "runs"})
        assert load_experiment(experiment, overrides).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_it_repeats_no_number_of_its_parent(path):
    """But for the demonstration in solq_r50.yaml, which spells the paper's numbers out."""
    values = yaml.safe_load(path.read_text())
    parent = values.pop("extends", None)
    inherited = load_experiment(path.parent / parent) if parent else Experiment(name="schema")
    before = leaves(inherited.model_dump(mode="json"))
    repeated = [key for key, value in leaves(values).items() if before[key] == value]
    assert repeated == [] or path.stem == "solq_r50", repeated


def test_the_released_experiment_is_the_released_size():
    experiment = load_experiment(REPOSITORY / "experiments" / "solq_r50_official.yaml")
    assert (experiment.model.width, experiment.data.class_ids, experiment.data.mask_route) == (384, "raw", "bitmap")
    assert (experiment.codec.mask_size, experiment.codec.vector_dim) == (128, 256)


def test_every_experiment_on_coco_trains_as_the_paper_says():
    for name in ("solq_r50", "solq_r101", "solq_swinl", "solq_r50_official", "solq_r50_c5", "ddetr_r50"):
        experiment = load_experiment(REPOSITORY / "experiments" / f"{name}.yaml")
        assert (experiment.train.epochs, experiment.train.batch_size, experiment.optim.lr) == (50, 32, 2e-4)
    for name in ("sqr_r50", "sqr_r101"):
        experiment = load_experiment(REPOSITORY / "experiments" / f"{name}.yaml")
        assert (experiment.train.epochs, experiment.train.batch_size, experiment.optim.lr) == (50, 16, 2e-4)


def test_the_smoke_run_is_the_demo_but_for_its_length():
    demo, smoke = (load_experiment(REPOSITORY / "experiments" / f"{name}.yaml") for name in ("shapes", "shapes_smoke"))
    assert demo.model == smoke.model
    assert demo.loss == smoke.loss
    assert demo.optim == smoke.optim
    assert smoke.train.steps < demo.train.steps / 20


def test_no_experiment_trains_on_validation_images():
    for path in FILES:
        data = load_experiment(path).data
        assert data.train_images != data.val_images or not data.train_images
        assert data.train_annotations != data.val_annotations or not data.train_annotations
