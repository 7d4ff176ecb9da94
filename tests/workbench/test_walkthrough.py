"""The README's way on real images, by its own commands: download, check, train, evaluate, export, predict.

Every command is a process of its own that starts in an empty folder, as a user's is. A few steps teach a model nothing;
what is shown is that each command finds what the one before it has left, and says where its own results are.
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from server import offer_coco, serve

from solq_lab.build import build_images
from solq_lab.data.annotations import read_annotations
from solq_lab.data_folder import split_of
from solq_lab.inference.predictor import Predictor
from solq_lab.runs import Run
from solq_lab.viz.widgets.attention_explorer import AttentionExplorer
from solq_lab.viz.widgets.codec_explorer import CodecExplorer
from solq_lab.viz.widgets.detection_explorer import DetectionExplorer

pytestmark = pytest.mark.slow

# A model and images so small that six steps take a second.
TINY = [
    *("model.queries=20", "model.width=32", "model.heads=2", "data.test_scale=96", "data.max_size=128"),
    *("train.steps=6", "train.batch_size=4", "train.save_every=3", "train.log_every=2", "train.threads=1"),
]
Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def solq_lab(workspace: Path) -> Command:
    """Run `solq-lab ARGUMENTS` in the workspace and expect an exit status."""

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "solq_lab", *map(str, arguments)]
        ended = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=300)
        assert ended.returncode == status, ended.stdout + ended.stderr
        assert "Traceback" not in ended.stderr
        assert "Warning" not in ended.stderr
        return ended

    return run


@pytest.fixture(scope="module")
def downloading(solq_lab: Command, workspace: Path, coco_tiny: Path) -> Iterator[subprocess.CompletedProcess]:
    """`data/coco` has come from a server that dropped the connection once."""
    with serve() as server:
        offer_coco(server, coco_tiny, workspace / "sums")
        server.breaks = [None, 500_000]
        yield solq_lab("download-coco", "data/coco", "--base-url", server.url, "--sums", "sums")


@pytest.fixture(scope="module")
def training(solq_lab: Command, downloading: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """`runs/walk` has been trained on `data/coco`."""
    notebook, experiment = REPOSITORY / "notebooks" / "train.ipynb", REPOSITORY / "experiments" / "coco_small.yaml"
    return solq_lab("run", notebook, experiment, "data.root=data/coco", "name=walk", *TINY)


@pytest.fixture(scope="module")
def shared(solq_lab: Command, training: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """`walk.safetensors` holds the model, to share."""
    return solq_lab("export", "runs/walk", "walk.safetensors")


def table_of(output: str) -> list[str]:
    """The lines of a printed AP table."""
    lines = output.splitlines()
    first = next(number for number, line in enumerate(lines) if line.split()[:2] == ["AP", "AP50"])
    return lines[first : first + 6]


def test_the_download_says_that_it_goes_on_and_leaves_every_file_as_it_was(downloading, workspace, coco_tiny):
    told = re.split(r"[\r\n]+", downloading.stderr)  # a line is never written into the middle of a bar
    broken = re.compile(r"val2017\.zip: the connection ended at 500\.0 kB of \d\.\d MB; next attempt in 1\.0 s")
    assert sum(bool(broken.fullmatch(line)) for line in told) == 1
    assert "train2017.zip: 50 files, 7.1 MB, in data/coco" in told
    assert downloading.stdout == "train and val of COCO 2017 in data/coco\ncheck it:  solq-lab check-data data/coco\n"
    for part in ("annotations", "train2017", "val2017"):
        there = {file.name: file.read_bytes() for file in (workspace / "data" / "coco" / part).iterdir()}
        assert there == {file.name: file.read_bytes() for file in (coco_tiny / part).iterdir()}


def test_the_check_names_what_a_small_part_of_coco_lacks_and_how_to_accept_it(solq_lab, downloading, workspace):
    found = solq_lab("check-data", "data/coco", status=1).stdout
    assert "'sheep': 13 objects in val, none in train" in found
    assert "problems: class-not-trained\nmend them, or let them pass with --allow class-not-trained\n" in found
    assert "problems" not in solq_lab("check-data", "data/coco", "--allow", "class-not-trained").stdout
    folder = workspace / "runs" / "data_checks" / "coco"
    report = json.loads((folder / "report.json").read_text())
    assert report["allowed"] == {"class-not-trained": None}


def test_the_training_ends_with_its_table_its_report_and_everything_that_a_run_holds(training, workspace):
    run = workspace / "runs" / "walk"
    status, results = (json.loads((run / name).read_text()) for name in ("status.json", "results.json"))
    assert (status["state"], status["step"]) == ("finished", 6)
    assert {"box.AP", "segm.AP", "boundary.AP"} <= set(results["metrics"])
    assert all(-1 <= value <= 1 for value in results["metrics"].values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6]
    assert training.stdout.endswith("\nnotebook  runs/walk/train.ipynb\nHTML      runs/walk/train.html\n")
    assert len(table_of(training.stdout)) == 6
    for name in ("train.html", "figures/training.png", "figures/predictions.png", "environment.json"):
        assert (run / name).stat().st_size > 500


def test_training_or_evaluating_what_is_finished_only_shows_its_table(solq_lab, training, workspace):
    run = workspace / "runs" / "walk"
    before = (run / "metrics.jsonl").read_bytes(), (run / "weights.safetensors").stat().st_mtime_ns
    again = solq_lab("train", run / "experiment.yaml")
    assert "finished at step 6, nothing to train" in again.stderr
    assert table_of(again.stdout) == table_of(training.stdout)
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "weights.safetensors").stat().st_mtime_ns)
    evaluated = solq_lab("evaluate", "runs/walk")
    assert table_of(evaluated.stdout) == table_of(training.stdout)
    assert "results of these weights exist already" in evaluated.stderr


def test_the_onnx_file_is_kept_because_it_finds_the_same(solq_lab, training, workspace):
    exported = solq_lab("export", "runs/walk", "walk.onnx", "--height", 96, "--width", 128, "--batch", 1)
    parity = json.loads((workspace / "walk.parity.json").read_text())
    assert parity["agrees"]
    assert parity["inputs"]["pixels"] == [1, 3, 96, 128]
    assert f"{parity['matched']} of {parity['detections']} detections in 3 images matched" in exported.stdout
    assert "the whole comparison is in walk.parity.json" in exported.stdout
    assert "folding" not in exported.stderr  # the translator says so of every operator that it leaves alone
    assert (workspace / "walk.onnx").stat().st_size > 1e6


def test_the_shared_file_alone_lists_and_draws_objects(solq_lab, shared, workspace, coco_tiny):
    assert "walk.safetensors: 5.0 MB, 80 classes, codec and experiment inside" in shared.stdout
    image = next((workspace / "data" / "coco" / "val2017").iterdir())
    names = {
        c["name"] for c in json.loads((coco_tiny / "annotations" / "instances_val2017.json").read_text())["categories"]
    }
    listed = solq_lab("predict", "walk.safetensors", image, "--score", 0.01).stdout.splitlines()
    assert listed[0] == f"{image}: {len(listed) - 1} objects, drawn in predictions/{image.stem}.png"
    for line in listed[1:]:
        score, name, box = re.fullmatch(r"  (0\.\d\d)  (.{20})((?: +-?\d+\.\d){4})", line).groups()
        assert float(score) >= 0.01
        assert name.strip() in names
        x0, y0, x1, y1 = map(float, box.split())
        assert x0 < x1
        assert y0 < y1
    assert (workspace / "predictions" / f"{image.stem}.png").stat().st_size > 10_000


# ---- images of one's own


def write_split(kind: str, root: Path, name: str, document: dict, images: Path) -> None:
    """A split as a labelling tool exports it; images have spaces, capitals and a folder in their names."""
    below = {"roboflow": name, "yolo": f"images/{name}"}.get(kind, "images")
    for entry in document["images"]:
        old, entry["file_name"] = entry["file_name"], f"cam 1/{name} {Path(entry['file_name']).stem}.JPG"
        target = root / below / entry["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((images / old).read_bytes())
        if kind == "yolo":
            size = (entry["width"], entry["height"])
            objects = [a for a in document["annotations"] if a["image_id"] == entry["id"] and not a["iscrowd"]]
            lines = [
                " ".join([str(number), *(f"{min(v / size[k % 2], 1):.6f}" for k, v in enumerate(polygon))])
                for number, polygon in ((a["category_id"], p) for a in objects for p in a["segmentation"])
            ]
            label = (root / "labels" / name / entry["file_name"]).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines))

    path = {
        "roboflow": root / name / "_annotations.coco.json",
        "cvat": root / "annotations" / "instances_default.json",
        "flat": root / "my objects.json",
    }.get(kind)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document))
    else:
        names = {category["id"]: category["name"] for category in document["categories"]}
        classes = [names.get(number, f"unused {number}") for number in range(max(names) + 1)]
        (root / "data.yaml").write_text(json.dumps({"names": classes, "train": "images/train", "val": "images/valid"}))


def part_of(document: dict, count: int) -> dict:
    images = document["images"][:count]
    ids = {entry["id"] for entry in images}
    return document | {"images": images, "annotations": [a for a in document["annotations"] if a["image_id"] in ids]}


@pytest.mark.parametrize("kind", ["roboflow", "cvat", "yolo", "flat"])
def test_a_folder_of_a_labelling_tool_needs_no_setting(solq_lab, workspace, coco_tiny, kind):
    root, run = Path(f"my {kind} set"), f"runs/my-{kind}-set-finetuned"
    for split, folder in (("train", "train2017"), ("valid", "val2017"))[: 2 if kind in ("roboflow", "yolo") else 1]:
        document = json.loads((coco_tiny / "annotations" / f"instances_{folder}.json").read_text())
        write_split(kind, workspace / root, split, part_of(document, 10), coco_tiny / folder)

    # Some classes of val are never trained: these few images come from COCO.
    allowed = [word for rule in ("class-not-trained", "mask-outside-box") for word in ("--allow", rule)]
    assert "the training would stop" not in solq_lab("check-data", root, *allowed).stdout
    assert "by the square-root rule" in solq_lab("finetune", root, "--minutes", 0.1).stdout
    printed = table_of(solq_lab("evaluate", run).stdout)
    solq_lab("export", run, f"{kind}.safetensors")

    with contextlib.chdir(workspace):
        experiment, predictor = Run(run).experiment, Predictor(run)
        truth, dataset = split_of(experiment, "val"), build_images(experiment)
        for explorer in (DetectionExplorer, AttentionExplorer):
            explorer({"SOLQ": predictor}, dataset, score=0.0)
        CodecExplorer({"val": truth}, "codecs", mask_size=28, vector_dim=36)
        ids = {str(truth.images / one["file_name"]): one["id"] for one in read_annotations(truth.annotations)["images"]}

    arguments = ["--recursive", "--out", f"found {kind}", "--save", "coco,masks,drawn", "--score", 0]
    solq_lab("predict", run, truth.images, *arguments)
    found = workspace / f"found {kind}"
    names = {one["id"]: one["file_name"] for one in json.loads((found / "coco.json").read_text())["images"]}
    assert len(list(found.rglob("*.png"))) == 3 * len(names) == 30
    for ours, theirs in (("box", "bbox"), ("segm", "segm")):
        results = json.loads((found / f"coco_{theirs}.json").read_text())
        results = [one | {"image_id": ids[names[one["image_id"]]]} for one in results if names[one["image_id"]] in ids]
        data = COCO(str(workspace / truth.annotations))
        scorer = COCOeval(data, data.loadRes(results), theirs)
        scorer.evaluate(), scorer.accumulate(), scorer.summarize()
        row = next(line for line in printed if line.startswith(ours)).split()
        assert [float(number) for number in row[1:4]] == pytest.approx([*(100 * scorer.stats[:3])], abs=0.051)
