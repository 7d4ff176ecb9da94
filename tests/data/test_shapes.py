"""Drawn data sets: the same for a seed, true masks, sizes as promised, whole folders or none."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_rle
from pycocotools.coco import COCO

from solq_lab.data.coco import CocoDataset, DataError
from solq_lab.data.shapes import writer
from solq_lab.data.shapes.scene import LEVELS, MIN_VISIBLE, OVERSAMPLING, _Stage, draw_scene
from solq_lab.data.shapes.silhouettes import EASY, HARD
from solq_lab.data.shapes.writer import write_shapes

LEVEL_NAMES = sorted(LEVELS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("drawn") / "shapes"
    write_shapes(root, level="hard", train=6, val=3, seed=4, processes=1)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_number_of_processes_changes_nothing(folder, tmp_path):
    write_shapes(tmp_path / "again", level="hard", train=6, val=3, seed=4, processes=2)
    assert contents(tmp_path / "again") == contents(folder)


def test_another_seed_draws_other_images(folder, tmp_path):
    write_shapes(tmp_path / "other", level="hard", train=1, val=1, seed=5, processes=1)
    assert contents(tmp_path / "other")["train/000001.png"] != contents(folder)["train/000001.png"]


def test_train_and_val_share_no_image(folder):
    train, val = (
        {data for name, data in contents(folder).items() if name.startswith(split)} for split in ("train/", "val/")
    )
    assert len(train) == 6
    assert len(val) == 3
    assert not train & val


def test_annotations_agree_with_their_masks_for_pycocotools(folder, capsys):
    coco = COCO(str(folder / "annotations" / "instances_train.json"))
    assert len(coco.imgs) == 6
    assert [category["id"] for category in coco.loadCats(coco.getCatIds())] == list(range(1, len(HARD) + 1))
    assert coco.anns
    for image_id in coco.imgs:
        entries = coco.loadAnns(coco.getAnnIds(image_id))
        masks = np.stack([coco.annToMask(entry) for entry in entries])
        assert masks.sum(axis=0).max() <= 1  # visible parts: no pixel has two owners
        for entry, mask in zip(entries, masks, strict=True):
            rle = coco.annToRLE(entry)
            assert entry["area"] == mask.sum() == coco_rle.area(rle)
            assert entry["bbox"] == coco_rle.toBbox(rle).tolist()
            assert entry["iscrowd"] == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_data_set_reads_them(folder, split):
    dataset = CocoDataset(folder / split, folder / "annotations" / f"instances_{split}.json", mask_size=32)
    assert dataset.classes.names == LEVELS["hard"].classes
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert image.shape == (3, 128, 128)
        assert image.dtype == torch.uint8
        assert target.masks.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("name", LEVEL_NAMES)
def test_every_object_stays_visible_enough_and_inside_its_limits(name):
    level = LEVELS[name]
    counts = []
    for seed in range(25):
        random = np.random.default_rng(seed)
        stage = _Stage(level, random)
        for _ in range(level.objects[1]):
            stage.add_object(random)
        counts.append(len(stage.classes))
        visible = np.bincount(stage.owner.ravel(), minlength=len(stage.classes) + 1)[1:]
        for cutout, center, pixels in zip(stage.cutouts, stage.centers, visible, strict=True):
            longest = cutout.size.max() / OVERSAMPLING
            assert level.object_side[0] - 1e-6 <= longest <= level.object_side[1] + 1e-6
            assert pixels >= MIN_VISIBLE * cutout.area
            overhang = cutout.size * level.overhang
            assert (center - cutout.size / 2 >= -overhang - 1e-6).all()
            assert (center + cutout.size / 2 <= stage.side + overhang + 1e-6).all()
    assert max(counts) == level.objects[1]


@pytest.mark.parametrize("name", LEVEL_NAMES)
def test_small_medium_and_large_objects_and_all_classes_occur(name):
    level = LEVELS[name]
    scenes = [draw_scene(level, np.random.default_rng((9, seed))) for seed in range(60)]
    areas = np.array([mask.sum() for scene in scenes for mask in scene.masks])
    small, large = (level.side / 6) ** 2, (level.side / 3) ** 2
    assert (areas > 0).all()
    assert min((areas < small).sum(), ((areas >= small) & (areas < large)).sum(), (areas >= large).sum()) > 0
    assert {index for scene in scenes for index in scene.classes} == set(range(len(level.classes)))
    assert all(1 <= len(scene.classes) <= level.objects[1] for scene in scenes)


@pytest.mark.parametrize("name", LEVEL_NAMES)
def test_objects_stand_out_from_what_surrounds_them(name):
    """An object that its own colour does not give away could not be learned; some noise and shading is expected."""
    level = LEVELS[name]
    distances = []
    for seed in range(40):
        scene = draw_scene(level, np.random.default_rng((2, seed)))
        image = scene.image.astype(float) / 255
        background = image[~scene.masks.any(axis=0)].mean(axis=0)
        distances += [np.linalg.norm(image[mask].mean(axis=0) - background) for mask in scene.masks]
    assert np.median(distances) > 0.8 * level.contrast


@pytest.mark.parametrize("name", sorted(HARD))
def test_silhouettes_fill_the_unit_square_without_leaving_it(name):
    for seed in range(10):
        parts = HARD[name](np.random.default_rng(seed))
        corners = np.concatenate([part.corners for part in parts if part.solid])
        assert np.abs(corners).max() <= 1.1
        assert np.ptp(corners, axis=0).min() >= 0.7
    assert len(EASY) == 8


def test_a_complete_folder_is_kept(folder, caplog):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with caplog.at_level(logging.INFO):
        write_shapes(folder, level="hard", train=6, val=3, seed=4)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "holds these shapes already" in caplog.text


def test_other_shapes_are_not_written_over(folder):
    with pytest.raises(
        DataError, match=r"other shapes \(level: found 'hard', asked 'easy'; train: found 6, asked 7\); give"
    ):
        write_shapes(folder, level="easy", train=7, val=3, seed=4)


def test_a_folder_of_something_else_is_not_written_over(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose")
    with pytest.raises(DataError, match="holds something else than drawn shapes; give an empty or a new folder"):
        write_shapes(tmp_path, train=1, val=1)
    assert contents(tmp_path) == {"thesis.tex": b"do not lose"}


def test_an_unknown_level_is_refused(tmp_path):
    with pytest.raises(DataError, match="level 'medium' does not exist; allowed are easy, hard"):
        write_shapes(tmp_path / "new", level="medium")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer.masks, "encode_rle", fail)
    with pytest.raises(error):
        write_shapes(tmp_path / "new", train=2, val=1, processes=1)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_draw_the_same_in_the_meantime(folder, tmp_path, monkeypatch):
    draw, root = writer._write_split, tmp_path / "shapes"
    monkeypatch.setattr(
        writer, "_write_split", lambda *a: (shutil.copytree(folder, root, dirs_exist_ok=True), draw(*a))[1]
    )
    write_shapes(root, level="hard", train=6, val=3, seed=4, processes=1)
    assert contents(root) == contents(folder)
    assert list(tmp_path.iterdir()) == [root]


def test_an_empty_folder_is_filled_and_says_how_it_was_made(tmp_path):
    write_shapes(tmp_path, train=2, val=1, seed=3, processes=1)
    info = json.loads((tmp_path / "annotations" / "instances_val.json").read_text())["info"]
    assert info["seed"] == 3
    assert info["version"] == str(writer.VERSION)
    assert "level easy" in info["description"]
    assert info["object_side"] == [24, 63]
    assert info["area_sides"] == [16, 32]
