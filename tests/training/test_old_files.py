"""Files written by an earlier version still open: a finished run, a stopped one, an exported model, a fitted codec."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_tiny_dataset

from solq_lab.build import build_codec
from solq_lab.codecs.artifact import load_codec
from solq_lab.evaluation.results import read_results
from solq_lab.inference.predictor import Predictor
from solq_lab.models.backbone import SmallBackbone
from solq_lab.models.weights import read_weights
from solq_lab.runs import load_run
from solq_lab.training.trainer import train_run

ARCHIVE = Path(__file__).resolve().parents[1] / "old_files" / "old_files.tar.xz"


@pytest.fixture
def old_files(tmp_path, monkeypatch):
    """The old files in the current folder, beside the images that they were trained on."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    write_tiny_dataset(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    # The default backbone has a million weights; the files are to stay small.
    monkeypatch.setattr(SmallBackbone.__init__, "__defaults__", ((2, 4, 4, 4), (1, 1, 1, 1)))
    return tmp_path


def test_a_finished_run_opens_and_predicts(old_files):
    run = load_run(old_files / "finished")
    assert run.status()["state"] == "finished"
    assert [line["step"] for line in run.metrics("train")] == [1, 2, 3, 4]
    detections = Predictor(run.folder).predict(np.zeros((48, 48, 3), dtype=np.uint8))
    assert detections.masks
    assert all(mask["size"] == [48, 48] for mask in detections.masks)
    assert read_results(run.detections)


def test_a_stopped_run_resumes_to_the_end_of_the_uninterrupted_one(old_files):
    run = load_run(old_files / "stopped")
    assert train_run(run) == "finished"
    expected = read_weights(old_files / "finished" / "weights.safetensors").state
    for name, weights in read_weights(run.weights).state.items():
        assert torch.allclose(weights, expected[name], rtol=1e-3, atol=1e-5), name  # another CPU rounds otherwise
    totals = [
        [line["total"] for line in load_run(old_files / name).metrics("train")] for name in ("stopped", "finished")
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)


def test_an_exported_model_predicts_as_its_run(old_files):
    image = np.full((48, 48, 3), 90, dtype=np.uint8)
    exported, trained = (Predictor(old_files / name).predict(image) for name in ("exported.safetensors", "finished"))
    assert torch.equal(exported.scores, trained.scores)


def test_a_fitted_codec_opens_and_reconstructs(old_files):
    codec = load_codec(old_files / "pca.safetensors")
    assert (codec.mask_size, codec.vector_dim) == (8, 6)
    built = build_codec(load_run(old_files / "finished").experiment)
    masks = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(built.encode(masks), codec.encode(masks))
