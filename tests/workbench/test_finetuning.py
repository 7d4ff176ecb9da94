"""The fine-tuning recipe: what it chooses from data and device, what it warns of, and the experiment that it writes."""

import json
from pathlib import Path

import pytest
import torch
from made_up_weights import RELEASED, made_up
from tiny import write_tiny_dataset

from solq_lab.build import build_dataset
from solq_lab.config import ConfigError, load_experiment
from solq_lab.data import folders
from solq_lab.data.annotations import DataError
from solq_lab.data_folder import open_folder
from solq_lab.workbench import cli, finetuning
from solq_lab.workbench.commands import finetune as command
from solq_lab.workbench.finetuning import GB, Device, measure_speed

CPU = Device("2 CPU cores", False, False, 2, 8 * GB)
GPU = Device("a GPU", True, True, 8, 24 * GB)


@pytest.fixture
def on(monkeypatch):
    """Plan on a device that trains 25 images per second."""

    def choose(device: Device) -> None:
        monkeypatch.setattr(finetuning, "describe_device", lambda: device)
        monkeypatch.setattr(finetuning, "measure_speed", lambda experiment, train_set: 25.0)

    choose(CPU)
    return choose


def plan_finetuning(data: Path, *overrides: str, **options) -> finetuning.Plan:
    defaults = {"start": "", "minutes": None, "runs_dir": Path("runs")}
    return finetuning.plan_finetuning(open_folder(data, overrides), overrides, name="mine", **defaults | options)


def dataset(folder: Path, images: int = 12) -> Path:
    return write_tiny_dataset(folder / "mine", train=images)


def test_a_cpu_gets_the_small_network_and_steps_by_minutes_and_speed(tmp_path, on):
    plan = plan_finetuning(dataset(tmp_path), minutes=10)
    experiment = plan.experiment
    assert experiment.model.backbone == "small"
    assert experiment.train.finetune_from.endswith("shipped/uqr/weights.safetensors")
    assert experiment.train.batch_size == 6
    assert experiment.train.steps == 10 * 60 * 0.8 * 25 / 6
    assert experiment.optim.lr == pytest.approx(2e-3 * (6 / 16) ** 0.5, rel=0.05)  # two digits are kept
    assert (experiment.data.test_scale, experiment.data.max_size) == (64, 64)  # images of 48 pixels, in steps of 32
    assert experiment.data.val_annotations == "val.json"
    assert 0 < experiment.train.stop_after < 12
    assert [text[:9] for text in plan.warnings] == ["2 classes"]
    lines = [line.split("  # ") for line in str(plan).splitlines()]
    for key, reason in plan.reasons.items():
        assert [f"  {key.partition('.')[2]}", reason] in [[line[0].partition(":")[0], line[-1]] for line in lines]


def test_a_gpu_gets_the_released_recipe_in_what_its_memory_holds(tmp_path, on):
    on(GPU)
    plan = plan_finetuning(dataset(tmp_path, images=40))
    model, train = plan.experiment.model, plan.experiment.train
    assert (model.backbone, model.pretrained, train.autocast) == ("resnet50", "imagenet", "bf16")
    assert train.batch_size == 10
    assert train.batch_size % train.accumulate == 0
    assert plan.experiment.optim.lr == pytest.approx(2e-4 * (10 / 32) ** 0.5, rel=0.05)
    assert "hf_ddetr_r50_refine" in plan.reasons["model.pretrained"]
    assert train.steps == 1500


def test_few_steps_lost_images_and_rare_classes_are_warned_of(tmp_path, on):
    warnings = plan_finetuning(dataset(tmp_path, images=13), minutes=0.5).warnings
    assert any("3 of 13 images fall out of each epoch" in text for text in warnings)
    assert any("steps are few" in text for text in warnings)
    assert any("2 classes have under 10 training objects (triangle " in text for text in warnings)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_more_objects_get_more_queries_and_the_only_split_is_divided(tmp_path, on, missing):
    data = dataset(tmp_path, images=20)
    document = json.loads((data / "train.json").read_text())
    document["annotations"] = [{**document["annotations"][0], "id": number} for number in range(1, 90)]
    (data / "train.json").write_text(json.dumps(document))
    (data / "val.json").unlink()
    if missing == "train":
        (data / "train.json").rename(data / "val.json")
        (data / "val").rename(data / "unused")
        (data / "train").rename(data / "val")
    plan = plan_finetuning(data)
    assert plan.experiment.data.val_fraction == 0.2
    assert plan.experiment.model.queries in (130, 140)


def test_what_the_user_gives_is_kept_and_the_rest_follows_from_it(tmp_path, on):
    data = dataset(tmp_path)
    overrides = ["train.batch_size=4", "model.queries=7", "data.val_images=val"]
    plan = plan_finetuning(data, *overrides, minutes=10)
    assert plan.experiment.train.steps == 10 * 60 * 0.8 * 25 / 4
    assert plan.experiment.optim.lr == pytest.approx(2e-3 * (4 / 16) ** 0.5, rel=0.05)
    assert plan.experiment.model.queries == 7
    assert [plan.reasons[override.partition("=")[0]] for override in overrides] == ["as given"] * 3
    with pytest.raises(ConfigError, match="the folder is the first argument"):
        plan_finetuning(data, "data.root=elsewhere")


def test_a_released_checkpoint_is_converted_and_gives_the_network(tmp_path, on):
    torch.save({"model": made_up(RELEASED)}, tmp_path / "released.pth")
    plan = plan_finetuning(dataset(tmp_path), start=str(tmp_path / "released.pth"), runs_dir=tmp_path / "runs")
    assert plan.experiment.model.width == 64
    assert (tmp_path / "runs" / "imported" / "released.safetensors").exists()
    assert plan.experiment.train.finetune_from.endswith("imported/released.safetensors")
    assert plan.experiment.data.class_ids == "contiguous"


def test_images_without_objects_are_rejected_before_any_work(tmp_path, on):
    data = dataset(tmp_path)
    document = json.loads((data / "train.json").read_text()) | {"annotations": []}
    (data / "train.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="no training image has an object"):
        plan_finetuning(data)


def test_objects_without_bbox_and_classes_without_name_are_counted_as_the_loader_reads_them(tmp_path, on):
    data = dataset(tmp_path)
    expected = plan_finetuning(data).experiment
    document = json.loads((data / "train.json").read_text())
    for entry in document["annotations"]:
        del entry["bbox"]
    del document["categories"][0]["name"]
    (data / "train.json").write_text(json.dumps(document))
    assert plan_finetuning(data).experiment == expected


def test_the_speed_is_measured_on_the_data_itself(tmp_path, on):
    experiment = plan_finetuning(dataset(tmp_path)).experiment
    assert measure_speed(experiment, build_dataset(experiment, "train"), steps=2) > 0


def test_the_folder_is_looked_up_once_and_each_file_read_once(tmp_path, on, monkeypatch, caplog):
    data = dataset(tmp_path)
    for name in ("train", "val"):
        document = json.loads((data / f"{name}.json").read_text())
        document["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
        (data / f"{name}.json").write_text(json.dumps(document))
    looked, find = [], folders._find
    monkeypatch.setattr(folders, "_find", lambda *arguments: looked.append(arguments) or find(*arguments))
    caplog.set_level("INFO")
    plan_finetuning(data)
    assert len(looked) == 1
    assert sorted(caplog.text.count(f"{name}.json: category 0") for name in ("train", "val")) == [1, 1]


@pytest.mark.parametrize(("cores", "name"), [(1, "1 CPU core"), (2, "2 CPU cores")])
def test_cores_are_counted_in_words(monkeypatch, cores, name):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert finetuning.describe_device().name == name


def test_the_command_writes_an_experiment_that_runs_as_edited(tmp_path, on, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(command, "train", lambda path, runs_dir: trained.append(load_experiment(path)))

    def call(*options: str) -> None:
        arguments = ["solq-lab", "finetune", str(tmp_path / "mine"), "--runs-dir", str(tmp_path / "runs"), *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None, 2)

    dataset(tmp_path)
    call("train.ema=0.5", "--minutes", "10", "--dry-run")
    path = tmp_path / "runs" / "mine-finetuned.yaml"
    assert not trained
    assert "square-root rule" in capsys.readouterr().out
    assert "square-root rule" in path.read_text()
    edited = path.read_text().replace("steps: 2000", "steps: 7").replace("\noptim:", "\noptim:\n  clip_norm: 3.0")
    path.write_text(edited)
    call("train.ema=0.5", "--minutes", "10")
    assert (trained[0].train.steps, trained[0].train.ema) == (7, 0.5)
    assert edited.partition("\n")[2] in capsys.readouterr().out
    call("--minutes", "20")
    assert len(trained) == 1
    assert "was written by `solq-lab finetune" in capsys.readouterr().err
