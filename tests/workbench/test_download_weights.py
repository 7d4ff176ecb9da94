"""Weights of others from an unreliable server into the cache folder; which ones a training fetches before it starts."""

import hashlib
import io

import numpy as np
import pytest
import torch
from server import serve
from tiny import tiny_experiment

from solq_lab.build import build_model
from solq_lab.config import ConfigError
from solq_lab.data.annotations import DataError
from solq_lab.errors import UserError
from solq_lab.models import released
from solq_lab.models.backbone import ResNetBackbone
from solq_lab.models.released import RELEASED, cached_file
from solq_lab.workbench.download.weights import download_weights, fetch_starting_weights

BODY = np.random.default_rng(0).bytes(300_000)
QUICK = {"backoff": 0.0, "timeout": 2.0}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A mirror with a "resnet50" whose published sum is that of BODY, and an empty cache folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    published = RELEASED["resnet50"]._replace(sha256=hashlib.sha256(BODY).hexdigest()[:8])
    monkeypatch.setitem(RELEASED, "resnet50", published)
    with serve() as serving:
        serving.files = {f"/weights/{each.file}": BODY for each in RELEASED.values()}
        yield serving


@pytest.mark.parametrize("name", ["resnet50", "solq_r50"])
def test_weights_come_from_a_mirror_after_broken_connections_and_are_fetched_once(server, command_line, name):
    server.breaks = [100_000, 50_000]
    for _ in range(2):
        status, output = command_line("download-weights", name, "--mirror", f"{server.url}/weights/")
        assert status == 0
        assert str(cached_file(name)) in output
    assert cached_file(name).read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    record = cached_file(name).with_name(f"{cached_file(name).name}.sha256")
    assert record.read_text().split() == [hashlib.sha256(BODY).hexdigest(), cached_file(name).name]


def test_a_wrong_sum_is_rejected_and_the_file_removed(server):
    server.files["/weights/resnet50-0676ba61.pth"] = BODY[::-1]
    with pytest.raises(DataError, match=r"resnet50-0676ba61\.pth: its SHA-256 is .*, the one published begins with"):
        download_weights("resnet50", mirror=f"{server.url}/weights", **QUICK)
    assert not cached_file("resnet50").exists()


def test_a_file_that_has_changed_since_it_came_is_named_and_kept(server):
    path = download_weights("solq_r50", mirror=f"{server.url}/weights", **QUICK)
    path.write_bytes(BODY[:1000])
    with pytest.raises(DataError, match=r"solq_r50\.pth: its SHA-256 .* recorded in .*remove it and fetch it again"):
        download_weights("solq_r50")
    assert path.exists()


def test_a_page_in_the_place_of_a_file_is_named_with_the_link_and_the_place(server, command_line):
    server.files["/weights/solq_r50.pth"] = b"\n<!DOCTYPE html><html>Too large to scan for viruses</html>"
    status, message = command_line("download-weights", "solq_r50", "--mirror", f"{server.url}/weights")
    assert status == 2
    assert f"{server.url}/weights/solq_r50.pth: the host answers with a web page instead of the file" in message
    assert "https://drive.google.com/file/d/1D43QroYz2CH3rHDVE54tlByq6dSbmXJK/view" in message
    assert f"put it at {cached_file('solq_r50')}" in message
    assert not cached_file("solq_r50").exists()


def test_the_list_names_every_file_its_link_and_the_cache_folder(server, command_line):
    status, shown = command_line("download-weights", "--list")
    assert status == 0
    assert all(name in shown and each.link in shown for name, each in RELEASED.items())
    assert str(released.weights_folder()) in shown


def test_an_unknown_name_is_rejected_with_the_nearest(server):
    with pytest.raises(UserError, match=r"resnet5.*resnet50"):
        download_weights("resnet5")


def test_a_training_fetches_its_backbone_before_it_starts_and_only_then(server, tmp_path, monkeypatch):
    monkeypatch.setattr(released.ReleasedWeights, "url", property(lambda each: f"{server.url}/weights/{each.file}"))
    imagenet = {"backbone": "resnet50", "pretrained": "imagenet"}
    for model, train in (({"pretrained": "none"}, {}), (imagenet, {"finetune_from": "a.safetensors"})):
        fetch_starting_weights(tiny_experiment(tmp_path, model=model, train=train), tmp_path / "run")
    assert server.ranges == []

    experiment = tiny_experiment(tmp_path, model=imagenet)
    (tmp_path / "run" / "checkpoints" / "step_0000001").mkdir(parents=True)
    fetch_starting_weights(experiment, tmp_path / "run")
    assert server.ranges == []
    fetch_starting_weights(experiment, tmp_path / "fresh")
    assert server.ranges == [None]


def test_a_model_starts_from_the_file_that_was_fetched_and_says_how_to_get_it(server):
    experiment = tiny_experiment(".", model={"backbone": "resnet50", "pretrained": "imagenet"})
    with pytest.raises(ConfigError, match="`solq-lab download-weights resnet50` fetches them"):
        build_model(experiment, 2, pretrained=True)

    donor, file = ResNetBackbone("resnet50"), io.BytesIO()
    torch.save(donor.state_dict(), file)
    cached_file("resnet50").parent.mkdir(parents=True, exist_ok=True)
    cached_file("resnet50").write_bytes(file.getvalue())
    filled = build_model(experiment, 2, pretrained=True).backbone
    assert all(torch.equal(tensor, filled.state_dict()[name]) for name, tensor in donor.state_dict().items())
