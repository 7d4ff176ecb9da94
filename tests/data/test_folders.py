"""Data folders are found in every common layout, and refused where they have two readings."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import write_tiny_dataset

from solq_lab.build import build_dataset
from solq_lab.config import ConfigError, default_experiment, load_experiment
from solq_lab.data.coco import CocoDataset
from solq_lab.data.folders import find_splits
from solq_lab.data_folder import check_data_folder, open_folder, split_of
from solq_lab.errors import DataError

COCO = {"annotations/instances_train2017.json": "train2017", "annotations/instances_val2017.json": "val2017"}
LAYOUTS = {
    "COCO 2017": COCO,
    "COCO, images below": {
        "annotations/instances_train.json": "images/train",
        "annotations/instances_val.json": "images/val",
    },
    "COCO, plain names": {"annotations/train.json": "train", "annotations/valid.json": "valid"},
    "files in the folder itself": {"train.json": "train", "val.json": "val"},
    "all images in one folder": {
        "annotations/instances_train.json": "images",
        "annotations/instances_val.json": "images",
    },
    "Roboflow": {"train/_annotations.coco.json": "train", "valid/_annotations.coco.json": "valid"},
    "a folder per split": {"Train/labels.JSON": "Train/images", "validation/labels.JSON": "validation/images"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny"), train=6, val=4)


def lay_out(tiny: Path, root: Path, places: dict[str, str], *, sub: str = "") -> Path:
    """The tiny data set with its annotation files and images at the given places, train first."""
    for split, (file, folder) in zip(("train", "val"), places.items(), strict=False):
        document = json.loads((tiny / f"{split}.json").read_text())
        for image in document["images"]:
            name = f"{sub}{split} {image['file_name'].upper()}"
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / split / image["file_name"], root / folder / name)
            image["file_name"] = name
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(document))
    return root


def write_yolo(tiny: Path, root: Path) -> Path:
    """The tiny data set as a YOLO folder."""
    for split in ("train", "val"):
        document = json.loads((tiny / f"{split}.json").read_text())
        shutil.copytree(tiny / split, root / "images" / split)
        (root / "labels" / split).mkdir(parents=True)
        for image in document["images"]:
            lines = [
                f"{entry['category_id'] - 1} " + " ".join(str(side / 48) for side in entry["segmentation"][0])
                for entry in document["annotations"]
                if entry["image_id"] == image["id"]
            ]
            name = Path(image["file_name"]).with_suffix(".txt")
            (root / "labels" / split / name).write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [triangle, diamond]\nnc: 2\ntrain: images/train\nval: images/val\n")
    return root


@pytest.mark.parametrize("sub", ["", "a b/c/"], ids=["flat", "in sub-folders"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_found_and_data_root_alone_opens_it(tiny, tmp_path, layout, sub):
    root = lay_out(tiny, tmp_path / "my data", LAYOUTS[layout], sub=sub)
    (root / ".DS_Store").write_text("x")
    (root / "__MACOSX" / "train").mkdir(parents=True)
    (root / "README.json").write_text("{}")
    folders = [(root / file, root / folder) for file, folder in LAYOUTS[layout].items()]
    splits = find_splits(root)
    assert [(split.name, split.annotations, split.images) for split in splits] == [
        (name, *paths) for name, paths in zip(("train", "val"), folders, strict=True)
    ]

    experiment = write_experiment(tmp_path, root)
    check_data_folder(experiment)
    assert [split_of(experiment, name) for name in ("train", "val")] == [*splits]
    for name, count in (("train", 6), ("val", 4)):
        dataset = build_dataset(experiment, name)
        assert len(dataset) == count
        dataset[0]


def write_experiment(folder: Path, root: Path, *overrides: str):
    (folder / "mine.yaml").write_text("codec: {mask_size: 16, vector_dim: 16}\n")
    return load_experiment(folder / "mine.yaml", [f"data.root={root}", *overrides])


def test_explicit_names_win(tiny, tmp_path):
    root = lay_out(tiny, tmp_path / "data", COCO)
    lay_out(tiny, root, {"annotations/instances_train2014.json": "train2014"})
    with pytest.raises(DataError, match=r"2 annotation files for train.*instances_train2014.json.*instances_train2017"):
        check_data_folder(write_experiment(tmp_path, root))
    experiment = write_experiment(tmp_path, root, "data.train_annotations=annotations/instances_train2014.json")
    check_data_folder(experiment)
    assert split_of(experiment, "train").images == root / "train2014"


def test_two_layouts_in_one_folder_are_refused_with_both_readings(tiny, tmp_path):
    root = lay_out(tiny, write_yolo(tiny, tmp_path / "my data"), COCO)
    with pytest.raises(DataError) as refusal:
        find_splits(root)
    assert "can be read as train (annotations/instances_train2017.json), val (" in str(refusal.value)
    assert "or as train (data.yaml#train)" in str(refusal.value)
    assert "data.train_annotations=annotations/instances_train2017.json" in str(refusal.value)
    assert "'data.train_annotations=data.yaml#train'" in str(refusal.value)


def test_a_yolo_folder_is_read_in_place_and_again_after_a_change(tiny, tmp_path):
    root = write_yolo(tiny, tmp_path / "yolo")
    experiment = write_experiment(tmp_path, root)
    assert experiment.data.train_annotations == "data.yaml#train"
    dataset = build_dataset(experiment, "train")
    truth = CocoDataset(tiny / "train", tiny / "train.json", mask_size=16)
    assert dataset.classes.names == truth.classes.names
    for index in range(len(truth)):
        for ours, theirs in zip(
            dataset.truth.segmentations(dataset.truth.rows_of(index)),
            truth.truth.segmentations(truth.truth.rows_of(index)),
            strict=True,
        ):
            assert ours[0] == pytest.approx(theirs[0], abs=0.005)

    before = split_of(experiment, "train").annotations
    assert split_of(experiment, "train").annotations == before
    (root / "labels" / "train" / "1.txt").write_text("")
    after = split_of(experiment, "train").annotations
    assert after != before
    assert len(json.loads(after.read_text())["annotations"]) < len(dataset.truth)
    assert split_of(experiment.evaluated_on("train"), "val").annotations == after


def test_a_yolo_folder_is_read_through_links_absolute_paths_and_byte_order_marks(tiny, tmp_path):
    root = write_yolo(tiny, tmp_path / "yolo")
    expected = build_dataset(write_experiment(tmp_path, root), "train").truth
    mark = root / "labels" / "train" / "1.txt"
    mark.write_text(mark.read_text(), encoding="utf-8-sig")
    shutil.move(root / "images" / "train", tmp_path / "store")
    (root / "images" / "train").mkdir()
    (root / "images" / "train" / "a").symlink_to(tmp_path / "store")
    (root / "images" / "train" / "a" / "circle").symlink_to(tmp_path / "store")
    shutil.move(root / "labels" / "train", root / "labels" / "a")
    (root / "labels" / "train").mkdir()
    shutil.move(root / "labels" / "a", root / "labels" / "train" / "a")
    settings = f"names: [triangle, diamond]\ntrain: {root}/images/train\nval: {root}/images/val\n"
    (root / "data.yaml").write_text(settings)

    with pytest.raises(DataError, match=r"data\.allow_links: true"):
        build_dataset(write_experiment(tmp_path, root), "train")
    dataset = build_dataset(write_experiment(tmp_path, root, "data.allow_links=true"), "train")
    assert [len(dataset), len(dataset.truth)] == [6, len(expected)]
    (root / "data.yaml").write_text(settings.replace("diamond", "off"))
    with pytest.raises(DataError, match=r"False.*in quotes"):
        split_of(write_experiment(tmp_path, root), "train")


def test_a_yolo_folder_of_one_split_is_divided(tiny, tmp_path):
    root = write_yolo(tiny, tmp_path / "yolo")
    (root / "data.yaml").write_text("names: [triangle, diamond]\ntrain: images/train\n")
    experiment = write_experiment(tmp_path, root, "data.val_fraction=0.3")
    check_data_folder(experiment)
    assert [len(build_dataset(experiment, name)) for name in ("train", "val")] == [4, 2]
    assert [len(json.loads(split.annotations.read_text())["images"]) for split in find_splits(root, None, 0.3)] == [
        4,
        2,
    ]


def test_a_train_split_without_objects_is_rejected_and_a_val_split_is_warned_of(tiny, tmp_path, caplog):
    root = write_yolo(tiny, tmp_path / "yolo")
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match="6 of the 6 images of train have no label file"):
        build_dataset(write_experiment(tmp_path, root), "train")
    assert len(build_dataset(write_experiment(tmp_path, root), "val")) == 4
    assert "AP is not measured" in caplog.text


@pytest.mark.parametrize("place", ["annotations/instances_default.json", "my labels.json", "_annotations.coco.json"])
@pytest.mark.parametrize("folder", ["images", "images/default", "."])
def test_one_file_is_divided_at_random_but_always_alike(tiny, tmp_path, place, folder):
    root = lay_out(tiny, tmp_path / "data", {place: folder})
    with pytest.raises(DataError, match=r"no split 'train', only all .*data\.val_fraction=0\.1"):
        check_data_folder(write_experiment(tmp_path, root))
    experiment = write_experiment(tmp_path, root, "data.val_fraction=0.3")
    check_data_folder(experiment)
    train, val = (build_dataset(experiment, name) for name in ("train", "val"))
    assert [len(train), len(val)] == [4, 2]
    whole = json.loads((root / place).read_text())
    names = {image["file_name"] for image in whole["images"]}
    assert {*train.truth.file_names, *val.truth.file_names} == names
    assert len(train.truth) + len(val.truth) == len(whole["annotations"])
    val[0]

    named = write_experiment(tmp_path, root, "data.val_fraction=0.3", f"data.train_annotations={place}")
    assert named == experiment
    (root / place).write_text(json.dumps(whole | {"images": whole["images"][::-1]}))
    assert build_dataset(experiment, "val").truth.file_names == val.truth.file_names


def test_what_is_missing_is_named_with_a_cure(tiny, tmp_path):
    root = lay_out(tiny, tmp_path / "data", {"train/_annotations.coco.json": "train"})
    with pytest.raises(DataError, match=r"no split 'val', only train \(train/_annotations.coco.json\); name them"):
        check_data_folder(write_experiment(tmp_path, root))
    with pytest.raises(DataError, match=r"there are train .*, val"):
        check_data_folder(write_experiment(tmp_path, lay_out(tiny, tmp_path / "two", COCO), "data.val_fraction=0.5"))
    with pytest.raises(DataError, match=f"no annotations found; .* did you mean {root}"):
        find_splits(tmp_path)
    (root / "train").rename(tmp_path / "unpacked")
    (root / "export.zip").touch()
    with pytest.raises(DataError, match=r"it holds export\.zip; unpack .*export\.zip"):
        find_splits(root)
    with pytest.raises(DataError, match=r"export\.zip: an archive; unpack it, and name the folder"):
        open_folder(root / "export.zip")
    several = lay_out(tiny, tmp_path / "several", COCO)
    shutil.copy(several / "annotations/instances_train2017.json", several / "annotations/train_old.json")
    with pytest.raises(DataError, match=r"has 2 annotation files for train: .* or choose by name"):
        open_folder(several)
    with pytest.raises(ConfigError, match=r"data\.train_annotations: found ''"):
        default_experiment(["data.root=x"]).evaluated_on("train")
