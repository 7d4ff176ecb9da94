"""Images of every format are read in one way, stored or upright, and turned images are never read wrongly unseen."""

import contextlib
import json
import logging
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny import tiny_experiment

from solq_lab.build import build_dataset
from solq_lab.data.folders import find_splits
from solq_lab.data.images import ORIENTATION, TURNS, read_image
from solq_lab.data.kinds import IMAGE_FORMATS, IMAGE_SUFFIXES
from solq_lab.data.orientation import check_orientation
from solq_lab.errors import DataError
from solq_lab.workbench.check.checker import check_data

LOSSLESS = {".png", ".bmp", ".tif", ".tiff", ".gif", *IMAGE_FORMATS["PPM"], ".tga"}


def drawn(width: int, height: int) -> Image.Image:
    rows, columns = np.mgrid[:height, :width] * 4
    return Image.fromarray(np.stack([rows, columns, rows * 0 + 40], axis=-1).astype(np.uint8))


def write_image(path: Path, image: Image.Image, turn: int = 1) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    image.save(path, **({"exif": exif} if turn != 1 else {}), **({"quality": 95} if path.suffix != ".png" else {}))


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES - {".mpo"}))
def test_every_format_that_is_listed_is_read(tmp_path, suffix):
    path = tmp_path / f"a{suffix.upper()}"
    image = drawn(40, 30)
    (image.quantize(256) if suffix == ".gif" else image).save(path, "JPEG" if suffix == ".jfif" else None)
    found = read_image(path, 1, (30, 40)).permute(1, 2, 0).numpy().astype(int)
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= (0 if suffix in LOSSLESS else 3)


def test_no_other_format_is_read_whatever_the_ending(tmp_path):
    """Pillow hands EPS to Ghostscript, which runs it as a program."""
    drawn(40, 30).save(tmp_path / "a.jpg", "EPS")
    with pytest.raises(DataError, match=r"a\.jpg: not a whole image \(.*a format unknown here\); JPEG, PNG, "):
        read_image(tmp_path / "a.jpg", 1, (30, 40))


@pytest.mark.parametrize("turn", sorted(TURNS))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_upright_is_what_pillow_shows_and_stored_what_the_file_holds(tmp_path, turn, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(path, drawn(40, 30), turn)
    stored = read_image(path, 1, (30, 40)).permute(1, 2, 0).numpy()
    with Image.open(path) as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert stored.shape == (30, 40, 3)
    found = read_image(path, 1, upright.shape[:2], "upright").permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - upright).max() <= (0 if suffix in LOSSLESS else 3)


@pytest.mark.parametrize("orientation", ["stored", "upright"])
def test_a_tiff_is_always_read_upright(tmp_path, orientation):
    write_image(tmp_path / "a.tif", drawn(40, 30), 6)
    with Image.open(tmp_path / "a.tif") as opened:
        upright = np.asarray(opened.convert("RGB"))
    found = read_image(tmp_path / "a.tif", 1, (40, 30), orientation).permute(1, 2, 0).numpy()
    assert np.array_equal(found, upright)
    assert np.array_equal(found, np.rot90(np.asarray(drawn(40, 30)), -1))


def test_more_pixels_than_pillow_allows_are_refused_as_in_prediction(tmp_path, monkeypatch):
    drawn(40, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(DataError, match=r"a\.png: an image of more than 0 megapixels"):
        read_image(tmp_path / "a.png", 1, (30, 40))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_three_channels_of_16_bits_are_rejected_as_one_is(tmp_path, suffix):
    """Pillow takes the upper 8 bits without a word: images of cameras with 12 bits would be almost black."""
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (80, 30)).save(path)  # a row has as many bytes as one of 40 pixels of 16 bits
    content = bytearray(path.read_bytes())
    if suffix == ".png":
        content[16:25] = struct.pack(">IIB", 40, 30, 16)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        content = content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16))
        content = content.replace(struct.pack("<HHII", 256, 4, 1, 80), struct.pack("<HHII", 256, 4, 1, 40))
    path.write_bytes(content)
    with Image.open(path) as opened:
        assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (40, 30), (0, 0, 0))
    with pytest.raises(DataError, match="more than 8 bits per channel; scale it"):
        read_image(path, 1, (30, 40))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp"])
def test_a_damaged_image_is_rejected_or_read_and_kills_no_process(tmp_path, suffix):
    """libpng's errors within torchvision end the process: PNGs are Pillow's."""
    path = tmp_path / f"a{suffix}"
    (drawn(40, 30).quantize(256) if suffix == ".gif" else drawn(40, 30)).save(path)
    sound, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(30):
        content = bytearray(sound)
        content[random.integers(20, len(content))] ^= random.integers(1, 256)
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            assert read_image(path, 1, (30, 40)).shape == (3, 30, 40)


def test_broken_exif_counts_as_none_without_a_word(tmp_path, recwarn):
    drawn(40, 30).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\1" * 30)
    assert read_image(tmp_path / "a.jpg", 1, (30, 40), "upright").shape == (3, 30, 40)
    assert recwarn.list == []


def test_a_file_that_macos_adds_to_archives_is_called_so(tmp_path):
    (tmp_path / "._a.jpg").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    with pytest.raises(DataError, match="it is no image but what macOS adds to archives: leave it out"):
        read_image(tmp_path / "._a.jpg", 1, (30, 40))


# ---- orientation of a data set


def write_turned(root: Path, images: dict[str, tuple[int, tuple[int, int], tuple[int, int]]]) -> Path:
    """A folder with images of EXIF orientation, stored and annotated (width, height); train and val are alike."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        entries: list[dict[str, Any]] = []
        objects = []
        for number, (name, (turn, stored, annotated)) in enumerate(images.items(), start=1):
            write_image(root / split / f"{split}_{name}.jpg", drawn(*stored), turn)
            width, height = annotated
            entries.append({"id": number, "file_name": f"{split}_{name}.jpg", "width": width, "height": height})
            box = [2, 2, 9, 8]
            outline = [[2, 2, 11, 2, 11, 10, 2, 10]]
            objects.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "segmentation": outline})
        document = {"images": entries, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}
        (root / f"{split}.json").write_text(json.dumps(document))
    return root


WIDE, TALL, SQUARE = (40, 30), (30, 40), (32, 32)


@pytest.mark.parametrize(
    ("images", "rule", "training"),
    [
        (
            {"a": (6, WIDE, TALL), "b": (1, WIDE, WIDE)},
            "image-size",
            r"2 images are turned .* data\.orientation=upright",
        ),
        ({"a": (6, WIDE, WIDE), "b": (3, WIDE, WIDE)}, "orientation", ""),
        ({"a": (3, WIDE, WIDE)}, "orientation-undecided", "warning"),
        ({"a": (6, SQUARE, SQUARE)}, "orientation-undecided", "warning"),
        ({"a": (2, WIDE, WIDE)}, "orientation-undecided", "warning"),
        ({"a": (6, WIDE, TALL), "b": (8, WIDE, WIDE)}, "orientation-mixed", "annotate all of them one way"),
        ({"a": (1, WIDE, WIDE)}, None, ""),
    ],
)
def test_check_and_training_find_the_rule_or_name_what_cannot_be_decided(tmp_path, caplog, images, rule, training):
    root = write_turned(tmp_path / "data", images)
    report = check_data(find_splits(root), processes=1)
    found = {
        name
        for name in report.findings.counts
        if name.startswith(("orient", "image-size")) and report.findings.total(name)
    }
    assert rule in found if rule else not found
    if rule == "image-size":
        assert "this image is turned by EXIF (orientation 6); set data.orientation=upright" in report.table("")

    datasets = [build_dataset(tiny_experiment(root), name) for name in ("train", "val")]
    if training in ("", "warning"):
        check_orientation(datasets)
        assert ("set data.orientation=stored or data.orientation=upright" in caplog.text) == (training == "warning")
    else:
        with pytest.raises(DataError, match=training):
            check_orientation(datasets)


@pytest.mark.parametrize(("said", "pixels"), [("stored", WIDE), ("upright", TALL)])
def test_what_the_experiment_says_is_read_and_not_asked_again(tmp_path, caplog, said, pixels):
    root = write_turned(tmp_path / "data", {"a": (6, WIDE, pixels), "b": (3, WIDE, WIDE)})
    dataset = build_dataset(tiny_experiment(root, data={"orientation": said}), "val")
    assert dataset._read_image(0).shape[1:] == pixels[::-1]
    other = {"stored": "upright", "upright": "stored"}[said]
    with pytest.raises(DataError, match=rf"turned by EXIF \(orientation 6\); set data.orientation={said}"):
        build_dataset(tiny_experiment(root, data={"orientation": other}), "val")[0]
    with caplog.at_level(logging.INFO):
        report = check_data(find_splits(root, orientation=said), processes=1)
    assert report.findings.found("refused") == []
    assert report.findings.total("orientation-undecided") == 0
