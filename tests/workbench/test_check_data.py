"""The check of a data set finds every fault, and "refused" is exactly what the loader rejects."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from malformed_annotations import HEIGHT, NUM_IMAGES, RUNS, SQUARE, WIDTH, annotation_files, valid_document
from PIL import Image
from pycocotools import mask as coco_rle
from tiny import tiny_experiment, write_tiny_dataset

from solq_lab.data.annotations import DataError
from solq_lab.data.coco import CocoDataset
from solq_lab.data.folders import Split, find_splits
from solq_lab.viz.data_report import class_distribution, sample_images, size_distribution, worst_images
from solq_lab.viz.labels import Labels
from solq_lab.viz.style import colours_of
from solq_lab.workbench.check.checker import check_data
from solq_lab.workbench.check.findings import KEPT, RULES, Finding, Findings
from solq_lab.workbench.check.report import Options, Report
from solq_lab.workbench.notebooks import run_notebook

Change = Callable[[dict[str, Any]], None]
PIXELS = {
    name: np.random.default_rng(len(name) + ord(name[0])).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name in NUM_IMAGES
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def clean_document() -> dict[str, Any]:
    """The document of `malformed_annotations.py`, with boxes and areas that fit the masks."""
    document = valid_document()
    for entry in document["annotations"][1:]:
        entry |= {"bbox": [10, 0, 2, 10], "area": 20}
    return document


def write_split(root: Path, change: Change | None = None, name: str = "train") -> Split:
    """Two images and their annotations, changed by `change`."""
    document = clean_document()
    if change is not None:
        change(document)
    images = root / name
    images.mkdir(parents=True)
    for file_name, pixels in PIXELS.items():
        Image.fromarray(pixels if name == "train" else 255 - pixels).save(images / file_name)
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(document))
    return Split(name, images, path)


def broken(report: Report) -> dict[str, int]:
    """How often each rule was broken, without the notes."""
    return {
        rule: report.findings.total(rule)
        for rule in RULES
        if report.findings.total(rule) and RULES[rule].severity != "note"
    }


def check(*splits: Split, processes: int = 1, **options: Any) -> Report:
    return check_data(splits, Options(**options), processes=processes)


def put(section: str, place: int, **values: Any) -> Change:
    """Change some fields of one entry."""
    return lambda document: document[section][place].update(values)


def add(section: str, place: int, **values: Any) -> Change:
    """Repeat an entry with some fields changed."""
    return lambda document: document[section].append(copy.deepcopy(document[section][place]) | values)


# ---- a clean data set


def test_a_clean_data_set_has_no_finding_but_notes(tmp_path):
    report = check(write_split(tmp_path))
    assert broken(report) == {}
    assert report.is_clean
    assert report.findings.total("without-objects") == 1  # the second image has only a crowd
    *counts, per_class = report.splits["train"].summary.values()
    assert counts == [2, 1, 2, 1, 1.0, 2]
    assert per_class == {"cat": 1, "dog": 1}
    assert "nothing that would stop or harm a training" in report.table("here")


def test_a_data_set_without_images_has_nothing_to_learn(tmp_path):
    split = write_split(tmp_path, lambda document: document.update(images=[], annotations=[]))
    assert broken(check(split)) == broken(check(split, processes=2)) == {"nothing-to-learn": 1}
    assert worst_images(check(split)) == {}
    class_distribution(check(split)), size_distribution(check(split))


def test_the_drawn_shapes_are_clean(tmp_path):
    write_tiny_dataset(tmp_path)
    splits = [Split(name, tmp_path / name, tmp_path / f"{name}.json") for name in ("train", "val")]
    report = check(*splits)
    assert broken(report) == {}
    assert report.findings.total("name-in-both") == 4  # 1.png is another image in each split


def test_cocos_own_annotations_have_only_classes_that_50_images_cannot_cover(coco_tiny):
    report = check(*find_splits(coco_tiny), processes=2)
    assert broken(report) == {"class-not-trained": 10}
    assert [*report.splits["train"].summary.values()][:4] == [50, 1, 465, 5]
    assert [*report.splits["val"].summary.values()][:4] == [50, 2, 377, 5]


# ---- one fault each

FAULTS = {
    "categories": [put("categories", 1, id=1), put("categories", 0, id="1")],
    "categories-same-name": [put("categories", 1, name="cat")],
    "object-twice": [add("annotations", 0, id=50)],
    "image-entry": [add("images", 1, id=9, height=0), lambda document: document["images"].append("a.png")],
    "path-leaves-folder": [
        add("images", 1, id=9, file_name="../../x.jpg"),
        add("images", 1, id=9, file_name="/etc/passwd"),
        add("images", 1, id=9, file_name="a/../../x.jpg"),
    ],
    "duplicate-image-id": [add("images", 1, file_name="a.png")],
    "object-entry": [
        put("annotations", 0, category_id="1"),
        put("annotations", 0, iscrowd="0"),
        lambda document: document["annotations"].append(7),
    ],
    "unknown-image": [put("annotations", 0, image_id=99)],
    "unknown-category": [put("annotations", 0, category_id=99)],
    "duplicate-file-name": [add("images", 1, id=9), add("images", 1, id=9, file_name="./b.png")],
    "duplicate-object-id": [put("annotations", 1, id=1)],
    "image-missing": [
        put("images", 1, file_name="c.png"),
        put("images", 1, file_name="no\x00ne/c.png"),
        put("images", 1, file_name="a" * 5000 + "/c.png"),
    ],
    "image-size": [put("images", 1, height=WIDTH, width=HEIGHT)],
    "box": [
        put("annotations", 0, bbox=[1, 2, 3]),
        put("annotations", 0, bbox=[1, 2, 3, float("nan")]),
        put("annotations", 0, bbox=[1, 2, "3", 4]),
    ],
    "box-without-area": [put("annotations", 0, bbox=[10, 5, 0, 10]), put("annotations", 0, bbox=[10, 5, 4, -10])],
    "box-outside": [put("annotations", 0, bbox=[100, 5, 10, 10]), put("annotations", 0, bbox=[-30, 5, 10, 10])],
    "box-beyond-image": [
        put("annotations", 0, bbox=[10, 5, 10, 40], segmentation=[[10, 5, 20, 5, 20, 30, 10, 30]], area=250),
        put("annotations", 0, bbox=[10, 5, 10, 25], segmentation=[[10, 5, 20, 5, 20, 34, 10, 34]], area=250),
    ],
    "mask": [
        put("annotations", 0, segmentation=[[10, 5], [20, 5], [20, 15]]),
        put("annotations", 0, segmentation=[SQUARE[:-1]]),
        put("annotations", 0, segmentation=[[*SQUARE[:-1], float("inf")]]),
        put("annotations", 0, segmentation=[[*SQUARE[:-1], 1e9]]),
        put("annotations", 0, segmentation={"size": [WIDTH, HEIGHT], "counts": RUNS["counts"]}),
        put("annotations", 0, segmentation={"size": [HEIGHT, WIDTH], "counts": [10, 20]}),
        put("annotations", 0, segmentation={"size": [HEIGHT, WIDTH], "counts": "not an RLE"}),
    ],
    "mask-missing": [put("annotations", 0, segmentation=[]), put("annotations", 0, segmentation=None)],
    "mask-without-area": [put("annotations", 0, segmentation=[[10, 5, 20, 15]])],
    "mask-empty": [
        put("annotations", 0, segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, area=0),
        put("annotations", 0, segmentation=[[50, 5, 60, 5, 60, 15]], area=0),
    ],
    "mask-outside-box": [put("annotations", 0, bbox=[15, 5, 8, 10])],
    "mask-smaller-than-box": [put("annotations", 0, bbox=[10, 5, 30, 10])],
    "area": [put("annotations", 0, area=area) for area in (400, -9, float("nan"), 10**400)],
    "crowd": [
        put("annotations", 2, bbox=[1, 2]),
        put("annotations", 2, category_id=99),
        put("annotations", 2, segmentation={"size": [1, 1], "counts": [1]}),
    ],
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [pytest.param(rule, c, id=f"{rule}-{n}") for rule, cs in FAULTS.items() for n, c in enumerate(cs)],
)
def test_a_fault_is_found_once_and_under_its_name(tmp_path, rule, change):
    report = check(write_split(tmp_path, change))
    others = {"categories": {"unknown-category"}, "image-size": {"crowd"}}.get(rule, set())
    assert {name: count for name, count in broken(report).items() if name not in others} == {rule: 1}
    (finding,) = report.findings.worst(rule, "train")
    assert finding.message.isprintable()
    assert RULES[rule].title in report.table("here")


@pytest.mark.parametrize("content", [b"", b"GIF8", b"not an image"])
def test_a_damaged_image_is_found_by_opening_it(tmp_path, content):
    split = write_split(tmp_path)
    (split.images / "b.png").write_bytes(content)
    assert broken(check(split)) == {"image-damaged": 1}
    assert broken(check(split, look="header")) == {"image-damaged": 1}
    assert broken(check(split, look="names")) == {}


def test_a_truncated_jpeg_is_found_by_decoding_it_and_not_by_its_header(tmp_path, coco_tiny):
    shutil.copytree(coco_tiny, tmp_path / "coco")
    (split, _) = find_splits(tmp_path / "coco")
    path = next(split.images.iterdir())
    path.write_bytes(path.read_bytes()[:-2000])
    report = check(split, processes=2)
    assert broken(report) == {"image-damaged": 1}
    assert path.name in report.findings.worst("image-damaged", "train")[0].message
    assert broken(check(split, look="header")) == {}


def test_a_link_out_of_the_folder_is_rejected_as_in_training_unless_it_is_allowed(tmp_path):
    split = write_split(tmp_path)
    (split.images / "b.png").rename(tmp_path / "stored.png")
    (split.images / "b.png").symlink_to(tmp_path / "stored.png")
    assert broken(check(split)) == {"path-leaves-folder": 1}
    assert _is_rejected_by_the_loader(split.images, split.annotations)
    assert broken(check(split, allow_links=True)) == {}
    (tmp_path / "stored.png").unlink()
    assert broken(check(split, allow_links=True)) == {"image-missing": 1}


def test_a_missing_image_is_named_with_the_file_that_is_meant(tmp_path):
    split = write_split(tmp_path)
    before = split.images / "b.png"
    for name in ("B.PNG", "0a1b2c3d-b.png", "b.jpg", "b", "sub/b.png "):
        (split.images / name).parent.mkdir(exist_ok=True)
        before = before.rename(split.images / name)
        (finding,) = check(split).findings.worst("image-missing", "train")
        assert finding.message == f"image id 2: 'b.png', while there is {name!r}"


def test_masks_are_not_looked_at_where_none_are_learnt(tmp_path):
    split = write_split(tmp_path, put("annotations", 0, segmentation=None))
    assert broken(check(split)) == {"mask-missing": 1}
    assert broken(check(split, with_masks=False)) == {}


def test_a_split_without_an_object_to_learn_is_rejected_and_one_of_many_crowds_is_harmful(tmp_path):
    def crowds(count: int) -> Change:
        return lambda document: [entry.update(iscrowd=1, category_id=1) for entry in document["annotations"][:count]]

    assert broken(check(write_split(tmp_path / "2", crowds(1)))) == {"many-crowds": 1}
    nothing = write_split(tmp_path / "3", crowds(3))
    assert broken(check(nothing)) == {"nothing-to-learn": 1}
    assert _is_rejected_by_the_loader(nothing.images, nothing.annotations)
    none = write_split(tmp_path / "4", lambda document: document.update(annotations=[]))
    for name, rules in (("train", {"nothing-to-learn": 1}), ("val", {"nothing-to-measure": 1}), ("test", {})):
        assert broken(check(none._replace(name=name))) == rules


def test_more_objects_than_queries_or_detections_are_found(tmp_path):
    report = check(write_split(tmp_path), queries=1, detections=1)
    assert broken(report) == {"over-queries": 1}
    assert report.findings.total("over-detections") == 1
    assert "image id 1: 'a.png': 2 objects, 1 queries" in report.table("here")


# ---- between images and splits


def test_equal_files_are_found_within_a_split_and_between_two(tmp_path):
    train, val = write_split(tmp_path), write_split(tmp_path, name="val")
    assert broken(check(train, val)) == {}
    shutil.copy(train.images / "a.png", train.images / "b.png")
    shutil.copy(train.images / "a.png", val.images / "b.png")
    report = check(train, val)
    assert broken(report) == {"image-twice": 1, "image-in-both": 1}
    assert report.findings.total("name-in-both") == 1
    assert broken(check(train, val, look="header")) == {}
    assert check(train, val, look="header").findings.total("name-in-both") == 2


def test_categories_that_mean_something_else_in_val_are_found(tmp_path):
    def swap(document: dict[str, Any]) -> None:
        document["categories"][0]["name"], document["categories"][1]["name"] = "dog", "bird"

    report = check(write_split(tmp_path), write_split(tmp_path, swap, name="val"))
    assert broken(report) == {"categories-swapped": 1, "categories-differ": 1, "class-not-trained": 1}


def test_a_category_that_only_val_knows_is_rejected_as_in_training(tmp_path):
    def rename(document: dict[str, Any]) -> None:
        document["categories"][0]["id"] = document["annotations"][0]["category_id"] = 5

    report = check(write_split(tmp_path), write_split(tmp_path, rename, name="val"))
    assert report.findings.total("unknown-category") == 1


# ---- agreement with the loader


@cache
def _folder_of_images(root: Path) -> Path:
    return write_split(root, name="train").images


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=annotation_files())
def test_severity_refused_is_what_the_loader_rejects(tmp_path_factory, content):
    images = _folder_of_images(tmp_path_factory.getbasetemp() / "agreement")
    path = images.parent / "any.json"
    path.write_bytes(content)
    assert _is_rejected_by_the_check(images, path) == _is_rejected_by_the_loader(images, path)


def _is_rejected_by_the_loader(images: Path, annotations: Path) -> bool:
    try:
        dataset = CocoDataset(images, annotations, mask_size=8)
        for index in range(len(dataset)):
            dataset[index]
    except DataError:
        return True
    return False


def _is_rejected_by_the_check(images: Path, annotations: Path) -> bool:
    try:
        report = check(Split("any", images, annotations))
    except DataError:
        return True
    json.dumps(report.to_dict())
    report.table("any").encode()
    return any(report.findings.found("refused"))


@pytest.mark.parametrize("rule", sorted(FAULTS))
def test_every_refused_fault_is_rejected_by_the_loader_and_no_other_is(tmp_path, rule):
    for number, change in enumerate(FAULTS[rule]):
        split = write_split(tmp_path / str(number), change)
        rejected = _is_rejected_by_the_loader(split.images, split.annotations)
        assert rejected == (RULES[rule].severity == "refused")


# ---- masks against an independent count


def test_pixels_outside_the_box_are_counted_as_numpy_counts_them(tmp_path):
    random = np.random.default_rng(5)
    for number in range(20):
        bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        top, left = random.integers(0, 15, 2)
        bitmap[top : top + 12, left : left + 14] = random.random((12, 14)) < 0.8
        rle = coco_rle.encode(np.asfortranarray(bitmap))
        mask = {"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()}
        x, y = int(left) + 5, int(top) + 2
        change = put("annotations", 0, segmentation=mask, bbox=[x, y, 8, 9], area=int(bitmap.sum()))
        report = check(write_split(tmp_path / str(number), change))
        inside = bitmap[max(y - 1, 0) : y + 10, max(x - 1, 0) : x + 9].sum()
        (finding,) = report.findings.worst("mask-outside-box", "train")
        assert f"{bitmap.sum() - inside} of the mask's {bitmap.sum()} pixels lie outside" in finding.message


# ---- counting


def test_every_finding_is_counted_and_the_worst_are_kept():
    findings = Findings()
    weights = np.random.default_rng(0).permutation(5 * KEPT)
    findings.add("train", (Finding("box", f"{weight}", weight=float(weight)) for weight in weights))
    assert findings.total("box") == 5 * KEPT
    assert [finding.message for finding in findings.worst("box", "train")[:3]] == ["499", "498", "497"]
    assert len(findings.worst("box", "train")) == KEPT
    assert findings.worst("box", "val") == []


def test_of_equally_bad_findings_the_first_are_kept():
    findings = Findings()
    findings.add("train", (Finding("box", f"{number}") for number in range(3 * KEPT)))
    assert [finding.message for finding in findings.worst("box", "train")] == [str(number) for number in range(KEPT)]


def test_processes_make_no_difference(tmp_path):
    split = write_split(
        tmp_path,
        lambda document: (
            add("annotations", 0, id=9, bbox=[1, 1, 0, 0])(document),
            put("images", 1, file_name="c.png")(document),
        ),
    )
    assert check(split, processes=2).to_dict() == check(split, processes=1).to_dict()


# ---- the command


@pytest.fixture
def command(command_line):
    """Run `solq-lab check-data ARGUMENTS` in a fresh folder: exit status and all it wrote."""
    return partial(command_line, "check-data")


def test_a_clean_folder_ends_with_0_and_writes_its_report(command, tmp_path):
    write_split(tmp_path / "mine"), write_split(tmp_path / "mine", name="val")
    status, output = command("mine")
    assert status == 0
    assert "nothing that would stop or harm a training" in output
    report = json.loads((tmp_path / "runs" / "data_checks" / "mine" / "report.json").read_text())
    assert report["summary"]["train"]["objects"] == 2


def test_problems_end_with_1_unless_they_are_allowed(command, tmp_path):
    split = write_split(tmp_path / "mine", put("annotations", 0, bbox=[10, 5, 0, 10]))
    status, output = command(split.annotations, "--images", split.images)
    assert status == 1
    assert "problems: box-without-area" in output
    assert "annotation id 1: bbox [10, 5, 0, 10]" in output
    assert command("mine", "--allow", "box-without-area=1")[0] == 0
    assert command("mine", "--allow", "box-without-area=0")[0] == 1
    assert command("mine", "--allow", "box-without-area")[0] == 0
    assert command("mine", "--fail-on", "refused")[0] == 0
    assert command("mine", "--allow", "box-without-area", "--fail-on", "note")[0] == 1


def test_an_experiment_is_checked_with_its_own_queries_and_folders(command, tmp_path):
    write_tiny_dataset(tmp_path / "images")
    (tmp_path / "tiny.yaml").write_text(tiny_experiment(tmp_path / "images").to_yaml())
    assert command("tiny.yaml")[0] == 0
    status, output = command("tiny.yaml", "model.queries=1")
    assert status == 1
    assert "problems: over-queries" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["mine", "--allow", "boxes"], "allowed is RULE or RULE=COUNT; rules: categories, categories-same-name"),
        (["mine", "--allow", "box=many"], "found 'box=many'"),
        (["mine", "data.root=x"], "data.root: mine is the folder to check"),
        (["mine", "--images", "nowhere"], "nowhere: no such image folder"),
        (["broken"], "instances_train.json: not JSON"),
        (["no_images"], "no folder with its images"),
    ],
)
def test_what_cannot_be_read_ends_with_2(command, tmp_path, arguments, message):
    write_split(tmp_path / "mine")
    write_split(tmp_path / "broken").annotations.write_text("{")
    shutil.rmtree(write_split(tmp_path / "no_images").images)
    status, output = command(*arguments)
    assert status == 2
    assert message in output.replace("\n", " ").replace("│ ", "")


def test_every_rule_that_images_can_show_has_a_figure(tmp_path):
    def add_faults(document: dict[str, Any]) -> None:
        document["categories"][0]["name"] = "$x$\u200b"
        document["images"].append({"id": 8, "file_name": "damaged.png", "height": 5, "width": 5})
        for number, (rule, changes) in enumerate(FAULTS.items()):
            if rule in ("box-outside", "mask-outside-box", "mask-empty", "mask", "area"):
                changed = clean_document()
                changes[0](changed)
                document["annotations"].append(changed["annotations"][0] | {"id": 100 + number})

    split = write_split(tmp_path, add_faults)
    (split.images / "damaged.png").write_bytes(b"nothing")
    report = check(split)
    figures = worst_images(report, count=2)
    shown = ("box-outside", "mask-outside-box", "mask-empty", "mask", "area", "image-damaged", "object-twice")
    assert set(figures) == {f"{rule} train" for rule in shown}
    for figure in (*figures.values(), class_distribution(report), size_distribution(report)):
        figure.draw_without_rendering()
    panel = figures["mask-outside-box train"].axes[0]
    assert (panel.patches[0].get_x(), panel.patches[0].get_width()) == (14.5, 8)
    assert len(panel.collections) == 1  # the mask's outline


def test_the_frames_list_what_the_report_holds(tmp_path):
    report = check(write_split(tmp_path, put("annotations", 0, area=400)))
    assert report.frame().loc["objects", "train"] == 2
    rules = report.findings.frame(["train"])
    assert rules.loc["area", ["severity", "train"]].tolist() == ["harmful", 1]
    worst = report.findings.worst_frame(["train"], 5).set_index("rule")
    assert worst.loc["area", "finding"] == "annotation id 1: area 400 of a mask of 100 pixels"


@pytest.mark.slow
def test_the_notebook_shows_the_tables_and_the_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_split(tmp_path / "mine", put("annotations", 0, bbox=[10, 5, 30, 10]))
    executed = run_notebook(REPOSITORY / "notebooks" / "data_report.ipynb", parameters={"root": "mine"})
    figures = {path.name for path in executed.parent.glob("*.png")}
    assert figures == {"mask-smaller-than-box_train.png", "images_train.png", "classes.png", "sizes.png"}
    page = executed.with_suffix(".html").read_text()
    assert "the mask fills [10.0, 5.0, 10.0, 10.0] of bbox [10, 5, 30, 10]" in page
    assert "boxes much wider than their mask" in page


def test_a_copy_of_another_size_or_coding_is_found_between_splits_and_another_image_is_not(tmp_path, coco_tiny):
    first, second, *_ = sorted((coco_tiny / "val2017").glob("*.jpg"))
    splits = [write_split(tmp_path, name=name) for name in ("train", "val")]
    for split, file in zip(splits, (first, first), strict=True):
        document = json.loads(split.annotations.read_text())
        copies = {"copy": file, "other": second if split.name == "val" else sorted(second.parent.glob("*.jpg"))[2]}
        for number, (name, path) in enumerate(copies.items(), start=20):
            with Image.open(path) as opened:
                image = opened.convert("RGB") if split.name == "train" else opened.convert("RGB").resize((211, 170))
            image.save(split.images / f"{name}_{split.name}.jpg", quality=70)
            width, height = image.size
            entry = {"id": number, "file_name": f"{name}_{split.name}.jpg", "width": width, "height": height}
            document["images"].append(entry)
        split.annotations.write_text(json.dumps(document))
    (finding,) = check(*splits).findings.worst("lookalike-in-both", "val")
    assert finding.message == "'copy_val.jpg' of val looks like 'copy_train.jpg' of train"


def test_the_report_says_what_the_data_asks_for(tmp_path):
    split = write_split(tmp_path)
    report = check(split, test_scale=HEIGHT, max_size=WIDTH)
    assert report.advice[0].startswith("  model.queries=20: at most 2 objects in an image")
    assert "data.test_scale=128" in report.advice[1]
    assert report.findings.total("object-small") == 1  # of 2 x 10 pixels
    assert report.findings.total("class-few-objects") == 2
    assert b"segmentation" not in pickle.dumps(report.splits)  # entries are read when they are drawn
    objects = map(report.splits["train"].objects_of, report.samples("train"))
    assert [[of_class for _, of_class in some] for some in objects] == [["cat"], ["cat", "dog"]]


def labels_of(figure):
    artists = [artist for axes in figure.axes for artist in axes.artists]
    return [label for artist in artists if isinstance(artist, Labels) for label in artist.labels]


def test_a_class_has_its_channels_colour_whichever_is_seen_first(tmp_path):
    split = write_split(tmp_path, lambda document: document["annotations"][0].update(category_id=2))
    figure = sample_images(check(split), "train")
    colours = {name: colour for name, _, colour in labels_of(figure)}
    assert [colours[name] for name in ("cat", "dog")] == colours_of([0, 1])


def test_samples_are_shown_with_the_class_of_every_object(tmp_path):
    report = check(write_split(tmp_path))
    figure = sample_images(report, "train")
    assert [name for name, _, _ in labels_of(figure)] == ["cat", "cat", "dog"]
