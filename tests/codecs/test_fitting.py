"""Fitted codes as files: written from annotations, resumed after a kill, read with care, tied to their data."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rectangles import truth_of
from safetensors.torch import load_file
from tiny import tiny_experiment
from typer.testing import CliRunner

from solq_lab.bench.scenes import blob_masks, coco_document
from solq_lab.build import build_codec, new_codec
from solq_lab.codecs import pca, sparse
from solq_lab.codecs.artifact import (
    FORMAT,
    ArtifactError,
    load_codec,
    read_description,
    read_tensors,
    save_codec,
    write_tensors,
)
from solq_lab.codecs.flatten import FlattenCodec
from solq_lab.codecs.pca import PCACodec
from solq_lab.config import ConfigError, Experiment
from solq_lab.data.annotations import DataError
from solq_lab.data.ground_truth import GroundTruth
from solq_lab.errors import Interrupted
from solq_lab.files import hash_file, read_json
from solq_lab.fitting import check_fitted_data, fit_codec, measure_quality
from solq_lab.inference.predictor import Predictor
from solq_lab.runs import create_run
from solq_lab.studies.ceiling import run_ceiling
from solq_lab.training.trainer import train_run
from solq_lab.workbench.cli import app

CELLS = 16 * 16  # of the tiny experiment's masks
KINDS = [
    {"kind": "pca"},
    {"kind": "pca", "pca": "released"},
    {"kind": "sparse", "beta": 0.5},
    {"kind": "autoencoder"},
    {"kind": "rvq"},
]
NAMES = ["pca", "released", "sparse", "autoencoder", "rvq"]


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    """A data folder of annotations alone: fitting opens no image."""
    root = tmp_path_factory.mktemp("annotated")
    (root / "train.json").write_text(json.dumps(coco_document(3, num_images=9)))
    return root


def experiment_for(root: Path, artifact: Path, codec: dict, seed: int = 0) -> Experiment:
    return tiny_experiment(root, codec={"artifact": str(artifact), **codec}, seed=seed)


@pytest.mark.parametrize("codec", KINDS, ids=NAMES)
def test_a_fit_leaves_a_file_that_says_what_it_holds_and_a_copy_to_read(annotated, tmp_path, codec):
    experiment = experiment_for(annotated, tmp_path / "new" / "code.safetensors", codec)
    about = fit_codec(experiment)
    path = Path(experiment.codec.artifact)
    objects = len(GroundTruth(annotated / "train.json"))
    assert about == read_description(path)
    assert (about.method, about.mask_size, about.vector_dim) == (codec["kind"], 16, 20)
    assert about.dataset["sha256"] == hash_file(annotated / "train.json")
    assert about.dataset["objects"] == about.dataset["used"] == objects
    if codec["kind"] in ("pca", "sparse"):  # the others are no better than the DCT, or hardly trained
        assert 0.5 < about.quality["explained_variance"] <= 1
        assert 0.6 < about.quality["mean_iou"] <= 1
    assert json.loads(path.with_suffix(".json").read_text()) == about._asdict()
    assert sorted(file.name for file in path.parent.iterdir()) == ["code.json", "code.safetensors"]

    masks = GroundTruth(annotated / "train.json").box_masks(range(10), 16)
    of_experiment, of_file = build_codec(experiment), load_codec(path)
    assert torch.equal(of_experiment.encode(masks), of_file.encode(masks))
    assert (of_experiment.loss, of_experiment.threshold) == (of_file.loss, of_file.threshold)


def test_the_file_holds_what_fitting_to_all_masks_at_once_gives(annotated, tmp_path):
    experiment = experiment_for(annotated, tmp_path / "code.safetensors", {"kind": "pca"})
    fit_codec(experiment)
    objects = GroundTruth(annotated / "train.json")
    masks = objects.box_masks(objects.rows(), 16)
    whole = PCACodec(16, 20)
    whole.fit([masks])
    torch.testing.assert_close(
        load_codec(experiment.codec.artifact).decode(whole.encode(masks)),
        whole.decode(whole.encode(masks)),
        rtol=0,
        atol=1e-4,
    )


def kill_after(updates: int, experiment: Experiment) -> int:
    """Exit status of a process that fits in batches of 20 masks, saves after each, and is killed by SIGKILL."""
    code = f"""
import os, signal, sys
import yaml
from solq_lab import fitting
from solq_lab.codecs import pca, sparse
from solq_lab.config import validate_experiment
pca.PIXELS_PER_UPDATE, sparse.MASKS_PER_UPDATE = 20 * {CELLS}, 20
experiment = validate_experiment(yaml.safe_load(sys.stdin.read()), source="stdin")
fit = pca.PCAFit if experiment.codec.kind == "pca" else sparse.DictionaryFit
update, count = fit.update, 0
def counted(self, masks):
    global count
    count += 1
    if count > {updates}:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, masks)
fit.update = counted
fitting.SECONDS_BETWEEN_SAVES = 0
fitting.fit_codec(experiment)
"""
    return subprocess.run([sys.executable, "-c", code], input=experiment.to_yaml(), text=True).returncode


@pytest.mark.parametrize("codec", [KINDS[0], KINDS[2]], ids=["pca", "sparse"])
def test_a_fit_that_was_killed_half_way_ends_with_the_same_tables_bit_by_bit(annotated, tmp_path, monkeypatch, codec):
    monkeypatch.setattr(pca, "PIXELS_PER_UPDATE", 20 * CELLS)
    monkeypatch.setattr(sparse, "MASKS_PER_UPDATE", 20)
    killed = experiment_for(annotated, tmp_path / "killed.safetensors", codec)
    assert kill_after(3, killed) == -signal.SIGKILL
    partial = tmp_path / "killed.partial"
    assert read_tensors(partial)[1]["seen"] == 60
    assert not Path(killed.codec.artifact).exists()
    fit_codec(killed)
    assert not partial.exists()
    unbroken = experiment_for(annotated, tmp_path / "unbroken.safetensors", codec)
    fit_codec(unbroken)
    assert hash_file(killed.codec.artifact) == hash_file(unbroken.codec.artifact)


def test_what_another_fit_left_is_not_gone_on_with(annotated, tmp_path, caplog):
    experiment = experiment_for(annotated, tmp_path / "code.safetensors", {"kind": "pca"})
    write_tensors(tmp_path / "code.partial", {"rows": torch.ones(1, CELLS)}, {"about": {"seed": 7}, "seen": 20})
    about = fit_codec(experiment)
    assert "belongs to another fit" in caplog.text
    assert about.dataset["used"] == about.dataset["objects"]


def test_the_seed_decides_the_dictionary(annotated, tmp_path):
    def atoms(name: str, seed: int) -> torch.Tensor:
        experiment = experiment_for(annotated, tmp_path / f"{name}.safetensors", KINDS[2], seed=seed)
        fit_codec(experiment)
        return load_file(experiment.codec.artifact)["atoms"]

    first = atoms("first", 1)
    assert torch.equal(first, atoms("again", 1))
    assert not torch.equal(first, atoms("other", 2))


def test_a_fit_to_some_objects_uses_so_many_and_says_so(annotated, tmp_path):
    about = fit_codec(experiment_for(annotated, tmp_path / "code.safetensors", {"kind": "pca"}), max_objects=30)
    assert about.dataset["used"] == about.quality["masks"] == 30 < about.dataset["objects"]


def test_a_finished_file_is_kept_and_one_of_another_codec_or_data_is_never_written_over(annotated, tmp_path):
    path = tmp_path / "code.safetensors"
    fit_codec(experiment_for(annotated, path, {"kind": "pca"}))
    before = path.stat().st_mtime_ns
    fit_codec(experiment_for(annotated, path, {"kind": "pca"}))
    with pytest.raises(ConfigError, match=r"code\.safetensors exists and holds another codec; .* remove it, or name"):
        fit_codec(experiment_for(annotated, path, {"kind": "sparse"}))
    (tmp_path / "train.json").write_text(json.dumps(coco_document(4, num_images=2)))
    with pytest.raises(ConfigError, match=r"holds a codec fitted to train\.json, other data"):
        fit_codec(experiment_for(tmp_path, path, {"kind": "pca"}))
    assert path.stat().st_mtime_ns == before


def test_a_codec_that_needs_no_fitting_and_data_without_objects_are_rejected(annotated, tmp_path):
    with pytest.raises(ConfigError, match=r"codec\.kind=dct: nothing to fit; 'pca', 'sparse', .* are fitted"):
        fit_codec(experiment_for(annotated, tmp_path / "code.safetensors", {"kind": "dct"}))
    with pytest.raises(DataError, match=r"train\.json: no such annotation file; check data\.root"):
        fit_codec(experiment_for(tmp_path, tmp_path / "code.safetensors", {"kind": "pca"}))
    crowd = truth_of([(1, 1, (4, 4, 8, 8))])
    crowd["annotations"][0]["iscrowd"] = 1
    (tmp_path / "train.json").write_text(json.dumps(crowd))
    with pytest.raises(DataError, match="none of the 1 objects can be learnt: 1 marked as crowds"):
        fit_codec(experiment_for(tmp_path, tmp_path / "code.safetensors", {"kind": "pca"}))


@pytest.mark.parametrize("kind", ["pca", "sparse"])
def test_a_fitted_codec_without_a_file_is_rejected_with_the_command_that_writes_it(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"needs fitted tables: name their file .*solq-lab fit-codec EXPERIMENT"):
        tiny_experiment(tmp_path, codec={"kind": kind})
    with pytest.raises(ConfigError, match=r"no such codec file; `solq-lab fit-codec EXPERIMENT` writes it"):
        build_codec(experiment_for(tmp_path, tmp_path / "absent.safetensors", {"kind": kind}))


def test_a_flat_codec_of_no_square_length_is_rejected_with_the_experiment(tmp_path):
    with pytest.raises(ConfigError, match="kind 'flatten' needs a square number"):
        tiny_experiment(tmp_path, codec={"kind": "flatten", "vector_dim": 20})


def test_an_experiment_chooses_the_threshold_and_each_codec_has_its_own_otherwise(tmp_path):
    assert build_codec(tiny_experiment(tmp_path)).threshold == "middle"
    assert build_codec(tiny_experiment(tmp_path, codec={"threshold": "half"})).threshold == "half"
    released = {"kind": "pca", "pca": "released", "artifact": "unused.safetensors"}
    assert new_codec(tiny_experiment(tmp_path, codec=released)).threshold == "half"
    assert new_codec(tiny_experiment(tmp_path, codec=released | {"threshold": "middle"})).threshold == "middle"


# Files that cannot be used


@pytest.fixture
def artifact(tmp_path) -> Path:
    codec, path = PCACodec(8, 5), tmp_path / "code.safetensors"
    codec.fit([blob_masks(0, count=30, size=8)])
    save_codec(path, codec, dataset={"sha256": "0"}, quality={})
    return path


def test_a_truncated_file_is_rejected(artifact):
    whole = artifact.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        artifact.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"not a codec file, or cut short .* fit the codec anew"):
            load_codec(artifact)


def test_a_file_of_a_newer_version_is_rejected_with_both_versions(artifact):
    tensors, header = read_tensors(artifact)
    write_tensors(artifact, tensors, {"description": header["description"] | {"format": FORMAT + 1, "shape": "new"}})
    with pytest.raises(ArtifactError, match=rf"of version {FORMAT + 1}, this program reads up to {FORMAT}; update"):
        load_codec(artifact)


def test_files_that_are_something_else_are_rejected(artifact):
    tensors, header = read_tensors(artifact)
    write_tensors(artifact, tensors, {})
    with pytest.raises(ArtifactError, match="without a codec's description"):
        load_codec(artifact)
    changes = {"method": "wavelet"}, {"settings": {"colour": 1}}, {"vector_dim": 100}, {"quality": None, "extra": 1}
    messages = "allowed are 'pca', 'sparse'", "colour", "does not fit mask_size 8", "lacks parts"
    for change, message in zip(changes, messages, strict=True):
        write_tensors(artifact, tensors, {"description": header["description"] | change})
        with pytest.raises(ArtifactError, match=message):
            load_codec(artifact)
    write_tensors(artifact, {"components": tensors["components"]}, header)
    with pytest.raises(ArtifactError, match=r"holds tables .* its description"):
        load_codec(artifact)


def test_a_file_of_other_sizes_or_settings_than_the_experiments_is_rejected_with_both(artifact, tmp_path):
    same = {"kind": "pca", "mask_size": 8, "vector_dim": 5}
    assert build_codec(experiment_for(tmp_path, artifact, same)).fitted
    for change, message in (
        ({"mask_size": 9}, r"mask_size \(there 8, wanted 9\)"),
        ({"vector_dim": 6}, r"vector_dim \(there 5, wanted 6\)"),
        ({"pca": "released"}, r"centered \(there False, wanted True\)"),
        ({"kind": "sparse"}, r"method \(there pca, wanted sparse\)"),
    ):
        with pytest.raises(ConfigError, match=rf"codec\.artifact: .*holds another codec: .*{message}"):
            build_codec(experiment_for(tmp_path, artifact, same | change))


# Quality


def test_a_codec_that_cuts_nothing_has_perfect_quality_and_equal_masks_no_variance():
    masks = blob_masks(0, count=20, size=9)
    quality = measure_quality(FlattenCodec(9), masks)
    assert quality == {"explained_variance": 1.0, "mean_iou": 1.0, "masks": 20}
    empty = torch.zeros(3, 9, 9, dtype=torch.bool)
    assert measure_quality(FlattenCodec(9), empty) == {"explained_variance": 0.0, "mean_iou": 1.0, "masks": 3}


# Training


@pytest.mark.parametrize("codec", [*KINDS, {"kind": "flatten", "vector_dim": 16}], ids=[*NAMES, "flatten"])
def test_every_kind_trains_and_its_model_needs_no_file_but_the_weights(data_root, tmp_path, codec):
    artifact = tmp_path / "code.safetensors"
    experiment = tiny_experiment(
        data_root, codec={"artifact": str(artifact), **codec}, train={"steps": 2, "save_every": 1}
    )
    if codec["kind"] != "flatten":
        fit_codec(experiment)
    run = create_run(experiment, tmp_path / "runs")
    assert train_run(run) == "finished"
    recorded = read_json(run.environment)["codec"]
    trained = new_codec(experiment) if codec["kind"] == "flatten" else load_codec(artifact)
    artifact.unlink(missing_ok=True)
    for weights in (run.weights, run.checkpoints / "step_0000001" / "weights.safetensors"):
        predictor = Predictor(weights)
        for name, table in trained.named_buffers():
            assert torch.equal(dict(predictor.codec.named_buffers())[name], table)
    image = next((data_root / "val").glob("*.png"))
    assert predictor.predict(image).masks is not None
    assert run_ceiling(run).metrics["segm.IoU"] > 0.5
    assert recorded["kind"] == type(trained).__name__
    assert len(recorded["sha256"]) == 64


def test_a_training_with_a_codec_of_other_data_is_rejected_before_it_begins(data_root, annotated, tmp_path):
    artifact = tmp_path / "code.safetensors"
    fit_codec(experiment_for(annotated, artifact, {"kind": "pca"}))
    experiment = experiment_for(data_root, artifact, {"kind": "pca"})
    with pytest.raises(
        ConfigError, match=r"was fitted to train\.json with \d+ objects, not to this training's .*boxes"
    ):
        check_fitted_data(experiment)
    run = create_run(experiment, tmp_path / "runs")
    with pytest.raises(ConfigError, match="its masks would come out wrong while the boxes look fine"):
        train_run(run)
    assert not run.metrics_file.exists()
    check_fitted_data(experiment_for(data_root, artifact, {"kind": "dct"}))


def test_the_command_fits_says_what_came_out_and_that_it_goes_on_after_ctrl_c(annotated, tmp_path, monkeypatch):
    experiment = experiment_for(annotated, tmp_path / "code.safetensors", {"kind": "pca"})
    (tmp_path / "tiny.yaml").write_text(experiment.to_yaml())
    command = ["fit-codec", str(tmp_path / "tiny.yaml"), "--objects", "40"]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pca.PCAFit, "update", interrupt)
        stopped = CliRunner().invoke(app, command)
    assert isinstance(stopped.exception, Interrupted)
    assert str(stopped.exception).endswith("code.safetensors: not fitted yet; re-running resumes")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert "pca, 16 x 16 cells in 20 numbers, fitted to 40 of" in done.stdout
    assert "of the variance, mean IoU 0." in done.stdout
