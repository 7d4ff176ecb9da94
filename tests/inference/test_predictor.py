"""One call from an image to its objects, and the messages that a wrong file or image gets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import CLASSES, tiny_experiment, write_model

from solq_lab.boxes import cxcywh_to_xyxy
from solq_lab.build import build_model
from solq_lab.config import ConfigError
from solq_lab.data.annotations import DataError
from solq_lab.inference.predictor import Predictor, read_pixels
from solq_lab.models.weights import WeightMismatch, save_weights
from solq_lab.runs import RunError, create_run, load_run
from solq_lab.structures import PIXEL_MEAN, PIXEL_STD, ImageBatch

ORIENTATION = 0x0112  # EXIF tag; 6: turn by 90 degrees clockwise to stand upright


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory):
    return tiny_experiment(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def weights(experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("weights") / "weights.safetensors", experiment)


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return Predictor(weights, device="cpu")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def assert_same(first, second) -> None:
    assert [(*one[:3], one.mask) for one in first] == [(*one[:3], one.mask) for one in second]
    assert torch.equal(first.queries, second.queries)


def test_detections_are_the_models_own_in_pixels_of_the_given_image(predictor: Predictor, image: np.ndarray):
    """48 is the test scale: an image of twice that size is halved, and boxes come back doubled."""
    found = predictor.predict(image)
    height, width = predictor.experiment.data.test_scale * 2 // 3, predictor.experiment.data.test_scale
    small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    pixels = (torch.from_numpy(np.array(small)).float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    with torch.no_grad():
        batch = ImageBatch(pixels.permute(2, 0, 1)[None], torch.zeros(1, height, width, dtype=torch.bool))
        last = predictor.model(batch).layers[-1]
    boxes = cxcywh_to_xyxy(last.boxes[0]) * torch.tensor([96, 64, 96, 64])
    torch.testing.assert_close(
        found.boxes, boxes[found.queries], atol=0.1, rtol=0
    )  # torch and PIL round apart by 1/255
    torch.testing.assert_close(found.scores, last.logits[0].sigmoid()[found.queries, found.labels], atol=1e-3, rtol=0)
    assert [rle["size"] for rle in found.masks] == [[64, 96]] * len(found.names)
    assert set(found.names) <= {"triangle", "diamond"}
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_path_pil_array_and_tensor_give_the_same(predictor: Predictor, image: np.ndarray, tmp_path: Path):
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = predictor.predict(image)
    assert_same(predictor.predict(tmp_path / "image.png"), expected)
    assert_same(predictor.predict(str(tmp_path / "image.png")), expected)
    assert_same(predictor.predict(Image.fromarray(image)), expected)
    assert_same(predictor.predict(torch.from_numpy(image).permute(2, 0, 1)), expected)
    assert_same(predictor.predict(image[..., ::-1][..., ::-1]), expected)


def test_a_list_gives_what_its_images_give_alone(predictor: Predictor, image: np.ndarray, tmp_path: Path):
    """In batches too where all images have one size: then nothing is padded."""
    images = [image, 255 - image, Image.fromarray(image), image[::-1]]
    alone = [predictor.predict(one) for one in images]
    for one, found in zip(alone, predictor.predict(images), strict=True):
        assert_same(one, found)
    for one, found in zip(alone, predictor.predict(images, batch=3), strict=True):
        torch.testing.assert_close(found.scores, one.scores, atol=1e-5, rtol=0)
    assert predictor.predict([]) == []
    mixed = predictor.predict([image, image[:40]], batch=2)
    assert [found.image_size for found in mixed] == [(64, 96), (40, 96)]


def test_a_batch_of_unlike_shapes_holds_no_more_padding_than_image(predictor: Predictor, monkeypatch):
    """A panorama beside an upright strip would be padded to a square of their long sides."""
    given = []
    forward = predictor.model.forward
    monkeypatch.setattr(predictor.model, "forward", lambda batch: given.append(batch.padding) or forward(batch))
    shapes = [(1, 400), (300, 1), (48, 64), (64, 48), (2, 380), (48, 48)]
    found = predictor.predict([np.full((*shape, 3), 90, dtype=np.uint8) for shape in shapes], batch=6)
    assert [one.image_size for one in found] == shapes
    assert sorted(len(padding) for padding in given) == [1, 2, 3]
    for padding in given:
        pixels = [max(h, 32) * max(w, 32) for h, w in ImageBatch(padding, padding).sizes.tolist()]
        assert padding.numel() <= 2 * sum(pixels)


def test_detections_know_their_image_its_size_and_categories(predictor: Predictor, image: np.ndarray, tmp_path: Path):
    found = predictor.predict(image)
    assert found.image_size == (64, 96)
    assert set(found.category_ids) <= {1, 2}
    assert len(found.to_coco(image_id=4)) == len(found)
    assert found.plot().size == (96, 64)
    assert repr(predictor) == "<Predictor tiny: 2 classes, dct codec, on cpu>"


def test_a_grey_or_transparent_image_is_read_as_rgb(predictor: Predictor, image: np.ndarray):
    grey = Image.fromarray(image[..., 0])
    assert_same(predictor.predict(grey), predictor.predict(np.repeat(image[..., :1], 3, axis=2)))
    transparent = Image.fromarray(image).convert("RGBA")
    assert_same(predictor.predict(transparent), predictor.predict(image))


def test_a_file_is_turned_upright_but_an_open_image_is_taken_as_its_pixels_lie(
    predictor: Predictor, image: np.ndarray, tmp_path: Path, monkeypatch
):
    lying = Image.fromarray(image)
    exif = lying.getexif()
    exif[ORIENTATION] = 6
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = np.ascontiguousarray(np.rot90(image, k=-1))
    assert np.array_equal(read_pixels(tmp_path / "lying.png"), upright)
    assert_same(predictor.predict(tmp_path / "lying.png"), predictor.predict(upright))
    monkeypatch.setattr(predictor, "orientation", "stored")  # as of a data set that counts stored pixels
    assert_same(predictor.predict(tmp_path / "lying.png"), predictor.predict(image))
    with Image.open(tmp_path / "lying.png") as opened:
        assert_same(predictor.predict(opened), predictor.predict(image))


def test_a_run_its_folder_and_its_weights_are_the_same_model(experiment, weights: Path, image, tmp_path: Path):
    run = create_run(experiment, tmp_path)
    run.weights.write_bytes(weights.read_bytes())
    expected = Predictor(weights, device="cpu").predict(image)
    assert_same(Predictor(run.folder, device="cpu").predict(image), expected)
    assert_same(Predictor(load_run(run.folder), device="cpu").predict(image), expected)


def test_a_predictor_knows_what_it_was_built_from(predictor: Predictor, experiment):
    assert predictor.experiment == experiment
    assert predictor.classes == CLASSES
    assert predictor.codec.vector_dim == experiment.codec.vector_dim
    assert predictor.device == torch.device("cpu")
    assert not predictor.model.training


def test_top_k_limits_detections_and_defaults_to_the_experiments(weights: Path, image: np.ndarray):
    assert len(Predictor(weights, device="cpu", top_k=3).predict(image).scores) == 3
    assert len(Predictor(weights, device="cpu").predict(image).scores) == 16  # 8 queries x 2 classes, below 100


def test_a_plain_detector_predicts_without_masks(tmp_path: Path, image: np.ndarray):
    experiment = tiny_experiment(tmp_path, codec={"kind": "none"}, model={"standardise_vectors": False})
    predictor = Predictor(write_model(tmp_path / "detector.safetensors", experiment), device="cpu")
    assert predictor.codec is None
    assert predictor.predict(image).masks is None


@pytest.mark.parametrize(
    ("array", "cure"),
    [
        (np.zeros((4, 4, 3), np.float32), r"array \(4, 4, 3\) of float32; .*\.astype\(np\.uint8\)"),
        (np.zeros((3, 4, 5), np.uint8), r"array \(3, 4, 5\) of uint8; .*\.transpose\(1, 2, 0\)"),
        (np.zeros((4, 4), np.uint8), r"array \(4, 4\) of uint8; .*convert\('RGB'\)"),
        (np.zeros((4, 4, 4), np.uint8), r"array \(4, 4, 4\) of uint8; .*convert\('RGB'\)"),
        (np.zeros((0, 4, 3), np.uint8), r"array \(0, 4, 3\) of uint8; .*at least one pixel"),
    ],
)
def test_an_array_of_another_type_or_shape_is_rejected_with_the_cure(
    predictor: Predictor, array: np.ndarray, cure: str
):
    with pytest.raises(DataError, match=cure):
        predictor.predict(array)


def test_something_that_is_no_image_is_rejected_by_name(predictor: Predictor, tmp_path: Path, image: np.ndarray):
    with pytest.raises(DataError, match=r"missing\.jpg: cannot be read: No such file"):
        predictor.predict(tmp_path / "missing.jpg")
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(DataError, match=r"notes\.txt: not a whole image \(\d+ bytes; a format unknown here\)"):
        predictor.predict(tmp_path / "notes.txt")
    Image.fromarray(image).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"half\.jpg: not a whole image \(\d+ bytes; "):
        predictor.predict(tmp_path / "half.jpg")
    with pytest.raises(DataError, match="a folder, no image"):
        predictor.predict(tmp_path)
    with pytest.raises(DataError, match="more than 8 bits per channel"):
        predictor.predict(Image.fromarray(image[..., 0].astype(np.float32)))
    with pytest.raises(DataError, match=r"tensor \(3, 4, 4\) of torch.float32; allowed is \(3, H, W\) of uint8"):
        predictor.predict(torch.zeros(3, 4, 4))
    with pytest.raises(DataError, match="an image cannot be a int; allowed are a path, a PIL image"):
        predictor.predict(3)


def test_a_file_that_is_no_checkpoint_is_rejected_by_name(tmp_path: Path):
    with pytest.raises(WeightMismatch, match=r"missing\.safetensors: no such weights file"):
        Predictor(tmp_path / "missing.safetensors")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(WeightMismatch, match=r"notes\.txt: not a safetensors file .*import-weights"):
        Predictor(tmp_path / "notes.txt")


def test_weights_without_an_experiment_or_classes_are_rejected_with_the_cure(tmp_path: Path, experiment):
    path = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightMismatch, match=r"bare\.safetensors: .* no experiment.*solq-lab import-weights"):
        Predictor(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"experiment": experiment.to_yaml()})
    with pytest.raises(WeightMismatch, match=r"bare\.safetensors: .* no class map"):
        Predictor(path)


def test_weights_of_another_network_than_the_one_beside_them_are_rejected(weights: Path, tmp_path: Path, experiment):
    path = write_model(tmp_path / "other.safetensors", experiment, build_model(experiment, 3))
    with pytest.raises(WeightMismatch, match=r"other\.safetensors: .* has shape \(3"):
        Predictor(path)


def test_an_experiment_from_another_version_names_the_file_and_the_key(tmp_path: Path, experiment):
    path = tmp_path / "old.safetensors"
    save_weights(path, {"x": torch.zeros(1)}, experiment=experiment.to_yaml() + "colour: red\n", classes="{}")
    with pytest.raises(ConfigError, match=r"old\.safetensors \(stored experiment\): unknown key colour"):
        Predictor(path)


def test_a_run_without_a_finished_model_says_what_is_there(tmp_path: Path, experiment, weights: Path):
    run = create_run(experiment, tmp_path)
    with pytest.raises(RunError, match=r"tiny: this run has no weights\.safetensors yet; no checkpoint either .*exper"):
        Predictor(run.folder)
    checkpoint = run.checkpoints / "step_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(weights.read_bytes())
    with pytest.raises(RunError, match=r"finish the training, or give .*step_0000003/weights\.safetensors"):
        Predictor(run.folder)
    assert len(Predictor(checkpoint / "weights.safetensors").classes) == 2
    with pytest.raises(RunError, match=r"experiment\.yaml"):
        Predictor(tmp_path)
