"""From an experiment to objects: every kind that the schema knows, and what is said where something is missing."""

import pytest
import torch
from tiny import SIDE, tiny_experiment
from torchvision.models import resnet50

from solq_lab.build import build_augmentation, build_backbone, build_codec, build_dataset, build_images, build_model
from solq_lab.codecs.dct import DCTCodec
from solq_lab.config import ConfigError
from solq_lab.data.annotations import DataError
from solq_lab.data.transforms import FlipOnly, LargeScaleJitter, ReleasedAugmentation, TestResize
from solq_lab.models.weights import WeightMismatch, save_weights
from solq_lab.schema import DataSection, ModelSection
from solq_lab.structures import ImageBatch


def predict(model):
    images = ImageBatch(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool))
    with torch.no_grad():
        return model.eval()(images).layers[-1]


def test_the_codec_has_the_experiments_sizes(data_root):
    codec = build_codec(tiny_experiment(data_root))
    assert isinstance(codec, DCTCodec)
    assert (codec.mask_size, codec.vector_dim) == (16, 20)


def test_no_codec_is_a_plain_detector(data_root):
    experiment = tiny_experiment(data_root, codec={"kind": "none"}, model={"standardise_vectors": False})
    assert build_codec(experiment) is None
    assert predict(build_model(experiment, 2)).vectors is None
    assert build_dataset(experiment, "train")[0][1].masks is None


def test_the_model_has_the_experiments_sizes(data_root):
    experiment = tiny_experiment(data_root, model={"queries": 5})
    prediction = predict(build_model(experiment, 7))
    assert prediction.logits.shape == (1, 5, 7)
    assert prediction.boxes.shape == (1, 5, 4)
    assert prediction.vectors.shape == (1, 5, 20)


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "swin_t", "swin_s", "swin_b", "swin_l", "small"])
def test_every_backbone_gives_three_maps_or_c5_alone(name):
    with torch.device("meta"):
        three, one = (build_backbone(ModelSection(backbone=name, levels=levels)) for levels in (4, 1))
    assert three.strides == (8, 16, 32)
    assert one.strides == (32,)
    assert one.channels == three.channels[-1:]


def test_dilation_makes_dc5():
    with torch.device("meta"):
        assert build_backbone(ModelSection(dilation=True, levels=1)).strides == (16,)


def test_a_model_starts_from_a_file_of_a_whole_detector(data_root, tmp_path):
    trained = build_model(tiny_experiment(data_root), 2)
    save_weights(tmp_path / "detector.safetensors", trained.state_dict(), experiment="", classes="")
    experiment = tiny_experiment(data_root, model={"pretrained": str(tmp_path / "detector.safetensors")})
    started = build_model(experiment, 3, pretrained=True).state_dict()  # another number of classes: a fresh class head
    assert torch.equal(started["query_embedding"], trained.query_embedding)
    assert torch.equal(started["backbone.stem.weight"], trained.backbone.stem.weight)
    assert started["heads.0.classify.weight"].shape == (3, 32)


def test_a_model_starts_from_a_classifiers_backbone(data_root, tmp_path):
    classifier = resnet50(weights=None).state_dict()
    torch.save(classifier, tmp_path / "classifier.pth")
    model = {"backbone": "resnet50", "pretrained": str(tmp_path / "classifier.pth")}
    started = build_model(tiny_experiment(data_root, model=model), 2, pretrained=True)
    assert torch.equal(started.backbone.layer4[2].conv3.weight, classifier["layer4.2.conv3.weight"])


def test_weights_of_another_backbone_are_rejected_by_name(data_root, tmp_path):
    torch.save({"conv1.weight": torch.zeros(2, 3, 1, 1)}, tmp_path / "other.pth")
    experiment = tiny_experiment(data_root, model={"pretrained": str(tmp_path / "other.pth")})
    with pytest.raises(WeightMismatch, match=r"other\.pth: .*no such tensor.*model\.pretrained"):
        build_model(experiment, 2, pretrained=True)


def test_a_model_to_be_loaded_reads_no_pretrained_file(data_root):
    build_model(tiny_experiment(data_root, model={"pretrained": "nowhere.pth"}), 2)


def test_imagenet_weights_that_cannot_be_had_are_a_mistake_in_the_experiment(data_root):
    experiment = tiny_experiment(data_root, model={"pretrained": "imagenet"})
    with pytest.raises(ConfigError, match=r"model\.backbone=small, model\.pretrained=imagenet: .*pretrained: none"):
        build_model(experiment, 2, pretrained=True)


def test_training_targets_have_masks_and_validation_targets_have_none(data_root):
    experiment = tiny_experiment(data_root)
    train = build_dataset(experiment, "train")
    val = build_dataset(experiment, "val", classes=train.classes)
    assert train[0][1].masks.shape == (1, 16, 16)
    assert val[0][1].masks is None
    assert val.classes is train.classes
    assert (len(train), len(val)) == (12, 4)


def test_images_to_look_at_are_those_of_the_files_with_their_true_masks(data_root):
    dataset = build_images(tiny_experiment(data_root, data={"test_scale": 20}, codec={"kind": "none"}))
    image, _ = dataset[0]
    assert image.shape == (3, SIDE, SIDE)
    assert dataset.objects(0).masks[0]["size"] == [SIDE, SIDE]
    with pytest.raises(ConfigError, match=r"data\.root is empty"):
        build_images(tiny_experiment(data_root, data={"root": ""}))


def test_raw_class_ids_are_the_channels(data_root):
    classes = build_dataset(tiny_experiment(data_root, data={"class_ids": "raw", "num_classes": 91}), "train").classes
    assert len(classes) == 91
    assert classes.channel_of(2) == 2


@pytest.mark.parametrize(
    ("augment", "kind"),
    [("released", ReleasedAugmentation), ("lsj", LargeScaleJitter), ("flip", FlipOnly), ("none", TestResize)],
)
def test_every_augmentation_is_known(augment, kind):
    assert isinstance(build_augmentation(DataSection(augment=augment)), kind)


def test_an_empty_data_root_is_named_with_its_cure(data_root):
    with pytest.raises(ConfigError, match=r"data\.root is empty: .*data\.root=FOLDER"):
        build_dataset(tiny_experiment(data_root, data={"root": ""}), "train")


def test_a_missing_folder_or_file_is_named(data_root):
    with pytest.raises(DataError, match="nowhere"):
        build_dataset(tiny_experiment(data_root, data={"root": "nowhere"}), "val")
    with pytest.raises(DataError, match=r"missing\.json"):
        build_dataset(tiny_experiment(data_root, data={"train_annotations": "missing.json"}), "train")
