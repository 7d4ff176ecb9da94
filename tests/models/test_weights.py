"""Weight files: the way to the released names and back loses nothing, and no file can make us run its code."""

import argparse
import collections
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_weights import RELEASED, made_up
from safetensors.torch import load_file, save_file
from torch import Tensor

from solq_lab.models.backbone import SmallBackbone
from solq_lab.models.official import Layout, infer_architecture
from solq_lab.models.solq import SOLQ
from solq_lab.models.weights import (
    WeightMismatch,
    export_official,
    initialise,
    load_state,
    read_backbone_weights,
    read_official,
    read_weights,
    save_weights,
    to_official_state,
    translate_official_state,
)
from solq_lab.structures import ImageBatch
from solq_lab.workbench.released import import_released

NAMELESS = "x: its backbone has no released name; allowed are resnet50"


def small_model(num_classes: int = 5, **changes: Any) -> SOLQ:
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "levels": 3, "encoder_layers": 1, "decoder_layers": 2}
    sizes |= {"encoder_points": 4, "decoder_points": 4, "feedforward": 32, "vector_dim": 12, "vector_hidden": 16}
    sizes |= {"queries": 6, "dropout": 0.0, "activation": "relu", "refine_boxes": True} | changes
    return SOLQ(SmallBackbone((8, 16, 24, 32), (1, 1, 1, 1)), num_classes, **sizes)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Same names in the same order, same types, same bits."""
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def in_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(state.items()))


LAYOUTS = [
    Layout(backbone, levels, 1, 3, refine or two_stage, two_stage, vectors)
    for backbone, levels, (refine, two_stage), vectors in itertools.product(
        ("resnet101", "swin_t", "swin_s", "swin_b", "swin_l"),
        (1, 4, 5),
        ((False, False), (True, False), (True, True)),
        (True, False),
    )
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(str(value) for value in layout))
def test_released_names_come_back_bit_exact_in_order(layout: Layout):
    official = made_up(layout)
    assert same(to_official_state(translate_official_state(official)[0]), official)


def test_shared_tensors_stay_shared():
    own = translate_official_state(made_up(RELEASED))[0]
    assert own["heads.2.vector.layers.1.bias"] is own["heads.0.vector.layers.1.bias"]
    assert own["heads.2.box.layers.1.bias"] is not own["heads.0.box.layers.1.bias"]
    shared = translate_official_state(made_up(RELEASED._replace(refine_boxes=False)))[0]
    assert shared["heads.2.box.layers.1.bias"] is shared["heads.0.box.layers.1.bias"]


@pytest.mark.parametrize("prefix", ["module.", "detr.", "module.detr."])
def test_prefixes_of_wrappers_are_taken_off(prefix: str):
    official = made_up(RELEASED)
    wrapped = {prefix + name: tensor for name, tensor in official.items()}
    assert same(translate_official_state(wrapped)[0], translate_official_state(official)[0])
    assert infer_architecture(wrapped) == infer_architecture(official)


def test_one_name_of_a_shared_tensor_is_enough():
    official = made_up(RELEASED)
    kept = {
        name: tensor
        for name, tensor in official.items()
        if not name.startswith(("transformer.decoder.bbox_embed.", "vector_embed.1.", "vector_embed.2."))
    }
    assert same(in_order(translate_official_state(kept)[0]), in_order(translate_official_state(official)[0]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("transformer.decoder.bbox_embed.1.layers.0.weight", "bbox_embed.1.layers.0.weight"),
        ("vector_embed.0.layers.2.bias", "vector_embed.2.layers.2.bias"),
    ],
)
def test_two_names_of_one_tensor_must_agree(first: str, second: str):
    official = made_up(RELEASED)
    official[second] = official[second] + 1
    with pytest.raises(WeightMismatch, match=rf"x\.pth: {first} and {second} are two names of one tensor"):
        translate_official_state(official, source="x.pth")[0]


def test_a_missing_tensor_is_named():
    official = made_up(RELEASED)
    del official["transformer.encoder.layers.1.norm2.bias"]
    with pytest.raises(
        WeightMismatch, match=r"x\.pth: 1 tensors are missing, the first is transformer.*1\.norm2\.bias"
    ):
        translate_official_state(official, source="x.pth")[0]
    with pytest.raises(WeightMismatch, match=r"x\.pth: no tensor transformer.*1\.norm2\.bias"):
        infer_architecture(official, source="x.pth")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: translate_official_state({"fc.weight": torch.zeros(2)}, source="x")[0],
            r"x: no tensor .*found fc\.weight",
        ),
        (lambda: translate_official_state({"transformer.level_embed": torch.zeros(4, 8)}, source="x")[0], NAMELESS),
        (lambda: to_official_state(small_model().state_dict(), source="x"), NAMELESS),
        (lambda: to_official_state({"a": torch.zeros(1)}, source="x"), r"x: no tensor level_embedding \(found a\)"),
        (
            lambda: infer_architecture(made_up(RELEASED), {"nheads": 7}, source="x"),
            r"x: decoder\.0\.cross_attention has 96 .* 7 heads x 4 levels; .*nheads",
        ),
    ],
)
def test_networks_that_are_not_the_released_ones_are_rejected(act: Callable[[], object], message: str):
    with pytest.raises(WeightMismatch, match=message):
        act()


def test_architecture_is_read_off_the_tensors():
    found = infer_architecture(made_up(RELEASED))
    assert found == {
        "model": {
            "backbone": "resnet50",
            "pretrained": "none",
            "levels": 4,
            "width": 64,
            "heads": 8,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "decoder_points": 3,
            "feedforward": 96,
            "refine_boxes": True,
            "two_stage": False,
            "encoder_points": 2,
            "vector_hidden": 48,
            "queries": 30,
        },
        "codec": {"kind": "dct", "vector_dim": 40},
        "data": {"class_ids": "raw", "num_classes": 91},
    }


def test_what_tensors_do_not_tell_comes_from_the_checkpoint_s_args():
    args = {"nheads": 4, "dilation": True, "activation": "gelu", "gt_mask_len": 64, "num_queries": 7}
    found = infer_architecture(made_up(RELEASED._replace(two_stage=True)), args)
    assert found["model"]["heads"] == 4
    assert found["model"]["decoder_points"] == 6
    assert found["model"]["dilation"] is True
    assert found["model"]["activation"] == "gelu"
    assert found["model"]["queries"] == 7
    assert found["codec"]["mask_size"] == 64


def test_deformable_detr_becomes_a_plain_detector():
    found = infer_architecture(made_up(RELEASED._replace(vectors=False, refine_boxes=False)))
    assert found["codec"] == {"kind": "none"}
    assert found["model"]["refine_boxes"] is False
    assert "vector_hidden" not in found["model"]


def checkpoint(official: dict[str, Tensor], **others: Any) -> dict[str, Any]:
    args = argparse.Namespace(nheads=8, dilation=False, activation="relu", gt_mask_len=64, output_dir="", lr_drop=40)
    scheduler = {"step_size": 40, "base_lrs": [2e-4], "last_epoch": 50, "milestones": collections.Counter()}
    return {
        "model": official,
        "optimizer": {"state": {}},
        "lr_scheduler": scheduler,
        "epoch": 49,
        "args": args,
    } | others


def test_a_released_checkpoint_is_imported_and_given_back(tmp_path: Path):
    official = made_up(RELEASED)
    extra = {"module.class_embed.0.total_ops": torch.zeros(1)}
    torch.save(checkpoint({f"module.{name}": t for name, t in official.items()} | extra), tmp_path / "released.pth")
    report = import_released(tmp_path / "released.pth", tmp_path / "ours.safetensors")
    assert report.architecture["codec"] == {"kind": "dct", "vector_dim": 40, "mask_size": 64}
    assert report.missing == ()
    assert report.left_over == ("class_embed.0.total_ops",)
    assert set(report.used) == set(official)
    assert f"{len(official)} tensors used, 0 missing, 1 left over" in str(report)
    assert "left over  class_embed.0.total_ops" in str(report)

    stored = read_weights(tmp_path / "ours.safetensors")
    assert stored.experiment.startswith("name: ours\n")
    assert same(in_order(stored.state), in_order(translate_official_state(official)[0]))

    export_official(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], official)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_bare_state_dict_is_read_too(tmp_path: Path, old_format: bool):
    official = made_up(RELEASED)
    torch.save(official, tmp_path / "state.pth", _use_new_zipfile_serialization=not old_format)
    assert same(read_official(tmp_path / "state.pth").state, official)
    assert read_official(tmp_path / "state.pth").args == {}


def test_an_import_that_fails_writes_nothing(tmp_path: Path):
    torch.save({"model": {"fc.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(WeightMismatch, match=r"other\.pth: no tensor transformer\.level_embed"):
        import_released(tmp_path / "other.pth", tmp_path / "ours.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]


HOLDS_NOTHING = "holds no tensors by name; allowed are state dicts"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such checkpoint file"),
        (b"", "not a checkpoint, or cut short"),
        (b"hello, this is text", "(not a checkpoint|rejected)"),
        (b"PK\x03\x04 half a zip", "not a checkpoint, or cut short"),
        (torch.nn.Linear(2, 2), r"rejected, it needs torch\.nn\.modules\.linear\.Linear"),
        *[(value, HOLDS_NOTHING) for value in ({"epoch": 3}, [1, 2], {"model": {"a": 1}}, {"model": None})],
    ],
)
def test_files_that_are_no_checkpoints_are_named(tmp_path: Path, content: Any, message: str):
    path = tmp_path / "broken.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightMismatch, match=rf"broken\.pth: {message}"):
        read_official(path)


def test_files_that_are_no_weights_of_ours_are_named(tmp_path: Path):
    with pytest.raises(WeightMismatch, match=r"absent\.safetensors: no such weights file"):
        read_weights(tmp_path / "absent.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "released.pth")
    with pytest.raises(WeightMismatch, match=r"released\.pth: not a safetensors file .*solq-lab import-weights"):
        read_weights(tmp_path / "released.pth")


@pytest.mark.parametrize("refine_boxes", [True, False])
def test_a_model_s_weights_come_back_bit_exact_and_shared_tensors_are_stored_once(tmp_path: Path, refine_boxes: bool):
    model = small_model(refine_boxes=refine_boxes)
    save_weights(tmp_path / "w.safetensors", model.state_dict(), experiment="name: a", classes="[]")
    assert not [name for name in load_file(tmp_path / "w.safetensors") if name.startswith("heads.1.vector")]
    stored = read_weights(tmp_path / "w.safetensors")
    assert (stored.experiment, stored.classes) == ("name: a", "[]")
    assert set(stored.state) == set(model.state_dict())
    other = small_model(refine_boxes=refine_boxes)
    load_state(other, stored.state, source="w")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_plain_safetensors_file_has_no_experiment(tmp_path: Path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert read_weights(tmp_path / "plain.safetensors")[1:] == (None, None, {})


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, {"a": torch.ones(2)}, experiment="old", classes="[]")

    def fail(_: dict[str, Tensor], name: Path, __: dict[str, str]) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("solq_lab.models.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, {"a": torch.zeros(2)}, experiment="new", classes="[]")
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert read_weights(path).experiment == "old"


def test_written_weights_may_be_read_by_whoever_may_read_other_files(tmp_path: Path):
    (tmp_path / "other.txt").write_text("")
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(2)}, experiment="", classes="[]")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_weights_of_another_architecture_are_rejected_with_both_shapes():
    model, state = small_model(), small_model().state_dict()
    with pytest.raises(
        WeightMismatch, match=r"w: level_embedding has shape \(4, 32\), the model expects \(3, 32\); build"
    ):
        load_state(model, small_model(levels=4).state_dict(), source="w")
    with pytest.raises(WeightMismatch, match=r"w: no tensor query_embedding, the model expects one of shape \(6, 64\)"):
        load_state(model, {k: v for k, v in state.items() if k != "query_embedding"}, source="w")
    with pytest.raises(WeightMismatch, match=r"w: the model has no tensor extra \(1 such\)"):
        load_state(model, state | {"extra": torch.zeros(1)}, source="w")


def test_a_detector_with_other_classes_starts_a_training_as_far_as_it_fits(tmp_path: Path):
    detector = small_model(num_classes=91, vector_dim=None)
    save_weights(tmp_path / "d.safetensors", detector.state_dict(), experiment="", classes="")
    model = small_model(num_classes=5)
    report = initialise(model, tmp_path / "d.safetensors")
    assert torch.equal(model.query_embedding, detector.query_embedding)
    assert "heads.0.classify.weight" in report.missing
    assert "heads.0.vector.layers.0.weight" in report.missing
    assert "heads.0.classify.weight (91, 32)" in report.left_over
    assert "heads.0.box.layers.0.weight" in report.used


def test_a_released_detector_starts_a_training_as_far_as_it_fits(tmp_path: Path):
    official = made_up(RELEASED) | {"mask_head.lay1.bias": torch.zeros(2)}
    model = small_model()
    official["input_proj.0.1.bias"] = torch.full((32,), 0.5)
    torch.save({"model": official}, tmp_path / "released.pth")
    report = initialise(model, tmp_path / "released.pth")
    assert "projections.0.1.bias" in report.used
    assert "mask_branch.blocks.0.0.bias (2,)" in report.left_over
    assert torch.equal(model.projections[0][1].bias, torch.full((32,), 0.5))


def test_a_file_that_fits_nowhere_is_rejected(tmp_path: Path):
    save_file({"fc.weight": torch.ones(2)}, tmp_path / "fc.safetensors")
    with pytest.raises(
        WeightMismatch, match=r"fc\.safetensors: none of its tensors fits this model \(it holds fc\.weight"
    ):
        initialise(small_model(), tmp_path / "fc.safetensors")


def test_a_standardised_head_starts_a_plain_one_with_the_same_vectors(tmp_path: Path):
    standardised = small_model(standardise_vectors=True).eval()
    torch.nn.init.normal_(standardised.heads[0].vector.layers[2].weight)
    standardised.set_vector_statistics(torch.linspace(-2, 2, 12), torch.linspace(1, 4, 12))
    save_weights(tmp_path / "s.safetensors", standardised.state_dict(), experiment="", classes="")
    plain = small_model().eval()
    initialise(plain, tmp_path / "s.safetensors")
    images = ImageBatch(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    torch.testing.assert_close(plain(images).layers[-1].vectors, standardised(images).layers[-1].vectors)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.0.body."])
def test_backbone_weights_are_found_in_classifiers_and_detectors(tmp_path: Path, prefix: str):
    own = SmallBackbone().state_dict()
    others = {"fc.weight": torch.zeros(2), "head.bias": torch.zeros(2)}
    torch.save({"model": {prefix + name: t for name, t in own.items()} | others}, tmp_path / "b.pth")
    assert same(read_backbone_weights(tmp_path / "b.pth", SmallBackbone().state_dict()), own)


def test_released_swin_names_become_ours(tmp_path: Path):
    own = {
        "layers.1.downsample.norm.bias": torch.zeros(2),
        "norms.2.bias": torch.zeros(2),
        "norms.3.bias": torch.ones(2),
    }
    theirs = {
        "layers.0.downsample.reduction.weight": torch.ones(2),
        "layers.0.downsample.norm.bias": torch.full((2,), 7.0),
        "norm2.bias": torch.full((2,), 8.0),
    }
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    found = read_backbone_weights(tmp_path / "swin.pth", own)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "layers.1.downsample.norm.bias": [7.0, 7.0],
        "norms.2.bias": [8.0, 8.0],
        "norms.3.bias": [1.0, 1.0],  # no classifier has it; it keeps its value
    }


def test_weights_of_another_backbone_are_rejected(tmp_path: Path):
    own = SmallBackbone().state_dict()
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(
        WeightMismatch, match=r"b\.pth: stem\.weight: found \(3,\), the backbone expects \(32, 3, 6, 6\)"
    ):
        read_backbone_weights(tmp_path / "b.pth", own)
    torch.save({"other": torch.zeros(3)}, tmp_path / "b.pth")
    with pytest.raises(WeightMismatch, match=r"stem\.weight: found no such tensor, the backbone expects"):
        read_backbone_weights(tmp_path / "b.pth", own)
