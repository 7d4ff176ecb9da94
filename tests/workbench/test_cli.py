"""The command line: a user's mistake is one message and exit status 2, without a traceback, nothing written over."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from notebook import write_notebook
from PIL import Image
from pycocotools.mask import decode
from tiny import tiny_experiment, write_model, write_tiny_dataset

from solq_lab.build import build_model
from solq_lab.config import Experiment, load_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.data.images import ORIENTATION
from solq_lab.data.loader import LoaderError
from solq_lab.inference.predictor import Predictor
from solq_lab.models.weights import read_weights, to_official_state
from solq_lab.runs import load_run
from solq_lab.workbench.cli import main
from solq_lab.workbench.commands import runs
from solq_lab.workbench.workspace import WORKSPACE

TRAIN = REPOSITORY / "notebooks" / "train.ipynb"


@pytest.fixture
def command(command_line, monkeypatch, tmp_path):
    """Run `solq-lab ARGUMENTS` in this process, in a fresh folder, its workspace: exit status and all it wrote."""
    monkeypatch.setenv(WORKSPACE, str(tmp_path))
    return command_line


@pytest.fixture
def rejected(command):
    """Run a command that has to be rejected; its message."""

    def run(*arguments: object) -> str:
        status, output = command(*arguments)
        assert status == 2, output
        return output

    return run


@pytest.fixture
def data_root(tmp_path):
    return write_tiny_dataset(tmp_path / "images")


@pytest.fixture
def experiment(tmp_path, data_root):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_experiment(data_root).to_yaml())
    return path


@pytest.fixture
def weights(tmp_path, data_root):
    """An untrained model in a weights file."""
    return write_model(tmp_path / "weights.safetensors", tiny_experiment(data_root))


@pytest.fixture
def train_here(monkeypatch):
    """Let `solq-lab train` run its training in this process, which saves the seconds that importing torch takes."""
    from solq_lab.training import __main__ as training

    monkeypatch.setattr(runs, "start_training", lambda folder, processes: training.main([str(folder)]))
    yield
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.FileHandler):
            logging.getLogger().removeHandler(handler)
            handler.close()


# ---- help


def test_help_lists_every_command_by_topic(command):
    status, output = command("-h")
    assert (status, output) == command("--help")
    assert status == 0
    assert output.index("Sweep commands:") < output.index("  sweep ") < output.index("Model commands:")
    for name in ("run", "train", "evaluate", "predict", "make-shapes", "import-weights", "doctor", "bench"):
        assert f"  {name} " in output


def test_help_says_what_each_command_does_in_a_whole_sentence(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, output = command("--help")
    assert "..." not in output.partition("Run commands:")[2]


def test_quiet_and_verbose_stand_before_or_behind_the_command(command, data_root, weights, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)
    for arguments in (("-q", "predict", weights), ("predict", weights, "-q")):
        status, _ = command(*arguments, data_root / "val" / "1.png")
        assert (status, logging.getLogger().level) == (0, logging.WARNING)
    assert os.environ["TQDM_DISABLE"] == "1"
    assert command("-v", "doctor", "--help")[0] == 0


def test_a_folder_that_is_not_there_or_holds_nothing_is_rejected_without_torch(tmp_path):
    """Within a second; importing torch takes several."""
    (tmp_path / "data_nowhere").mkdir()
    arguments = (
        "check-data nowhere",
        "check-data data_nowhere",
        "evaluate nowhere",
        "predict nowhere a.png",
        "run nowhere",
        "train nowhere.yaml",
    )
    for line in arguments:
        code = f"import sys; sys.argv = ['solq-lab', *{line.split()}]\nfrom solq_lab.workbench import cli\n"
        code += "try: cli.main()\nexcept SystemExit as end: sys.exit(9 if 'torch' in sys.modules else end.code)"
        outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert outcome.returncode == 2, f"{line}: {outcome.stderr}"
        assert "nowhere" in outcome.stderr


def test_the_version_is_that_of_the_package(command):
    assert command("--version") == (0, f"solq-lab {metadata.version('solq-lab')}\n")


# ---- experiments and data


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("trian", "No such command 'trian'"),
        ("evaluate run --split tst", "'tst' is not one of 'val', 'train'"),
        ("evaluate runs/none", "not a run folder"),
        ("train tiny.yaml train.stpes=3", "unknown key train.stpes; did you mean steps?"),
        ("train tiny.yaml train.steps=many", "unable to parse string as an integer (found 'many')"),
        ("train tiny.yaml codec.mask_size=4", "vector_dim 20 exceeds mask_size squared (16)"),
        ("train tiny.yaml data.root=imagess", "data.root: found imagess, which does not exist; did you mean images?"),
        ("train tiny.yaml model.pretrained=nowhere.pth", "model.pretrained: found nowhere.pth, which does not exist"),
        ("train tiny.yaml train.finetune_from=nowhere", "train.finetune_from: found nowhere, which does not exist"),
        (
            "train tiny.yaml codec.kind=pca codec.artifact=nowhere",
            "codec.artifact: found nowhere, which does not exist; `solq-lab fit-codec EXPERIMENT` writes it",
        ),
        (f"train '{REPOSITORY}/experiments/coco_small.yaml'", "data.root=FOLDER"),
        (f"run '{TRAIN}' train.steps=3", "train.steps=3: changes an experiment; name the experiment's file before it"),
        (f"run '{TRAIN}' tiny.yaml -p image=3", "unknown parameter image; did you mean images?"),
        (f"run '{TRAIN}' tiny.yaml -p images", "allowed is name=value"),
        (f"run '{TRAIN.with_name('trian.ipynb')}' tiny.yaml", "train.ipynb?"),
        ("predict images/train.json images/val/1.png", "train.json: not a safetensors file"),
        ("predict images/train.json images/val/1.png nowhere.jpg", "nowhere.jpg: no such file"),
        ("import-weights tiny.yaml out.safetensors", "tiny.yaml: "),
        ("export weights.safetensors a.onnx --top-k 0", "Invalid value for '--top-k'"),
        ("make-shapes s --level medium", "is not one of 'easy', 'hard'"),
        ("bench opp", "no part opp; allowed are op, codec"),
        *[
            (f"codec-ceiling images --area-sides {sides}", f"Invalid value for --area-sides: found '{sides}'")
            for sides in ("5", "96,32", "0,32", "1,2,3", "big")
        ],
    ],
)
def test_a_mistake_is_rejected_by_its_name_and_leaves_nothing_behind(rejected, experiment, tmp_path, arguments, said):
    assert said in rejected(*shlex.split(arguments))
    assert {path.name for path in tmp_path.iterdir()} == {"images", "tiny.yaml"}


def change_annotations(data_root: Path, **changes: object) -> None:
    """Change the first annotation of the training images."""
    path = data_root / "train.json"
    document = json.loads(path.read_text())
    document["annotations"][0] |= changes
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / "train.json").write_text('{"images": []}'), "no list 'annotations' (found 'images')"),
        (lambda root: (root / "train.json").write_text("<xml/>"), "train.json: "),
        (lambda root: change_annotations(root, category_id=77), "category id 77"),
        (lambda root: (root / "train" / "2.png").unlink(), "'2.png' (image id 2)"),
        (lambda root: (root / "train" / "2.png").write_bytes(b"\x89PNG\r\n"), "2.png"),
    ],
    ids=["no COCO", "no JSON", "category outside the map", "missing image", "truncated image"],
)
def test_data_that_cannot_be_trained_is_rejected_by_name(rejected, experiment, data_root, train_here, spoil, said):
    spoil(data_root)
    assert said in rejected("train", experiment)


def test_a_rejection_in_the_training_process_reaches_the_terminal(rejected, experiment, data_root):
    (data_root / "train" / "2.png").unlink()
    message = rejected("train", experiment)
    assert "'2.png' (image id 2)" in message


# ---- notebooks


def test_a_notebook_is_found_by_its_name(rejected, experiment):
    Path("notebooks").mkdir()
    notebook = write_notebook(Path("notebooks") / "train.ipynb")
    assert f"{notebook}: unknown parameter pictres" in rejected("run", "train", experiment, "-p", "pictres=3")
    assert f"notebooks/trian.ipynb: no such notebook; did you mean {notebook}?" in rejected("run", "trian", experiment)


def test_a_cell_that_fails_ends_in_status_1_and_a_users_mistake_in_a_cell_in_2(command, experiment, tmp_path):
    status, output = command("run", write_notebook(tmp_path / "a.ipynb", "1 / 0"), experiment)
    assert status == 1
    assert "ZeroDivisionError" in output
    cell = "from solq_lab.runs import load_run\nload_run('nowhere')"
    status, output = command("run", write_notebook(tmp_path / "b.ipynb", cell), experiment)
    assert status == 2
    assert "nowhere: not a run folder" in output


def test_a_run_ends_with_the_paths_of_its_report(command, experiment, tmp_path):
    status, output = command("run", write_notebook(tmp_path / "a.ipynb", "1"), experiment)
    assert status == 0
    assert f"notebook  {Path('runs/tiny/a.ipynb')}" in output
    assert f"HTML      {Path('runs/tiny/a.html')}" in output


# ---- training and evaluation


def test_training_ends_with_the_table_beside_the_ceiling_and_evaluate_prints_it_again(
    command, experiment, data_root, train_here, caplog
):
    status, output = command("train", experiment, "train.steps=2")
    assert status == 0
    assert "weights   runs/tiny/weights.safetensors" in output
    for kind in ("segm", "boundary"):
        assert f"\n{kind} ceiling " in output
    status, again = command("evaluate", "runs/tiny", "--classes")
    assert status == 0
    assert output[output.index("box ") : output.index("weights   ")].strip() in again
    assert "segm, class" in again

    # Images that neither split has are evaluated by their annotations, without the run's own data.
    shutil.move(data_root / "val", "third images")
    shutil.move(data_root / "val.json", "third.json")
    arguments = ("evaluate", "runs/tiny", "--annotations", "third.json", "--images", "third images")
    status, third = command(*arguments)
    assert status == 0
    assert "tiny, third.json" in third
    assert output[output.index("box ") : output.index("weights   ")].strip() in third
    stored = Path("runs/tiny/results_of_third.json").read_bytes()

    # Their orientation is theirs, not the run's; what cannot be decided is said.
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.open("third images/1.png").rotate(90)
    image.save("third images/1.png", exif=exif)
    Path("runs/tiny/results_of_third.json").unlink()
    assert command(*arguments)[0] == 0
    assert "1 images are turned by EXIF ('1.png'); their sizes do not tell" in caplog.text
    assert command(*arguments, "--orientation", "upright")[0] == 0
    turned = json.loads(Path("runs/tiny/results_of_third.json").read_bytes())
    assert turned["orientation"] == "upright"
    assert command(*arguments)[0] == 0
    assert json.loads(Path("runs/tiny/results_of_third.json").read_bytes())["orientation"] is None
    assert turned | {"orientation": None, "seconds": 0} == json.loads(stored) | {"seconds": 0}
    assert command("evaluate", "runs/tiny", "--orientation", "upright")[0] == 2


def test_what_goes_wrong_outside_ends_in_status_1_and_its_message(command, monkeypatch):
    def lose_a_worker(*_, **__):
        raise LoaderError("a loader process was killed")

    monkeypatch.setattr(runs, "open_run", lose_a_worker)
    status, output = command("evaluate", "runs/tiny")
    assert status == 1
    assert output.strip() == "a loader process was killed"


# ---- prediction


def test_predict_lists_and_draws_the_objects(command, weights, data_root, tmp_path):
    status, output = command("predict", weights, data_root / "val" / "1.png", "--score", 0.0, "--out", "drawn")
    assert status == 0
    assert "16 objects, drawn in drawn/1.png" in output  # 8 queries x 2 classes
    assert ("triangle" in output) or ("diamond" in output)
    assert Image.open(tmp_path / "drawn" / "1.png").size == Image.open(data_root / "val" / "1.png").size


def put_images(tmp_path, data_root, *names):
    """Copies of one image under these names."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(data_root / "val" / "1.png").convert("RGB").save(tmp_path / name)


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff\xe0" + bytes(40), "half", "header"])
def test_a_damaged_image_is_named_and_skipped_and_the_others_are_drawn(command, weights, data_root, tmp_path, damage):
    put_images(tmp_path, data_root, "p/a.png", "p/b.png", "p/c.png")
    whole = (tmp_path / "p" / "b.png").read_bytes()
    cuts = {"half": whole[:60], "header": whole[:11] + b"\x05" + whole[12:]}
    (tmp_path / "p" / "b.png").write_bytes(cuts.get(damage, damage))
    status, output = command("predict", weights, "p", "--out", "drawn")
    assert status == 1
    assert "p/b.png: not a whole image (" in output
    assert output.endswith("1 of 3 images could not be read and were skipped: p/b.png\n")
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["a.png", "c.png"]


def test_predict_writes_coco_results_as_json_lines(weights, data_root, tmp_path, monkeypatch, capsys):
    put_images(tmp_path, data_root, "p/a.png", "p/b.png", "p/c.png")
    (tmp_path / "p" / "b.png").write_bytes(b"damaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["solq-lab", "predict", str(weights), "p", "--json", "--score", "0"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1

    written = capsys.readouterr()
    lines = [json.loads(line) for line in written.out.splitlines()]
    assert [(line["id"], line["file_name"], line["drawing"]) for line in lines] == [
        (1, "p/a.png", "predictions/a.png"),
        (3, "p/c.png", "predictions/c.png"),
    ]
    assert "p/a.png: 16 objects" in written.err
    width, height = Image.open(data_root / "val" / "1.png").size
    assert (lines[0]["width"], lines[0]["height"]) == (width, height)
    found = Predictor(weights).predict(tmp_path / "p" / "a.png")
    assert [result["score"] for result in lines[0]["detections"]] == found.scores.tolist()
    for result, rle, name in zip(lines[0]["detections"], found.masks, found.names, strict=True):
        assert (result["image_id"], result["category_name"]) == (1, name)
        assert np.array_equal(decode(result["segmentation"]), decode(rle))
        x, y, w, h = result["bbox"]
        assert 0 <= x <= x + w <= width + 1e-3  # inside the image, whatever the network predicts
        assert 0 <= y <= y + h <= height + 1e-3


def test_predict_tells_the_best_score_where_none_is_high_enough(command, weights, data_root):
    status, output = command("predict", weights, data_root / "val" / "1.png", "--score", 1)
    assert status == 0
    assert "1.png: 0 objects, drawn in predictions/1.png" in output
    assert "none with a score of at least 1; the best has 0.0" in output  # of an untrained model


def test_a_checkpoint_of_another_architecture_is_rejected(rejected, tmp_path, data_root):
    settings = tiny_experiment(data_root)
    wider = tiny_experiment(data_root, model={"width": 64})
    path = write_model(tmp_path / "other.safetensors", settings, build_model(wider, 2))
    message = rejected("predict", path, data_root / "val" / "1.png")
    assert "other.safetensors" in message


# ---- weights


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A small model's checkpoint under the released names, with 91 class channels."""
    small = {
        "width": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward": 32,
        "vector_hidden": 32,
        "queries": 5,
    }
    settings = Experiment(name="small", model=small, codec={"vector_dim": 9})
    model = build_model(settings, 91)
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save({"model": to_official_state(model.state_dict())}, path)
    return path


def test_import_reports_infers_and_names_cocos_classes_and_the_way_back_is_exact(command, official, data_root):
    status, output = command("import-weights", official, "ours.safetensors")
    assert status == 0
    assert "0 missing, 0 left over" in output
    assert "width 32" in output
    stored = read_weights(Path("ours.safetensors"))
    classes = ClassMap.from_json(stored.classes)
    assert (len(classes), classes.names[1], classes.names[90]) == (91, "person", "toothbrush")
    assert sum(1 for name in classes.names if name) == 80
    assert classes.channel_of(90) == 90
    assert command("predict", "ours.safetensors", data_root / "val" / "1.png")[0] == 0
    assert command("import-weights", "ours.safetensors", "back.pth", "--to-official")[0] == 0
    before = torch.load(official, weights_only=True)["model"]
    after = torch.load("back.pth", weights_only=True)["model"]
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_annotations_name_the_classes_of_imported_weights(command, official, data_root):
    assert command("import-weights", official, "ours.safetensors", "--annotations", data_root / "val.json")[0] == 0
    assert ClassMap.from_json(read_weights(Path("ours.safetensors")).classes).names[:3] == ("", "triangle", "diamond")


def test_an_existing_file_is_not_written_over(rejected, official, tmp_path):
    (tmp_path / "mine.safetensors").write_text("precious")
    assert "is not written over" in rejected("import-weights", official, "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == "precious"


# ---- places to write to


@pytest.mark.parametrize(
    "arguments",
    [
        ("make-shapes", "notes.txt/shapes"),
        ("download-coco", "notes.txt"),
        ("convert-data", "yolo", "notes.txt"),
        ("check-data", "images", "--output", "notes.txt"),
        ("codec-ceiling", "images", "--output", "notes.txt/ceilings"),
        ("predict", "weights.safetensors", "notes.txt", "--out", "notes.txt"),
        ("train", "tiny.yaml", "--runs-dir", "notes.txt"),
        ("status", "--runs-dir", "notes.txt"),
        ("ship", "runs/tiny", "notes.txt"),
    ],
)
def test_a_file_in_the_place_of_a_folder_is_rejected_before_any_work(rejected, tmp_path, arguments):
    (tmp_path / "notes.txt").write_text("precious")
    assert "name a folder" in rejected(*arguments)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "shapes_table2", "--json"),
        ("table", "shapes_table2", "--csv"),
        ("codec-ceiling", "images", "--json"),
        ("bench", "matcher", "--json"),
        ("import-weights", "official.pth"),
    ],
)
def test_a_folder_in_place_of_a_file_and_a_missing_folder_are_rejected_before_any_work(rejected, tmp_path, arguments):
    (tmp_path / "folder").mkdir()
    assert "folder: is a folder; name a file in it" in rejected(*arguments, "folder")
    assert "nowhere/x.onnx: there is no folder nowhere" in rejected(*arguments, "nowhere/x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_export_makes_its_folder_and_is_rejected_one_that_cannot_be_made(command, rejected, weights, tmp_path):
    assert command("export", weights, "exports/mine.safetensors")[0] == 0
    assert "is a folder; name a file in it" in rejected("export", weights, "exports")
    assert "weights.safetensors: is a file; name a folder" in rejected("export", weights, f"{weights}/mine.safetensors")


def test_a_place_that_may_not_be_written_to_is_rejected_before_any_work(rejected, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "cannot be written to; name another place" in rejected("make-shapes", "shapes")
    assert "cannot be written to; name another place" in rejected("bench", "matcher", "--json", "bench.json")


def test_what_the_operating_system_rejects_is_told_with_the_place_and_without_a_traceback(rejected, monkeypatch):
    def reject(*_, **__):
        raise PermissionError(13, "Permission denied", "runs/tiny")

    monkeypatch.setattr(runs, "open_run", reject)
    assert rejected("evaluate", "runs/tiny").strip() == "runs/tiny: Permission denied"


# ---- the rest


def test_make_shapes_writes_a_folder_and_rejects_to_change_one(command, rejected, tmp_path):
    assert command("make-shapes", "s", "--train", 2, "--val", 1, "--processes", 1)[0] == 0
    assert len(list((tmp_path / "s" / "train").iterdir())) == 2
    before = (tmp_path / "s" / "annotations" / "instances_train.json").read_bytes()
    message = rejected("make-shapes", "s", "--train", 3, "--val", 1, "--processes", 1)
    assert "s" in message
    assert (tmp_path / "s" / "annotations" / "instances_train.json").read_bytes() == before


def test_bench_prints_a_table_and_writes_its_file(command):
    status, output = command("bench", "matcher", "--json", "bench.json")
    assert status == 0
    assert "ratio" in output
    assert {row["part"] for row in json.loads(Path("bench.json").read_text())["rows"]} == {"matcher"}


def test_doctor_tells_what_the_machine_offers(command):
    status, output = command("doctor")
    assert status == 0
    assert "reference" in output


def test_the_package_offers_the_names_a_user_types():
    import solq_lab

    assert solq_lab.load_experiment is load_experiment
    assert solq_lab.load_run is load_run
    assert solq_lab.Predictor.__name__ == "Predictor"
    with pytest.raises(AttributeError, match="it offers Predictor, load_experiment, load_run"):
        solq_lab.predictor_of_the_future  # noqa: B018
