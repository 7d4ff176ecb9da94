"""Experiments are read strictly: what a message says about a mistake, and that nothing is lost on the way to a file."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from solq_lab.config import ConfigError, Experiment, load_experiment, validate_experiment
from solq_lab.schema import keys_with
from solq_lab.sections import Role


@pytest.fixture
def write(tmp_path):
    """Write a YAML file into a fresh folder and return its path."""

    def write_file(text: str, name: str = "mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def rejection(path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_file_is_the_paper(write):
    experiment = load_experiment(write(""))
    assert experiment == Experiment(name="mine")
    assert (experiment.optim.lr, experiment.train.batch_size, experiment.codec.vector_dim) == (2e-4, 32, 256)


def test_a_file_overrides_its_parent_key_by_key_and_the_command_line_overrides_both(write):
    write("train: {batch_size: 8, epochs: 3}\ncodec: {vector_dim: 64}", "parent.yaml")
    child = write("extends: parent.yaml\ntrain: {batch_size: 16}")
    experiment = load_experiment(child, ["codec.vector_dim=100", "name=other"])
    assert (experiment.train.batch_size, experiment.train.epochs) == (16, 3)
    assert (experiment.codec.vector_dim, experiment.name) == (100, "other")
    assert load_experiment(child, "codec.vector_dim=100 name=other") == experiment  # as papermill's -p gives it


@settings(deadline=None)  # a machine may be busy
@given(seed=st.integers(0, 2**31), rate=st.floats(1e-8, 1.0), scales=st.lists(st.integers(1, 2000), min_size=1))
def test_writing_and_reading_gives_the_same_experiment(seed, rate, scales):
    experiment = Experiment(name="a", seed=seed, optim={"lr": rate}, data={"train_scales": scales})
    assert validate_experiment(yaml.safe_load(experiment.to_yaml()), source="text") == experiment


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {bach_size: 8}", "mine.yaml: unknown key train.bach_size; did you mean batch_size?"),
        ("modle: {width: 256}", "unknown key modle; did you mean model?"),
        ("train: {lr: 0.1}", "unknown key train.lr; did you mean optim.lr?"),
        ("batch_size: 4", "did you mean train.batch_size or evaluation.batch_size?"),
        ("codec: {zzz: 1}", "allowed are kind, mask_size, vector_dim"),
        (
            "extends: nowhere.yaml",
            "mine.yaml: extends: found nowhere.yaml, allowed is the path of a YAML file as seen from",
        ),
    ],
)
def test_an_unknown_key_or_parent_is_rejected_with_the_nearest_or_what_is_allowed(write, text, said):
    assert said in rejection(write(text))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=3", "unknown key steps; did you mean train.steps?"),
        ("optim.lrr=1", "unknown key optim.lrr; did you mean lr?"),
        ("matcher=3", "matcher: found 3, allowed is a section with some of the keys class_cost"),
    ],
)
def test_an_unknown_key_on_the_command_line_is_rejected_alike(write, override, said):
    assert said in rejection(write(""), [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {batch_size: many}", ("train.batch_size", "integer", "'many'")),
        ("optim: {lr: -1}", ("optim.lr", "greater than 0", "-1")),
        ("model: {backbone: resnet49}", ("model.backbone", "'resnet50'", "'resnet49'")),
        ("data: {crop_size: [384, big]}", ("data.crop_size.1", "integer", "'big'")),
        ("data: {crop_size: [0, 600]}", ("data.crop_size.0", "greater than 0", "0")),
        ("data: {train_scales: [480, -1]}", ("data.train_scales.1", "greater than 0", "-1")),
        ("data: {crop_scales: []}", ("data.crop_scales", "at least 1")),
        ("evaluation: {area_sides: [0, 96]}", ("evaluation.area_sides.0", "greater than 0", "0")),
        ("evaluation: 7", ("evaluation", "7")),
        ("codec: {mask_size: 8, vector_dim: 65}", ("vector_dim 65", "mask_size squared (64)")),
        ("model: {width: 200, heads: 8}", ("width 200", "multiple of 32")),
        ("model: {width: 256, heads: 5}", ("width 256", "heads 5")),
        ("model: {levels: 2}", ("levels 2", "1 is C5 alone")),
        ("model: {two_stage: true, refine_boxes: false}", ("two_stage: true", "refine_boxes: true")),
        ("model: {mixed_queries: true, refine_boxes: false}", ("mixed_queries: true", "refine_boxes: true")),
        ("model: {look_twice: true, refine_boxes: false}", ("look_twice: true", "refine_boxes: true")),
        ("evaluation: {rescore: sharpness}\ncodec: {kind: none}", ("evaluation.rescore sharpness", "kind is none")),
        ("data: {augment: mosaic}\ncodec: {kind: none}", ("data.augment mosaic", "codec.kind is none")),
        ("loss: {band_limit: 1}\ncodec: {kind: haar}", ("loss.band_limit 1", "codec.kind haar", "'dct_blur'")),
        ("evaluation: {vector_dim: 300}", ("evaluation.vector_dim 300", "codec.vector_dim 256", "at most as many")),
        ("loss: {tail_drop: 0.5}", ("loss.tail_drop 0.5", "leave it out, or set loss.decoded_dice_weight")),
        ("codec: {learn_decoder: true, kind: haar}", ("codec.learn_decoder true", "not haar", "leave it out")),
        ("model: {mask_look: 48}", ("mask_look 48 does not divide width 256", "allowed are 0, 8, 16, 32, 64")),
        ("model: {mask_look: 8}\ncodec: {kind: none}", ("model.mask_look 8", "codec.kind is none", "leave it out")),
        ("model: {denoising: 3}", ("denoising 3 needs mixed_queries: true or two_stage: true", "set it to 0")),
        ("loss: {proposals_per_object: 6}", ("loss.proposals_per_object 6 needs proposals", "model.mixed_queries")),
        ("model: {mixed_queries: true, two_stage: true}", ("two_stage and mixed_queries", "set one of them to false")),
        ("model: {backbone: swin_t, dilation: true}", ("dilation", "swin_t")),
        ("train: {batch_size: 10, gpus: 4}", ("batch_size 10", "4 x 1")),
        ("data: {crop_size: [600, 384]}", ("data: crop_size [600, 384]", "ascending")),
        ("evaluation: {area_sides: [96, 32]}", ("evaluation: area_sides [96.0, 32.0]", "ascending")),
    ],
)
def test_a_value_that_does_not_fit_its_type_or_others_is_named_with_what_is_allowed(write, text, said):
    message = rejection(write(text))
    assert all(part in message for part in said), message


def test_all_faults_of_a_file_are_named_at_once(write):
    message = rejection(write("train: {epochs: 0}\noptim: {momentum: 0.9}"))
    assert "train.epochs" in message
    assert "optim.momentum" in message


def test_a_missing_file_is_rejected_with_the_nearest_name(write):
    path = write("", "solq_r50.yaml")
    assert f"did you mean {path}?" in rejection(path.with_name("solq_r5.yaml"))


@pytest.mark.parametrize("text", ["[1, 2]", "just words", "a: [1", "a: !!python/object/apply:os.getcwd []"])
def test_a_file_that_is_no_mapping_is_rejected_and_runs_nothing(write, text):
    assert "mine.yaml" in rejection(write(text))


def test_a_file_that_extends_itself_is_rejected(write):
    write("extends: b.yaml", "a.yaml")
    assert "extends itself" in rejection(write("extends: a.yaml", "b.yaml"))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("name=007", "007"),
        ("name=2e5", "2e5"),
        ("name=2024-01-01", "2024-01-01"),
        ("data.root=1_000", "1_000"),
        ("data.root=run #2", "run #2"),
        ("data.root=my: set", "my: set"),
        ("data.root=", ""),
        ("data.train_images=2017", "2017"),
        ("model.pretrained=none", "none"),
        ("data.root=~/coco", str(Path.home() / "coco")),
        ("codec.threshold=null", None),
        ("data.crop_size=[3, 4]", (3, 4)),
        ("optim.lr=2e-5", 2e-5),
        ("train.steps=010", 10),
        ("train.steps=0x10", 16),
    ],
)
def test_an_override_of_a_text_is_taken_as_typed_and_any_other_as_yaml(write, override, found):
    key = override.partition("=")[0]
    experiment = load_experiment(write(""), [override])
    assert (experiment.name if key == "name" else experiment.value(key)) == found


def test_a_choice_that_yaml_takes_for_another_type_is_rejected_as_typed(write):
    for override in ("optim.lr=yes", "train.steps=true", "model.dropout=no"):
        assert f"{override.partition('=')[0]}: yes, no, true and false are no values" in rejection(
            write(""), [override]
        )
    assert "(found '1:30')" in rejection(write(""), ["train.steps=1:30"])
    assert "(found 'no')" in rejection(write(""), ["train.autocast=no"])


def test_keys_have_the_roles_that_runs_sweeps_and_shared_models_rely_on():
    assert keys_with(Role.START) == {"codec.artifact", "model.pretrained", "train.finetune_from"}
    assert {"data.workers", "train.skip_nonfinite"} < keys_with(Role.MAY_CHANGE)
    assert "data.root" in keys_with(Role.MACHINE)
    assert not keys_with(Role.MAY_CHANGE) & {"optim.lr", "train.gpus", "train.batch_size", "train.autocast"}
    experiment = Experiment(name="x", codec={"kind": "pca", "artifact": "a/pca.safetensors"})
    assert experiment.starting_files == {"codec.artifact": "a/pca.safetensors"}


@pytest.mark.parametrize("override", ["train.batch_size", "=3", "train.batch_size.more=3", "train.steps=[1"])
def test_an_override_of_another_form_is_rejected(write, override):
    assert override in rejection(write("train: {batch_size: 8}"), [override])


def test_a_name_that_is_no_folder_name_is_rejected(write):
    assert "name" in rejection(write(""), ["name=../elsewhere"])


def test_an_experiment_cannot_be_changed_after_loading(write):
    with pytest.raises(ValueError, match="frozen"):
        load_experiment(write("")).seed = 7


def test_an_experiment_can_be_validated_on_its_training_images():
    experiment = Experiment(name="x", data={"train_images": "seen", "train_annotations": "seen.json"})
    assert experiment.evaluated_on("val") == experiment
    data = experiment.evaluated_on("train").data
    assert (data.val_images, data.val_annotations) == ("seen", "seen.json")
    with pytest.raises(ConfigError, match=r"split 'test': allowed are 'val' and 'train'"):
        experiment.evaluated_on("test")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"codec": {"kind": "none"}, "loss": {"decoded_dice_weight": 2.0}},
            "decoded_dice_weight 2.0: concerns mask vec",
        ),
        ({"codec": {"kind": "none"}, "loss": {"vector_kind": "l2"}}, "codec.kind is none; leave it out, or choose"),
        ({"codec": {"kind": "none"}, "loss": {"class_loss": "quality"}}, "loss.class_loss quality: concerns mask vec"),
        ({"loss": {"class_loss": "quality", "vector_layers": 2}}, "all 6 decoder layers, and loss.vector_layers 2"),
        ({"loss": {"vector_units": "std"}}, "vector_units std needs model.standardise_vectors: true"),
    ],
)
def test_losses_of_vectors_that_do_not_fit_the_model_are_rejected(sections, message):
    with pytest.raises(ConfigError, match=message):
        validate_experiment({"name": "x", **sections}, source="x.yaml")
