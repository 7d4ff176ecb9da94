"""LVIS files and YOLO folders become COCO folders that the loader accepts and a model trains on."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from tiny import SIDE, tiny_experiment, write_tiny_dataset

from solq_lab.build import build_codec, build_dataset, build_model
from solq_lab.data.annotations import DataError
from solq_lab.data.folders import find_splits
from solq_lab.data.images import ORIENTATION, TURNS
from solq_lab.data.loader import collate
from solq_lab.masks import decode_rle
from solq_lab.training.losses import build_criterion
from solq_lab.workbench.check.checker import check_data
from solq_lab.workbench.convert.converter import convert_data

SETTINGS = "names: [triangle, diamond]\nnc: 2\ntrain: images/train\nval: images/val\n"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def coco(tmp_path):
    """The tiny data set, as COCO: what the converted ones have to equal."""
    return write_tiny_dataset(tmp_path / "coco")


@pytest.fixture
def yolo(coco, tmp_path):
    """The tiny data set as a YOLO segmentation folder."""
    root = tmp_path / "yolo"
    for split in ("train", "val"):
        document = json.loads((coco / f"{split}.json").read_text())
        (root / "labels" / split).mkdir(parents=True)
        (root / "images").mkdir(exist_ok=True)
        (coco / split).rename(root / "images" / split)
        for image in document["images"]:
            lines = []
            for entry in document["annotations"]:
                if entry["image_id"] == image["id"]:
                    shares = " ".join(repr(number / SIDE) for number in entry["segmentation"][0])
                    lines.append(f"{entry['category_id'] - 1} {shares}")
            if lines:  # images without objects have no label file
                (root / "labels" / split / f"{image['id']}.txt").write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text(SETTINGS)
    return root


@pytest.fixture
def lvis(coco, tmp_path):
    """The tiny data set as two LVIS files over COCO's folders; arguments of `convert_data` by split."""
    images = tmp_path / "images"
    images.mkdir()
    found = {}
    for split in ("train", "val"):
        document = json.loads((coco / f"{split}.json").read_text())
        (coco / split).rename(images / f"{split}2017")
        for image in document["images"]:
            image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}"
            image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [1] if image["id"] == 1 else []}
        for entry in document["annotations"]:
            del entry["iscrowd"]
        for category in document["categories"]:
            category |= {"frequency": "r", "synset": f"{category['name']}.n.01"}
        path = tmp_path / f"lvis_v1_{split}.json"
        path.write_text(json.dumps(document))
        found[split] = {"source": path, "images": images}
    return found


def experiment_of(folder: Path) -> Any:
    places = {f"{split}_annotations": f"annotations/instances_{split}.json" for split in ("train", "val")}
    return tiny_experiment(folder, data=places | {"augment": "none"})


def objects_of(document: dict[str, Any]) -> list[tuple]:
    """Everything about the objects of a document but the class ids, by image."""
    names = {image["id"]: Path(image["file_name"]).name for image in document["images"]}
    classes = {category["id"]: category["name"] for category in document["categories"]}
    return sorted(
        (names[entry["image_id"]], classes[entry["category_id"]], *np.round(entry["segmentation"][0], 1).tolist())
        for entry in document["annotations"]
    )


def losses_of_one_step(folder: Path) -> dict[str, float]:
    """The losses of a tiny model on the first batch of a COCO-format folder."""
    experiment = experiment_of(folder)
    dataset = build_dataset(experiment, "train")
    torch.manual_seed(0)
    model, codec = build_model(experiment, len(dataset.classes)), build_codec(experiment)
    images, targets = collate([dataset[index] for index in range(4)])
    criterion = build_criterion(experiment, codec)
    losses = criterion(model(images.normalised()), targets, num_boxes=sum(len(target.labels) for target in targets))
    criterion.total(losses).backward()
    return {name: value.item() for name, value in losses.items()}


# ---- the way there and back


@pytest.mark.parametrize("source", ["", "data.yaml"])
def test_a_yolo_folder_becomes_the_coco_folder_it_was_made_of(yolo, coco, tmp_path, source):
    convert_data(yolo / source, tmp_path / "out")
    for split in ("train", "val"):
        before = json.loads((coco / f"{split}.json").read_text())
        after = json.loads((tmp_path / "out" / "annotations" / f"instances_{split}.json").read_text())
        assert objects_of(after) == objects_of(before)
        assert {image["file_name"] for image in after["images"]} == {image["file_name"] for image in before["images"]}
        assert [category["id"] for category in after["categories"]] == [0, 1]
        assert (tmp_path / "out" / split).is_symlink()


def test_lvis_files_become_the_coco_folder_they_were_made_of(lvis, coco, tmp_path, caplog):
    for split in ("train", "val"):
        convert_data(target=tmp_path / "out", **lvis[split])
        before = json.loads((coco / f"{split}.json").read_text())
        after = json.loads((tmp_path / "out" / "annotations" / f"instances_{split}.json").read_text())
        assert objects_of(after) == objects_of(before)
        assert after["images"][0]["file_name"] == f"{split}2017/1.png"
        assert after["images"][0]["neg_category_ids"] == [2]
        assert all(entry["iscrowd"] == 0 for entry in after["annotations"])
    assert "1 images have classes that are not labelled everywhere" in caplog.text


@pytest.mark.parametrize("kind", ["yolo", "lvis"])
def test_a_converted_folder_is_clean_and_gives_the_same_samples_and_losses(request, coco, tmp_path, kind):
    (coco / "annotations").mkdir()
    for split in ("train", "val"):
        os.link(coco / f"{split}.json", coco / "annotations" / f"instances_{split}.json")
    before = build_dataset(experiment_of(coco), "train")
    samples, losses = [before[index] for index in range(len(before))], losses_of_one_step(coco)

    made = request.getfixturevalue(kind)
    for arguments in made.values() if kind == "lvis" else [{"source": made}]:
        convert_data(target=tmp_path / "out", **arguments)
    assert check_data(find_splits(tmp_path / "out"), processes=1).is_clean
    dataset = build_dataset(experiment_of(tmp_path / "out"), "train")
    after = [dataset[index] for index in range(len(dataset))]
    pairs = zip(sorted(samples, key=_pixels), sorted(after, key=_pixels), strict=True)
    for (image, target), (again, after_target) in pairs:
        assert torch.equal(image, again)
        assert target.labels.tolist() == after_target.labels.tolist()
        torch.testing.assert_close(target.boxes, after_target.boxes, rtol=0, atol=0.005 / SIDE)
        assert (target.masks != after_target.masks).sum() <= 0.02 * target.masks.numel()
    found = losses_of_one_step(tmp_path / "out")
    assert np.isfinite(list(found.values())).all()
    if kind == "lvis":  # the very same order of images and numbers
        assert found == losses


def _pixels(sample: tuple) -> bytes:
    return sample[0].numpy().tobytes()


# ---- details of YOLO folders


@pytest.mark.parametrize("place", ["in place", "converted"])
@pytest.mark.parametrize("orientation", sorted(TURNS))
def test_a_turned_image_is_read_upright_as_its_outlines_are(tmp_path, orientation, place, monkeypatch):
    """The label was drawn on the image as it is shown: the mask covers the white pixels of the loaded image."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stored = Image.new("RGB", (60, 40))
    ImageDraw.Draw(stored).polygon([(8, 6), (40, 9), (25, 30)], fill="white")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    root = tmp_path / "yolo"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    stored.save(root / "images" / "a.png", exif=exif)
    with Image.open(root / "images" / "a.png") as opened:
        shown = np.asarray(ImageOps.exif_transpose(opened))
    rows, columns = np.nonzero(shown[..., 0])
    height, width, _ = shown.shape
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    line = " ".join(f"{x / width} {y / height}" for x, y in corners)
    (root / "labels" / "a.txt").write_text(f"0 {line}\n")
    (root / "data.yaml").write_text("names: {0: thing}\ntrain: images\n")
    if place == "converted":
        convert_data(root, tmp_path / "out")
        root = tmp_path / "out"

    none = dict.fromkeys(("train_images", "train_annotations", "val_images", "val_annotations"), "")
    dataset = build_dataset(tiny_experiment(root, data=none | {"augment": "none"}), "train")
    assert np.array_equal(dataset._read_image(0).permute(1, 2, 0).numpy(), shown)
    expected = np.zeros((height, width), dtype=bool)
    expected[top:bottom, left:right] = True
    assert np.array_equal(decode_rle(dataset.objects(0).masks)[0].numpy(), expected)
    assert check_data(find_splits(root), processes=1).findings.found("refused") == []


def test_several_folders_and_lists_of_images_are_read(yolo, tmp_path):
    (yolo / "val.txt").write_text("./images/val/1.png\nimages/val/2.png\n\n")
    settings = SETTINGS.replace("train: images/train", "train: [images/train, images/val]")
    (yolo / "data.yaml").write_text(settings.replace("val: images/val", "val: val.txt"))
    convert_data(yolo, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert len(document["images"]) == 16
    assert {image["file_name"] for image in document["images"]} >= {"images/train/1.png", "images/val/1.png"}
    document = json.loads((tmp_path / "out" / "annotations" / "instances_val.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["images/val/1.png", "images/val/2.png"]
    assert document["annotations"]
    assert check_data(find_splits(tmp_path / "out"), processes=1).findings.total("image-missing") == 0


def test_a_folder_inside_which_every_split_has_images_and_labels_is_read(yolo, tmp_path):
    """train/images, train/labels, and dots in front, as some tools export."""
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            (yolo / split).mkdir(exist_ok=True)
            (yolo / kind / split).rename(yolo / split / kind)
    (yolo / "data.yaml").write_text("names: [triangle, diamond]\ntrain: ../train/images\nvalid: ../val/images\n")
    splits = convert_data(yolo, tmp_path / "out")
    assert [split.name for split in splits] == ["train", "val"]
    assert json.loads(splits[0].annotations.read_text())["annotations"]


def test_labels_without_an_image_are_named(yolo, tmp_path, caplog):
    (yolo / "labels" / "train" / "misspelt.txt").write_text("0 0 0 1 0 1 1\n")
    convert_data(yolo, tmp_path / "out")
    assert "1 label files belong to no image and are left out" in caplog.text
    assert "misspelt.txt" in caplog.text


def test_images_without_label_files_are_counted_and_rejected_where_none_has_one(yolo, tmp_path, caplog):
    first, *others = sorted((yolo / "labels" / "train").glob("*.txt"))
    first.unlink()
    caplog.set_level("INFO")
    convert_data(yolo, tmp_path / "out")
    images = len(list((yolo / "images" / "train").iterdir()))
    assert f"{images - len(others)} of the {images} images of train have no label file, and no" in caplog.text
    for path in others:
        path.rename(path.with_suffix(".TXT"))
    with pytest.raises(DataError, match=r"have no label file; that of .*png would be .*labels/train/.*txt$"):
        convert_data(yolo, tmp_path / "elsewhere")


def test_without_links_the_images_stay_and_nothing_leads_to_them(yolo, tmp_path):
    splits = convert_data(yolo, tmp_path / "out", link=False)
    assert [split.images for split in splits] == [yolo / "images" / "train", yolo / "images" / "val"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["annotations"]


# ---- what is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0 0 1 0 1 1", "class '2'; allowed are 0 to 1"),
        ("-1 0 0 1 0 1 1", "class '-1'; allowed are 0 to 1"),
        ("triangle 0 0 1 0 1 1", "class 'triangle'; allowed are"),
        ("0 0.5 0.5 0.2 0.2", "a box (class and 4 numbers), no outline"),
        ("0", "0 numbers after the class; needed are x and y of at least 3 points"),
        ("0 0 0 1 0 1", "5 numbers after the class; needed are"),
        ("0 0 0 1 0 1 1 0", "7 numbers after the class; needed are"),
        ("0 0 0 1 0 1 nan", "coordinate 'nan'; allowed are shares of the image's sides, 0 to 1"),
        ("0 0 0 1 0 1 inf", "coordinate 'inf'; allowed"),
        ("0 0 0 1 0 1 x", "coordinate 'x'; allowed"),
        ("0 12 7 30 7 30 20", "coordinate '12'; allowed"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(yolo, tmp_path, line, message):
    path = yolo / "labels" / "train" / "1.txt"
    path.write_text(f"0 0 0 1 0 1 1\n\n{line}\n")
    with pytest.raises(DataError) as refusal:
        convert_data(yolo, tmp_path / "out")
    assert f"{path}: line 3: {message}" in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_outline_just_outside_is_cut_off(yolo, tmp_path):
    (yolo / "labels" / "train" / "1.txt").write_text("0 -0.001 0 1.005 0 1 1\n")
    convert_data(yolo, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert document["annotations"][0]["bbox"] == [0, 0, SIDE, SIDE]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("names: [a]\ntrain: /etc\n", "found '/etc'; needed is a path inside"),
        ("names: [a]\ntrain: ../../../etc\n", "needed is a path inside"),
        ("names: [a]\ntrain: images\\..\\..\\..\\etc\n", "needed is a path inside"),
        ("names: [a]\ntrain: images/none\n", "'images/none': no such file or folder"),
        ("names: [a]\ntrain: labels\n", "labels holds no images"),
        ("names: [a]\ntrain: 7\n", "found 7; needed is a path inside"),
        ("names: [a]\n", "neither 'train' nor 'val'"),
        ("train: images/train\n", "names: found None; needed is a list, or a mapping"),
        ("names: {1: a}\ntrain: images/train\n", "names: found {1: 'a'}; needed is"),
        ("names: [a]\nnc: 3\ntrain: images/train\n", "nc is 3, but there are 1 names"),
        ("names: [a]\nkpt_shape: [17, 3]\ntrain: images/train\n", "kpt_shape: labels of key points, no outlines"),
        ("- a\n", "found a list, needed are the keys names, train and val"),
        ("names: !!python/object/apply:os.mkdir [executed]\n", "not plain YAML"),
    ],
)
def test_a_bad_data_yaml_is_refused_and_nothing_in_it_is_executed(yolo, tmp_path, settings, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (yolo / "data.yaml").write_text(settings)
    with pytest.raises(DataError, match=r"data\.yaml: ") as refusal:
        convert_data(yolo, tmp_path / "out")
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


def test_a_listed_image_outside_the_folder_is_refused_with_its_line(yolo, tmp_path):
    (yolo / "train.txt").write_text("images/train/1.png\n/etc/hostname\n")
    (yolo / "data.yaml").write_text("names: [a, b]\ntrain: train.txt\n")
    with pytest.raises(DataError, match=r"train\.txt: line 2: found '/etc/hostname'; needed is a path inside"):
        convert_data(yolo, tmp_path / "out")


def test_an_image_that_cannot_be_read_is_named(yolo, tmp_path):
    (yolo / "images" / "train" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"train/1\.png: not a whole image \(7 bytes; a format unknown"):
        convert_data(yolo, tmp_path / "out")


def test_images_in_formats_that_are_not_read_are_counted(yolo, tmp_path, caplog):
    (yolo / "images" / "train" / "layers.psd").touch()
    convert_data(yolo, tmp_path / "read")
    assert "files left out by their ending: 1 .psd" in caplog.text
    for name in ("1", "2"):
        (yolo / "images" / "train" / f"{name}.png").rename(yolo / "images" / "train" / f"{name}.HEIC")
    with pytest.raises(
        DataError, match=r"2 images are in formats that cannot be read: .*1\.HEIC, .*2\.HEIC; allowed are"
    ):
        convert_data(yolo, tmp_path / "out")


def test_a_folder_without_settings_says_what_it_found(tmp_path):
    with pytest.raises(DataError, match=r"no data\.yaml with the class names \(found nothing\)"):
        convert_data(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coco_url": 7}, "images[0]: found"),
        ({"coco_url": "http://x"}, "needed is a text 'file_name', or 'coco_url'"),
        ({"coco_url": "http://x/../passwd"}, "leaves the image folder"),
        ({"file_name": "../../x.jpg"}, "leaves the image folder"),
    ],
)
def test_an_lvis_image_without_a_usable_name_is_refused(lvis, tmp_path, change, message):
    path = lvis["train"]["source"]
    document = json.loads(path.read_text())
    document["images"][0] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(DataError) as refusal:
        convert_data(target=tmp_path / "out", **lvis["train"])
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_lvis_object_that_the_loader_would_refuse_is_named_before_anything_is_written(lvis, tmp_path):
    path = lvis["val"]["source"]
    document = json.loads(path.read_text())
    document["annotations"][0]["image_id"] = 77
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"lvis_v1_val\.json: annotation id 1: image_id 77 is not among"):
        convert_data(target=tmp_path / "out", **lvis["val"])
    assert not (tmp_path / "out").exists()


def test_lvis_needs_its_images_and_a_split(lvis, tmp_path):
    path = lvis["val"]["source"]
    with pytest.raises(DataError, match="--images needs the folder"):
        convert_data(path, tmp_path / "out")
    other = path.rename(tmp_path / "mine.json")
    with pytest.raises(DataError, match=r"mine\.json: the name does not tell train from val"):
        convert_data(other, tmp_path / "out", images=lvis["val"]["images"])
    assert convert_data(other, tmp_path / "out", images=lvis["val"]["images"], split="val")[0].name == "val"


def test_nothing_is_written_over(yolo, tmp_path):
    convert_data(yolo, tmp_path / "out")
    with pytest.raises(DataError, match=r"instances_train\.json: exists and is not written over"):
        convert_data(yolo, tmp_path / "out")
    (tmp_path / "other" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"other/train: exists and does not lead to"):
        convert_data(yolo, tmp_path / "other")


def test_the_command_says_how_to_check_and_to_use_the_folder(yolo, command_line):
    status, output = command_line("convert-data", "yolo", "out")
    assert status == 0
    assert "solq-lab check-data out" in output
    assert output.split("use it:")[1].split("\r")[0].split() == ["data.root=out"]
    assert command_line("convert-data", "yolo", "out", "--split", "val")[0] == 2
