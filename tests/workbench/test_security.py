"""Untrusted files: no code runs, no other file is read, and each is rejected by its name."""

import json
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_experiment, write_model, write_tiny_dataset
from trap import Trap
from typer.testing import CliRunner

from solq_lab.build import build_model
from solq_lab.codecs.artifact import ArtifactError, read_tensors
from solq_lab.config import ConfigError, load_experiment, load_sweep
from solq_lab.data.annotations import DataError
from solq_lab.data.classes import ClassMap
from solq_lab.data.coco import CocoDataset
from solq_lab.data.folders import Split, find_splits
from solq_lab.inference.predictor import Predictor
from solq_lab.models.weights import WeightMismatch, read_official, read_weights, save_weights
from solq_lab.workbench.check.checker import check_data
from solq_lab.workbench.check.report import Options
from solq_lab.workbench.cli import app
from solq_lab.workbench.commands.arguments import cluster_options
from solq_lab.workbench.paper import paper_table

MANY = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# ------------------------------------------------------------------------------------------------------ image paths


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A data set, and beside its image folder an image that is none of its."""
    root = write_tiny_dataset(tmp_path / "data", train=4)
    (root / "train" / "2.png").rename(root / "secret.png")
    return root


def rename(root: Path, name: str) -> None:
    """Let the annotations call their second image `name`."""
    document = json.loads((root / "train.json").read_text())
    document["images"][1]["file_name"] = name
    (root / "train.json").write_text(json.dumps(document))


@pytest.mark.parametrize("name", ["../secret.png", "x/../../secret.png", "./../secret.png", "{root}/secret.png"])
def test_a_file_name_that_leaves_the_image_folder_is_rejected(secret, name):
    rename(secret, name.format(root=secret))
    with pytest.raises(DataError, match=r"train\.json: image id 2: file_name .* leaves the image folder; allowed are"):
        CocoDataset(secret / "train", secret / "train.json")


def test_a_link_that_leaves_the_image_folder_is_rejected(secret):
    (secret / "train" / "2.png").symlink_to("../secret.png")
    with pytest.raises(DataError, match=r"'2\.png' \(image id 2\) is a link that leaves the image folder; put"):
        CocoDataset(secret / "train", secret / "train.json")


def test_a_linked_folder_that_leaves_the_image_folder_is_rejected(secret):
    (secret / "train" / "sub").symlink_to(secret)
    rename(secret, "sub/secret.png")
    with pytest.raises(DataError, match=r"'sub/secret\.png' \(image id 2\) is a link that leaves the image folder"):
        CocoDataset(secret / "train", secret / "train.json")


def test_links_in_a_circle_are_missing_images(secret):
    (secret / "train" / "2.png").symlink_to("2.png")
    with pytest.raises(DataError, match=r"missing: '2\.png', a link that leads to no file \(image id 2\)"):
        CocoDataset(secret / "train", secret / "train.json")


def test_links_within_the_folder_and_a_linked_image_folder_are_fine(secret):
    (secret / "train" / "2.png").symlink_to("1.png")
    (secret / "linked").symlink_to(secret / "train")
    assert CocoDataset(secret / "linked", secret / "train.json")[1][0].shape == (3, 48, 48)


# ----------------------------------------------------------------------------------------- what only looks like a file


@pytest.fixture(params=["a named pipe", "a device"])
def put(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], str]]:
    """Puts a pipe, or a link to a device, in the place of a file; whoever opens it fails after a while."""

    def put(path: Path) -> str:
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "a named pipe" else path.symlink_to("/dev/zero")
        return request.param

    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for a named pipe"))
    signal.alarm(60)
    yield put
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_what_is_no_file_is_named_and_never_opened(tmp_path, put):
    root = write_tiny_dataset(tmp_path / "data", train=4)
    kind = put(root / "train" / "2.png")
    with pytest.raises(DataError, match=rf"images are missing: '2\.png', {kind} \(image id 2\)"):
        CocoDataset(root / "train", root / "train.json", allow_links=True)
    report = check_data([Split("train", root / "train", root / "train.json")], Options(allow_links=True), processes=1)
    assert report.findings.worst("image-missing", "train")[0].message == f"image id 2: '2.png', {kind}"
    put(root / "train.json")
    with pytest.raises(DataError, match=rf"train\.json: {kind}, no annotation file"):
        CocoDataset(root / "train", root / "train.json")

    (root / "data.yaml").write_text("names: [box]\ntrain: yolo\n")
    (root / "yolo").mkdir()
    for name, what in (("a.txt", "text file"), ("a.png", "image")):
        Image.new("RGB", (40, 30)).save(root / "yolo" / "a.png")
        put(root / "yolo" / name)
        with pytest.raises(DataError, match=rf"{name}: {kind}, no {what}"):
            find_splits(root / "data.yaml")

    put(root / "a.png"), put(root / "b.mp4")
    Image.new("RGB", (40, 30)).save(root / "c.png")
    weights = write_model(tmp_path / "weights.safetensors", tiny_experiment(root))
    result = CliRunner().invoke(app, ["predict", str(weights), str(root), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"a.png: {kind}, no image" in result.output
    assert f"b.mp4: {kind}, no video" in result.output
    assert (tmp_path / "out" / "c.png").is_file()


# ------------------------------------------------------------------------------------------------------------ pickles


def pretrained(file: Path) -> None:
    build_model(tiny_experiment(file.parent, model={"pretrained": str(file)}), 2, pretrained=True)


@pytest.mark.parametrize("name", ["backbone.pth", "model.safetensors"])
@pytest.mark.parametrize("read", [pretrained, Predictor, read_weights, read_official])
def test_code_in_weights_is_rejected_and_does_not_run(tmp_path, name, read):
    marker, file = tmp_path / "marker", tmp_path / name
    torch.save({"conv1.weight": torch.zeros(1), "surprise": Trap(marker)}, file)
    with pytest.raises(WeightMismatch, match=name) as caught:
        read(file)
    assert "Traceback" not in str(caught.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists(), "the trap itself must work, or this test proves nothing"


# --------------------------------------------------------------------------------------------------------------- YAML


def write(folder: Path, text: str) -> Path:
    (folder / "file.yaml").write_text(text)
    return folder / "file.yaml"


def stored_in_weights(folder: Path, text: str) -> None:
    classes = ClassMap(("cat",), (1,)).to_json()
    save_weights(folder / "file.yaml", {"a": torch.zeros(1)}, experiment=text, classes=classes)
    Predictor(folder / "file.yaml")


READERS: dict[str, Callable[[Path, str], object]] = {
    "experiment": lambda folder, text: load_experiment(write(folder, text)),
    "parent": lambda folder, text: load_experiment(write_child(folder, write(folder, text))),
    "sweep": lambda folder, text: load_sweep(write(folder, text)),
    "paper": lambda folder, text: paper_table("table1", write(folder, text)),
    "stored": stored_in_weights,
}


def write_child(folder: Path, parent: Path) -> Path:
    (folder / "child.yaml").write_text(f"extends: {parent.name}")
    return folder / "child.yaml"


def bomb(levels: int = 12) -> str:
    """Nine to the power of `levels` texts, in a few hundred characters."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


MALICIOUS = {
    "call": ("train: !!python/object/apply:os.mkdir [{marker}]", "could not determine a constructor"),
    "new": ("train: !!python/object/new:os.mkdir [{marker}]", "could not determine a constructor"),
    "name": ("train: !!python/name:os.system", "could not determine a constructor"),
    "module": ("train: !!python/module:os", "could not determine a constructor"),
    "bomb": (bomb(), "its aliases unfold into more than 100000 values"),
    "endless": ("train: &a [*a]", "nested too deeply, or in itself"),
    "deep": ("train: " + "[" * 600, "nested too deeply"),
    "digits": ("seed: " + "9" * 5000, "an invalid value"),
    "day": ("seed: 2024-02-30", "an invalid value"),
    "stamp": ("seed: !!timestamp now", "an invalid value"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", MALICIOUS)
def test_yaml_that_is_no_plain_data_is_rejected_by_name_and_does_nothing(tmp_path, reader, case):
    text, message = MALICIOUS[case]
    marker = tmp_path / "marker"
    with pytest.raises(ConfigError, match=rf"file\.yaml.*: not plain YAML: .*{message}") as caught:
        READERS[reader](tmp_path, text.format(marker=marker) if "marker" in text else text)
    assert len(str(caught.value)) < 1000
    assert not marker.exists()


@pytest.mark.parametrize("case", MALICIOUS)
def test_values_on_the_command_line_are_plain_data_too(tmp_path, case):
    marker = tmp_path / "marker"
    value = MALICIOUS[case][0].replace("{marker}", str(marker))
    good = write(tmp_path, "seed: 1")
    with pytest.raises(ConfigError, match=r"override 'seed=.*is not a YAML value"):
        load_experiment(good, [f"seed={value}"])
    with pytest.raises(ConfigError, match="--cluster-option: not plain YAML"):
        cluster_options([f"slurm_partition={value}"], "local")
    assert not marker.exists()


def test_honest_anchors_are_read(tmp_path):
    path = write(tmp_path, "optim: &same {lr: 0.001}\ntrain: {steps: 3}\n")
    assert load_experiment(path).optim.lr == 0.001
    path = write(tmp_path, "data: {train_scales: &scales [480, 512], crop_scales: *scales}")
    assert load_experiment(path).data.crop_scales == [480, 512]


# -------------------------------------------------------------------------------------------------------- safetensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small weights file with a tensor under two names."""
    shared = torch.arange(6.0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, {"a": shared, "b": shared, "c": torch.zeros(2, 2)}, experiment="{}", classes="{}")
    return path.read_bytes()


def with_header(content: bytes, header: Any) -> bytes:
    """The file with another header before its tensors."""
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@MANY
@given(place=st.integers(0, 400), flips=st.binary(min_size=1, max_size=4), cut=st.integers(0, 600))
def test_a_damaged_header_is_rejected_or_harmless(tmp_path, weights, place, flips, cut):
    place %= len(weights)
    damaged = (weights[:place] + flips + weights[place + len(flips) :])[: len(weights) - cut % 40 * (cut % 2)]
    file = tmp_path / "w.safetensors"
    file.write_bytes(damaged)
    for read, rejection in ((read_weights, WeightMismatch), (read_tensors, ArtifactError)):
        try:
            read(file)
        except rejection as error:
            assert str(file) in str(error)  # noqa: PT017 - some damage is harmless


@pytest.mark.parametrize(
    "length", [0, 1, 2**31, 2**63, 2**64 - 1], ids=["none", "one", "two gigabytes", "signed", "all"]
)
def test_a_header_of_a_wild_length_is_rejected(tmp_path, weights, length):
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", length) + weights[8:])
    with pytest.raises(WeightMismatch, match=r"w\.safetensors: not a safetensors file \("):
        read_weights(file)


@pytest.mark.parametrize("shared", ['{"b": "nowhere"}', "[1]", "{", '{"b": ["a"]}', "[" * 100_000, "null"])
def test_shared_tensors_that_are_not_there_are_rejected(tmp_path, shared):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"shared": shared})
    with pytest.raises(WeightMismatch, match=r"w\.safetensors: its header names shared tensors that are not there"):
        read_weights(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": [0, 2**60]},
        {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]},
        {"dtype": "PICKLE", "shape": [6], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [-6], "data_offsets": [0, 24]},
    ],
    ids=["shape", "offset", "backwards", "type", "negative"],
)
def test_a_header_that_promises_what_is_not_there_is_rejected(tmp_path, weights, entry):
    file = tmp_path / "w.safetensors"
    file.write_bytes(with_header(weights, {"a": entry}))
    with pytest.raises(WeightMismatch, match=r"w\.safetensors: not a safetensors file"):
        read_weights(file)


@pytest.mark.parametrize("about", ["{", "[" * 100_000, "9" * 5000], ids=["broken", "deep", "digits"])
def test_a_codec_file_with_a_damaged_header_is_rejected(tmp_path, about):
    file = tmp_path / "codec.safetensors"
    save_file({"a": torch.zeros(3)}, file, {"about": about})
    with pytest.raises(ArtifactError, match=r"codec\.safetensors: not a codec file, or cut short"):
        read_tensors(file)
