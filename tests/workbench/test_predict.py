"""The command predict: every kind of input, every format of output read back by other code."""

import csv
import json
import os
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import tiny_experiment, write_model
from typer.testing import CliRunner

from solq_lab.build import build_dataset
from solq_lab.config import change_experiment
from solq_lab.data.classes import ClassMap
from solq_lab.data.shapes.writer import write_shapes
from solq_lab.evaluation.evaluator import evaluate_model
from solq_lab.inference.predictor import DeviceError, Predictor
from solq_lab.structures import Detections
from solq_lab.workbench.cli import app
from solq_lab.workbench.predictions.outputs import Coco, InputImage, Masks
from solq_lab.workbench.predictions.sources import Source, find_sources

SHIPPED = REPOSITORY / "experiments" / "shipped" / "uqr"
READ = ["L.png", "1.png", "P.png", "RGBA.png", "LA.png", "CMYK.jpg", "RGB.webp", "RGB.bmp", "RGB.tiff"]
READ += ["P.gif", "RGB.jp2", "RGB.avif"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of two classes, 16 objects per image."""
    folder = tmp_path_factory.mktemp("weights")
    experiment = tiny_experiment(folder)
    return write_model(folder / "weights.safetensors", experiment, classes=ClassMap(("box", "ring"), (3, 5)))


@pytest.fixture
def run(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Predict in a fresh folder; the result, whose exception is the error that the command line would print."""
    monkeypatch.chdir(tmp_path)

    def predict(*arguments: object, model: Path = weights):
        return CliRunner().invoke(app, ["predict", str(model), *map(str, arguments)])

    return predict


def draw(path: Path | str, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: object) -> Path:
    image = Image.new("RGB", size, (90, 140, 60))
    ImageDraw.Draw(image).ellipse((5, 5, 25, 20), (200, 40, 40))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.convert(mode).save(path, **options)
    return Path(path)


def files_in(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# ---- inputs


@pytest.mark.parametrize("kind", READ)
def test_every_mode_of_8_bits_is_read(run, kind):
    mode, ending = kind.split(".")
    draw(f"photos/image.{ending}", mode=mode)
    assert run("photos", "--out", "out").exit_code == 0
    assert Image.open("out/image.png").size == (40, 30)


@pytest.mark.parametrize("size", [(1, 1), (2, 700), (700, 1), (33, 31)])
def test_an_image_of_any_side_ratio_is_drawn_at_its_own_size(run, size):
    draw("image.png", size=size)
    assert run("image.png", "--score", 0, "--out", "out", "--save", "drawn,masks").exit_code == 0
    assert Image.open("out/image.png").size == Image.open("out/masks/image.png").size == size


def test_an_animation_gives_its_first_image_and_16_bits_are_named_and_skipped(run):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    Path("in").mkdir()
    for name in ("two.gif", "moving.webp"):
        frames[0].save(f"in/{name}", save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(np.full((20, 20), 4000, dtype=np.uint16)).save("in/deep.png")
    result = run("in", "--score", 1)
    assert result.exit_code == 1
    assert "in/deep.png: more than 8 bits per channel" in result.output
    for name in ("two", "moving"):
        assert Image.open(f"predictions/{name}.png").getpixel((5, 5)) == (255, 0, 0)


NAMES = ["with space.png", "50%25.png", "größe-図.png", "a.b.c.png", "-dash.png", "[x].png", f"{240 * 'a'}.png"]


@pytest.mark.parametrize("name", NAMES)
def test_any_file_name_is_found_and_kept(run, name):
    draw(f"in/{name}")
    for named in (f"in/{name}", "in"):
        assert run(named, "--out", "out", "--save", "drawn,csv", "--score", 0).exit_code == 0
        assert files_in("out") == sorted([name, "objects.csv"])
    with open("out/objects.csv", encoding="utf-8") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {f"in/{name}"}


def test_a_name_that_is_no_utf8_stops_nothing(command_line, weights):
    draw(name := os.fsdecode(b"\xff.png"))
    assert command_line("predict", str(weights), name, "--save", "drawn,coco,csv", "--score", "0")[0] == 0
    assert os.fsencode(name) in Path("predictions/objects.csv").read_bytes()


@pytest.mark.parametrize("given", [["p/**/*"], ["p", "--recursive"]])
def test_patterns_are_expanded_outputs_are_no_inputs_and_what_is_left_out_is_counted(run, caplog, given):
    draw("p/a.jpg"), draw("p/deep/b.tga")
    for name in ("notes.txt", "c.HEIC", "d.heic", "e", ".hidden"):
        Path("p", name).write_text("no image")
    for _ in range(2):
        caplog.clear()
        assert run(*given, "--out", "p/out").exit_code == 0
        assert files_in("p/out") == ["a.png", "deep/b.png"]
        (line,) = (line for line in caplog.messages if "left out" in line)
        assert line == f"{given[0]}: files left out by their ending: 2 .heic, 1 without ending, 1 .txt"
    Path("links").mkdir()
    Path("links/p").symlink_to("../p")
    assert run("links", "--recursive", "--out", "seen").exit_code == 0
    assert {"p/a.png", "p/deep/b.png"} <= {*files_in("seen")}
    os.remove("p/a.jpg")
    assert "but 2 .heic, 1 without ending, 1 .txt; --recursive looks into its folders too" in str(run("p").exception)
    assert "no file fits this pattern" in str(run("p/*.tiff").exception)
    assert "nowhere: no such file or folder" in str(run("nowhere").exception)
    assert "standard input is not read" in str(run("-").exception)


def test_no_file_of_the_user_is_written_over(run, tmp_path):
    """Not even one that is no input, where the outputs lie beside the inputs."""
    draw("own/shot.jpg")
    precious = draw("own/shot.png", size=(50, 50)).read_bytes()
    assert run("own/shot.jpg", "--out", "own").exit_code == 0
    assert Path("own/shot.png").read_bytes() == precious
    assert files_in("own") == ["shot.jpg", "shot.png", "shot_2.png"]
    assert "folder of the inputs" in str(run("own", "--out", "own/").exception)  # its drawings would be inputs
    draw("m/a.png"), draw("m/a_classes.png"), draw("m/masks/a.png")
    assert run("m", "--out", "out", "--recursive", "--save", "masks,drawn").exit_code == 0
    assert len([name for name in files_in("out") if name.endswith(".png")]) == 9

    draw("yolo/images/a.png")
    mine = {name: Path("yolo", name) for name in ("labels/a.txt", "data.yaml", "objects.csv", "coco.json")}
    for path in mine.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for kind, name in (("yolo", "data.yaml"), ("csv", "objects.csv"), ("coco", "coco.json")):
        error = run("yolo/images", "--out", "yolo", "--save", kind).exception
        assert f"yolo/{name} would be written over" in str(error)
    mine.pop("data.yaml").unlink()
    assert run("yolo/images", "--out", "yolo", "--save", "yolo").exit_code == 0
    assert {path.read_text() for path in mine.values()} == {"mine"}
    assert Path("yolo/labels/a_2.txt").exists()


@pytest.mark.parametrize("image_id", ["7", None, 7.5])
def test_an_image_id_that_is_no_whole_number_is_rejected(run, image_id):
    draw("a.png")
    Path("known.json").write_text(json.dumps({"images": [{"id": image_id, "file_name": "a.png"}]}))
    assert "known.json" in str(run("a.png", "--annotations", "known.json").exception)


def test_web_addresses_are_fetched_and_failures_are_named(run, server):
    server.files["/a%20b.png?size=1"] = draw("web/x.png").read_bytes()
    server.files["/page.png"] = b"<html>not an image</html>"
    addresses = [f"{server.url}/a%20b.png?size=1", f"{server.url}/page.png", f"{server.url}/none.png"]
    result = run(*addresses, "--out", "out", "--json")
    assert result.exit_code == 1
    assert files_in("out") == ["a b.png"]
    assert f"{addresses[1]}: the host answers with a web page instead of the file" in result.output
    assert f"{addresses[2]}: the server answers 404 Not Found; check the address" in result.output


@pytest.mark.parametrize("arguments", [("--save", "drawn,cocoo"), ("--batch", "0"), ("--score", "2")])
def test_an_unknown_choice_is_rejected(run, arguments):
    draw("a.png")
    assert run("a.png", *arguments).exit_code == 2


def test_a_device_that_is_not_there_is_rejected_with_those_that_exist(run):
    draw("a.png")
    error = run("a.png", "--device", "gpu").exception
    assert isinstance(error, DeviceError)
    assert "allowed are cpu, cuda, cuda:1" in str(error)


# ---- outputs


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of drawn shapes that the model SHIPPED finds."""
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_shapes(folder, level="easy", train=1, val=4, seed=3, processes=1)
    return folder


def test_all_formats_hold_the_same_objects(run, shapes):
    draw("in/a.png")
    Image.open(next((shapes / "val").iterdir())).resize((200, 90)).save(Path("in/b.png"))
    arguments = ("--score", 0.05, "--out", "out", "--save", "drawn,coco,masks,polygons,yolo,csv")
    result = run("in", *arguments, model=SHIPPED)
    assert result.exit_code == 0, result.output
    found = Predictor(SHIPPED).predict("in/b.png").above(0.05).clipped()
    expected = found.masks_array()
    assert expected.any()

    top = np.asarray(Image.open("out/masks/b.png"))
    assert sorted(set(top.ravel()) - {0}) == [row + 1 for row in range(len(found)) if (top == row + 1).any()]
    for row in reversed(range(len(found))):  # the best object is on top
        better = expected[:row].any(axis=0)
        np.testing.assert_array_equal(top == row + 1, expected[row] & ~better)
    classes = np.asarray(Image.open("out/masks/b_classes.png"))
    np.testing.assert_array_equal(classes, np.r_[0, found.labels.numpy() + 1][top])
    assert Path("out/masks/classes.txt").read_text().split() == list(Predictor(SHIPPED).classes.names)

    labelme = json.loads(Path("out/polygons/b.json").read_text())
    assert (Path("out/polygons") / labelme["imagePath"]).resolve() == Path("in/b.png").resolve()
    assert (labelme["imageWidth"], labelme["imageHeight"]) == (200, 90)
    rows = list(csv.DictReader(Path("out/objects.csv").read_text().splitlines()))
    theirs = [row for row in rows if row["file"] == "in/b.png"]
    data = COCO("out/coco.json")
    for row, one in enumerate(found):
        shapes = [shape for shape in labelme["shapes"] if shape["group_id"] == row + 1]
        filled = np.zeros_like(expected[0])
        for shape in shapes:
            polygon = {"segmentation": [np.ravel(shape["points"]).tolist()], "image_id": 2}
            filled |= data.annToMask(polygon).astype(bool)
        np.testing.assert_array_equal(filled, expected[row])
        assert (theirs[row]["class"], int(theirs[row]["area"])) == (one.name, expected[row].sum())
        assert float(theirs[row]["x1"]) == pytest.approx(one.box[2], abs=0.006)

    annotations = data.loadAnns(data.getAnnIds(imgIds=[2]))
    assert all(np.array_equal(data.annToMask(entry), mask) for entry, mask in zip(annotations, expected, strict=True))
    lines = [line.split() for line in Path("out/labels/b.txt").read_text().splitlines()]
    kept = [row for row in range(len(found)) if expected[row].any()]
    for row, (label, *shares) in zip(kept, lines, strict=True):
        points = np.array(shares, dtype=float).reshape(-1, 2) * (200, 90)
        polygon = {"segmentation": [points.round(3).ravel().tolist()], "image_id": 2}
        assert (int(label), (data.annToMask(polygon) != expected[row]).sum()) == (found[row].label, 0)


def test_no_objects_give_empty_files(run):
    draw("a.png")
    assert run("a.png", "--score", 1, "--out", "out", "--save", "drawn,coco,masks,polygons,yolo,csv").exit_code == 0
    assert not np.asarray(Image.open("out/masks/a.png")).any()
    assert json.loads(Path("out/polygons/a.json").read_text())["shapes"] == []
    assert json.loads(Path("out/coco_segm.json").read_text()) == []
    assert Path("out/labels/a.txt").read_text() == ""
    assert len(Path("out/objects.csv").read_text().splitlines()) == 1


def test_boxes_are_cut_at_the_borders_but_in_the_results_that_are_scored(tmp_path):
    zero, box = torch.zeros(1, dtype=torch.long), torch.tensor([[-3.0, 2.0, 50.0, 20.0]])
    found = Detections(torch.ones(1), zero, box, zero, None, ["box"], category_ids=[1])
    output = Coco(tmp_path, ClassMap(("box",), (1,)))
    output.write(InputImage(Source("a.png", "a"), 1, np.zeros((30, 40, 3), np.uint8)), found)
    output.close()
    assert json.loads((tmp_path / "coco_bbox.json").read_text())[0]["bbox"] == [-3, 2, 53, 18]
    assert json.loads((tmp_path / "coco.json").read_text())["annotations"][0]["bbox"] == [0, 2, 40, 18]


def test_a_class_name_with_a_line_break_stays_one_line(tmp_path):
    Masks(tmp_path, ClassMap(("ring\nroad", "box"), (1, 2))).close()
    assert (tmp_path / "masks" / "classes.txt").read_text() == "ring road\nbox\n"


def test_a_plain_detector_has_boxes_and_no_masks(run, tmp_path):
    experiment = tiny_experiment(tmp_path, codec={"kind": "none"}, model={"standardise_vectors": False})
    detector = write_model(tmp_path / "detector.safetensors", experiment)
    draw("a.png")
    assert run("a.png", "--score", 0, "--out", "out", "--save", "drawn,coco,yolo,csv", model=detector).exit_code == 0
    found = Predictor(detector).predict("a.png").clipped()
    label, *box = Path("out/labels/a.txt").read_text().splitlines()[0].split()
    x0, y0, x1, y1 = found[0].box
    assert int(label) == found[0].label
    assert [float(share) for share in box] == pytest.approx(
        [(x0 + x1) / 80, (y0 + y1) / 60, (x1 - x0) / 40, (y1 - y0) / 30], abs=1e-5
    )
    assert not Path("out/coco_segm.json").exists()
    assert "finds boxes, but no masks" in str(run("a.png", "--save", "polygons", model=detector).exception)


def test_pycocotools_scores_the_results_as_the_evaluation_does(run, shapes):
    truth = shapes / "annotations" / "instances_val.json"
    arguments = ("--score", 0, "--out", "out", "--save", "coco", "--annotations", truth)
    assert run(shapes / "val", *arguments, model=SHIPPED).exit_code == 0
    predictor = Predictor(SHIPPED)
    experiment = change_experiment(predictor.experiment, {"data.root": str(shapes)}, source="test")
    dataset = build_dataset(experiment, "val", predictor.classes)
    _, evaluation = evaluate_model(predictor.model, predictor.codec, dataset)
    for ours, theirs in (("box", "bbox"), ("segm", "segm")):
        data = COCO(str(truth))
        scorer = COCOeval(data, data.loadRes(f"out/coco_{theirs}.json"), theirs)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
        expected = [evaluation.metrics[f"{ours}.{name}"] for name in ("AP", "AP50", "AP75")]
        assert scorer.stats[:3] == pytest.approx(expected, abs=1e-6)
        assert expected[0] > 0.1

    draw("unknown.png")
    assert f"unknown.png: not among the 4 images of {truth}" in str(
        run("unknown.png", "--annotations", truth).exception
    )


# ---- videos


def write_video(path: str, size: tuple[int, int] = (48, 32), step: int = 1) -> None:
    """12 frames, at k * k `step`s where this is not 1, else at 12 frames per second."""
    av = pytest.importorskip("av")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height = size
        stream.codec_context.time_base = Fraction(1, 12 * step)
        for number in range(12):
            pixels = np.full((size[1], size[0], 3), 20 * number % 256, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = (number if step == 1 else number * number), Fraction(1, 12 * step)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("step", [1, 4])
def test_a_video_is_drawn_at_its_rate_and_its_frames_are_written(run, step):
    write_video("clip.mp4", step=step)
    result = run("clip.mp4", "--score", 0, "--out", "out", "--save", "drawn,masks,coco,csv", "--batch", 5)
    assert result.exit_code == 0, result.output
    assert "clip.mp4: 12 frames, 192 objects, drawn in out/clip.mp4" in result.output
    import av

    with av.open("out/clip.mp4") as drawn, av.open("clip.mp4") as given:
        theirs, ours = (list(container.decode(video=0)) for container in (given, drawn))
        assert step != 1 or drawn.streams.video[0].average_rate == 12
    assert [frame.time for frame in ours] == pytest.approx([frame.time for frame in theirs])
    assert (ours[0].width, ours[0].height) == (48, 32)
    assert len(list(Path("out/masks/clip").glob("*_classes.png"))) == 12
    images = json.loads(Path("out/coco.json").read_text())["images"]
    assert [image["frame"] for image in images] == list(range(12))
    assert len({image["id"] for image in images}) == 12


def test_a_damaged_video_is_skipped_and_without_pyav_the_install_line_is_given(run, monkeypatch):
    draw("in/a.png")
    Path("in/clip.mp4").write_bytes(b"no video at all")
    result = run("in", "--out", "out")
    assert result.exit_code == 1
    assert "in/clip.mp4: not a video that can be read to its end" in result.output
    assert files_in("out") == ["a.png"]
    write_video("small.ts"), write_video("large.ts", (64, 32))
    Path("in/clip.mp4").write_bytes(Path("small.ts").read_bytes() + Path("large.ts").read_bytes())
    result = run("in", "--out", "out", "--save", "csv")
    assert "in/clip.mp4: a frame of 64 x 32 pixels after some of 48 x 32; cut the video there" in result.output
    assert result.exit_code == 1
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'solq-lab[video]'" in str(run("in").exception)


def test_an_upright_phone_video_is_turned(run, tmp_path):
    """The matrix of the track header says so: here it is put in by hand."""
    write_video("clip.mp4")
    data = Path("clip.mp4").read_bytes()
    one, zero, w = (1 << 16).to_bytes(4), bytes(4), (1 << 30).to_bytes(4)
    identity = one + zero * 3 + one + zero * 3 + w
    quarter = zero + one + zero + (-(1 << 16)).to_bytes(4, signed=True) + zero * 4 + w
    place = data.index(identity, data.index(b"tkhd"))
    Path("turned.mp4").write_bytes(data[:place] + quarter + data[place + len(identity) :])
    assert run("turned.mp4", "--save", "masks", "--out", "out").exit_code == 0
    assert Image.open("out/masks/turned/000000.png").size == (32, 48)


def test_two_inputs_of_one_name_get_two_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw("a/x.png"), draw("b/x.png"), draw("b/x.jpg")
    found = find_sources(["a/x.png", "b", "b/x.jpg", "http://h/x.png"], Path("out"), ["drawn"])
    assert [source.stem for source in found] == ["a/x", "b/x", "b/x_2", "x"]
    found = find_sources(["b/x.png", "b/x.jpg"], Path("b"), ["drawn"])
    assert [source.stem for source in found] == ["x_2", "x_3"]
